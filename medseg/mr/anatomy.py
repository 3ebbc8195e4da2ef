"""A three-dimensional head with a folded brain, different for every random generator.

All points are in millimetres on RAS axes (x to the right, y forward, z up) with the origin in the
middle of the cerebrum. The head is drawn by formulas on a fine lattice; `phantom.py` images it.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from medseg.mr.fields import smooth_field, wave_field

Array = npt.NDArray[np.float32]
Mask = npt.NDArray[np.bool_]
Kinds = npt.NDArray[np.uint8]
Point = tuple[float, float, float]
Window = tuple[slice, slice, slice]

SPACING_MM = 1.5
"""Voxel size of the lattice the head is drawn on."""
LOWER_MM: Point = (-84.0, -102.0, -95.0)
"""World position of the lattice's first voxel."""
SHAPE = (113, 137, 117)
"""Voxels of the lattice."""
LESION_HALF = 8
"""Half the window, in voxels of the lattice, a lesion is drawn in."""
FOLD_MM = 34.0
"""Wavelength of the folds: two sulci lie about half of it apart."""
FOLDING_SEED = 20240229
"""Seed of the folding pattern all heads have in common."""


class Kind(IntEnum):
    """What fills a voxel of the lattice."""

    AIR = 0
    BONE = 1
    FLUID = 2
    GREY = 3
    WHITE = 4
    LESION = 5
    FAINT_LESION = 6
    FAT = 7
    MUSCLE = 8
    MARROW = 9
    MUCOSA = 10
    GLAND = 11
    EYE = 12


def _window(centre: Point, reach: Point, inside: Window | None = None) -> Window:
    """Return the part of the lattice, or of a window of it, within a reach of a point in mm."""
    bounds = []
    for d in range(3):
        lower, upper = (inside[d].start, inside[d].stop) if inside else (0, SHAPE[d])
        first = (centre[d] - reach[d] - LOWER_MM[d]) / SPACING_MM
        last = (centre[d] + reach[d] - LOWER_MM[d]) / SPACING_MM
        bounds.append(slice(max(int(first), lower) - lower, min(int(last) + 1, upper) - lower))
    return bounds[0], bounds[1], bounds[2]


def _around(centre: Point, radii: Point) -> Window:
    """Return the part of the lattice that holds an ellipsoid, wherever it is deformed to."""
    return _window(centre, (radii[0] + 14, radii[1] + 14, radii[2] + 14))


