"""The benchmarks of prediction measure what they say, and judge what they measure."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts" / "bench"
NAMES = ("costs", "export", "nnunet_train", "peer", "predict", "predict_alone", "train", "watch")
GIGABYTE = 10**9


@pytest.fixture
def bench(monkeypatch):
    """Import a benchmark as it is when it is run: its folder is searched first."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    yield lambda name: importlib.import_module(name)
    for name in NAMES:
        sys.modules.pop(name, None)


def spent(costs, seconds=1.0, *, largest=0.4, together=0.3, summed=0.4):
    """Return what a command took; memory in GB."""
    sizes = (int(size * GIGABYTE) for size in (largest, summed, together))
    return costs.Spent(seconds, *sizes, num_processes=1)


def test_memory_is_the_commands_own_however_large_the_caller(bench, tmp_path):
    """The kernel's figure of a child begins with its parent's; here the parent holds 0.4 GB."""
    held = bytearray(b"x") * (400 * 2**20)
    command = [sys.executable, "-c", "a = bytearray(b'x') * (60 * 2**20)"]
    found = bench("costs").measured(command, log=tmp_path / "log.txt")
    assert 60e6 < found.largest_bytes < 150e6
    assert len(held) == 400 * 2**20


def test_all_processes_count_and_what_they_share_counts_once(bench, tmp_path):
    script = (
        "import os, time\n"
        "shared = bytearray(os.urandom(2**20)) * 150\n"
        "child = os.fork()\n"
        "own = bytearray(os.urandom(2**20)) * 100\n"
        "time.sleep(1.5)\n"
        "child and os.wait()\n"
    )
    found = bench("costs").measured([sys.executable, "-c", script], log=tmp_path / "log.txt")
    assert found.num_processes == 2
    assert 250e6 < found.largest_bytes < 330e6
    assert 350e6 < found.together_bytes < 430e6
    assert 500e6 < found.summed_bytes < 660e6
    assert found.memory_bytes == found.together_bytes
    assert found.seconds > 1.5


def test_a_command_that_fails_ends_the_benchmark_with_its_words(bench, tmp_path):
    command = [sys.executable, "-c", "import sys; sys.exit('no such model')"]
    with pytest.raises(SystemExit, match="no such model"):
        bench("costs").measured(command, log=tmp_path / "log.txt")


def test_memory_of_a_call_is_its_peak_and_not_what_is_left(bench):
    """In a process of its own: in a large one the call would find free memory that is there."""
    code = (
        "import json; from costs import alone\n"
        "print(json.dumps(alone(lambda: len(bytearray(b'x') * (80 * 2**20)))))"
    )
    folder = Path(bench("costs").__file__).parent
    ran = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, check=True)
    result, found = json.loads(ran.stdout)
    assert result == 80 * 2**20
    assert 70e6 < found["peak_bytes"] < 120e6


@pytest.mark.parametrize(("verdicts", "status"), [({"a": True}, 0), ({"a": True, "b": False}, 1)])
def test_what_was_found_is_kept(bench, tmp_path, verdicts, status):
    path = tmp_path / "found.json"
    assert bench("costs").keep(path, {"seconds": [1.5]}, verdicts) == status
    found = json.loads(path.read_text())
    assert found["verdicts"] == verdicts
    assert found["figures"] == {"seconds": [1.5]}
    assert bench("costs").keep(None, {}, verdicts) == status


@pytest.mark.parametrize(
    ("tta", "seconds", "memory", "verdicts"),
    [
        ("flips", 25.0, 0.8, [True, True]),
        ("flips", 24.9, 0.8, [False, True]),
        ("none", 30.0, 0.8, [True, True]),
        ("none", 29.9, 0.79, [False, False]),
    ],
)
def test_sides_are_judged_by_medians_and_by_all_their_memory(
    bench, capsys, tta, seconds, memory, verdicts
):
    """One process of nnU-Net may be no larger than ours: it is all of them that need the room."""
    costs, predict = bench("costs"), bench("predict")
    ours = [spent(costs, s, largest=0.4, together=0.3) for s in (10.0, 99.0, 10.0)]
    theirs = [spent(costs, s, largest=0.4, together=memory) for s in (seconds, seconds, 999.0)]
    assert list(predict.judge_sides(tta, ours, theirs).values()) == verdicts
    out = capsys.readouterr().out
    starts = [line.split(":")[0] for line in out.splitlines()[1:]]
    assert starts == ["met" if is_met else "short" for is_met in verdicts]
    assert "largest process 0.40 and 0.40 GB (1.00)" in out
    assert "not reached" in out


