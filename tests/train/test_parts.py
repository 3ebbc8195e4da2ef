"""Optimisers, schedules, averages, lengths, journals and checkpoints, each by itself."""

from __future__ import annotations

import json
import math
from itertools import pairwise

import pytest
import torch

from medseg.errors import BundleError, ConfigError
from medseg.schema.recipe import OptimizerRecipe, ScheduleRecipe
from medseg.train import checkpoint, schedule
from medseg.train.checkpoint import load_checkpoint, save_checkpoint
from medseg.train.journal import Journal
from medseg.train.optim import Ema, build_optimizer, learning_rate
from medseg.train.schedule import Length


def test_poly_is_that_of_torch_and_nnunet():
    for step in range(11):
        found = learning_rate(ScheduleRecipe(name="poly", power=0.9), 0.01, step / 10)
        assert found == pytest.approx(0.01 * (1 - step / 10) ** 0.9)


def test_cosine_and_constant():
    cosine, constant = ScheduleRecipe(name="cosine"), ScheduleRecipe(name="constant")
    for share, expected in ((0, 1.0), (0.25, 0.5 + math.sqrt(0.125)), (0.5, 0.5), (1, 0.0)):
        assert learning_rate(cosine, 2.0, share) == pytest.approx(2 * expected)
        assert learning_rate(constant, 2.0, share) == 2.0


def test_warm_up_rises_to_the_peak_and_then_the_decay_begins():
    recipe = ScheduleRecipe(name="cosine", warmup=0.2)
    rates = [learning_rate(recipe, 1.0, step / 100) for step in range(101)]
    assert 0 < rates[0] < 0.02
    assert rates[10] == pytest.approx(0.5)
    assert rates[20] == max(rates) == 1.0
    assert rates[60] == pytest.approx(0.5)
    assert all(a < b for a, b in pairwise(rates[:21]))
    assert all(a > b for a, b in pairwise(rates[20:]))
    assert learning_rate(recipe, 1.0, 1.2) == pytest.approx(0.0, abs=1e-12)


def network():
    return torch.nn.Sequential(torch.nn.Conv3d(2, 3, 3), torch.nn.InstanceNorm3d(3, affine=True))


def test_optimisers_and_their_constants():
    parameters = [(list(network().parameters()), 0.5)]
    sgd = build_optimizer(parameters, OptimizerRecipe())
    group = sgd.param_groups[0]
    assert (group["lr"], group["momentum"], group["nesterov"]) == (0.01, 0.99, True)
    assert group["weight_decay"] == 3e-5
    assert (len(group["params"]), group["factor"]) == (4, 0.5)
    adam = build_optimizer(parameters, OptimizerRecipe(name="adam", beta2=0.95))
    assert adam.param_groups[0]["betas"] == (0.9, 0.95)
    adamw = build_optimizer(parameters, OptimizerRecipe(name="adamw", weight_decay=0.1))
    assert [(len(g["params"]), g["weight_decay"]) for g in adamw.param_groups] == [(1, 0.1), (3, 0)]
    with pytest.raises(
        ConfigError, match=r"expected one of: sgd, adam, adamw.* Did you mean 'sgd'"
    ):
        build_optimizer(parameters, OptimizerRecipe(name="sgdd"))


def test_average_follows_its_recursion():
    model = network()
    ema = Ema(model, decay=0.8)
    expected = {k: v.clone().double() for k, v in model.state_dict().items()}
    generator = torch.Generator().manual_seed(0)
    for update in range(1, 60):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator))
        ema.update(model)
        decay = min(0.8, (1 + update) / (10 + update))
        for name, value in model.state_dict().items():
            expected[name] = decay * expected[name] + (1 - decay) * value.double()
    for name, value in ema.tensors.items():
        torch.testing.assert_close(value.double(), expected[name], atol=1e-4, rtol=1e-4)


def test_average_copies_what_cannot_be_averaged():
    model = torch.nn.BatchNorm1d(2)
    ema = Ema(model, decay=0.5)
    model(torch.randn(4, 2))
    ema.update(model)
    assert int(ema.tensors["num_batches_tracked"]) == 1


