# VGG-16 with batch norm on crops of the embedded shapes, pruned to half its FLOPs during training:
# python tools/train.py configs/classification/vgg16_bn_prune.py
_base_ = ['../_base_/shapes_classification.py', '../_base_/prune_shapes.py']

model = dict(net=dict(name='vgg16_bn'))
custom_hooks = [_base_.prune_hook]
