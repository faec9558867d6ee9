# A ResNet with FPN, top-down, on the embedded shapes, pruned to half its FLOPs during training:
# python tools/train.py configs/keypoint/fpn_prune.py
_base_ = ['../_base_/pose_fpn_shapes.py', '../_base_/prune_shapes.py']

custom_imports = dict(imports=['mmprune', 'mmprune.mm.demo.keypoint'])
custom_hooks = [*_base_.custom_hooks, _base_.prune_hook]
