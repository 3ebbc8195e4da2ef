"""Strides and kernels: the rules one by one, and a patch that always passes through."""

import math
import random

import pytest

from medseg.plan.topology import network_topology


def test_halves_all_axes_of_an_isotropic_patch_until_the_edge_is_four():
    topology = network_topology((1.0, 1.0, 1.0), (128, 128, 128))
    assert topology.strides == ((1, 1, 1),) + ((2, 2, 2),) * 5
    assert topology.kernel_sizes == ((3, 3, 3),) * 6
    assert topology.divisor == (32, 32, 32)


def test_thick_axis_waits_until_the_others_are_as_coarse():
    """5 mm against 0.7 mm: kernel 1 and stride 1 while the ratio is at least 2."""
    topology = network_topology((5.0, 0.7, 0.7), (24, 256, 256))
    assert topology.strides == (
        (1, 1, 1), (1, 2, 2), (1, 2, 2), (2, 2, 2), (2, 2, 2), (1, 2, 2), (1, 2, 2)
    )  # fmt: skip
    assert topology.kernel_sizes == ((1, 3, 3),) * 2 + ((3, 3, 3),) * 5
    assert topology.patch_size == (24, 256, 256)


def test_a_ratio_of_exactly_two_is_not_alike():
    assert network_topology((2.0, 1.0), (64, 64)).strides[1] == (1, 2)
    assert network_topology((1.999, 1.0), (64, 64)).strides[1] == (2, 2)


@pytest.mark.parametrize(("length", "num_stages"), [(11, 1), (12, 2), (22, 2), (23, 3)])
def test_a_single_axis_needs_twelve_voxels_to_be_halved(length, num_stages):
    assert len(network_topology((1.0, 1.0), (length, 5)).strides) == num_stages


@pytest.mark.parametrize(("length", "num_stages"), [(7, 1), (8, 2), (15, 3), (16, 3)])
def test_two_axes_need_eight_voxels_to_be_halved(length, num_stages):
    """15 counts as 8 after one halving, as 23 above counts as 12."""
    assert len(network_topology((1.0, 1.0), (length, length)).strides) == num_stages


def test_an_exhausted_fine_axis_no_longer_holds_back_the_others():
    """Only axes that are long enough decide which of them are fine enough."""
    strides = network_topology((3.0, 1.0, 1.0), (96, 7, 7)).strides
    assert strides == ((1, 1, 1),) + ((2, 1, 1),) * 4


def test_half_voxels_of_a_median_are_rounded_up_to_the_divisor():
    assert network_topology((10.0, 1.4, 1.4), (14.5, 208.5, 204.5)).patch_size == (16, 224, 224)
    assert network_topology((9.0, 1.0, 1.0), (3.5, 40, 40)).patch_size == (4, 40, 40)


def test_the_patch_always_passes_through_the_network():
    """Every stage gets whole voxels, divisor and strides agree, and the patch never shrinks."""
    generator = random.Random(5)
    for _ in range(300):
        spacing = [math.exp(generator.uniform(-2, 2)) for _ in range(3)]
        wanted = [generator.randint(1, 400) for _ in range(3)]
        topology = network_topology(spacing, wanted)
        size = list(topology.patch_size)
        for stride in topology.strides:
            assert all(length % step == 0 for length, step in zip(size, stride, strict=True))
            size = [length // step for length, step in zip(size, stride, strict=True)]
        for axis in range(3):
            assert topology.divisor[axis] * size[axis] == topology.patch_size[axis]
            assert 0 <= topology.patch_size[axis] - wanted[axis] < topology.divisor[axis]
        assert len(topology.kernel_sizes) == len(topology.strides)
        assert topology.strides[0] == (1, 1, 1)
        assert (1, 1, 1) not in topology.strides[1:]
