"""A compiled network: chosen once, kept by runs that go on."""

from __future__ import annotations

import pytest

import medseg
from medseg.api import faster
from medseg.models.compile import Compiled, has_cpp_compiler
from medseg.schema.base import read_json

TRAIN = ("4", "3d_fullres", 0)


def test_single_precision_on_a_cpu_is_not_compiled_by_itself(workspace, recipe, monkeypatch):
    monkeypatch.setattr(faster, "fastest", lambda *args, **options: pytest.fail("was tried"))
    run = medseg.train(*TRAIN, recipe=recipe, iterations=1, workspace=workspace)
    assert read_json(run.path / "fold_0/run.json")["compiled"] is False


@pytest.mark.parametrize("wins", [True, False])
def test_what_was_chosen_is_settled_and_used(workspace, recipe, monkeypatch, wins):
    """The choice gets a step like those of training; a run that goes on does not choose again."""
    asked, used = [], []

    def choose(network, example, *, mode, step, seconds_left=None, decided=None):
        asked.append((mode, decided, seconds_left))
        step(network)  # forward, loss, backward
        assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in network.parameters())
        network.zero_grad()

        def spy(images):
            used.append(tuple(images.shape))
            return network(images)

        return Compiled(module=spy if wins else network, is_compiled=wins, reason="")

    monkeypatch.setattr(faster, "fastest", choose)
    options = {"recipe": recipe, "workspace": workspace, "set": {"compile": "on"}}
    run = medseg.train(*TRAIN, iterations=2, **options)
    assert read_json(run.path / "fold_0/run.json")["compiled"] is wins
    assert len(used) == 2 * wins
    medseg.train(*TRAIN, extend=True, iterations=1, **options)
    assert [(mode, decided) for mode, decided, _ in asked] == [("on", None)] + [("on", True)] * wins
    assert 0 < asked[0][2] < 600


@pytest.mark.slow
@pytest.mark.skipif(not has_cpp_compiler(), reason="compiling for the CPU needs a C++ compiler")
def test_a_compiled_run_learns_what_an_eager_one_does(workspace, recipe):
    losses = []
    for switch in ("on", "off"):
        options = {"recipe": recipe, "workspace": workspace, "set": {"compile": switch}}
        run = medseg.train(*TRAIN, name=switch, iterations=3, **options)
        assert read_json(run.path / "fold_0/run.json")["compiled"] is (switch == "on")
        losses.append(run.metrics["fold_0"].foreground_mean.dice)
    assert losses[0] == pytest.approx(losses[1], abs=1e-3)
