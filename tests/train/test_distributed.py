"""Several processes do what one does: two of them, joined through gloo on the CPU."""

from __future__ import annotations

import json
import multiprocessing
import runpy
import time
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import torch

from medseg.errors import ConfigError, MedsegError
from medseg.losses.deep_supervision import build_loss
from medseg.models.weights import load_weights, save_weights
from medseg.schema.recipe import Recipe
from medseg.train import distributed
from medseg.train.distributed import (
    LostProcessError,
    Processes,
    current,
    from_environment,
    joined,
    silent_parameters,
)
from medseg.train.schedule import Length

HERE = Path(__file__)
STEPS = 10
OPTIMIZERS = {
    "sgd": {"name": "sgd", "lr": 0.01},
    "adamw": {"name": "adamw", "lr": 0.003, "weight_decay": 0.01},
}
VARIANTS = {
    "batch of 4": {"batch_size": 4, "batch_dice": False},
    "batch of 4, batch Dice": {"batch_size": 4, "batch_dice": True},
    "uneven batch": {"batch_size": 3, "batch_dice": False},
    "uneven batch, batch Dice": {"batch_size": 3, "batch_dice": True},
    "encoder frozen at first": {"batch_size": 3, "batch_dice": True, "freeze": 0.45},
    "adamw": {"batch_size": 3, "batch_dice": True, "optimizer": "adamw"},
}


def build(variant, processes):
    """Return a tiny run with the real network, augmentation, sampler, loss and trainer."""
    tiny_run = runpy.run_path(str(HERE.with_name("conftest.py")))["TinyRun"]
    optimizer = {
        **OPTIMIZERS[variant.get("optimizer", "sgd")],
        "freeze_encoder": variant.get("freeze", 0),
    }
    recipe = Recipe(
        epochs=1,
        iterations_per_epoch=STEPS,
        optimizer=optimizer,
        schedule={"name": "poly", "per": "iteration"},
        precision="fp32",
        ema=0.9,
    )
    run = tiny_run(recipe)
    parts = replace(
        run.trainer.parts,
        loss=build_loss("dice_ce", batch_dice=variant["batch_dice"], has_regions=False),
        processes=processes,
    )
    run.trainer = type(run.trainer)(recipe, parts, Length(num_iterations=STEPS))
    size = variant["batch_size"]
    run.sampler = replace(run.sampler, batch_size=size, positions=processes.positions(size))
    return run


def trained(variant, processes):
    """Return losses, weights, moving average and patch validation after some steps."""
    run = build(variant, processes)
    losses = run.steps(STEPS)
    scores = run.trainer.validate(run.validation(3))
    dice, validation_loss = scores.dice, scores.loss
    return {
        "losses": torch.tensor(losses, dtype=torch.float64),
        "validation": torch.tensor([*dice.values(), validation_loss], dtype=torch.float64),
        **{f"weights.{name}": t for name, t in run.trainer.network.state_dict().items()},
        **{f"average.{name}": t for name, t in run.trainer.weights().items()},
    }


def said(processes):
    """Return what the two processes tell each other."""
    length = Length(budget_seconds=1e4)
    length.progress = 0.125 * (processes.rank + 1)
    processes.agree(length)
    made = []
    value = processes.from_main(lambda: made.append(1) or {"organ": 0.5, "lesion": None})
    return {
        "progress": length.progress,
        "any": [processes.any(False), processes.any(processes.rank == 1), processes.any(True)],
        "largest": processes.largest(-3 - processes.rank),
        "sum": processes.sum_over(torch.tensor([1.0, processes.rank])).tolist(),
        "value": value,
        "times made": len(made),
        "current": [current().count, current().rank],
        "refusal": refusal(processes),
        "failure": failure(processes),
    }


def refusal(processes):
    """Return the complaint about weights that differ in their last bit."""
    network = torch.nn.Linear(2, 2)
    torch.nn.init.ones_(network.weight)
    torch.nn.init.zeros_(network.bias)
    processes.require_same_weights(network)
    with torch.no_grad():
        network.weight[1, 0] += processes.rank * 1.2e-7
    try:
        processes.require_same_weights(network)
    except MedsegError as error:
        return str(error)
    return None


def failure(processes):
    """Return the name of what is raised where the main process cannot make a value."""
    try:
        processes.from_main(lambda: {}["nothing"])
    except Exception as error:
        return type(error).__name__
    return None


def lose(processes):
    """Return the complaint of the main process when the other one dies in the middle of a step."""
    network = torch.nn.Linear(3, 2)
    network.weight.data.fill_(0.5), network.bias.data.fill_(0.0)
    forward = processes.wrap(network)
    forward(torch.ones(1, 3)).sum().backward()
    if not processes.is_main:
        import os

        os._exit(5)
    for _ in range(3):
        forward(torch.ones(1, 3)).sum().backward()


