# A small Faster R-CNN with FPN, trained on the embedded shapes, pruned step by step to half its
# FLOPs, trained on, evaluated: python tools/train.py configs/faster_rcnn_prune.py
_base_ = ['./_base_/faster_rcnn_shapes.py', './_base_/prune_shapes.py']

custom_imports = dict(imports=['mmprune'])
# Five levels read the neck, so its scores are the highest of all: it gets a target of its own.
custom_hooks = [dict(_base_.prune_hook, parts=dict(neck=dict(keep_channels=0.75)))]
