"""What distillers remember: a teacher's answers, and the bank and queue of CRD."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fxcompress.distillation import (
    CRDDistiller,
    FeatureDistiller,
    IndexedDataset,
    LogitDistiller,
)
from fxcompress.errors import ConfigError, DataError
from tests.distilled import INDEX, LAYERS, Net, X, Y, made, models


def test_an_indexed_dataset_numbers_its_samples() -> None:
    data = IndexedDataset([(X[i], int(Y[i])) for i in range(6)])
    assert len(data) == 6 and data[3][2] == 3 and torch.equal(data[3][0], X[3])
    batch = next(iter(torch.utils.data.DataLoader(data, 4)))
    assert batch[2].tolist() == [0, 1, 2, 3]
    assert IndexedDataset([{"x": 1}])[0] == {"x": 1, "index": 0}


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = Net(8)

    def forward(self, x: Tensor) -> Tensor:
        CALLS.append(len(x))
        return self.net(x)


CALLS: list[int] = []


@pytest.mark.parametrize("place", ["memory", "disk"])
def test_a_cached_teacher_answers_every_sample_once(place: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    teacher, student = Counting().eval(), Net(4)
    where = "memory" if place == "memory" else str(tmp_path / "cache")
    distiller = LogitDistiller(teacher, student, cache_teacher=where)
    plain = LogitDistiller(teacher, student)
    CALLS.clear()
    for batch in ([0, 1, 2], [3, 4, 5], [5, 0, 3], [4, 4, 1]):
        index = torch.tensor(batch)
        found = distiller(X[index], Y[index], index)[1]
        assert torch.allclose(found["kd"], plain(X[index], Y[index])[1]["kd"], rtol=1e-4)
    assert sum(CALLS) == 6 + 12
    if place == "disk":
        CALLS.clear()
        again = LogitDistiller(teacher, student, cache_teacher=where)
        assert torch.allclose(again(X, Y, INDEX)[1]["kd"], plain(X, Y)[1]["kd"], rtol=1e-4)
        assert sum(CALLS) == 6
        with pytest.raises(ConfigError, match="another teacher's answers"):
            LogitDistiller(Net(8), student, cache_teacher=where)
        os.truncate(tmp_path / "cache" / "0", 40)
        with pytest.raises(ConfigError, match="cut short"):
            LogitDistiller(teacher, student, cache_teacher=where)
        (tmp_path / "cache" / "cache.json").write_text("{")
        with pytest.raises(ConfigError, match="is damaged"):
            LogitDistiller(teacher, student, cache_teacher=where)


def test_cached_features_are_the_teachers() -> None:
    teacher, student = models()
    cached = FeatureDistiller(teacher, student, LAYERS, cache_teacher="memory").eval()
    first = cached(X, Y, INDEX)[1]
    second = cached(X.flip(0), Y.flip(0), INDEX.flip(0))[1]
    assert torch.allclose(first["feature"], second["feature"], rtol=1e-5)


def test_a_cached_teacher_refuses_other_inputs_than_it_saw() -> None:
    distiller = made("LogitDistiller", cache_teacher="memory")
    distiller(X, Y, INDEX)
    distiller(X, Y, INDEX)
    flipped = X.clone()
    flipped[2] = X[2].flip(-1)
    with pytest.raises(DataError, match="sample 2 is not what the teacher saw"):
        distiller(flipped, Y, INDEX)


def test_the_bank_moves_towards_new_embeddings_and_the_last_of_equal_samples_counts() -> None:
    distiller = made("CRDDistiller", momentum=0.5)
    assert isinstance(distiller, CRDDistiller)
    bank: Any = distiller.memory
    before = bank.student.clone()
    index = torch.tensor([0, 3, 3, 7, 9, 3])
    distiller(X, Y, index)
    embedded = F.normalize(distiller.student_head(distiller.get_student_features()[str(distiller.student_layer)]))
    expected = before.clone()
    for place, row in ((0, 0), (7, 3), (9, 4), (3, 5)):
        expected[place] = F.normalize(0.5 * before[place] + 0.5 * embedded[row], dim=0)
    assert torch.allclose(bank.student, expected.detach(), atol=1e-6)
    assert bank.labels.tolist() == [0, -1, -1, 0, -1, -1, -1, 3, -1, 4]


def test_the_bank_loss_is_the_papers() -> None:
    """Both directions, against a bank, with the partition estimated on the first batch; everything by hand in float64."""
    distiller = made("CRDDistiller", same_class=True)
    assert isinstance(distiller, CRDDistiller)
    bank: Any = distiller.memory
    memory = {"s": bank.student.double().clone(), "t": bank.teacher.double().clone()}
    drawn = torch.randint(10, (7,), generator=torch.Generator().manual_seed(0))
    _, terms = distiller(X, Y, INDEX)
    s, t = distiller.embeddings(distiller._features())
    anchors = {
        "t": F.normalize(distiller.student_head(s)).double(),
        "s": F.normalize(distiller.teacher_head(t)).double(),
    }
    expected = 0.0
    for side, anchor in anchors.items():
        scores = [
            [float(torch.exp(a @ memory[side][j] / 0.07).detach()) for j in (i, *drawn.tolist())]
            for i, a in enumerate(anchor)
        ]
        scale = sum(map(sum, scores)) / (6 * 8) * 10
        for i, row in enumerate(scores):
            h = [v / scale / (v / scale + 7 / 10 + 1e-7) for v in row]
            expected -= float(torch.tensor(h[0]).double().log()) / 6
            misses = [
                float(torch.tensor(0.7 / (v / scale + 0.7 + 1e-7)).double().log())
                for v, j in zip(row[1:], drawn.tolist(), strict=True)
                if j != i
            ]
            expected -= sum(misses) / 6
    assert float(terms["crd"].detach()) == pytest.approx(expected, rel=1e-4)


def test_a_bank_is_reproducible_and_resumes() -> None:
    def run(steps: int, state: Any = None) -> tuple[list[float], Any]:
        distiller = made("CRDDistiller", seed=5)
        if state is not None:
            distiller.load_state_dict(state)
        values = [float(distiller(X, Y, INDEX)[1]["crd"].detach()) for _ in range(steps)]
        return values, {key: value.clone() for key, value in distiller.state_dict().items()}

    whole, _ = run(4)
    first, state = run(2)
    rest, _ = run(2, state)
    assert whole == first + rest == run(4)[0]


def test_a_queue_holds_the_last_samples() -> None:
    distiller = made("CRDDistiller", samples=None, num_negatives=8)
    assert isinstance(distiller, CRDDistiller)
    queue: Any = distiller.memory
    distiller(X, Y)
    assert queue.labels.tolist() == [0, 1, 2, 3, 4, 0, -1, -1]
    distiller(X, Y)
    assert queue.labels.tolist() == [2, 3, 4, 0, 4, 0, 0, 1]
