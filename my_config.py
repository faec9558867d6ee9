# my_config.py
_base_ = 'configs/_base_/faster_rcnn_shapes.py'

custom_imports = dict(imports=['mmprune'])
custom_hooks = [dict(type='PruneHook', keep_flops=0.5, divisor=8)]
load_from = 'work_dirs/faster_rcnn_shapes/epoch_12.pth'
optim_wrapper = dict(optimizer=dict(lr=3e-4))
