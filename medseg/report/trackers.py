"""The journal's rows sent to TensorBoard, Weights & Biases and MLflow.

None of them can hold up or end a training: they work in threads of their own, and one that fails
is named once in the log and left alone.
"""

from __future__ import annotations

import importlib.util
import logging
import math
import re
import threading
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Protocol

from medseg.errors import ConfigError, near_names
from medseg.schema.base import FORMAT_VERSION, Schema, format_json, read, write
from medseg.train.journal import Journal

logger = logging.getLogger(__name__)

TRACKERS = ("tensorboard", "wandb", "mlflow")
"""The names; each is the package's and the extra's, too."""
_PROJECT = "medseg"
_PICTURE_SECONDS = 600.0
_CLOSING_SECONDS = 60.0


class TrackerRecord(Schema):
    """Where a fold's rows were sent: `trackers/NAME.json` in its folder."""

    format_version: int = FORMAT_VERSION
    """Version of this file's format."""
    run: str
    """The tracker's own name of the run."""
    iteration: int = 0
    """Iteration of the last row that was sent."""


class Service(Protocol):
    """One tracker's own way; every method may raise anything."""

    iteration: int
    """Iteration of the last row that the tracker has."""

    def open(self, first: int) -> None:
        """Begin, or go on; rows from iteration `first` on are about to come."""

    def log(self, values: Mapping[str, float], alarms: Iterable[str], step: int) -> None:
        """Record one row."""

    def picture(self, path: Path, step: int) -> None:
        """Record a picture."""

    def close(self, *, is_done: bool) -> None:
        """End; `is_done`: the run has reached its length."""


def build_trackers(
    names: Iterable[str], folder: Path, *, run_name: str, config: Mapping[str, Any]
) -> list[Tracker]:
    """Return an observer for each tracker; call `close` on each at the end.

    Args:
        names: Of `TRACKERS`.
        folder: Folder of the fold, with its journal.
        run_name: What the run is called there.
        config: What it was started with, as plain values.

    Raises:
        ConfigError: If `check_trackers` does.
    """
    names = list(dict.fromkeys(names))
    check_trackers(names)
    services: dict[str, type[Any]] = {
        "tensorboard": TensorBoard,
        "wandb": WeightsAndBiases,
        "mlflow": MLflow,
    }
    found = []
    for name in names:
        try:
            service = services[name](Path(folder) / "trackers", run_name, config)
        except Exception as error:  # no login, no network: training goes on
            _warn(name, error)
        else:
            found.append(Tracker(name, service, Path(folder)))
    return found


def check_trackers(names: Iterable[str]) -> None:
    """Check that trackers can be had, before anything is written.

    Raises:
        ConfigError: With every name that is unknown and every package that is not installed.
    """
    problems = []
    for name in names:
        if name not in TRACKERS:
            close = near_names(name, list(TRACKERS))
            problems.append(f"tracker is {name!r}; expected one of: {', '.join(TRACKERS)}.{close}")
        elif importlib.util.find_spec(name) is None:
            problems.append(f"tracker {name!r} needs a package: pip install 'medseg[{name}]'.")
    if problems:
        raise ConfigError("\n".join(problems))


class Tracker:
    """Hands rows to a service in a thread, with those of the journal that it does not have."""

    def __init__(self, name: str, service: Service, folder: Path) -> None:
        """Begin; nothing is sent before the first row."""
        self._name, self._service, self._folder = name, service, folder
        self._rows: SimpleQueue[dict[str, Any] | None] = SimpleQueue()
        self._pictured = (0.0, time.monotonic())
        self._last: Mapping[str, Any] = {}
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._thread.start()

    def on_epoch_end(self, row: Mapping[str, Any]) -> None:
        """Queue a row."""
        self._rows.put(dict(row))

    def close(self) -> None:
        """Send what is queued, for a minute at most."""
        self._rows.put(None)
        self._thread.join(_CLOSING_SECONDS)
        if self._thread.is_alive():
            logger.warning("%s does not answer; its last rows are lost", self._name)

    def _work(self) -> None:
        try:
            while (row := self._rows.get()) is not None:
                if not self._last:
                    self._catch_up(row["iteration"])
                self._send(row)
                self._show(_PICTURE_SECONDS)
            if self._last:
                self._show(0.0)
            self._service.close(is_done=self._last.get("progress", 0) >= 1)
        except Exception as error:  # whatever it is, training goes on
            _warn(self._name, error)

    def _catch_up(self, iteration: int) -> None:
        """Open the service, and send the epochs before `iteration` that it lacks."""
        rows = Journal(self._folder / "journal.jsonl").rows()
        missing = [r for r in rows if self._service.iteration < r["iteration"] < iteration]
        self._service.open(missing[0]["iteration"] if missing else iteration)
        for row in missing:
            self._send(row)

    def _send(self, row: Mapping[str, Any]) -> None:
        """Send a row, unless the service has it from before the journal was cut back."""
        self._last = row
        if row["iteration"] > self._service.iteration:
            self._service.log(scalars(row), row.get("alarms") or (), row["iteration"])
            self._service.iteration = row["iteration"]

    def _show(self, seconds: float) -> None:
        """Send the progress picture if it is another and the last was sent some time ago."""
        path = self._folder / "progress.png"
        changed, sent = path.stat().st_mtime if path.exists() else 0.0, self._pictured
        if changed > sent[0] and time.monotonic() - sent[1] >= seconds:
            self._service.picture(path, self._last["iteration"])
            self._pictured = changed, time.monotonic()


