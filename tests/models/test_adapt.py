"""Weights of another network: taken, adapted, skipped or missing, each told by name."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from medseg.models.adapt import Meaning, grown_kernel, take_over
from medseg.models.build import build_network
from medseg.schema.plans import Architecture

PLAIN = Architecture(
    kind="plain_unet",
    features=(4, 6, 8),
    kernel_sizes=((1, 3, 3), (3, 3, 3), (3, 3, 3)),
    strides=((1, 1, 1), (1, 2, 2), (2, 2, 2)),
    blocks_encoder=(1, 1, 1),
    blocks_decoder=(1, 1),
)
FIRST = {
    "plain_unet": "encoder.stages.0.0.convs.0.conv.weight",
    "residual_unet": "encoder.stem.convs.0.conv.weight",
    "mednext_s": "encoder.stem.weight",
}
HEADS = ("decoder.seg_layers.0", "decoder.seg_layers.1")


def of_kind(kind: str, **changes: object) -> Architecture:
    return PLAIN.model_copy(update={"kind": kind, **changes})


def build(architecture: Architecture, inputs: int, logits: int, seed: int):
    generator = torch.Generator().manual_seed(seed)
    network = build_network(architecture, num_inputs=inputs, num_logits=logits, generator=generator)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.rand(parameter.shape, generator=generator))
    return network


def copied(network) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in network.state_dict().items()}


@pytest.mark.parametrize("kind", FIRST)
def test_same_network_is_taken_whole_and_keeps_its_layout(kind: str) -> None:
    source = build(of_kind(kind), 2, 3, seed=1).state_dict()
    network = build(of_kind(kind), 2, 3, seed=2).use_channels_last()
    meaning = Meaning(channels=("T1", "FLAIR"), logits=("background", "organ", "lesion"))
    found = take_over(network, source, before=meaning, now=meaning)
    assert set(found.taken) == set(source)
    assert not found.adapted
    assert not found.skipped
    assert not found.missing
    after = network.state_dict()
    assert all(torch.equal(after[name], source[name]) for name in source)
    assert not after[FIRST[kind]].is_contiguous() or after[FIRST[kind]].shape[2:].numel() == 1


@pytest.mark.parametrize("kind", FIRST)
def test_channels_find_their_weights_by_name_and_new_ones_get_the_mean(kind: str) -> None:
    source = build(of_kind(kind), 2, 3, seed=1).state_dict()
    network = build(of_kind(kind), 3, 3, seed=2)
    found = take_over(
        network,
        source,
        before=Meaning(channels=("T1", "FLAIR")),
        now=Meaning(channels=("flair", "ADC", "T1")),
    )
    old, new = source[FIRST[kind]], network.state_dict()[FIRST[kind]]
    assert torch.equal(new[:, 0], old[:, 1])
    assert torch.equal(new[:, 2], old[:, 0])
    torch.testing.assert_close(new[:, 1], (old[:, 0] + old[:, 1]) / 2 * 2 / 3)
    assert found.adapted == {FIRST[kind]: "2 input channels to 3: 2 by name, 1 from the mean"}


def test_unnamed_channels_keep_the_response_to_alike_inputs() -> None:
    source = build(PLAIN, 1, 3, seed=1)
    network = build(PLAIN, 4, 3, seed=2)
    take_over(network, source.state_dict())
    image = torch.rand(1, 1, 4, 8, 8)
    torch.testing.assert_close(network(image.expand(1, 4, 4, 8, 8)), source(image))


@pytest.mark.parametrize(
    ("channels", "order"), [(("PET", "CT"), (1, 0)), (("a", "b"), (0, 1)), (None, (0, 1))]
)
def test_as_many_channels_change_places_only_by_name(channels, order: tuple[int, int]) -> None:
    source = build(PLAIN, 2, 3, seed=1).state_dict()
    network = build(PLAIN, 2, 3, seed=2)
    take_over(
        network, source, before=Meaning(channels=("CT", "PET")), now=Meaning(channels=channels)
    )
    name = FIRST["plain_unet"]
    assert torch.equal(network.state_dict()[name], source[name][:, list(order)])


@pytest.mark.parametrize("kind", FIRST)
def test_logit_rows_are_found_by_label_and_others_start_anew(kind: str) -> None:
    source = build(of_kind(kind), 2, 3, seed=1).state_dict()
    network = build(of_kind(kind), 2, 4, seed=2)
    fresh = copied(network)
    found = take_over(
        network,
        source,
        before=Meaning(logits=("background", "kidney", "tumor")),
        now=Meaning(logits=("Background", "cyst", "tumor", "kidney")),
    )
    after = network.state_dict()
    for head in HEADS:
        for part in ("weight", "bias"):
            name = f"{head}.{part}"
            assert torch.equal(after[name][[0, 2, 3]], source[name][[0, 2, 1]]), name
            assert torch.equal(after[name][1], fresh[name][1]), name
            assert found.adapted[name] == "rows of Background, tumor, kidney, 1 anew"
    assert len(found.taken) + len(found.adapted) == len(source)


def test_same_number_of_other_labels_is_not_mistaken_for_the_same_labels() -> None:
    source = build(PLAIN, 1, 2, seed=1).state_dict()
    network = build(PLAIN, 1, 2, seed=2)
    fresh = copied(network)
    before, now = Meaning(logits=("kidney", "cyst")), Meaning(logits=("liver", "vessel"))
    found = take_over(network, source, before=before, now=now)
    assert all(torch.equal(network.state_dict()[f"{h}.bias"], fresh[f"{h}.bias"]) for h in HEADS)
    assert found.skipped[f"{HEADS[0]}.weight"] == "no label in common"


def test_kernels_grow_by_linear_interpolation() -> None:
    small = of_kind("mednext_s")
    large = of_kind("mednext_s", kernel_sizes=((1, 5, 5), (5, 5, 5), (5, 5, 5)))
    source = build(small, 1, 2, seed=1).state_dict()
    network = build(large, 1, 2, seed=2)
    found = take_over(network, source)
    grown = [name for name in source if name.endswith("conv1.weight")]
    assert set(found.adapted) == set(grown)
    assert "kernel 1x3x3 interpolated to 1x5x5" in found.adapted.values()
    # five cells over three: cell i has its centre at (i + 0.5) * 3 / 5 - 0.5, held at the ends
    along = torch.tensor([[1, 0, 0], [0.6, 0.4, 0], [0, 1, 0], [0, 0.4, 0.6], [0, 0, 1]])
    name = "encoder.stages.1.blocks.0.conv1.weight"
    expected = torch.einsum("ia,jb,kc,nmabc->nmijk", along, along, along, source[name])
    torch.testing.assert_close(network.state_dict()[name], expected)
    flat = torch.rand(3, 1, 3, 3)
    expected = torch.einsum("ia,jb,nmab->nmij", along, along, flat)
    torch.testing.assert_close(grown_kernel(flat, (5, 5)), expected)


def test_what_does_not_fit_is_skipped_with_its_reason_and_left_alone() -> None:
    wide = PLAIN.model_copy(update={"features": (4, 6, 10), "blocks_decoder": (2, 1)})
    source = {**build(PLAIN, 1, 2, seed=1).state_dict(), "odd.extra": torch.zeros(2)}
    network = build(wide, 1, 3, seed=2)
    fresh = copied(network)
    found = take_over(network, source)
    after = network.state_dict()
    assert found.skipped["odd.extra"] == "the network has no such tensor"
    name = "encoder.stages.2.0.convs.0.conv.bias"
    assert found.skipped[name] == "has shape (8,), the network's (10,)"
    assert found.skipped[f"{HEADS[0]}.weight"].startswith("has shape (2, 6, 1, 1, 1)")
    assert "decoder.stages.1.convs.1.conv.weight" in found.missing
    untouched = set(after) - set(found.taken) - set(found.adapted)
    assert all(torch.equal(after[n], fresh[n]) for n in untouched)
    assert all(torch.equal(after[n], source[n]) for n in found.taken)
    rows = found.rows()
    assert {row[0] for row in rows} == set(source) | set(after)
    assert len({row[0] for row in rows}) == len(rows)
    assert found.summary().endswith(f"{len(found.missing)} missing")


def test_kernels_do_not_shrink() -> None:
    source = build(of_kind("mednext_s", kernel_sizes=((5, 5, 5),) * 3), 1, 2, seed=1).state_dict()
    network = build(of_kind("mednext_s"), 1, 2, seed=2)
    found = take_over(network, source)
    assert {name for name in source if name.endswith("conv1.weight")} == set(found.skipped)
