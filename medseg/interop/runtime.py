"""Run an exported model on one case: numpy, scipy, nibabel, onnxruntime, and model.json beside it.

    python predict.py IMAGE... OUTPUT.nii.gz     one NIfTI file for each channel, in their order

Read it from top to bottom: `predict` names the steps, and each step takes its numbers from the part
of model.json it is about. Images are (C, I, J, K) as stored; the network sees (C, n0, n1, n2): axes
in network order, cropped, resampled. Its logits are (L, n0, n1, n2).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import sys
from collections.abc import Iterable, Sequence
from functools import partial
from itertools import combinations, permutations, product
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import onnxruntime
from numpy.typing import NDArray
from scipy import ndimage, special

Array = NDArray[Any]
Rule = dict[str, Any]
GEOMETRY = (
    *("pixdim", "xyzt_units", "qform_code", "sform_code", "quatern_b", "quatern_c", "quatern_d"),
    *("qoffset_x", "qoffset_y", "qoffset_z", "srow_x", "srow_y", "srow_z"),
)
"""Fields of a NIfTI header that place an image; the output takes them as they are."""


def main() -> None:
    """Predict one case, from files to a file."""
    parser = argparse.ArgumentParser(description="Run the model beside this file on one case.")
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="NIfTI, one for each channel")
    parser.add_argument("output", metavar="OUTPUT.nii.gz", help="where the label map goes")
    parser.add_argument("--no-mirrors", action="store_true", help="faster, a little less accurate")
    parser.add_argument("--probabilities", metavar="FILE.npy", help="also write these (L, I, J, K)")
    options = parser.parse_args()
    if not options.output.endswith((".nii", ".nii.gz")):
        parser.error(f"the output is {options.output}; expected a name in .nii or .nii.gz")
    if Path(options.output).resolve() in [Path(path).resolve() for path in options.images]:
        parser.error(f"the output {options.output} is one of the images; name another file")
    if not Path(options.output).resolve().parent.is_dir():
        parser.error(f"the folder of {options.output} does not exist; make it first")
    folder = Path(__file__).resolve().parent
    model = json.loads((folder / "model.json").read_text(encoding="utf-8"))
    channels, affine, header = read_images(options.images, model["channels"])
    networks = [load_network(folder / each["file"], each["sha256"]) for each in model["networks"]]
    if options.no_mirrors:
        model["mirrors"]["axes"] = []
    wanted = options.probabilities is not None
    segmentation, found = predict(channels, affine, model, networks, probabilities=wanted)
    write_labels(options.output, segmentation, header)
    if model["postprocessing"] is not None:
        sys.stderr.write("Not done: the steps in model.json under 'postprocessing'.\n")
    if found is not None:
        np.save(options.probabilities, found)


def read_images(paths: Sequence[str], names: Sequence[str]) -> tuple[Array, Array, Any]:
    """Return (C, I, J, K) float32 intensities, their (4, 4) affine to RAS+ mm, the first header."""
    if len(paths) != len(names):
        raise SystemExit(f"got {len(paths)} images; expected one for each of: {', '.join(names)}")
    arrays, affines, headers = [], [], []
    for path in paths:
        try:
            image: Any = nib.load(path)
            array = np.asanyarray(image.dataobj)  # scaled in double precision
        except (OSError, EOFError, ValueError, nib.filebasedimages.ImageFileError) as error:
            raise SystemExit(f"{path}: cannot be read ({error})") from None
        if not isinstance(image, nib.Nifti1Pair):
            raise SystemExit(f"{path}: not a NIfTI file")
        shape = (*array.shape, 1, 1)[:3]
        if array.size != math.prod(shape) or array.dtype.kind not in "iuf":
            raise SystemExit(f"{path}: {array.dtype} {array.shape}; expected one number per voxel")
        if not np.isfinite(array).all():
            raise SystemExit(f"{path}: holds values that are not finite")
        unit = {1: 1000.0, 3: 0.001}.get(int(image.header["xyzt_units"]) & 7, 1.0)  # to mm
        arrays.append(array.reshape(shape).astype(np.float32))
        affines.append(np.diag([unit, unit, unit, 1.0]) @ image.affine)
        headers.append(image.header)
        corners = np.array([*product(*((0, n - 1) for n in shape), (1,))])
        apart = np.linalg.solve(affines[0], affines[-1] @ corners.T) - corners.T
        if shape != arrays[0].shape or np.linalg.norm(apart[:3], axis=0).max() > 0.05:
            raise SystemExit(f"{path}: does not lie on the grid of {paths[0]}; resample it to that")
    return np.stack(arrays), affines[0], headers[0]


def load_network(path: Path, sha256: str) -> Any:
    """Return a session that runs a network; providers other than the CPU's may be faster."""
    content = path.read_bytes()
    if hashlib.sha256(content).hexdigest() != sha256:
        raise SystemExit(f"{path}: damaged or exchanged; copy the export again")
    return onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])


