"""What `import medseg` offers, and how quickly."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time

import pytest

import medseg

HEAVY = ("torch", "numpy", "scipy", "pydantic", "nibabel", "SimpleITK", "matplotlib", "blosc2")
ROUNDS = 5


def python(code, *flags):
    """Run code in a fresh interpreter and return what it printed."""
    command = [sys.executable, *flags, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stderr == ""
    return done.stdout


def seconds_beyond_start(*command):
    """Return the median time of a command less that of a bare interpreter, taken in turns."""
    extra = []
    for _ in range(ROUNDS):
        taken = []
        for arguments in (["-c", "pass"], command):
            start = time.perf_counter()
            subprocess.run([sys.executable, *arguments], capture_output=True, check=True)
            taken.append(time.perf_counter() - start)
        extra.append(taken[1] - taken[0])
    return statistics.median(extra)


@pytest.fixture(scope="module")
def slack():
    """Return how much slower than usual a bare interpreter starts here, at least 1."""
    start = time.perf_counter()
    for _ in range(ROUNDS):
        subprocess.run([sys.executable, "-c", "pass"], check=True)
    return max(1.0, (time.perf_counter() - start) / ROUNDS / 0.05)


def test_import_is_quick(slack):
    assert seconds_beyond_start("-c", "import medseg") < 0.3 * slack


def test_help_is_quick(slack):
    assert seconds_beyond_start("-m", "medseg", "--help") < 0.8 * slack


def test_import_loads_nothing_heavy():
    loaded = python("import sys, medseg; print(*sorted(sys.modules))").split()
    assert [name for name in loaded if name.split(".")[0] in HEAVY] == []


@pytest.mark.parametrize(
    ("command", "allowed"),
    [("--help", set()), ("train --help", {"pydantic"})],
    ids=["all", "train"],
)
def test_help_loads_nothing_heavy(command, allowed):
    """typer itself reads option types with pydantic as soon as one command is looked at."""
    code = (
        f"import sys; from medseg.cli.main import run; run({command.split()!r});"
        "print('MODULES', *sorted(sys.modules))"
    )
    loaded = {name.split(".")[0] for name in python(code).split("MODULES")[1].split()}
    assert loaded & set(HEAVY) <= allowed


def test_import_is_silent_and_starts_no_thread():
    assert python("import threading, medseg; print(threading.active_count())") == "1\n"


def test_public_names_are_those_listed():
    public = {name for name in dir(medseg) if not name.startswith("_")}
    assert public == set(medseg.__all__)
    assert sorted(medseg.__all__) == list(medseg.__all__)
    for name in medseg.__all__:
        value = getattr(medseg, name)
        assert callable(value), name
        assert value.__doc__, name


def test_unknown_names_are_refused():
    with pytest.raises(AttributeError, match="module 'medseg' has no attribute 'nothing'"):
        getattr(medseg, "nothing")  # noqa: B009 - the lookup is what is tested


def test_functions_keep_their_names_beside_subpackages_of_the_same_name():
    """`medseg.train` is a sub-package, too; importing it must not hide the function."""
    code = """
import importlib, tempfile, types
import medseg
import medseg.train.loop
import medseg.evaluate.cases
from medseg.train.trainer import Trainer
importlib.import_module("medseg.evaluate")
for name in ("train", "evaluate"):
    assert isinstance(getattr(medseg, name), types.FunctionType), name
try:
    medseg.evaluate(tempfile.mkdtemp(), tempfile.mkdtemp())
except medseg.DatasetError:
    pass
assert isinstance(medseg.evaluate, types.FunctionType)
assert isinstance(medseg.train, types.FunctionType)
from medseg import evaluate, train
assert isinstance(train, types.FunctionType)
"""
    python(code)


def test_version_is_that_of_the_package():
    from importlib.metadata import version

    assert medseg.__version__ == version("medseg")
