# A top-down pose estimator with a feature pyramid instead of deconvolutions.
_base_ = './simple_baseline_shapes.py'
custom_imports = dict(imports=['mmprune', 'mmprune.mm.demo.keypoint'])
model = dict(
    backbone=dict(out_indices=(0, 1, 2, 3)),
    neck=dict(
        type='TopDownFPN',
        in_channels=[32, 64, 128, 256],
        out_channels=64,
        num_outs=4,
        norm_cfg=dict(type='BN'),
    ),
    head=dict(in_channels=64, deconv_out_channels=None),
)
