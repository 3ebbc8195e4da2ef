"""Options of the U-Nets: read from the plans, and refused where they say nothing sensible."""

from __future__ import annotations

import math

import pytest

from medseg.errors import ConfigError
from medseg.models.blocks import BlockStyle
from medseg.models.build import architecture_problems, build_network
from medseg.models.options import unet_options
from medseg.schema.plans import Architecture

STEM = {"kernel_size_stem": [3, 1, 5]}
KERNELS = {"kernel_sizes_decoder": [[3, 3, 1], [1, 5, 3]]}


def architecture(kind: str, options: dict[str, object]) -> Architecture:
    return Architecture(
        kind=kind,
        features=(4, 6, 6),
        kernel_sizes=((1, 3, 3), (3, 3, 5), (3, 1, 3)),
        strides=((1, 1, 1), (1, 2, 2), (2, 2, 1)),
        blocks_encoder=(1, 2, 2),
        blocks_decoder=(2, 1),
        options=options,
    )


def test_without_options_the_encoder_decides() -> None:
    found = unet_options(architecture("residual_unet", {}))
    assert found.kernel_sizes_decoder == ((1, 3, 3), (3, 3, 5))
    assert found.kernel_size_stem == (1, 3, 3)
    assert found.shortcut == "pooled"
    assert found.style == BlockStyle()


def test_options_survive_the_plans_file() -> None:
    options = {**KERNELS, **STEM, "norm": "batch", "epsilon": 1e-3}
    plan = architecture("residual_unet", options)
    again = Architecture.model_validate_json(plan.model_dump_json())
    assert again == plan
    found = unet_options(again, "group")
    assert found.kernel_sizes_decoder == ((3, 3, 1), (1, 5, 3))
    assert found.kernel_size_stem == (3, 1, 5)
    assert (found.style.norm, found.style.epsilon, found.style.method) == ("batch", 1e-3, "group")
    assert found == unet_options(plan, "group")


@pytest.mark.parametrize(
    ("kind", "options", "match"),
    [
        ("plain_unet", {"width": 3}, "options has 'width'; plain_unet knows: norm, epsilon"),
        ("plain_unet", {"normal": "batch"}, "Did you mean 'norm'"),
        ("plain_unet", {"shortcut": "strided"}, "options has 'shortcut'; plain_unet knows"),
        ("plain_unet", {"kernel_size_stem": [3, 3, 3]}, "options has 'kernel_size_stem'"),
        ("plain_unet", {"norm": "batchnorm"}, "expected one of: instance, batch, none. Did you"),
        ("plain_unet", {"norm": None}, "options.norm is None; expected one of"),
        ("plain_unet", {"activation": ["relu"]}, r"options.activation is \['relu'\]; expected"),
        ("residual_unet", {"shortcut": "max"}, "expected one of: pooled, strided"),
        ("plain_unet", {"epsilon": 0}, "options.epsilon is 0; expected a positive number"),
        ("plain_unet", {"epsilon": math.nan}, "options.epsilon is nan; expected a positive"),
        ("plain_unet", {"epsilon": "1e-5"}, "options.epsilon is '1e-5'"),
        ("plain_unet", {"slope": 1}, "options.slope is 1; expected a number from 0 to below 1"),
        ("plain_unet", {"slope": -0.1}, "options.slope is -0.1"),
        ("plain_unet", {"slope": True}, "options.slope is True"),
        ("plain_unet", {"activation_first": 1}, "is 1; expected true or false"),
        (
            "plain_unet",
            {"activation": "relu", "slope": 0.2},
            "slope is 0.2, but options.activation is 'relu'; expected leaky_relu, or no slope",
        ),
        (
            "plain_unet",
            {"norm": "none", "epsilon": 1e-3},
            "but options.norm is 'none'; expected instance or batch, or no epsilon",
        ),
        ("plain_unet", {"kernel_sizes_decoder": [[3, 3, 3]]}, "expected 2 entries, one fewer"),
        ("plain_unet", {"kernel_sizes_decoder": [[3, 3, 3], [3, 3]]}, "of 3 odd sizes each"),
        ("plain_unet", {"kernel_sizes_decoder": [[3, 3, 3], [3, 2, 3]]}, "of 3 odd sizes each"),
        ("plain_unet", {"kernel_sizes_decoder": [3, 3]}, "of 3 odd sizes each"),
        ("plain_unet", {"kernel_sizes_decoder": 3}, "kernel_sizes_decoder is 3; expected 2"),
        ("residual_unet", {"kernel_size_stem": [3, 3]}, r"\[3, 3\]; expected 3 odd sizes"),
        ("residual_unet", {"kernel_size_stem": [3, 3.0, 3]}, "expected 3 odd sizes"),
        ("residual_unet", {"kernel_size_stem": [3, -1, 3]}, "expected 3 odd sizes"),
        ("residual_unet", {"kernel_size_stem": 3}, "kernel_size_stem is 3; expected 3 odd"),
    ],
)
def test_options_that_say_nothing_sensible_are_refused(
    kind: str, options: dict[str, object], match: str
) -> None:
    plan = architecture(kind, {}).model_copy(update={"options": options})
    with pytest.raises(ConfigError, match=match):
        build_network(plan, num_inputs=2, num_logits=3)


def test_all_problems_of_the_options_come_at_once() -> None:
    options = {"norm": "layer", "epsilon": -1, "width": 3, "kernel_size_stem": [2, 2, 2]}
    plan = architecture("residual_unet", {}).model_copy(update={"options": options})
    assert len(architecture_problems(plan)) == 4
    assert architecture_problems(architecture("residual_unet", STEM)) == []
