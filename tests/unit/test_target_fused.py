"""What the kernels are not made for, named."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from alpamayo_dflash.target.qwen3_fused import misfit, why_plain

NAMES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class Adapter(nn.Linear):
    """Has a weight, and another product."""


class Packed(torch.Tensor):
    """A tensor of another format, as quantising libraries put it into a plain linear layer."""


def packed():
    linear = nn.Linear(32, 32, bias=False)
    linear.weight = nn.Parameter(torch.ones(32, 32).as_subclass(Packed), requires_grad=False)
    return linear


def turned():
    linear = nn.Linear(32, 32, bias=False)
    linear.weight = nn.Parameter(torch.ones(32, 32).T[:, ::2].T.repeat(2, 1).T)
    return linear


def layer(width=16, **changed):
    linear = {name: nn.Linear(32, 32, bias=False) for name in NAMES} | changed
    norm = SimpleNamespace(weight=torch.ones(width))
    return SimpleNamespace(
        self_attn=SimpleNamespace(q_norm=norm, **{name: linear[name] for name in NAMES[:4]}),
        mlp=SimpleNamespace(**{name: linear[name] for name in NAMES[4:]}),
    )


def test_plain_layers_fit():
    assert misfit([layer(), layer(128)], torch.float32, nn.Linear(32, 99, bias=False)) is None


@pytest.mark.parametrize(
    ("odd", "named"),
    [
        ({"o_proj": Adapter(32, 32, bias=False)}, "o_proj of layer 1 is a Adapter"),
        ({"down_proj": nn.Linear(32, 32)}, "down_proj of layer 1 is a Linear with a bias"),
        ({"up_proj": nn.Linear(32, 32, bias=False).half()}, "up_proj of layer 1 is torch.float16"),
        ({"q_proj": packed()}, "q_proj of layer 1 is a Linear of a Packed"),
        ({"k_proj": turned()}, "k_proj of layer 1 is a Linear whose weight"),
        ({"width": 24}, "24 wide"),
        ({"width": 8}, "8 wide"),
        ({"width": 512}, "512 wide"),
    ],
)
def test_what_does_not_fit_is_named(odd, named):
    assert named in misfit([layer(), layer(**odd)], torch.float32)


def test_the_head_counts_too():
    assert "the head is a Linear with a bias" in misfit([layer()], torch.float32, nn.Linear(32, 99))


def test_a_cpu_is_named():
    assert "cpu" in why_plain([layer()], torch.ones(1, dtype=torch.bfloat16))
