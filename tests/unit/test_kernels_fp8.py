"""The format of FP8 products: what a row becomes, what is not finite, and that rows are independent."""

import pytest
import torch
from torch.nn import functional

from alpamayo_dflash.kernels import fp8


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_every_value_of_e4m3_is_kept():
    codes = torch.arange(256, dtype=torch.uint8)
    values = codes.view(fp8.E4M3).float()
    values = values[values.isfinite()]
    assert len(values) == 254 and values.max() == fp8.LARGEST
    got, scales = fp8.cast_rows(values.unsqueeze(0))
    assert scales.item() == 1.0
    assert torch.equal(got.float()[0], values)


def test_a_rows_largest_value_becomes_the_largest_of_e4m3():
    x = normal(5, 40) * torch.tensor([[1e-30], [1e-3], [1.0], [1e5], [1e30]])
    values, scales = fp8.cast_rows(x)
    assert torch.equal(values.float().abs().amax(1), torch.full((5,), fp8.LARGEST))
    # Half a step of three bits of mantissa, and near zero half a step of 2^-9.
    bound = (x.abs() * 2**-4).maximum(scales * 2**-10) * (1 + 1e-5)
    assert ((values.float() * scales - x).abs() <= bound).all()


def test_rounding_is_to_nearest_even():
    x = torch.tensor([[448.0, 17.0, 19.0, -21.0, 2**-10, 3 * 2**-10]])
    assert fp8.cast_rows(x)[0].float().tolist() == [[448.0, 16.0, 20.0, -20.0, 0.0, 2**-8]]


def test_rows_of_zeros_and_of_next_to_nothing_have_scale_one():
    x = torch.zeros(2, 8)
    x[1] = 1e-40
    values, scales = fp8.cast_rows(x)
    assert scales.flatten().tolist() == [1.0, 1.0]
    assert not values.float().any()


@pytest.mark.parametrize("odd", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("static", [False, True])
def test_what_is_not_finite_does_not_hide(odd, static):
    x, weight = normal(3, 32), normal(16, 32, seed=1)
    x[1, 5] = odd
    rows = fp8.cast_by(x, torch.tensor(0.01)) if static else fp8.cast_rows(x)
    got = fp8.product(*rows, *fp8.cast_rows(weight), torch.float32)
    assert not got[1].isfinite().any()
    assert got[[0, 2]].isfinite().all()


def test_a_static_scale_saturates():
    values, scales = fp8.cast_by(torch.tensor([[1.0, 1e6, -1e6]]), torch.tensor(0.5))
    assert values.float().tolist() == [[2.0, 448.0, -448.0]] and scales.item() == 0.5


def test_a_product_is_the_exact_sum():
    x, weight = fp8.cast_rows(normal(3, 500)), fp8.cast_rows(normal(7, 500, seed=1))
    got = fp8.product(*x, *weight, torch.float32)
    for r in range(3):
        for n in range(7):
            ints = (x[0][r].double() * 512).long(), (weight[0][n].double() * 512).long()
            total = sum(a * b for a, b in zip(*(each.tolist() for each in ints), strict=True))
            exact = torch.tensor(total / 2**18, dtype=torch.float64).float()
            assert got[r, n] == exact * x[1][r] * weight[1][n]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_depends_on_nothing_but_itself(dtype):
    weight, bias = fp8.cast_rows(normal(40, 300)), normal(40, seed=2)
    x = normal(70, 300, seed=1).to(dtype)

    def product(some):
        return fp8.product(*fp8.cast_rows(some), *weight, dtype, bias)

    whole = product(x)
    order = torch.randperm(70, generator=torch.Generator().manual_seed(3))
    assert torch.equal(product(x[order]), whole[order])
    for rows in (1, 2, 3, 8, 17, 48, 69):
        assert torch.equal(product(x[:rows]), whole[:rows])


def test_a_product_is_near_that_of_the_values():
    x, weight = normal(32, 4096), normal(48, 4096, seed=1)
    got = fp8.product(*fp8.cast_rows(x), *fp8.cast_rows(weight), torch.float32)
    wanted = functional.linear(x, weight)
    # Each factor's rounding error is about 2.6 % of it, and errors of a sum add as squares do.
    assert (got - wanted).norm() / wanted.norm() < 0.05
