"""mmengine wrappers: of models, for several processes; of optimizers, for precision on a CPU."""

from mmprune.mm.wrappers.amp import CPUAmpOptimWrapper
from mmprune.mm.wrappers.ddp import PrunableDistributedDataParallel

__all__ = ['CPUAmpOptimWrapper', 'PrunableDistributedDataParallel']
