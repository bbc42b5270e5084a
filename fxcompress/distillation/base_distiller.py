"""What every distiller is: a student that learns, a teacher that does not, and losses between them."""

from __future__ import annotations

import copy
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from tabulate import tabulate
from torch import Tensor, fx, nn
from torch.nn import functional as F

from fxcompress.distillation.examples import guess_example
from fxcompress.distillation.losses.logits import check_labels
from fxcompress.distillation.teacher import TeacherCache, frozen
from fxcompress.errors import ConfigError, DataError, FxCompressError
from fxcompress.graph import propagate, taps, trace
from fxcompress.graph.inputs import Arguments, arguments
from fxcompress.graph.taps import Features, features
from fxcompress.options import Seed, validated
from fxcompress.registry import Registry
from fxcompress.weights import load_weights

__all__ = ["DISTILLERS", "BaseDistiller", "Row", "Step", "logits_of", "make_distiller"]

log = logging.getLogger("fxcompress")

DISTILLERS = Registry("distiller")
"""Distillers by class name."""


@dataclass
class Step:
    """One forward of both models: outputs, tapped values by address, and what came with the batch.

    ``epoch`` counts from 1.
    """

    student: Any
    teacher: Any
    student_features: dict[str, Tensor]
    teacher_features: dict[str, Tensor]
    targets: Any = None
    index: Tensor | None = None
    epoch: int = 1
    output: str | int | None = None
    ignore_index: int = -100

    def logits(self) -> tuple[Tensor, Tensor]:
        """The student's and the teacher's class scores; the student's are resized where only the positions differ."""
        student, teacher = logits_of(self.student, self.output), logits_of(self.teacher, self.output)
        if student.dim() == teacher.dim() == 4 and student.shape[2:] != teacher.shape[2:]:
            student = F.interpolate(student, teacher.shape[2:], mode="bilinear", align_corners=False)
        return student, teacher


@dataclass(frozen=True)
class Row:
    """How one pair of layers is brought together."""

    teacher: str
    teacher_shape: tuple[int, ...]
    student: str
    student_shape: tuple[int, ...]
    how: str