def predict(
    channels: Array, affine: Array, model: Rule, networks: Sequence[Any], *, probabilities: bool
) -> tuple[Array, Array | None]:
    """Return the label map (I, J, K) and, if asked for, probabilities (L, I, J, K)."""
    # To the network's frame: order of the axes, box, intensities, voxel size.
    axes, flips = orientation(affine, model["orientation"])
    image = turned(channels, axes, flips)
    nonzero = (image != 0).any(axis=0)
    box = ndimage.find_objects(nonzero.astype(np.uint8))[0] if nonzero.any() else (slice(None),) * 3
    image, inside = image[(slice(None), *box)], ndimage.binary_fill_holes(nonzero[box])
    spacing = np.linalg.norm(affine[:3, :3], axis=0)[axes].tolist()
    asked = [*spacing[: 3 - len(model["spacing"])], *model["spacing"]]
    lengths = zip(image.shape[1:], spacing, asked, strict=True)
    shape = [max(1, round(now / then * length)) for length, now, then in lengths]
    rules = zip(image, model["normalization"], strict=True)
    normal = [normalised(channel, inside, rule) for channel, rule in rules]
    separate = separate_axis(spacing, asked, model["resampling"])
    there = partial(resized, shape=shape, order=model["resampling"]["image_order"])
    logits = tiled(np.stack([there(each, separate=separate) for each in normal]), model, networks)

    # And back: channel by channel to the voxels of the box, into the image by a view of it.
    separate = separate_axis(asked, spacing, model["resampling"])
    order, labels = model["resampling"]["logits_order"], model["labels"]
    back = partial(resized, shape=image.shape[1:], order=order, separate=separate)
    segmentation = np.full(channels.shape[1:], labels["background"], dtype=labels["dtype"])
    paint(turned(segmentation, axes, flips)[box], map(back, logits), labels)
    if not probabilities:
        return segmentation, None
    found = np.zeros((len(logits), *segmentation.shape), dtype=np.float32)
    found[0] = labels["activation"] == "softmax"  # outside the box all is background
    activate = {"softmax": partial(special.softmax, axis=0), "sigmoid": special.expit}
    view = turned(found, axes, flips)[(slice(None), *box)]
    view[...] = activate[labels["activation"]](np.stack([*map(back, logits)]))
    return segmentation, found


def orientation(affine: Array, rule: Rule) -> tuple[list[int], list[bool]]:
    """Return which image axis each network axis is, and whether it runs against it."""
    cosines = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
    found = []
    for axes, flips in product(permutations(range(3)), product((False, True), repeat=3)):
        matrix = cosines[:, axes] * np.where(flips, -1.0, 1.0)
        found.append((axes, flips, (np.trace(matrix), *matrix.ravel())))
    for place in range(10):  # the trace decides; where it does not, the cosines one by one
        limit = max(scores[place] for _, _, scores in found) - rule["tie_tolerance"]
        found = [candidate for candidate in found if candidate[2][place] >= limit]
    axes, flips, _ = max(found, key=lambda candidate: candidate[2][1:])
    return [axes[d] for d in rule["network_axes"]], [flips[d] for d in rule["network_axes"]]


def turned(array: Array, axes: Sequence[int], flips: Sequence[bool]) -> Array:
    """Return a view of (..., I, J, K) with its axes in network order and direction."""
    lead = array.ndim - 3
    view = array.transpose((*range(lead), *(lead + axis for axis in axes)))
    steps: Any = (..., *(slice(None, None, -1 if flip else 1) for flip in flips))
    directed: Array = view[steps]
    return directed


def normalised(channel: Array, inside: Array, rule: Rule) -> Array:
    """Return the intensities (n0, n1, n2) of one channel as the network knows them."""
    least, clip = rule["least_divisor"], rule["clip"]
    if rule["scheme"] == "zscore":
        where = inside if rule["use_mask"] else np.ones_like(inside)
        result, values = channel.copy(), channel[where].astype(np.float64)
        if values.size:
            result[where] -= np.float32(values.mean())
            result[where] /= np.float32(max(values.std(), least))
        return result
    if rule["scheme"] == "rescale_0_1":
        result = channel.copy()
        result -= channel.min()
        result /= np.float32(max(result.max(), least))
        return result
    result = channel.copy() if clip is None else np.clip(channel, clip[0], clip[1])
    result -= np.float32(rule["subtract"])
    result /= np.float32(rule["divide"])
    return result


def separate_axis(now: list[float], asked: list[float], rule: Rule) -> int | None:
    """Return the axis that is resampled on its own because its voxels are so much longer."""
    for spacing in (now, asked):
        if max(spacing) / min(spacing) > rule["separate_above"]:
            longest = [axis for axis in range(3) if max(spacing) / spacing[axis] == 1]
            return longest[0] if len(longest) == 1 else None
    return None


def resized(array: Array, shape: Sequence[int], order: int, separate: int | None) -> Array:
    """Return (n0, n1, n2) of another shape: spline, clipped; then the separate axis, nearest."""
    if array.shape == tuple(shape):
        return array
    across = tuple(axis for axis in range(3) if axis != separate)
    lowest, highest = array.min(across, keepdims=True), array.max(across, keepdims=True)
    for axis in across:
        array = resized_axis(array, axis, shape[axis], order)
    array = np.clip(array, lowest, highest)
    return array if separate is None else resized_axis(array, separate, shape[separate], 0)


