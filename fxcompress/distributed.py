"""Several processes under ``torchrun``: who is who, and results that all of them share.

Everything here works in one process too, where there is nothing to share. Only rank 0 writes files.
"""

from __future__ import annotations

import atexit
import copy
import io
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar, cast

import torch
from torch import Tensor, nn
from torch import distributed as dist

__all__ = [
    "Mergeable",
    "average",
    "gather",
    "is_main",
    "local_device",
    "merge",
    "placed_on",
    "rank",
    "share_buffers",
    "spread",
    "world",
]

T = TypeVar("T")
R = TypeVar("R")


def world() -> int:
    """How many processes there are. The first call joins those that ``torchrun`` started."""
    if not dist.is_available():
        return 1
    if not dist.is_initialized():
        if not dist.is_torchelastic_launched() or int(os.environ.get("WORLD_SIZE", "1")) == 1:
            return 1
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
        atexit.register(_leave)
    return dist.get_world_size()


def _leave() -> None:
    _Exchange.leave()
    if dist.is_initialized():
        dist.destroy_process_group()


class _Exchange:
    """The group through which everything here is sent: all processes, and nobody else's work.

    A group's threads may still be letting go of tensors when a collective has returned, for which they need the
    interpreter: one that ends meanwhile aborts the process (pytorch/pytorch#179291). Destroying a group waits for its
    threads, but DistributedDataParallel never lets go of the default group, so ours is one that it does not know.
    """

    group: dist.ProcessGroup | None = None

    @classmethod
    def join(cls) -> dist.ProcessGroup:
        group = cls.group
        if group is None:
            atexit.register(cls.leave)
        if group is None or dist.get_world_size(group) < 1:  # -1: somebody has destroyed all groups
            group = cls.group = cast(dist.ProcessGroup, dist.new_group())
        return group

    @classmethod
    def leave(cls) -> None:
        group, cls.group = cls.group, None
        if group is not None and dist.is_initialized() and dist.get_world_size(group) > 0:
            dist.destroy_process_group(group)


def rank() -> int:
    """Which of the processes this is, counted from 0."""
    return dist.get_rank() if world() > 1 else 0


def is_main() -> bool:
    """Whether this process is the one that writes."""
    return rank() == 0


def local_device(device: torch.device) -> torch.device:
    """``device``, or this process's own GPU where ``device`` is one and there are several processes."""
    if world() == 1 or device.type != "cuda":
        return device
    own = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(own)
    return own


@contextmanager
def placed_on(model: nn.Module, device: torch.device | None) -> Iterator[None]:
    """Have ``model`` on ``device``, of several processes each on its own, inside a ``with``, then where it was."""
    first = None if device is None else next(iter([*model.parameters(), *model.buffers()]), None)
    if device is None or first is None:
        yield
        return
    home = first.device
    model.to(local_device(device))
    try:
        yield
    finally:
        model.to(home)


def gather(value: T) -> list[T]:
    """``value`` of every process, by rank, on every process: tensors and plain data, nested. Nothing is unpickled."""
    if world() == 1:
        return [value]
    buffer = io.BytesIO()
    torch.save(value, buffer)
    mine = torch.frombuffer(bytearray(buffer.getvalue()), dtype=torch.uint8)
    sizes = _all_gather(torch.tensor([mine.numel()], device="cpu"))
    longest = max(int(size) for size in sizes)
    padded = torch.zeros(longest, dtype=torch.uint8, device="cpu")
    padded[: mine.numel()] = mine
    parts = _all_gather(padded)
    blobs = [part[: int(size)].numpy().tobytes() for part, size in zip(parts, sizes, strict=True)]
    return [torch.load(io.BytesIO(blob), map_location="cpu", weights_only=True) for blob in blobs]


def _all_gather(tensor: Tensor) -> list[Tensor]:
    parts = [torch.empty_like(tensor) for _ in range(world())]
    dist.all_gather(parts, tensor, group=_Exchange.join())
    return parts


def average(tensors: Iterable[Tensor]) -> None:
    """Make every tensor, in place, the mean of what the processes have in its stead."""
    if world() == 1:
        return
    for tensor in tensors:
        dist.all_reduce(tensor, group=_Exchange.join())
        tensor /= world()


def share_buffers(model: nn.Module) -> None:
    """Give every process the buffers of rank 0: statistics that each has kept of its own samples."""
    if world() == 1:
        return
    for buffer in model.buffers():
        sent = buffer.to(torch.uint8) if buffer.dtype is torch.bool else buffer.contiguous()
        dist.broadcast(sent, 0, group=_Exchange.join())
        if sent is not buffer:
            buffer.copy_(sent)


def spread(items: Iterable[T], function: Callable[[T], R]) -> list[R]:
    """``[function(item) for item in items]``, every process working on its share, all of them getting the whole list.

    Results are tensors and plain data. An exception in one process is raised there and ends the others.
    """
    every = list(items)
    shares = gather([function(item) for item in every[rank() :: world()]])
    return [shares[number % world()][number // world()] for number in range(len(every))]


class Mergeable(Protocol):
    """A calibrator: what it has seen can be saved, loaded, and joined with what another has seen."""

    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...
    def merge(self, other: Any) -> None: ...


def merge(calibrators: Sequence[Mergeable]) -> None:
    """Let every calibrator know, on every process, what its like on the others have seen."""
    if world() == 1:
        return
    states = gather([calibrator.state_dict() for calibrator in calibrators])
    for number, calibrator in enumerate(calibrators):
        calibrator.load_state_dict(states[0][number])
        for other_states in states[1:]:
            other = copy.deepcopy(calibrator)
            other.load_state_dict(other_states[number])
            calibrator.merge(other)
