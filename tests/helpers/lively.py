"""Detectors with random weights that find something: their last layers are scaled so that scores and
offsets spread as those of a trained one do."""

import torch

from mmprune.mm.deploy import check
from mmprune.mm.deploy.patches import predicting

SPREAD = {
    'retina_cls': (-3, 1.5), 'rtm_cls': (-3, 1.5), 'multi_level_conv_cls': (0, 1.5),
    'multi_level_conv_obj': (-1, 1.5), 'multi_level_conv_reg': (0, 0.5), 'conv_cls': (-3, 1.5),
    'conv_reg': (1, 0.5), 'gfl_cls': (-3, 1.5), 'atss_cls': (-3, 1.5), 'rpn_cls': (0, 2),
    'rpn_reg': (0, 0.3), 'fc_cls': (0, 2), 'fc_reg': (0, 0.5), 'retina_reg': (0, 0.3),
}  # fmt: skip
"""Mean and spread of the outputs of a head's last layers, by their names."""


def enliven(model, size=(128, 160)):
    """Scales the last layers of ``model`` in place, first those of proposals; the model."""
    inputs, samples = check.prepared(model, check.pictures_for(size, 32, 2)[0])
    for names in ('rpn_', 'retina_reg conv_reg multi_level_conv_reg fc_reg', ''):
        layers = {
            layer: SPREAD[kind]
            for name, layer in model.named_modules()
            for kind in SPREAD
            if isinstance(layer, torch.nn.Conv2d | torch.nn.Linear)
            and kind in name.split('.')
            and (not names or any(kind.startswith(start) for start in names.split()))
        }
        seen = {}

        def note(layer, _, out, seen=seen):
            seen.setdefault(layer, []).append(out.flatten())

        hooks = [layer.register_forward_hook(note) for layer in layers]
        with torch.no_grad(), predicting():
            model.predict(inputs, samples, rescale=False)
            for layer, outs in seen.items():
                out, (mean, spread) = torch.cat(outs), layers[layer]
                factor = spread / out.std()
                layer.weight.mul_(factor)
                layer.bias.sub_(out.mean()).mul_(factor).add_(mean)
        for hook in hooks:
            hook.remove()
    return model


def finds_nothing(model):
    """Puts scores of classes below every threshold, in place; the model."""
    for name, layer in model.named_modules():
        if isinstance(layer, torch.nn.Conv2d | torch.nn.Linear):
            kind = next((k for k in SPREAD if k in name.split('.') and 'cls' in k), None)
            if kind == 'fc_cls':
                layer.bias.data[-1] = 50.0  # the background
            elif kind not in (None, 'rpn_cls'):
                layer.bias.data[:] = -50.0
    return model
