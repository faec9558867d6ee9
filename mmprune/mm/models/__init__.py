"""Models that the zoos lack: R-FCN for mmdet, classifiers for mmengine's Runner, ResNet V2.

``rfcn`` needs mmdet, ``classifier`` torchvision; a config imports the one that it uses.
"""
