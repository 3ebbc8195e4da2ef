"""Bundles made of bundles: an ensemble, whose members are averaged, and a chain of models.

```text
BUNDLE/
  bundle.json          EnsembleManifest or ChainManifest
  dataset.json         DatasetSpec without cases: channels and the labels of the result
  postprocessing.json  Postprocessing; optional
  members/NAME/        a whole bundle, of any kind
```
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from pydantic import ValidationError

from medseg.bundles.bundle import POSTPROCESSING, Bundle, read_bundle
from medseg.bundles.files import (
    MANIFEST,
    MEMBERS,
    checksums,
    copy_bundle,
    kind_of,
    member_manifest,
    read_listed,
    read_part,
    verify,
    written_whole,
)
from medseg.errors import BundleError, ConfigError
from medseg.labels import LabelScheme
from medseg.postprocess import check as check_postprocessing
from medseg.schema.base import write
from medseg.schema.bundle import Chain, ChainManifest, EnsembleManifest
from medseg.schema.dataset import DatasetSpec
from medseg.schema.postprocessing import Postprocessing
from medseg.schema.training_cases import TrainingCases

Manifest = EnsembleManifest | ChainManifest


@dataclass(frozen=True, slots=True, kw_only=True)
class Composite:
    """A bundle made of bundles, verified."""

    folder: Path
    manifest: Manifest
    spec: DatasetSpec
    """Channels, and the labels of the result."""
    members: Mapping[str, AnyBundle]
    """Name -> the bundle."""
    postprocessing: Postprocessing | None = None
    """What is done to the merged segmentation; None where nothing is."""

    @property
    def configuration_name(self) -> str:
        """Return what takes the place of a configuration's name: the kind."""
        return self.manifest.kind

    @property
    def training(self) -> TrainingCases | None:
        """Return what the training cases were like: of an ensemble those of its first member."""
        lead = next(iter(self.members.values()))
        return lead.training if self.manifest.kind == "ensemble" else None


AnyBundle = Bundle | Composite


def read_any(folder: Path) -> AnyBundle:
    """Read a bundle of any kind, with all it is made of, and verify every checksum.

    Raises:
        BundleError: As `read_bundle`; or if the parts of a chain do not fit together.
    """
    folder = Path(folder)
    kind = kind_of(folder)
    if kind not in ("ensemble", "chain"):
        return read_bundle(folder)
    manifest: Manifest
    if kind == "ensemble":
        manifest = read_part(EnsembleManifest, folder / MANIFEST)
    else:
        manifest = read_part(ChainManifest, folder / MANIFEST)
    needed = ["dataset.json", *(member_manifest(name) for name in manifest.members)]
    verify(folder, manifest.sha256, needed)
    bundle = _open(folder, manifest)
    if problems := _problems(bundle):
        raise BundleError("\n".join([f"{folder}: its parts do not fit together:", *problems]))
    return bundle


def _open(folder: Path, manifest: Manifest) -> Composite:
    """Return the parts of a bundle whose files are known to be whole."""
    return Composite(
        folder=folder,
        manifest=manifest,
        spec=read_part(DatasetSpec, folder / "dataset.json"),
        members={name: read_any(folder / MEMBERS / name) for name in manifest.members},
        postprocessing=read_listed(Postprocessing, folder / POSTPROCESSING, manifest.sha256),
    )


def write_ensemble(
    folder: Path,
    *,
    members: Mapping[str, Path],
    weights: Mapping[str, float] | None = None,
    postprocessing: Postprocessing | None = None,
) -> Composite:
    """Write a bundle of several whose probabilities are averaged.

    Args:
        folder: Where it goes; a bundle that is there is replaced whole.
        members: Name -> bundle of one model or cascade, which is copied whole; the first leads.
        weights: Name -> share in the mean, of any sum; None: equal ones.
        postprocessing: What is done to the mean's segmentation; that of the members is not done.

    Raises:
        BundleError: If a member is missing, damaged or does not fit, or a weight makes no sense.
    """
    read = _read_members(Path(folder), members)
    shares = dict.fromkeys(members, 1.0) if weights is None else weights
    if set(shares) != set(members):
        raise BundleError(
            f"{folder}: weights are for {', '.join(shares) or 'nobody'}; expected one for each of: "
            f"{', '.join(members)}."
        )
    ordered = {name: shares[name] for name in members}
    spec = next(iter(read.values())).spec
    return _write(Path(folder), {"weights": ordered}, EnsembleManifest, spec, read, postprocessing)


