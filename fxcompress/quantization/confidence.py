"""How far a share measured on few samples may be off on all the others."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist

__all__ = ["share", "share_at_most"]


def share(parts: Sequence[float], wholes: Sequence[float]) -> float:
    """Σ parts / Σ wholes; of nothing, 0 where there are no parts either, else 1."""
    whole = math.fsum(wholes)
    return math.fsum(parts) / whole if whole else float(math.fsum(parts) > 0)


def share_at_most(parts: Sequence[float], wholes: Sequence[float], confidence: float) -> float:
    """What the share of all samples is at most, with this confidence, by the samples at hand.

    The ratio estimator's variance, ``s² = n/(n − 1)·Σ(part − share·whole)²/(Σ whole)²`` (Cochran, Sampling Techniques,
    ch. 6), and Student's t. A single sample says nothing about others: its share is returned.
    """
    found, n, whole = share(parts, wholes), len(parts), math.fsum(wholes)
    if n < 2 or not whole:
        return found
    square = math.fsum((part - found * of) ** 2 for part, of in zip(parts, wholes, strict=True))
    return found + student_t(confidence, n - 1) * math.sqrt(n / (n - 1) * square) / whole


def student_t(confidence: float, freedom: int) -> float:
    """The quantile of Student's t: exact for 1 and 2 degrees of freedom, else by Abramowitz & Stegun 26.7.5."""
    if freedom == 1:
        return math.tan(math.pi * (confidence - 0.5))
    if freedom == 2:
        return (2 * confidence - 1) / math.sqrt(2 * confidence * (1 - confidence))
    z = NormalDist().inv_cdf(confidence)
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + math.fsum(term / freedom**power for power, term in enumerate(terms, 1))
