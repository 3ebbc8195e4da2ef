"""Trackers: rows arrive once, in order, also after a resume; a failure does not reach training.

TensorBoard is the real one. Weights & Biases and MLflow are stood in for by objects that take the
same calls (wandb 0.31: `init`, `Run.log`, `Run.alert`, `Run.finish`, `Image`; mlflow 3.17:
`MlflowClient`, `Metric`, `Param`) and refuse others.
"""

import json
import logging
import sys
import threading
import time
import types

import numpy as np
import pytest
from PIL import Image

from medseg.errors import ConfigError
from medseg.report import trackers
from medseg.report.trackers import build_trackers, scalars
from medseg.train.journal import Journal

CONFIG = {"epochs": 6, "optimizer": {"lr": 0.01, "name": "sgd"}}


def row(epoch, **changes):
    return {
        "epoch": epoch,
        "iteration": 50 * (epoch + 1),
        "progress": (epoch + 1) / 6,
        "train_loss": 1.0 - 0.1 * epoch,
        "validation_loss": None,
        "patch_dice": {"liver": 0.5 + 0.05 * epoch, "rare": None, "left kidney (L)": 0.25},
        "alarms": ["epoch 3: something is wrong"] if epoch == 2 else [],
        **changes,
    }


def run_on(folder, names, rows, *, cut_back_to=None):
    """Train on as a process would: cut the journal back, then write rows; return the observers."""
    journal = Journal(folder / "journal.jsonl")
    if cut_back_to is not None:
        journal.cut_back(cut_back_to)
    found = build_trackers(names, folder, run_name="fold 1", config=CONFIG)
    for one in rows:
        journal.on_epoch_end(one)
        for tracker in found:
            tracker.on_epoch_end(one)
    for tracker in found:
        tracker.close()
    return found


class FakeRun:
    """What `wandb.init` returns."""

    def __init__(self, service, identity, offline):
        self.id, self.offline, self._service = identity, offline, service
        self.logged, self.alerts, self.finished = [], [], False

    def log(self, data, step=None, commit=None):
        if self._service.broken:
            raise ConnectionError("no network")
        last = self.logged[-1][0] if self.logged else 0
        assert step >= last, "wandb drops steps that go back"
        self.logged.append((step, data))

    def alert(self, title, text, level=None, wait_duration=None):
        self.alerts.append(text)

    def finish(self, exit_code=None):
        self.finished = True


class FakeWandb(types.ModuleType):
    """The module `wandb`."""

    def __init__(self, *, offline):
        super().__init__("wandb")
        self.__spec__ = types.SimpleNamespace()
        self.runs, self.calls, self.broken, self._offline = [], [], False, offline

    def init(self, **options):
        known = {"project", "name", "id", "resume", "dir", "config", "reinit", "mode", "group"}
        assert set(options) <= known
        self.calls.append(options)
        self.runs.append(FakeRun(self, options["id"] or "abc123", self._offline))
        return self.runs[-1]

    class Image:
        def __init__(self, data_or_path):
            self.path = data_or_path


@pytest.fixture(params=[True, False], ids=["offline", "online"])
def wandb(request, monkeypatch):
    module = FakeWandb(offline=request.param)
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


class FakeMlflow:
    """A server, and the client's calls to it."""

    ALLOWED = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-./ ")

    def __init__(self):
        self.metrics, self.params, self.tags, self.artifacts = [], {}, {}, []
        self.runs, self.experiments, self.statuses, self.broken = [], {}, [], False

    def get_experiment_by_name(self, name):
        number = self.experiments.get(name)
        return None if number is None else types.SimpleNamespace(experiment_id=number)

    def create_experiment(self, name):
        self.experiments[name] = "7"
        return "7"

    def create_run(self, experiment_id, start_time=None, tags=None, run_name=None):
        assert experiment_id == "7"
        self.runs.append(run_name)
        identity = f"run{len(self.runs)}"
        return types.SimpleNamespace(info=types.SimpleNamespace(run_id=identity))

    def update_run(self, run_id, status=None, name=None):
        self.statuses.append(status)

    def log_batch(self, run_id, metrics=(), params=(), tags=(), synchronous=None):
        if self.broken:
            raise ConnectionError("no server")
        assert len(metrics) <= 1000
        assert len(params) <= 100
        self.metrics += [(m.key, m.step, m.value) for m in metrics]
        self.params |= {p.key: p.value for p in params}

    def set_tag(self, run_id, key, value, synchronous=None):
        assert set(key) <= self.ALLOWED
        self.tags[key] = value

    def log_artifact(self, run_id, local_path, artifact_path=None):
        self.artifacts.append(local_path)

    def set_terminated(self, run_id, status=None, end_time=None):
        self.statuses.append(status)

    def metric(self, key, value, timestamp, step):
        assert set(key) <= self.ALLOWED
        assert timestamp > 1e12
        return types.SimpleNamespace(key=key, value=value, step=step)


