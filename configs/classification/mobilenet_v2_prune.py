# MobileNet V2 on crops of the embedded shapes, pruned to half its FLOPs during training:
# python tools/train.py configs/classification/mobilenet_v2_prune.py
_base_ = ['../_base_/shapes_classification.py', '../_base_/prune_shapes.py']

model = dict(net=dict(name='mobilenet_v2'))
custom_hooks = [_base_.prune_hook]
