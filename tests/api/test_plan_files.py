"""Plans found wherever they lie, and compared."""

import json
import shutil

import pytest

from medseg.api.plan_files import compare_plans, find_plans
from medseg.errors import ConfigError
from medseg.plan.planner import make_plans
from medseg.schema.base import write
from medseg.schema.dataset import DatasetSpec
from medseg.schema.fingerprint import CaseFingerprint, Fingerprint, IntensityStatistics
from medseg.schema.plans import write_plans

SPEC = DatasetSpec(name="Dataset007_Tiny", channels=("T1w",), labels={"background": 0, "organ": 1})


def make(name="nnunet"):
    statistics = IntensityStatistics(**dict.fromkeys(IntensityStatistics.model_fields, 1.0))
    shape, spacing = (90, 110, 70), (1.0, 0.9, 2.0)
    case = CaseFingerprint(shape=shape, shape_cropped=shape, spacing=spacing)
    fingerprint = Fingerprint(
        cases={"a": case, "b": case},
        channels=(statistics,),
        median_relative_size_after_cropping=1.0,
    )
    return make_plans(fingerprint, SPEC, name=name)


@pytest.fixture
def workspace(tmp_path):
    """A workspace with two plans of one dataset, and a run with its bundle."""
    folder = tmp_path / "work" / "datasets" / SPEC.name
    write(folder / "dataset.json", SPEC.model_copy(update={"source": str(tmp_path / "gone")}))
    for name in ("nnunet", "resenc_m"):
        write_plans(folder / "plans" / f"{name}.json", make(name))
    run = folder / "runs" / "nnunet__3d_fullres__default"
    write_plans(run / "plans.json", make())
    full = {"3d_fullres": make().configurations["3d_fullres"]}
    write_plans(run / "bundle" / "plans.json", make().model_copy(update={"configurations": full}))
    (run / "bundle" / "bundle.json").write_text("{}")
    return tmp_path / "work"


def test_plans_are_found_by_every_name_they_have(workspace):
    folder = workspace / "datasets" / SPEC.name
    run = folder / "runs" / "nnunet__3d_fullres__default"
    for source in (SPEC.name, "7", f"{SPEC.name}:nnunet", "7:nnunet", run, str(run)):
        assert find_plans(source, workspace=workspace) == make(), source
    assert find_plans("7", plans="resenc_m", workspace=workspace) == make("resenc_m")
    for source in ("7:resenc_m", folder / "plans" / "resenc_m.json"):
        assert find_plans(source, workspace=workspace) == make("resenc_m"), source
    bundle = run / "bundle"
    for source in (bundle, bundle / "bundle.json", bundle / "plans.json"):
        assert list(find_plans(source, workspace=workspace).configurations) == ["3d_fullres"]
    (run / "plans.json").unlink()
    assert list(find_plans(run, workspace=workspace).configurations) == ["3d_fullres"]


def test_a_folder_of_raw_data_stands_for_its_dataset(workspace, tmp_path):
    raw = tmp_path / "with:colon" / SPEC.name
    raw.mkdir(parents=True)
    assert find_plans(raw, workspace=workspace) == make()
    assert find_plans(f"{raw}:resenc_m", workspace=workspace) == make("resenc_m")


def test_what_holds_no_plans_is_refused_with_what_could(workspace, tmp_path):
    with pytest.raises(ConfigError, match=r"expected a plans file, a bundle, a run, or a dataset"):
        find_plans("8:nnunet", workspace=workspace)
    with pytest.raises(ConfigError, match=r"no plans 'resenc_x'; expected one of: nnunet, resenc"):
        find_plans("7:resenc_x", workspace=workspace)
    other = tmp_path / "recipe.json"
    other.write_text(json.dumps({"epochs": 3}))
    with pytest.raises(ConfigError, match=r"problems in .*recipe\.json"):
        find_plans(other, workspace=workspace)


def test_comparison_names_its_columns_as_they_were_given(workspace):
    assert compare_plans("7", SPEC.name, workspace=workspace) == ""
    text = compare_plans("7", "7:resenc_m", workspace=workspace)
    assert text.splitlines()[0].split() == ["7", "7:resenc_m"]
    assert "plain_unet" in text
    assert "residual_unet" in text


def test_a_moved_workspace_does_not_matter(workspace, tmp_path):
    shutil.move(workspace, tmp_path / "elsewhere")
    assert find_plans("7", workspace=tmp_path / "elsewhere") == make()
