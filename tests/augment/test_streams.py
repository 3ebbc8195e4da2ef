from __future__ import annotations

import pytest
import torch

from medseg.augment.streams import draw_field_seed, field_generator, sample_seed, stream


def test_sample_seeds_are_distinct_and_never_swap_seed_and_index():
    seeds = {sample_seed(seed, index) for seed in range(7) for index in range(11)}
    assert len(seeds) == 77
    assert sample_seed(2, 3) != sample_seed(3, 2)


def test_streams_repeat_themselves_and_differ_between_neighbouring_seeds():
    draws = [stream(seed).random(4).tolist() for seed in (5, 5, 6, sample_seed(1, 5))]
    assert draws[0] == draws[1]
    assert len({tuple(draw) for draw in draws}) == 3


@pytest.mark.parametrize("wrong", [-1, 1 << 128])
def test_seed_out_of_range_is_refused(wrong):
    with pytest.raises(ValueError, match="seed must be in"):
        stream(wrong)


def test_sample_seed_out_of_range_is_refused():
    with pytest.raises(ValueError, match="seed and index must be in"):
        sample_seed(0, 1 << 64)


def test_field_generator_accepts_every_drawn_seed():
    seed = draw_field_seed(stream(0))
    first, second = (
        torch.randn(3, generator=field_generator(seed, torch.device("cpu"))) for _ in range(2)
    )
    assert torch.equal(first, second)
