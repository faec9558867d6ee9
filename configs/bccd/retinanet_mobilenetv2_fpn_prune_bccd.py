# Prunes the trained baseline, as faster-rcnn_mobilenetv2_fpn_prune_bccd.py does.
_base_ = './retinanet_mobilenetv2_fpn_bccd.py'

custom_imports = dict(imports=['mmprune'])
custom_hooks = [dict(type='PruneHook', keep_flops=0.5)]
optim_wrapper = dict(optimizer=dict(lr=6e-4))
load_from = 'work_dirs/retinanet_mobilenetv2_fpn_bccd/epoch_8.pth'
