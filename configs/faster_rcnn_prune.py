# A small Faster R-CNN with FPN, trained on the embedded shapes, pruned step by step to half its
# FLOPs, trained on, evaluated: python tools/train.py configs/faster_rcnn_prune.py
_base_ = ['./_base_/faster_rcnn_shapes.py', './_base_/prune_shapes.py']

custom_imports = dict(imports=['mmprune'])
custom_hooks = [_base_.prune_hook]
