# HRNet on COCO, pruned to half its FLOPs.
_base_ = [
    'mmpose::body_2d_keypoint/topdown_heatmap/coco/td-hm_hrnet-w32_8xb64-210e_coco-256x192.py',
    '../_base_/prune_coco.py',
]

custom_imports = dict(imports=['mmprune'])
model = dict(backbone=dict(init_cfg=None))  # load_from has all weights
custom_hooks = [*_base_.custom_hooks, _base_.prune_hook]
load_from = 'https://download.openmmlab.com/mmpose/v1/body_2d_keypoint/topdown_heatmap/coco/td-hm_hrnet-w32_8xb64-210e_coco-256x192-81c58e40_20220909.pth'  # noqa: E501