@pytest.fixture
def mlflow(monkeypatch):
    server = FakeMlflow()
    module, entities = types.ModuleType("mlflow"), types.ModuleType("mlflow.entities")
    module.__spec__ = types.SimpleNamespace()
    module.MlflowClient, module.entities = lambda: server, entities
    entities.Metric = server.metric
    entities.Param = lambda key, value: types.SimpleNamespace(key=key, value=value)
    monkeypatch.setitem(sys.modules, "mlflow", module)
    monkeypatch.setitem(sys.modules, "mlflow.entities", entities)
    return server


def test_all_problems_are_told_at_once(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "mlflow", None)
    monkeypatch.setattr(
        trackers.importlib.util, "find_spec", lambda name: None if name == "mlflow" else object()
    )
    with pytest.raises(ConfigError) as caught:
        build_trackers(["mlflow", "tensorbord"], tmp_path, run_name="x", config={})
    assert "pip install 'medseg[mlflow]'" in str(caught.value)
    assert "Did you mean 'tensorboard'?" in str(caught.value)


def test_row_becomes_one_number_per_column_and_structure():
    found = scalars({**row(1), "lr": float("nan"), "flag": True, "full_dice": {"liver": 1}})
    assert found == {
        "epoch": 1,
        "iteration": 100,
        "progress": 2 / 6,
        "train_loss": 0.9,
        "patch_dice/liver": 0.55,
        "patch_dice/left kidney (L)": 0.25,
        "full_dice/liver": 1,
    }


class TestTensorBoard:
    @pytest.fixture(autouse=True)
    def _installed(self):
        pytest.importorskip("tensorboard", reason="the extra 'tensorboard' is not installed")

    def read(self, folder):
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        found = EventAccumulator(str(folder / "trackers" / "tensorboard"))
        found.Reload()
        return found

    @pytest.mark.filterwarnings("ignore::DeprecationWarning")
    def test_curves_after_a_resume_are_those_of_the_journal(self, tmp_path):
        Image.fromarray(np.arange(24, dtype=np.uint8).reshape(2, 4, 3)).save(
            tmp_path / "progress.png"
        )
        run_on(tmp_path, ["tensorboard"], [row(epoch) for epoch in range(5)])
        again = [row(epoch, train_loss=9.0 + epoch) for epoch in range(3, 6)]
        run_on(tmp_path, ["tensorboard"], again, cut_back_to=3)
        found = self.read(tmp_path)
        loss = [(event.step, event.value) for event in found.Scalars("train_loss")]
        rows = Journal(tmp_path / "journal.jsonl").rows()
        assert [step for step, _ in loss] == [50, 100, 150, 200, 250, 300]
        np.testing.assert_allclose([v for _, v in loss], [r["train_loss"] for r in rows], rtol=1e-6)
        assert len(found.Scalars("patch_dice/liver")) == 6
        assert "patch_dice/rare" not in found.Tags()["scalars"]
        assert [image.step for image in found.Images("progress")][-1] == 300
        (alarm,) = found.Tensors("alarms/text_summary")
        assert (alarm.step, alarm.tensor_proto.string_val[0]) == (
            150,
            b"epoch 3: something is wrong",
        )

    @pytest.mark.filterwarnings("ignore::DeprecationWarning")
    def test_a_tracker_added_later_has_the_whole_curve(self, tmp_path):
        run_on(tmp_path, [], [row(epoch) for epoch in range(3)])
        run_on(tmp_path, ["tensorboard"], [row(3)], cut_back_to=3)
        loss = self.read(tmp_path).Scalars("train_loss")
        assert [event.step for event in loss] == [50, 100, 150, 200]


