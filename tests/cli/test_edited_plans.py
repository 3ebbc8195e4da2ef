"""A plans file edited into nonsense: one clear error with its name, never a traceback."""

from __future__ import annotations

import shutil

import pytest

from medseg.schema.base import read_json, write_json


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"patch_size": [16, 16]}, "configurations.3d_fullres.spacing"),
        ({"normalization": ["zscore"] * 5}, "configurations.3d_fullres.use_mask_for_norm"),
        ({"use_mask_for_norm": []}, "expected as many"),
        ({"spacing": [0, 1.0, 1.0]}, "configurations.3d_fullres.spacing.0"),
        ({"inherits_from": ["2d"]}, "it inherits from ['2d']"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
@pytest.mark.parametrize("command", ["plan", "preprocess", "show"])
def test_every_command_names_the_file_and_the_place(
    medseg, workspace, tmp_path, command, change, said
):
    work = shutil.copytree(workspace, tmp_path / "work")
    (path,) = work.rglob("plans/nnunet.json")
    values = read_json(path)
    values["configurations"]["3d_fullres"] |= change
    write_json(path, values)
    arguments = ["plan", "show"] if command == "show" else [command]
    ran = medseg(*arguments, "7", workspace=work)
    assert ran.status == 2
    assert str(path) in ran.err
    assert said in ran.err
    assert "Traceback" not in ran.err
