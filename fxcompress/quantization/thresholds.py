"""Where to clip: the threshold of least divergence and the range of least squared error, from a histogram.

Pure maths in float64: occupied bins come as left ends, right ends and counts; values are taken to be spread evenly over a
bin, and a bin whose ends agree is a point.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fxcompress.quantization.grid import Grid, compute_scale_zp

__all__ = ["entropy_threshold", "even_bins", "graded", "mse_range", "squared_error"]


def even_bins(left: Tensor, right: Tensor, counts: Tensor, ends: Tensor) -> Tensor:
    """Magnitudes counted in bins between neighbouring ``ends`` (ascending, from 0); a bin that straddles one is divided."""
    spread = right > left
    total = torch.cat([torch.zeros(1, dtype=torch.float64, device="cpu"), counts[spread].cumsum(0)])
    even = torch.zeros(ends.numel() - 1, dtype=torch.float64, device="cpu")
    if bool(spread.any()):
        a, b = left[spread], right[spread]
        place = torch.searchsorted(a, ends, right=True) - 1
        inside = place.clamp(min=0)
        share = ((ends - a[inside]) / (b[inside] - a[inside])).clamp(0, 1)
        below = torch.where(place >= 0, total[inside] + share * counts[spread][inside], 0.0)
        even += below.diff()
    points, held = left[~spread], counts[~spread]
    index = torch.searchsorted(ends, points).sub(1).clamp(min=0)
    return even.index_add_(0, index[index < even.numel()], held[index < even.numel()])


def graded(number: int, octaves: int) -> Tensor:
    """The ends of ``number`` bins of width 1, and of ``number`` more for each octave above them, as integers."""
    steps = [
        torch.ones(number, dtype=torch.int64, device="cpu"),
        *(torch.full((number,), 1 << octave, device="cpu") for octave in range(octaves)),
    ]
    return torch.cat([torch.zeros(1, dtype=torch.int64, device="cpu"), *steps]).cumsum(0)


def entropy_threshold(counts: Tensor, levels: int, ends: Tensor | None = None) -> int:
    """How many of the bins of magnitudes to keep, so that clipping and quantizing to ``levels`` diverges least.

    For i bins kept, P is ``counts[:i]`` with all that is clipped added to the last bin; Q is ``counts[:i]`` in ``levels``
    equal levels, each spread evenly over the bins of its own where P is not zero. Both are divided by the count of all
    values, so that mass which is clipped is charged::

        KL(i) = Σ_j P_j log(P_j / Q_j)

    ``ends`` are those of the bins, integers from 0; None: every bin has width 1. A wider bin stands for that many of width 1
    with its mass spread evenly over them. A bin belongs to the level that its left end lies in. Candidates are the ends from
    ``levels`` on, where bins are wider those of occupied ones; a candidate where P has values and Q has none is out. The
    largest of equals wins: what costs nothing is not clipped. (Migacz, 8-bit inference with TensorRT, 2017, with clipped
    mass charged.)
    """
    number = counts.numel()
    if number <= levels:
        return number
    ends = torch.arange(number + 1, device="cpu") if ends is None else ends
    width = ends.diff()
    kept = torch.arange(levels, number + 1, device="cpu")
    kept = kept[(width[kept - 1] == 1) | (counts[kept - 1] > 0)]
    divergence = torch.cat([_divergence(part, counts, levels, ends) for part in kept.split(_CANDIDATES)])
    least = divergence.min()
    if not bool(torch.isfinite(least)):
        return number
    return int(kept[divergence <= least + 1e-12][-1])


_CANDIDATES = 2048


def _divergence(kept: Tensor, counts: Tensor, levels: int, ends: Tensor) -> Tensor:
    """KL(i) for every i in ``kept``."""
    zero = torch.zeros(1, dtype=torch.float64, device="cpu")
    width = ends.diff().to(torch.float64)
    mass = torch.cat([zero, counts.cumsum(0)])
    occupied = torch.cat([zero, (width * (counts > 0)).cumsum(0)])
    logs = torch.cat([zero, torch.xlogy(counts, counts / width).cumsum(0)])
    clipped, last, unit = mass[-1] - mass[kept], counts[kept - 1], width[kept - 1]
    raised = last + clipped
    own = logs[kept] - torch.xlogy(last, last / unit) + torch.xlogy(raised, raised / unit)
    starts = (torch.arange(levels + 1, device="cpu") * ends[kept][:, None] + levels - 1) // levels
    if int(ends[kept[-1]]) > int(kept[-1]):
        starts = torch.searchsorted(ends, starts)
    in_level = mass[starts].diff(dim=1)
    wide = occupied[starts].diff(dim=1)
    wide[:, -1] += unit * ((last == 0) & (clipped > 0))
    p_level = in_level.clone()
    p_level[:, -1] += clipped
    cross = torch.xlogy(p_level, in_level / wide.clamp(min=1))
    return (own - cross.sum(1)) / mass[-1]


def squared_error(low: Tensor, high: Tensor, target: Grid, bins: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """The summed squared error of quantizing the binned values on each range ``[low_k, high_k]``.

    The integral of (x − Q(x))² over a bin, exactly: between two levels it is a cubic, beyond the last one as well.
    """
    left, right, counts = bins
    scale, zero_point = (t.to(torch.float64)[:, None] for t in compute_scale_zp(low, high, target))
    bottom, top = (target.quant_min - zero_point) * scale, (target.quant_max - zero_point) * scale
    total = torch.zeros(low.numel(), dtype=torch.float64, device="cpu")
    spread = right > left
    if bool(spread.any()):
        ends = [end[spread].expand(low.numel(), -1) for end in (left, right)]
        density = counts[spread] / (right[spread] - left[spread])
        total += ((_integral(ends[1], scale, bottom, top) - _integral(ends[0], scale, bottom, top)) * density).sum(1)
    points = left[~spread].expand(low.numel(), -1)
    snapped = (torch.round(points / scale) * scale).clamp(bottom, top)
    return total + ((points - snapped).square() * counts[~spread]).sum(1)


def _integral(x: Tensor, scale: Tensor, bottom: Tensor, top: Tensor) -> Tensor:
    """∫₀ˣ (t − Q(t))² dt."""
    inner = x.clamp(bottom, top)
    level = torch.round(inner / scale)
    return level * scale**3 / 12 + (inner - level * scale) ** 3 / 3 + (x - inner) ** 3 / 3


def mse_range(minimum: float, maximum: float, target: Grid, bins: tuple[Tensor, Tensor, Tensor]) -> tuple[float, float]:
    """The range inside the observed extremes that quantizes the binned values with the least squared error.

    Both ends are shrunk together first, then, on an affine grid, each by itself until nothing improves.
    """
    reach = max(-minimum, maximum)

    def together(share: Tensor) -> tuple[Tensor, Tensor]:
        if not target.symmetric and minimum < 0.0 < maximum:
            return share * minimum, share * maximum
        threshold = share * reach
        return threshold.neg().clamp(min=minimum).minimum(threshold), threshold.clamp(max=maximum).maximum(-threshold)

    best, least = _search(together, target, bins)
    if target.symmetric or minimum >= 0.0 or maximum <= 0.0:
        return best
    for _ in range(8):
        low, high = best
        tries = (
            _search(lambda share, low=low: (torch.full_like(share, low), share * maximum), target, bins),  # type: ignore[misc]
            _search(lambda share, high=high: (share * minimum, torch.full_like(share, high)), target, bins),  # type: ignore[misc]
        )
        found, error = min(tries, key=lambda t: t[1])
        if not error < least:
            break
        best, least = found, error
    return best


_STEPS = 8
_OCTAVES = 20


def _search(
    range_of: Callable[[Tensor], tuple[Tensor, Tensor]], target: Grid, bins: tuple[Tensor, Tensor, Tensor]
) -> tuple[tuple[float, float], float]:
    """The range ``range_of(share)`` with the least error over shares in (0, 1], and that error.

    An octave of shares at a time while that helps, then finer around the best.
    """
    best, least = 1.0, torch.inf

    def look(shares: Tensor) -> float:
        nonlocal best, least
        errors = squared_error(*range_of(shares), target, bins)
        found = float(errors.min())
        if found < least:
            best, least = float(shares[errors.argmin()]), found
        return found

    for octave in (2.0 ** -(torch.arange(_STEPS * _OCTAVES, dtype=torch.float64, device="cpu") / _STEPS)).split(_STEPS):
        if look(octave) > 4 * least:
            break
    width = best * (2 ** (1 / _STEPS) - 1)
    for _ in range(2):
        look(torch.linspace(best - width, min(best + width, 1.0), 17, dtype=torch.float64, device="cpu"))
        width /= 8
    low, high = range_of(torch.tensor([best], dtype=torch.float64, device="cpu"))
    return (float(low), float(high)), least
