"""Export a model to a format that other programs run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from medseg.api.models import resolve
from medseg.data.workspace import DEFAULT_WORKSPACE
from medseg.errors import BundleError, ConfigError, near_names

if TYPE_CHECKING:
    from torch import Tensor, nn

    from medseg.bundles.bundle import Bundle
    from medseg.interop.nnunet.foreign import ForeignModel
    from medseg.interop.nnunet.write import ExportedFolder
    from medseg.schema.exported import ExportedModel


def export(
    model: str | Path,
    output: str | Path,
    *,
    format: str,  # noqa: A002 - the command's name
    folds: Sequence[str | int] | None = None,
    checkpoint: str = "final",
    trust_code: bool = False,
    workspace: str | Path = DEFAULT_WORKSPACE,
) -> ExportedModel | ExportedFolder:
    """Write a model in a format that other programs run.

    Args:
        model: As `medseg.load` takes it.
        output: Folder for the export: new, empty, or an earlier export, which is replaced.
        format: One of `FORMATS`.
        folds: Folds to export (0, "fold_0", "all" ...); None takes all the bundle has.
        checkpoint: "final" or "best".
        trust_code: Import a network given as "package.module:Name", which runs that code.
        workspace: Folder that holds what is imported on the fly and what was fetched.

    Returns:
        The description that was written beside the networks: `ExportedModel` for "onnx",
        `ExportedFolder` for "nnunet".

    Raises:
        ConfigError: If the format is unknown, needs a package that is missing, or `output` holds
            something else.
        BundleError: If there is no bundle, it cannot be exported, or it needs code that is not
            trusted.
    """
    if format not in FORMATS:
        known = sorted(FORMATS)
        raise ConfigError(
            f"format is {format!r}; expected one of: {', '.join(known)}.{near_names(format, known)}"
        )
    return FORMATS[format](
        lambda: resolve(model, workspace),  # once its place is known to be free
        Path(output),
        folds=folds,
        checkpoint=checkpoint,
        trust_code=trust_code,
    )


def _export_onnx(
    model: Callable[[], Path],
    output: Path,
    *,
    folds: Sequence[str | int] | None,
    checkpoint: str,
    trust_code: bool,
) -> ExportedModel:
    from medseg.bundles.bundle import check_supported, read_bundle
    from medseg.interop.description import describe
    from medseg.interop.onnx import OPSET, PACKAGES, require_packages, require_place, write_onnx
    from medseg.labels import LabelScheme

    require_packages()
    require_place(output)
    bundle = read_bundle(model())
    check_supported(bundle)
    if bundle.configuration.previous_stage is not None:
        raise BundleError(
            f"{bundle.folder}: is a cascade; only models of one stage can be exported to ONNX. "
            "Export a model of another configuration, or predict with medseg."
        )
    _require_usual(bundle)
    chosen = bundle.select_folds(folds)
    return write_onnx(
        output,
        _networks(bundle, chosen, checkpoint, trust_code),
        lambda networks: describe(
            bundle.spec,
            bundle.plans,
            bundle.configuration_name,
            bundle.manifest.semantics,
            postprocessing=bundle.postprocessing,
            opset=OPSET,
            networks=networks,
            packages=("torch", *PACKAGES),
        ),
        num_inputs=len(bundle.spec.channels),
        tile=bundle.configuration.patch_size,
        activation="sigmoid" if LabelScheme.from_spec(bundle.spec).has_regions else "softmax",
    )


def _require_usual(bundle: Bundle) -> None:
    """Refuse a model whose predictions are put together otherwise than those of medseg's own.

    Raises:
        BundleError: With everything the runtime beside the networks does not do.
    """
    from medseg.schema.bundle import Semantics

    semantics, usual = bundle.manifest.semantics, Semantics()
    problems = [
        f"semantics.{name} is {found}, expected {expected}"
        for name in _SEEN_IN_A_RESULT
        if (found := getattr(semantics, name)) != (expected := getattr(usual, name))
    ]
    if bundle.manifest.orientation != "canonical":
        problems.append(f"orientation is {bundle.manifest.orientation}, expected canonical")
    if "ct_case" in bundle.configuration.normalization:
        problems.append("normalization has ct_case")
    if problems:
        raise BundleError(
            f"{bundle.folder}: cannot be exported to ONNX: {'; '.join(problems)}. Predict with "
            "medseg."
        )


_SEEN_IN_A_RESULT = (
    "average", "normalise_first", "least_std", "keeps_slices", "resample_image", "resample_result",
    "separate_by",
)  # fmt: skip
"""Fields of the semantics that change more than rounding, in a model of one stage."""


def _export_nnunet(
    model: Callable[[], Path],
    output: Path,
    *,
    folds: Sequence[str | int] | None,
    checkpoint: str,
    trust_code: bool,
) -> ExportedFolder:
    from medseg.bundles.bundle import check_supported, read_bundle
    from medseg.interop.nnunet.write import require_place, write_v2

    require_place(output)
    bundle = read_bundle(model())
    check_supported(bundle)
    chosen = bundle.select_folds(folds)
    stages = [_foreign(bundle, chosen, checkpoint, trust_code)]
    if bundle.previous is not None:  # as in a prediction, the stage before is always the final one
        stages.insert(0, _foreign(bundle.previous, chosen, "final", trust_code))
    num_training = 0 if bundle.training is None else bundle.training.num_cases
    return write_v2(output, stages, num_training=num_training)


def _foreign(
    bundle: Bundle, folds: Sequence[str], checkpoint: str, trust_code: bool
) -> ForeignModel:
    """Return a bundle in the terms that are shared with nnU-Net; weights are read when asked for.

    Raises:
        BundleError: If a fold lacks the checkpoint.
    """
    from medseg.interop.nnunet.foreign import ForeignModel

    for fold in folds:
        bundle.weights(fold, checkpoint)

    def weights(fold: str) -> Callable[[], dict[str, Tensor]]:
        return lambda: _network(bundle, fold, checkpoint, trust_code).state_dict()

    return ForeignModel(
        folder=bundle.folder,
        spec=bundle.spec,
        plans=bundle.plans,
        configuration=bundle.configuration_name,
        semantics=bundle.manifest.semantics,
        orientation=bundle.manifest.orientation,
        weights={fold: {checkpoint: weights(fold)} for fold in folds},
        postprocessing=bundle.postprocessing,
        previous=None if bundle.previous is None else bundle.previous.folder,
    )


def _networks(
    bundle: Bundle, folds: Sequence[str], checkpoint: str, trust_code: bool
) -> Iterator[tuple[str, nn.Module]]:
    """Yield fold and network, in float32 with torch's own instance norm, one at a time."""
    for fold in folds:
        yield fold, _network(bundle, fold, checkpoint, trust_code).requires_grad_(False).eval()


def _network(bundle: Bundle, fold: str, checkpoint: str, trust_code: bool) -> nn.Module:
    """Return the network of one fold, whose weights are known to fit."""
    import torch

    from medseg.labels import LabelScheme
    from medseg.models.build import build_network
    from medseg.models.weights import load_into, load_weights

    path, labels = bundle.weights(fold, checkpoint), LabelScheme.from_spec(bundle.spec)
    try:
        network = build_network(
            bundle.configuration.architecture,
            num_inputs=len(bundle.spec.channels) + labels.num_previous(bundle.configuration),
            num_logits=labels.num_logits,
            patch_size=bundle.configuration.patch_size,
            norm="instance",
            generator=torch.Generator(),  # leaves the caller's random state alone
            trust_code=trust_code,
        )
    except BundleError as error:
        raise BundleError(f"{bundle.folder}: {error}") from None
    load_into(network, load_weights(path), str(path))
    return network


FORMATS: dict[str, Callable[..., ExportedModel | ExportedFolder]] = {
    "onnx": _export_onnx,
    "nnunet": _export_nnunet,
}
"""Name of a format -> what writes it: what gives the bundle, then the arguments of `export`."""
