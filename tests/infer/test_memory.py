"""Where sums are kept: whole, in a window, in a file, or a refusal with numbers."""

from __future__ import annotations

import pytest
import torch

from medseg.errors import ConfigError
from medseg.infer import memory
from medseg.infer.memory import Export, Limits, Request, arrange

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _known_machine(monkeypatch):
    monkeypatch.setattr(memory, "resident_bytes", lambda: 500_000_000)
    monkeypatch.setattr(memory, "free_memory_bytes", lambda: 50_000_000_000)


def request(**changes):
    values = {
        "shape": (341, 340, 300),
        "shape_network": (341, 340, 300),
        "axes": (2, 1, 0),
        "shape_cropped": (512, 510, 450),
        "tile": (128, 96, 112),
        "is_2d": False,
        "num_inputs": 1,
        "num_channels": 118,
        "features": 8,
        "num_passes": 1,
        "batch": 1,
        "value_bytes": 2,
    }
    return Request(**{**values, **changes})


def export(**changes):
    values = {"shape_image": (450, 510, 512), "num_logits": 118, "label_bytes": 1}
    return Export(**{**values, **changes})


def arranged(limit=None, requests=None, **changes):
    return arrange(requests or [request()], export(**changes), Limits(memory_bytes=limit), CPU)


def test_everything_is_held_whole_where_there_is_room():
    found = arranged()
    assert found.is_plain
    (layout,) = found.layouts
    assert (layout.window, layout.in_file) == (None, False)
    sums = 341 * 340 * 300 * 118 * 4
    assert found.need_bytes > 500_000_000 + sums
    assert "held whole in memory (16.4 GB)" in found.words


def test_a_window_along_the_axis_with_the_smallest_ones():
    """The middle axis has the smallest tile for its length; the window holds it and a slab."""
    found = arranged(9_000_000_000)
    (layout,) = found.layouts
    assert not found.is_plain
    assert (layout.axis, layout.in_file) == (1, False)
    assert 96 < layout.window < 110
    assert found.need_bytes <= 9_000_000_000
    assert f"held {layout.window} rows at a time in memory" in found.words


def test_a_file_where_a_window_is_too_large():
    found = arranged(3_500_000_000)
    (layout,) = found.layouts
    assert layout.in_file
    assert found.need_bytes <= 3_500_000_000
    assert "in a scratch file" in found.words


def test_what_fits_in_no_way_is_refused_with_numbers():
    with pytest.raises(ConfigError, match=r"at least 1\.\d+ GB .*1 GB may be taken.*--max-memory"):
        arranged(1_000_000_000)


def test_without_a_limit_the_free_memory_counts(monkeypatch):
    monkeypatch.setattr(memory, "free_memory_bytes", lambda: 10_000_000_000)
    assert not arranged().is_plain
    monkeypatch.setattr(memory, "free_memory_bytes", lambda: 100_000_000)
    with pytest.raises(ConfigError, match="Close other programs"):
        arranged()


def test_several_models_are_cut_along_the_same_axis_of_the_image():
    requests = [
        request(),
        request(
            axes=(0, 2, 1), shape=(100, 200, 150), shape_network=(100, 200, 150), tile=(64, 64, 64)
        ),
    ]
    found = arranged(12_000_000_000, requests, num_models=2)
    first, second = found.layouts
    assert requests[0].axes[first.axis] == requests[1].axes[second.axis]
    assert first.window is not None
    assert second.window is not None


def test_slices_of_2d_need_a_window_of_a_batch():
    found = arranged(
        4_000_000_000,
        [request(tile=(1, 256, 256), is_2d=True, batch=4, num_channels=60)],
        num_logits=60,
    )
    (layout,) = found.layouts
    assert layout.axis == 0
    assert layout.window < 20


def test_more_channels_and_maps_take_more():
    small, large = arranged(), arranged(num_logits=118, map_bytes=10**9)
    assert large.need_bytes - small.need_bytes == 10**9
    more = arranged(requests=[request(num_channels=119)])
    assert more.need_bytes > small.need_bytes


class TestGpu:
    """What is chosen on a GPU, without one."""

    @pytest.fixture
    def gpu(self, monkeypatch):
        """A GPU with 40 GB free, 2 GB of them kept by torch; returns how to change that."""

        def holds(*, free=38e9, allocated=1e9, reserved=3e9):
            monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (int(free), int(80e9)))
            monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: int(allocated))
            monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: int(reserved))

        holds()
        return holds

    def arranged(self, requests=None, **limits):
        return arrange(requests or [request(batch=4)], export(), Limits(**limits),
                       torch.device("cuda:0"))  # fmt: skip

    def test_sums_lie_beside_the_network_where_there_is_room(self, gpu):
        found = self.arranged()
        assert found.layouts[0].device.type == "cuda"
        assert "whole on the GPU" in found.words

    def test_else_a_window_of_them_else_main_memory(self, gpu):
        gpu(free=14e9)
        window = self.arranged()
        assert window.layouts[0].device.type == "cuda"
        assert window.layouts[0].window is not None
        gpu(free=3e9)
        assert self.arranged().layouts[0].device.type == "cpu"

    def test_a_limit_counts_what_is_taken_and_what_the_network_needs(self, gpu):
        for limit in (30e9, 16e9, 6e9, 3e9):
            (layout,) = self.arranged(vram_bytes=int(limit)).layouts
            chosen = request(batch=layout.batch)
            taken = 1e9 + chosen.network_bytes
            if layout.device.type == "cuda":
                rows = layout.window or chosen.shape[layout.axis]
                taken += chosen.sums_bytes(layout.axis, rows)
            assert taken <= limit

    def test_batches_shrink_to_the_room(self, gpu):
        assert self.arranged().layouts[0].batch == 4
        assert self.arranged(vram_bytes=int(3e9)).layouts[0].batch < 4

    def test_blocks_that_torch_keeps_are_free(self, gpu):
        gpu(free=1e9, allocated=1e9, reserved=38e9)
        assert self.arranged().layouts[0].device.type == "cuda"
