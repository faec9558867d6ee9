# RetinaNet on the embedded shapes, pruned to half its FLOPs during training:
# python tools/train.py configs/detection/retinanet_prune.py
_base_ = ['../_base_/retinanet_shapes.py', '../_base_/prune_shapes.py']

custom_imports = dict(imports=['mmprune'])
custom_hooks = [_base_.prune_hook]
