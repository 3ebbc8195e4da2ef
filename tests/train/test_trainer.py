"""A run learns, goes on exactly where it stopped, and survives a bad step."""

from __future__ import annotations

import json
from contextlib import closing
from dataclasses import replace
from itertools import islice, pairwise

import numpy as np
import pytest
import torch

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
    scores = run.trainer.validate(run.validation(3))
    dice, loss = scores.dice, scores.loss
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
    with closing(run.samples()) as source:
        for samples in islice(source, 10):
            before = {k: v.clone() for k, v in run.trainer.network.state_dict().items()}
            skipped = run.trainer.watch.total
            losses.append(float(run.trainer.step(samples)))
            changed = any(
                not v.equal(before[k]) for k, v in run.trainer.network.state_dict().items()
            )
            assert changed == ("case_1" not in samples.case_ids)
            assert (run.trainer.watch.total > skipped) == ("case_1" in samples.case_ids)
    assert 0 < run.trainer.watch.total < 10
    assert np.isfinite(losses).all()
    assert run.trainer.length.iteration == 10


def test_divergence_stops_the_run_and_names_the_cases(tiny):
    run = tiny(recipe(epochs=50), cases=1, spoil=["case_0"])
    with pytest.raises(MedsegError, match="training diverged: 20 steps in a row") as caught:
        run.steps(50)
    assert "case_0" in str(caught.value)
    assert "optimizer.lr" in str(caught.value)


def run_loop(run, journal, *, stop_after=None, saved=None):
    """Run the loop; `stop_after` ends it by an interruption after that step's checkpoint."""

    def save():
        if stop_after is not None and run.trainer.length.iteration >= stop_after:
            save_checkpoint(saved, run.trainer.length.iteration, run.trainer.state_dict())
            raise KeyboardInterrupt

    with closing(run.samples()) as source:
        train(
            run.trainer,
            samples=source,
            validation_samples=run.validation,
            validate_volumes=lambda trainer: None,
            observers=[journal],
            save=save,
            on_step=lambda trainer: None,
        )


def without_times(rows):
    return [{k: v for k, v in row.items() if "seconds" not in k and k != "session"} for row in rows]


@pytest.mark.parametrize("stop_after", [1, 3, 4, 5, 11, 12])
def test_interrupted_loop_writes_the_same_journal(tiny, tmp_path, stop_after):
    """Stopped after any step: within an epoch, before or after it is judged, at the very end."""
    whole, journal = tiny(recipe()), Journal(tmp_path / "whole.jsonl")
    run_loop(whole, journal)
    first, parts = tiny(recipe()), Journal(tmp_path / "parts.jsonl")
    with pytest.raises(KeyboardInterrupt):
        run_loop(first, parts, stop_after=stop_after, saved=tmp_path / "saved")
    second = tiny(recipe())
    second.trainer.load_state_dict(load_checkpoint(tmp_path / "saved"))
    parts.cut_back(second.trainer.epoch)
    run_loop(second, parts)
    assert without_times(parts.rows()) == without_times(journal.rows())
    assert [row["epoch"] for row in parts.rows()] == [0, 1, 2]
    assert parts.rows()[-1]["session"] == 2
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
        found.append((round(row["smoothed_patch_dice"], 4), trainer.best.is_now))
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


def test_an_extended_run_goes_on_with_a_new_schedule(tiny, tmp_path):
    """Patches and epochs are counted on; the rate rises again, and ends at 0 again."""
    run, journal = tiny(recipe("sgd")), Journal(tmp_path / "journal.jsonl")
    run_loop(run, journal)
    assert run.trainer.learning_rate == 0
    run.trainer.length.num_iterations = 40
    run.trainer.begin_stretch()
    rates = []
    while not run.trainer.length.is_done():
        rates.append(run.trainer.learning_rate)
        run.steps(1)
    assert run.trainer.length.iteration == 12 + 40
    assert len(rates) == 40
    assert rates[0] < 0.001
    assert max(rates) == rates[2] == pytest.approx(0.01)
    assert all(later < earlier for earlier, later in pairwise(rates[2:]))


def test_an_interrupted_extension_goes_on_where_it_stopped(tiny, tmp_path):
    def extended(run):
        run.steps(12)
        run.trainer.length.num_iterations = 7
        run.trainer.begin_stretch()
        return run

    whole = extended(tiny(recipe()))
    losses = whole.steps(7)
    first = extended(tiny(recipe()))
    assert first.steps(3) == losses[:3]
    save_checkpoint(tmp_path, 15, first.trainer.state_dict())
    second = tiny(recipe(), length=Length(num_iterations=7))
    second.trainer.load_state_dict(load_checkpoint(tmp_path))
    assert second.steps(4) == losses[3:]
    assert second.trainer.length.is_done()
    assert second.trainer.num_stretches == 2
    assert_same_state(second.trainer, whole.trainer)


def test_a_skipped_first_step_leaves_no_trace(tiny):
    """The fused optimisers allocate their averages at the first step."""
    for name in RECIPES:
        run = tiny(recipe(name), cases=1)
        with closing(run.samples()) as source:
            samples = next(source)
        before = {k: v.clone() for k, v in run.trainer.network.state_dict().items()}
        run.trainer.step(replace(samples, images=samples.images * float("nan")))
        after = run.trainer.network.state_dict()
        assert all(value.equal(after[key]) for key, value in before.items())
        fresh = tiny(recipe(name), cases=1)
        fresh.trainer.length.iteration = run.trainer.length.iteration
        fresh.trainer.length.progress = run.trainer.length.progress
        for each in (run, fresh):
            each.trainer.step(samples)
        assert_same_state(run.trainer, fresh.trainer)


