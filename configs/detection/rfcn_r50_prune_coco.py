# R-FCN on a dilated last stage, on COCO, pruned to half its FLOPs.
_base_ = ['../_base_/rfcn_r50_coco.py', '../_base_/prune_coco.py']

custom_imports = dict(imports=['mmprune', 'mmprune.mm.models.rfcn'])
# mmdet freezes the stem and the first stage, whose maps are the largest. The inputs of a frozen layer
# have no gradient and therefore no score, so they would not be pruned.
model = dict(backbone=dict(frozen_stages=-1, init_cfg=None))
custom_hooks = [_base_.prune_hook]
# No model zoo has weights for this network. Train configs/_base_/rfcn_r50_coco.py first.
load_from = 'work_dirs/rfcn_r50_coco/epoch_12.pth'