BRAIN = _window((0, 0, -20), (76, 92, 92))
"""Part of the lattice that holds the cranial cavity and the skull."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Points:
    """Where every voxel of a window of the lattice lies in the undeformed head, in mm."""

    x: Array
    """Rightward coordinate."""
    y: Array
    """Forward coordinate."""
    z: Array
    """Upward coordinate."""

    def cut(self, window: Window) -> Points:
        """Return the points of a part of the window."""
        return Points(x=self.x[window], y=self.y[window], z=self.z[window])


@dataclass(frozen=True, slots=True, kw_only=True)
class Brain:
    """The parts of a brain without its grooves, on the window `BRAIN` of the lattice."""

    cerebrum: Mask
    """Both hemispheres in one."""
    cerebellum: Mask
    """Disjoint from the cerebrum."""
    stem: Mask
    """Brain stem and cord; overlaps the others."""
    depth: Array
    """Depth in mm under the surface of the cerebrum."""


OUTLINE: tuple[tuple[Point, Point], ...] = (
    ((0, 42, -54), (52, 50, 58)),
    ((0, -18, -90), (56, 56, 80)),
    ((0, -38, -40), (68, 53, 46)),
)
"""Ellipsoids (centre, radii) of face, neck and nape, which the vault is joined with."""
FACE: tuple[tuple[Point, Point, Kind], ...] = (
    ((69, 6, -16), (9, 36, 32), Kind.MUSCLE),
    ((30, 60, -40), (17, 24, 15), Kind.FAT),
    ((31, 72, -39), (12, 12, 12), Kind.EYE),
    ((28, 50, -39), (3.5, 18, 3.5), Kind.MUSCLE),
    ((27, 62, -68), (15, 15, 12), Kind.MUCOSA),
    ((27, 62, -67), (13, 13, 10), Kind.AIR),
    ((0, 62, -58), (12, 28, 20), Kind.MUCOSA),
    ((6, 62, -60), (4.5, 27, 18), Kind.AIR),
    ((0, 30, -40), (12, 12, 9), Kind.AIR),
    ((56, -12, -66), (13, 17, 22), Kind.GLAND),
    ((54, -24, -42), (8, 12, 10), Kind.BONE),
    ((34, 30, -74), (9, 18, 16), Kind.FAT),
    ((0, 8, -76), (12, 9, 34), Kind.AIR),
)
"""Ellipsoids (centre, radii, kind) outside the skull; those off the midline come on both sides."""


def draw_head(rng: np.random.Generator) -> Kinds:
    """Draw a head with a brain and multiple-sclerosis lesions.

    Args:
        rng: Source of randomness; the same state gives the same head.

    Returns:
        `Kind` of every voxel, shape `SHAPE`, voxel size `SPACING_MM`, first voxel at `LOWER_MM`.
    """
    points = _deformed_points(rng)
    head = _scalp_and_face(points, rng)
    _draw_brain(head[BRAIN], points.cut(BRAIN), rng)
    return head


def _draw_brain(head: Kinds, points: Points, rng: np.random.Generator) -> None:
    """Draw everything inside the skull, and the skull, into the window `BRAIN` of the head."""
    brain = _brain(points)
    solid = brain.cerebrum | brain.cerebellum | brain.stem
    cavity = solid | (ndimage.uniform_filter(solid.astype(np.float32), 9) > 0.1)
    _add_skull(head, cavity, points)
    head[cavity] = Kind.FLUID
    tissue = solid & ~_grooves(points, brain, rng)
    depth = ndimage.distance_transform_edt(tissue | brain.stem, sampling=SPACING_MM)
    ribbon = np.where(brain.cerebellum, np.float32(3.4), np.float32(4.4))
    head[tissue] = np.where(depth < ribbon, Kind.GREY, Kind.WHITE)[tissue]
    head[brain.stem] = Kind.WHITE
    deep = _window((0, -10, 2), (62, 78, 44), inside=BRAIN)
    ventricle = _add_deep_structures(head[deep], points.cut(deep), brain.cerebrum[deep], rng)
    _add_lesions(head[deep], ventricle, points.cut(deep), rng)


def _deformed_points(rng: np.random.Generator) -> Points:
    """Return lattice positions after a random zoom (per axis) and a smooth random deformation."""
    zoom = 1 + rng.normal(0, 0.03, 3).clip(-0.06, 0.06)
    axes = [LOWER_MM[d] + SPACING_MM * np.arange(SHAPE[d], dtype=np.float32) for d in range(3)]
    grids = np.meshgrid(*axes, indexing="ij")
    x, y, z = (
        (grids[d] / zoom[d] + 2.2 * smooth_field(rng, SHAPE, step=24)).astype(np.float32)
        for d in range(3)
    )
    return Points(x=x, y=y, z=z)


def _ellipsoid(points: Points, centre: Point, radii: Point) -> Array:
    """Return about the signed distance in mm to an ellipsoid, negative inside."""
    u = (points.x - centre[0]) / radii[0]
    v = (points.y - centre[1]) / radii[1]
    w = (points.z - centre[2]) / radii[2]
    near = np.sqrt(u * u + v * v + w * w)
    u, v, w = u / radii[0], v / radii[1], w / radii[2]
    return np.asarray(near * (near - 1) / np.sqrt(u * u + v * v + w * w + 1e-12), np.float32)


def _pair(points: Points, centre: Point, radii: Point) -> Array:
    """Return `_ellipsoid` for one ellipsoid on each side; the centre is the right one's."""
    mirrored = Points(x=np.abs(points.x), y=points.y, z=points.z)
    return _ellipsoid(mirrored, centre, radii)


def _tube(points: Points, path: tuple[Point, ...], radii: tuple[float, ...]) -> Array:
    """Return the signed distance in mm to a tube along a path, mirrored to both sides."""
    position = np.stack([np.abs(points.x), points.y, points.z])
    best = np.full(points.x.shape, np.inf, np.float32)
    for start, end, r0, r1 in zip(path[:-1], path[1:], radii[:-1], radii[1:], strict=True):
        along = np.subtract(end, start).astype(np.float32)
        offset = position - np.reshape(start, (3, 1, 1, 1)).astype(np.float32)
        share = np.clip(np.tensordot(along, offset, axes=1) / float(along @ along), 0, 1)
        rest = offset - along[:, None, None, None] * share
        distance = np.sqrt((rest * rest).sum(axis=0)) - (r0 + (r1 - r0) * share)
        np.minimum(best, distance, out=best)
    return best


def _step(values: Array, edge: float, width: float) -> Array:
    """Return a smooth step from 0 to 1 about an edge."""
    return np.asarray(1 / (1 + np.exp(-(values - edge) * (4 / width))), np.float32)


