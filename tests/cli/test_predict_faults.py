"""What goes wrong amid `medseg predict`: right words, a quick end, nothing left half-written.

Commands that are stopped, or whose disk is full, run in processes of their own.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager

import nibabel as nib
import numpy as np
import pytest

from medseg.bundles.bundle import read_bundle, write_bundle
from medseg.cli.main import run
from medseg.errors import DatasetError
from medseg.infer import pipeline
from medseg.infer.loading import load
from medseg.io import nifti
from medseg.models.unet import UNet
from medseg.models.weights import load_weights
from tests.cli.conftest import Ran
from tests.infer.conftest import make_bundle, make_channels, make_oblique, write_case

SHAPES = {
    "anna": (14, 12, 10), "bert": (13, 16, 9), "cora": (30, 25, 17), "dora": (15, 11, 12),
    "emil": (12, 14, 13),
}  # fmt: skip
LIMIT_SECONDS = 10.0
"""A command ends this soon after what stops it."""
PATIENCE_SECONDS = 90.0
"""How long a busy machine may take to get going."""
MAPS = ("--save", "probabilities,entropy")
FINE = ("--step", "0.2")
"""Makes the third case take a while."""

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return make_bundle(tmp_path_factory.mktemp("faults") / "bundle").folder


@pytest.fixture(scope="module")
def model(bundle):
    return load(bundle, device="cpu", mode="exact")


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    for number, (case, shape) in enumerate(SHAPES.items()):
        channels = make_channels(shape, seed=number)
        write_case(folder, case, channels, make_oblique(), ending=".nii")
    return folder


@pytest.fixture
def images(originals, tmp_path):
    return shutil.copytree(originals, tmp_path / "in")


def words(bundle, images, out, *options):
    fixed = ["-m", bundle, "-i", images, "-o", out, "--device", "cpu", "--exact", "--tta", "none"]
    return [str(word) for word in ("predict", *fixed, *options)]


@pytest.fixture
def predict(capsys, bundle, images, tmp_path):
    """Run the command in this process."""

    def call(*options, out=tmp_path / "out", model=bundle):
        capsys.readouterr()
        status = run(words(model, images, out, *options))
        captured = capsys.readouterr()
        return Ran(status, captured.out, captured.err)

    return call


class Process:
    """The command in a process of its own; lines of its errors are kept with their times."""

    def __init__(self, arguments, before=""):
        script = f"{before}\nfrom medseg.cli.main import main\nmain()"
        self.process = subprocess.Popen(
            [sys.executable, "-c", script, *arguments],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"}, preexec_fn=_interruptible,
        )  # fmt: skip
        self.lines = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self):
        for line in self.process.stderr:
            self.lines.append((time.monotonic(), line))

    def wait_for(self, happened):
        """Wait until something is so while the command still runs."""
        end = time.monotonic() + PATIENCE_SECONDS
        while not happened():
            assert self.process.poll() is None, f"it ended before:\n{self.err}"
            assert time.monotonic() < end, f"it never came:\n{self.err}"
            time.sleep(0.005)

    def send(self, number):
        """Send a signal, and return what the command did within the limit."""
        self.process.send_signal(number)
        return self.end(LIMIT_SECONDS)

    def end(self, seconds=PATIENCE_SECONDS):
        try:
            out, _ = self.process.stdout.read(), self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.kill()
            pytest.fail(f"it did not end within {seconds} s:\n{self.err}")
        self._reader.join()
        return Ran(self.process.returncode, out, self.err)

    @property
    def err(self):
        return "".join(line for _, line in self.lines)

    def kill(self):
        self.process.kill()
        self.process.wait()


def _interruptible():
    """Undo what a shell does to the commands it runs in the background."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.fixture
def start(bundle, images, tmp_path):
    """Start the command; it is killed if the test ends before."""
    started = []

    def call(*options, out=tmp_path / "out", before=""):
        started.append(Process(words(bundle, images, out, *options), before))
        return started[-1]

    yield call
    for process in started:
        process.kill()
        process.process.stdout.close()
        process.process.stderr.close()


