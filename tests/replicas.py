"""Two processes with a replica of a model each, as DistributedDataParallel has them."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import torch
from torch import distributed as dist
from torch.multiprocessing.spawn import spawn


def on_two(work: Callable[[int, Path], None], folder: Path) -> None:
    """Run ``work(rank, folder)`` in two processes that one gloo group joins. ``work`` is a function of a module."""
    spawn(_process, (work, folder), nprocs=2)


def _process(rank: int, work: Callable[[int, Path], None], folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    work(rank, folder)
    dist.destroy_process_group()
    # DistributedDataParallel holds on to the group, whose threads may still be letting go of tensors: they abort a
    # process whose interpreter ends meanwhile (pytorch/pytorch#179291).
    os._exit(0)
