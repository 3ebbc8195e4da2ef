"""What a bundle is, as a table at most 80 columns wide."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import safetensors

from medseg.bundles.bundle import Bundle
from medseg.bundles.files import MANIFEST, file_checksum
from medseg.bundles.members import AnyBundle, Composite, read_any
from medseg.bundles.tree import all_files
from medseg.execute.sizes import size_words
from medseg.labels import LabelScheme
from medseg.report.plans import configuration_rows, wrapped
from medseg.report.text import WIDTH, printable
from medseg.schema.bundle import BundleManifest, EnsembleManifest, Resampling, Semantics
from medseg.schema.postprocessing import FillHoles, KeepLargest, Postprocessing, Step

_INDENT = 18
_MAX_LABELS = 24
_NO_PARAMETERS = ("running_mean", "running_var", "num_batches_tracked")
_AXES = ("I", "J", "K")


def format_bundle(folder: Path, place: Path) -> str:
    """Return a table of a bundle, and below it one of each bundle that it is made of.

    Args:
        folder: The bundle.
        place: What the user gave: the same folder, a run, or an archive.

    Raises:
        BundleError: If it is missing or damaged.
    """
    return printable("\n\n".join(_blocks(read_any(folder), str(place))))


def _blocks(bundle: AnyBundle, title: str) -> Iterator[str]:
    rows = _model_rows(bundle) if isinstance(bundle, Bundle) else _composite_rows(bundle)
    files = [bundle.folder / name for name, _ in all_files(bundle.folder)]
    rows = {
        **rows,
        "postprocessing": _postprocessing(bundle.postprocessing),
        "training cases": str(bundle.training.num_cases) if bundle.training else "",
        "written by": f"medseg {bundle.manifest.medseg_version or '(version not known)'}",
        "size": f"{size_words(sum(path.stat().st_size for path in files))} in {len(files)} files",
        "checksum": f"sha256 of {MANIFEST}, which holds those of the other files:",
    }
    digest = file_checksum(bundle.folder / MANIFEST)
    lines = _lines({name: text for name, text in rows.items() if text})
    yield "\n".join([title, *lines, f"{' ' * (WIDTH - len(digest))}{digest}"])
    if isinstance(bundle, Composite):
        members: Mapping[str, AnyBundle] = bundle.members
    else:
        members = {} if bundle.previous is None else {"previous": bundle.previous}
    for name, member in members.items():
        yield from _blocks(member, f"member {name} of {title}")


def _composite_rows(bundle: Composite) -> dict[str, str]:
    """Return title -> text of what joins other bundles."""
    count = len(bundle.members)
    bundles = f"{count} bundle{'' if count == 1 else 's'}"
    rows = {
        "kind": f"{bundle.manifest.kind} of {bundles}",
        "dataset": bundle.spec.name,
        "channels": f"{len(bundle.spec.channels)}: {', '.join(bundle.spec.channels)}",
        "labels": _labels(LabelScheme.from_spec(bundle.spec)),
    }
    if isinstance(bundle.manifest, EnsembleManifest):
        shares = ", ".join(f"{name} {share:g}" for name, share in bundle.manifest.weights.items())
        return {**rows, "averaged": f"probabilities, with the weights {shares}"}
    chain = bundle.manifest.chain
    if chain.spacing is not None:
        size = " x ".join(f"{value:.4g}" for value in chain.spacing)
        rows["spacing"] = f"{size} mm, for all parts"
    counts = [(part.member, len(part.values)) for part in chain.parts]
    parts = ", ".join(f"{name} ({num} label{'' if num == 1 else 's'})" for name, num in counts)
    rows["merged"] = f"label maps of {parts}; where two find something, the later one stays"
    return rows


def _model_rows(bundle: Bundle) -> dict[str, str]:
    entry, manifest = bundle.configuration, bundle.manifest
    planned = configuration_rows(entry, None)
    return {
        "kind": _kind(bundle),
        "dataset": bundle.spec.name,
        "configuration": bundle.configuration_name,
        "recipe": manifest.recipe,
        "channels": f"{len(bundle.spec.channels)}: {', '.join(bundle.spec.channels)}",
        "labels": _labels(LabelScheme.from_spec(bundle.spec)),
        "folds": ", ".join(manifest.folds),
        "checkpoints": ", ".join(manifest.checkpoints),
        "network": f"{planned['network']}, {_num_parameters(bundle):,} parameters",
        "features": planned["features"],
        "patch size": f"{planned['patch size']} voxels, axes {_axes(bundle)}",
        "spacing": planned["spacing"],
        "normalisation": planned["normalisation"],
        "mirroring": _mirroring(bundle),
        "semantics": "; ".join(_unusual(manifest)),
    }


def _kind(bundle: Bundle) -> str:
    wanted = bundle.configuration.previous_stage
    if bundle.previous is not None:
        return f"cascade: the second stage, after {wanted}"
    if wanted is not None:
        return f"second stage of a cascade, without its first; needs what {wanted} found"
    return "one model, one network a fold"


def _labels(scheme: LabelScheme) -> str:
    found = scheme.structures
    parts = [
        f"{name} {'+'.join(map(str, values))}" for name, values in list(found.items())[:_MAX_LABELS]
    ]
    hidden = len(found) - _MAX_LABELS
    parts += [f"and {hidden} more"] if hidden > 0 else []
    what = " regions" if scheme.has_regions else ""
    return f"{len(found)}{what}: {', '.join(parts)}"


def _num_parameters(bundle: Bundle) -> int:
    """Return the number of parameters of one fold's network, read from the weights' header."""
    path = bundle.weights(bundle.manifest.folds[0])
    with safetensors.safe_open(path, framework="numpy") as file:
        return sum(
            math.prod(file.get_slice(name).get_shape())
            for name in file.keys()  # noqa: SIM118 - no mapping
            if not name.endswith(_NO_PARAMETERS)
        )


def _axes(bundle: Bundle) -> str:
    """Return the letters of the patch's axes, those of the image as it is brought to its frame."""
    axes = [_AXES[axis] for axis in bundle.plans.network_axes]
    return ", ".join(axes[-bundle.configuration.num_dimensions :])


