"""nnU-Net v1's own prediction, made to run in one process, without a screen, with today's torch.

For interop_v1_fixtures.py, in an environment of nnU-Net v1.
"""

from __future__ import annotations

import os
import shutil
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from interop_fixtures import quiet

CHECKPOINT = "model_final_checkpoint"


def prepare_original(work: Path) -> None:
    """Make the original importable without a screen, and able to read its own files."""
    os.environ["RESULTS_FOLDER"] = str(work / "results")
    for name in ("matplotlib", "matplotlib.pyplot"):
        module = types.ModuleType(name)
        module.use = lambda *_, **__: None  # type: ignore[attr-defined]
        sys.modules.setdefault(name, module)
    load = torch.load

    def load_all(*arguments: Any, **named: Any) -> Any:
        """Read a checkpoint that was written here, numpy scalars and all."""
        return load(*arguments, **{**named, "weights_only": False})

    torch.load = load_all  # type: ignore[assignment]
    with quiet():
        from nnunet.inference import predict
        from nnunet.training.network_training.network_trainer import NetworkTrainer

    NetworkTrainer.print_to_log_file = lambda *_, **__: None
    predict.Pool = AloneInTurn
    predict.preprocess_multithreaded = preprocess_here


class AloneInTurn:
    """A pool of workers that does everything at once and in this process."""

    def __init__(self, _: int) -> None:
        pass

    def starmap_async(self, function: Any, arguments: Any) -> Any:
        """Call the function."""
        results = [function(*each) for each in arguments]
        return types.SimpleNamespace(get=lambda: results)

    def close(self) -> None:
        """Do nothing."""

    def join(self) -> None:
        """Do nothing."""


def preprocess_here(
    trainer: Any, cases: Any, targets: Any, _: int = 2, previous: Any = None
) -> Iterator[Any]:
    """Preprocess as the original does, in this process."""
    from nnunet.inference.predict import preprocess_save_to_queue

    results: list[Any] = []
    queue = types.SimpleNamespace(put=results.append)
    classes = list(range(1, trainer.num_classes))
    forward = trainer.plans["transpose_forward"]
    previous = previous or [None] * len(cases)
    preprocess_save_to_queue(
        trainer.preprocess_patient, queue, cases, targets, previous, classes, forward
    )
    yield from (result for result in results if not isinstance(result, str))


def predict(
    model: Path,
    images: Path,
    out: Path,
    *,
    folds: tuple[Any, ...] = (0, 1),
    previous: Path | None = None,
    mirrored: bool = True,
) -> None:
    """Predict a case with the original's own command, and keep what it has on the way."""
    from nnunet.inference import predict, segmentation_export
    from nnunet.training.data_augmentation import default_data_augmentation

    default_data_augmentation.default_3D_augmentation_params["do_mirror"] = True  # all share it
    kept: dict[str, np.ndarray] = {}
    export = segmentation_export.save_segmentation_nifti_from_softmax
    resample = segmentation_export.resample_data_or_seg

    def keep_before(softmax: np.ndarray, *arguments: Any, **named: Any) -> None:
        kept["before"] = kept["resampled"] = np.array(softmax)
        export(softmax, *arguments, **named)
        shutil.copyfile(out / "case.nii.gz", out / "raw.nii.gz")

    def keep_resampled(*arguments: Any, **named: Any) -> np.ndarray:
        kept["resampled"] = resample(*arguments, **named)
        return np.array(kept["resampled"])

    out.mkdir(parents=True, exist_ok=True)
    files = [str(path) for path in sorted(images.glob("*.nii.gz"))]
    predict.save_segmentation_nifti_from_softmax = keep_before
    segmentation_export.resample_data_or_seg = keep_resampled
    try:
        with quiet():
            predict.predict_cases(
                str(model), [files], [str(out / "case.nii.gz")], list(folds), True, 1, 1,
                None if previous is None else [str(previous)], mirrored, False, True, False, 0.5,
                CHECKPOINT,
            )  # fmt: skip
    finally:
        predict.save_segmentation_nifti_from_softmax = export
        segmentation_export.resample_data_or_seg = resample
    for name, array in kept.items():
        np.save(out / f"{name}.npy", array)
    (out / "case.pkl").unlink()
    if not (model / "postprocessing.json").exists():
        (out / "raw.nii.gz").unlink()
