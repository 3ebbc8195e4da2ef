"""Checkpoints: folders that appear when they are whole. Tensors and JSON, no pickle."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch

from medseg.errors import BundleError
from medseg.models.weights import load_weights, save_weights

_KEPT = 2


def save_checkpoint(folder: Path, iteration: int, state: dict[str, Any]) -> Path:
    """Write `folder/ITERATION` and keep the newest two.

    Args:
        folder: The fold's checkpoint folder.
        iteration: Optimiser steps done.
        state: Nested dictionaries and lists of tensors and plain JSON values.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, torch.Tensor] = {}
    values = _split(state, "", tensors)
    part = Path(tempfile.mkdtemp(dir=folder, prefix=f".{iteration}.", suffix=".part"))
    try:
        save_weights(part / "tensors.safetensors", tensors, {"kind": "checkpoint"})
        (part / "state.json").write_text(json.dumps(values), encoding="utf-8")
        target = folder / f"{iteration:08d}"
        shutil.rmtree(target, ignore_errors=True)
        part.chmod(0o755)
        os.rename(part, target)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
    for old in _whole(folder)[:-_KEPT]:
        shutil.rmtree(old, ignore_errors=True)
    return target


def load_checkpoint(folder: Path) -> dict[str, Any] | None:
    """Return the newest state in `folder`, None where there is none.

    Raises:
        BundleError: If the newest checkpoint is damaged.
    """
    found = _whole(folder)
    if not found:
        return None
    tensors = load_weights(found[-1] / "tensors.safetensors")
    try:
        values = json.loads((found[-1] / "state.json").read_text(encoding="utf-8"))
        state = _join(values, tensors)
    except (OSError, json.JSONDecodeError, KeyError) as error:
        raise BundleError(
            f"{found[-1]}: damaged checkpoint ({error}). Delete this folder to go on from the "
            "one before it."
        ) from error
    return dict(state)


def _whole(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if path.name.isdigit())


def _split(value: Any, path: str, tensors: dict[str, torch.Tensor]) -> Any:
    """Return the value as JSON, tensors moved to `tensors` and named in their place."""
    if isinstance(value, torch.Tensor):
        tensors[path] = value.detach().cpu().clone().contiguous()
        return {"tensor": path}
    if isinstance(value, dict):
        items = [[key, _split(item, f"{path}/{key}", tensors)] for key, item in value.items()]
        return {"items": items}
    if isinstance(value, (list, tuple)):
        return [_split(item, f"{path}/{i}", tensors) for i, item in enumerate(value)]
    return value


def _join(value: Any, tensors: dict[str, torch.Tensor]) -> Any:
    if isinstance(value, dict):
        if "tensor" in value:
            return tensors[value["tensor"]]
        return {key: _join(item, tensors) for key, item in value["items"]}
    if isinstance(value, list):
        return [_join(item, tensors) for item in value]
    return value