def test_a_frozen_encoder_rests_for_its_share_of_the_run(tiny):
    options = {"name": "adamw", "lr": 0.01, "freeze_encoder": 0.5, "layer_decay": 0.5}
    run = tiny(recipe(optimizer=options))
    network = run.trainer.network
    start = {k: v.clone() for k, v in network.state_dict().items()}
    run.steps(6)

    def moved(part):
        return [
            key for key, value in network.state_dict().items()
            if key.startswith(part) and not value.equal(start[key])
        ]  # fmt: skip

    assert moved("decoder")
    assert not moved("encoder")
    run.steps(6)
    assert moved("encoder")


def test_layers_far_from_the_logits_learn_slower(tiny):
    run = tiny(recipe(optimizer={"name": "sgd", "lr": 0.01, "layer_decay": 0.5}))
    run.steps(1)
    rates = {group["lr"] for group in run.trainer.optimizer.param_groups}
    assert max(rates) == pytest.approx(0.01)
    assert min(rates) < 0.01 * 0.5**4
    parameters = [p for group in run.trainer.optimizer.param_groups for p in group["params"]]
    assert len(parameters) == len(list(run.trainer.network.parameters()))


def test_validation_at_full_volume_chooses_the_best_once_it_is_taken(tiny):
    best = tiny(recipe()).trainer.best
    found = []
    for patch, full in ((0.5, None), (0.6, 0.3), (0.9, None), (0.1, 0.4), (0.9, 0.35)):
        best.note({"mean_patch_dice": patch, "mean_full_dice": full})
        found.append(best.is_now)
    assert found == [True, True, False, True, False]


def test_the_shares_of_time_are_told(tiny, tmp_path):
    run, journal = tiny(recipe()), Journal(tmp_path / "journal.jsonl")
    run_loop(run, journal)
    for row in journal.rows():
        parts = [row[f"{name}_seconds"] for name in ("wait", "augment", "forward", "backward")]
        assert all(part > 0 for part in parts[1:])
        assert sum(parts) <= row["seconds"] + 0.01


def test_a_skipped_step_leaves_averages_and_running_statistics_alone(tiny):
    run = tiny(recipe("adamw", ema=0.9))
    network = run.trainer.network
    network.register_buffer("running_mean", torch.zeros(2))
    run.trainer = type(run.trainer)(run.recipe, run.trainer.parts, Length(num_iterations=12))
    forward = run.trainer.forward

    def counting(images):
        network.running_mean.add_(images.mean((0, 2, 3, 4)))
        return forward(images)

    run.trainer.forward = counting
    run.steps(2)
    before = {k: v.clone() for k, v in run.trainer.weights().items()}
    with closing(run.samples()) as source:
        samples = next(source)
    run.trainer.step(replace(samples, images=samples.images * float("nan")))
    for name, tensor in run.trainer.weights().items():
        assert tensor.equal(before[name]), name
    assert torch.isfinite(network.running_mean).all()
    run.trainer.step(samples)
    assert any(not t.equal(before[name]) for name, t in run.trainer.weights().items())


def test_the_mean_loss_is_that_of_the_finite_steps(tiny):
    run = tiny(recipe(), cases=1)
    with closing(run.samples()) as source:
        first, second, third = (next(source) for _ in range(3))
    losses = [float(run.trainer.step(samples)) for samples in (first, second)]
    run.trainer.step(replace(third, images=third.images * float("inf")))
    assert run.trainer.mean_loss() == pytest.approx(np.mean(losses))
    assert run.trainer.step_in_epoch == 3


def test_one_bad_step_in_a_short_last_epoch_does_not_end_the_run(tiny, tmp_path):
    run = tiny(recipe(), length=Length(num_iterations=5), cases=1)
    original = run.samples

    def spoiled():
        for number, samples in enumerate(original()):
            bad = number == 4
            yield replace(samples, images=samples.images * float("nan")) if bad else samples

    run.samples = spoiled
    journal = Journal(tmp_path / "journal.jsonl")
    run_loop(run, journal)
    assert [row["skipped_steps"] for row in journal.rows()] == [0, 1]


def test_a_run_of_less_than_two_epochs_lowers_its_rate_all_the_same(tiny):
    run = tiny(recipe("sgd", schedule={"name": "poly", "per": "epoch"}, epochs=1))
    rates = []
    for _ in range(4):
        rates.append(run.trainer.learning_rate)
        run.steps(1)
    assert rates == pytest.approx([0.01 * (1 - step / 4) ** 0.9 for step in range(4)])


def test_an_extension_does_not_rest_the_encoder_again(tiny):
    options = {"name": "adamw", "lr": 0.01, "freeze_encoder": 0.5}
    run = tiny(recipe(optimizer=options), length=Length(num_iterations=2))
    run.steps(2)
    run.trainer.begin_stretch()
    start = {k: v.clone() for k, v in run.trainer.network.state_dict().items()}
    run.steps(1)
    state = run.trainer.network.state_dict()
    assert any(not v.equal(start[k]) for k, v in state.items() if k.startswith("encoder"))
