"""What the kernels are not made for, named."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from alpamayo_dflash.target.fused import misfit, why_plain


class Adapter(nn.Linear):
    """Has a weight, and another product."""


def layer(width=16, **changed):
    names = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    linear = {name: nn.Linear(32, 32, bias=False) for name in names} | changed
    norm = SimpleNamespace(weight=torch.ones(width))
    return SimpleNamespace(
        self_attn=SimpleNamespace(q_norm=norm, **{name: linear[name] for name in names[:4]}),
        mlp=SimpleNamespace(**{name: linear[name] for name in names[4:]}),
    )


def test_plain_layers_fit():
    assert misfit([layer(), layer(128)]) is None


@pytest.mark.parametrize(
    ("odd", "named"),
    [
        ({"o_proj": Adapter(32, 32, bias=False)}, "o_proj of layer 1 is a Adapter"),
        ({"down_proj": nn.Linear(32, 32)}, "down_proj of layer 1 is a Linear with a bias"),
        ({"width": 24}, "24 wide"),
        ({"width": 8}, "8 wide"),
    ],
)
def test_what_does_not_fit_is_named(odd, named):
    assert named in misfit([layer(), layer(**odd)])


def test_a_cpu_is_named():
    assert "cpu" in why_plain([layer()], torch.ones(1, dtype=torch.bfloat16))
