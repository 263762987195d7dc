"""Rows are cast to e4m3 by kernels to the bit as by plain operations, and the fused form is the plain one."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from alpamayo_dflash.kernels import attention, fp8, fp8_triton
from alpamayo_dflash.kernels.fp8 import CastRows
from alpamayo_dflash.kernels.rows import gate
from alpamayo_dflash.target.fp8 import FP8Linear
from alpamayo_dflash.target.weights import (
    FP8Product,
    SeparateProducts,
    biased_linear,
    fused_linear,
    gelu_mlp,
    mlp_parts,
)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def equal(found, expected):
    """The same values and scales; what is NaN is so in both."""
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.float(), other.float(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [200, 64])
def test_cast_rows(dtype, width):
    x = normal(9, width).to(dtype)
    x[1] = 0
    x[2, 3] = float("nan")
    x[3] *= 1e-40
    x[4] *= 1e30
    x[5] *= torch.logspace(-6, 0, width)
    equal(fp8_triton.cast_rows(x), fp8.cast_rows(x))


def test_rows_with_gaps_between_them():
    x = normal(6, 300)
    equal(fp8_triton.cast_rows(x[:, 20:150]), fp8.cast_rows(x[:, 20:150]))


def test_every_rounding_of_e4m3():
    """All values of bfloat16 that are at most 448, beside 448 that makes the scale 1."""
    codes = torch.arange(-(2**15), 2**15, dtype=torch.int16)
    values = codes.view(torch.bfloat16).float()
    values = values[values.abs() <= fp8.LARGEST]
    x = torch.cat((torch.tensor([448.0]), values)).unsqueeze(0)
    equal(fp8_triton.cast_rows(x), fp8.cast_rows(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cast_gated(dtype):
    both = normal(5, 2 * 96).to(dtype)
    equal(fp8_triton.cast_gated(both), fp8.cast_rows(gate(both)))


@pytest.mark.parametrize("width", [96, 64])
def test_cast_gelu(width):
    """The sigmoid's form of the GELU rounds otherwise than the tanh's: to a value or the next of e4m3."""
    x = normal(5, width) * 3
    (values, scales), gelu = fp8_triton.cast_gelu(x), functional.gelu(x, approximate="tanh")
    expected, expected_scales = fp8.cast_rows(gelu)
    torch.testing.assert_close(scales, expected_scales)
    torch.testing.assert_close(
        values.float() * scales, expected.float() * expected_scales, rtol=0.07, atol=1e-6
    )
    assert (values.float() == expected.float()).float().mean() > 0.98


@pytest.mark.parametrize("heads", [4, 6])
def test_attention_that_casts_what_it_merges(heads):
    """Heads that are a power of two are merged and cast by one kernel, others by two."""
    q, (keys, values) = normal(3, heads, 16), (normal(300, 2, 16, seed=seed) for seed in (1, 2))
    mask = torch.ones(3, 40, dtype=torch.uint8)
    found, plain = (
        attention.attend(q, keys, values, torch.tensor([200]), mask, cast=cast) for cast in (True, False)
    )
    expected = fp8.cast_rows(plain)
    torch.testing.assert_close(found.scales, expected[1])
    torch.testing.assert_close(
        found.values.float() * found.scales, expected[0].float() * expected[1], rtol=0.07, atol=1e-6
    )
    assert (found.values.float() == expected[0].float()).float().mean() > 0.98


def layer(inputs, outputs, *, seed=0, static=False, biased=False):
    made = FP8Linear(inputs, outputs, static=static, biased=biased)
    made.fill(normal(outputs, inputs, seed=seed))
    with torch.no_grad():
        if static:
            made.input_scale.fill_(0.01 * (seed + 1))
        if biased:
            made.bias.copy_(normal(outputs, seed=seed + 1))
    return made


def together(*layers):
    """The same layers with their weights in one storage."""
    for name in ("weight", "weight_scale"):
        whole = torch.cat([getattr(each, name).data for each in layers])
        rows = [len(each.weight) for each in layers]
        for each, view in zip(layers, whole.split(rows), strict=True):
            getattr(each, name).data = view
    return layers


@pytest.mark.parametrize("kind", ["together", "apart", "static", "mixed"])
def test_a_fused_product_is_the_layers(kind):
    x, static = normal(7, 64), kind == "static"
    layers = [layer(64, 32, seed=seed, static=static) for seed in range(3)]
    if kind == "together":
        together(*layers)
    if kind == "mixed":
        layers[1] = nn.Linear(64, 32, bias=False)
    product = fused_linear(layers)
    assert isinstance(product, FP8Product if kind == "together" else SeparateProducts)
    expected = torch.cat([each(x) for each in layers], dim=-1)
    compare = torch.testing.assert_close if kind == "mixed" else exactly
    compare(product(x), expected)
    compare(product.parts(x).sum(0), expected)


@pytest.mark.parametrize("static", [False, True])
def test_an_mlp_with_biases(static):
    x, up = normal(7, 64), layer(64, 96, biased=True)
    down = layer(96, 64, seed=3, biased=True, static=static)
    got = gelu_mlp(biased_linear(up), biased_linear(down), x, rounded=True)
    torch.testing.assert_close(got, down(functional.gelu(up(x), approximate="tanh")), rtol=0.02, atol=0.1)


def exactly(found, expected):
    assert torch.equal(found, expected)


@pytest.mark.parametrize("static", [False, True])
def test_an_mlp_of_fused_products(static):
    x = normal(7, 64)
    gate_, up = together(layer(64, 96, seed=1, static=static), layer(64, 96, seed=2, static=static))
    down = layer(96, 64, seed=3, static=static)
    got = mlp_parts(fused_linear((gate_, up)), fused_linear((down,)), x).sum(0)
    # The gate's exponential is another one, which may move a value to the next of e4m3.
    torch.testing.assert_close(got, down(functional.silu(gate_(x)) * up(x)), rtol=0.02, atol=0.2)


@pytest.mark.parametrize("static", [False, True])
def test_a_biased_layer(static):
    x, linear = normal(7, 64), layer(64, 32, static=static, biased=True)
    product = biased_linear(linear)
    exactly(product(x), linear(x))
    if not static:
        exactly(product(CastRows(*linear.cast(x), x.dtype)), linear(x))
    exactly(product.gelu_tanh(x, rounded=False), functional.gelu(linear(x), approximate="tanh"))
