"""A dataset whose samples know their number."""

from __future__ import annotations

from typing import Any

from torch.utils.data import Dataset

__all__ = ["IndexedDataset"]


class IndexedDataset(Dataset[Any]):
    """``dataset`` with every sample's index: ``(input, target, index)``, or ``sample["index"]`` where samples are dicts.

    Contrastive distillation keeps a memory per sample and a teacher's cache an answer per sample; both ask for the index.
    """

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        sample = self.dataset[index]
        if isinstance(sample, dict):
            return {**sample, "index": index}
        return (*sample, index) if isinstance(sample, (tuple, list)) else (sample, None, index)
