"""Simulated brain examinations: a drawn head, three weighted images of it, and its labels."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from medseg.mr import signal, tissues
from medseg.mr.anatomy import LOWER_MM, SHAPE, SPACING_MM, Kind, draw_head

Array = npt.NDArray[np.float32]
Affine = npt.NDArray[np.float64]
Shape = tuple[int, int, int]

CHANNELS = ("T1w", "T2w", "FLAIR")
"""Names of the images of a case, in order."""
LABELS = {"background": 0, "white": 1, "grey": 2, "fluid": 3, "lesion": 4}
"""Label name -> value in the segmentation."""

FIELD_OF_VIEW_MM = (158.0, 190.0, 132.0)
"""Imaged region along R, A and S."""
CENTRE_MM = (0.0, 0.0, 10.0)
"""Middle of the imaged region."""
SUBSAMPLE_MM = 1.3
"""Largest distance of the points a voxel is averaged over."""

KIND_TISSUES = {
    Kind.AIR: tissues.AIR,
    Kind.BONE: tissues.BONE,
    Kind.FLUID: tissues.FLUID,
    Kind.GREY: tissues.GREY,
    Kind.WHITE: tissues.WHITE,
    Kind.LESION: tissues.LESION,
    Kind.FAINT_LESION: tissues.mix(tissues.WHITE, tissues.LESION, 0.6, "faint lesion"),
    Kind.FAT: tissues.FAT,
    Kind.MUSCLE: tissues.mix(tissues.MUSCLE, tissues.GLIAL, 0.65, "soft tissue"),
    Kind.MARROW: tissues.SPONGY_BONE,
    Kind.MUCOSA: tissues.MUCOSA,
    Kind.GLAND: tissues.GLIAL,
    Kind.EYE: tissues.FLUID,
}
"""What each part of the head is made of."""
KIND_LABELS = {
    Kind.WHITE: "white",
    Kind.GREY: "grey",
    Kind.FLUID: "fluid",
    Kind.LESION: "lesion",
    Kind.FAINT_LESION: "lesion",
}
"""Label of each part of the head; the rest is background."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scan:
    """A way of scanning; both ends of a range are in mm or degrees."""

    spacing_mm: tuple[tuple[float, float], tuple[float, float], tuple[float, float]]
    """Range of the voxel size along the axes closest to R, A and S."""
    tilt_deg: tuple[float, float] = (0.0, 0.0)
    """Range of the angle between the grid and the world's axes."""


