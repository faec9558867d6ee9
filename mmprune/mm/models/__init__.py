"""Models that mmdet and mmengine lack: R-FCN for mmdet, and classifiers for mmengine's Runner.

``rfcn`` needs mmdet and ``classifier`` needs torchvision, so a config imports the module that it uses.
"""