def test_goals_are_said(bench, capsys):
    costs, predict = bench("costs"), bench("predict")
    predict.judge_sides("flips", [spent(costs, 10)], [spent(costs, 35)])
    assert "goal 3.5 reached" in capsys.readouterr().out


def test_both_sides_get_the_first_images_under_names_both_take(bench, tmp_path):
    dataset = tmp_path / "Task"
    (dataset / "imagesTr").mkdir(parents=True)
    names = ["case_b", "case_a", "case_c"]
    for name in names:
        (dataset / f"imagesTr/{name}.nii.gz").write_text(name)
    entries = [
        {"image": f"./imagesTr/{name}.nii.gz", "label": f"./labelsTr/{name}.nii.gz"}
        for name in names
    ]
    (dataset / "dataset.json").write_text(json.dumps({"training": entries}))
    (tmp_path / "images").mkdir()
    (tmp_path / "images/old_0000.nii.gz").touch()
    link_images = bench("predict").link_images
    found = link_images(dataset, tmp_path / "images", 2)
    assert found == {name: dataset / f"labelsTr/{name}.nii.gz" for name in ("case_a", "case_b")}
    linked = {path.name: path.read_text() for path in (tmp_path / "images").iterdir()}
    assert linked == {"case_a_0000.nii.gz": "case_a", "case_b_0000.nii.gz": "case_b"}
    with pytest.raises(SystemExit, match="3 training images, 4 wanted"):
        link_images(dataset, tmp_path / "images", 4)


def test_a_side_that_leaves_out_a_case_ends_the_benchmark(bench, tmp_path):
    costs, predict = bench("costs"), bench("predict")
    images, output = tmp_path / "images", tmp_path / "predicted"
    for folder, name in (
        (images, "a_0000.nii.gz"),
        (images, "b_0000.nii.gz"),
        (output, "a.nii.gz"),
    ):
        folder.mkdir(exist_ok=True)
        (folder / name).touch()
    with pytest.raises(SystemExit, match=r"1 of 2 are missing: b\.nii\.gz"):
        predict._checked(spent(costs), images, output)
    (output / "b.nii.gz").touch()
    assert predict._checked(spent(costs), images, output) == spent(costs)


def test_answers_are_judged_by_medians(bench):
    alone = bench("predict_alone")
    assert alone.judge_cold([3.99, 9.0, 1.0]) == {"cold start": True}
    assert alone.judge_cold([4.0]) == {"cold start": False}
    assert alone.judge_warm([0.29, 0.9, 0.1]) == {"loaded model": True}
    assert alone.judge_warm([0.3]) == {"loaded model": False}


def test_one_heavy_import_is_short(bench, capsys):
    alone = bench("predict_alone")
    assert alone.judge_imports(["nibabel", "torch"]) == {"imports": True}
    assert alone.judge_imports(["SimpleITK", "torch"]) == {"imports": False}
    assert "imports SimpleITK of SimpleITK, matplotlib" in capsys.readouterr().out


def test_a_small_image_is_cut_and_its_edge_repeated(bench):
    values = np.arange(4 * 2 * 3).reshape(4, 2, 3)
    found = bench("predict_alone").fitted(values, (3, 5, 3))
    assert found.shape == (3, 5, 3)
    assert np.array_equal(found[:, :2], values[:3])
    assert np.array_equal(found[:, 4], values[:3, 1])


def test_dice_is_the_mean_over_labels_of_either(bench):
    dice = bench("predict_alone").case_dice
    one = np.array([0, 1, 1, 2, 2, 2])
    assert dice(one, one) == 1
    assert dice(one, np.array([0, 1, 1, 0, 2, 2])) == pytest.approx((1 + 0.8) / 2)
    assert dice(np.array([0, 1]), np.array([0, 0])) == 0
    assert dice(np.zeros(3, int), np.zeros(3, int)) == 1


def test_arithmetics_are_judged_by_their_agreement_and_by_the_reference(bench):
    judge = bench("predict_alone").judge_accuracy
    assert list(judge([0.997, 0.999], 0.88, 0.8805).values()) == [True, True]
    assert list(judge([0.997, 0.9989], 0.88, 0.8815).values()) == [False, False]
    assert judge([1.0], 0.8815, 0.88)["accuracy"] is False  # better is a change too


