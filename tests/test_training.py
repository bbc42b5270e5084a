"""The training loop, against the same training written out by hand."""

from __future__ import annotations

import copy
import csv
import json
import math
import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from fxcompress.errors import ArtifactError, ConfigError, DataError, TrainingError
from fxcompress.pruning import AGPScheduler, MagnitudePruner
from fxcompress.training import (
    OPTIMIZERS,
    Callback,
    History,
    OnEpoch,
    Recipe,
    Trainer,
    evaluate,
    gather,
    is_main,
    merge,
    spread,
    train,
    world,
)

X = torch.randn(24, 5, generator=torch.Generator().manual_seed(0))
Y = (X.sum(1) > 0).long()
BATCHES = list(zip(X.split(8), Y.split(8), strict=True))


def small() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 2))


def weights(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def by_hand(epochs: int = 3, lr: Callable[[int], float] = lambda step: 0.1, clip: float | None = None) -> nn.Module:
    """Plain SGD over BATCHES."""
    model = small()
    step = 0
    for _ in range(epochs):
        for images, labels in BATCHES:
            model.zero_grad()
            F.cross_entropy(model(images), labels).backward()
            gradients = [p.grad for p in model.parameters() if p.grad is not None]
            norm = math.sqrt(sum(float(g.square().sum()) for g in gradients))
            factor = min(1.0, clip / (norm + 1e-6)) if clip else 1.0
            with torch.no_grad():
                for p, g in zip(model.parameters(), gradients, strict=True):
                    p.sub_(lr(step) * factor * g)
            step += 1
    return model


SGD = Recipe(epochs=3, lr=0.1, optimizer="sgd")


def trained(recipe: Recipe = SGD, data: Any = BATCHES, loss: Any = "cross_entropy", **options: Any) -> nn.Module:
    model = small()
    train(model, data, recipe, loss=loss, **options)
    return model


def close(a: nn.Module, b: nn.Module) -> bool:
    return torch.allclose(weights(a), weights(b), rtol=1e-5, atol=1e-6)


def test_it_takes_the_steps_of_plain_sgd() -> None:
    assert close(trained(), by_hand())


def test_clipping_bounds_the_norm_of_every_step() -> None:
    recipe = Recipe(epochs=3, lr=0.1, optimizer="sgd", clip_norm=0.3)
    assert close(trained(recipe), by_hand(clip=0.3))
    assert not close(trained(recipe), by_hand())


SCHEDULES: dict[str, tuple[dict[str, Any], Callable[[int], float]]] = {
    "cosine": ({}, lambda step: 0.1 * (1 + math.cos(math.pi * step / 9)) / 2),
    "linear": ({"final": 0.5}, lambda step: 0.1 * (1 - 0.5 * step / 9)),
    "multistep": ({"milestones": [1, 2], "gamma": 0.5}, lambda step: 0.1 * 0.5 ** (step // 3)),
    "exponential": ({"gamma": 0.5}, lambda step: 0.1 * 0.5 ** (step // 3)),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_follow_their_formulas(name: str) -> None:
    options, rate = SCHEDULES[name]
    recipe = Recipe(epochs=3, lr=0.1, optimizer="sgd", scheduler=name, scheduler_options=options)
    assert close(trained(recipe), by_hand(lr=rate))


def test_warm_up_rises_linearly_to_the_full_rate() -> None:
    recipe = Recipe(epochs=3, lr=0.1, optimizer="sgd", warmup_epochs=1)
    assert close(trained(recipe), by_hand(lr=lambda step: 0.1 * min((step + 1) / 4, 1)))


def test_accumulated_batches_are_one_large_batch_even_where_the_last_is_short() -> None:
    pieces = [(X[:4], Y[:4]), (X[4:8], Y[4:8]), (X[8:12], Y[8:12]), (X[12:13], Y[12:13]), (X[13:15], Y[13:15])]
    whole = [(X[:8], Y[:8]), (X[8:13], Y[8:13]), (X[13:15], Y[13:15])]
    recipe = Recipe(epochs=2, lr=0.1, optimizer="sgd", accumulate=2)
    assert close(trained(recipe, pieces), trained(Recipe(epochs=2, lr=0.1, optimizer="sgd"), whole))


def test_the_moving_average_is_what_is_evaluated_and_kept() -> None:
    model = small()
    average = weights(model).double()
    seen: list[Tensor] = []

    class Watch(Callback):
        def after_step(self, trainer: Trainer, step: int) -> None:
            average.mul_(0.8).add_(0.2 * weights(trainer.model).double())

    recipe = Recipe(epochs=2, lr=0.1, optimizer="sgd", ema=0.8)
    train(
        model,
        BATCHES,
        recipe,
        loss="cross_entropy",
        callbacks=[Watch()],
        evaluate=lambda m: seen.append(weights(m)) or 0.0,  # type: ignore[func-returns-value]
    )
    assert torch.allclose(weights(model).double(), average, atol=1e-6)
    assert torch.allclose(seen[-1].double(), average, atol=1e-6)


def test_patience_ends_training_and_keeps_the_best_weights() -> None:
    scores = iter([0.1, 0.5, 0.4, 0.3, 0.9])
    kept: list[Tensor] = []

    def judge(model: nn.Module) -> dict[str, float]:
        kept.append(weights(model))
        return {"accuracy": next(scores)}

    model = small()
    recipe = Recipe(epochs=5, lr=0.1, patience=2, metric="accuracy")
    history = train(model, BATCHES, recipe, loss="cross_entropy", evaluate=judge)
    assert history["accuracy"] == [0.1, 0.5, 0.4, 0.3]
    assert "0.5" in history.stopped
    assert torch.equal(weights(model), kept[1])


def test_a_loss_is_better_when_it_is_lower_and_a_mode_says_otherwise() -> None:
    assert Recipe(metric="loss").better(1.0, 2.0)
    assert Recipe(metric="val_error").better(1.0, 2.0)
    assert not Recipe(metric="accuracy").better(1.0, 2.0)
    assert not Recipe(metric="loss", mode="max").better(1.0, 2.0)


class Distilling(nn.Module):
    """A module with losses of its own, of which one is weighted."""

    def __init__(self) -> None:
        super().__init__()
        self.student = small()
        self.epochs: list[int] = []

    @property
    def loss_weights(self) -> dict[str, float]:
        return {"distance": 0.25}

    def set_epoch(self, epoch: int) -> None:
        self.epochs.append(epoch)

    def forward(self, images: Tensor, targets: Tensor, index: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        output = self.student(images)
        assert torch.equal(X[index], images)
        return output, {"task": F.cross_entropy(output, targets), "distance": output.square().mean()}


def test_a_module_may_give_its_own_losses_which_the_ledger_keeps_apart() -> None:
    index = torch.arange(24).split(8)
    batches = [(x, y, i) for (x, y), i in zip(BATCHES, index, strict=True)]
    model = Distilling()
    start = copy.deepcopy(model)
    history = train(model, batches, Recipe(epochs=2, lr=0.1, optimizer="sgd"))
    row = history.rows[0]
    assert row["loss"] == pytest.approx(row["loss/task"] + 0.25 * row["loss/distance"], rel=1e-6)
    assert (row["weight/task"], row["weight/distance"]) == (1.0, 0.25)
    output = start.student(X[:8])
    for name, value in (("task", F.cross_entropy(output, Y[:8])), ("distance", output.square().mean())):
        gradients = torch.autograd.grad(value, list(start.student.parameters()), retain_graph=True)
        norm = math.sqrt(sum(float(g.double().square().sum()) for g in gradients))
        assert row[f"gradient/{name}"] == pytest.approx(norm, rel=1e-5)
    assert model.epochs == [0, 1]
    by_loss = small()
    train(
        by_loss,
        BATCHES,
        Recipe(epochs=2, lr=0.1, optimizer="sgd"),
        loss=lambda output, target: {"a": F.cross_entropy(output, target), "b": 0.25 * output.square().mean()},
    )
    assert close(model.student, by_loss)


def test_losses_in_the_history_are_means_over_samples() -> None:
    uneven = [(X[:8], Y[:8]), (X[8:11], Y[8:11])]
    model = small()
    frozen = copy.deepcopy(model)
    history = train(model, uneven, Recipe(epochs=1, lr=1e-12, optimizer="sgd"), loss="cross_entropy")
    assert history["loss"][0] == pytest.approx(F.cross_entropy(frozen(X[:11]), Y[:11]).item(), rel=1e-5)


class Keywords(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = small()

    def forward(self, images: Tensor) -> Tensor:
        return self.inner(images)


def test_a_dict_is_passed_by_keyword_and_what_forward_does_not_take_is_the_target() -> None:
    model = Keywords()
    train(model, [{"images": x, "labels": y} for x, y in BATCHES], SGD, loss="cross_entropy")
    assert close(model.inner, by_hand())


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_low_precision_trains_float32_weights(precision: str) -> None:
    seen: set[torch.dtype] = set()

    def loss(output: Tensor, target: Tensor) -> Tensor:
        seen.add(output.dtype)
        return F.cross_entropy(output, target)

    model = small()
    recipe = Recipe(epochs=8, lr=0.05, optimizer="adam", precision=precision)  # type: ignore[arg-type]
    history = train(model, BATCHES, recipe, loss=loss)
    assert seen == {torch.bfloat16 if precision == "bf16" else torch.float16}
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert history["loss"][-1] < 0.7 * history["loss"][0]


def test_objects_serve_in_the_place_of_names() -> None:
    model = small()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [1, 2], 0.5)
    train(model, BATCHES, Recipe(epochs=3), loss=F.cross_entropy, optimizer=optimizer, scheduler=scheduler)
    assert close(model, by_hand(lr=lambda step: 0.1 * 0.5 ** (step // 3)))


def test_a_plateau_scheduler_sees_the_metric() -> None:
    model = small()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, mode="max", patience=0, factor=0.5)
    recipe = Recipe(epochs=3, metric="accuracy")
    train(model, BATCHES, recipe, loss="cross_entropy", optimizer=optimizer, scheduler=scheduler, evaluate=lambda m: 0.5)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.025)


def test_users_register_optimizers() -> None:
    @OPTIMIZERS.register("test-sgd")
    def build(parameters: Any, lr: float, factor: float) -> torch.optim.Optimizer:
        return torch.optim.SGD(parameters, lr=lr * factor)

    recipe = Recipe(epochs=3, lr=0.05, optimizer="test-sgd", optimizer_options={"factor": 2.0})
    assert close(trained(recipe), by_hand())
    with pytest.raises(ConfigError, match="exists"):
        OPTIMIZERS.register("test-sgd")(build)


def test_a_pruning_schedule_takes_part() -> None:
    model = small()
    schedule = AGPScheduler(target_sparsity=0.5, end_epoch=2, pruner=MagnitudePruner(), model=model)
    sparsities: list[float] = []
    train(
        model,
        BATCHES,
        Recipe(epochs=3, lr=0.1),
        loss="cross_entropy",
        callbacks=[OnEpoch(schedule.step)],
        evaluate=lambda m: sparsities.append(MagnitudePruner().get_sparsity(m)) or 0.0,  # type: ignore[func-returns-value]
    )
    total = 5 * 7 + 7 * 2
    expected = [0.0, 0.5 - 0.5 * 0.5**3, 0.5]
    assert [round(s * total) for s in sparsities] == [round(e * total) for e in expected]


def test_the_mode_of_every_module_and_the_callers_generators_are_left_as_they_were() -> None:
    model = small().eval()
    torch.manual_seed(5)
    state = torch.get_rng_state()
    train(model, BATCHES, Recipe(epochs=1), loss="cross_entropy")
    assert not any(module.training for module in model.modules())
    assert torch.equal(torch.get_rng_state(), state)


def test_two_runs_with_one_seed_agree_and_another_seed_differs() -> None:
    loader = DataLoader(TensorDataset(X, Y), batch_size=4, shuffle=True)
    runs = [weights(trained(Recipe(epochs=2, seed=seed), loader)) for seed in (1, 1, 2)]
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])


def test_every_sample_is_seen_once_an_epoch_in_another_order() -> None:
    seen: list[list[int]] = [[], []]

    class Look(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(1))
            self.epoch = 0

        def set_epoch(self, epoch: int) -> None:
            self.epoch = epoch

        def forward(self, index: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            seen[self.epoch] += index.flatten().tolist()
            return index, {"zero": self.weight.sum()}

    train(Look(), DataLoader(range(10), batch_size=3, shuffle=True), Recipe(epochs=2))  # type: ignore[arg-type]
    assert sorted(seen[0]) == sorted(seen[1]) == list(range(10))
    assert seen[0] != seen[1]


class Poison(nn.Module):
    def __init__(self, at: int) -> None:
        super().__init__()
        self.inner, self.at, self.calls = small(), at, 0

    def forward(self, images: Tensor, targets: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        self.calls += 1
        output = self.inner(images)
        bad = math.nan if self.calls == self.at else 1.0
        return output, {"task": F.cross_entropy(output, targets), "extra": bad * output.mean()}


def test_a_loss_that_is_not_finite_stops_at_its_step_and_the_last_checkpoint_stays(tmp_path: Path) -> None:
    path = tmp_path / "run.pt"
    model = Poison(5)
    with pytest.raises(TrainingError, match=r"'extra' is nan at step 5"):
        train(model, BATCHES, Recipe(epochs=3, checkpoint_every=2), checkpoint=path)
    saved = torch.load(path, weights_only=True)
    assert saved["step"] == 4
    assert all(bool(torch.isfinite(p).all()) for p in saved["model"]["state"].values())
    assert bool(torch.isfinite(weights(model)).all())


def test_weights_that_are_not_finite_are_never_saved(tmp_path: Path) -> None:
    class Break(Callback):
        def after_step(self, trainer: Trainer, step: int) -> None:
            if step == 4:
                with torch.no_grad():
                    trainer.parameters[0].fill_(math.inf)

    path = tmp_path / "run.pt"
    with pytest.raises(TrainingError, match="after step 4"):
        trained(Recipe(epochs=3, checkpoint_every=1), checkpoint=path, callbacks=[Break()])
    assert torch.load(path, weights_only=True)["step"] == 3


def test_history_is_saved_as_csv_and_json(tmp_path: Path) -> None:
    model = small()
    history = train(model, BATCHES, SGD, loss="cross_entropy", evaluate=lambda m: {"accuracy": 0.5})
    history.save(tmp_path / "h.json")
    history.save(tmp_path / "h.csv")
    assert json.loads((tmp_path / "h.json").read_text())["rows"] == history.rows
    with open(tmp_path / "h.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["loss"]) for row in rows] == history["loss"]
    assert [row["accuracy"] for row in rows] == ["0.5"] * 3
    assert "accuracy" in str(history)
    with pytest.raises(ConfigError, match=r"\.xls"):
        history.save(tmp_path / "h.xls")


def test_tensorboard_gets_every_column(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    history = train(small(), BATCHES, SGD, loss="cross_entropy", log_dir=tmp_path)
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert [round(event.value, 5) for event in events.Scalars("loss")] == [round(value, 5) for value in history["loss"]]


def test_evaluate_counts_every_sample_once() -> None:
    model = small()
    uneven = [(X[:8], Y[:8]), (X[8:11], Y[8:11])]
    found = evaluate(model, uneven, ["accuracy", "top5", "cross_entropy_loss"])
    with torch.no_grad():
        output = model(X[:11])
    assert found["accuracy"] == pytest.approx(float((output.argmax(1) == Y[:11]).double().mean()))
    assert found["top5"] == 1.0
    assert found["cross_entropy_loss"] == pytest.approx(float(F.cross_entropy(output, Y[:11])), rel=1e-6)
    assert model.training


def test_one_process_shares_with_itself() -> None:
    assert (world(), is_main(), gather({"a": 1}), spread([1, 2], str)) == (1, True, [{"a": 1}], ["1", "2"])
    merge([])


# checkpoints


class Counts(Callback):
    def __init__(self) -> None:
        self.steps = 0

    def after_step(self, trainer: Trainer, step: int) -> None:
        self.steps += 1

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.steps = state["steps"]


def test_a_finished_run_is_resumed_to_the_same_weights_and_history_at_once(tmp_path: Path) -> None:
    recipe = Recipe(epochs=3, ema=0.5, patience=2)
    first, second = small(), small()
    counts = Counts()
    one = train(first, BATCHES, recipe, loss="cross_entropy", checkpoint=tmp_path / "c.pt", callbacks=[Counts()])
    two = train(second, BATCHES, recipe, loss="cross_entropy", checkpoint=tmp_path / "c.pt", resume=True, callbacks=[counts])
    assert torch.equal(weights(first), weights(second))
    assert (one.rows, counts.steps) == (two.rows, 9)


def test_a_checkpoint_is_never_overwritten_unasked(tmp_path: Path) -> None:
    trained(checkpoint=tmp_path / "c.pt")
    with pytest.raises(ConfigError, match="resume=True"):
        trained(checkpoint=tmp_path / "c.pt")


def test_a_checkpoint_of_another_run_is_refused_naming_the_difference(tmp_path: Path) -> None:
    trained(checkpoint=tmp_path / "c.pt")
    with pytest.raises(ConfigError, match=r"lr was 0\.1 and is 0\.2"):
        trained(Recipe(epochs=3, lr=0.2, optimizer="sgd"), checkpoint=tmp_path / "c.pt", resume=True)
    with pytest.raises(ConfigError, match="another model"):
        train(nn.Linear(5, 2), BATCHES, SGD, loss="cross_entropy", checkpoint=tmp_path / "c.pt", resume=True)


class Evil:
    def __reduce__(self) -> Any:
        return (exec, ("raise SystemExit('code ran')",))


@pytest.mark.parametrize("content", [b"", b"junk", pickle.dumps(Evil()), "torch", "other"])
def test_a_damaged_or_hostile_checkpoint_is_refused_and_runs_nothing(content: Any, tmp_path: Path) -> None:
    path = tmp_path / "c.pt"
    if content == "torch":
        torch.save(Evil(), path)
    elif content == "other":
        torch.save({"a": 1}, path)
    else:
        path.write_bytes(content)
    with pytest.raises(ArtifactError, match="checkpoint"):
        trained(checkpoint=path, resume=True)


def test_a_checkpoint_whose_parts_are_none_cannot_be_taken_up(tmp_path: Path) -> None:
    trained(Recipe(epochs=1), checkpoint=tmp_path / "c.pt")
    state = torch.load(tmp_path / "c.pt", weights_only=True)
    state["parts"]["optimizer"]["state"] = 3
    torch.save(state, tmp_path / "c.pt")
    with pytest.raises(ArtifactError, match=r"cannot be taken up: .*Delete it, or name another"):
        trained(Recipe(epochs=1), checkpoint=tmp_path / "c.pt", resume=True)


# bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": -1}, "epochs is -1"),
        ({"lr": math.nan}, "lr is nan"),
        ({"lr": "fast"}, "lr is 'fast'"),
        ({"optimizer": "adamm"}, "Did you mean 'adam"),
        ({"scheduler": "cosin"}, "Did you mean 'cosine'"),
        ({"precision": "fp8"}, "precision is 'fp8'"),
        ({"accumulate": 0}, "accumulate is 0"),
        ({"ema": 1.0}, r"ema is 1\.0"),
        ({"mode": "best"}, "mode is 'best'"),
    ],
)
def test_a_recipe_that_cannot_be_meant_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Recipe(**options)


def test_options_that_do_not_fit_are_refused_by_name() -> None:
    with pytest.raises(ConfigError, match=r"optimizer 'sgd'.*momentun"):
        trained(Recipe(optimizer="sgd", optimizer_options={"momentun": 0.9}))
    with pytest.raises(ConfigError, match=r"scheduler 'cosine'.*end"):
        trained(Recipe(scheduler="cosine", scheduler_options={"end": 0}))


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        ([], DataError, "empty"),
        (iter(BATCHES), DataError, "list_iterator, which can be read once"),
        ([X], DataError, "target"),
        ([3], DataError, "no tensor"),
        ([BATCHES[0], (X[:0], Y[:0])], DataError, "batch 1 holds no sample"),
        ([BATCHES[0], (X, Y[:3])], DataError, "batch 1 does not fit the model, the loss or the metric: "),
        ([(X[:, :2], Y)], DataError, "batch 0 does not fit"),
        ([(X, Y + 9)], DataError, "batch 0 does not fit"),
    ],
)
def test_data_that_cannot_train_is_refused(data: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        trained(Recipe(epochs=1), data)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_training_is_the_same_where_the_caller_asks_for_no_gradients(mode: Any) -> None:
    expected, found = trained(), small()
    with mode():
        train(found, BATCHES, SGD, loss="cross_entropy")
    assert torch.equal(weights(found), weights(expected))


def test_weights_of_float16_are_trained_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    train(nn.Linear(5, 2).half(), [(X.half(), Y % 2)], Recipe(epochs=1, optimizer="sgd"), loss="cross_entropy")
    assert [message for message in caplog.messages if "train model.float() with precision='fp16'" in message]


def test_a_model_without_losses_or_parameters_is_refused() -> None:
    with pytest.raises(ConfigError, match="give loss="):
        train(Keywords(), [X], Recipe(epochs=1))
    with pytest.raises(ConfigError, match=r"there is no loss, and Linear.forward does not take a whole batch"):
        train(nn.Linear(5, 2), BATCHES, Recipe(epochs=1))
    with pytest.raises(ConfigError, match="nothing to train"):
        train(nn.ReLU(), BATCHES, Recipe(epochs=1), loss="mse")
    with pytest.raises(ConfigError, match="not a scalar"):
        trained(loss=lambda output, target: output)
    with pytest.raises(ConfigError, match="Give evaluate"):
        trained(Recipe(epochs=1, patience=1, metric="accuracy"))


@pytest.mark.parametrize(
    "option", [{"loss": 3}, {"optimizer": "sgd"}, {"evaluate": 1.0}, {"callbacks": 3}, {"callbacks": [len]}]
)
def test_parts_of_another_kind_are_refused_by_name(option: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(option))):
        train(nn.Linear(5, 2), BATCHES, Recipe(epochs=1), **{"loss": "cross_entropy", **option})
    with pytest.raises(ConfigError, match="it is a Recipe"):
        train(nn.Linear(5, 2), BATCHES, {"epochs": 1}, loss="cross_entropy")  # type: ignore[arg-type]


def test_a_schedule_that_must_know_the_length_says_so() -> None:
    class Endless:
        def __iter__(self) -> Any:
            return iter(BATCHES)

    assert close(trained(data=Endless()), by_hand())
    with pytest.raises(ConfigError, match=r"len\(\)"):
        trained(Recipe(scheduler="cosine"), Endless())


def test_an_empty_history_has_no_columns() -> None:
    history = History()
    assert (len(history), history.columns()) == (0, [])
