# A small Faster R-CNN with FPN on the embedded shapes, pruned to half its FLOPs during training:
# python tools/train.py configs/faster_rcnn_prune.py
_base_ = ['./_base_/faster_rcnn_shapes.py', './_base_/prune_shapes.py']

custom_imports = dict(imports=['mmprune'])
# All five levels read the channels of the neck, so their scores are the highest, and hardly any would
# be removed. Therefore the neck has a separate target.
custom_hooks = [dict(_base_.prune_hook, parts=dict(neck=dict(keep_channels=0.75)))]
