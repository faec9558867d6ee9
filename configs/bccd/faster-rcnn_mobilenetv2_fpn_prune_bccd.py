# From the trained baseline: half the FLOPs go in the first fifth, while the rate warms up; then the
# full schedule again, at twice the rate (docs/results.md).
_base_ = './faster-rcnn_mobilenetv2_fpn_bccd.py'

custom_imports = dict(imports=['mmprune'])
# The results are of 30 cuts; by default so short a training has fewer.
custom_hooks = [dict(type='PruneHook', keep_flops=0.5, steps=30)]
optim_wrapper = dict(optimizer=dict(lr=6e-4))
load_from = 'work_dirs/faster-rcnn_mobilenetv2_fpn_bccd/epoch_8.pth'