def _floor(points: Points) -> Array:
    """Return the height of the lower surface of the cerebrum in mm."""
    temporal = _step(np.abs(points.x), 20, 8) * _step(points.y, -36, 14) * _step(-points.y, -30, 8)
    frontal = _step(points.y, 28, 10)
    occipital = _step(-points.y, 32, 14)
    medial = -13 - 4 * frontal + 3 * occipital
    return np.asarray(medial + (-36 - medial) * temporal, np.float32)


def _brain(points: Points) -> Brain:
    """Return the brain's parts before any groove is cut; `points` is the window `BRAIN`."""
    outer, floor = _ellipsoid(points, (0, 0, 0), (59, 74, 54)), _floor(points)
    waist = 4 * _step(-np.abs(points.y - 20), -14, 10) * _step(-points.z, 8, 8)
    cerebrum = (outer + waist < 0) & (points.z > floor)
    cerebellum, stem = np.zeros_like(cerebrum), np.zeros_like(cerebrum)
    part = _window((0, -44, -36), (60, 36, 30), inside=BRAIN)
    cerebellum[part] = _pair(points.cut(part), (20, -44, -36), (30, 26, 18)) < 0
    cerebellum &= (points.z < floor - 3) & ~cerebrum
    part = _window((0, -20, -60), (22, 40, 66), inside=BRAIN)
    path = ((0, -13, -8), (0, -19, -34), (0, -26, -56), (0, -32, -110))
    stem[part] = _tube(points.cut(part), path, (11, 12.5, 8, 5.5)) < 0
    return Brain(
        cerebrum=cerebrum,
        cerebellum=cerebellum,
        stem=stem,
        depth=np.minimum(-outer, points.z - floor),
    )


def _scalp_and_face(points: Points, rng: np.random.Generator) -> Kinds:
    """Return skin, fat, muscle, orbits, sinuses and glands; the skull is added later."""
    surface = _ellipsoid(points, (0, 0, -2), (75.5, 91, 72))
    for centre, radii in OUTLINE:
        part = _around(centre, radii)
        distance = _ellipsoid(points.cut(part), centre, radii)
        surface[part] = np.minimum(surface[part], distance)
    head = np.full(SHAPE, Kind.AIR, np.uint8)
    head[surface < 0] = Kind.MUSCLE
    fascia = np.abs(smooth_field(rng, SHAPE, step=6)) < 0.16
    head[(surface < -2.5) & ((surface > -6.5) | fascia)] = Kind.FAT
    inside = surface < -4
    for centre, radii, kind in FACE:
        for side in (-1, 1) if centre[0] else (1,):
            middle = (side * centre[0], centre[1], centre[2])
            part = _around(middle, radii)
            distance = _ellipsoid(points.cut(part), middle, radii)
            head[part][(distance < 0) & inside[part]] = kind
    return head


def _add_skull(head: Kinds, cavity: Mask, points: Points) -> None:
    """Draw two tables of bone with marrow between them around the cranial cavity."""
    distance = ndimage.distance_transform_edt(~cavity, sampling=SPACING_MM)
    thickness = 6.5 + 3 * _step(-points.z, 32, 14)
    skull = (distance < thickness) & (head != Kind.AIR)
    middle = (distance > 2.2) & (distance < thickness - 2.2)
    head[skull] = Kind.BONE
    head[skull & middle] = Kind.MARROW


def _grooves(points: Points, brain: Brain, rng: np.random.Generator) -> Mask:
    """Return fluid between the folds: sulci, the great fissures and the cerebellum's fissures."""
    x, y, z = points.x, points.y, points.z
    bridge = (((y + 2) / 36) ** 2 + ((z - 2) / 20) ** 2 < 1) | ((z < 2) & (np.abs(y + 4) < 26))
    depth = np.where(bridge, brain.depth, np.minimum(brain.depth, np.abs(x)))
    reach = 13 + 3 * smooth_field(rng, x.shape, step=14)
    width = 1.7 - 0.8 * np.clip(depth / 14, 0, 1)
    outside = (x / 59) ** 2 + (y / 74) ** 2 + (z / 54) ** 2 > 0.3
    sulci = (np.abs(_folding(points, rng)) < width) & (depth < reach) & outside
    fissure = (np.abs(x) < 1.6) & ~bridge
    rise = z - (-3 - 0.36 * y)
    sylvian = (np.abs(rise) < 1.9) & (np.abs(x) > 31) & (y > -40) & (y < 34)
    leaf = np.abs(((z + 0.5 * y) / 8.5) % 1 - 0.5) < 0.1
    leaf &= _pair(points, (20, -44, -36), (23, 19, 11)) > 0
    return (brain.cerebrum & (sulci | fissure | sylvian)) | (brain.cerebellum & leaf)


