"""Amounts of memory and disk as people write them."""

from __future__ import annotations

import pytest

from medseg.errors import ConfigError
from medseg.execute.sizes import read_size


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("4GB", 4 * 10**9), ("1.5 gb", 15 * 10**8), ("512MiB", 2**29), ("300000kB", 3 * 10**8),
        (7, 7), ("2g", 2 * 10**9), ("2tb", 2 * 10**12),
    ],
)  # fmt: skip
def test_sizes_are_read(text, size):
    assert read_size(text, "max_memory") == size


@pytest.mark.parametrize("text", ["", "4 X", "GB", "-4GB", "0", "4GB extra", "1e400GB", "nan"])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(ConfigError, match=r"max_vram is .*expected a size such as 4GB"):
        read_size(text, "max_vram")
