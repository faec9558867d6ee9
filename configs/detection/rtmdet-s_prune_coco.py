# RTMDet-s on COCO, pruned to half its FLOPs. Its EMA model is pruned too.
_base_ = ['mmdet::rtmdet/rtmdet_s_8xb32-300e_coco.py', '../_base_/prune_coco.py']

custom_imports = dict(imports=['mmprune'])
model = dict(backbone=dict(init_cfg=None))  # load_from has all weights
custom_hooks = [*_base_.custom_hooks, _base_.prune_hook]
load_from = 'https://download.openmmlab.com/mmdetection/v3.0/rtmdet/rtmdet_s_8xb32-300e_coco/rtmdet_s_8xb32-300e_coco_20220905_161602-387a891e.pth'  # noqa: E501