SCANS = {
    "isotropic": Scan(spacing_mm=((2.4, 2.6), (2.4, 2.6), (2.4, 2.6))),
    "axial": Scan(spacing_mm=((2.3, 2.5), (2.3, 2.5), (3.4, 4.2)), tilt_deg=(0.0, 3.0)),
    "oblique": Scan(spacing_mm=((2.5, 2.6), (2.4, 2.5), (2.6, 3.0)), tilt_deg=(8.0, 18.0)),
    "sagittal": Scan(spacing_mm=((2.8, 3.4), (2.4, 2.6), (2.4, 2.6)), tilt_deg=(0.0, 6.0)),
    "coronal": Scan(spacing_mm=((2.3, 2.5), (3.0, 3.8), (2.3, 2.5)), tilt_deg=(2.0, 9.0)),
}
"""Ways of scanning, by name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Examination:
    """The images of one head and their labels, on one grid."""

    images: Array
    """(C, I, J, K): one image per entry of `CHANNELS`, in arbitrary units, whole numbers."""
    segmentation: npt.NDArray[np.uint8]
    """(I, J, K): values of `LABELS`."""
    affine: Affine
    """(4, 4): voxel index to RAS mm."""


def simulate(rng: np.random.Generator, *, scan: str = "isotropic") -> Examination:
    """Simulate one examination of one head.

    Args:
        rng: Source of randomness; the same state gives the same examination.
        scan: Name of an entry of `SCANS`.

    Raises:
        ValueError: If the scan is unknown.
    """
    if scan not in SCANS:
        raise ValueError(f"scan is {scan!r}; expected one of: {', '.join(SCANS)}")
    head = draw_head(rng)
    shape, affine = _random_grid(rng, SCANS[scan])
    shares = _tissue_shares(head, shape, np.linalg.inv(_random_pose(rng)) @ affine)
    segmentation = _label(shares)
    reference = segmentation == LABELS["white"]
    images = np.stack(
        [
            _receive(np.tensordot(weights, shares, axes=1), reference, affine, rng)
            for weights in _channel_signals(rng)
        ]
    )
    return Examination(images=images, segmentation=segmentation, affine=affine)


def _random_grid(rng: np.random.Generator, scan: Scan) -> tuple[Shape, Affine]:
    """Return shape and affine of a grid in one of the 48 storage orders."""
    spacing = np.array([rng.uniform(*limits) for limits in scan.spacing_mm]).round(2)
    counts = np.round(FIELD_OF_VIEW_MM / spacing).astype(int)
    columns = _rotation(rng, float(rng.uniform(*scan.tilt_deg))) * spacing
    order, signs = rng.permutation(3), rng.choice([-1.0, 1.0], 3)
    affine = np.eye(4)
    affine[:3, :3] = columns[:, order] * signs
    shape = counts[order]
    affine[:3, 3] = CENTRE_MM - affine[:3, :3] @ ((shape - 1) / 2)
    return (int(shape[0]), int(shape[1]), int(shape[2])), affine


def _random_pose(rng: np.random.Generator) -> Affine:
    """Return where the head lies in the scanner: up to 6 degrees and some mm off."""
    pose = np.eye(4)
    pose[:3, :3] = _rotation(rng, float(rng.uniform(0, 6)))
    pose[:3, 3] = rng.uniform(-2, 2, 3)
    return pose


def _rotation(rng: np.random.Generator, angle_deg: float) -> npt.NDArray[np.float64]:
    """Return the rotation (3, 3) by an angle about a random axis."""
    x, y, z = (axis := rng.standard_normal(3)) / np.linalg.norm(axis)
    cross = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    angle = np.deg2rad(angle_deg)
    turned = np.eye(3) + np.sin(angle) * cross + (1 - np.cos(angle)) * (cross @ cross)
    return np.asarray(turned, np.float64)


def _tissue_shares(head: npt.NDArray[np.uint8], shape: Shape, to_head: Affine) -> Array:
    """Return the share of each `Kind` in each voxel, (kinds, I, J, K): the partial volume.

    Args:
        head: `Kind` on the lattice of `anatomy.py`.
        shape: Voxels of the grid.
        to_head: (4, 4), voxel index to mm in the head.
    """
    matrix = to_head[:3, :3] / SPACING_MM
    start = (to_head[:3, 3] - LOWER_MM) / SPACING_MM
    steps = np.ceil(np.linalg.norm(to_head[:3, :3], axis=0) / SUBSAMPLE_MM).astype(int)
    voxels = np.indices(shape, np.float32).reshape(3, -1)
    base = matrix.astype(np.float32) @ voxels + start[:, None].astype(np.float32)
    shares = np.zeros((len(Kind), voxels.shape[1]), np.float32)
    column = np.arange(voxels.shape[1])
    for offset in np.ndindex(*(int(n) for n in steps)):
        shift = matrix @ ((np.array(offset) + 0.5) / steps - 0.5)
        places = [
            np.clip(np.rint(base[d] + np.float32(shift[d])), 0, SHAPE[d] - 1).astype(np.int32)
            for d in range(3)
        ]
        shares[head[tuple(places)], column] += 1
    shares /= np.float32(steps.prod())
    return shares.reshape(len(Kind), *shape)


def _label(shares: Array) -> npt.NDArray[np.uint8]:
    """Return the label with the largest share of each voxel."""
    sums = np.zeros((len(LABELS), *shares.shape[1:]), np.float32)
    for kind in Kind:
        sums[LABELS[KIND_LABELS.get(kind, "background")]] += shares[kind]
    return np.asarray(np.argmax(sums, axis=0), np.uint8)


def _channel_signals(rng: np.random.Generator) -> Array:
    """Return the signal of each `Kind` in T1w, T2w and FLAIR, (C, kinds), of one protocol."""
    made_of = [KIND_TISSUES[kind] for kind in Kind]
    pd = np.array([tissue.pd for tissue in made_of])
    t1 = np.array([tissue.t1_ms for tissue in made_of])
    t2 = np.array([tissue.t2_ms for tissue in made_of])
    t2star = np.array([tissue.t2star_ms for tissue in made_of])
    t1w = signal.spoiled_gradient_echo(
        pd,
        t1,
        t2star,
        tr_ms=rng.uniform(17, 23),
        te_ms=rng.uniform(4, 8),
        flip_angle=np.deg2rad(rng.uniform(26, 32)),
    )
    t2w = signal.spin_echo(pd, t1, t2, tr_ms=rng.uniform(4000, 5500), te_ms=rng.uniform(85, 105))
    tr_ms, te_ms = rng.uniform(8500, 10000), rng.uniform(95, 125)
    null = signal.null_inversion_time(tissues.FLUID.t1_ms, tr_ms=tr_ms, te_ms=te_ms)
    ti_ms = float(null) * rng.uniform(0.97, 1.03)
    flair = signal.inversion_recovery(pd, t1, t2, tr_ms=tr_ms, te_ms=te_ms, ti_ms=ti_ms)
    return np.stack([t1w, t2w, flair]).astype(np.float32)


def _receive(
    clean: Array, reference: npt.NDArray[np.bool_], affine: Affine, rng: np.random.Generator
) -> Array:
    """Return what the scanner stores: coil sensitivity, Rician noise, arbitrary scale.

    Args:
        clean: (I, J, K), signal of the equations.
        reference: (I, J, K), where the mean signal sets the scale and the noise level.
        affine: (4, 4), voxel index to RAS mm.
        rng: Source of randomness.
    """
    image = clean * _coil_sensitivity(clean.shape, affine, rng)
    level = float(image[reference].mean())
    noisy = signal.rician(image, float(rng.uniform(0.05, 0.08)) * level, rng)
    scale = float(np.exp(rng.uniform(np.log(80), np.log(1500)))) / level
    return np.asarray(np.rint(noisy * scale), np.float32)


def _coil_sensitivity(shape: tuple[int, ...], affine: Affine, rng: np.random.Generator) -> Array:
    """Return the bias field of an array of coil elements around the head, (I, J, K), mean 1.

    The range over the field of view is 2.3 to 3.3 times from the weakest to the strongest place.
    """
    small = tuple(max(4, n // 5) for n in shape)
    axes = [np.linspace(0, n - 1, m) for n, m in zip(shape, small, strict=True)]
    voxels = np.stack(np.meshgrid(*axes, indexing="ij")).reshape(3, -1)
    world = affine[:3, :3] @ voxels + affine[:3, 3:]
    total = np.zeros(world.shape[1])
    for _ in range(6):
        direction = rng.standard_normal(3)
        element = 125 * direction / np.linalg.norm(direction)
        squared = ((world - element[:, None]) ** 2).sum(axis=0)
        total += rng.uniform(0.3, 1.0) / (1 + squared / 70**2) ** 1.5
    exponent = np.log(rng.uniform(2.3, 3.3)) / np.log(total.max() / total.min())
    field = ((total / total.mean()) ** exponent).reshape(small).astype(np.float32)
    zoom = [n / m for n, m in zip(shape, small, strict=True)]
    return np.asarray(ndimage.zoom(field, zoom, order=1, mode="nearest"), np.float32)