class BaseDistiller(nn.Module):
    """A student and a teacher, trained by ``task_weight`` · task loss + ``distill_weight`` · distillation loss.

    ``teacher``, ``student``   modules. The student is copied and learns (:attr:`student`); both may be left out and given to
                               :meth:`register_hooks` later
    ``teacher_pretrained``     a local weights file for the teacher; None: the weights it has
    ``freeze_teacher``         True: in eval mode, without gradients, outside ``parameters()`` and ``state_dict()``; False:
                               it learns the task along with the student
    ``distill_weight``, ``task_weight``  factors of the two losses
    ``distillers``             further distillers, without models of their own (or what :func:`make_distiller` takes), whose
                               losses are added: each times its own
                               ``distill_weight``. Of these, only what compares student and teacher counts
    ``example_inputs``         a tensor, a tuple or a dict by keyword, for distillers that compare features; where left
                               out, it is made up from the first layer
    ``task_loss``              a function of ``(output, targets)``; None: cross entropy of the logits
    ``output``                 the key or position of the logits where an output holds several things
    ``ignore_index``           the label that does not count
    ``cache_teacher``          ``"memory"`` or a folder: the teacher answers every sample once (see :class:`TeacherCache`);
                               batches then hold the index, from :class:`IndexedDataset`
    ``seed``                   for every random choice

    ``forward(images, targets)`` returns the student's output and the weighted losses by name; their sum is the total loss.
    """

    term: ClassVar[str] = "distill"
    reads_features: ClassVar[bool] = False

    def __init__(
        self,
        teacher: nn.Module | None = None,
        student: nn.Module | None = None,
        teacher_pretrained: str | os.PathLike[str] | None = None,
        freeze_teacher: bool = True,
        distill_weight: float = 1.0,
        task_weight: float = 1.0,
        *,
        distillers: Sequence[Any] = (),
        example_inputs: Any = None,
        task_loss: Callable[[Any, Any], Tensor] | None = None,
        output: str | int | None = None,
        ignore_index: int = -100,
        cache_teacher: str | os.PathLike[str] | None = None,
        seed: Seed = 0,
    ) -> None:
        super().__init__()
        for name, weight in (("distill_weight", distill_weight), ("task_weight", task_weight)):
            if not 0 <= weight < float("inf"):
                raise ConfigError(f"{name} is {weight!r}; it is a finite number, 0 or more.")
        if not isinstance(distillers, (list, tuple)) or not all(isinstance(d, (BaseDistiller, Mapping)) for d in distillers):
            raise ConfigError(f"distillers is {distillers!r}; it is a list of distillers, or mappings with their type.")
        distillers = [part if isinstance(part, BaseDistiller) else make_distiller(part) for part in distillers]
        if any(member.is_bound for member in distillers):
            raise ConfigError(
                "distillers=[...] takes distillers without models of their own: leave teacher and student out."
            )
        self.distill_weight, self.task_weight = distill_weight, task_weight
        self.freeze_teacher, self.teacher_pretrained = freeze_teacher, teacher_pretrained
        self.example_inputs, self.task_loss, self.output = example_inputs, task_loss, output
        self.ignore_index, self.cache_teacher, self.seed = ignore_index, cache_teacher, seed
        if cache_teacher is not None and not freeze_teacher:
            raise ConfigError("cache_teacher keeps a frozen teacher's answers; this one learns (freeze_teacher=False).")
        self.members = nn.ModuleList(distillers)
        self.epoch = 1
        self.rows: list[Row] = []
        self._held: list[nn.Module] = []
        self._views: list[Features] = []
        self._cache: TeacherCache | None = None
        self._last: Step | None = None
        self._loss: Tensor | None = None
        self._own_taps: list[str] = []
        self._bind(teacher, student)

    def _bind(self, teacher: nn.Module | None, student: nn.Module | None) -> None:
        """The last line of every constructor: take the models where they are given."""
        if (teacher is None) != (student is None):
            raise ConfigError(f"{type(self).__name__} needs teacher and student, or neither (and register_hooks later).")
        if teacher is not None and student is not None:
            self.register_hooks(teacher, student)

    # what a kind of distiller defines

    def choose(self, teacher: fx.GraphModule, student: fx.GraphModule) -> tuple[Sequence[str], Sequence[str]]:
        """The addresses to tap in both graphs."""
        return (), ()

    def build(self, teacher: Features, student: Features) -> list[Row]:
        """Make projectors for the tapped shapes; returns how each pair of layers is brought together."""
        return []

    def distill_losses(self, step: Step) -> dict[str, Tensor]:
        """The losses between student and teacher by name, unweighted."""
        return {}

    def task_scale(self) -> float:
        """A factor of the task loss that is this distiller's own."""
        return 1.0

    # models

    @property
    def is_bound(self) -> bool:
        """Whether teacher and student are there."""
        return "student" in self._modules

    @property
    def teacher(self) -> nn.Module:
        """The teacher."""
        self._require_models()
        return self._modules["learning_teacher"] if not self.freeze_teacher else self._held[0]  # type: ignore[return-value]

    def register_hooks(self, teacher: nn.Module, student: nn.Module) -> Self:
        """Bind the two models: copy the student, freeze the teacher, tap what is compared, build projectors.

        No Python hooks are involved: tapped values are further outputs of the models' graphs.
        """
        for name, model in (("teacher", teacher), ("student", student)):
            if not isinstance(model, nn.Module):
                raise ConfigError(
                    f"{name} is a {type(model).__name__}; it is a module. (build_distiller makes one from a configuration.)"
                )
        teacher = frozen(teacher) if self.freeze_teacher and self.teacher_pretrained is None else copy.deepcopy(teacher)
        if self.teacher_pretrained is not None:
            load_weights(teacher, self.teacher_pretrained)
            teacher = frozen(teacher) if self.freeze_teacher else teacher
        student = copy.deepcopy(student)
        parts = list(self._parts())
        if any(part.reads_features for part in parts):
            teacher, student = self._tapped(teacher, student, parts)
        if self.freeze_teacher:
            self._held = [teacher.eval()]
        else:
            self.learning_teacher = teacher
        self.student = student
        if self._views:
            for part in parts:
                with _seeded(self.seed):
                    part.rows = part.build(*self._views)
            log.info("%s", self.layout())
        if self.cache_teacher is not None:
            self._cache = TeacherCache(self.cache_teacher, teacher)
        self._ddp_params_and_buffers_to_ignore = [
            f"{name}.{leaf}" for name, m in self.named_modules() if hasattr(m, "kept_alike") for leaf in m.kept_alike
        ]
        return self

    def _parts(self) -> Iterator[BaseDistiller]:
        yield self
        for member in self.members:
            assert isinstance(member, BaseDistiller)
            yield from member._parts()

    def _tapped(
        self, teacher: nn.Module, student: nn.Module, parts: Sequence[BaseDistiller]
    ) -> tuple[fx.GraphModule, fx.GraphModule]:
        graphs = (self._traced(teacher), self._traced(student))
        present = taps.taps(graphs[1])
        for part in parts:
            for graph, addresses, who in zip(graphs, part.choose(*graphs), ("teacher", "student"), strict=True):
                try:
                    taps.insert(graph, addresses)
                except FxCompressError as error:
                    raise type(error)(f"{who}_layers: {error}") from error
        self._own_taps = [name for name in taps.taps(graphs[1]) if name not in present]
        self._views = [features(graph) for graph in graphs]
        return graphs

    def _traced(self, model: nn.Module) -> fx.GraphModule:
        """``model`` as a graph with the shape of every value."""
        example = self.example_inputs if self.example_inputs is not None else guess_example(model)
        device = next((t.device for t in [*model.parameters(), *model.buffers()]), torch.device("cpu"))
        call = arguments(example).to(device)
        graph = trace(model, call, copied=True)
        if any("tensor_meta" not in node.meta for node in graph.graph.nodes if node.op.startswith("call")):
            propagate(graph, call)
        return graph

    def student_model(self) -> nn.Module:
        """A copy of the student as it is now, without the distiller's taps: what the training was for."""
        self._require_models()
        model = copy.deepcopy(self.student)
        if isinstance(model, fx.GraphModule) and self._views:
            taps.remove(model, self._own_taps)
        return model

    def all_rows(self) -> list[Row]:
        """How each pair of layers is brought together, further distillers' included."""
        return [row for part in self._parts() for row in part.rows]

    def layout(self) -> str:
        """The same as a table."""
        rows = [(r.teacher, list(r.teacher_shape), r.student, list(r.student_shape), r.how) for r in self.all_rows()]
        return tabulate(rows, ("teacher", "shape", "student", "shape", "projector"), disable_numparse=True)

    # training

    def set_epoch(self, epoch: int) -> None:
        """Enter ``epoch``, counted from 0 as training loops do; warm-ups count it from 1."""
        for part in self._parts():
            part.epoch = epoch + 1

    def forward(
        self, images: Any = None, targets: Any = None, index: Tensor | None = None, **inputs: Any
    ) -> tuple[Any, dict[str, Tensor]]:
        """The student's output, and every loss by name, weighted: their sum is the total.

        ``images`` is a tensor, a tuple of positional arguments or a dict by keyword (which may also be given as keywords);
        without ``targets`` there is no task loss. ``index`` holds the samples' numbers in the dataset.
        """
        self._require_models()
        self._last = self._loss = None
        call = Arguments((), inputs) if images is None else arguments(images)
        student, student_features = self._run(1, self.student, call)
        teacher, teacher_features = self._answer(call, index)
        step = Step(
            student,
            teacher,
            student_features,
            teacher_features,
            targets,
            index,
            self.epoch,
            self.output,
            self.ignore_index,
        )
        losses: dict[str, Tensor] = {}
        if targets is not None and self.task_weight:
            losses["task"] = self.task_weight * self.task_scale() * self._task(student, targets)
            if not self.freeze_teacher:
                losses["teacher_task"] = self.task_weight * self._task(teacher, targets)
        total = []
        for part in self._parts():
            share = 1.0 if part is self else part.distill_weight
            for name, value in part.distill_losses(step).items():
                total.append(share * value)
                losses[_free(name, losses)] = self.distill_weight * share * value
        self._last, self._loss = step, torch.stack(total).sum() if total else None
        if not losses:
            raise DataError("there is nothing to learn from: no targets, and no distillation loss.")
        return student, losses

    def compute_distill_loss(self) -> Tensor:
        """The distillation loss of the last forward, before ``distill_weight``."""
        if self._last is None:
            raise ConfigError("there is no distillation loss yet: call the distiller on a batch first.")
        return self._loss if self._loss is not None else torch.zeros(())

    def get_teacher_features(self) -> dict[str, Tensor]:
        """The teacher's tapped values of the last forward by address."""
        return self._features().teacher_features

    def get_student_features(self) -> dict[str, Tensor]:
        """The student's tapped values of the last forward by address."""
        return self._features().student_features

    def _features(self) -> Step:
        if self._last is None:
            raise ConfigError("there are no features yet: call the distiller on a batch first.")
        return self._last

    def _run(self, which: int, model: nn.Module, call: Arguments) -> tuple[Any, dict[str, Tensor]]:
        if self._views:
            return self._views[which](*call.args, **call.kwargs)  # type: ignore[no-any-return]
        return call(model), {}

    def _answer(self, call: Arguments, index: Tensor | None) -> tuple[Any, dict[str, Tensor]]:
        if self._cache is None:
            with torch.no_grad() if self.freeze_teacher else nullcontext():
                return self._run(0, self.teacher, call)
        if index is None:
            raise DataError("cache_teacher needs every sample's index: wrap the dataset in IndexedDataset.")
        known = self._cache.answer(index, tuple(call))
        if known is None:
            with torch.no_grad():
                known = self._run(0, self.teacher, call)
            self._cache.keep(index, tuple(call), known)
        return known  # type: ignore[no-any-return]

    def _task(self, output: Any, targets: Any) -> Tensor:
        if self.task_loss is not None:
            return self.task_loss(output, targets)
        logits = logits_of(output, self.output)
        if isinstance(targets, Tensor) and not targets.is_floating_point():
            check_labels(targets, logits.shape[1], self.ignore_index)
            if not bool((targets != self.ignore_index).any()):
                return logits.sum() * 0.0
        return F.cross_entropy(logits, targets, ignore_index=self.ignore_index)

    def _require_models(self) -> None:
        if not self.is_bound:
            raise ConfigError(
                f"{type(self).__name__} has no models yet: give teacher and student, or call "
                "register_hooks(teacher, student)."
            )

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_last": None, "_loss": None}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        for teacher in self._held:
            teacher._apply(fn)
        super()._apply(fn, recurse)
        return self


