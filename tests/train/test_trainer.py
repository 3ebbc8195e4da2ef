"""A run learns, goes on exactly where it stopped, and survives a bad step."""

from __future__ import annotations

import json
from contextlib import closing
from itertools import islice

import numpy as np
import pytest
import torch

from medseg.data.loader import batches
from medseg.errors import MedsegError
from medseg.schema.recipe import Recipe
from medseg.train.checkpoint import load_checkpoint, save_checkpoint
from medseg.train.journal import Journal
from medseg.train.loop import train
from medseg.train.schedule import Length

RECIPES = {
    "sgd": {"name": "sgd", "lr": 0.01},
    "adam": {"name": "adam", "lr": 0.003},
    "adamw": {"name": "adamw", "lr": 0.003, "weight_decay": 0.01},
}


def recipe(name="adamw", **changes):
    values = {
        "epochs": 3,
        "iterations_per_epoch": 4,
        "optimizer": RECIPES[name],
        "schedule": {"name": "poly", "per": "iteration"},
        "precision": "fp32",
    }
    return Recipe(**{**values, **changes})


def assert_same_state(a, b):
    for name, tensor in a.network.state_dict().items():
        assert tensor.equal(b.network.state_dict()[name]), name
    for name, tensor in a.weights().items():
        assert tensor.equal(b.weights()[name]), name


def test_loss_decreases(tiny):
    run = tiny(recipe(epochs=20, iterations_per_epoch=3))
    losses = run.steps(60)
    assert np.mean(losses[-10:]) < np.mean(losses[:10]) - 0.3
    dice, loss = run.trainer.validate(run.validation(3))
    assert set(dice) == {"organ", "lesion"}
    assert dice["organ"] > 0.5
    assert np.isfinite(loss)


@pytest.mark.parametrize("optimizer", RECIPES)
@pytest.mark.parametrize("ema", [None, 0.9])
def test_resuming_gives_the_numbers_of_the_uninterrupted_run(tiny, tmp_path, optimizer, ema):
    """Through a checkpoint on disk, bit for bit: losses, weights and their average."""
    chosen = recipe(optimizer, ema=ema)
    whole = tiny(chosen)
    losses = whole.steps(12)
    first = tiny(chosen)
    assert first.steps(5) == losses[:5]
    save_checkpoint(tmp_path, 5, first.trainer.state_dict())
    second = tiny(chosen, seed=3)
    with torch.no_grad():
        for parameter in second.trainer.network.parameters():
            parameter.fill_(9.0)  # whatever a new process starts with is replaced
    second.trainer.load_state_dict(load_checkpoint(tmp_path))
    assert second.trainer.length.iteration == 5
    assert second.steps(7) == losses[5:]
    assert_same_state(second.trainer, whole.trainer)


def test_averages_keep_the_memory_layout_of_their_parameters(tiny, tmp_path):
    """Fused optimisers pair values by place in memory; a checkpoint stores plain order."""
    run = tiny(recipe("adamw"))
    run.steps(2)
    save_checkpoint(tmp_path, 2, run.trainer.state_dict())
    other = tiny(recipe("adamw"))
    other.trainer.load_state_dict(load_checkpoint(tmp_path))
    for parameter, state in other.trainer.optimizer.state.items():
        assert state["exp_avg"].stride() == parameter.stride()
        assert state["exp_avg_sq"].stride() == parameter.stride()


def test_steps_that_are_not_finite_are_skipped_and_counted(tiny):
    run = tiny(recipe(), cases=2, spoil=["case_1"])
    before, losses = [], []
    with closing(batches(run.sampler, first=0)) as source:
        for batch in islice(source, 10):
            before = {k: v.clone() for k, v in run.trainer.network.state_dict().items()}
            skipped = run.trainer.num_skipped
            losses.append(float(run.trainer.step(batch)))
            changed = any(
                not v.equal(before[k]) for k, v in run.trainer.network.state_dict().items()
            )
            assert changed == ("case_1" not in batch.case_ids)
            assert (run.trainer.num_skipped > skipped) == ("case_1" in batch.case_ids)
    assert 0 < run.trainer.num_skipped < 10
    assert np.isfinite(losses).all()
    assert run.trainer.length.iteration == 10


