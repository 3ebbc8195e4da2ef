"""Finding models of nnU-Net by the names of their files alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from medseg.errors import BundleError
from medseg.interop.nnunet import found as module
from medseg.interop.nnunet.found import choose_model, describe, find_models, models_in, needed_files

SECOND = "Dataset004_Hippocampus/nnUNetTrainer__nnUNetPlans__3d_fullres"
FIRST = "3d_lowres/Task003_Liver/nnUNetTrainerV2__nnUNetPlansv2.1"
SECOND_FILES = [
    f"{SECOND}/plans.json",
    f"{SECOND}/dataset.json",
    f"{SECOND}/fold_0/checkpoint_final.pth",
    f"{SECOND}/fold_0/checkpoint_best.pth",
    f"{SECOND}/fold_10/checkpoint_final.pth",
    f"{SECOND}/fold_2/checkpoint_final.pth",
    f"{SECOND}/fold_all/checkpoint_final.pth",
    f"{SECOND}/fold_3/checkpoint_latest.pth",
    f"{SECOND}/crossval_results_folds_0_2/postprocessing.json",
    f"{SECOND}/crossval_results_folds_0_2/postprocessing.pkl",
]
FIRST_FILES = [
    f"{FIRST}/plans.pkl",
    f"{FIRST}/postprocessing.json",
    f"{FIRST}/fold_7/model_final_checkpoint.model",
    f"{FIRST}/fold_7/model_final_checkpoint.model.pkl",
    f"{FIRST}/all/model_best.model",
    f"{FIRST}/all/model_best.model.pkl",
]
OTHERS = [
    "readme.txt",
    "checkpoint_final.pth",
    "somewhere/checkpoint_final.pth",
    "fold_0/model_latest.model",
    "Dataset004_Hippocampus/fold_x/checkpoint_final.pth",
    "/fold_0/checkpoint_final.pth",
    "../out/fold_0/checkpoint_final.pth",
]


def write(root: Path, names: list[str]) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


def test_both_versions_are_told_by_the_names_in_a_list():
    first, second = models_in([*OTHERS, *reversed(SECOND_FILES), *FIRST_FILES])
    assert (first.version, second.version) == (1, 2)
    assert first.folder == Path(FIRST)
    assert (first.dataset, first.configuration) == ("Task003_Liver", "3d_lowres")
    assert (first.trainer, first.plans) == ("nnUNetTrainerV2", "nnUNetPlansv2.1")
    assert first.folds == ("fold_7", "all")
    assert first.checkpoints == ("final", "best")
    assert (second.dataset, second.configuration) == ("Dataset004_Hippocampus", "3d_fullres")
    assert (second.trainer, second.plans) == ("nnUNetTrainer", "nnUNetPlans")
    assert second.folds == ("fold_0", "fold_2", "fold_10", "all")
    assert second.weights["fold_0"] == {
        "final": "fold_0/checkpoint_final.pth",
        "best": "fold_0/checkpoint_best.pth",
    }
    assert second.weights["all"] == {"final": "fold_all/checkpoint_final.pth"}
    assert "nnU-Net version 2; folds: fold_0, fold_2, fold_10, all" in describe(second)


def test_nothing_is_found_where_nothing_is():
    assert models_in(OTHERS) == []
    assert models_in([]) == []


def test_needed_files_are_those_of_the_asked_folds_and_no_pickle_beside():
    first, second = models_in([*SECOND_FILES, *FIRST_FILES])
    assert needed_files(second, folds=[2, "all"]) == (
        "crossval_results_folds_0_2/postprocessing.json",
        "dataset.json",
        "plans.json",
        "fold_2/checkpoint_final.pth",
        "fold_all/checkpoint_final.pth",
    )
    assert "fold_0/checkpoint_best.pth" in needed_files(second)
    assert "fold_0/checkpoint_best.pth" not in needed_files(second, checkpoints=("final",))
    assert needed_files(first, folds=["all"]) == (
        "plans.pkl",
        "postprocessing.json",
        "all/model_best.model",
        "all/model_best.model.pkl",
    )


def test_folds_are_written_in_many_ways():
    (model,) = models_in(SECOND_FILES)
    assert model.select_folds(None) == ("fold_0", "fold_2", "fold_10")
    assert model.select_folds(["fold_2", "0", 0]) == ("fold_2", "fold_0")
    assert model.select_folds(["fold_all"]) == ("all",)
    with pytest.raises(BundleError, match=r"no weights for fold_4; it holds fold_0, fold_2"):
        model.select_folds([4])
    with pytest.raises(BundleError, match="an empty list of folds"):
        model.select_folds([])


def test_only_all_is_taken_where_it_is_the_only_one():
    (model,) = models_in([f"{SECOND}/fold_all/checkpoint_best.pth"])
    assert model.select_folds(None) == ("all",)
    assert model.checkpoints == ("best",)


@pytest.mark.parametrize("above", ["", "nnUNet", "results/nnUNet"])
def test_a_tree_is_searched_from_any_height(tmp_path, above):
    write(tmp_path / above, [*SECOND_FILES, *FIRST_FILES, *OTHERS[:5]])
    models = find_models(tmp_path)
    assert [model.folder for model in models] == [
        tmp_path / above / FIRST,
        tmp_path / above / SECOND,
    ]
    assert models[1].others == (
        "crossval_results_folds_0_2/postprocessing.json",
        "dataset.json",
        "plans.json",
    )


@pytest.mark.parametrize("part", [SECOND, f"{SECOND}/plans.json", "Dataset004_Hippocampus"])
def test_a_model_is_found_by_its_folder_plans_and_dataset(tmp_path, part):
    write(tmp_path, SECOND_FILES)
    (model,) = find_models(tmp_path / part)
    assert model.folder == tmp_path / SECOND
    assert model.dataset == "Dataset004_Hippocampus"
    assert model.folds == ("fold_0", "fold_2", "fold_10", "all")


def test_a_fold_or_a_checkpoint_stands_for_its_model_with_that_alone(tmp_path):
    write(tmp_path, [*SECOND_FILES, *FIRST_FILES])
    (model,) = find_models(tmp_path / SECOND / "fold_0")
    assert model.folder == tmp_path / SECOND
    assert model.weights == {
        "fold_0": {"final": "fold_0/checkpoint_final.pth", "best": "fold_0/checkpoint_best.pth"}
    }
    assert "plans.json" in model.others
    (model,) = find_models(tmp_path / SECOND / "fold_0/checkpoint_best.pth")
    assert model.weights == {"fold_0": {"best": "fold_0/checkpoint_best.pth"}}
    (model,) = find_models(tmp_path / FIRST / "all")
    assert (model.version, model.folds, model.others) == (
        1,
        ("all",),
        ("plans.pkl", "postprocessing.json"),
    )
    (model,) = find_models(tmp_path / FIRST / "fold_7/model_final_checkpoint.model.pkl")
    assert model.weights == {"fold_7": {"final": "fold_7/model_final_checkpoint.model"}}


def test_a_tree_in_a_folder_that_is_called_like_a_fold_is_searched(tmp_path):
    write(tmp_path / "all", SECOND_FILES)
    (model,) = find_models(tmp_path / "all")
    assert model.folder == tmp_path / "all" / SECOND


def test_folders_without_the_usual_names_say_nothing(tmp_path):
    write(tmp_path, ["mine/fold_0/checkpoint_final.pth"])
    (model,) = find_models(tmp_path / "mine")
    assert (model.dataset, model.configuration, model.trainer, model.plans) == ("",) * 4
    assert describe(model).startswith(str(tmp_path / "mine"))


def test_links_to_folders_and_folders_of_images_are_not_entered(tmp_path):
    write(tmp_path / "outside", SECOND_FILES)
    inside = tmp_path / "inside"
    inside.mkdir()
    (inside / "link").symlink_to(tmp_path / "outside")
    for name in ("validation", "imagesTr", "predicted_next_stage", ".hidden", "ensembles"):
        write(inside / name, SECOND_FILES)
    assert find_models(inside) == []
    assert len(find_models(tmp_path / "outside")) == 1


def test_the_search_ends_at_a_depth_and_at_a_number_of_folders(tmp_path, monkeypatch):
    write(tmp_path, [f"{'a/' * 5}{SECOND_FILES[2]}"])
    assert len(find_models(tmp_path)) == 1
    write(tmp_path / "deep", [f"{'a/' * 12}{SECOND_FILES[2]}"])
    assert find_models(tmp_path / "deep") == []
    monkeypatch.setattr(module, "_MOST_FOLDERS", 5)
    with pytest.raises(BundleError, match="more than 5 folders; name the folder of the model"):
        find_models(tmp_path)


def test_a_place_that_is_not_there_or_holds_nothing(tmp_path):
    with pytest.raises(BundleError, match="no such file or folder"):
        find_models(tmp_path / "nowhere")
    assert find_models(write(tmp_path, OTHERS[:3])) == []
    assert find_models(tmp_path / "readme.txt") == []


def test_the_model_that_is_meant_is_chosen_or_all_are_listed():
    other = SECOND.replace("fullres", "lowres")
    models = models_in([*SECOND_FILES, *FIRST_FILES, f"{other}/fold_1/checkpoint_final.pth"])
    assert choose_model(models, "x.zip", dataset="3").version == 1
    chosen = choose_model(models, "x.zip", dataset="4", configuration="3d_lowres", trainer=None)
    assert chosen.folder == Path(other)
    with pytest.raises(BundleError, match=r"x\.zip: 2 models fit dataset '4'") as e:
        choose_model(models, "x.zip", dataset="4")
    assert "3d_fullres" in str(e.value)
    assert "Task003_Liver" not in str(e.value)
    with pytest.raises(BundleError, match=r"no models fit configuration '3d_fulres'") as e:
        choose_model(models, "x.zip", configuration="3d_fulres")
    assert "Did you mean '3d_fullres'?" in str(e.value)
    assert "Task003_Liver 3d_lowres" in str(e.value)
