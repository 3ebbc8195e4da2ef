"""The command line in this process."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from medseg.api.prepare import plan_and_preprocess
from medseg.cli.main import run
from medseg.cli.options import settings


@dataclass(frozen=True)
class Ran:
    """What one command did."""

    status: int
    out: str
    err: str


@pytest.fixture
def medseg(capsys, tmp_path, monkeypatch, few_samples, one_thread):
    """Run commands on the workspace `tmp_path / "work"`."""
    monkeypatch.setattr(settings, "workspace", settings.workspace)
    monkeypatch.setattr(settings, "debug", False)

    def call(*arguments, workspace=tmp_path / "work"):
        capsys.readouterr()
        status = run(["--workspace", str(workspace), *map(str, arguments)])
        captured = capsys.readouterr()
        return Ran(status, captured.out, captured.err)

    with few_samples():
        yield call


@pytest.fixture(scope="session")
def prepared(tmp_path_factory, datasets, few_samples):
    """A workspace with one small dataset, planned and preprocessed for 3d_fullres."""
    root = tmp_path_factory.mktemp("prepared")
    raw = datasets.write(root / "Dataset007_Tiny", num_cases=4)
    with few_samples():
        plan_and_preprocess(raw, configurations=["3d_fullres"], workspace=root / "work", workers=1)
    return root


@pytest.fixture
def workspace(prepared) -> Path:
    return prepared / "work"
