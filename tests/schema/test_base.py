"""Reading and writing the files: readable JSON, whole or not at all, all problems at once."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from medseg.errors import ConfigError
from medseg.schema import base
from medseg.schema.base import format_json, read, validate, write, write_bytes, write_json
from medseg.schema.dataset import DatasetSpec
from medseg.schema.recipe import Recipe

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=30,
)


@given(JSON)
def test_formatted_json_means_the_same(values):
    assert json.loads(format_json(values)) == values
    assert json.loads(format_json(values, width=20)) == values


def test_short_lists_stay_on_one_line():
    values = {"strides": [[1, 1, 1], [2, 2, 2]], "names": ["x" * 30] * 5, "empty": []}
    assert format_json(values).splitlines() == [
        "{",
        '  "strides": [[1, 1, 1], [2, 2, 2]],',
        '  "names": [',
        *[f'    "{"x" * 30}"' + ("," if n < 4 else "") for n in range(5)],
        "  ],",
        '  "empty": []',
        "}",
    ]


def test_nan_is_refused_not_written(tmp_path):
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "a.json", {"dice": float("nan")})
    assert list(tmp_path.iterdir()) == []


def test_non_ascii_text_is_kept(tmp_path):
    write_json(tmp_path / "a.json", {"name": "K\u00f6pfe \u8111"})
    assert json.loads((tmp_path / "a.json").read_text("utf-8")) == {"name": "K\u00f6pfe \u8111"}


def test_a_failed_write_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "deep" / "file.json"
    write_bytes(path, b"old")

    def fail(*arguments):
        raise OSError("no space left on device")

    for name in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(base.os, name, fail)
            with pytest.raises(OSError, match="no space"):
                write_bytes(path, b"new")
        assert path.read_bytes() == b"old"
        assert [entry.name for entry in path.parent.iterdir()] == ["file.json"]
    write_bytes(path, b"new")
    assert path.read_bytes() == b"new"
    assert path.stat().st_mode & 0o777 == 0o644


def test_all_problems_are_listed_with_their_place():
    values = {"epochs": 0, "optimizer": {"lr": "fast", "lrr": 1}, "colour": "red"}
    with pytest.raises(ConfigError) as caught:
        validate(Recipe, values, "my.yaml")
    lines = str(caught.value).splitlines()
    assert lines[0] == "4 problems in my.yaml:"
    assert any(line.startswith("  epochs: got 0; input should be greater than 0") for line in lines)
    assert any(line.startswith("  optimizer.lr: got 'fast'; input should be") for line in lines)
    assert any(line.startswith("  optimizer.lrr: got 1; extra inputs") for line in lines)
    assert any(line.startswith("  colour: got 'red'; extra inputs") for line in lines)


def test_long_values_are_shortened_and_one_problem_is_singular():
    with pytest.raises(ConfigError) as caught:
        validate(Recipe, {"epochs": "x" * 500}, "my.yaml")
    assert str(caught.value).startswith("1 problem in my.yaml:")
    assert len(str(caught.value)) < 250


@pytest.mark.parametrize("values", [[], "text", None, 3])
def test_another_kind_of_file_is_refused(values):
    with pytest.raises(ConfigError, match=r"1 problem in a\.json:\n  \(whole file\)"):
        validate(Recipe, values, "a.json")


def test_a_file_of_a_later_version_is_refused_first(tmp_path):
    path = tmp_path / "dataset.json"
    path.write_text(json.dumps({"format_version": 2, "something": "new"}))
    with pytest.raises(
        ConfigError, match="format_version is 2, this medseg reads up to 1"
    ) as caught:
        read(DatasetSpec, path)
    assert "Update medseg" in str(caught.value)
    assert str(path) in str(caught.value)


def test_missing_and_broken_files(tmp_path):
    with pytest.raises(ConfigError, match="no such file"):
        read(Recipe, tmp_path / "none.json")
    for content in (b'{"epochs": ', b"\xff\xfe\x00"):
        (tmp_path / "bad.json").write_bytes(content)
        with pytest.raises(ConfigError, match=r"bad\.json: not valid JSON"):
            read(Recipe, tmp_path / "bad.json")


def test_values_are_frozen(tmp_path):
    recipe = Recipe()
    with pytest.raises(ValueError, match="frozen"):
        recipe.epochs = 3
    write(tmp_path / "recipe.json", recipe)
    assert read(Recipe, tmp_path / "recipe.json") == recipe
