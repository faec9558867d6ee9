# Prunes the trained baseline to half its FLOPs in the first fifth of the training, during the warm-up
# of the learning rate. The schedule is that of the baseline, with twice the learning rate
# (docs/results.md).
_base_ = './faster-rcnn_mobilenetv2_fpn_bccd.py'

custom_imports = dict(imports=['mmprune'])
custom_hooks = [dict(type='PruneHook', keep_flops=0.5)]
optim_wrapper = dict(optimizer=dict(lr=6e-4))
load_from = 'work_dirs/faster-rcnn_mobilenetv2_fpn_bccd/epoch_8.pth'
