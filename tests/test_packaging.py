"""What is installed: every package, the recipes, and documented, pinned dependencies."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path
from zipfile import ZipFile

import pytest

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
SETUPTOOLS = PROJECT["tool"]["setuptools"]
EXTRAS = PROJECT["project"]["optional-dependencies"]
REQUIREMENTS = [*PROJECT["project"]["dependencies"], *EXTRAS["test"], *EXTRAS["dev"]]


def plain_name(requirement: str) -> str:
    """Return the normalised name of a requirement.

    >>> plain_name("SimpleITK>=2.3"), plain_name("types_PyYAML"), plain_name("medseg[test]")
    ('simpleitk', 'types-pyyaml', 'medseg')
    """
    name = re.match(r"[\w.-]+", requirement)
    return re.sub(r"[-_.]+", "-", name.group()).lower() if name else ""


def packages_on_disk() -> set[str]:
    """Return the dotted name of every folder of `medseg/` that holds Python files."""
    folders = {path.parent for path in (ROOT / "medseg").rglob("*.py")}
    return {".".join(folder.relative_to(ROOT).parts) for folder in folders}


def test_package_list_is_complete() -> None:
    assert set(SETUPTOOLS["packages"]) == packages_on_disk() | {"medseg.configs"}
    assert SETUPTOOLS["package-dir"] == {"medseg.configs": "configs"}


def test_every_package_has_an_init() -> None:
    lacking = [name for name in packages_on_disk()
               if not (ROOT / name.replace(".", "/") / "__init__.py").is_file()]  # fmt: skip
    assert not lacking


def test_requirements_are_pinned() -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = dict(line.split("==") for line in lines if not line.startswith("#"))
    assert pins["torch"] == "2.13.0"
    needed = {plain_name(requirement) for requirement in REQUIREMENTS} - {"medseg"}
    assert needed | {"setuptools"} <= set(pins)
    assert list(pins) == sorted(pins)
    assert not any("+" in version or "/" in version for version in pins.values())


def test_requirements_are_explained() -> None:
    page = (ROOT / "docs" / "dependencies.md").read_text(encoding="utf-8")
    named = {plain_name(word) for word in re.findall(r"[\w-]+", page)}
    assert {plain_name(requirement) for requirement in REQUIREMENTS} <= named


def test_versions_agree() -> None:
    import medseg

    assert PROJECT["project"]["version"] == medseg.__version__
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert f"## {medseg.__version__}" in changes


@pytest.mark.slow
def test_wheel_holds_packages_and_recipes(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        (source / name).write_bytes((ROOT / name).read_bytes())
    for folder, pattern in (("medseg", "*.py"), ("medseg", "py.typed"), ("configs", "*.yaml")):
        for path in (ROOT / folder).rglob(pattern):
            target = source / path.relative_to(ROOT)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation"]
    command += ["--disable-pip-version-check", "-q", "-w", str(tmp_path), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    with ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        names = set(wheel.namelist())
    expected = {path.relative_to(ROOT).as_posix() for path in (ROOT / "medseg").rglob("*.py")}
    expected |= {f"medseg/configs/{path.name}" for path in (ROOT / "configs").glob("*.yaml")}
    assert expected | {"medseg/py.typed"} <= names
    assert all(name.startswith(("medseg/", "medseg-")) for name in names)
