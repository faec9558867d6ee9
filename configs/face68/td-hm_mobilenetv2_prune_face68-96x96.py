# From the trained baseline: half the FLOPs go in the first fifth, while the rate warms up; then the
# full schedule again.
_base_ = './td-hm_mobilenetv2_face68-96x96.py'

custom_imports = dict(imports=['mmprune'])
# The results are of 30 cuts; by default so short a training may have fewer.
custom_hooks = [*_base_.custom_hooks, dict(type='PruneHook', keep_flops=0.5, steps=30)]
load_from = 'work_dirs/td-hm_mobilenetv2_face68-96x96/epoch_6.pth'
