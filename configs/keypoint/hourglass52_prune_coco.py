# Stacked Hourglass on COCO, pruned to half its FLOPs.
_base_ = 'mmpose::body_2d_keypoint/topdown_heatmap/coco/td-hm_hourglass52_8xb32-210e_coco-256x256.py'

custom_imports = dict(imports=['mmprune'])
# None of its stages is frozen by default: all are trained, so all are pruned.
model = dict(backbone=dict(init_cfg=None))  # all weights come from load_from
custom_hooks = [
    *_base_.custom_hooks,
    dict(
        type='PruneHook',
        score='taylor',
        keep_flops=0.5,
        begin=2000,
        interval=500,
        steps=20,
        divisor=8,
        lock=['backbone.inters.*'],  # between stacks, and this is one: they never run
    ),
]
load_from = 'https://download.openmmlab.com/mmpose/top_down/hourglass/hourglass52_coco_256x256-4ec713ba_20200709.pth'  # noqa: E501