def _mirroring(bundle: Bundle) -> str:
    semantics = bundle.manifest.semantics
    if not semantics.mirror_axes:
        return "none"
    letters = _axes(bundle).split(", ")
    text = f"axes {', '.join(letters[axis] for axis in semantics.mirror_axes)}"
    swapped = ", ".join(letters[axis] for axis in semantics.swap_axes)
    return text + (f"; along {swapped} left and right labels change places" if swapped else "")


def _unusual(manifest: BundleManifest) -> Iterator[str]:
    """Yield in words whatever is not as in medseg's own models."""
    semantics, usual = manifest.semantics, Semantics()
    if manifest.orientation != "canonical":
        yield "images are taken as they are stored, not turned to right, anterior, superior"
    for name, words in _WORDS.items():
        value = getattr(semantics, name)
        if value != getattr(usual, name):
            yield words.format(_VALUES.get(value, value))
    for name, what in _RESAMPLED.items():
        resampling = getattr(semantics, name)
        if resampling != getattr(usual, name):
            yield f"{what} resampled {_resampled(resampling)}"


_WORDS = {
    "average": "{} are averaged, not logits",
    "normalise_first": "intensities are normalised after resampling",
    "accumulator": "in exact mode sums are {}",
    "gaussian_peak": "in exact mode the largest weight in a tile is {:g}",
    "label_resize": "a label needs half a voxel to stay when label maps are resampled",
    "least_std": "1e-8 is added to standard deviations instead of being their least",
    "keeps_slices": "the spacing across slices stays as it is",
    "separate_by": "the image's grid tells which axis is resampled alone on the way back",
    "previous": "the stage before hands over its {}",
    "low_precision": "16 bits only where a tile of the first image shows that labels stay",
}
"""Field -> what a value other than the usual one means."""
_VALUES = {
    "labels": "label map",
    "labels_uncropped": "label map, which is resized without being cropped",
}
"""Value -> what it is called, where that is not its name."""
_RESAMPLED = {
    "resample_image": "images are",
    "resample_labels": "label maps are",
    "resample_result": "results are",
}


def _resampled(resampling: Resampling) -> str:
    """Return how something is resampled, in words."""
    if resampling.method == "none":
        return "not at all"
    how = (
        "linearly"
        if resampling.method == "interpolate"
        else f"by splines of order {resampling.order}"
    )
    alone = {
        "auto": "the coarsest axis alone where it is much coarser",
        "always": "the coarsest axis always alone",
        "never": "no axis alone",
    }
    return f"{how}, {alone[resampling.separate]}"


def _postprocessing(steps: Postprocessing | None) -> str:
    if steps is None or not steps.steps:
        return "none"
    return "; ".join(map(_step, steps.steps))


def _step(step: Step) -> str:
    """Return one step in words."""
    names = _listed(map(str, step.structures))
    if isinstance(step, FillHoles):
        limit = "" if step.max_ml is None else f" of up to {step.max_ml:g} ml"
        return f"holes{limit} in {names} are filled"
    together = " together" if step.together and len(step.structures) > 1 else ""
    each = " each" if not step.together and len(step.structures) > 1 else ""
    touch = {1: "by faces", 2: "by faces or edges", 3: "by faces, edges or corners"}
    joined = f"(connected {touch[step.connectivity]})"
    if isinstance(step, KeepLargest):
        which = "" if step.below_mm3 is None else f" that has less than {step.below_mm3:g} mm3"
        return f"of {names}{together}{each} every piece but the largest{which} is removed {joined}"
    return f"pieces of {names}{together}{each} below {step.min_ml:g} ml are removed {joined}"


def _listed(names: Iterable[str]) -> str:
    *others, last = names
    return f"{', '.join(others)} and {last}" if others else last


def _lines(rows: Mapping[str, str]) -> list[str]:
    return [
        line
        for title, text in rows.items()
        for line in wrapped(text, WIDTH, first=f"  {title:<{_INDENT - 2}}", further=" " * _INDENT)
    ]
