# RTMDet-s on COCO, pruned to half its FLOPs; its EMA model is cut too.
_base_ = ['mmdet::rtmdet/rtmdet_s_8xb32-300e_coco.py', '../_base_/prune_coco.py']

custom_imports = dict(imports=['mmprune'])
# None of its stages is frozen by default: all are trained, so all are pruned.
model = dict(backbone=dict(init_cfg=None))  # all weights come from load_from
custom_hooks = [*_base_.custom_hooks, _base_.prune_hook]
load_from = 'https://download.openmmlab.com/mmdetection/v3.0/rtmdet/rtmdet_s_8xb32-300e_coco/rtmdet_s_8xb32-300e_coco_20220905_161602-387a891e.pth'  # noqa: E501
