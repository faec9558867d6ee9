"""The embedded data set, with which the example configs train in minutes without a download.

``shapes`` writes a data set of drawn shapes and puppets in COCO's layout. ``detection``, ``keypoint``
and ``classification`` have the data set classes for mmdet, mmpose and mmengine, which write it on first
use, and other parts that the example configs need and OpenMMLab lacks.
"""
