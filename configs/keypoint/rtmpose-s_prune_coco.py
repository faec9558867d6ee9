# RTMPose-s on COCO, pruned to half its FLOPs. Its EMA model is pruned too.
_base_ = [
    'mmpose::body_2d_keypoint/rtmpose/coco/rtmpose-s_8xb256-420e_coco-256x192.py',
    '../_base_/prune_coco.py',
]

custom_imports = dict(imports=['mmprune'])
model = dict(backbone=dict(init_cfg=None))  # load_from has all weights
custom_hooks = [*_base_.custom_hooks, _base_.prune_hook]
load_from = 'https://download.openmmlab.com/mmpose/v1/projects/rtmposev1/rtmpose-s_simcc-coco_pt-aic-coco_420e-256x192-8edcf0d7_20230127.pth'  # noqa: E501
