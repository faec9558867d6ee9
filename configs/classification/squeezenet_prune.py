# SqueezeNet on crops of the embedded shapes, pruned to half its FLOPs during training:
# python tools/train.py configs/classification/squeezenet_prune.py
_base_ = ['../_base_/shapes_classification.py', '../_base_/prune_shapes.py']

model = dict(net=dict(name='squeezenet1_1'))
# Without batch norm the network needs a lower learning rate.
optim_wrapper = dict(optimizer=dict(lr=1e-4))
custom_hooks = [_base_.prune_hook]
