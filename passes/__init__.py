"""The library of passes: one rewrite per file, the file named like the pass.

A new pass is a file here, a line in :data:`PASSES`, and a page of tests.
"""

from fxcompress.passes.accelerate_sparsity import AccelerateSparsity
from fxcompress.passes.adaround import AdaRound
from fxcompress.passes.bake_masks import BakeMasks
from fxcompress.passes.calibrate import Calibrate
from fxcompress.passes.cast_half import CastHalf
from fxcompress.passes.cast_single import CastSingle
from fxcompress.passes.correct_bias import CorrectBias
from fxcompress.passes.distill import Distill
from fxcompress.passes.equalize_layers import EqualizeLayers
from fxcompress.passes.fold_batchnorm import FoldBatchNorm
from fxcompress.passes.fold_quantization import FoldQuantization
from fxcompress.passes.freeze_scales import FreezeScales
from fxcompress.passes.fuse_activations import FuseActivations
from fxcompress.passes.gptq import GPTQ
from fxcompress.passes.insert_fake_quant import InsertFakeQuant
from fxcompress.passes.insert_observers import InsertObservers
from fxcompress.passes.insert_taps import InsertTaps
from fxcompress.passes.keep_teacher import KeepTeacher
from fxcompress.passes.lower import Lower
from fxcompress.passes.mask_weights import MaskWeights
from fxcompress.passes.open_attention import OpenAttention
from fxcompress.passes.prune_channels import PruneChannels
from fxcompress.passes.prune_layers import PruneLayers
from fxcompress.passes.quantize_dynamic import QuantizeDynamic
from fxcompress.passes.recalibrate_batchnorm import RecalibrateBatchNorm
from fxcompress.passes.recover_accuracy import RecoverAccuracy
from fxcompress.passes.remove_dead import RemoveDead
from fxcompress.passes.remove_taps import RemoveTaps
from fxcompress.passes.require import Require
from fxcompress.passes.revert_slow import RevertSlow
from fxcompress.passes.settle_weights import SettleWeights
from fxcompress.passes.train import Train

PASSES = (
    RemoveDead,
    CastSingle,
    SettleWeights,
    FoldBatchNorm,
    FuseActivations,
    EqualizeLayers,
    OpenAttention,
    PruneChannels,
    MaskWeights,
    BakeMasks,
    AccelerateSparsity,
    RecalibrateBatchNorm,
    PruneLayers,
    KeepTeacher,
    Distill,
    InsertTaps,
    RemoveTaps,
    Train,
    InsertObservers,
    Calibrate,
    CorrectBias,
    GPTQ,
    AdaRound,
    RecoverAccuracy,
    InsertFakeQuant,
    FreezeScales,
    FoldQuantization,
    QuantizeDynamic,
    CastHalf,
    RevertSlow,
    Lower,
    Require,
)

if __name__ != "fxcompress.passes":
    raise ImportError("the library of passes is imported as 'fxcompress.passes', not as a top-level package")