def _warn(name: str, error: Exception) -> None:
    logger.warning(
        "%s failed and records nothing more of this run (%s: %s); journal.jsonl has it all",
        name,
        type(error).__name__,
        str(error).strip() or "no message",
    )


class TensorBoard:
    """Event files in `trackers/tensorboard`; `tensorboard --logdir FOLDER` shows them.

    They only show the journal, so every process writes all of it anew, in the place of what was.
    """

    def __init__(self, place: Path, run_name: str, config: Mapping[str, Any]) -> None:
        """Name the folder; nothing is written before the first row."""
        self._path = place / "tensorboard"
        self._about = f"{run_name}\n\n```\n{format_json(dict(config))}\n```"
        self._writer: Any = None
        self.iteration = 0

    def open(self, first: int) -> None:
        """Begin anew; a TensorBoard that looks on strikes out its points from `first` on."""
        from torch.utils.tensorboard import SummaryWriter

        for old in self._path.glob("events.out.tfevents.*"):
            old.unlink()
        self._writer = SummaryWriter(str(self._path), purge_step=first)
        self._writer.add_text("recipe", self._about, first)

    def log(self, values: Mapping[str, float], alarms: Iterable[str], step: int) -> None:
        """Write a row, so that it is seen at once."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        for alarm in alarms:
            self._writer.add_text("alarms", alarm, step)
        self._writer.flush()

    def picture(self, path: Path, step: int) -> None:
        """Write a picture."""
        import numpy as np
        from PIL import Image

        with Image.open(path) as picture:
            pixels = np.asarray(picture.convert("RGB"))
        self._writer.add_image("progress", pixels, step, dataformats="HWC")

    def close(self, *, is_done: bool) -> None:
        """Close the file."""
        if self._writer is not None:
            self._writer.close()


class WeightsAndBiases:
    """A run of Weights & Biases; WANDB_MODE=offline and its other settings are heeded.

    Offline, every process leaves a folder of its own under the same run, of which the last that is
    synced counts. So each gets all rows.

    Source:
        Issues 3841 and 4624 of wandb/wandb on offline runs with one id.
    """

    def __init__(self, place: Path, run_name: str, config: Mapping[str, Any]) -> None:
        """Start the run at once, since the package may ask for a login."""
        import wandb

        self._record = _Record(place / "wandb.json")
        place.mkdir(parents=True, exist_ok=True)
        run: Any = wandb.init(
            project=_PROJECT,
            name=run_name,
            id=self._record.run,
            resume="allow",
            dir=str(place),
            config=dict(config),
            reinit="create_new",
        )
        self._run, self._wandb = run, wandb
        self._record.keep(run.id)
        self._iteration = -1 if run.offline else self._record.iteration

    @property
    def iteration(self) -> int:
        """Return the iteration of the last row that was sent."""
        return self._iteration

    @iteration.setter
    def iteration(self, iteration: int) -> None:
        self._iteration = iteration
        self._record.keep(self._run.id, iteration)

    def open(self, first: int) -> None:
        """Do nothing; the run is open."""

    def log(self, values: Mapping[str, float], alarms: Iterable[str], step: int) -> None:
        """Record a row."""
        self._run.log(dict(values), step=step)
        for alarm in alarms:
            self._run.alert(title="medseg", text=alarm)

    def picture(self, path: Path, step: int) -> None:
        """Record a picture."""
        self._run.log({"progress_picture": self._wandb.Image(str(path))}, step=step)

    def close(self, *, is_done: bool) -> None:
        """Upload what is left."""
        self._run.finish()


class MLflow:
    """A run of MLflow, where MLFLOW_TRACKING_URI says; through its client, without global state."""

    def __init__(self, place: Path, run_name: str, config: Mapping[str, Any]) -> None:
        """Keep what the run is; the server is first asked when there is a row."""
        self._record = _Record(place / "mlflow.json")
        self._name, self._config = run_name, config
        self._client: Any = None
        self._run_id = ""
        self._iteration = self._record.iteration

    @property
    def iteration(self) -> int:
        """Return the iteration of the last row that was sent."""
        return self._iteration

    @iteration.setter
    def iteration(self, iteration: int) -> None:
        self._iteration = iteration
        self._record.keep(self._run_id, iteration)

    def open(self, first: int) -> None:
        """Make a run, or open the one there is again."""
        from mlflow import MlflowClient
        from mlflow.entities import Param

        self._client = MlflowClient()
        if self._record.run is not None:
            self._run_id = self._record.run
            self._client.update_run(self._run_id, status="RUNNING")
            return
        experiment = self._client.get_experiment_by_name(_PROJECT)
        known = experiment.experiment_id if experiment else None
        number = known or self._client.create_experiment(_PROJECT)
        self._run_id = str(self._client.create_run(number, run_name=self._name).info.run_id)
        self._record.keep(self._run_id)
        params = [Param(key, str(value)[:500]) for key, value in _flat(self._config).items()]
        for start in range(0, len(params), 100):  # what one request may hold
            self._client.log_batch(self._run_id, params=params[start : start + 100])

    def log(self, values: Mapping[str, float], alarms: Iterable[str], step: int) -> None:
        """Record a row."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        metrics = [Metric(key, value, now, step) for key, value in mlflow_names(values).items()]
        for start in range(0, len(metrics), 500):
            self._client.log_batch(self._run_id, metrics=metrics[start : start + 500])
        for number, alarm in enumerate(alarms):
            self._client.set_tag(self._run_id, f"alarm {step}.{number}", alarm)

    def picture(self, path: Path, step: int) -> None:
        """Record a picture, in the place of the one before."""
        self._client.log_artifact(self._run_id, str(path))

    def close(self, *, is_done: bool) -> None:
        """Say that nothing more comes for now."""
        if self._client is None:
            return
        self._client.set_terminated(self._run_id, status="FINISHED" if is_done else "KILLED")


