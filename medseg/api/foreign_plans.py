"""Plans that are taken over: of a model in any form, or as nnU-Net v2 or medseg wrote them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medseg.api.importing import is_nnunet
from medseg.api.models import resolve
from medseg.bundles.bundle import MANIFEST, Bundle, find_bundle, read_bundle
from medseg.errors import BundleError, PlanError
from medseg.interop.nnunet.v2_dataset import DatasetFile
from medseg.interop.nnunet.v2_files import ORIENTATIONS, PlansFile
from medseg.interop.nnunet.v2_plans import (
    Entry,
    architecture_of,
    intensity_of,
    plans_of,
    read_entry,
    semantics_of,
)
from medseg.interop.nnunet.v2_values import checked, printable, read_foreign_json
from medseg.schema.base import FILE_NAME
from medseg.schema.bundle import Orientation, Semantics
from medseg.schema.plans import Plans, read_plans

_DATASET = "dataset.json"
_NO_PLANS = (_DATASET, "dataset_fingerprint.json", "splits_final.json")
"""What else nnU-Net keeps in a folder of preprocessed data."""
_RULES = {
    "normalise_first": "whether normalisation or resampling comes first",
    "keeps_slices": "the spacing across slices",
    "resample_image": "how images are resampled",
    "previous": "what the first stage of a cascade hands over",
}
"""Part of a model's semantics -> what it settles in training."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """Plans to take over."""

    plans: Plans
    channels: tuple[str, ...] | None
    """Names of the channels; None where nothing says."""
    remarks: tuple[str, ...] = ()
    """What a person should know of them, each a sentence."""


def read_source(path: Path, workspace: Path) -> Source:
    """Return the plans a user means.

    Args:
        path: A model, as `medseg.api.models.resolve` takes it; a plans file of nnU-Net v2 or of
            medseg; or a folder of nnU-Net's preprocessed data, with one plans file in it.
        workspace: Folder that holds what is imported on the fly and what was fetched.

    Raises:
        BundleError: If there is no model, or a file is no JSON.
        PlanError: If plans make no sense or need what medseg does not have, with every problem; or
            a folder holds several.
    """
    if path.suffix.lower() == ".pkl":
        raise PlanError(
            f"{path}: expected plans in JSON. Plans that are pickles are those of nnU-Net version "
            "1, of which whole models can be taken over: give the folder of a trained one."
        )
    file = _plans_file(path)
    source = _of_model(read_bundle(resolve(path, workspace))) if file is None else _of_file(file)
    wrong = [name for name in source.plans.configurations if not FILE_NAME.fullmatch(name)]
    if wrong:
        raise PlanError(
            f"{path}: configurations are called {', '.join(map(ascii, wrong))}; expected names "
            "that folders can have: letters, digits, '_', '-', '.' and '+'. Rename them in a copy."
        )
    return source


def _plans_file(path: Path) -> Path | None:
    """Return the plans file that is meant; None where it is a model.

    Raises:
        PlanError: If a folder holds several.
    """
    if path.is_file():
        return path if path.suffix.lower() == ".json" and path.name != MANIFEST else None
    if not path.is_dir() or _is_bundle(path):
        return None
    files = [file for file in sorted(path.glob("*.json")) if file.name not in _NO_PLANS]
    found = [file for file in files if _is_nnunet_plans(read_foreign_json(file))]
    if not found or is_nnunet(path):
        return None
    if len(found) > 1:
        names = ", ".join(printable(file.name) for file in found)
        raise PlanError(f"{path}: holds several plans ({names}). Name the file.")
    return found[0]


def _is_bundle(path: Path) -> bool:
    try:
        find_bundle(path)
    except BundleError:
        return False
    return True


def _of_file(path: Path) -> Source:
    raw = read_foreign_json(path)
    if isinstance(raw, dict) and "network_axes" in raw:
        return Source(plans=read_plans(path), channels=None)
    return _of_nnunet(path, raw)


def _is_nnunet_plans(raw: Any) -> bool:
    return isinstance(raw, dict) and {"transpose_forward", "configurations"} <= raw.keys()


def _of_model(bundle: Bundle) -> Source:
    manifest = bundle.manifest
    return Source(
        plans=_both_stages(bundle),
        channels=bundle.spec.channels,
        remarks=tuple(_remarks(manifest.orientation, [manifest.semantics])),
    )


