"""Plans that are kept, made anew and taken over: nothing asked for is lost without a word."""

from __future__ import annotations

import logging

import pytest
import torch

from medseg.api import prepare
from medseg.bundles.bundle import write_bundle
from medseg.data.workspace import Workspace
from medseg.errors import ConfigError, PlanError
from medseg.schema.base import read_json, write_json
from medseg.schema.bundle import Semantics


@pytest.fixture
def folder(workspace):
    """The dataset in a workspace of one's own."""
    return Workspace(workspace).find("4")[0]


def plan(folder, **options):
    return prepare.plan(folder.path.name, workspace=folder.path.parents[1], **options)


@pytest.fixture
def bundle(folder, tmp_path):
    """A model of one configuration, trained for small memory."""
    plans = plan(folder, gpu_memory="4GB", replan=True)
    alone = {"3d_fullres": plans.configurations["3d_fullres"]}
    folder.plans_path("nnunet").unlink()
    write_bundle(
        tmp_path / "model",
        spec=folder.spec(),
        plans=plans.model_copy(update={"configurations": alone, "inherits": {}, "dataset": "Old"}),
        configuration="3d_fullres",
        weights={"fold_0": {"final": {"weight": torch.zeros(2)}}},
        semantics=Semantics(activation="softmax", mirror_axes=(0,)),
        recipe="fast",
    )
    return tmp_path / "model"


def test_planning_anew_keeps_what_was_asked_for_and_says_so(folder, caplog):
    asked = {"gpu_memory": "4GB", "target_spacing": (1.4, 1.6, 2.4)}
    old = plan(folder, replan=True, **asked)
    with caplog.at_level(logging.WARNING):
        assert plan(folder, replan=True) == old
    assert "--gpu-memory 4GB, --target-spacing 1.4,1.6,2.4" in caplog.text
    assert str(folder.plans_path("nnunet")) in caplog.text


def test_an_option_given_now_wins_over_the_one_before(folder, caplog):
    plan(folder, replan=True, gpu_memory="4GB", target_spacing=(1.4, 1.6, 2.4))
    with caplog.at_level(logging.WARNING):
        new = plan(folder, replan=True, gpu_memory="11GB")
    assert (new.asked_gpu_memory_gb, new.asked_target_spacing) == (11, (1.4, 1.6, 2.4))
    assert "--target-spacing 1.4,1.6,2.4" in caplog.text
    assert "--gpu-memory" not in caplog.text


def test_planning_anew_without_earlier_wishes_says_nothing(folder, caplog):
    with caplog.at_level(logging.WARNING):
        plan(folder, replan=True)
    assert caplog.text == ""


def test_plans_of_a_model_are_kept_without_a_warning_and_not_replaced_by_the_planners(
    folder, bundle, caplog
):
    """They carry a preset's name, but are not what the planner would choose."""
    taken = plan(folder, from_bundle=bundle)
    assert taken.taken_from == "plans 'nnunet' of 'Old'"
    assert folder.plans("nnunet") == taken
    with caplog.at_level(logging.WARNING):
        assert plan(folder) == taken
    assert caplog.text == ""
    before = folder.plans_path("nnunet").read_bytes()
    for options in ({}, {"gpu_memory": "8GB"}):
        with pytest.raises(PlanError, match=r"taken over from a model.*--from BUNDLE again.*--pl"):
            plan(folder, replan=True, **options)
    assert folder.plans_path("nnunet").read_bytes() == before


def test_plans_of_a_model_are_replaced_where_a_model_is_given_again(folder, bundle):
    taken = plan(folder, from_bundle=bundle)
    assert plan(folder, from_bundle=bundle, replan=True) == taken


def test_a_model_can_replace_the_planners_plans(folder, bundle):
    plan(folder, gpu_memory="11GB")
    taken = plan(folder, from_bundle=bundle, replan=True)
    assert taken.taken_from is not None
    assert taken.asked_gpu_memory_gb is None


@pytest.mark.parametrize("name", ["2d", "3d_fullres"])
def test_an_edited_configuration_is_kept_and_named_as_a_possible_cause(folder, caplog, name):
    path = folder.plans_path("nnunet")
    values = read_json(path)
    values["configurations"][name]["patch_size"][-1] *= 2
    write_json(path, values)
    with caplog.at_level(logging.WARNING):
        kept = plan(folder)
    assert (
        kept.configurations[name].patch_size[-1] == values["configurations"][name]["patch_size"][-1]
    )
    assert f"{name}: patch_size" in caplog.text
    assert "the dataset has moved since they were made or their file was edited" in caplog.text
    assert "--replan makes new ones, without edits" in caplog.text


def test_a_configuration_rewritten_for_other_axes_differs_and_is_no_crash(folder, caplog):
    path = folder.plans_path("nnunet")
    values = read_json(path)
    values["configurations"]["2d"] = values["configurations"]["3d_fullres"]
    write_json(path, values)
    with caplog.at_level(logging.WARNING):
        assert plan(folder).configurations["2d"].num_dimensions == 3
    assert "2d: spacing" in caplog.text


def test_plans_that_contradict_themselves_are_refused_before_planning(folder):
    path = folder.plans_path("nnunet")
    values = read_json(path)
    values["configurations"]["2d"]["patch_size"] = [32, 32, 16]
    write_json(path, values)
    for replan in (False, True):
        with pytest.raises(ConfigError, match=r"configurations\.2d\.spacing") as caught:
            plan(folder, replan=replan)
        assert str(path) in str(caught.value)