def test_divergence_stops_the_run_and_names_the_cases(tiny):
    run = tiny(recipe(epochs=50), cases=1, spoil=["case_0"])
    with pytest.raises(MedsegError, match="training diverged: 20 steps in a row") as caught:
        run.steps(50)
    assert "case_0" in str(caught.value)
    assert "optimizer.lr" in str(caught.value)


def run_loop(run, journal, *, stop_after=None, saved=None):
    """Run the loop; `stop_after` ends it by an interruption after that epoch's checkpoint."""

    def save():
        if saved is not None:
            save_checkpoint(saved, run.trainer.length.iteration, run.trainer.state_dict())
        if stop_after is not None and run.trainer.epoch >= stop_after:
            raise KeyboardInterrupt

    with closing(batches(run.sampler, first=run.trainer.length.iteration)) as source:
        train(
            run.trainer,
            batches=source,
            validation_batches=run.validation,
            observers=[journal],
            save_checkpoint=save,
            on_iteration=lambda loss: None,
        )


def without_times(rows):
    return [{k: v for k, v in row.items() if "seconds" not in k} for row in rows]


def test_interrupted_loop_writes_the_same_journal(tiny, tmp_path):
    whole, journal = tiny(recipe()), Journal(tmp_path / "whole.jsonl")
    run_loop(whole, journal)
    first, parts = tiny(recipe()), Journal(tmp_path / "parts.jsonl")
    with pytest.raises(KeyboardInterrupt):
        run_loop(first, parts, stop_after=1, saved=tmp_path / "saved")
    second = tiny(recipe())
    second.trainer.load_state_dict(load_checkpoint(tmp_path / "saved"))
    parts.cut_back(second.trainer.epoch)
    run_loop(second, parts)
    assert without_times(parts.rows()) == without_times(journal.rows())
    assert [row["epoch"] for row in parts.rows()] == [0, 1, 2]
    assert_same_state(second.trainer, whole.trainer)
    row = parts.rows()[-1]
    assert row["progress"] == 1.0
    assert row["mean_patch_dice"] == pytest.approx(np.mean(list(row["patch_dice"].values())))


def test_best_is_chosen_by_the_smoothed_dice(tiny):
    trainer = tiny(recipe()).trainer
    found = []
    for mean in (0.5, 0.4, 0.9, None, 0.9):
        row = {"mean_patch_dice": mean, "elapsed_seconds": 0.0, "skipped_steps": 0}
        trainer.end_epoch(row)
        found.append((round(row["smoothed_patch_dice"], 4), trainer.is_best))
    assert found == [(0.5, True), (0.49, False), (0.531, True), (0.531, False), (0.5679, True)]


def test_rate_changes_once_an_epoch_or_every_iteration(tiny):
    for per, expected in (("epoch", [0, 0, 0, 0]), ("iteration", [0, 1, 2, 3])):
        chosen = recipe("sgd", schedule={"name": "poly", "per": per}, epochs=2)
        run = tiny(chosen)
        rates = []
        for _ in range(4):
            rates.append(run.trainer.learning_rate)
            run.steps(1)
        wanted = [0.01 * (1 - step / 8) ** 0.9 for step in expected]
        assert rates == pytest.approx(wanted)


def test_a_run_stops_in_the_middle_of_an_epoch_when_its_length_is_reached(tiny, tmp_path):
    run = tiny(recipe(), length=Length(num_iterations=6))
    journal = Journal(tmp_path / "journal.jsonl")
    run_loop(run, journal)
    assert [row["iteration"] for row in journal.rows()] == [4, 6]
    assert json.loads(json.dumps(journal.rows()))[-1]["progress"] == 1.0
