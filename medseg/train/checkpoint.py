"""Checkpoints: folders that appear when they are whole. Tensors and JSON, no pickle."""

from __future__ import annotations

import json
import logging
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch

from medseg.errors import BundleError
from medseg.models.weights import load_weights, save_weights
from medseg.schema.base import FORMAT_VERSION, write_text

logger = logging.getLogger(__name__)

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
        content = {"format_version": FORMAT_VERSION, "state": values}
        write_text(part / "state.json", json.dumps(content))
        target = folder / f"{iteration:08d}"
        shutil.rmtree(target, ignore_errors=True)
        part.chmod(0o755)
        os.rename(part, target)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
    _sweep(folder)
    return target


def _sweep(folder: Path) -> None:
    """Delete all but the newest, and what a process that was killed left half-written."""
    for old in [*_whole(folder)[:-_KEPT], *folder.glob(".*.part")]:
        shutil.rmtree(old, ignore_errors=True)


def load_checkpoint(folder: Path) -> dict[str, Any] | None:
    """Return the newest state in `folder` that is whole, None where there is none.

    A damaged one is left out with a warning: two are kept for this.

    Raises:
        BundleError: If there are checkpoints, and all of them are damaged.
    """
    problems = []
    for path in reversed(_whole(folder)):
        try:
            state = _read(path)
        except (BundleError, OSError, ValueError, KeyError, TypeError) as error:
            problems.append(f"{path}: damaged checkpoint ({error}).")
            logger.warning("%s", problems[-1])
            continue
        return state
    if problems:
        raise BundleError("\n".join([*problems, "Start the fold anew with --restart."]))
    return None


def _read(path: Path) -> dict[str, Any]:
    tensors = load_weights(path / "tensors.safetensors")
    content = json.loads((path / "state.json").read_text(encoding="utf-8"))
    if content["format_version"] != FORMAT_VERSION:
        raise ValueError(f"format_version is {content['format_version']}, not {FORMAT_VERSION}")
    return dict(_join(content["state"], tensors))


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