def test_the_mean_dice_of_files_is_found(bench, tmp_path):
    labels = np.zeros((2, 3, 4), np.uint8)
    labels[0] = 1
    for name, values in (("a", labels), ("reference", labels), ("b", 1 - labels)):
        nib.save(nib.Nifti1Image(values, np.eye(4)), tmp_path / f"{name}.nii.gz")
    references = dict.fromkeys("ab", tmp_path / "reference.nii.gz")
    assert bench("predict_alone").mean_dice(references, tmp_path) == 0.5


def exported(*runs):
    """Return what exports took: (seconds, bytes above the input)."""
    return [{"seconds": seconds, "peak_bytes": peak} for seconds, peak in runs]


@pytest.mark.parametrize(
    ("ours", "same", "verdicts"),
    [
        (exported((4.0, 6e8), (4.0, 1e8)), 0.9999, [True, True, True]),
        (exported((4.1, 6.1e8), (4.1, 1e8)), 0.9998, [False, False, False]),
    ],
)
def test_exports_of_sixty_classes_are_judged(bench, capsys, ours, same, verdicts):
    export = bench("export")
    theirs = exported((32.0, 3.8e9), (32.0, 3.8e9))
    assert list(export.judge_export(60, ours, theirs, same).values()) == verdicts
    assert list(export.judge_export(20, ours, theirs, same).values()) == verdicts[:1]
    assert capsys.readouterr().out.count("not judged") == 2


def test_medseg_exports_the_task_it_is_given(bench, tmp_path):
    """On the network's own grid each voxel takes the class with the largest logit."""
    export = bench("export")
    shape = (6, 9, 7)
    export.write_logits(tmp_path / "logits.npy", 5, shape)
    task = {
        "logits": str(tmp_path / "logits.npy"),
        "segmentation": str(tmp_path / "labels.npy"),
        "figures": str(tmp_path / "figures.json"),
        "threads": torch.get_num_threads(),
        "num_logits": 5,
        "shape_image": list(shape),
        "spacing_image": [1.0] * 3,
        "spacing_network": [1.0] * 3,
    }
    (tmp_path / "task.json").write_text(json.dumps(task))
    assert export.export_once(tmp_path / "task.json") == 0
    logits = np.load(tmp_path / "logits.npy")
    assert logits.dtype == np.float32
    assert np.array_equal(np.load(tmp_path / "labels.npy"), logits.argmax(0))
    assert json.loads((tmp_path / "figures.json").read_text())["seconds"] > 0


def test_logits_are_smooth_and_no_two_classes_alike(bench):
    export = bench("export")
    rng = np.random.default_rng(0)
    one, other = (export.smooth(rng, (48, 36, 60)) for _ in range(2))
    assert one.std() == pytest.approx(1, abs=1e-3)
    assert max(np.abs(np.diff(one, axis=axis)).max() for axis in range(3)) < 0.7
    assert abs(np.corrcoef(one.ravel(), other.ravel())[0, 1]) < 0.5


def test_the_large_prediction_is_judged_by_its_process_and_its_labels(bench):
    costs, export = bench("costs"), bench("export")
    fits, bursts = spent(costs, largest=4.0), spent(costs, largest=4.01)
    assert list(export.judge_large(fits, export.bytes_of("4GB"), 3).values()) == [True, True]
    assert list(export.judge_large(bursts, export.bytes_of("4GB"), 2).values()) == [False, False]


def test_the_large_image_is_a_body_in_air_and_the_plan_coarser(bench):
    export = bench("export")
    image = export.make_body(48)
    values = np.asarray(image.dataobj)
    assert values.dtype == np.int16
    assert image.header.get_zooms() == (1.0, 1.0, 1.0)
    assert values[0, 0, 0] < -900
    assert -200 < values[24, 24, 24] < 900
    assert 0.2 < (values > -500).mean() < 0.5
    configuration = export.make_plans(128).configuration("3d_fullres")
    assert configuration.spacing == (1.5, 1.5, 1.5)
    assert configuration.patch_size == (128, 128, 128)
    assert configuration.architecture.features == (8, 16, 32, 64, 128, 256)