class _Record:
    """A tracker's record on disk."""

    def __init__(self, path: Path) -> None:
        self._path = path
        found = read(TrackerRecord, path) if path.exists() else None
        self.run = found.run if found else None
        self.iteration = found.iteration if found else 0

    def keep(self, run: str, iteration: int | None = None) -> None:
        """Write it."""
        if iteration is not None:
            self.iteration = iteration
        self.run = run
        write(self._path, TrackerRecord(run=run, iteration=self.iteration))


def scalars(row: Mapping[str, Any]) -> dict[str, float]:
    """Return the numbers of a row; those of structures under "column/structure".

    Examples:
        >>> scalars({"lr": 0.1, "patch_dice": {"liver": 0.5, "rare": None}, "alarms": ["x"]})
        {'lr': 0.1, 'patch_dice/liver': 0.5}
    """
    return {
        name: float(value)
        for name, value in _flat(row, "/").items()
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    }


def _flat(values: Mapping[str, Any], separator: str = ".", prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            found |= _flat(value, separator, f"{name}{separator}")
        else:
            found[name] = value
    return found


def mlflow_names(values: Mapping[str, float]) -> dict[str, float]:
    """Return the values under names that MLflow accepts: ASCII letters, digits and a few signs.

    Examples:
        >>> mlflow_names({"dice/a+b": 0.1, "dice/a*b": 0.2})
        {'dice/a_b': 0.1, 'dice/a_b_2': 0.2}
    """
    found: dict[str, float] = {}
    for name, value in values.items():
        plain = accepted = re.sub(r"[^\w./ -]", "_", name, flags=re.ASCII)
        count = 1
        while accepted in found:
            count += 1
            accepted = f"{plain}_{count}"
        found[accepted] = value
    return found
