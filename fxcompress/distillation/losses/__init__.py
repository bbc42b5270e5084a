"""Distillation losses as plain functions of tensors: each docstring gives the formula, the shapes and the paper.

All of them compute in float32 at least, whatever autocast says, and are finite with finite gradients on saturated logits,
batches of one, zero and duplicate rows and dead channels.
"""

from fxcompress.distillation.losses.contrast import info_nce_loss, nce_loss
from fxcompress.distillation.losses.features import (
    attention_transfer_loss,
    feature_loss,
    fsp_loss,
    fsp_matrix,
    hcl_loss,
    hint_loss,
    ofd_loss,
    ofd_margin,
)
from fxcompress.distillation.losses.logits import dist_loss, dkd_loss, kd_loss
from fxcompress.distillation.losses.relations import (
    angle_loss,
    correlation_congruence_loss,
    distance_loss,
    pkt_loss,
    similarity_loss,
)

__all__ = [
    "angle_loss",
    "attention_transfer_loss",
    "correlation_congruence_loss",
    "dist_loss",
    "distance_loss",
    "dkd_loss",
    "feature_loss",
    "fsp_loss",
    "fsp_matrix",
    "hcl_loss",
    "hint_loss",
    "info_nce_loss",
    "kd_loss",
    "nce_loss",
    "ofd_loss",
    "ofd_margin",
    "pkt_loss",
    "similarity_loss",
]
