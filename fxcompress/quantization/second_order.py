"""Rounding by second-order information: GPTQ (Frantar et al. 2022; called OPTQ at ICLR 2023).

Rounding the rows ``w`` of a layer to ``ŵ`` changes its results by ``(ŵ − w)·H·(ŵ − w)ᵀ`` in all, ``H = Σ x·xᵀ`` over its
inputs. One input after another is rounded to nearest, and those that follow make up for the error as far as ``H`` lets them.
That is Babai's nearest plane: with ``H = Mᵀ·M``, M lower triangular and ``d = ŵ − w``, input k is rounded from
``w_k − Σ_{j<k} M_kj·d_j / M_kk`` (Chen et al. 2025, The Geometry of LLM Quantization), which takes one factorisation and no
inverse. Inputs of the most power go first, while there are many left to make up for them.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["second_order_levels"]


def second_order_levels(
    rows: Tensor,
    scale: Tensor,
    low: Tensor,
    high: Tensor,
    hessian: Tensor,
    *,
    samples: float = math.inf,
    damping: float = 0.01,
    adjacent: bool = False,
    block: int = 128,
) -> Tensor | None:
    """The levels of ``rows``, float, counted from the zero point; None where ``hessian`` is not finite.

    ``rows``       ``[groups, outputs, inputs]``
    ``scale``      ``[groups, outputs, 1]``; so are ``low`` and ``high``, the smallest and the largest level
    ``hessian``    Σ x·xᵀ of every group, ``[groups, inputs, inputs]``
    ``samples``    how many independent ``x`` it is of: what few of them say is not trusted far
    ``damping``    what is added to its diagonal at least, as a share of the diagonal's mean
    ``adjacent``   every level is one of the two next to the weight
    ``block``      inputs between two products of matrices; it changes nothing but the time
    """
    order = torch.diagonal(hessian, dim1=-2, dim2=-1).argsort(dim=-1, descending=True, stable=True)
    factor = _factor(_ordered(hessian, order), samples, damping)
    if factor is None:
        return None
    columns = rows.gather(2, order[:, None].expand_as(rows)).mT.contiguous()
    step, lowest, highest = (value.squeeze(2) for value in (scale, low, high))
    levels, shift = torch.empty_like(columns), torch.empty_like(columns)
    for start in range(0, columns.shape[1], block):
        end = min(start + block, columns.shape[1])
        owed = factor[:, start:end, :start] @ shift[:, :start]
        for at in range(start, end):
            within = (factor[:, at : at + 1, start:at] @ shift[:, start:at]).squeeze(1)
            level = ((columns[:, at] - owed[:, at - start] - within) / step).round_()
            if adjacent:
                ratio = columns[:, at] / step
                level.clamp_(ratio.floor(), ratio.ceil())
            levels[:, at] = level.clamp_(lowest, highest)
            shift[:, at] = level * step - columns[:, at]
    back = order.argsort(dim=-1)
    return levels.mT.gather(2, back[:, None].expand_as(rows))


def _ordered(matrix: Tensor, order: Tensor) -> Tensor:
    """Square matrices with rows and columns in this order."""
    return matrix.gather(1, order[..., None].expand_as(matrix)).gather(2, order[:, None].expand_as(matrix))


def _factor(hessian: Tensor, samples: float, damping: float) -> Tensor | None:
    """M of ``hessian = Mᵀ·M``, every row divided by its diagonal element, in the type of ``hessian``."""
    turned = hessian.to(torch.float64).flip(-2, -1)
    share = _chance(turned, samples)
    diagonal = torch.diagonal(turned, dim1=-2, dim2=-1)
    mean = diagonal.mean(-1, keepdim=True)
    diagonal += (share / (1 - share)).clamp(min=damping) * torch.where(mean > 0, mean, 1.0)
    lower, failed = torch.linalg.cholesky_ex(turned)
    if bool(failed.any()) or not bool(lower.isfinite().all()):
        return None
    found = lower.flip(-2, -1).mT
    return (found / torch.diagonal(found, dim1=-2, dim2=-1)[..., None]).to(hessian.dtype)


def _chance(hessian: Tensor, samples: float) -> Tensor:
    """The share of a product of samples that is chance, ``[groups, 1]``: it is to be shrunk to its diagonal's mean that far.

    Oracle approximating shrinkage (Chen, Wiesel, Eldar & Hero 2010), ``(1 + r)/((n + 1)·(1 − r/p))`` for large p, where
    ``r = tr(H)²/tr(H²)`` tells how many of the p inputs go their own way.
    """
    inputs = hessian.shape[-1]
    trace = torch.diagonal(hessian, dim1=-2, dim2=-1).sum(-1, keepdim=True)
    own = (trace.square() / hessian.square().sum((-2, -1))[:, None]).nan_to_num(1.0)
    return ((1 + own) / ((samples + 1) * (1 - own / inputs).clamp(min=1e-9))).clamp(max=1 - 1e-6)
