# R-FCN with FPN on the embedded shapes, pruned to half its FLOPs during training:
# python tools/train.py configs/detection/rfcn_prune.py
_base_ = ['../_base_/rfcn_shapes.py', '../_base_/prune_shapes.py']

custom_imports = dict(imports=['mmprune', 'mmprune.mm.models.rfcn'])
custom_hooks = [_base_.prune_hook]
