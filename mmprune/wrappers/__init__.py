"""mmengine wrappers: of models, for several processes; of optimizers, for precision on a CPU."""

from mmprune.wrappers.amp import CPUAmpOptimWrapper
from mmprune.wrappers.ddp import PrunableDistributedDataParallel, rebuild_reducers

__all__ = ['CPUAmpOptimWrapper', 'PrunableDistributedDataParallel', 'rebuild_reducers']
