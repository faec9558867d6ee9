# ResNet-50 V2 (pre-activation) on crops of the embedded shapes, pruned to half its FLOPs during
# training: python tools/train.py configs/classification/resnet_v2_prune.py
_base_ = ['../_base_/shapes_classification.py', '../_base_/prune_shapes.py']

model = dict(net=dict(name='resnet_v2', depth=50))
custom_hooks = [_base_.prune_hook]
