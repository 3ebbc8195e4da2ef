"""Processes that train together or side by side: found in the environment, or started here."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import typer

from medseg.cli.options import settings
from medseg.errors import ConfigError

_NEIGHBOURS = "MEDSEG_NEIGHBOURS"
"""Set for trainings side by side: they share the memory of the machine."""
_ELSEWHERE = ("workspace", "progress", "started", "neighbours")
"""Values that are no options of the command itself."""


@contextmanager
def joined_processes(device: str) -> Iterator[str]:
    """Connect this process with those a launcher started beside it; alone do nothing.

    Yields:
        The device that this process computes on.
    """
    from medseg.models.precision import pick_device
    from medseg.train.distributed import from_environment, joined

    processes = from_environment(os.environ)
    if processes is None:
        yield _free_one(device)
        return
    name = processes.device_name(device)
    with joined(processes, pick_device(name)):
        yield name


def use_cpus() -> None:
    """Compute with as many threads as the process may use, unless OMP_NUM_THREADS says otherwise.

    Affinity is respected by itself; the quota of a container is not.
    """
    import torch

    from medseg.execute.resources import num_cpus

    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(num_cpus())


def leave_at_once(status: int) -> None:
    """End the process although a thread still computes, or the libraries take long to unload.

    A thread within the network cannot be asked to end, and would crash the interpreter's own way
    out; on a busy machine that way takes seconds besides.
    """
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def neighbours() -> int:
    """Return how many trainings run side by side with this one on its machine, itself included."""
    return int(os.environ.get(_NEIGHBOURS, "1"))


def _free_one(device: str) -> str:
    """Return a GPU that is free, where one of several is to be chosen."""
    import torch

    if device not in ("auto", "cuda") or not torch.cuda.is_available():
        return device
    if torch.cuda.device_count() < 2:
        return device
    from medseg.api.side_by_side import free_devices

    return next(iter(free_devices()), device)


def train_elsewhere(
    places: tuple[str, str, str], options: Mapping[str, Any], *, gpus: int | None, device: str
) -> Literal["nothing", "folds", "all"]:
    """Train in processes of their own where several GPUs are asked for, or are free for folds.

    Args:
        places: Dataset, configuration and fold.
        options: The other options of the command, by their names in Python.
        gpus: GPUs asked for; None: one, and for folds side by side all that are free.
        device: Device asked for.

    Returns:
        What was trained; after "folds" only the run as a whole is left to be reported.

    Raises:
        ConfigError: If too few GPUs are free.
        typer.Exit: If training on several GPUs failed or was stopped.
    """
    is_cv = places[2] == "cv"
    is_started_by_launcher = os.environ.get("WORLD_SIZE", "1").strip() != "1"
    if is_started_by_launcher or options["validate_only"] or not (is_cv or (gpus or 1) > 1):
        return "nothing"
    if device not in ("auto", "cuda"):
        if gpus is None or gpus == 1:
            return "nothing"
        raise ConfigError(f"gpus is {gpus}, but device is {device!r}; give one of them.")
    from medseg.api.launch import launch, require_gpus
    from medseg.api.side_by_side import free_devices

    devices = free_devices()
    if gpus is not None:
        devices = require_gpus(gpus, devices)
    if is_cv:
        return _folds_side_by_side(places, options, devices)
    command = command_line(places, {**options, "device": device})
    if status := launch(command, len(devices), environment=os.environ, devices=devices):
        raise typer.Exit(status)
    return "all"


def command_line(places: tuple[str, str, str], options: Mapping[str, Any]) -> list[str]:
    """Return the command that trains a fold in a process of its own.

    Args:
        places: Dataset, configuration and fold.
        options: Value of each option by its name in Python; None, False and empty: not given.
    """
    words = [sys.executable, "-m", "medseg", "--workspace", str(settings.workspace)]
    words += ["--debug"] * settings.debug + ["train", *places]
    for name, value in options.items():
        option = f"--{name.replace('_', '-')}"
        if name in _ELSEWHERE or value is None or value is False:
            continue
        for one in value if isinstance(value, (list, tuple)) else [value]:
            words += [option] if one is True else [option, str(one)]
    return words


def _folds_side_by_side(
    places: tuple[str, str, str], options: Mapping[str, Any], devices: list[str]
) -> Literal["nothing", "folds"]:
    """Train the folds of a cross-validation, if there are GPUs for more than one."""
    if len(devices) < 2:
        return "nothing"
    from medseg.api.side_by_side import run_folds
    from medseg.api.training import folds_of

    known = ("plans", "recipe", "set", "name", "workspace")
    dataset, config, fold = places
    path, folds, before = folds_of(dataset, config, **{name: options[name] for name in known})
    if before is not None:  # its folds must be there before any fold of this one begins
        own = {"extend": False, "restart": False, "init_from": None, "validate_every": None}
        _folds_side_by_side((dataset, before, fold), {**options, **own}, devices)

    def command_of(fold: str, device: str) -> list[str]:
        number = fold.removeprefix("fold_")
        return command_line((dataset, config, number), {**options, "device": device})

    logs = Path(path) / "logs"
    shared = {**os.environ, _NEIGHBOURS: str(min(len(devices), len(folds)))}
    run_folds(folds, devices, command_of, logs=logs, environment=shared)
    return "folds"
