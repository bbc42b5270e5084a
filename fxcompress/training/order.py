"""The order of the data and the state of every random generator: both follow from the seed, the epoch and the process."""

from __future__ import annotations

import hashlib
import itertools
import random
from collections.abc import Iterable, Iterator, Sized
from contextlib import contextmanager
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, IterableDataset, RandomSampler, SequentialSampler

from fxcompress.data import fed
from fxcompress.distributed import rank, world
from fxcompress.errors import ConfigError, DataError

__all__ = ["Feed", "batch_size", "preserved_randomness", "random_state", "restore_random_state", "seed_everything"]

T = TypeVar("T")


def seed_everything(*parts: int) -> None:
    """Seed torch's, Python's and NumPy's generators from these numbers together."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    seed = int.from_bytes(digest, "little") >> 1
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)


def random_state() -> dict[str, Any]:
    """The state of torch's, Python's and NumPy's generators as plain data and tensors."""
    numpy: Any = np.random.get_state(legacy=False)
    key = torch.tensor(numpy["state"]["key"].astype(np.int64), device="cpu")
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "python": random.getstate(),
        "numpy": {"key": key, "pos": numpy["state"]["pos"], "has_gauss": numpy["has_gauss"], "gauss": numpy["gauss"]},
    }


def restore_random_state(state: dict[str, Any]) -> None:
    """Take up a state of :func:`random_state`."""
    torch.set_rng_state(state["torch"])
    if state["cuda"]:
        torch.cuda.set_rng_state_all(state["cuda"])
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    numpy = state["numpy"]
    key = numpy["key"].numpy().astype(np.uint32)
    np.random.set_state(
        {
            "bit_generator": "MT19937",
            "state": {"key": key, "pos": numpy["pos"]},
            "has_gauss": numpy["has_gauss"],
            "gauss": numpy["gauss"],
        }
    )


@contextmanager
def preserved_randomness() -> Iterator[None]:
    """Leave the caller's generators as they were."""
    state = random_state()
    try:
        yield
    finally:
        restore_random_state(state)


def batch_size(batch: Any) -> int:
    """Samples in a batch: the length of its first tensor."""
    for leaf in pytree.tree_leaves(batch):
        if isinstance(leaf, Tensor) and leaf.dim():
            return leaf.shape[0]
    raise DataError("a batch holds no tensor with a batch dimension.")


class _Order(DistributedSampler[Any]):
    """This process's share of the samples in the order of an epoch, from the ``skip``-th on."""

    skip = 0

    def __iter__(self) -> Iterator[Any]:
        return itertools.islice(super().__iter__(), self.skip, None)


class Feed:
    """This process's batches, epoch by epoch, in an order that seed and epoch fix, from any batch on.

    A plain ``DataLoader`` (shuffled or not) is rebuilt around a ``DistributedSampler``: its batches are the global ones, and
    each process gets its share of every one. Anything else that yields batches is iterated by every process, which takes its
    share of the samples; its order must follow from torch's, Python's or NumPy's global generators.
    """

    def __init__(self, data: Iterable[Any], seed: int = 0) -> None:
        data = fed(data)
        if iter(data) is data:
            raise DataError(
                f"the training data is a {type(data).__name__}, which can be read once: training reads its data in every "
                "epoch, and again where it goes on. Give a DataLoader or a list."
            )
        self.seed = seed
        self._data, self._order = _ordered(data, seed)
        self._replays = self._order is None or getattr(self._data, "num_workers", 0) > 0

    def __len__(self) -> int:
        """Batches in an epoch. TypeError where the data does not say."""
        if not isinstance(self._data, Sized):
            raise TypeError("the data has no length")
        return len(self._data)

    def batches(self, epoch: int, skip: int = 0) -> Iterator[Any]:
        """The batches of ``epoch`` after the first ``skip``. Generators are seeded for the epoch, and left for the caller to
        restore where batches are skipped.
        """
        seed_everything(self.seed, epoch)
        if self._order is not None:
            self._order.set_epoch(epoch)
            self._order.skip = 0 if self._replays else skip * (getattr(self._data, "batch_size", None) or 1)
        for generator in _generators(self._data):
            generator.manual_seed(self.seed + epoch)
        feed = iter(self._data)
        if self._replays:
            for _ in itertools.islice(feed, skip):
                pass
        first = []
        if not skip:  # samplers draw from the global generators as the first batch is taken: alike on every process
            first = list(itertools.islice(feed, 1))
            seed_everything(self.seed, epoch, rank())
        shared = self._order is not None or world() == 1
        return (batch if shared else _share(batch) for batch in itertools.chain(first, feed))


def _generators(data: Any) -> list[torch.Generator]:
    """The generators that a loader or its samplers hold."""
    batches = getattr(data, "batch_sampler", None)
    holders = [data, getattr(data, "sampler", None), batches, getattr(batches, "sampler", None)]
    found = [getattr(holder, "generator", None) for holder in holders]
    return [generator for generator in found if isinstance(generator, torch.Generator)]


def _is_plain(data: Any) -> bool:
    """Whether a loader is a ``DataLoader`` as it comes, over all of a dataset, shuffled or in order."""
    return (
        type(data) is DataLoader
        and data.batch_size is not None
        and type(data.batch_sampler) is BatchSampler
        and not isinstance(data.dataset, IterableDataset)
        and (type(data.sampler) is SequentialSampler or (type(data.sampler) is RandomSampler and _takes_all(data.sampler)))
    )


def _takes_all(sampler: RandomSampler) -> bool:
    return not sampler.replacement and sampler.num_samples == len(sampler.data_source)


def _ordered(data: Iterable[Any], seed: int) -> tuple[Iterable[Any], _Order | None]:
    """A plain loader around an order of our own, for this process's share of every batch; other data as it is."""
    if not _is_plain(data):
        return data, None
    loader: DataLoader[Any] = data  # type: ignore[assignment]
    size = loader.batch_size or 1
    if size % world():
        raise ConfigError(f"batch_size is {size}, which {world()} processes cannot share equally.")
    shuffled = isinstance(loader.sampler, RandomSampler)
    order = _Order(loader.dataset, num_replicas=world(), rank=rank(), shuffle=shuffled, seed=seed)
    made: DataLoader[Any] = DataLoader(
        loader.dataset,
        batch_size=size // world(),
        sampler=order,
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn,
        pin_memory=loader.pin_memory,
        drop_last=loader.drop_last,
        timeout=loader.timeout,
        worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=loader.multiprocessing_context,
        prefetch_factor=loader.prefetch_factor,
    )
    return made, order


def _share(batch: Any) -> Any:
    """This process's samples of a batch; the first ones are repeated where processes outnumber what is left."""
    size = batch_size(batch)
    indices = torch.arange(rank(), -(-size // world()) * world(), world(), device="cpu") % size

    def pick(value: Any) -> Any:
        return value[indices] if isinstance(value, Tensor) and value.dim() and value.shape[0] == size else value

    return pytree.tree_map(pick, batch)