def work(rank, folder):
    """Do everything the tests look at, as process `rank` of two; the last thing ends process 1."""
    torch.set_num_threads(1)
    folder, processes = Path(folder), Processes(2, rank, rank)
    device, meeting = torch.device("cpu"), f"file://{folder}/meeting"
    try:
        with joined(processes, device, meeting=meeting):
            for name, variant in VARIANTS.items():
                save_weights(folder / f"{rank}.{name}", trained(variant, processes), {})
            (folder / f"{rank}.json").write_text(json.dumps(said(processes)))
            lose(processes)
    except LostProcessError as error:
        (folder / f"{rank}.lost").write_text(str(error))


@pytest.fixture(scope="module")
def two(tmp_path_factory, one_thread):
    """The folder in which two processes left what they found."""
    folder = tmp_path_factory.mktemp("two")
    context = multiprocessing.get_context("spawn")
    # The target must be importable from anywhere, so it is the standard library's.
    children = [
        context.Process(target=runpy.run_path, args=(str(HERE), {"START": (rank, str(folder))}))
        for rank in range(2)
    ]
    for child in children:
        child.start()
    for child in children:
        child.join(120)
        if child.is_alive():
            child.kill()
    assert [child.exitcode for child in children] == [0, 5]
    return folder


class TestEquivalence:
    @pytest.mark.parametrize("name", VARIANTS)
    def test_two_processes_give_the_numbers_of_one(self, two, name):
        alone = trained(VARIANTS[name], Processes())
        for rank in range(2):
            found = load_weights(two / f"{rank}.{name}")
            assert set(found) == set(alone)
            np.testing.assert_allclose(found["losses"], alone["losses"], atol=1e-4, rtol=0)
            ours, expected = (one["validation"][-1] for one in (found, alone))
            np.testing.assert_allclose(ours, expected, atol=1e-4, rtol=0)
            if name == "adamw":
                # A bias before a norm has no gradient but rounding, which AdamW makes steps of;
                # such weights differ, and a voxel between two labels may change its side.
                continue
            np.testing.assert_allclose(found["validation"], alone["validation"], atol=1e-5, rtol=0)
            for key in alone:
                np.testing.assert_allclose(found[key], alone[key], atol=1e-5, rtol=0, err_msg=key)

    @pytest.mark.parametrize("name", VARIANTS)
    def test_both_processes_hold_the_same_bits(self, two, name):
        first, second = (load_weights(two / f"{rank}.{name}") for rank in range(2))
        assert [key for key in first if not first[key].equal(second[key])] == []

    def test_the_comparison_would_notice_losses_of_the_shares(self, two):
        """What the mean of the gradients of each share's own loss gives is far from the above."""
        variant = VARIANTS["uneven batch, batch Dice"]
        whole = load_weights(two / "0.uneven batch, batch Dice")
        shares = [build(variant, Processes()) for _ in range(2)]
        for rank, run in enumerate(shares):
            run.sampler = replace(run.sampler, positions=Processes(2, rank).positions(3))
        losses = [run.steps(1)[0] for run in shares]
        assert abs(np.mean(losses) - float(whole["losses"][0])) > 1e-3

    def test_weights_move_but_for_those_without_gradient(self, two):
        run = build(VARIANTS["batch of 4"], Processes())
        before = run.trainer.network.state_dict()
        after = load_weights(two / "0.batch of 4")
        still = [name for name in before if before[name].equal(after[f"weights.{name}"])]
        assert set(still) == {"decoder.seg_layers.0.weight", "decoder.seg_layers.0.bias"}
        assert silent_parameters(run.trainer.network, torch.randn(1, 2, 8, 16, 12)) == still

    def test_without_deep_supervision_no_lower_logits_learn(self, two):
        network = build(VARIANTS["batch of 4"], Processes()).trainer.network
        network.deep_supervision = False
        silent = silent_parameters(network, torch.randn(1, 2, 8, 16, 12))
        assert {name.rpartition(".")[0] for name in silent} == {"decoder.seg_layers.0"}
        assert network.training


