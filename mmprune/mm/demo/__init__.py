"""The embedded data set, with which the example configs train in minutes without a download.

``shapes`` writes a data set of drawn shapes and puppets in COCO's layout. ``detection``, ``keypoint``
and ``classification`` contain data set classes for mmdet, mmpose and mmengine, which write the data set
on first use. They also contain other parts that the example configs need and OpenMMLab lacks.
"""
