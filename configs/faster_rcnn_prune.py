# A small Faster R-CNN with FPN, trained on the embedded shapes, pruned step by step to half its
# FLOPs, trained on, evaluated: python tools/train.py configs/faster_rcnn_prune.py
_base_ = './_base_/faster_rcnn_shapes.py'

custom_imports = dict(imports=['mmprune'])
custom_hooks = [
    dict(
        type='PruneHook',
        score='taylor',
        keep_flops=0.5,
        begin=900,
        interval=37,
        steps=8,
        min_channels=4,
    )
]