def _both_stages(bundle: Bundle) -> Plans:
    """Return a bundle's plans; of a cascade with the configuration of its first stage too."""
    if bundle.previous is None:
        return bundle.plans
    first = bundle.previous.plans.configurations
    return bundle.plans.model_copy(
        update={"configurations": {**first, **bundle.plans.configurations}}
    )


def _of_nnunet(path: Path, raw: Any) -> Source:
    """Return the plans of nnU-Net v2 with all their configurations."""
    problems: list[str] = []
    head = checked(PlansFile, raw, path.name, problems)
    entries = _entries(raw, path.name, problems)
    channels = _channels(path.with_name(_DATASET), problems)
    if head is not None and entries and not problems:
        plans = _joined(head, raw, entries, path, problems)
        if not problems:
            semantics = [semantics_of(e, (), has_regions=False) for e in entries.values()]
            orientation = ORIENTATIONS.get(head.image_reader_writer or "", "stored_sitk")
            remarks = (*_remarks(orientation, semantics), *_without_dropout(entries))
            return Source(plans=plans, channels=channels, remarks=remarks)
    unique = list(dict.fromkeys(problems))
    count = f"{len(unique)} problem{'s' * (len(unique) != 1)}"
    raise PlanError(
        "\n".join(
            [
                f"{count} in the plans {path}:",
                *(f"  {problem}" for problem in unique),
                "Copy the file again where it is damaged. A configuration that medseg cannot "
                "train can only be left out, in a copy of the file.",
            ]
        )
    )


def _entries(raw: Any, where: str, problems: list[str]) -> dict[str, Entry]:
    """Return configurations by name, and note where they do not go together."""
    names = raw.get("configurations") if isinstance(raw, dict) else None
    if not isinstance(names, dict) or not names:
        problems.append(f"{where}.configurations: there are none; expected at least one")
        return {}
    read = {name: read_entry(raw, name, where, problems) for name in names}
    entries = {name: entry for name, entry in read.items() if entry is not None}
    first, schemes = next(((n, len(e.normalization_schemes)) for n, e in entries.items()), ("", 0))
    for name, entry in entries.items():
        place = f"{where}.configurations.{printable(name)}"
        if len(entry.normalization_schemes) != schemes:
            problems.append(
                f"{place}.normalization_schemes: for {len(entry.normalization_schemes)} channels; "
                f"expected {schemes}, as {printable(first)} has"
            )
        if entry.previous_stage is not None and entry.previous_stage not in names:
            problems.append(
                f"{place}.previous_stage: got {printable(entry.previous_stage)!r}; expected "
                "another configuration"
            )
    return entries


def _channels(path: Path, problems: list[str]) -> tuple[str, ...] | None:
    """Return the names of the channels, from the description beside plans."""
    if not path.is_file():
        return None
    file = checked(DatasetFile, read_foreign_json(path), path.name, problems)
    return file.channels or None if file is not None else None


def _joined(
    head: PlansFile, raw: Any, entries: Mapping[str, Entry], path: Path, problems: list[str]
) -> Plans:
    """Return plans with every configuration; problems of their statistics are noted."""
    parts = [
        plans_of(
            head,
            entry,
            name,
            dataset=head.dataset_name or path.absolute().parent.name,
            architecture=architecture_of(entry.network, is_batch_norm=False),
            intensity=intensity_of(raw, entry, path.name, problems),
        )
        for name, entry in entries.items()
    ]
    configurations = {name: c for part in parts for name, c in part.configurations.items()}
    return parts[0].model_copy(update={"configurations": configurations})


def _remarks(orientation: Orientation, semantics: list[Semantics]) -> Iterator[str]:
    """Yield in words what training does otherwise than where the plans come from."""
    if orientation == "stored_sitk":
        yield (
            "Look at the axes: these plans count them as images are stored, while medseg first "
            "brings images to right, anterior, superior. They mean the same where the stored axes "
            "run, in either direction, left-right, back-front and down-up in this order."
        )
    usual = Semantics()
    others = [
        words
        for field, words in _RULES.items()
        if any(getattr(given, field) != getattr(usual, field) for given in semantics)
    ]
    if others:
        yield f"Training follows medseg's own rules, not the model's, in: {'; '.join(others)}."


def _without_dropout(entries: Mapping[str, Entry]) -> Iterator[str]:
    dropped = [name for name, e in entries.items() if e.network.arch_kwargs.dropout_op is not None]
    if dropped:
        yield f"The dropout that is planned for {', '.join(dropped)} is left out."
