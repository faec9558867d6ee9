# Simple Baseline (ResNet and deconvolutions) on COCO, pruned to half its FLOPs.
_base_ = 'mmpose::body_2d_keypoint/topdown_heatmap/coco/td-hm_res50_8xb64-210e_coco-256x192.py'

custom_imports = dict(imports=['mmprune'])
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
    ),
]
