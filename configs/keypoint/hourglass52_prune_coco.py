# Stacked Hourglass on COCO, pruned to half its FLOPs.
_base_ = [
    'mmpose::body_2d_keypoint/topdown_heatmap/coco/td-hm_hourglass52_8xb32-210e_coco-256x256.py',
    '../_base_/prune_coco.py',
]

custom_imports = dict(imports=['mmprune'])
model = dict(backbone=dict(init_cfg=None))  # load_from has all weights
custom_hooks = [
    *_base_.custom_hooks,
    # These layers connect stacks. This network has one stack, so they never run.
    dict(_base_.prune_hook, lock=['backbone.inters.*']),
]
load_from = 'https://download.openmmlab.com/mmpose/top_down/hourglass/hourglass52_coco_256x256-4ec713ba_20200709.pth'  # noqa: E501