def write_chain(
    folder: Path,
    *,
    spec: DatasetSpec,
    chain: Chain,
    members: Mapping[str, Path],
    postprocessing: Postprocessing | None = None,
) -> Composite:
    """Write a bundle of models that work one after the other on one resampled image.

    Args:
        folder: Where it goes; a bundle that is there is replaced whole.
        spec: Channels, and the labels of the result; cases and source folder are left out.
        chain: What is done.
        members: Name -> bundle of any kind, which is copied whole; those the chain's parts name.
        postprocessing: What is done to the merged label map, on the resampled image's grid.

    Raises:
        BundleError: If a member is missing, damaged or does not fit.
    """
    read = _read_members(Path(folder), members)
    return _write(Path(folder), {"chain": chain}, ChainManifest, spec, read, postprocessing)


def _read_members(folder: Path, members: Mapping[str, Path]) -> dict[str, AnyBundle]:
    if not members:
        raise BundleError(f"{folder}: expected at least one member, got none.")
    return {name: read_any(Path(place)) for name, place in members.items()}


def _write(
    folder: Path,
    values: Mapping[str, object],
    schema: type[EnsembleManifest] | type[ChainManifest],
    spec: DatasetSpec,
    members: Mapping[str, AnyBundle],
    postprocessing: Postprocessing | None,
) -> Composite:
    with written_whole(folder) as part:
        manifest = _manifest(folder, schema, {**values, "sha256": {}})
        if unknown := set(manifest.members) ^ set(members):
            raise BundleError(
                f"{folder}: {', '.join(sorted(unknown))}: named as a part or given as a member, "
                f"but not both. Parts are of: {', '.join(manifest.members)}."
            )
        plain = {"cases": {}, "source": "", "description": ""}
        write(part / "dataset.json", spec.model_copy(update=plain))
        if postprocessing is not None:
            write(part / POSTPROCESSING, postprocessing)
        for name, bundle in members.items():
            copy_bundle(bundle.folder, part / MEMBERS / name)
        manifest = manifest.model_copy(
            update={"sha256": checksums(part), "medseg_version": metadata.version("medseg")}
        )
        write(part / MANIFEST, manifest)
        if problems := _problems(_open(part, manifest)):
            raise BundleError("\n".join([f"{folder}: not written.", *problems]))
    written = read_any(folder)
    if isinstance(written, Bundle):  # another process has replaced it meanwhile
        raise BundleError(f"{folder}: holds another bundle now. Choose another place.")
    return written


def _manifest(
    folder: Path,
    schema: type[EnsembleManifest] | type[ChainManifest],
    values: Mapping[str, object],
) -> Manifest:
    try:
        return schema.model_validate(values)
    except ValidationError as error:
        found = error.errors()[0]
        where = ".".join(str(part) for part in found["loc"])
        raise BundleError(
            f"{folder}: {where} is {found['input']!r}; {found['msg'][0].lower()}{found['msg'][1:]}."
        ) from None


def _problems(bundle: Composite) -> list[str]:
    """Return what keeps the parts from fitting together, a line each."""
    try:
        labels = LabelScheme.from_spec(bundle.spec)
    except ConfigError as error:
        return [f"  {error}"]
    problems = [
        f"  {MEMBERS}/{name}: takes {len(member.spec.channels)} channels, the bundle "
        f"{len(bundle.spec.channels)} ({', '.join(bundle.spec.channels)})"
        for name, member in bundle.members.items()
        if len(member.spec.channels) != len(bundle.spec.channels)
    ]
    if isinstance(bundle.manifest, EnsembleManifest):
        problems += _ensemble_problems(bundle)
    else:
        problems += _chain_problems(bundle, bundle.manifest.chain, labels)
    if bundle.postprocessing is not None:
        try:
            check_postprocessing(bundle.postprocessing, labels.structures)
        except (BundleError, ConfigError) as error:
            problems.append(f"  {error}")
    return problems


def _ensemble_problems(bundle: Composite) -> list[str]:
    problems = []
    for name, member in bundle.members.items():
        if not isinstance(member, Bundle):
            problems.append(
                f"  {MEMBERS}/{name}: kind is {member.manifest.kind!r}; expected 'single' or "
                "'cascade'"
            )
        for what in ("labels", "regions_class_order"):
            found, expected = (getattr(each.spec, what) for each in (member, bundle))
            if found != expected:
                problems.append(f"  {MEMBERS}/{name}: {what} is {found}, expected {expected}")
    return problems


def _chain_problems(bundle: Composite, chain: Chain, labels: LabelScheme) -> list[str]:
    problems = []
    for number, part in enumerate(chain.parts):
        own = LabelScheme.from_spec(bundle.members[part.member].spec)
        for told, known, whose in (
            (set(part.values), set(own.values), part.member),
            (set(part.values.values()), set(labels.values) - {labels.background}, "the chain"),
        ):
            problems += [
                f"  parts.{number}.values holds {value}; expected values of {whose}: "
                f"{', '.join(map(str, sorted(known)))}"
                for value in sorted(told - known)
            ]
    return problems
