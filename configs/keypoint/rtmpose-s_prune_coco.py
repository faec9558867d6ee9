# RTMPose-s on COCO, pruned to half its FLOPs; its EMA model is cut too.
_base_ = [
    'mmpose::body_2d_keypoint/rtmpose/coco/rtmpose-s_8xb256-420e_coco-256x192.py',
    '../_base_/prune_coco.py',
]

custom_imports = dict(imports=['mmprune'])
# None of its stages is frozen by default: all are trained, so all are pruned.
model = dict(backbone=dict(init_cfg=None))  # all weights come from load_from
custom_hooks = [*_base_.custom_hooks, _base_.prune_hook]
load_from = 'https://download.openmmlab.com/mmpose/v1/projects/rtmposev1/rtmpose-s_simcc-coco_pt-aic-coco_420e-256x192-8edcf0d7_20230127.pth'  # noqa: E501
