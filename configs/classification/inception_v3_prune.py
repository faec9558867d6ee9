# Inception V3 on crops of the embedded shapes, pruned to half its FLOPs during training:
# python tools/train.py configs/classification/inception_v3_prune.py
_base_ = ['../_base_/shapes_classification.py', '../_base_/prune_shapes.py']

model = dict(net=dict(name='inception_v3'))
# The auxiliary head needs pictures of this size during training.
train_dataloader = dict(
    batch_size=8,
    dataset=dict(pipeline=[dict(type='LoadCrop', size=299, jitter=0.15), dict(type='PackLabel')]),
)
val_dataloader = dict(dataset=dict(pipeline=[dict(type='LoadCrop', size=299), dict(type='PackLabel')]))
test_dataloader = val_dataloader
custom_hooks = [_base_.prune_hook]