def resized_axis(array: Array, axis: int, length: int, order: int) -> Array:
    """Multiply one axis with the matrix that resampling makes of the identity."""
    if array.shape[axis] == length:
        return array
    zoom = (length / array.shape[axis], 1)
    matrix = ndimage.zoom(
        np.eye(array.shape[axis]), zoom, order=order, mode="nearest", grid_mode=True
    )
    return np.moveaxis(np.tensordot(matrix.astype(np.float32), array, (1, axis)), 0, axis)


def tiled(image: Array, model: Rule, networks: Sequence[Any]) -> Array:
    """Return logits (L, n0, n1, n2): the weighted mean over the tiles that hold a voxel."""
    tiles = model["tiles"]
    size = [1] * (3 - len(tiles["size"])) + tiles["size"]  # two axes: a window of one slice
    lacks = [max(tile - n, 0) for tile, n in zip(size, image.shape[1:], strict=True)]
    padded = np.pad(image, [(0, 0), *((lack // 2, lack - lack // 2) for lack in lacks)])
    weight = tile_weight(tiles).reshape(size)
    total = np.zeros((model["tensors"]["num_logits"], *padded.shape[1:]), dtype=np.float32)
    weights = np.zeros(padded.shape[1:], dtype=np.float32)
    each = [starts(*axis, tiles["step"]) for axis in zip(padded.shape[1:], size, strict=True)]
    for corner in product(*each):
        place = tuple(slice(low, low + n) for low, n in zip(corner, size, strict=True))
        tile = padded[(slice(None), *place)].reshape(1, len(image), *tiles["size"])
        logits = mirrored(tile, model, networks)
        total[(slice(None), *place)] += logits.reshape(-1, *size) * weight
        weights[place] += weight
    inner = zip(lacks, image.shape[1:], strict=True)
    return (total / weights)[(slice(None), *(slice(x // 2, x // 2 + n) for x, n in inner))]


def starts(length: int, tile: int, step: float) -> list[int]:
    """Return where tiles begin along one axis: evenly spaced, the last one ends with the axis."""
    gaps = math.ceil((length - tile) / (tile * step))
    return [round(number * ((length - tile) / max(gaps, 1))) for number in range(gaps + 1)]


def tile_weight(rule: Rule) -> Array:
    """Return the weight of each voxel of a tile: a Gaussian, 1 at the centre, nowhere 0."""
    impulse = np.zeros(rule["size"])
    impulse[tuple(n // 2 for n in rule["size"])] = 1
    sigma, truncate = [n * rule["weight_sigma"] for n in rule["size"]], rule["weight_truncate"]
    smooth = ndimage.gaussian_filter(impulse, sigma, mode="constant", truncate=truncate)
    weight: Array = (smooth / smooth.max()).astype(np.float32)
    weight[weight == 0] = weight[weight > 0].min()
    return weight


def mirrored(tile: Array, model: Rule, networks: Sequence[Any]) -> Array:
    """Return the mean logits (1, L, *tile) over all mirrorings and networks."""
    rule, tensors, outputs = model["mirrors"], model["tensors"], []
    order = list(range(tensors["num_logits"]))
    for left, right in rule["swap_channels"]:
        order[left], order[right] = right, left
    for number in range(len(rule["axes"]) + 1):
        for flipped in combinations(rule["axes"], number):
            axes = tuple(axis + 2 for axis in flipped)
            images = {tensors["input"]: np.ascontiguousarray(np.flip(tile, axes))}
            are_swapped = len(set(flipped) & set(rule["swap_axes"])) % 2 == 1
            for network in networks:
                logits = np.flip(network.run([tensors["output"]], images)[0], axes)
                outputs.append(logits[:, order] if are_swapped else logits)
    mean: Array = sum(outputs) / np.float32(len(outputs))
    return mean


def paint(target: Array, logits: Iterable[Array], labels: Rule) -> None:
    """Fill the box of a label map from logits that come channel by channel."""
    best = np.full(target.shape, 0 if labels["rule"] == "regions" else -np.inf, np.float32)
    for value, logit in zip(labels["values"], logits, strict=True):
        wins = logit > best
        target[wins] = value
        if labels["rule"] == "argmax":
            best[wins] = logit[wins]


def write_labels(path: str, segmentation: Array, header: Any) -> None:
    """Write a label map that lies exactly where the image of a header does."""
    kind: Any = nib.Nifti2Image if int(header["sizeof_hdr"]) == 540 else nib.Nifti1Image
    target = kind.header_class()
    target.set_data_dtype(segmentation.dtype)
    target.set_data_shape(segmentation.shape)
    for name in GEOMETRY:
        target[name] = header[name]
    nib.save(kind(segmentation, None, target), path)


if __name__ == "__main__":
    main()
