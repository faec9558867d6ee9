"""Pruned checkpoints of small models, made without training."""

import torch

import mmprune
from tools.zoo import build, load

META = {
    'detection': {'classes': ['circle', 'square', 'triangle', 'ring', 'cross', 'figure']},
    'pose': {'keypoint_id2name': dict(enumerate('abcdef'))},
}


def pruned(config, task='detection', **budget):
    """A pruned model in evaluation mode, with its ``cfg`` and ``dataset_meta``."""
    model, forward = build(config, mode='tensor' if task == 'pose' else 'loss')
    mmprune.prune(model, forward, score='l2', **(budget or dict(keep_channels=0.7)))
    model.cfg, model.dataset_meta = load(config), META[task]
    return model.eval()


def saved(model, path):
    """Its checkpoint, as a training's hook writes it; the path."""
    meta = {'mmprune': mmprune.plan_of(model).to_meta(), 'dataset_meta': model.dataset_meta}
    torch.save({'meta': meta, 'state_dict': model.state_dict()}, path)
    return str(path)
