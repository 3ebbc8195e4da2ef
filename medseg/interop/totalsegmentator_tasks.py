"""What is known of TotalSegmentator's tasks: their datasets, and what is done around the networks.

Source:
    Behaviour of TotalSegmentator 2.18.0.
"""

from __future__ import annotations

from dataclasses import dataclass

from medseg.schema.postprocessing import KeepLargest, Postprocessing, RemoveSmall

Spacing = tuple[float, float, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Known:
    """A task."""

    datasets: tuple[int, ...]
    """Numbers of its datasets, in the order their labels are counted."""
    spacing: Spacing | None = None
    """Voxel size in mm along the axes to right, anterior, superior; None: that of the image."""
    configuration: str = "3d_fullres"
    """Of its networks."""
    folds: tuple[str, ...] | None = ("fold_0",)
    """That are used; None: every one."""
    step: float = 0.5
    """Between tiles."""
    crop: str = ""
    """What another model finds first, and the image is cut to, in words."""
    dropped: tuple[int, ...] = ()
    """Values that only help in training."""
    postprocessing: Postprocessing | None = None
    """What is done to the label map on the resampled grid."""
    note: str = ""
    """What is done too and medseg does not do; a sentence."""
    refusal: str = ""
    """Why it cannot be imported."""


def _cubes(size: float) -> Spacing:
    return (size, size, size)


_BODY = Postprocessing(
    reason="TotalSegmentator keeps the largest piece of the trunk and extremities from 50 ml on.",
    steps=(
        KeepLargest(structures=(1,), connectivity=1),
        RemoveSmall(structures=(2,), connectivity=1, min_ml=50.0),
    ),
)
_GROWN = (
    "The original separates vertebrae that touch and lets each grow by 3 mm; this bundle gives the "
    "smaller shapes the network finds."
)
_CLEANED = (
    "The original also removes what lies more than 10 mm outside the heart, the aorta and the "
    "inferior vena cava; this bundle does not."
)
_HALF, _FINE = (0.5, 0.5, 0.5), (0.75, 0.75, 1.0)
_MM15 = _cubes(1.5)
_HIGH, _ALL = "3d_fullres_high", ("fold_0", "fold_1", "fold_2", "fold_3", "fold_4")
_NECK = "the clavicles and the vertebrae C1, C5, T1 and T4"

TASKS: dict[str, Known] = {
    "total": Known(datasets=(291, 292, 293, 294, 295), spacing=_MM15, step=0.8),
    "total_fast": Known(datasets=(297,), spacing=_cubes(3.0), step=0.8),
    "total_fastest": Known(datasets=(298,), spacing=_cubes(6.0), step=0.8),
    "total_v3": Known(datasets=(831, 832, 833, 834, 835), spacing=_MM15, step=0.8),
    "total_v3_fast": Known(datasets=(836,), spacing=_cubes(3.0), step=0.8),
    "total_v3_fastest": Known(datasets=(837,), spacing=_cubes(6.0), step=0.8),
    "total_mr": Known(datasets=(850, 851), spacing=_MM15, step=0.8),
    "total_mr_fast": Known(datasets=(852,), spacing=_cubes(3.0), step=0.8),
    "total_mr_fastest": Known(datasets=(853,), spacing=_cubes(6.0), step=0.8),
    "body": Known(datasets=(299,), spacing=_MM15, postprocessing=_BODY),
    "body_fast": Known(datasets=(300,), spacing=_cubes(6.0), postprocessing=_BODY),
    "body_mr": Known(datasets=(597,), spacing=_MM15),
    "body_mr_fast": Known(datasets=(598,), spacing=_cubes(6.0)),
    "lung_vessels": Known(datasets=(117,), spacing=(0.703125, 0.703125, 1.0), crop="the lungs"),
    "lung_vessels_LEGACY": Known(datasets=(258,), crop="the lungs"),
    "cerebral_bleed": Known(datasets=(150,), crop="the brain"),
    "hip_implant": Known(datasets=(260,), crop="the femurs and hips"),
    "vertebrae_mr": Known(datasets=(756,), spacing=_MM15),
    "pleural_pericard_effusion": Known(datasets=(315,), folds=None, crop="the lungs"),
    "liver_vessels": Known(datasets=(8,), crop="the liver"),
    "head_glands_cavities": Known(
        datasets=(775,), spacing=_FINE, configuration=_HIGH, crop="the skull"
    ),
    "headneck_bones_vessels": Known(
        datasets=(776,), spacing=_FINE, configuration=_HIGH, crop=_NECK
    ),
    "head_muscles": Known(datasets=(777,), spacing=_FINE, configuration=_HIGH, crop="the skull"),
    "headneck_muscles": Known(datasets=(778, 779), spacing=_FINE, configuration=_HIGH, crop=_NECK),
    "oculomotor_muscles": Known(
        datasets=(351,),
        spacing=(0.47251562774181366, 0.47251562774181366, 0.8500002026557922),
        crop="the skull",
    ),
    "lung_nodules": Known(datasets=(913,), spacing=_MM15, crop="the lungs"),
    "kidney_cysts": Known(
        datasets=(789,),
        spacing=_MM15,
        crop="the kidneys, liver, spleen and colon",
        dropped=(3, 4),
    ),
    "breasts": Known(datasets=(527,), spacing=_MM15),
    "ventricle_parts": Known(
        datasets=(552,), spacing=(0.4384765625, 0.4345703125, 1.0), crop="the brain"
    ),
    "liver_segments": Known(
        datasets=(570,), spacing=(0.8046879768371582, 0.8046879768371582, 1.5), crop="the liver"
    ),
    "liver_segments_mr": Known(
        datasets=(576,), spacing=(1.1250001788139343, 1.1875, 3.0), crop="the liver"
    ),
    "liver_lesions": Known(datasets=(591,), spacing=_FINE, configuration=_HIGH, crop="the liver"),
    "liver_lesions_mr": Known(
        datasets=(589,), spacing=(0.8603515625, 0.857421875, 1.0), crop="the liver"
    ),
    "craniofacial_structures": Known(datasets=(115,), spacing=_HALF, crop="the skull"),
    "abdominal_muscles": Known(
        datasets=(952,), spacing=_FINE, configuration=_HIGH, crop="the trunk"
    ),
    "teeth": Known(
        datasets=(113,), spacing=_HALF, configuration="3d_lowres_high", crop="the teeth"
    ),
    "trunk_cavities": Known(datasets=(343,), spacing=_MM15),
    "brain_aneurysm": Known(
        datasets=(615,), spacing=(0.390625, 0.390625, 0.5000016391277313), folds=None
    ),
    "vertebrae_body": Known(datasets=(305,), spacing=_MM15),
    "vertebrae_pp": Known(datasets=(803,), spacing=_MM15, note=_GROWN),
    "vertebrae_pp_refined": Known(
        datasets=(803,),
        spacing=_MM15,
        refusal="it needs vertebrae_body's result voxel by voxel; import vertebrae_pp instead",
    ),
    "heartchambers_highres": Known(datasets=(301,), crop="the heart", note=_CLEANED),
    "appendicular_bones": Known(datasets=(304,), spacing=_MM15, dropped=(12, 13, 14, 15)),
    "appendicular_bones_mr": Known(datasets=(855,), spacing=_MM15),
    "tissue_types": Known(datasets=(481,), spacing=_MM15),
    "tissue_types_mr": Known(datasets=(925,), spacing=_MM15),
    "tissue_4_types": Known(datasets=(485,), spacing=_MM15),
    "face": Known(datasets=(303,), spacing=_MM15),
    "face_mr": Known(datasets=(856,), spacing=_MM15, dropped=(2, 3)),
    "brain_structures": Known(
        datasets=(409,), spacing=(0.5, 0.5, 1.0), configuration=_HIGH, crop="the brain"
    ),
    "thigh_shoulder_muscles": Known(datasets=(857,), spacing=_MM15),
    "thigh_shoulder_muscles_mr": Known(datasets=(857,), spacing=_MM15),
    "coronary_arteries": Known(
        datasets=(509,), spacing=_cubes(0.7), configuration=_HIGH, crop="the heart"
    ),
    "coronary_arteries_LEGACY": Known(
        datasets=(507,), spacing=_cubes(0.7), configuration=_HIGH, crop="the heart"
    ),
    "aortic_sinuses": Known(
        datasets=(920,), spacing=_cubes(0.7), configuration=_HIGH, crop="the heart"
    ),
    "renal_arteries": Known(datasets=(710,), spacing=_MM15, dropped=(4,)),
    "aorta_annulus": Known(datasets=(713,), spacing=_cubes(0.8), configuration=_HIGH, folds=_ALL),
    "aortic_dissection": Known(
        datasets=(716,), spacing=_cubes(0.8), configuration=_HIGH, folds=_ALL
    ),
    "pulmonary_artery_landmarks": Known(
        datasets=(514,), spacing=(0.7802734375, 0.7802734375, 1.0), folds=_ALL
    ),
}
"""Name -> what is known; `_fast` and `_fastest` are the original's options of these names."""