class Clock:
    """A clock that a test turns."""

    def __init__(self):
        self.now = 1000.0

    def monotonic(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(schedule.time, "monotonic", clock.monotonic)
    return clock


def test_length_in_iterations():
    length = Length(num_iterations=4)
    shares = []
    while not length.is_done():
        length.advance()
        shares.append(length.progress)
    assert shares == [0.25, 0.5, 0.75, 1.0]
    assert length.estimated_iterations() == 4


@pytest.mark.parametrize("both", [{}, {"num_iterations": 3, "budget_seconds": 5.0}])
def test_length_is_one_or_the_other(both):
    with pytest.raises(ValueError, match="either num_iterations or budget_seconds"):
        Length(**both)


def spend(length, clock, seconds):
    """Advance to the end and return the share after each iteration."""
    shares = [length.progress]
    while not length.is_done():
        clock.now += seconds(length.iteration)
        length.advance()
        shares.append(length.progress)
        assert len(shares) < 10_000
    return shares


def test_budget_at_even_speed_gives_an_even_schedule(clock):
    length = Length(budget_seconds=100.0, started=clock.now)
    shares = spend(length, clock, lambda _: 0.5)
    assert 98.0 <= clock.now - 1000 <= 100.0
    assert len(shares) - 1 == pytest.approx(200, abs=4)
    steps = [b - a for a, b in pairwise(shares[5:])]
    assert max(steps) < 2 * min(steps) + 0.01
    assert shares == sorted(shares)
    assert shares[-1] == 1.0


@pytest.mark.parametrize(
    "seconds",
    [
        lambda k: 0.5 if k < 60 else 1.5,
        lambda k: 1.5 if k < 20 else 0.3,
        lambda k: 20.0 if k == 0 else 0.5,
        lambda k: 0.5 + 5 * (k % 25 == 24),
    ],
    ids=["slows", "speeds up", "slow start", "validates"],
)
def test_budget_holds_when_the_speed_changes(clock, seconds):
    length = Length(budget_seconds=100.0, started=clock.now)
    shares = spend(length, clock, seconds)
    assert clock.now - 1000 <= 101.5
    assert clock.now - 1000 > 85
    assert shares[-2] > 0.8  # the schedule had come close to its end by itself


def test_budget_that_is_over_already_ends_at_once(clock):
    length = Length(budget_seconds=5.0, started=clock.now - 60)
    length.advance()
    assert length.is_done()


def test_time_of_earlier_processes_counts(clock):
    length = Length(budget_seconds=100.0, started=clock.now, spent_before=60.0)
    length.progress, length.seconds_per_iteration = 0.6, 0.5
    shares = spend(length, clock, lambda _: 0.5)
    assert 37 <= clock.now - 1000 <= 40
    assert shares[1] > 0.6
    assert length.elapsed_seconds() == pytest.approx(clock.now - 1000 + 60)


def test_journal_is_cut_back_to_the_checkpoint(tmp_path):
    journal = Journal(tmp_path / "deep" / "journal.jsonl")
    assert journal.rows() == []
    for epoch in range(5):
        journal.on_epoch_end({"epoch": epoch, "dice": None})
    with journal.path.open("a") as file:
        file.write('{"epoch": 5, "di')
    assert [row["epoch"] for row in journal.rows()] == [0, 1, 2, 3, 4]
    journal.cut_back(3)
    assert journal.path.read_text() == "".join(
        f'{{"epoch": {epoch}, "dice": null}}\n' for epoch in range(3)
    )
    journal.cut_back(0)
    assert journal.path.read_text() == ""


def make_state(value):
    weights = torch.full((2, 3), float(value))
    return {
        "network": {"a.weight": weights, "view": weights.t()},
        "optimizer": {
            "state": {0: {"step": torch.tensor(3.0), "none": None}},
            "groups": [{"lr": 1}],
        },
        "ema": None,
        "epoch": value,
        "dice": 0.1 + 0.2,
    }


def test_checkpoint_gives_back_the_state(tmp_path):
    """Shared and transposed tensors, integer keys, nested lists, exact floats."""
    save_checkpoint(tmp_path / "checkpoints", 7, make_state(7))
    found = load_checkpoint(tmp_path / "checkpoints")
    expected = make_state(7)
    assert found.keys() == expected.keys()
    assert found["network"]["view"].equal(expected["network"]["view"])
    assert found["optimizer"]["state"][0]["step"] == 3.0
    assert found["optimizer"]["groups"] == [{"lr": 1}]
    assert (found["ema"], found["epoch"], found["dice"]) == (None, 7, 0.1 + 0.2)


def test_the_newest_two_are_kept(tmp_path):
    for iteration in (5, 90, 1000, 100000):
        save_checkpoint(tmp_path, iteration, make_state(iteration))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["00001000", "00100000"]
    assert load_checkpoint(tmp_path)["epoch"] == 100000


def test_no_checkpoint_is_none(tmp_path):
    assert load_checkpoint(tmp_path / "none") is None
    (tmp_path / ".5.abc.part").mkdir()
    assert load_checkpoint(tmp_path) is None


@pytest.mark.parametrize("file", ["state.json", "tensors.safetensors"])
@pytest.mark.parametrize("damage", ["cut", "remove"])
def test_a_damaged_checkpoint_is_said_and_the_one_before_taken(tmp_path, caplog, file, damage):
    for iteration in (5, 6):
        save_checkpoint(tmp_path, iteration, make_state(iteration))

    def spoil(number):
        path = tmp_path / number / file
        content = path.read_bytes()
        path.unlink()
        if damage == "cut":
            path.write_bytes(content[: len(content) // 2])

    spoil("00000006")
    assert load_checkpoint(tmp_path)["epoch"] == 5
    assert "00000006: damaged checkpoint" in caplog.text
    spoil("00000005")
    with pytest.raises(BundleError, match=r"06: damaged(.|\n)*05: damaged.*\n.*restart"):
        load_checkpoint(tmp_path)


def test_what_killed_processes_left_half_written_is_swept_away(tmp_path):
    (tmp_path / ".7.abc.part").mkdir(parents=True)
    (tmp_path / ".7.abc.part" / "tensors.safetensors").write_bytes(b"half")
    save_checkpoint(tmp_path, 8, make_state(8))
    assert [path.name for path in tmp_path.iterdir()] == ["00000008"]


def test_state_that_names_a_missing_tensor_is_damaged(tmp_path):
    save_checkpoint(tmp_path, 6, {"a": torch.ones(2)})
    path = tmp_path / "00000006/state.json"
    path.write_text(json.dumps({"items": [["a", {"tensor": "/b"}]]}))
    with pytest.raises(BundleError, match="damaged checkpoint"):
        load_checkpoint(tmp_path)


def test_failed_write_keeps_the_checkpoint_before(tmp_path, monkeypatch):
    save_checkpoint(tmp_path, 5, make_state(5))

    def fail(*arguments):
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_weights", fail)
        with pytest.raises(OSError, match="no space"):
            save_checkpoint(tmp_path, 6, make_state(6))
    assert [path.name for path in tmp_path.iterdir()] == ["00000005"]
    assert load_checkpoint(tmp_path)["epoch"] == 5
