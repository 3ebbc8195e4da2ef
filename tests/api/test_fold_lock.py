"""A fold is one process's: what training does when it is not, or not any more."""

import pytest

import medseg
from medseg.api import saver
from medseg.errors import ConfigError
from medseg.train.lock import LOCK, FoldLock, Holder

TRAIN = ("4", "3d_fullres", 0)


def test_a_fold_in_training_is_refused_before_anything_changes(workspace, recipe):
    options = {"recipe": recipe, "workspace": workspace}
    fold = medseg.train(*TRAIN, **options).path / "fold_0"
    before = {path: path.stat().st_mtime_ns for path in fold.rglob("*") if path.is_file()}
    with FoldLock(fold), pytest.raises(ConfigError, match="trains the fold already"):
        medseg.train(*TRAIN, restart=True, **options)
    assert {p: p.stat().st_mtime_ns for p in fold.rglob("*") if p.is_file()} == before


def test_a_process_whose_fold_went_to_another_writes_nothing_more(workspace, recipe, monkeypatch):
    original = saver.Saver.__call__

    def call(self):
        if self._trainer.length.iteration == 2:
            other = Holder.present().model_copy(update={"token": "another", "host": "elsewhere"})
            (self._run.fold_path / LOCK).write_text(other.model_dump_json())
        original(self)

    monkeypatch.setattr(saver.Saver, "__call__", call)
    with pytest.raises(ConfigError, match="no longer holds the fold"):
        medseg.train(*TRAIN, recipe=recipe, name="lost", workspace=workspace)
    (fold,) = workspace.rglob("*__lost/fold_0")
    assert not list(fold.rglob("*.safetensors"))
    assert '"host": "elsewhere"' in (fold / LOCK).read_text().replace('":"', '": "')


def test_trackers_go_on_in_the_same_run(workspace, recipe):
    pytest.importorskip("tensorboard", reason="the extra 'tensorboard' is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    options = {"recipe": recipe, "name": "watched", "workspace": workspace}
    fold = medseg.train(*TRAIN, **options).path / "fold_0"
    num_epochs = len((fold / "journal.jsonl").read_text().splitlines())
    medseg.train(*TRAIN, extend=True, epochs=1, track=["tensorboard"], **options)
    found = EventAccumulator(str(fold / "trackers" / "tensorboard"))
    found.Reload()
    steps = [event.step for event in found.Scalars("train_loss")]
    assert len(steps) == num_epochs + 1
    assert steps == sorted(set(steps))
    with pytest.raises(ConfigError, match="Did you mean 'wandb'"):
        medseg.train(*TRAIN, extend=True, epochs=1, track=["wandv"], **options)
