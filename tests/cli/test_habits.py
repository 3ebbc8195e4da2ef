"""Commands of nnU-Net typed after `medseg`, and the page that lists them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from medseg.cli.habits import HABITS, answer_to
from tests.test_docs import PAGES, parse

PAGE = PAGES["docs/how-to/coming-from-nnunet.md"]
ROW = re.compile(r"^\| `(nnUNet(?:v2)?_\w+)` \| (.+?) \| ", re.MULTILINE)
VALUES = {"DATASET": "7", "CONFIG": "3d_fullres", "FOLD": "0", "N": "2"}
IN_TEXT = re.compile(r"medseg [a-z][^;,)]*")
INSTALLED = (
    "accumulate_crossval_results", "apply_postprocessing", "convert_MSD_dataset",
    "convert_old_nnUNet_dataset", "determine_postprocessing", "download_pretrained_model_by_url",
    "ensemble", "evaluate_folder", "evaluate_simple", "export_model_to_zip",
    "extract_fingerprint", "find_best_configuration", "install_pretrained_model_from_zip",
    "move_plans_between_datasets", "plan_and_preprocess", "plan_experiment", "plot_overlay_pngs",
    "predict", "predict_from_modelfolder", "preprocess", "train",
)  # fmt: skip
"""Commands of nnU-Net 2.8.1, without `nnUNetv2_`."""


def test_every_command_of_version_2_is_known():
    known = {name.removeprefix("nnUNetv2_") for name in HABITS if name.startswith("nnUNetv2_")}
    assert known == set(INSTALLED)


def test_the_page_lists_the_same_commands_in_the_same_words():
    shown = [(name, ours.strip("`").replace("none", "")) for name, ours in ROW.findall(PAGE)]
    assert shown == [(name, ours) for name, (ours, _) in HABITS.items()]


@pytest.mark.parametrize("name", HABITS)
def test_what_is_answered_exists(name):
    """Every command line in the answer is parsed as the program does."""
    ours, more = HABITS[name]
    assert ours or more
    for line in [*([ours] if ours else []), *IN_TEXT.findall(more)]:
        words = [VALUES.get(word, word) for word in line.split()[1:]]
        parse(words)


def test_a_command_of_nnunet_is_answered_with_ours(medseg):
    ran = medseg("nnUNetv2_predict", "-i", "images", "-d", "7", "-c", "3d_fullres")
    assert (ran.status, ran.out) == (2, "")
    assert "nnUNetv2_predict is a command of nnU-Net" in ran.err
    assert "medseg predict -i IMAGES -o OUT -m MODEL" in ran.err


def test_a_command_without_counterpart_is_answered_honestly(medseg):
    ran = medseg("nnUNet_determine_postprocessing", "--help")
    assert ran.status == 2
    assert "there is none like it here: no postprocessing is tried out" in ran.err


@pytest.mark.parametrize("name", ["nnUNetv2_predicts", "predictt", ""])
def test_other_unknown_commands_are_answered_as_before(medseg, name):
    ran = medseg(name)
    assert answer_to(name) is None
    assert ran.status == 2
    assert "No such command" in ran.err


def test_the_name_of_a_command_may_be_that_of_data(medseg, tmp_path):
    """Only the word after `medseg` is looked at."""
    ran = medseg("plan", str(Path(tmp_path / "nnUNet_train")))
    assert ran.status == 2
    assert "is a command of nnU-Net" not in ran.err
    assert "no dataset" in ran.err
