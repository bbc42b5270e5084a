"""Knowledge distillation: losses, distillers, what they remember."""

from fxcompress.distillation import losses
from fxcompress.distillation.base_distiller import DISTILLERS, BaseDistiller, make_distiller
from fxcompress.distillation.feature_distiller import (
    ATDistiller,
    FeatureDistiller,
    FitNetDistiller,
    FSPDistiller,
    OFDDistiller,
    ReviewKDDistiller,
)
from fxcompress.distillation.indexed import IndexedDataset
from fxcompress.distillation.logit_distiller import DISTDistiller, DKDDistiller, LogitDistiller
from fxcompress.distillation.parameters import distiller
from fxcompress.distillation.projectors import PROJECTORS
from fxcompress.distillation.relation_distiller import (
    CCDistiller,
    CRDDistiller,
    PKTDistiller,
    RelationDistiller,
    RKDDistiller,
)
from fxcompress.distillation.step import logits_of
from fxcompress.distillation.teacher import TeacherCache

__all__ = [
    "DISTILLERS",
    "PROJECTORS",
    "ATDistiller",
    "BaseDistiller",
    "CCDistiller",
    "CRDDistiller",
    "DISTDistiller",
    "DKDDistiller",
    "FSPDistiller",
    "FeatureDistiller",
    "FitNetDistiller",
    "IndexedDataset",
    "LogitDistiller",
    "OFDDistiller",
    "PKTDistiller",
    "RKDDistiller",
    "RelationDistiller",
    "ReviewKDDistiller",
    "TeacherCache",
    "distiller",
    "logits_of",
    "losses",
    "make_distiller",
]

for _distiller in (
    BaseDistiller,
    LogitDistiller,
    DKDDistiller,
    DISTDistiller,
    FeatureDistiller,
    FitNetDistiller,
    ATDistiller,
    FSPDistiller,
    OFDDistiller,
    ReviewKDDistiller,
    RelationDistiller,
    RKDDistiller,
    CRDDistiller,
    PKTDistiller,
    CCDistiller,
):
    DISTILLERS.register()(_distiller)
