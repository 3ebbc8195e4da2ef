"""Alarms: said where a run goes wrong, at the right epoch, once; silent where it goes well."""

import json
import logging
from pathlib import Path

import numpy as np
import pytest

from medseg.train.alarms import AlarmBell, collapse_alarms
from medseg.train.journal import Journal

JOURNALS = {path.stem: path for path in (Path(__file__).parent / "journals").glob("*.jsonl")}
"""Real ones, of trainings of minutes; those that went wrong were given wrong learning rates."""


def journal(name):
    return [json.loads(line) for line in JOURNALS[name].read_text(encoding="utf-8").splitlines()]


def rows(dice, loss=None, **more):
    """Return the journal of a run of len(dice[...]) epochs; `dice`: name -> values."""
    count = len(next(iter(dice.values())))
    loss = np.linspace(1, -0.8, count) if loss is None else loss
    return [
        {
            "epoch": epoch,
            "iteration": 50 * (epoch + 1),
            "progress": (epoch + 1) / count,
            "train_loss": float(loss[epoch]),
            "patch_dice": {
                name: None if values[epoch] is None else float(values[epoch])
                for name, values in dice.items()
            },
            "skipped_steps": 0,
            **{key: value[epoch] for key, value in more.items()},
        }
        for epoch in range(count)
    ]


def rising(count, start=0.05, end=0.8):
    """Return a healthy curve."""
    share = np.arange(1, count + 1) / count
    return start + (end - start) * (1 - np.exp(-4 * share))


class TestRealRuns:
    @pytest.mark.parametrize("name", ["brain", "hippocampus", "jumpy"])
    def test_runs_that_learn_raise_no_alarm_at_any_epoch(self, name):
        assert collapse_alarms(journal(name)) == []

    def test_a_structure_that_fades_away_is_named_while_it_can_be_helped(self):
        (alarm,) = collapse_alarms(journal("lesion_lost"))
        assert alarm.startswith("epoch 14: 'lesion' has been found before")
        assert "sampling.foreground_from=class" in alarm

    def test_an_explosion_is_named_in_its_first_epoch(self):
        (risen,) = collapse_alarms(journal("exploded"))
        assert risen.startswith("epoch 2: the loss rises instead of falling (first 2.48")
        assert "optimizer.lr" in risen

    def test_a_loss_that_does_not_move_is_named(self):
        (alarm,) = collapse_alarms(journal("standing_still"))
        assert alarm.startswith("epoch 4: the loss has not fallen in 20% of the run")


class TestNeverFound:
    def test_is_said_after_three_tenths_of_the_run(self):
        (alarm,) = collapse_alarms(rows({"liver": rising(20), "cyst": [0.001] * 20}))
        assert alarm.startswith("epoch 6: after 30% of the run 'cyst' has not been found once")
        assert "sampling.foreground_unit=lesion" in alarm

    def test_not_of_a_structure_found_late_but_in_time(self):
        late = [0.0] * 5 + [0.05] + list(rising(14))
        assert collapse_alarms(rows({"liver": rising(20), "cyst": late})) == []

    def test_not_of_a_structure_that_the_patches_do_not_show(self):
        absent = [None] * 20
        falsely_seen_at_times = [None, *[0.0] * 19]
        dice = {"liver": rising(20), "a": absent, "b": falsely_seen_at_times}
        assert collapse_alarms(rows(dice)) == []

    def test_voxels_tell_what_is_absent_and_what_is_predicted(self):
        voxels = [{"cyst": [0, 90], "stone": [70, 0], "node": [70, 12]}] * 20
        dice = {"liver": rising(20), "cyst": [0] * 20, "stone": [0] * 20}
        (alarm,) = collapse_alarms(rows(dice, patch_voxels=voxels))
        assert "'stone' has" in alarm
        assert "(nothing is predicted)" in alarm
        dice = {"liver": rising(20), "node": [0] * 20}
        assert "(12 voxels, all elsewhere)" in collapse_alarms(rows(dice, patch_voxels=voxels))[0]

    def test_many_share_one_sentence(self):
        dice = {"liver": rising(20), **{f"s{number}": [0.0] * 20 for number in range(11)}}
        (alarm,) = collapse_alarms(rows(dice))
        assert "'s0', 's1', 's2', 's3', 's4', 's5', 's6', 's7' and 3 more have not" in alarm

    def test_all_of_them_point_at_the_data(self):
        (alarm,) = collapse_alarms(
            rows({"liver": [0.0] * 20, "cyst": [0.0] * 20, "x": [None] * 20})
        )
        assert "no structure has been found" in alarm
        assert "medseg dataset check" in alarm

    def test_nothing_is_said_of_a_run_of_three_epochs(self):
        assert collapse_alarms(rows({"cyst": [0.0] * 3}, loss=[1, 1, 1])) == []


