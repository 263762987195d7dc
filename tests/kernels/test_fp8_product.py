"""The product of few rows in e4m3, and norms that cast, beside their plain forms."""

import pytest
import torch

from alpamayo_dflash.kernels import fp8, fp8_triton
from alpamayo_dflash.kernels.fp8_product import few_rows_gated_product, few_rows_product, fits, plan
from alpamayo_dflash.kernels.rows import add_norm, gate
from alpamayo_dflash.target.weights import FP8Product, Linear, add_norm_for


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def cast(*shape, seed=0):
    return fp8.cast_rows(normal(*shape, seed=seed))


@pytest.mark.parametrize(("rows", "columns", "inner"), [(1, 96, 128), (9, 200, 192), (17, 64, 2048)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_few_rows_product(rows, columns, inner, dtype):
    """The interpreter multiplies in float32, where these sums are exact but for their order."""
    (x, scales), (weight, weight_scales) = cast(rows, inner), cast(columns, inner, seed=1)
    parts = few_rows_product(x, scales, weight, weight_scales, dtype)
    assert parts.dtype == (dtype if len(parts) == 1 else torch.float32)
    expected = fp8.product(x, scales, weight, weight_scales, torch.float32)
    close = {"rtol": 1e-5, "atol": 1e-5} if parts.dtype == torch.float32 else {"rtol": 0.01, "atol": 0.01}
    torch.testing.assert_close(parts.float().sum(0), expected, **close)


@pytest.mark.parametrize(("rows", "columns", "inner"), [(1, 96, 128), (17, 200, 192)])
def test_few_rows_gated_product(rows, columns, inner):
    (x, scales), (weight, weight_scales) = cast(rows, inner), cast(2 * columns, inner, seed=1)
    got = few_rows_gated_product(x, scales, weight, weight_scales, torch.float32)
    expected = gate(fp8.product(x, scales, weight, weight_scales, torch.float32))
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_a_rows_values_are_the_same_in_any_company():
    (x, scales), (weight, weight_scales) = cast(33, 1024), cast(128, 1024, seed=1)
    every = few_rows_product(x, scales, weight, weight_scales, torch.float32)
    alone = few_rows_product(x[7:8], scales[7:8], weight, weight_scales, torch.float32)
    assert torch.equal(every[:, 7:8], alone)


@pytest.mark.parametrize(
    ("shape", "columns", "parts"),
    [
        ((6144, 4096), 64, 1),
        ((4096, 4096), 64, 2),
        ((24576, 4096), 128, 1),
        ((4096, 12288), 64, 2),
        ((2048, 8256), 64, 4),
        ((2048, 2048), 64, 4),
    ],
)
def test_plans_of_real_weights(shape, columns, parts):
    tile, found = plan(*shape)
    assert fits(shape[1])
    assert (tile.columns, found) == (columns, parts)
    assert shape[1] % tile.inner == 0


def test_a_weight_that_no_tile_divides_does_not_fit():
    assert not fits(96)


@pytest.mark.parametrize("parts", [None, 1, 3])
def test_a_norm_casts_what_it_would_write(parts):
    hidden, weight = normal(6, 200), normal(200, seed=2)
    added = None if parts is None else normal(parts, 6, 200, seed=1)
    total, rows = fp8_triton.add_norm_cast(hidden, added, weight, 1e-6)
    expected, normed = add_norm(hidden, added, weight, 1e-6)
    assert torch.equal(total, expected)
    values, scales = fp8.cast_rows(normed)
    assert torch.equal(rows.values.view(torch.uint8), values.view(torch.uint8))
    assert torch.equal(rows.scales, scales)
    assert rows.dtype == torch.float32


def test_a_norm_is_cast_only_for_products_that_take_it():
    hidden, norm = normal(3, 64), (torch.ones(64), 1e-6)
    weight, scales = cast(32, 64, seed=4)
    by_row = FP8Product(weight, scales, None)
    static = FP8Product(weight, scales, torch.tensor(0.01))
    plain = Linear(normal(32, 64))
    assert isinstance(add_norm_for(by_row, hidden, None, norm)[1], fp8.CastRows)
    for product in (static, plain, None):
        assert isinstance(add_norm_for(product, hidden, None, norm)[1], torch.Tensor)
    given = torch.empty(3, 64)
    assert add_norm_for(by_row, hidden, None, norm, given)[1] is given
    rows = add_norm_for(by_row, hidden, None, norm)[1]
    normed = add_norm_for(None, hidden, None, norm)[1]
    assert torch.equal(by_row(rows), by_row(normed))