class TestConversation:
    @pytest.fixture
    def said(self, two):
        return [json.loads((two / f"{rank}.json").read_text()) for rank in range(2)]

    def test_the_place_in_the_schedule_is_that_of_the_main_process(self, said):
        assert [one["progress"] for one in said] == [0.125, 0.125]

    def test_one_flag_is_seen_by_all(self, said):
        assert [one["any"] for one in said] == [[False, True, True]] * 2
        assert [one["largest"] for one in said] == [-3, -3]

    def test_sums_span_the_processes(self, said):
        assert [one["sum"] for one in said] == [[2.0, 1.0]] * 2

    def test_a_value_is_made_once_and_known_to_all(self, said):
        assert [one["value"] for one in said] == [{"organ": 0.5, "lesion": None}] * 2
        assert [one["times made"] for one in said] == [1, 0]

    def test_a_value_that_cannot_be_made_fails_everywhere(self, said):
        assert [one["failure"] for one in said] == ["KeyError", "LostProcessError"]

    def test_each_process_knows_itself(self, said):
        assert [one["current"] for one in said] == [[2, 0], [2, 1]]

    def test_weights_that_differ_in_one_bit_are_refused_by_both(self, said):
        for one in said:
            assert "different weights" in one["refusal"]

    def test_a_lost_process_is_named_as_such(self, two):
        assert "process 1 of 2 has lost the others" in (two / "0.lost").read_text()


class TestAlone:
    def test_nothing_is_connected(self):
        processes = Processes()
        with joined(processes, torch.device("cpu"), meeting="nowhere://"):
            assert current() == processes
        length = Length(budget_seconds=10.0, started=time.monotonic())
        length.progress = 0.25
        processes.agree(length)
        network, tensor = torch.nn.Linear(1, 1), torch.tensor([2.5])
        assert length.progress == 0.25
        assert processes.wrap(network) is network
        assert processes.sum_over(tensor).equal(tensor)
        assert (processes.any(True), processes.any(False)) == (True, False)
        assert processes.from_main(lambda: "made") == "made"
        assert processes.positions(5) is None

    def test_a_process_that_finds_nobody_says_so(self, monkeypatch):
        monkeypatch.setattr(distributed, "MEETING_WAIT", timedelta(seconds=0.5))
        with (
            pytest.raises(LostProcessError, match="process 2 of 2 has lost the others"),
            joined(Processes(2, 1), torch.device("cpu"), meeting="tcp://127.0.0.1:1"),
        ):
            pass


class TestPositions:
    @pytest.mark.parametrize(("batch_size", "count"), [(4, 2), (3, 2), (7, 3), (5, 5), (9, 4)])
    def test_shares_cover_the_batch_once_and_differ_by_one(self, batch_size, count):
        shares = [Processes(count, rank).positions(batch_size) for rank in range(count)]
        assert sorted(sum(shares, ())) == list(range(batch_size))
        assert max(map(len, shares)) - min(map(len, shares)) <= 1
        assert min(map(len, shares)) >= 1

    def test_more_processes_than_samples_are_refused(self):
        with pytest.raises(ConfigError, match="2 patches, too few for 3 processes"):
            Processes(3, 0).positions(2)


class TestEnvironment:
    def test_no_launcher(self):
        assert from_environment({}) is None
        assert from_environment({"WORLD_SIZE": "1", "RANK": "0"}) is None

    def test_torchrun(self):
        variables = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "MASTER_PORT": "29500"}
        assert from_environment(variables) == Processes(8, 5, 1)

    def test_every_problem_is_told_at_once(self):
        with pytest.raises(ConfigError, match=r"RANK is 'one'.*LOCAL_RANK is missing"):
            from_environment({"RANK": "one", "WORLD_SIZE": "2"})
        with pytest.raises(ConfigError, match="RANK is 2, WORLD_SIZE 2"):
            from_environment({"RANK": "2", "WORLD_SIZE": "2", "LOCAL_RANK": "0"})


class TestDevice:
    @pytest.fixture
    def gpus(self, monkeypatch):
        def give(count):
            monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
            monkeypatch.setattr(torch.cuda, "device_count", lambda: count)

        return give

    def test_each_process_of_a_machine_has_its_own(self, gpus):
        gpus(4)
        assert Processes(8, 6, 2).device_name("auto") == "cuda:2"
        assert Processes(8, 6, 2).device_name("cuda") == "cuda:2"
        assert Processes(8, 6, 2).device_name("cpu") == "cpu"

    def test_one_process_takes_what_was_asked_for(self, gpus):
        gpus(4)
        assert [Processes().device_name(name) for name in ("auto", "cuda:3")] == ["auto", "cuda:3"]

    def test_without_gpus_the_processor_is_shared(self, gpus):
        gpus(0)
        assert Processes(2, 1, 1).device_name("auto") == "cpu"

    def test_too_few_gpus_and_one_gpu_for_all_are_refused(self, gpus):
        gpus(2)
        with pytest.raises(ConfigError, match="process 3 of this machine has no GPU: it has 2"):
            Processes(3, 2, 2).device_name("auto")
        with pytest.raises(ConfigError, match="'cuda:1', but 3 processes need one each"):
            Processes(3, 2, 2).device_name("cuda:1")


if "START" in globals():
    work(*globals()["START"])