class TestWeightsAndBiases:
    def test_rows_arrive_once_and_a_resumed_run_keeps_its_id(self, tmp_path, wandb):
        run_on(tmp_path, ["wandb"], [row(epoch) for epoch in range(5)])
        run_on(tmp_path, ["wandb"], [row(epoch) for epoch in range(3, 6)], cut_back_to=3)
        first, second = wandb.runs
        assert [call["id"] for call in wandb.calls] == [None, "abc123"]
        assert wandb.calls[0]["config"] == CONFIG
        assert [step for step, _ in first.logged] == [50, 100, 150, 200, 250]
        whole = [50, 100, 150, 200, 250, 300]
        assert [step for step, _ in second.logged] == (whole if second.offline else [300])
        assert first.logged[0][1]["patch_dice/liver"] == 0.5
        assert first.alerts == ["epoch 3: something is wrong"]
        assert first.finished
        assert second.finished

    def test_picture_comes_at_the_end(self, tmp_path, wandb):
        (tmp_path / "progress.png").write_bytes(b"picture")
        run_on(tmp_path, ["wandb"], [row(0), row(1)])
        step, data = wandb.runs[0].logged[-1]
        assert step == 100
        assert data["progress_picture"].path == str(tmp_path / "progress.png")

    def test_failure_is_said_once_and_the_rest_goes_on(self, tmp_path, wandb, mlflow, caplog):
        wandb.broken = True
        with caplog.at_level(logging.WARNING, "medseg.report.trackers"):
            run_on(tmp_path, ["wandb", "mlflow"], [row(epoch) for epoch in range(4)])
        (record,) = caplog.records
        assert record.getMessage().startswith("wandb failed and records nothing more of this run")
        assert "ConnectionError: no network" in record.getMessage()
        assert len([m for m in mlflow.metrics if m[0] == "train_loss"]) == 4

    def test_no_login_does_not_stop_training(self, tmp_path, wandb, caplog):
        def refuse(**_):
            raise RuntimeError("api_key not configured")

        wandb.init = refuse
        assert run_on(tmp_path, ["wandb"], [row(0)]) == []
        assert "api_key not configured" in caplog.text


class TestMLflow:
    def test_rows_arrive_once_and_a_resumed_run_is_the_same_run(self, tmp_path, mlflow):
        run_on(tmp_path, ["mlflow"], [row(epoch) for epoch in range(5)])
        run_on(tmp_path, ["mlflow"], [row(epoch) for epoch in range(3, 6)], cut_back_to=3)
        assert mlflow.runs == ["fold 1"]
        steps = [step for key, step, _ in mlflow.metrics if key == "patch_dice/liver"]
        assert steps == [50, 100, 150, 200, 250, 300]
        assert mlflow.params == {"epochs": "6", "optimizer.lr": "0.01", "optimizer.name": "sgd"}
        assert mlflow.statuses == ["KILLED", "RUNNING", "FINISHED"]
        assert list(mlflow.tags.values()) == ["epoch 3: something is wrong"]

    def test_names_mlflow_refuses_are_rewritten(self, tmp_path, mlflow):
        run_on(tmp_path, ["mlflow"], [row(0)])
        assert ("patch_dice/left kidney _L_", 50, 0.25) in mlflow.metrics

    def test_many_structures_are_split_over_requests(self, tmp_path, mlflow):
        dice = {f"s{number}": 0.5 for number in range(1200)}
        run_on(tmp_path, ["mlflow"], [row(0, patch_dice=dice)])
        assert len({key for key, _, _ in mlflow.metrics if key.startswith("patch_dice/")}) == 1200

    def test_what_was_sent_survives_a_kill(self, tmp_path, mlflow):
        """The record is written with every row, not at the end."""
        run_on(tmp_path, ["mlflow"], [row(0), row(1)])
        found = json.loads((tmp_path / "trackers" / "mlflow.json").read_text())
        assert (found["run"], found["iteration"]) == ("run1", 100)

    def test_a_server_that_hangs_does_not_hold_up_training(self, tmp_path, mlflow, monkeypatch):
        answer = threading.Event()
        monkeypatch.setattr(mlflow, "get_experiment_by_name", lambda _: answer.wait(30) and None)
        monkeypatch.setattr(trackers, "_CLOSING_SECONDS", 0.1)
        start = time.monotonic()
        run_on(tmp_path, ["mlflow"], [row(0), row(1)])
        assert time.monotonic() - start < 5
        answer.set()
