"""require: a floor that the result must reach, as an error rather than a surprise."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from pydantic import Field
from torch import fx

from fxcompress.errors import VerificationError
from fxcompress.graph.coverage import coverage
from fxcompress.pass_base import EXACT, STAGES, Context, Pass, Promise

__all__ = ["Require"]

Share = Annotated[float, Field(ge=0.0, le=1.0)]


@dataclass(frozen=True)
class Require(Pass):
    """Raise unless the graph runs at least this share in integers.

    Options: ``int8_macs``, share of multiply-accumulates, and ``int8_nodes``, share of operators, each in [0, 1].
    """

    name: ClassVar[str] = "require"
    takes: ClassVar[tuple[str, ...]] = STAGES
    promise: ClassVar[Promise] = EXACT

    int8_macs: Share = 0.0
    int8_nodes: Share = 0.0

    def run_model(self, model: fx.GraphModule, context: Context) -> None:
        report = coverage(model)
        if self.int8_macs and not report.counted:
            raise VerificationError("how many multiply-accumulates run in integers is not known: give example_inputs.")
        for asked, reached, what in (
            (self.int8_macs, report.mac_share, "multiply-accumulates"),
            (self.int8_nodes, report.node_share, "operators"),
        ):
            if reached < asked:
                worst = "; ".join(f"{row.node}: {row.reason}" for row in report.floats[:3])
                raise VerificationError(
                    f"{reached:.1%} of the {what} run in integers, {asked:.1%} are required. In float: {worst}"
                )
