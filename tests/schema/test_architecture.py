"""The description of a network: kinds that are known, and options that leave no trace if empty."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from medseg.schema.plans import KINDS, Architecture

VALUES: dict[str, Any] = {
    "kind": "plain_unet",
    "features": [4, 8],
    "kernel_sizes": [[1, 3, 3], [3, 3, 3]],
    "strides": [[1, 1, 1], [1, 2, 2]],
    "blocks_encoder": [2, 1],
    "blocks_decoder": [2],
}


def test_description_without_options_is_written_as_it_was_read() -> None:
    assert Architecture.model_validate(VALUES).model_dump(mode="json") == VALUES


def test_options_are_written_where_there_are_any() -> None:
    values = {**VALUES, "kind": "a.b:Net", "options": {"width": 3, "sizes": [1, 2]}}
    read = Architecture.model_validate(values)
    assert read.is_external
    assert read.model_dump(mode="json") == values


@pytest.mark.parametrize("kind", [*KINDS, "pkg:Name", "pkg.sub_2.mod:_Name9"])
def test_known_kinds_and_python_names_are_read(kind: str) -> None:
    read = Architecture.model_validate({**VALUES, "kind": kind})
    assert read.is_external == (":" in kind)


@pytest.mark.parametrize(
    "kind", ["unet", "mednext", "pkg.mod", ":Name", "pkg:", "pkg:a.b", "a b:C", "../x:Y", "a..b:C"]
)
def test_other_kinds_are_refused_with_the_known_ones(kind: str) -> None:
    with pytest.raises(ValidationError, match=r'mednext_l, or "package\.module:Name"'):
        Architecture.model_validate({**VALUES, "kind": kind})


def test_near_name_is_offered() -> None:
    with pytest.raises(ValidationError, match="Did you mean 'mednext_s'"):
        Architecture.model_validate({**VALUES, "kind": "mednexts"})
