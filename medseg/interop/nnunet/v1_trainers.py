"""What the name of a trainer of nnU-Net v1 says of its predictions; its files do not say it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

REGIONS: dict[str, tuple[int, ...]] = {
    "whole_tumor": (1, 2, 3),
    "tumor_core": (2, 3),
    "enhancing_tumor": (3,),
}
"""Name -> labels, in the order of the logit channels, of the trainers with regions."""
REGIONS_CLASS_ORDER = (1, 2, 3)
"""Label that is painted for each of them, in this order."""
DEFAULT_TRAINER = "nnUNetTrainerV2"

_BASES = ("nnUNetTrainer", "nnUNetTrainerV2")
_VARIANTS = """
CE CascadeFullRes NoDA

BraTSRegions BraTSRegions_BN BraTSRegions_DA3 BraTSRegions_DA3_BD BraTSRegions_DA3_BN
BraTSRegions_DA3_BN_BD BraTSRegions_DA4_BN BraTSRegions_DA4_BN_BD BraTSRegions_DDP BraTSRegions_Dice
CascadeFullRes CascadeFullRes_EducatedGuess CascadeFullRes_EducatedGuess2
CascadeFullRes_EducatedGuess3 CascadeFullRes_lowerLR CascadeFullRes_noConnComp
CascadeFullRes_shorter CascadeFullRes_shorter_lowerLR CascadeFullRes_smallerBinStrel
_2epochs _2epochs_dummyLoad _3ConvPerStage _3ConvPerStageSameFilters _5epochs _5epochs_CEnoDS
_5epochs_dummyLoad _5epochs_dummyLoadCEnoDS _5epochs_noDS _Adam _Adam_ReduceOnPlateau
_Adam_nnUNetTrainerlr _BN _DA2 _DA3 _DA3_BN _DA5 _DDP _DDP_5epochs _DDP_5epochs_dummyLoad _DP
_FRN _ForceBD _ForceSD _GN _GeLU _LReLU_slope_2en1 _Loss_CE _Loss_CEGDL _Loss_Dice
_Loss_DiceCE_noSmooth _Loss_DiceTopK10 _Loss_Dice_LR1en3 _Loss_Dice_squared _Loss_DicewithBG
_Loss_DicewithBG_LR1en3 _Loss_MCC _Loss_MCCnoBG _Loss_TopK10 _MMS _Mish _NoNormalization
_NoNormalization_lr1en3 _Ranger_lr1en2 _Ranger_lr3en3 _Ranger_lr3en4 _ReLU _ReLU_biasInSegOutput
_ReLU_convReLUIN _ResencUNet _ResencUNet_DA3 _ResencUNet_DA3_BN _ResencUNet_SimonsInit
_ResencUNet_SimonsInit_DA5 _SGD_ReduceOnPlateau _SGD_fixedSchedule _SGD_fixedSchedule2
_SGD_lr1en1 _SGD_lr1en3 _SegLoss_Focal _allConv3x3 _copy1 _copy2 _copy3 _copy4 _cycleAtEnd
_cycleAtEnd2 _fp16 _fp32 _fullEvals _graduallyTransitionFromCEToDice _independentScalePerAxis
_insaneDA _lReLU_biasInSegOutput _lReLU_convReLUIN _momentum09 _momentum095 _momentum098
_momentum09in2D _noDataAugmentation _noDeepSupervision _noMirroring
_reduceMomentumDuringTraining _resample33 _softDeepSupervision _warmup
"""
_KNOWN = frozenset(
    {
        *_BASES,
        *(
            f"{base}{variant}"
            for base, variants in zip(_BASES, _VARIANTS.split("\n\n"), strict=True)
            for variant in variants.split()
        ),
    }
)
"""The classes of version 1.7.1."""
_NOT_MIRRORED = re.compile(r"no_?mirroring|noDA(?![a-z])|noDataAugmentation", re.IGNORECASE)
_REFUSED = {"GN": "group norm", "GroupNorm": "group norm", "FRN": "filter response norm"}
_LABELS_DESPITE_NAME = "nnUNetTrainerV2BraTSRegions_BN"


@dataclass(frozen=True, slots=True, kw_only=True)
class Trainer:
    """What the name of a trainer says."""

    name: str
    """Of the class."""
    is_known: bool
    """Whether version 1.7.1 has it; otherwise its name is all there is to go by."""
    has_regions: bool
    """Whether it trained overlapping regions, each with a sigmoid."""
    mirrors: bool
    """Whether its predictions are averaged over mirrored images."""
    stage_position: int
    """Where the stage stands among the arguments it was made with."""
    refused: str = ""
    """What of its network medseg does not have."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Options of the network that do not show in its weights."""


def trainer_of(name: str) -> Trainer:
    """Return what the name of a trainer's class says; unknown classes are taken for what they say.

    Examples:
        >>> trainer = trainer_of("nnUNetTrainerV2_ReLU_convReLUIN")
        >>> trainer.is_known, trainer.options
        (True, {'activation': 'relu', 'activation_first': True})
        >>> trainer_of("nnUNetTrainerV2_noMirroring").mirrors, trainer_of("My_insaneDA").mirrors
        (False, True)

    Source:
        The trainer classes of nnU-Net 1.7.1.
    """
    words = name.split("_")
    return Trainer(
        name=name,
        is_known=name in _KNOWN,
        has_regions="BraTSRegions" in name and name != _LABELS_DESPITE_NAME,
        mirrors=_NOT_MIRRORED.search(name) is None,
        stage_position=6 if "DDP" in words else 5,
        refused=next((_REFUSED[word] for word in words if word in _REFUSED), ""),
        options=_options(words),
    )


def _options(words: list[str]) -> dict[str, Any]:
    options: dict[str, Any] = {}
    for word, activation in (("ReLU", "relu"), ("GeLU", "gelu"), ("Mish", "mish")):
        if word in words:
            options["activation"] = activation
    if "slope" in words and "2en1" in words:
        options["slope"] = 0.2
    if "convReLUIN" in words or "convlReLUIN" in words:
        options["activation_first"] = True
    return options


def mirror_axes_of(trainer: Trainer, num_axes: int) -> tuple[int, ...]:
    """Return the axes of the patch that predictions are mirrored along."""
    return tuple(range(num_axes)) if trainer.mirrors else ()


def before_cascade(trainer: str, previous: str | None) -> tuple[str, ...]:
    """Return the trainers the stage before a cascade may have, the likeliest first.

    Args:
        trainer: Of the cascade.
        previous: What it was told when it was made.

    Examples:
        >>> before_cascade("nnUNetTrainerV2CascadeFullRes_shorter", None)
        ('nnUNetTrainerV2', 'nnUNetTrainerV2_shorter')
    """
    plain = trainer.replace("CascadeFullRes", "")
    names = [*([previous] if previous else []), DEFAULT_TRAINER, plain]
    return tuple(dict.fromkeys(name for name in names if name and name != trainer))
