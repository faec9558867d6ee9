"""Small real runs of mmengine's Runner, for the tests of the hook."""

from itertools import count
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.dataset import BaseDataset  # noqa: F401  (registers the samplers)
from mmengine.evaluator import BaseMetric
from mmengine.model import BaseModel
from mmengine.registry import DATASETS, METRICS, MODELS
from mmengine.runner import Runner
from torch import nn
from torch.nn import functional as F

_runs = count()


HOOK = dict(keep_flops=0.5, divisor=1, interval=5, steps=2, parts=dict(neck=dict(keep_channels=0.8)))
"""The neck costs little, and stays where nothing is asked of it."""


@MODELS.register_module(force=True)
class TwoBranch(BaseModel):
    """Images (N, 3, 12, 12) -> 4 classes, with a residual stream and two heads of one neck."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width))
        self.block = nn.Sequential(
            nn.Conv2d(width, 2 * width, 3, padding=1),
            nn.BatchNorm2d(2 * width),
            nn.ReLU(),
            nn.Conv2d(2 * width, width, 3, padding=1),
        )
        self.neck = nn.Conv2d(width, width, 1)
        self.small = nn.Linear(width, 4)
        self.large = nn.Linear(width * 4, 4)

    def forward(self, inputs: torch.Tensor, labels: torch.Tensor = None, mode: str = 'tensor') -> Any:
        x = self.stem(inputs).relu()
        x = self.neck((x + self.block(x)).relu())
        logits = self.small(x.mean((2, 3))) + self.large(F.adaptive_avg_pool2d(x, 2).flatten(1))
        if mode == 'loss':
            return {'loss': F.cross_entropy(logits, labels)}
        if mode == 'predict':
            return [(logits.argmax(1) == labels).float()]
        return logits


@MODELS.register_module(force=True)
class Sometimes(TwoBranch):
    """Its third head runs on some batches only, as those do that need boxes."""

    def __init__(self, first: int = 3) -> None:
        super().__init__()
        self.third = nn.Conv2d(16, 4, 1)
        self.first, self.batches = first, 0

    def train_step(self, *args: Any, **kwargs: Any) -> Any:
        self.batches += 1
        return super().train_step(*args, **kwargs)

    def forward(self, inputs: torch.Tensor, labels: torch.Tensor = None, mode: str = 'tensor') -> Any:
        if mode != 'loss' or self.batches < self.first:
            return super().forward(inputs, labels, mode)
        x = self.third(self.neck(self.stem(inputs).relu())).mean((2, 3))
        return super().forward(inputs, labels, mode) | {'loss_third': F.cross_entropy(x, labels)}


@DATASETS.register_module(force=True)
class Stripes(torch.utils.data.Dataset):
    """Noisy pictures whose class is the direction of their stripes; deterministic by index."""

    def __init__(self, length: int = 48) -> None:
        self.length = length
        self.metainfo = {'classes': ('a', 'b', 'c', 'd')}

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(index)
        label = index % 4
        grid = torch.arange(12.0)
        rows, columns = grid[:, None].expand(12, 12), grid[None].expand(12, 12)
        wave = (rows, columns, rows + columns, rows - columns)[label]
        picture = wave.mul(1.3).sin() + 0.5 * torch.randn(3, 12, 12, generator=generator)
        return {'inputs': picture.clone(), 'labels': label}


@METRICS.register_module(force=True)
class Right(BaseMetric):
    """The share of right answers."""

    def process(self, data_batch: Any, data_samples: Any) -> None:
        self.results += [float(v) for v in data_samples[0]]

    def compute_metrics(self, results: list[float]) -> dict[str, float]:
        return {'accuracy': sum(results) / len(results)}


def config(work_dir: Path, epochs: int = 4, hook: dict | None = None, **more: Any) -> Config:
    """A run of ``epochs`` of 6 iterations; ``hook``: options of the PruneHook."""
    loader = dict(
        batch_size=8,
        num_workers=0,
        collate_fn=dict(type='default_collate'),
        dataset=dict(type='Stripes'),
        sampler=dict(type='DefaultSampler', shuffle=True),
    )
    base = dict(
        default_scope='mmengine',
        model=dict(type='TwoBranch'),
        work_dir=str(work_dir),
        # Runs of one second would share their logger, and its file.
        experiment_name=f'{work_dir}_{next(_runs)}'.strip('/').replace('/', '_'),
        train_dataloader=loader,
        val_dataloader=dict(loader, sampler=dict(type='DefaultSampler', shuffle=False)),
        train_cfg=dict(by_epoch=True, max_epochs=epochs, val_interval=2),
        val_cfg=dict(),
        val_evaluator=dict(type='Right'),
        optim_wrapper=dict(type='OptimWrapper', optimizer=dict(type='SGD', lr=0.05, momentum=0.9)),
        default_hooks=dict(checkpoint=dict(type='CheckpointHook', interval=1)),
        custom_hooks=[dict(type='PruneHook', **(hook or HOOK))],
        randomness=dict(seed=0),
        log_level='WARNING',
        visualizer=dict(type='Visualizer', vis_backends=[dict(type='LocalVisBackend')]),
    )
    base.update(more)
    return Config(base)


def train(cfg: Config, resume: bool = False) -> Runner:
    cfg = cfg.copy()
    cfg.resume = resume
    cfg.experiment_name = f'{cfg.experiment_name}_{next(_runs)}'
    runner = Runner.from_cfg(cfg)
    runner.train()
    return runner