def _folding(points: Points, rng: np.random.Generator) -> Array:
    """Return about the signed distance in mm to the nearest sheet that opens a sulcus.

    The sheets run from the surface towards the middle: each point is first moved along its ray
    to a shell close to the surface. Most of the pattern is common to all heads.
    """
    step_mm, size = 3.0, (56, 66, 54)
    common = wave_field(np.random.default_rng(FOLDING_SEED), size, wavelength=FOLD_MM / step_mm)
    waves = 0.85 * common + 0.5 * wave_field(rng, size, wavelength=FOLD_MM / step_mm)
    slope = np.sqrt(sum(np.square(g) for g in np.gradient(waves, step_mm)))
    sheet = waves / (slope + 0.1 * float(slope.mean()))
    u, v, w = points.x / 59, points.y / 74, points.z / 54
    scale = 0.3 + 0.7 * 0.85 / np.maximum(np.sqrt(u * u + v * v + w * w), 0.2)
    where = np.stack([points.x * scale, points.y * scale, points.z * scale]) / step_mm
    where += (np.reshape(size, (3, 1, 1, 1)) - 1) / 2
    return np.asarray(ndimage.map_coordinates(sheet, where, order=1, mode="nearest"), np.float32)


def _add_deep_structures(
    head: Kinds, points: Points, cerebrum: Mask, rng: np.random.Generator
) -> Array:
    """Draw basal ganglia, thalamus and ventricles; return the distance to a lateral ventricle."""
    wide = float(rng.uniform(0, 2.5))
    for centre, radii in (
        ((13, -14, 4), (9, 14, 9)),
        ((14, 18, 6), (6.5, 11, 9)),
        ((27, 4, 0), (7, 17, 10)),
    ):
        head[(_pair(points, centre, radii) < 0) & cerebrum] = Kind.GREY
    path = ((7, 32, 4), (9, 16, 13), (11, -14, 17), (22, -34, 9))
    lateral = _tube(points, path, (3.5 + wide, 4.5 + wide, 4 + wide, 6 + wide))
    horns = np.minimum(
        _tube(points, ((22, -34, 9), (20, -54, 5)), (5 + wide, 2.5)),
        _tube(points, ((22, -34, 9), (32, -22, -12), (29, -4, -19)), (5 + wide, 3, 3)),
    )
    lateral = np.minimum(lateral, horns)
    third = _ellipsoid(points, (0, -4, 0), (2.5 + wide / 2, 15, 11))
    fourth = _ellipsoid(points, (0, -33, -34), (6, 5, 9))
    septum = np.abs(points.x) < 1
    head[(lateral < 0) & ~septum & cerebrum] = Kind.FLUID
    head[(third < 0) | (fourth < 0)] = Kind.FLUID
    return lateral


def _add_lesions(head: Kinds, ventricle: Array, points: Points, rng: np.random.Generator) -> None:
    """Draw 7 to 11 lesions in white matter, most of them beside the lateral ventricles."""
    white = head == Kind.WHITE
    high = np.zeros_like(white)
    high[LESION_HALF:-LESION_HALF, LESION_HALF:-LESION_HALF, LESION_HALF:-LESION_HALF] = True
    high &= (points.z > 0) & (np.abs(points.x) > 7)
    beside = np.argwhere(white & high & (ventricle > 1) & (ventricle < 9))
    deep = np.argwhere(white & high & (ventricle > 10) & (ventricle < 28))
    for number in range(int(rng.integers(7, 12))):
        sites = deep if number % 4 == 3 else beside
        kind = Kind.FAINT_LESION if number % 3 == 2 else Kind.LESION
        for _ in range(40):
            place, lesion = _lesion(rng, sites[rng.integers(len(sites))])
            room = white[place]
            if (lesion & room).sum() > 0.6 * lesion.sum():
                head[place][lesion & room] = kind
                break


def _lesion(
    rng: np.random.Generator, centre: npt.NDArray[np.int64]
) -> tuple[tuple[slice, ...], Mask]:
    """Return a window of the lattice and an ellipsoid of 10 to 22 mm in it, at a random angle."""
    half = LESION_HALF
    axes, _ = np.linalg.qr(rng.standard_normal((3, 3)))
    radii = float(rng.uniform(6.0, 9.0)) * np.array([1.25, 1.0, 0.8])
    offset = np.indices((2 * half + 1,) * 3).reshape(3, -1) - half
    radius = np.linalg.norm((axes @ offset) * SPACING_MM / radii[:, None], axis=0)
    place = tuple(slice(int(c) - half, int(c) + half + 1) for c in centre)
    return place, radius.reshape((2 * half + 1,) * 3) < 1
