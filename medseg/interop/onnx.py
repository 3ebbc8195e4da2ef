"""Networks as ONNX files, and the folder that holds all that is needed to run them.

The runtime that goes into the folder is `medseg.interop.runtime`, copied as it is.
"""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np
from torch import nn

from medseg.errors import BundleError, ConfigError, MedsegError
from medseg.interop.folder import require_replaceable, whole_folder
from medseg.schema.base import read, write
from medseg.schema.exported import ExportedModel, ExportedNetwork, ExportedTensors

logger = logging.getLogger(__name__)

DESCRIPTION, RUNTIME = "model.json", "predict.py"
PACKAGES = ("onnx", "onnxscript", "onnxruntime")
"""Packages of the extra."""
OPSET = 18
"""What torch's exporter translates to by itself; a later one would be a conversion after it, and
onnxruntime knows this one since 1.14."""
TOLERANCE = 1e-4
"""Largest difference of probabilities between torch and onnxruntime."""
_RUNTIME_SOURCE = Path(__file__).with_name("runtime.py")
_SEED = 0

Activation = Literal["softmax", "sigmoid"]
Describe = Callable[[Sequence[ExportedNetwork]], ExportedModel]


def require_packages() -> None:
    """Refuse to begin where a package of the extra is missing.

    Raises:
        ConfigError: Naming the packages and the extra.
    """
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"not installed: {', '.join(missing)}; export to ONNX needs it: "
            "pip install 'medseg[onnx]'."
        )


def require_place(folder: Path) -> None:
    """Refuse a folder that holds anything but an earlier export.

    Raises:
        ConfigError: Saying what is there.
    """
    require_replaceable(folder, _own_files)


def write_onnx(
    folder: Path,
    networks: Iterable[tuple[str, nn.Module]],
    describe: Describe,
    *,
    num_inputs: int,
    tile: Sequence[int],
    activation: Activation,
) -> ExportedModel:
    """Write networks, their description and the runtime; the folder appears whole or not at all.

    There is one file for each fold: a port can leave folds out, no file comes near the 2 GB that
    the format allows, and the memory needed is that of one network.

    Args:
        folder: Where the export goes; an earlier one there is replaced.
        networks: Fold and network on the CPU, in evaluation mode, one after another.
        describe: Makes the description once the networks are written.
        num_inputs: Channels the networks take.
        tile: Tile size in voxels.
        activation: From logits to probabilities.

    Raises:
        ConfigError: If the folder holds something else, or a package is missing.
        BundleError: If a network cannot be exported, or onnxruntime computes something else.
    """
    require_packages()
    with whole_folder(folder, _own_files) as part:
        entries = []
        for fold, network in networks:
            content = to_onnx(network, num_inputs=num_inputs, tile=tile)
            shape = (1, num_inputs, *tile)
            difference = probability_difference(network, content, shape, activation)
            _check(fold, difference)
            name = f"network_{fold}.onnx"
            (part / name).write_bytes(content)
            logger.info("%s written", name)
            entries.append(
                ExportedNetwork(
                    file=name,
                    fold=fold,
                    sha256=hashlib.sha256(content).hexdigest(),
                    max_probability_difference=difference,
                )
            )
        model = describe(entries)
        write(part / DESCRIPTION, model)
        (part / RUNTIME).write_bytes(_RUNTIME_SOURCE.read_bytes())
    return model


def to_onnx(network: nn.Module, *, num_inputs: int, tile: Sequence[int]) -> bytes:
    """Return a network as the content of an ONNX file: any number of tiles, fixed tile size.

    Args:
        network: On the CPU, in evaluation mode; (B, C, *tile) images -> (B, L, *tile) logits.
        num_inputs: Channels it takes (C).
        tile: Tile size in voxels.

    Raises:
        BundleError: If it does something that cannot be expressed.
    """
    import torch

    images = torch.zeros((2, num_inputs, *tile))  # with one tile, "one" would become part of it
    names = ExportedTensors.model_fields
    try:
        with _quiet():
            program: Any = torch.onnx.export(
                network,
                (images,),
                dynamo=True,
                opset_version=OPSET,
                input_names=[names["input"].default],
                output_names=[names["output"].default],
                dynamic_shapes=({0: torch.export.Dim("batch", min=1)},),
                verbose=False,
            )
    except torch.onnx.OnnxExporterError as error:
        reason = error.__cause__ or error
        raise BundleError(
            f"the network cannot be expressed in ONNX ({str(reason).strip().splitlines()[0]}). "
            "Change what its forward pass does, or predict with medseg."
        ) from error
    _strip(program.model)
    content: bytes = program.model_proto.SerializeToString(deterministic=True)
    return content


def _strip(model: Any) -> None:
    """Remove notes about the source code, which hold paths of this machine."""
    for graph in (model.graph, *model.functions.values()):
        for node in graph.all_nodes():
            for part in (node, *node.outputs):
                part.metadata_props.clear()
                part.doc_string = None
    model.graph.metadata_props.clear()
    model.metadata_props.clear()


def probability_difference(
    network: nn.Module, content: bytes, shape: Sequence[int], activation: Activation
) -> float:
    """Return how far the probabilities of onnxruntime are from those of torch.

    Args:
        network: The network.
        content: The same as an ONNX file.
        shape: (B, C, *tile) of the random numbers they are compared on.
        activation: From logits to probabilities.
    """
    import onnxruntime
    import torch

    images = np.random.default_rng(_SEED).standard_normal(shape, dtype=np.float32)
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    found = torch.from_numpy(session.run(None, {session.get_inputs()[0].name: images})[0])
    with torch.inference_mode():
        expected = network(torch.from_numpy(images))
    if activation == "sigmoid":
        found, expected = found.sigmoid(), expected.sigmoid()
    else:
        found, expected = found.softmax(1), expected.softmax(1)
    return float((found - expected).abs().max())


def _check(fold: str, difference: float) -> None:
    if not difference <= TOLERANCE:  # NaN too
        raise BundleError(
            f"{fold}: the probabilities of onnxruntime differ from those of torch by "
            f"{difference:.1e}; allowed is {TOLERANCE:.0e}. Nothing was written. Use another "
            "version of onnxruntime, or other weights."
        )


def _own_files(folder: Path) -> set[str] | None:
    """Return the files of an earlier export; None if there is none."""
    try:
        earlier = read(ExportedModel, folder / DESCRIPTION)
    except (MedsegError, OSError):
        return None
    return {DESCRIPTION, RUNTIME, *(network.file for network in earlier.networks)}


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence what torch's exporter says of itself: deprecations in it, packages it can spare."""
    log = logging.getLogger("torch.onnx")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            for kind in (FutureWarning, DeprecationWarning, PendingDeprecationWarning):
                warnings.simplefilter("ignore", kind)
            yield
    finally:
        log.setLevel(level)
