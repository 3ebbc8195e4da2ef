"""Export a model to a format that other programs run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from medseg.errors import BundleError, ConfigError, near_names

if TYPE_CHECKING:
    from torch import nn

    from medseg.infer.bundle import Bundle
    from medseg.schema.exported import ExportedModel


def export(
    model: str | Path,
    output: str | Path,
    *,
    format: str,  # noqa: A002 - the command's name
    folds: Sequence[str | int] | None = None,
    checkpoint: str = "final",
    trust_code: bool = False,
) -> ExportedModel:
    """Write a model in a format that other programs run.

    Args:
        model: Bundle, or run that holds one.
        output: Folder for the export: new, empty, or an earlier export, which is replaced.
        format: One of `FORMATS`.
        folds: Folds to export (0, "fold_0", "all" ...); None takes all the bundle has.
        checkpoint: "final" or "best".
        trust_code: Import a network given as "package.module:Name", which runs that code.

    Returns:
        The description that was written beside the networks.

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
        Path(model), Path(output), folds=folds, checkpoint=checkpoint, trust_code=trust_code
    )


def _export_onnx(
    model: Path,
    output: Path,
    *,
    folds: Sequence[str | int] | None,
    checkpoint: str,
    trust_code: bool,
) -> ExportedModel:
    from medseg.infer.bundle import check_supported, find_bundle, read_bundle
    from medseg.interop.description import describe
    from medseg.interop.onnx import OPSET, PACKAGES, require_packages, require_place, write_onnx
    from medseg.labels import LabelScheme

    require_packages()
    require_place(output)
    bundle = read_bundle(find_bundle(model))
    check_supported(bundle)
    if bundle.previous is not None:
        raise BundleError(
            f"{bundle.folder}: is a cascade; only models of one stage can be exported to ONNX. "
            "Export a model of another configuration, or predict with medseg."
        )
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


def _networks(
    bundle: Bundle, folds: Sequence[str], checkpoint: str, trust_code: bool
) -> Iterator[tuple[str, nn.Module]]:
    """Yield fold and network, in float32 with torch's own instance norm, one at a time."""
    import torch

    from medseg.labels import LabelScheme
    from medseg.models.build import build_network
    from medseg.models.weights import load_into, load_weights

    for fold in folds:
        path = bundle.weights(fold, checkpoint)
        try:
            network = build_network(
                bundle.configuration.architecture,
                num_inputs=len(bundle.spec.channels),
                num_logits=LabelScheme.from_spec(bundle.spec).num_logits,
                patch_size=bundle.configuration.patch_size,
                norm="instance",
                generator=torch.Generator(),  # leaves the caller's random state alone
                trust_code=trust_code,
            )
        except BundleError as error:
            raise BundleError(f"{bundle.folder}: {error}") from None
        load_into(network, load_weights(path), str(path))
        yield fold, network.requires_grad_(False).eval()


FORMATS: dict[str, Callable[..., ExportedModel]] = {"onnx": _export_onnx}
"""Name of a format -> what writes it, with the arguments of `export`."""