def make_distiller(config: Mapping[str, Any] | Sequence[Any], **given: Any) -> BaseDistiller:
    """A distiller from ``{"type": name, option: value}``, or one that adds up a list of these.

    ``given`` are parameters that are no plain data: ``teacher``, ``student``, ``example_inputs``. Raises ConfigError at the
    option that is wrong, with the closest names.
    """
    if not isinstance(config, Mapping):
        return BaseDistiller(distillers=config, **given)
    options = dict(config)
    name = options.pop("type", None)
    if not isinstance(name, str):
        raise ConfigError(f"a distiller has a type: one of {', '.join(DISTILLERS)}.")
    cls: type[BaseDistiller] = DISTILLERS[name]
    return cls(**validated(cls, options, (name,)), **given)


def logits_of(output: Any, key: str | int | None = None) -> Tensor:
    """The class scores in a model's output; ConfigError where ``key`` must say which they are."""
    if isinstance(output, Tensor):
        return output
    if key is not None:
        found = getattr(output, key, None) if isinstance(key, str) and not isinstance(output, Mapping) else output[key]
    elif isinstance(output, Mapping):
        found = next((output[name] for name in ("out", "logits") if name in output), None)
        found = next(iter(output.values())) if found is None and len(output) == 1 else found
    elif isinstance(output, (tuple, list)):
        found = output[0] if output else None
    else:
        found = getattr(output, "logits", None)
    if not isinstance(found, Tensor):
        held = f" with {', '.join(map(str, output))}" if isinstance(output, Mapping) else ""
        raise ConfigError(f"the model returns a {type(output).__name__}{held}: say where the logits are with output=name.")
    return found


def _free(name: str, taken: Mapping[str, Any]) -> str:
    count, free = 1, name
    while free in taken:
        count += 1
        free = f"{name}_{count}"
    return free


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield
