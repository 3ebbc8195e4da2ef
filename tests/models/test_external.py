"""Networks from outside: how they are called, checked and trusted."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn

from medseg.errors import BundleError, ConfigError
from medseg.models.build import build_network
from medseg.schema.plans import Architecture


class Tiny(nn.Module):
    """Takes the agreed names."""

    def __init__(self, num_inputs: int, num_logits: int, width: int = 3) -> None:
        super().__init__()
        self.first = nn.Conv3d(num_inputs, width, (1, 3, 5), padding=(0, 1, 2))
        self.last = nn.Conv3d(width, num_logits, 1)

    def forward(self, images: Tensor) -> Tensor:
        return self.last(self.first(images).relu())


class Other(nn.Module):
    """Takes other names, and keeps what it was told."""

    def __init__(self, in_channels: int, classes: int, size: tuple[int, ...], axes: int) -> None:
        super().__init__()
        self.told = (in_channels, classes, size, axes)
        self.layer = nn.Conv3d(in_channels, classes, 1)
        self.is_channels_last = False

    def use_channels_last(self) -> None:
        self.is_channels_last = True

    def forward(self, images: Tensor) -> Tensor:
        return self.layer(images)


class Halved(Tiny):
    """Forgets to come back to full resolution."""

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images)[..., ::2]


class Many(Tiny):
    """Returns a list."""

    def forward(self, images: Tensor) -> list[Tensor]:  # type: ignore[override]
        return [super().forward(images)]


OTHER = {
    "in_channels": "$num_inputs",
    "classes": "$num_logits",
    "size": "$patch_size",
    "axes": "$num_axes",
}


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("networks_for_tests")
    vars(module).update({c.__name__: c for c in (Tiny, Other, Halved, Many)}, make_none=_none)
    monkeypatch.setitem(sys.modules, "networks_for_tests", module)


def _none(num_inputs: int, num_logits: int) -> None:
    return None


def described(name: str, **options: object) -> Architecture:
    return Architecture(
        kind=f"networks_for_tests:{name}",
        features=(4, 8),
        kernel_sizes=((3, 3, 3),) * 2,
        strides=((1, 1, 1), (1, 2, 2)),
        blocks_encoder=(1, 1),
        blocks_decoder=(1,),
        options=options,
    )


def test_agreed_names_need_no_options() -> None:
    network = build_network(described("Tiny", width=7), num_inputs=2, num_logits=3)
    assert network(torch.zeros(2, 2, 3, 4, 5)).shape == (2, 3, 3, 4, 5)
    assert network.network.first.out_channels == 7
    assert network.deep_supervision is False
    assert network.use_channels_last() is network
    assert next(iter(network.state_dict())) == "network.first.weight"


def test_placeholders_stand_for_what_other_names_ask_for() -> None:
    network = build_network(
        described("Other", **OTHER), num_inputs=2, num_logits=5, patch_size=(8, 12, 16)
    )
    assert network.network.told == (2, 5, (8, 12, 16), 3)
    assert network.use_channels_last().network.is_channels_last


def test_generator_decides_the_weights_and_leaves_the_global_state_alone() -> None:
    before = torch.get_rng_state()
    first, again, other = (
        build_network(
            described("Tiny"),
            num_inputs=2,
            num_logits=3,
            generator=torch.Generator().manual_seed(seed),
        ).state_dict()
        for seed in (5, 5, 6)
    )
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["network.first.weight"], other["network.first.weight"])


@pytest.mark.parametrize(
    ("name", "got"),
    [("Halved", r"a tensor of shape \(2, 3, 3, 4, 3\)"), ("Many", "a list")],
)
def test_anything_but_logits_of_the_images_shape_is_refused(name: str, got: str) -> None:
    network = build_network(described(name), num_inputs=2, num_logits=3)
    match = rf"{name}', which returned {got} for images of .*here \(2, 3, 3, 4, 5\)"
    with pytest.raises(ConfigError, match=match):
        network(torch.zeros(2, 2, 3, 4, 5))


@pytest.mark.parametrize(
    ("architecture", "match"),
    [
        (described("Tinny"), "networks_for_tests has no 'Tinny'. Did you mean 'Tiny'"),
        (described("Tiny", depth=3), "cannot be called with num_inputs=2, num_logits=3, depth=3"),
        (described("Other"), r"cannot be called with .*\$num_inputs"),
        (described("Other", **OTHER), r"asks for \$patch_size, which is not known"),
        (described("Tiny", width="$widht"), r"options has \$widht; expected one of: \$num_inputs"),
        (described("make_none"), "made a NoneType; expected a torch.nn.Module"),
        (
            described("Tiny").model_copy(update={"kind": "no_such_package.there:Net"}),
            "'no_such_package.there:Net', which does not import",
        ),
    ],
)
def test_what_cannot_be_built_is_said(architecture: Architecture, match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        build_network(architecture, num_inputs=2, num_logits=3)


def test_code_that_is_not_trusted_is_not_even_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "networks_for_tests")
    with pytest.raises(BundleError, match=r"'networks_for_tests:Tiny'.*trust_code=True"):
        build_network(described("Tiny"), num_inputs=2, num_logits=3, trust_code=False)
    plain = described("Tiny").model_copy(update={"kind": "plain_unet"})
    assert build_network(plain, num_inputs=2, num_logits=3, trust_code=False) is not None


@pytest.mark.filterwarnings("ignore")  # of MONAI, about itself
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("monai.networks.nets:SegResNet", {"init_filters": 8, "spatial_dims": "$num_axes"}),
        ("monai.networks.nets:SwinUNETR", {"feature_size": 12, "spatial_dims": "$num_axes"}),
    ],
)
def test_networks_of_monai_work_through_options(kind: str, options: dict[str, object]) -> None:
    monai = pytest.importorskip("monai", reason="MONAI is not installed")
    names = {"in_channels": "$num_inputs", "out_channels": "$num_logits"}
    if kind.endswith("SwinUNETR") and tuple(map(int, monai.__version__.split(".")[:2])) < (1, 5):
        names["img_size"] = "$patch_size"
    architecture = described("Tiny").model_copy(
        update={"kind": kind, "options": {**names, **options}}
    )
    network = build_network(architecture, num_inputs=2, num_logits=3, patch_size=(32, 64, 32))
    assert network(torch.zeros(1, 2, 32, 64, 32)).shape == (1, 3, 32, 64, 32)
