"""A plan: an immutable, ordered list of passes with their options, written as text, as data, or as objects.

Everything that can be known before any work is checked when the plan is built: unknown passes and options, wrong types, an
order that cannot work. ``str(plan)`` is canonical YAML and parses back to an equal plan.
"""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, get_type_hints

import pydantic
import yaml

from fxcompress import library
from fxcompress.errors import ConfigError, FxCompressError, PlanError, brief, did_you_mean, shown
from fxcompress.files import read_text
from fxcompress.pass_base import STAGES, Pass
from fxcompress.yaml_text import read_yaml

__all__ = ["Plan", "build_pass", "option_types"]


@dataclasses.dataclass(frozen=True)
class Plan:
    """The passes to run, in order."""

    steps: tuple[Pass, ...] = ()

    def __post_init__(self) -> None:
        _check_order(self.steps)

    @classmethod
    def parse(cls, plan: Plan | Pass | Sequence[Any] | Mapping[str, Any] | str | os.PathLike[str]) -> Plan:
        """A plan from any of its forms.

        A list holds passes, names, or one-entry mappings ``{name: {option: value}}``; a name may be a component's
        (``PTQQuantizer``), which stands for its passes. A mapping is ``{name: options}`` in
        order, or ``{"steps": [...]}``; either may hold ``require``, checked at the end. A string is YAML of such a list or
        mapping, or the path of a file that holds it.

        Raises PlanError naming the step, the option and the closest known name.
        """
        if isinstance(plan, Plan):
            return plan
        if isinstance(plan, Pass):
            return cls((plan,))
        if isinstance(plan, os.PathLike) or (isinstance(plan, str) and _is_path(plan)):
            return _load(Path(plan))
        if isinstance(plan, str):
            data = read_yaml(plan)
            if isinstance(data, str):
                raise PlanError(f"there is no file {shown(data)}, and as YAML it is a word, not a list of steps.")
            return cls.parse(data)
        if isinstance(plan, Mapping):
            return cls.parse(_steps_of(plan))
        if isinstance(plan, Sequence):
            parsed = [_parse_step(number, step) for number, step in enumerate(plan, 1)]
            return cls(tuple(step for steps in parsed for step in steps))
        raise PlanError(f"a plan is a Plan, a list, a mapping, YAML text or a path, not a {type(plan).__name__}.")

    def __iter__(self) -> Iterator[Pass]:
        return iter(self.steps)

    def __len__(self) -> int:
        return len(self.steps)

    def __add__(self, other: Plan) -> Plan:
        return Plan(self.steps + other.steps)

    def as_data(self) -> list[Any]:
        """The plan as plain lists, mappings and scalars; options at their defaults are left out."""
        return [_step_data(step) for step in self.steps]

    def __str__(self) -> str:
        return "".join(f"- {_line(step)}\n" for step in self.as_data()) or "[]\n"


def _is_path(text: str) -> bool:
    return "\n" not in text and (text.endswith((".yaml", ".yml", ".json")) or os.path.isfile(text))


def _load(path: Path) -> Plan:
    try:
        text = read_text(path)
    except (OSError, ValueError) as error:
        raise PlanError(f"the plan {shown(str(path))} cannot be read: {brief(error)}.") from error
    try:
        return Plan.parse(read_yaml(text) or [])
    except PlanError as error:
        raise PlanError(f"{path}: {error}") from error


def _steps_of(plan: Mapping[str, Any]) -> list[Any]:
    if "steps" not in plan:
        return [{name: options} for name, options in plan.items()]
    unknown = [key for key in plan if key not in ("steps", "require")]
    if unknown:
        raise PlanError(f"a plan has no key {unknown[0]!r}.{did_you_mean(str(unknown[0]), ('steps', 'require'))}")
    steps = plan["steps"]
    if not isinstance(steps, Sequence) or isinstance(steps, str):
        raise PlanError(f"'steps' is a {type(steps).__name__}; it is a list of passes.")
    return [*steps, {"require": plan["require"]}] if "require" in plan else list(steps)


def _parse_step(number: int, step: Any) -> tuple[Pass, ...]:
    if isinstance(step, Pass):
        return (step,)
    if isinstance(step, str):
        return _named(step, {}, f"step {number} ")
    if isinstance(step, Mapping) and len(step) == 1:
        name, options = next(iter(step.items()))
        if options is None or isinstance(options, Mapping):
            return _named(str(name), options or {}, f"step {number} ")
        raise PlanError(f"step {number} {name!r}: its options are a {type(options).__name__}, and must be a mapping.")
    raise PlanError(f"step {number} is {shown(step)}; write a pass's name, or one name with its options: {{name: {{...}}}}.")


