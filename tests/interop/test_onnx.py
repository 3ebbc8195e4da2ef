"""Networks of every kind as ONNX files."""

from __future__ import annotations

import importlib.util

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from medseg.errors import BundleError, ConfigError
from medseg.interop import onnx as onnx_module
from medseg.interop.onnx import OPSET, probability_difference, require_packages
from medseg.models.build import build_network


def made(make, kind, dimensions, **changes):
    """Return an exact network for two channels and three labels, and the size of its tile."""
    tile = (8, 16, 12)[-dimensions:]
    network = build_network(
        make.architecture(kind, dimensions, **changes),
        num_inputs=2,
        num_logits=3,
        patch_size=tile,
        norm="instance",
        generator=torch.Generator().manual_seed(5),
    )
    return network.requires_grad_(False).eval(), tile


@pytest.mark.parametrize(
    ("kind", "dimensions"),
    [
        ("residual_unet", 3),
        ("mednext_b", 2),
        pytest.param("plain_unet", 2, marks=pytest.mark.slow),
        pytest.param("residual_unet", 2, marks=pytest.mark.slow),
        pytest.param("mednext_s", 3, marks=pytest.mark.slow),
        pytest.param("mednext_l", 3, marks=pytest.mark.slow),
    ],
)
def test_each_kind_of_network_gives_the_same_for_any_number_of_tiles(make, kind, dimensions):
    network, tile = made(make, kind, dimensions)
    content = onnx_module.to_onnx(network, num_inputs=2, tile=tile)
    for batch in (1, 3):
        shape = (batch, 2, *tile)
        assert probability_difference(network, content, shape, "softmax") < 1e-5
    model = onnx.load_from_string(content)
    onnx.checker.check_model(model, full_check=True)
    assert [entry.version for entry in model.opset_import] == [OPSET]
    assert model.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"


def test_the_file_says_nothing_of_the_machine_it_was_made_on(make):
    """The exporter notes the source line of every operation, with its path."""
    network, tile = made(make, "residual_unet", 3)
    content = onnx_module.to_onnx(network, num_inputs=2, tile=tile)
    assert b".py" not in content
    assert str(torch.__path__[0]).encode() not in content


def test_a_difference_is_seen(make):
    """The check compares with the network at hand, so it fails for other weights."""
    network, tile = made(make, "residual_unet", 3)
    content = onnx_module.to_onnx(network, num_inputs=2, tile=tile)
    with torch.no_grad():
        network.decoder.seg_layers[-1].weight[0] += 0.01
    for activation in ("softmax", "sigmoid"):
        assert probability_difference(network, content, (1, 2, *tile), activation) > 1e-4


class Untraceable(nn.Module):
    """Decides by the values it sees, which no graph can hold."""

    def __init__(self, num_inputs, num_logits):
        super().__init__()
        self.layer = nn.Conv3d(num_inputs, num_logits, 1)

    def forward(self, images):
        return self.layer(images) if images.sum() > 0 else self.layer(-images)


def test_a_network_that_cannot_be_expressed_is_an_error_in_words(make):
    with pytest.raises(BundleError, match=r"cannot be expressed in ONNX \(.*Change what its"):
        onnx_module.to_onnx(Untraceable(2, 3).eval(), num_inputs=2, tile=(4, 5, 6))


def test_missing_packages_name_the_extra(monkeypatch):
    require_packages()
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name != "onnx" else found(name)
    )
    expected = r"onnxscript, onnxruntime; .*pip install 'medseg\[onnx\]'"
    with pytest.raises(ConfigError, match=expected):
        require_packages()


def test_the_random_state_is_left_alone(make):
    network, tile = made(make, "residual_unet", 3)
    before = torch.random.get_rng_state(), np.random.get_state()[1].tolist()
    content = onnx_module.to_onnx(network, num_inputs=2, tile=tile)
    probability_difference(network, content, (1, 2, *tile), "softmax")
    assert torch.equal(before[0], torch.random.get_rng_state())
    assert before[1] == np.random.get_state()[1].tolist()
