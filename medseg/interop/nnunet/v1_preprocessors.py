"""What each preprocessing class of nnU-Net v1 does to an image."""

from __future__ import annotations

from dataclasses import dataclass, field

from medseg.schema.bundle import Resampling
from medseg.schema.plans import Normalization

REFUSED = {
    "PreprocessorFor2D_edgeLength512": "it scales every slice to an edge of 512 pixels",
    "PreprocessorFor2D_edgeLength768": "it scales every slice to an edge of 768 pixels",
    "Preprocessor3DDifferentResampling": "it interpolates across thick slices",
}
"""Those that cannot be expressed -> why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Preprocessor:
    """How one of the preprocessing classes brings an image to the network's grid."""

    keeps_slices: bool = False
    """Whether the spacing across slices always stays."""
    resample_image: Resampling = field(default_factory=lambda: Resampling(order=3))
    """For the image."""
    resample_labels: Resampling = field(default_factory=Resampling)
    """For the mask of the imaged region."""
    resample_result: Resampling | None = None
    """For the way back, where it is not as the plans say."""
    normalization: Normalization | None = None
    """Of all channels, whatever the plans say; None: as they say."""


NEVER_SEPARATE = "Preprocessor3DBetterResampling"
PREPROCESSORS = {
    "GenericPreprocessor": Preprocessor(),
    "PreprocessorFor2D": Preprocessor(keeps_slices=True),
    "PreprocessorFor3D_LeaveOriginalZSpacing": Preprocessor(),
    "PreprocessorFor3D_NoResampling": Preprocessor(
        resample_image=Resampling(method="none", order=3),
        resample_result=Resampling(method="none"),
    ),
    "GenericPreprocessor_linearResampling": Preprocessor(resample_image=Resampling(order=1)),
    NEVER_SEPARATE: Preprocessor(
        resample_image=Resampling(order=3, separate="never"),
        resample_labels=Resampling(separate="never"),
    ),
    "GenericPreprocessor_scale_uint8_to_0_1": Preprocessor(
        keeps_slices=True, normalization="rgb_0_1"
    ),
}
