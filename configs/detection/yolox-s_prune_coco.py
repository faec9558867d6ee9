# YOLOX-s on COCO, pruned to half its FLOPs. Its EMA model is pruned too.
_base_ = ['mmdet::yolox/yolox_s_8xb8-300e_coco.py', '../_base_/prune_coco.py']

custom_imports = dict(imports=['mmprune'])
model = dict(backbone=dict(init_cfg=None))  # load_from has all weights
# YOLOX-Nano loses half as much AP with this score as with the default (docs/results.md, "Which score").
custom_hooks = [*_base_.custom_hooks, dict(_base_.prune_hook, score='taylor')]
load_from = 'https://download.openmmlab.com/mmdetection/v2.0/yolox/yolox_s_8x8_300e_coco/yolox_s_8x8_300e_coco_20211121_095711-4592a793.pth'  # noqa: E501