@pytest.fixture
def disk(tmp_path):
    """A function that mounts a disk of some size; it is unmounted at the end."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(size_kb):
        if os.name != "posix" or os.geteuid() != 0 or shutil.which("mount") is None:
            pytest.skip("mounting a small disk takes root")
        command = ["mount", "-t", "tmpfs", "-o", f"size={size_kb}k", "tmpfs", str(folder)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"no small disk can be mounted here: {done.stderr.strip()}")
        return folder

    yield mount
    if os.path.ismount(folder):
        subprocess.run(["umount", "-l", str(folder)], check=True)


def assert_whole(out, model, images, cases, *options):
    """These cases have a segmentation equal to Python's and a report, and nothing else is there."""
    step = 0.2 if FINE[0] in options else 0.5
    expected_files = []
    for case in cases:
        paths = sorted(images.glob(f"{case}_*.nii"))
        expected = model.predict(paths, probabilities=True, entropy=True, tta="none", step=step)
        found = nib.load(out / f"{case}.nii")
        np.testing.assert_array_equal(np.asarray(found.dataobj), expected.segmentation)
        np.testing.assert_allclose(found.affine, expected.affine, atol=1e-4)
        expected_files += [f"{case}.nii", f"{case}.json"]
        if "--save" in options:
            maps = nib.load(out / f"{case}.probabilities.nii").get_fdata()
            wanted = np.moveaxis(expected.probabilities, 0, -1)
            np.testing.assert_allclose(maps, wanted, atol=1e-5)
            expected_files.append(f"{case}.probabilities.nii")
        if MAPS[1] in options:
            entropy = nib.load(out / f"{case}.entropy.nii.gz").get_fdata()
            np.testing.assert_allclose(entropy, expected.entropy, atol=1e-5)
            expected_files.append(f"{case}.entropy.nii.gz")
    names = sorted(path.name for path in out.iterdir() if not path.name.startswith("summary"))
    assert names == sorted(expected_files)


def squeezed(text):
    """Return a text without white space, of a table that breaks lines even within long paths."""
    return "".join(text.split())


def others(*cases):
    return [case for case in SHAPES if case not in cases]


