# Stacked Hourglass on the embedded shapes, pruned to half its FLOPs during training:
# python tools/train.py configs/keypoint/hourglass_prune.py
_base_ = ['../_base_/hourglass_shapes.py', '../_base_/prune_shapes.py']

custom_imports = dict(imports=['mmprune'])
# The training has few epochs, so the cuts begin after a third of it rather than after half.
custom_hooks = [*_base_.custom_hooks, dict(_base_.prune_hook, begin=1 / 3)]
