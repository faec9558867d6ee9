"""Jobs in several gloo processes on the CPU."""

import os
import socket
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import mmprune


def spawn(job: Any, count: int, folder: Path) -> list[Any]:
    """What ``job(folder)`` returns in each of ``count`` processes that joined one group, by rank."""
    with socket.socket() as probe:
        probe.bind(('127.0.0.1', 0))
        port = probe.getsockname()[1]
    mp.start_processes(_enter, (job, count, port, folder), count, start_method='fork')
    return [torch.load(folder / f'rank{rank}', weights_only=False) for rank in range(count)]


def _enter(rank: int, job: Any, count: int, port: int, folder: Path) -> None:
    torch.set_num_threads(1)
    os.environ |= dict(
        MASTER_ADDR='127.0.0.1',
        MASTER_PORT=str(port),
        RANK=str(rank),
        WORLD_SIZE=str(count),
        LOCAL_RANK=str(rank),
    )
    dist.init_process_group('gloo')
    try:
        result = job(folder)
    except mmprune.PruneError as error:
        result = f'PruneError: {error}'
    torch.save(result, folder / f'rank{rank}')
    dist.destroy_process_group()
