# Prunes the trained baseline to half its FLOPs in the first fifth of the training, during the warm-up
# of the learning rate. The schedule is that of the baseline.
_base_ = './td-hm_mobilenetv2_face68-96x96.py'

custom_imports = dict(imports=['mmprune'])
custom_hooks = [*_base_.custom_hooks, dict(type='PruneHook', keep_flops=0.5)]
load_from = 'work_dirs/td-hm_mobilenetv2_face68-96x96/epoch_6.pth'
