"""The embedded data set: drawn shapes and puppets in COCO layout, made in seconds.

`shapes` generates it, `drawing` draws one picture; `detection` and `keypoint` are the data sets of
mmdet and mmpose that make it on first use.
"""
