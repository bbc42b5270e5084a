"""What every distiller is: a student that learns, a teacher that does not, and losses between them."""

from __future__ import annotations

import copy
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import KW_ONLY
from typing import Any, ClassVar, Self

import torch
from tabulate import tabulate
from torch import Tensor, fx, nn

from fxcompress.data import split_batch
from fxcompress.distillation.models import check_values, common_dtype, deterministic, in_dtype, traced
from fxcompress.distillation.parameters import Assignable, check_options, distiller
from fxcompress.distillation.step import Row, Step, logits_of
from fxcompress.distillation.targets import check_samples, classification, sample_numbers
from fxcompress.distillation.teacher import TeacherCache, frozen
from fxcompress.errors import ConfigError, DataError, FxCompressError
from fxcompress.graph import taps
from fxcompress.graph.feature_view import Features, features
from fxcompress.graph.inputs import Arguments, arguments
from fxcompress.graph.module import signature
from fxcompress.graph.tree import device_of
from fxcompress.options import Seed, Weight, check_whole, validated
from fxcompress.registry import Registry
from fxcompress.weighted import Weighted
from fxcompress.weights import load_weights

__all__ = ["DISTILLERS", "BaseDistiller", "make_distiller"]

log = logging.getLogger("fxcompress")

DISTILLERS = Registry("distiller")
"""Distillers by class name."""


