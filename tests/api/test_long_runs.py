"""Runs that are stopped, extended, repeated, watched, or begun from another model."""

from __future__ import annotations

import json
import os
import signal
import threading

import pytest
import safetensors.torch

import medseg
from medseg.api import fold, saver
from medseg.api.seeds import train_seeds
from medseg.errors import BundleError, ConfigError
from medseg.schema.base import read_json
from medseg.train.signals import Stopped

TRAIN = ("4", "3d_fullres", 0)


def tensors(path):
    return safetensors.torch.load_file(path)


def assert_same_tensors(first, second):
    a, b = tensors(first), tensors(second)
    assert list(a) == list(b)
    for name, tensor in a.items():
        assert tensor.equal(b[name]), name


def rows(fold):
    lines = (fold / "journal.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def without_times(found):
    return [
        {k: v for k, v in row.items() if "seconds" not in k and k != "session"} for row in found
    ]


@pytest.fixture
def stopping(monkeypatch):
    """Return what makes the next training ask itself to stop after a number of steps."""

    def after(steps, number=signal.SIGTERM):
        original, seen = saver.Saver.__call__, []

        def call(self):
            if self._trainer.length.iteration == steps and not seen:
                seen.append(steps)
                os.kill(os.getpid(), number)
            original(self)

        monkeypatch.setattr(saver.Saver, "__call__", call)

    return after


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("steps", [2, 3, 6])
def test_a_stopped_run_goes_on_to_the_same_weights(workspace, recipe, stopping, steps, number):
    """Within an epoch, at its end, at the end of the run: weights and journal are the same."""
    options = {"recipe": recipe, "workspace": workspace}
    whole = medseg.train(*TRAIN, name="whole", **options).path / "fold_0"
    stopping(steps, number)
    with pytest.raises(Stopped) as caught:
        medseg.train(*TRAIN, name="parts", **options)
    parts = whole.parents[1] / whole.parent.name.replace("whole", "parts") / "fold_0"
    assert caught.value.signal == number
    assert [path.name for path in (parts / "checkpoints").iterdir()] == [f"{steps:08d}"]
    assert not (parts / "weights/final.safetensors").exists()
    assert not (parts / "lock").exists()
    with (parts / "journal.jsonl").open("a") as file:
        file.write('{"epoch": 2, "iteration": 9, "of": "a later crash"}\n{"epo')
    medseg.train(*TRAIN, name="parts", **options)
    assert_same_tensors(parts / "weights/final.safetensors", whole / "weights/final.safetensors")
    assert without_times(rows(parts)) == without_times(rows(whole))
    last = "checkpoints/00000006/tensors.safetensors"
    assert_same_tensors(parts / last, whole / last)


def test_a_run_in_another_thread_than_the_main_one_trains_too(workspace, recipe):
    """Signals can only be listened to in the main thread."""
    found = []

    def work():
        found.append(medseg.train(*TRAIN, recipe=recipe, iterations=1, workspace=workspace))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found[0].metrics["fold_0"].cases


def test_a_finished_run_is_extended(workspace, recipe, stopping):
    options = {"recipe": recipe, "workspace": workspace}
    with pytest.raises(ConfigError, match="nothing to extend"):
        medseg.train(*TRAIN, extend=True, iterations=4, **options)
    fold = medseg.train(*TRAIN, **options).path / "fold_0"
    before = tensors(fold / "weights/final.safetensors")
    with pytest.raises(ConfigError, match="--extend needs a length"):
        medseg.train(*TRAIN, extend=True, **options)
    with pytest.raises(ConfigError, match="--extend"):
        medseg.train(*TRAIN, iterations=4, **options)
    stopping(8)
    with pytest.raises(Stopped):
        medseg.train(*TRAIN, extend=True, iterations=4, **options)
    assert_same_tensors_as(before, fold)  # what was there can still be used
    with pytest.raises(ConfigError, match="planned iterations: was 4, now 5"):
        medseg.train(*TRAIN, extend=True, iterations=5, **options)
    run = medseg.train(*TRAIN, extend=True, iterations=4, validate_every=1, **options)
    record = read_json(fold / "run.json")
    assert [stretch["planned_iterations"] for stretch in record["stretches"]] == [6, 4]
    assert record["iterations"] == 10
    assert [row["iteration"] for row in rows(fold)] == [3, 6, 9, 10]
    assert [row["full_dice"] is None for row in rows(fold)] == [True, True, False, False]
    after = tensors(fold / "weights/final.safetensors")
    assert any(not tensor.equal(before[name]) for name, tensor in after.items())
    assert run.metrics["fold_0"].cases


def assert_same_tensors_as(before, fold):
    for name, tensor in tensors(fold / "weights/final.safetensors").items():
        assert tensor.equal(before[name]), name


def test_several_seeds_give_a_mean_and_a_spread(workspace, recipe):
    options = {"recipe": recipe, "workspace": workspace, "iterations": 1}
    found = train_seeds(2, *TRAIN, seed=5, **options)
    assert [run.path.name.rsplit("__", 1)[1] for run in found.runs.values()] == [
        "tiny_seed5",
        "tiny_seed6",
    ]
    means = [run.metrics["fold_0"].foreground_mean.dice for run in found.runs.values()]
    assert found.dice["mean"].values == pytest.approx(means)
    assert found.dice["mean"].mean == pytest.approx(sum(means) / 2)
    assert found.dice["mean"].std == pytest.approx(abs(means[0] - means[1]) / 2**0.5)
    assert set(found.dice) == {"organ", "lesion", "mean"}
    with pytest.raises(ConfigError, match="at least 2"):
        train_seeds(1, *TRAIN, **options)


def test_one_seed_gives_one_result(workspace, recipe):
    options = {"recipe": recipe, "workspace": workspace, "iterations": 4, "seed": 7}
    first, second = (medseg.train(*TRAIN, name=name, **options).path for name in ("a", "b"))
    name = "fold_0/weights/final.safetensors"
    assert_same_tensors(first / name, second / name)
    other = medseg.train(*TRAIN, name="c", **{**options, "seed": 8}).path
    a, c = tensors(first / name), tensors(other / name)
    assert any(not tensor.equal(c[key]) for key, tensor in a.items())


def test_validation_at_full_volume_goes_into_the_journal_and_chooses_best(workspace, recipe):
    options = {"recipe": recipe, "workspace": workspace, "epochs": 5}
    fold = medseg.train(*TRAIN, validate_every=2, **options).path / "fold_0"
    found = rows(fold)  # every second epoch, and the last
    assert [row["full_dice"] is None for row in found] == [True, False, True, False, False]
    assert set(found[1]["full_dice"]) == {"organ", "lesion"}
    record = read_json(fold / "run.json")
    best = max(row["mean_full_dice"] or 0 for row in found)
    assert record["best_full_dice"] == pytest.approx(best)
    chosen = next(row["iteration"] for row in found if row["mean_full_dice"] == best)
    with safetensors.safe_open(fold / "weights/best.safetensors", "pt") as file:
        assert int(file.metadata()["iteration"]) == chosen
    assert not (fold / ".volumes").exists()


def test_volume_validation_is_that_of_the_final_weights(workspace, recipe):
    """Without mirroring both are the same prediction of the same weights."""
    options = {"recipe": recipe, "workspace": workspace, "set": {"augmentation.mirror_axes": []}}
    run = medseg.train(*TRAIN, name="flat", validate_every=1, **options)
    last = rows(run.path / "fold_0")[-1]
    assert last["mean_full_dice"] == pytest.approx(run.metrics["fold_0"].foreground_mean.dice)


def test_a_run_begins_from_another_model(workspace, recipe, caplog):
    caplog.set_level("INFO", logger="medseg")
    options = {"recipe": recipe, "workspace": workspace}
    source = medseg.train(*TRAIN, name="source", **options)
    still = {"optimizer.lr": 1e-12, "optimizer.weight_decay": 0.0}
    tuned = medseg.train(
        *TRAIN, name="tuned", init_from=source.bundle, set=still, iterations=1, **options
    )
    a = tensors(source.path / "fold_0/weights/final.safetensors")
    b = tensors(tuned.path / "fold_0/weights/final.safetensors")
    assert all(abs(tensor - b[name]).max() < 1e-6 for name, tensor in a.items())
    assert f"{len(a)} taken, 0 adapted, 0 skipped, 0 missing" in caplog.text
    became = read_json(tuned.path / "fold_0/init.json")["tensors"]
    assert {entry["tensor"] for entry in became if entry["became"] == "taken"} == set(a)
    assert read_json(tuned.path / "fold_0/run.json")["init_from"] == str(source.bundle)


def test_a_wider_network_says_what_it_did_not_take(workspace, recipe, caplog):
    caplog.set_level("INFO", logger="medseg")
    options = {"recipe": recipe, "workspace": workspace, "iterations": 1}
    source = medseg.train(*TRAIN, name="source", **options)
    wide = {"network.base_features": 8, "network.max_features": 16}
    medseg.train(*TRAIN, name="wide", init_from=source.bundle, set=wide, **options)
    assert "2 taken, 0 adapted, 46 skipped" in caplog.text
    assert "has shape (3, 8, 1, 1, 1), the network's (3, 16, 1, 1, 1)" in caplog.text
    assert f"--from {source.bundle}" in caplog.text
    with pytest.raises(BundleError, match="nowhere"):
        medseg.train(*TRAIN, name="none", init_from=workspace / "nowhere", **options)
    assert not list(source.path.parent.glob("*none*"))


@pytest.mark.parametrize("repeats_option", [True, False])
def test_a_kill_before_the_first_checkpoint_does_not_lose_the_initial_weights(
    workspace, recipe, monkeypatch, repeats_option
):
    options = {"recipe": recipe, "workspace": workspace, "iterations": 2}
    source = medseg.train(*TRAIN, name="source", **options)
    still = {"set": {"optimizer.lr": 1e-12, "optimizer.weight_decay": 0.0}, "name": "tuned"}

    def killed(folder, iteration, state):
        folder.mkdir(parents=True, exist_ok=True)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(saver, "save_checkpoint", killed)
        with pytest.raises(KeyboardInterrupt):
            medseg.train(*TRAIN, init_from=source.bundle, **options, **still)
    again = {"init_from": source.bundle} if repeats_option else {}
    tuned = medseg.train(*TRAIN, **again, **options, **still)
    a = tensors(source.path / "fold_0/weights/final.safetensors")
    b = tensors(tuned.path / "fold_0/weights/final.safetensors")
    assert all(abs(tensor - b[name]).max() < 1e-6 for name, tensor in a.items())


def test_an_extension_of_several_folds_goes_on_where_it_stopped(workspace, recipe):
    options = {"recipe": recipe, "workspace": workspace}
    run = medseg.train("4", "3d_fullres", "cv", iterations=1, **options)
    seen = []

    def stop_in_the_second(run_of_fold, *args, **kwargs):
        if run_of_fold.fold == "fold_1" and not seen:
            seen.append(1)
            raise KeyboardInterrupt
        return train_fold(run_of_fold, *args, **kwargs)

    from medseg.api import training

    train_fold = training.train_fold
    patch = pytest.MonkeyPatch()
    patch.setattr(training, "train_fold", stop_in_the_second)
    with pytest.raises(KeyboardInterrupt):
        medseg.train("4", "3d_fullres", "cv", extend=True, iterations=2, **options)
    medseg.train("4", "3d_fullres", "cv", extend=True, iterations=2, **options)
    patch.undo()
    done = [read_json(run.path / f"fold_{n}/run.json") for n in range(5)]
    assert [record["iterations"] for record in done] == [3] * 5
    assert [len(record["stretches"]) for record in done] == [2] * 5


def test_a_restart_goes_on_from_nothing_even_if_it_cannot_delete(workspace, recipe, monkeypatch):
    options = {"recipe": recipe, "workspace": workspace, "iterations": 2}
    run = medseg.train(*TRAIN, **options)
    before = tensors(run.path / "fold_0/weights/final.safetensors")

    def fails(path, *args, **kwargs):
        raise PermissionError(f"cannot delete {path}")

    with monkeypatch.context() as patch:
        patch.setattr(fold.shutil, "rmtree", fails)
        with pytest.raises(PermissionError, match="checkpoints"):
            medseg.train(*TRAIN, restart=True, seed=9, **options)
    assert_same_tensors_as(before, run.path / "fold_0")
    assert read_json(run.path / "fold_0/run.json")["seed"] == 0
    medseg.train(*TRAIN, restart=True, seed=9, **options)
    after = tensors(run.path / "fold_0/weights/final.safetensors")
    assert any(not tensor.equal(before[name]) for name, tensor in after.items())


def test_the_fold_is_read_once_it_is_locked(workspace, recipe, monkeypatch):
    """What another process finished while this one began is found, not overwritten."""
    options = {"recipe": recipe, "workspace": workspace, "iterations": 1}
    original, nested = fold.FoldLock.__enter__, []

    def enter(self):
        if not nested:
            nested.append(1)
            medseg.train(*TRAIN, seed=0, **options)
        return original(self)

    monkeypatch.setattr(fold.FoldLock, "__enter__", enter)
    with pytest.raises(ConfigError, match="seed: was 0, now 5"):
        medseg.train(*TRAIN, seed=5, **options)


def test_a_full_disk_costs_a_checkpoint_and_not_the_run(workspace, recipe, monkeypatch, caplog):
    options = {"recipe": recipe, "workspace": workspace, "set": {"checkpoint_minutes": 1e-6}}
    written, full = saver.save_checkpoint, []

    def save(folder, iteration, state):
        if iteration in (2, 3):
            full.append(iteration)
            raise OSError(28, "No space left on device")
        return written(folder, iteration, state)

    monkeypatch.setattr(saver, "save_checkpoint", save)
    run = medseg.train(*TRAIN, **options)
    assert read_json(run.path / "fold_0/run.json")["iterations"] == 6
    assert "no checkpoint of iteration 2 could be written" in caplog.text
    assert set(full) == {2, 3}
