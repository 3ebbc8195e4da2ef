"""`medseg plan show` and `medseg plan diff`: sources, exit status and refusals."""

from medseg.schema.plans import read_plans, write_plans


def test_exit_status_says_whether_plans_differ(medseg, workspace, tmp_path):
    path = workspace / "datasets" / "Dataset007_Tiny" / "plans" / "nnunet.json"
    plans = read_plans(path)
    same = medseg("plan", "diff", "7", path, workspace=workspace)
    assert (same.status, same.out) == (0, "The plans are equal.\n")
    full = plans.configurations["3d_fullres"].model_copy(update={"batch_size": 77})
    other = tmp_path / "other.json"
    write_plans(other, plans.model_copy(update={"configurations": {"3d_fullres": full}}))
    ran = medseg("plan", "diff", "7:nnunet", other, workspace=workspace)
    assert (ran.status, ran.err) == (1, "")
    assert ran.out.splitlines()[-1].split()[:2] == ["batch", "size"]
    assert ran.out.rstrip().endswith("77")
    assert max(map(len, ran.out.splitlines())) <= 80
    ran = medseg("plan", "diff", "7", "nothing", workspace=workspace)
    assert (ran.status, ran.out) == (2, "")
    assert "expected a plans file" in ran.err


def test_show_takes_a_file(medseg, workspace):
    path = workspace / "datasets" / "Dataset007_Tiny" / "plans" / "nnunet.json"
    shown = medseg("plan", "show", path, workspace=workspace)
    assert shown.status == 0
    assert shown.out == medseg("plan", "show", "7", workspace=workspace).out


def test_words_too_many_or_missing_are_explained(medseg, workspace):
    ran = medseg("plan", "diff", "7", workspace=workspace)
    assert (ran.status, ran.out) == (2, "")
    assert "compares two" in ran.err
    ran = medseg("plan", "show", "7", "8", workspace=workspace)
    assert ran.status == 2
    assert "plan diff 7 8" in ran.err
