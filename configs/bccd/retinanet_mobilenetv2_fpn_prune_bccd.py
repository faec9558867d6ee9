# From the trained baseline, as with Faster R-CNN.
_base_ = './retinanet_mobilenetv2_fpn_bccd.py'

custom_imports = dict(imports=['mmprune'])
# The results are of 30 cuts; by default so short a training has fewer.
custom_hooks = [dict(type='PruneHook', keep_flops=0.5, steps=30)]
optim_wrapper = dict(optimizer=dict(lr=6e-4))
load_from = 'work_dirs/retinanet_mobilenetv2_fpn_bccd/epoch_8.pth'
