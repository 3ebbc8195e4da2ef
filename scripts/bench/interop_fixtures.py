"""What the writers of fixtures of nnU-Net 1 and 2 share; it runs in the environment of either."""

from __future__ import annotations

import argparse
import contextlib
import io
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import SimpleITK as sitk


def parse_options(description: str | None, names: Iterable[str]) -> argparse.Namespace:
    """Return what is to be written or checked, as the command line says it.

    Args:
        description: What the command's help says.
        names: Fixtures that can be written.
    """
    known = sorted(names)
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("out", type=Path, nargs="?")
    parser.add_argument("--only", nargs="+", choices=known, default=known)
    parser.add_argument("--check", type=Path, nargs="+", default=[])
    return parser.parse_args()


def read(path: Path) -> np.ndarray:
    """Return an image's values, (z, y, x)."""
    return sitk.GetArrayFromImage(sitk.ReadImage(str(path)))


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep what the original prints for the case that it fails."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said):
            yield
    except BaseException:
        sys.stderr.write(said.getvalue()[-4000:])
        raise
