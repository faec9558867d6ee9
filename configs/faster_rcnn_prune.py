# A small Faster R-CNN with FPN, trained on the embedded shapes, pruned step by step to half its
# FLOPs, trained on, evaluated: python tools/train.py configs/faster_rcnn_prune.py
_base_ = './_base_/faster_rcnn_shapes.py'

custom_imports = dict(imports=['mmprune'])
custom_hooks = [
    dict(
        type='PruneHook',
        score=dict(name='taylor', per='flops'),
        keep_flops=0.5,
        begin=900,
        interval=37,
        steps=8,
        # Five levels read the neck, so its scores are the highest of all: it gets a target of its own.
        parts=dict(neck=dict(keep_channels=0.75)),
        min_channels=4,
        divisor=1,
    )
]
