"""Who imports whom: the table of layers, walked over every import of the package."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import medseg

PACKAGE = Path(medseg.__file__).parent
LAYERS = {
    0: ("errors",),
    1: ("schema", "geometry", "values", "execute"),
    2: ("labels", "crop", "resample", "io", "models", "losses", "augment", "metrics", "mr"),
    3: ("data", "postprocess"),
    4: ("preprocess", "plan", "check", "bundles"),
    5: ("infer", "interop"),
    6: ("evaluate", "train"),
    7: ("report",),
    8: ("api", "demo", "serve", "__init__"),
    9: ("cli",),
    10: ("__main__",),
}
FACE = 8
"""The one layer whose units know each other: together they are what `import medseg` offers."""
LAYER_OF = {unit: layer for layer, units in LAYERS.items() for unit in units}
ONLY_IN_IO = {"SimpleITK", "nibabel", "pydicom"}
ALONE = "interop/runtime.py"
"""Copied into every export, where it runs without medseg: it imports nothing of it, nor is it
imported."""
SOURCES = {
    path.relative_to(PACKAGE).as_posix(): path.read_text(encoding="utf-8")
    for path in sorted(PACKAGE.rglob("*.py"))
}


def unit_of(name: str) -> str:
    """Return the unit a file or a dotted name belongs to.

    >>> unit_of("io/read.py"), unit_of("labels.py"), unit_of("medseg.io.read"), unit_of("medseg")
    ('io', 'labels', 'io', '__init__')
    """
    if name.endswith(".py"):
        return name.split("/")[0].removesuffix(".py")
    parts = name.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def imported_names(source: str) -> Iterator[str]:
    """Yield the dotted name of every import, wherever in the file it stands.

    >>> sorted(imported_names("import os.path\\ndef f():\\n  from medseg import io, crop as c"))
    ['medseg.crop', 'medseg.io', 'os.path']
    """
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                yield "." * node.level
            elif node.module == "medseg":
                yield from (f"medseg.{alias.name}" for alias in node.names)
            else:
                yield str(node.module)


def test_every_unit_has_a_layer():
    assert {unit_of(name) for name in SOURCES} <= set(LAYER_OF)


def test_imports_go_down_only():
    """Lower layers and one's own unit, nothing else; a medseg name that is no unit is a value."""
    wrong = []
    for file, source in SOURCES.items():
        own = unit_of(file)
        for name in imported_names(source):
            assert not name.startswith("."), f"{file}: relative import; give the whole name"
            if name.split(".")[0] != "medseg":
                continue
            other = unit_of(name)
            if other not in LAYER_OF:
                other = "__init__"
            if own == other or LAYER_OF[own] == LAYER_OF[other] == FACE:
                continue
            if LAYER_OF[other] >= LAYER_OF[own]:
                wrong.append(f"{file} imports {name}")
    assert wrong == []


def test_only_io_knows_the_image_libraries():
    wrong = [
        f"{file} imports {name}"
        for file, source in SOURCES.items()
        for name in imported_names(source)
        if name.split(".")[0] in ONLY_IN_IO and unit_of(file) != "io" and file != ALONE
    ]
    assert wrong == []


def test_the_runtime_of_exports_stands_alone():
    used = {name.split(".")[0] for name in imported_names(SOURCES[ALONE])}
    assert used <= sys.stdlib_module_names | {"nibabel", "numpy", "onnxruntime", "scipy"}
    users = [f for f, s in SOURCES.items() if "medseg.interop.runtime" in imported_names(s)]
    assert users == []


def reads_environment(source: str) -> bool:
    """Return whether a file mentions the environment by any of its names.

    >>> reads_environment("import os\\nos.environ['A']"), reads_environment("from os import getenv")
    (True, True)
    >>> reads_environment("environ = 1")
    False
    """
    names = {"environ", "environb", "getenv", "getenvb", "expandvars"}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and node.attr in names:
            return True
        is_from_os = isinstance(node, ast.ImportFrom) and node.module in ("os", "os.path")
        if is_from_os and names & {alias.name for alias in node.names}:
            return True
    return False


def test_only_the_command_line_reads_the_environment():
    assert [f for f, s in SOURCES.items() if unit_of(f) != "cli" and reads_environment(s)] == []


@pytest.mark.parametrize("unit", ["infer", "data", "preprocess", "plan"])
def test_prediction_needs_no_training_code(unit):
    """A bundle is enough to predict: what `infer` stands on never reaches `train`."""
    names = {n for f, s in SOURCES.items() if unit_of(f) == unit for n in imported_names(s)}
    assert not {name for name in names if name.startswith(("medseg.train", "medseg.api"))}


def test_the_command_line_imports_its_work_late():
    """Files of `cli` import at their top nothing that is slow: the help must appear at once."""
    allowed = {"medseg.cli", "medseg.errors"}
    wrong = []
    for file in (name for name in SOURCES if unit_of(name) == "cli"):
        tree = ast.parse(SOURCES[file])
        for node in tree.body:
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                names = imported_names(ast.unparse(node))
                found = {".".join(n.split(".")[:2]) for n in names if n.startswith("medseg")}
                wrong += [f"{file} imports {name}" for name in found - allowed]
    assert wrong == []