@distiller
class BaseDistiller(Assignable):
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

    A distiller of one's own gives its losses by name in :meth:`distill_losses`, from ``step.logits()`` or from layers that
    :meth:`choose` names. Its options are the annotated names of a class under ``@distiller``, or those of its constructor::

        @DISTILLERS.register()
        @distiller
        class HuberDistiller(BaseDistiller):
            delta: float = 1.0

            def distill_losses(self, step: Step) -> dict[str, Tensor]:
                return {"huber": torch.nn.functional.huber_loss(*step.logits(), delta=self.delta)}
    """

    term: ClassVar[str] = "distill"
    reads_features: ClassVar[bool] = False

    teacher: nn.Module = None  # type: ignore[assignment]
    student: nn.Module = None  # type: ignore[assignment]
    _: KW_ONLY
    teacher_pretrained: str | os.PathLike[str] | None = None
    freeze_teacher: bool = True
    distill_weight: Weight = 1.0
    task_weight: Weight = 1.0
    distillers: Sequence[Any] = ()
    example_inputs: Any = None
    task_loss: Callable[[Any, Any], Tensor] | None = None
    output: str | int | None = None
    ignore_index: int = -100
    cache_teacher: str | os.PathLike[str] | None = None
    seed: Seed = 0

    def __post_init__(self) -> None:
        check_options(self)
        self.prepare()
        if self.cache_teacher is not None and not self.freeze_teacher:
            raise ConfigError("cache_teacher keeps a frozen teacher's answers; this one learns (freeze_teacher=False).")
        self.members = nn.ModuleList(_unbound(self.distillers))
        self.epoch = 1
        self.rows: list[Row] = []
        self._views: list[Features] = []
        self._cache: TeacherCache | None = None
        self._teacher_dtype: torch.dtype | None = None
        self._last: Step | None = None
        self._losses: list[tuple[float, Tensor]] = []
        self._own_taps: list[str] = []
        if self.task_loss is not None and not callable(self.task_loss):
            raise ConfigError(f"task_loss is {self.task_loss!r}; it is a function of (output, targets).")
        if (self.teacher is None) != (self.student is None):
            raise ConfigError(f"{type(self).__name__} needs teacher and student, or neither (and register_hooks later).")
        if self.is_bound:
            self.register_hooks(self.teacher, self.student)

    # what a kind of distiller defines

    def prepare(self) -> None:
        """Look at the options and bring them into form; ConfigError for those that do not go together."""

    def choose(self, teacher: fx.GraphModule, student: fx.GraphModule) -> tuple[Sequence[str], Sequence[str]]:
        """The addresses to tap in both graphs."""
        return (), ()

    def build(self, teacher: Features, student: Features) -> list[Row]:
        """Make projectors for the tapped shapes; returns how each pair of layers is brought together."""
        return []

    def distill_losses(self, step: Step) -> dict[str, Tensor]:
        """The losses between student and teacher by name, unweighted."""
        return {}

    def factors(self) -> dict[str, float]:
        """This distiller's own weights of its losses by name, 1 where none is named; ``task`` is the task loss."""
        return {}

    # models

    @property
    def is_bound(self) -> bool:
        """Whether teacher and student are there."""
        return self.student is not None

    def register_hooks(self, teacher: nn.Module, student: nn.Module) -> Self:
        """Bind the two models: copy the student, freeze the teacher, tap what is compared, build projectors.

        No Python hooks are involved: tapped values are further outputs of the models' graphs.
        """
        for name, model in (("teacher", teacher), ("student", student)):
            if not isinstance(model, nn.Module):
                raise ConfigError(
                    f"{name} is a {type(model).__name__}; it is a module. (build_distiller makes one from a configuration.)"
                )
        teacher, student = self._own_teacher(teacher), copy.deepcopy(student)
        for name, model in (("teacher", teacher), ("student", student)):
            check_values(model, name)
        self._teacher_dtype = common_dtype(teacher) if common_dtype(teacher) != common_dtype(student) else None
        parts = list(self._parts())
        if any(part.reads_features for part in parts):
            teacher, student = self._tapped(teacher, student, parts)
        self._modules.pop("teacher", None)
        if self.freeze_teacher:
            self.__dict__["teacher"] = teacher.eval()  # not a child: it does not learn and is not saved
        else:
            self.teacher = teacher
        self.student = student
        if self._views:
            for part in parts:
                with deterministic(self.seed, common_dtype(student)):
                    part.rows = part.build(*self._views)
            self._place(device_of(student))
            log.info("%s", self.layout())
        if self.cache_teacher is not None:
            self._cache = TeacherCache(self.cache_teacher, teacher)
        self._ddp_params_and_buffers_to_ignore = [
            f"{name}.{leaf}" for name, m in self.named_modules() if hasattr(m, "kept_alike") for leaf in m.kept_alike
        ]
        return self

    def _own_teacher(self, teacher: nn.Module) -> nn.Module:
        if self.teacher_pretrained is not None:
            teacher = copy.deepcopy(teacher)
            load_weights(teacher, self.teacher_pretrained)
            return frozen(teacher) if self.freeze_teacher else teacher
        return frozen(teacher) if self.freeze_teacher else copy.deepcopy(teacher)

    def _place(self, device: torch.device) -> None:
        """Bring what was built to the student's device."""
        for name, made in self._modules.items():
            if made is not None and name not in ("teacher", "student"):
                made.to(device)
        for name, buffer in self._buffers.items():
            self._buffers[name] = None if buffer is None else buffer.to(device)

    def _parts(self) -> Iterator[BaseDistiller]:
        yield self
        for member in self.members:
            assert isinstance(member, BaseDistiller)
            yield from member._parts()

    def _tapped(
        self, teacher: nn.Module, student: nn.Module, parts: Sequence[BaseDistiller]
    ) -> tuple[fx.GraphModule, fx.GraphModule]:
        graphs = (
            traced(teacher, self.example_inputs, "teacher", self._teacher_dtype),
            traced(student, self.example_inputs, "student"),
        )
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
        check_whole("epoch", epoch)
        for part in self._parts():
            part.epoch = epoch + 1

    def forward(
        self, images: Any = None, targets: Any = None, index: Tensor | None = None, **inputs: Any
    ) -> tuple[Any, Weighted]:
        """The student's output, and every loss by name, weighted: their sum is the total.

        ``images`` is a tensor, a tuple of positional arguments or a dict by keyword. Keywords may be given instead, and what
        the student does not take of these are the targets. Without ``targets`` there is no task loss. ``index`` holds the
        samples' numbers in the dataset.
        """
        self._require_models()
        self._last, self._losses = None, []
        call, targets = self._called(images, targets, inputs)
        check_samples(call)
        index = None if index is None else sample_numbers(index)
        student, theirs = self._run(1, self.student, call)
        teacher, ours = self._answer(call, index)
        step = Step(student, teacher, theirs, ours, targets, index, self.epoch, self.output, self.ignore_index)
        raw: dict[str, Tensor] = {}
        weights: dict[str, float] = {}
        if targets is not None and self.task_weight:
            raw["task"], weights["task"] = self._task(student, targets), self.task_weight * self.factors().get("task", 1.0)
            if not self.freeze_teacher:
                raw["teacher_task"], weights["teacher_task"] = self._task(teacher, targets), self.task_weight
        for part in self._parts():
            share, own = 1.0 if part is self else part.distill_weight, part.factors()
            for name, value in part.distill_losses(step).items():
                factor, free = share * own.get(name, 1.0), _free(name, raw)
                self._losses.append((factor, value))
                raw[free], weights[free] = value, self.distill_weight * factor
        self._last = step
        if not raw:
            raise DataError("there is nothing to learn from: no targets, and no distillation loss.")
        return student, Weighted(raw, weights)

    def _called(self, images: Any, targets: Any, inputs: dict[str, Any]) -> tuple[Arguments, Any]:
        """The call of both models, and the targets."""
        named = images is not None and bool(inputs) and "images" in signature(self.student).parameters
        call, left = split_batch({"images": images, **inputs} if named else inputs, self.student)
        if images is not None and not named:
            first = arguments(images)
            call = Arguments(first.args, {**first.kwargs, **call.kwargs})
        if targets is not None and left is not None:
            raise DataError(f"targets were given, and beside them what the student does not take: {', '.join(inputs)}.")
        return call, left if targets is None else targets

    def compute_distill_loss(self) -> Tensor:
        """The distillation loss of the last forward, before ``distill_weight``."""
        if self._last is None:
            raise ConfigError("there is no distillation loss yet: call the distiller on a batch first.")
        return (
            torch.stack([factor * value for factor, value in self._losses]).sum()
            if self._losses
            else torch.zeros((), dtype=torch.float32, device="cpu")
        )

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
            return self._views[which](*call.args, **call.kwargs)
        return call(model), {}

    def _answer(self, call: Arguments, index: Tensor | None) -> tuple[Any, dict[str, Tensor]]:
        if self._cache is None:
            with torch.no_grad() if self.freeze_teacher else nullcontext():
                return self._run(0, self.teacher, in_dtype(call, self._teacher_dtype))
        if index is None:
            raise DataError("cache_teacher needs every sample's index: wrap the dataset in IndexedDataset.")
        known = self._cache.answer(index, tuple(call))
        if known is None:
            with torch.no_grad():
                known = self._run(0, self.teacher, in_dtype(call, self._teacher_dtype))
            self._cache.keep(index, tuple(call), known)
        return known

    def _task(self, output: Any, targets: Any) -> Tensor:
        if self.task_loss is not None:
            return self.task_loss(output, targets)
        return classification(logits_of(output, self.output), targets, self.ignore_index)

    def _require_models(self) -> None:
        if not self.is_bound:
            raise ConfigError(
                f"{type(self).__name__} has no models yet: give teacher and student, or call "
                "register_hooks(teacher, student)."
            )

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_last": None, "_losses": []}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        if self.freeze_teacher and self.is_bound:
            self.teacher._apply(fn)
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


def _unbound(distillers: Any) -> list[BaseDistiller]:
    """Further distillers, made where they are configurations; ConfigError where one has models of its own."""
    if not isinstance(distillers, (list, tuple)) or not all(isinstance(d, (BaseDistiller, Mapping)) for d in distillers):
        raise ConfigError(f"distillers is {distillers!r}; it is a list of distillers, or mappings with their type.")
    made = [part if isinstance(part, BaseDistiller) else make_distiller(part) for part in distillers]
    if any(member.is_bound for member in made):
        raise ConfigError("distillers=[...] takes distillers without models of their own: leave teacher and student out.")
    return made


def _free(name: str, taken: Mapping[str, Any]) -> str:
    count, free = 1, name
    while free in taken:
        count += 1
        free = f"{name}_{count}"
    return free
