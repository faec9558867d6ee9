# Simple Baseline on the embedded shapes, pruned to half its FLOPs during training:
# python tools/train.py configs/keypoint/simple_baseline_prune.py
_base_ = ['../_base_/simple_baseline_shapes.py', '../_base_/prune_shapes.py']

custom_imports = dict(imports=['mmprune'])
custom_hooks = [*_base_.custom_hooks, _base_.prune_hook]