def cut(path):
    """Pack a file and leave a tenth of it."""
    import gzip

    packed = gzip.compress(path.read_bytes())
    path.unlink()
    path.with_name(f"{path.name}.gz").write_bytes(packed[: len(packed) // 10])


def spoil(path, change):
    image = nib.load(path)
    values = np.asarray(image.dataobj).copy()
    nib.save(nib.Nifti1Image(change(values), image.affine), path)


def with_nan(values):
    values[3, 4, 5] = np.nan
    return values


BAD = {
    "bert": ["bert_0001.nii", "does not begin with a NIfTI header"],
    "cora": ["cora_0000.nii.gz", "cut short"],
    "dora": ["dora_0001.nii", "1 voxels are NaN"],
    "emil": ["case 'emil': got 3 channels, expected 2 (T1w, CT)"],
}


def test_bad_files_cost_nobody_but_their_cases(start, images, model, tmp_path):
    """Garbage, a file cut to a tenth, an image with NaN, one with a channel too many; others go on.

    The files of cases that come after all of these are written too.
    """
    (images / "bert_0001.nii").write_bytes(b"this is no image" * 50)
    cut(images / "cora_0000.nii")
    spoil(images / "dora_0001.nii", with_nan)
    spoil(images / "emil_0001.nii", lambda values: np.stack([values, values], axis=3))
    write_case(images, "fred", make_channels((9, 8, 7)), make_oblique(), ending=".nii")
    process = start()
    process.wait_for(lambda: "case bert failed" in process.err)
    seen = time.monotonic()
    ran = process.end()
    assert time.monotonic() - seen < LIMIT_SECONDS
    assert ran.status == 1, ran.err
    assert "2 done, 4 failed" in ran.out
    told = squeezed(ran.out)
    for case, expected in BAD.items():
        assert [text for text in expected if squeezed(text) not in told] == [], (case, ran.out)
    assert "Traceback" not in ran.err
    assert_whole(tmp_path / "out", model, images, ["anna", "fred"])


def test_a_missing_channel_is_refused_before_anything_is_predicted(predict, images, tmp_path):
    (images / "cora_0001.nii").unlink()
    ran = predict()
    assert ran.status == 2
    assert "case 'cora': got channels 0000 (cora_0000.nii)" in ran.err
    assert not (tmp_path / "out").exists()


def test_a_reader_that_raises_costs_one_case(predict, images, model, monkeypatch, tmp_path):
    read = nifti.read

    def failing(path):
        if path.name == "cora_0001.nii":
            raise RuntimeError("the library of this format gave up")
        return read(path)

    monkeypatch.setattr(nifti, "read", failing)
    started = time.monotonic()
    ran = predict()
    assert time.monotonic() - started < LIMIT_SECONDS
    assert ran.status == 1
    assert "cora: RuntimeError: the library of this format gave up" in " ".join(ran.out.split())
    monkeypatch.undo()
    assert_whole(tmp_path / "out", model, images, others("cora"))


class TestFullDisk:
    """One of five results does not fit; the other four do."""

    @pytest.mark.parametrize(
        ("size_kb", "large", "options", "expected"),
        [
            (64, "cora", (), "cora.nii: not written, the disk is full"),
            (200, "cora", MAPS, "cora.probabilities.nii: needs 430 kB (430080 bytes)"),
            (652, "emil", (*MAPS[:1], "probabilities"), "emil.nii: not written, the disk is full"),
        ],
        ids=["segmentation", "maps", "segmentation-beside-maps"],
    )
    def test_the_others_are_delivered(
        self, disk, predict, images, model, tmp_path, size_kb, large, options, expected
    ):
        self.enlarge(images, large)
        ran = predict(*options, out=disk(size_kb))
        assert ran.status == 1, ran.err
        assert "4 done, 1 failed" in ran.out
        assert squeezed(expected) in squeezed(ran.out), ran.out
        assert "Free some space" in " ".join(ran.out.split())
        assert_whole(tmp_path / "disk", model, images, others(large), *options)

    def test_the_process_ends_soon(self, disk, start, images, model, tmp_path):
        self.enlarge(images)
        process = start(out=disk(64))
        process.wait_for(lambda: "case cora failed" in process.err)
        seen = time.monotonic()
        ran = process.end()
        assert time.monotonic() - seen < LIMIT_SECONDS
        assert ran.status == 1, ran.err
        assert_whole(tmp_path / "disk", model, images, others("cora"))

    def test_with_more_room_the_same_command_completes_them(
        self, disk, predict, images, model, tmp_path
    ):
        folder = disk(208)
        self.enlarge(images)
        assert predict(*MAPS, out=folder).status == 1
        subprocess.run(["mount", "-o", "remount,size=4m", str(folder)], check=True)
        ran = predict(*MAPS, out=folder)
        assert ran.status == 0, ran.err
        assert "1 done, 4 skipped" in ran.out
        assert_whole(folder, model, images, SHAPES, *MAPS)

    def test_a_disk_without_any_room_is_told(self, disk, predict, images):
        folder = disk(8)
        (folder / "filling").write_bytes(bytes(8000))
        ran = predict(out=folder)
        assert ran.status in (1, 2)
        assert "the disk is full" in ran.out + ran.err
        assert "Traceback" not in ran.err
        assert [path.name for path in folder.iterdir()] == ["filling"]

    def enlarge(self, images, case="cora"):
        channels = make_channels((50, 37, 29), seed=7)
        write_case(images, case, channels, make_oblique(), ending=".nii")


class TestUnwritableOutput:
    def test_a_file_in_place_of_the_folder(self, predict, tmp_path):
        (tmp_path / "out").write_text("a file")
        ran = predict()
        assert ran.status == 2
        assert f"{tmp_path / 'out'}: is a file; expected a folder" in ran.err

    def test_a_file_in_place_of_the_folder_above(self, predict, tmp_path):
        (tmp_path / "file").write_text("a file")
        ran = predict(out=tmp_path / "file/out")
        assert ran.status == 2
        assert "cannot be written to" in ran.err
        assert "choose another output folder" in ran.err.lower()

    def test_a_folder_in_place_of_a_result(self, predict, images, model, tmp_path):
        (tmp_path / "out/cora.nii").mkdir(parents=True)
        ran = predict(*MAPS)
        assert ran.status == 1
        assert "4 done, 1 failed" in ran.out
        assert squeezed("cora.nii: not written") in squeezed(ran.out)
        (tmp_path / "out/cora.nii").rmdir()
        assert_whole(tmp_path / "out", model, images, others("cora"), *MAPS)

    def test_a_disk_that_may_only_be_read(self, disk, predict, monkeypatch):
        """It is found before the networks have worked for nothing."""
        folder = disk(500)
        subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True)
        monkeypatch.setattr(UNet, "forward", lambda *_: pytest.fail("the networks ran"))
        ran = predict(out=folder)
        assert ran.status == 2
        assert f"{folder}: cannot be written to (Read-only file system)" in ran.err


def hidden(out, pattern):
    return lambda: out.exists() and any(out.glob(pattern))


def after_the_first_cases(process, out):
    """Wait until two cases are whole; the third, which takes a while, is in work then."""
    process.wait_for(lambda: (out / "bert.json").exists())


class TestInterruption:
    """In the middle of the third case; then the same command once more."""

    @pytest.mark.parametrize(
        ("number", "status", "options"),
        [(signal.SIGINT, 130, MAPS), (signal.SIGTERM, 143, MAPS), (signal.SIGINT, 130, ())],
        ids=["ctrl-c-maps", "terminate-maps", "ctrl-c"],
    )
    def test_while_the_network_runs(
        self, start, predict, images, model, tmp_path, number, status, options
    ):
        out, options = tmp_path / "out", (*options, *FINE)
        process = start(*options)
        after_the_first_cases(process, out)
        if MAPS[1] in options:
            process.wait_for(hidden(out, ".cora.probabilities.nii.*.part"))
        ran = process.send(number)
        assert ran.status == status, ran.err
        assert "Traceback" not in ran.err
        assert "Interrupted. Finished cases are whole" in ran.err
        assert_whole(out, model, images, ["anna", "bert"], *options)
        ran = predict(*options)
        assert (ran.status, "3 done, 2 skipped" in ran.out) == (0, True), ran.out + ran.err
        assert_whole(out, model, images, SHAPES, *options)

    def test_while_a_file_is_read_that_never_comes(self, start, images, model, tmp_path):
        """A disk of the network that hangs cannot hold the command."""
        hanging = (
            "import sys, time, medseg.io.nifti as module\n"
            "original = module.read\n"
            "def read(path):\n"
            "    if path.name == 'cora_0001.nii':\n"
            "        print('reading', flush=True, file=sys.stderr)\n"
            "        time.sleep(600)\n"
            "    return original(path)\n"
            "module.read = read"
        )
        process = start(before=hanging)
        process.wait_for(lambda: (tmp_path / "out/bert.json").exists() and "reading" in process.err)
        ran = process.send(signal.SIGINT)
        assert ran.status == 130
        assert_whole(tmp_path / "out", model, images, ["anna", "bert"])

    def test_while_a_result_is_written_that_takes_long(self, start, images, model, tmp_path):
        """What is half-written then is taken away."""
        slow = (
            "import sys, time, medseg.io.nifti as module\n"
            "original = module.write\n"
            "def write(path, *rest, **options):\n"
            "    original(path, *rest, **options)\n"
            "    if path.name == 'cora.nii':\n"
            "        print('writing', flush=True, file=sys.stderr)\n"
            "        time.sleep(600)\n"
            "module.write = write"
        )
        process = start(*MAPS, before=slow)
        process.wait_for(lambda: "writing" in process.err)
        ran = process.send(signal.SIGINT)
        assert ran.status == 130
        assert_whole(tmp_path / "out", model, images, ["anna", "bert"], *MAPS)


def test_stages_that_all_hang_are_waited_for_once(monkeypatch):
    """Three times the wait would be longer than a command may take to end."""
    monkeypatch.setattr(pipeline, "_JOIN_SECONDS", 0.6)
    never, stop, hanging = threading.Event(), threading.Event(), threading.Semaphore(0)

    def hang(item, number):
        if item == number:
            hanging.release()
            never.wait()

    stages = pipeline.Stages(
        prepare=lambda item: hang(item, 2),
        compute=lambda pairs: [hang(item, 1) for item, _ in pairs],
        finish=lambda item, _: hang(item, 0),
        fail=lambda item, error: error,
    )

    def end_all():
        for _ in range(3):
            hanging.acquire()
        stop.set()

    threading.Thread(target=end_all, daemon=True).start()
    outcomes = pipeline.run(range(5), stages, stop)
    started = time.monotonic()
    try:
        assert list(outcomes) == []
        seconds = time.monotonic() - started
        still = [thread for thread in threading.enumerate() if thread.name.startswith("medseg-")]
    finally:
        never.set()
    assert len(still) == 3, "all of them hung"
    assert 0.6 <= seconds < 1.7
    for thread in still:
        thread.join()


def test_a_killed_command_is_completed_by_the_same_command(start, predict, images, model, tmp_path):
    """What it left half-written is taken away too."""
    out, options = tmp_path / "out", (*MAPS, *FINE)
    process = start(*options)
    after_the_first_cases(process, out)
    process.wait_for(hidden(out, ".cora.probabilities.nii.*.part"))
    process.kill()
    assert hidden(out, ".cora.probabilities.nii.*.part")()
    assert not (out / "cora.probabilities.nii").exists()
    ran = predict(*options)
    assert (ran.status, "3 done, 2 skipped" in ran.out) == (0, True), ran.out + ran.err
    assert_whole(out, model, images, SHAPES, *options)


def test_weights_that_give_no_numbers_are_told(predict, bundle, tmp_path):
    """Every case fails with clear words, and nothing is delivered."""
    source = read_bundle(bundle)
    weights = load_weights(source.weights("fold_0"))
    weights = {name: values * np.nan for name, values in weights.items()}
    spoiled = write_bundle(
        tmp_path / "spoiled", spec=source.spec, plans=source.plans, configuration="tiny",
        weights={"fold_0": {"final": weights}}, semantics=source.manifest.semantics,
    )  # fmt: skip
    ran = predict(*MAPS, model=spoiled.folder)
    assert ran.status == 1
    told = " ".join(ran.out.split())
    assert "0 done, 5 failed" in told
    assert told.count("the weights are unusable. Use another checkpoint or train again.") == 5
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["summary.csv", "summary.json"]


def test_too_little_memory_is_refused_with_numbers(predict, tmp_path):
    ran = predict("--max-memory", "10MB", *MAPS)
    assert ran.status == 2
    assert re.search(r"max_memory is 10 MB, and [\d.]+ [MG]B are taken by the program", ran.err)
    assert not (tmp_path / "out").exists()


@contextmanager
def failing_report(monkeypatch, case):
    from medseg.infer import case_files as folder

    original = folder.write_report

    def write_report(target, report):
        if report.case == case:
            raise DatasetError("the disk is full")
        return original(target, report)

    with monkeypatch.context() as patch:
        patch.setattr(folder, "write_report", write_report)
        yield


def test_a_case_that_fails_at_its_last_file_is_done_again(
    predict, images, model, monkeypatch, tmp_path
):
    """It is reported as failed, so none of its files may pass for an output."""
    out = tmp_path / "out"
    with failing_report(monkeypatch, "cora"):
        ran = predict(*MAPS)
    assert ran.status == 1
    assert_whole(out, model, images, others("cora"), *MAPS)
    ran = predict(*MAPS)
    assert (ran.status, "1 done, 4 skipped" in ran.out) == (0, True)
    assert_whole(out, model, images, SHAPES, *MAPS)
