"""The file beside an image that gives its voxel size."""

import json

import numpy as np
import pytest
import tifffile
from PIL import Image as Pillow

from medseg.errors import DatasetError
from medseg.geometry import Grid
from medseg.io.image import Header
from medseg.io.read import read_channels, read_image, read_segmentation
from medseg.io.write import write_segmentation

STACK = np.arange(4 * 5 * 7, dtype=np.uint16).reshape(4, 5, 7)
"""(pages, rows, columns)."""


def write(path, array=STACK, **side_files):
    tifffile.imwrite(path, array, photometric="minisblack", metadata=None)
    for name, content in side_files.items():
        text = content if isinstance(content, str) else json.dumps(content)
        (path.parent / f"{name}.json").write_text(text, encoding="utf-8")
    return path


class TestReading:
    def test_order_is_that_of_the_array_in_the_file(self, tmp_path):
        """Pages, rows, columns, as nnU-Net has it."""
        path = write(tmp_path / "cell6.tif", cell6={"spacing": [3.0, 0.5, 0.25]})
        image = read_image(path)
        assert image.array.shape == (7, 5, 4)
        assert image.grid.spacing == (0.25, 0.5, 3.0)
        assert image.header.has_spacing

    def test_channels_share_the_file_without_their_number(self, tmp_path):
        write(tmp_path / "a_0000.tif", a={"spacing": [3, 2, 1]})
        image = read_channels([tmp_path / "a_0000.tif", write(tmp_path / "a_0001.tif")])
        assert image.grid.spacing == (1, 2, 3)

    def test_the_full_name_goes_first(self, tmp_path):
        path = write(
            tmp_path / "a_0000.tif", a={"spacing": [3, 2, 1]}, a_0000={"spacing": [6, 5, 4]}
        )
        assert read_image(path).grid.spacing == (4, 5, 6)

    def test_flat_picture(self, tmp_path):
        """Two numbers, rows first; the slice is as thick as a pixel is wide."""
        Pillow.fromarray(STACK[0].astype(np.uint8)).save(tmp_path / "x.png")
        (tmp_path / "x.json").write_text('{"spacing": [0.5, 0.25]}')
        assert read_image(tmp_path / "x.png").grid.spacing == (0.25, 0.5, 0.5)
        (tmp_path / "x.json").write_text('{"spacing": [9, 0.5, 0.25]}')
        assert read_image(tmp_path / "x.png").grid.spacing == (0.25, 0.5, 9)

    @pytest.mark.parametrize("content", [{"author": "me"}, ["spacing"], 7])
    def test_files_about_something_else_are_passed_over(self, tmp_path, content):
        image = read_image(write(tmp_path / "x.tif", x=content))
        assert (image.grid.spacing, image.header.has_spacing) == ((1, 1, 1), False)

    @pytest.mark.parametrize(
        "spacing",
        [[], [1.0], [1, 2, 3, 4], [1, 0, 1], [1, -1, 1], [1, float("nan"), 1], [1, "2", 3],
         [True, 1, 1], "1 2 3", None, {"x": 1}],
    )  # fmt: skip
    def test_values_that_are_no_voxel_size(self, tmp_path, spacing):
        path = write(tmp_path / "x.tif", x={"spacing": spacing})
        with pytest.raises(
            DatasetError, match=r"x\.json: spacing is .*; expected positive numbers"
        ):
            read_image(path)

    @pytest.mark.parametrize("text", ["{", "", "\u00ff\u00fe{"])
    def test_file_that_is_no_json(self, tmp_path, text):
        path = write(tmp_path / "x.tif", x=text)
        with pytest.raises(DatasetError, match=r"x\.json: is no valid JSON"):
            read_image(path)


class TestWriting:
    LABELS = (STACK % 3).astype(np.uint8).T

    def header(self, spacing=(0.25, 0.5, 3.0), shape=(7, 5, 4)):
        return Header.of_grid(Grid(shape, np.diag([*spacing, 1.0])))

    def test_stack_has_its_file(self, tmp_path):
        write_segmentation(tmp_path / "a.tif", self.LABELS, self.header())
        assert sorted(p.name for p in tmp_path.iterdir()) == ["a.json", "a.tif"]
        assert json.loads((tmp_path / "a.json").read_text()) == {"spacing": [3.0, 0.5, 0.25]}
        found = read_segmentation(tmp_path / "a.tif")
        np.testing.assert_array_equal(found.array, self.LABELS)
        assert found.grid.spacing == (0.25, 0.5, 3.0)

    @pytest.mark.parametrize("spacing", [(0.25, 0.5, 0.5), (0.25, 0.5, 7.0), (1, 1, 2.0)])
    @pytest.mark.parametrize("ending", [".png", ".tif"])
    def test_picture_has_one_where_pixels_are_not_of_1_mm(self, tmp_path, spacing, ending):
        labels = self.LABELS[:, :, :1]
        write_segmentation(tmp_path / f"a{ending}", labels, self.header(spacing, (7, 5, 1)))
        assert (tmp_path / "a.json").is_file()
        found = read_segmentation(tmp_path / f"a{ending}")
        np.testing.assert_array_equal(found.array, labels)
        assert found.grid.spacing == spacing

    def test_a_file_that_is_there_never_says_otherwise(self, tmp_path):
        """An older voxel size is replaced, other entries stay."""
        (tmp_path / "a.json").write_text('{"spacing": [9, 9], "author": "me"}')
        labels = self.LABELS[:, :, :1]
        write_segmentation(tmp_path / "a.png", labels, self.header((1, 1, 1), (7, 5, 1)))
        content = json.loads((tmp_path / "a.json").read_text())
        assert content == {"spacing": [1.0, 1.0], "author": "me"}
        assert read_segmentation(tmp_path / "a.png").grid.spacing == (1, 1, 1)

    def test_a_file_about_something_else_is_left_alone(self, tmp_path):
        (tmp_path / "a.json").write_text('{"author": "me"}')
        labels = self.LABELS[:, :, :1]
        write_segmentation(tmp_path / "a.png", labels, self.header((1, 1, 1), (7, 5, 1)))
        assert (tmp_path / "a.json").read_text() == '{"author": "me"}'

    def test_a_file_of_something_else_is_not_overwritten(self, tmp_path):
        (tmp_path / "a.json").write_text("[1, 2]")
        with pytest.raises(DatasetError, match=r"a\.json: is no JSON object"):
            write_segmentation(tmp_path / "a.tif", self.LABELS, self.header())
        assert [p.name for p in tmp_path.iterdir()] == ["a.json"]