class TestLost:
    def test_patience_is_longer_in_a_long_run(self):
        for count, epochs in ((20, 3), (1000, 5)):
            dice = np.array([*[0.6] * 10, *[0.0] * (count - 10)])
            (alarm,) = collapse_alarms(rows({"liver": rising(count), "cyst": dice}))
            assert alarm.startswith(f"epoch {10 + epochs}: 'cyst' has been found before")

    def test_a_dip_is_no_loss(self):
        dice = np.array([*[0.6] * 10, 0.0, 0.0, *[0.6] * 8])
        assert collapse_alarms(rows({"cyst": dice})) == []

    @pytest.mark.parametrize("seed", range(5))
    def test_a_structure_that_flickers_is_left_alone(self, seed):
        rng = np.random.default_rng(seed)
        dice = np.where(rng.random(1000) < 0.5, rng.uniform(0.2, 0.6, 1000), 0.0)
        dice[:8] = [0.4, 0.0, 0.0, 0.4, 0.0, 0.0, 0.4, 0.0]
        found = collapse_alarms(rows({"liver": rising(1000), "cyst": dice}))
        assert found == []


class TestLoss:
    def test_skipped_steps_are_counted_within_their_epoch(self):
        skipped = [0, 2, 4, 4, 20, 20, 20, 20]
        found = collapse_alarms(rows({"a": rising(8)}, skipped_steps=skipped))
        assert len(found) == 1
        assert found[0].startswith("epoch 5: 16 of 50 steps had a loss or gradient that is not")

    def test_a_network_that_came_trained_may_stand_still(self):
        flat = np.full(20, -0.7)
        assert collapse_alarms(rows({"a": [None] * 20}, loss=flat)) == []
        (alarm,) = collapse_alarms(rows({"a": [None] * 20}, loss=-flat))
        assert "has not fallen" in alarm

    @pytest.mark.parametrize("seed", range(20))
    @pytest.mark.parametrize("count", [5, 16, 1000])
    def test_noise_on_a_healthy_run_raises_no_alarm(self, seed, count):
        rng = np.random.default_rng([seed, count])
        noise = rng.normal(0, 0.08, (3, count))
        dice = {
            "liver": np.clip(rising(count, end=0.95) + noise[0], 0.05, 1),
            "vessel": np.clip(rising(count, end=0.45) + noise[1], 0.03, 1),
            "bone": [None if rng.random() < 0.1 else 0.5 for _ in range(count)],
        }
        loss = 1.2 - 1.8 * rising(count) + noise[2]
        assert collapse_alarms(rows(dice, loss=loss)) == []


class TestOnce:
    @pytest.mark.parametrize("name", JOURNALS)
    def test_alarms_stay_as_they_are_when_epochs_are_added(self, name):
        whole, before = journal(name), []
        for count in range(len(whole) + 1):
            now = collapse_alarms(whole[:count])
            assert now[: len(before)] == before
            before = now

    def test_bell_rings_once_and_not_again_after_a_resume(self, tmp_path, caplog):
        history = journal("lesion_lost")
        path = tmp_path / "journal.jsonl"
        rung = []
        for first, last in ((0, 15), (15, 20)):  # two processes
            book = Journal(path)
            bell = AlarmBell(book)
            for row in history[first:last]:
                with caplog.at_level(logging.WARNING, "medseg.train.alarms"):
                    bell.on_epoch_end(row)
                book.on_epoch_end(row)
                rung.append(len(row["alarms"]))
        assert rung == [0] * 13 + [1] + [0] * 6
        assert [record.getMessage() for record in caplog.records] == collapse_alarms(history)
        assert Journal(path).rows()[13]["alarms"] == collapse_alarms(history)

    def test_no_rows_no_alarms(self):
        assert collapse_alarms([]) == []

    def test_rows_of_an_older_version_are_understood(self):
        assert collapse_alarms([{"epoch": 0}, {"epoch": 1, "train_loss": None}]) == []