def _named(name: str, options: Mapping[str, Any], where: str) -> tuple[Pass, ...]:
    """A pass, or the passes of a component."""
    if name in library.passes() or name not in library.components():
        return (build_pass(name, options, where),)
    try:
        return library.components()[name](options)
    except ConfigError as error:
        raise PlanError(f"{where}{name!r}: {error}") from error


def build_pass(name: str, options: Mapping[str, Any], where: str = "") -> Pass:
    """The pass ``name`` with ``options``, each checked against the type of its field."""
    try:
        cls = library.find(name)
    except PlanError as error:
        raise PlanError(f"{where}: {error}" if where else str(error)) from error
    values = {}
    fields: dict[str, pydantic.TypeAdapter[Any]] = option_types(cls)  # type: ignore[arg-type]
    for key, value in options.items():
        if key not in fields:
            known = f" It takes: {', '.join(fields)}." if fields else " It takes none."
            raise PlanError(f"{where}{name!r} has no option {shown(key)}.{did_you_mean(str(key), fields) or known}")
        values[key] = _checked(fields[key], value, f"{where}{name!r}: option {key!r}")
    try:
        return cls(**values)
    except TypeError as error:
        missing = [f.name for f in dataclasses.fields(cls) if f.name not in values and _is_required(f)]  # type: ignore[arg-type]
        raise PlanError(f"{where}{name!r} needs the option(s) {', '.join(missing)}.") from error
    except FxCompressError as error:
        raise PlanError(f"{where}{name!r}: {error}") from error


def _is_required(field: Any) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


@functools.cache
def option_types(cls: Any) -> dict[str, pydantic.TypeAdapter[Any]]:
    """A checker for each option of a pass."""
    hints = get_type_hints(cls, include_extras=True)
    return {field.name: pydantic.TypeAdapter(hints[field.name]) for field in dataclasses.fields(cls)}


def _checked(adapter: pydantic.TypeAdapter[Any], value: Any, where: str) -> Any:
    try:
        return adapter.validate_python(_tupled(value), strict=True)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        raise PlanError(f"{where} is {shown(value)}: {first['msg'].lower()}.") from error


def _tupled(value: Any) -> Any:
    """Lists, as text has them, become the tuples that options are."""
    if isinstance(value, list):
        return tuple(_tupled(item) for item in value)
    if isinstance(value, Mapping):
        return {key: _tupled(item) for key, item in value.items()}
    return value


def _listed(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_listed(item) for item in value]
    if isinstance(value, Mapping):
        return {key: _listed(item) for key, item in value.items()}
    return value


def _step_data(step: Pass) -> Any:
    options = {}
    for field in dataclasses.fields(step):  # type: ignore[arg-type]
        value = getattr(step, field.name)
        default = field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default
        if value != default:
            options[field.name] = _listed(value)
    return {step.name: options} if options else step.name


def _line(step: Any) -> str:
    if isinstance(step, str):
        return step
    name, options = next(iter(step.items()))
    return f"{name}: {yaml.safe_dump(options, sort_keys=False, default_flow_style=True, width=10**6).strip()}"


def _check_order(steps: Sequence[Pass]) -> None:
    """Follow the graph's stage through the steps; raise where one cannot take what its predecessor leaves."""
    possible, author = set(STAGES), "the start"
    for number, step in enumerate(steps, 1):
        if not isinstance(step, Pass):
            raise PlanError(f"step {number} is {step!r}, which is not a pass.")
        accepted = possible & set(step.takes)
        if not accepted:
            bridge = _bridge(possible, set(step.takes))
            hint = f" Put {', then '.join(map(repr, bridge))} before it." if bridge else ""
            raise PlanError(
                f"step {number} {step.name!r} takes a {' or '.join(step.takes)} graph, "
                f"but {author} leaves it {' or '.join(sorted(possible))}.{hint}"
            )
        possible = {step.leaves} if step.leaves else accepted
        if step.leaves or accepted != set(STAGES):
            author = f"step {number} {step.name!r}"


def _bridge(have: set[str], wanted: set[str]) -> list[str]:
    """The shortest chain of passes that leads from a stage in ``have`` to one in ``wanted``; empty where there is none."""
    paths: dict[str, list[str]] = {stage: [] for stage in have}
    queue = list(have)
    for stage in queue:
        if stage in wanted:
            return paths[stage]
        for name, cls in library.passes().items():
            if cls.leaves and stage in cls.takes and cls.leaves not in paths:
                paths[cls.leaves] = [*paths[stage], name]
                queue.append(cls.leaves)
    return []
