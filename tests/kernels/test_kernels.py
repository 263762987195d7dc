"""Every kernel against the plain operations that it stands for, in Triton's interpreter."""

import pytest
import torch
from torch.nn import functional

from alpamayo_dflash.target.qwen3 import rms_norm, rotate

product = pytest.importorskip("alpamayo_dflash.kernels.product")
rows_ = pytest.importorskip("alpamayo_dflash.kernels.rows")
attention = pytest.importorskip("alpamayo_dflash.kernels.attention")


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("rows", "columns", "inner"), [(1, 64, 128), (8, 100, 512), (17, 192, 256), (33, 64, 384)]
)
def test_product(rows, columns, inner):
    x, weight = normal(rows, inner), normal(columns, inner, seed=1)
    parts = product.product(x, weight)
    assert parts.shape[1:] == (rows, columns)
    torch.testing.assert_close(parts.sum(0), functional.linear(x, weight), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(
        product.whole_product(x, weight), functional.linear(x, weight), rtol=1e-4, atol=1e-4
    )


def test_a_few_columns_are_computed_in_parts():
    assert len(product.product(normal(2, 1024), normal(64, 1024))) == 8


@pytest.mark.parametrize("parts", [2, 3, 4, 5])
def test_parts_may_be_of_different_lengths(parts):
    x, weight = normal(3, 5 * 64), normal(64, 5 * 64, seed=1)
    blocks = product.Blocks(swap=True, columns=64, inner=64, stages=2, warps=4, rows=16, parts=parts)
    found = product.few_rows_product(x, weight, blocks)
    assert len(found) == parts
    torch.testing.assert_close(found.sum(0), functional.linear(x, weight), rtol=1e-4, atol=1e-4)


def test_a_rows_product_depends_on_that_row_alone():
    x, weight = normal(8, 256), normal(64, 256, seed=1)
    changed = x.clone()
    changed[:3] = normal(3, 256, seed=2)
    changed[7] = changed[4]
    first, second = product.product(x, weight), product.product(changed, weight)
    assert torch.equal(first[:, 3:7], second[:, 3:7])
    assert torch.equal(second[:, 7], second[:, 4])


@pytest.mark.parametrize("rows", [1, 9, 20, 70])
@pytest.mark.parametrize("inner", [128, 96])
def test_gated_product(rows, inner):
    x, weight = normal(rows, inner), normal(2 * 80, inner, seed=1)
    gate, up = functional.linear(x, weight).chunk(2, dim=-1)
    got = product.gated_product(x, weight)
    torch.testing.assert_close(got, functional.silu(gate) * up, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("parts", [0, 1, 3])
@pytest.mark.parametrize("residual", [True, False])
def test_add_norm(parts, residual):
    if not parts and not residual:
        pytest.skip("nothing to norm")
    hidden = normal(5, 96) if residual else None
    added = normal(parts, 5, 96, seed=1) if parts else None
    weight = normal(96, seed=2)
    total, normed = rows_.add_norm(hidden, added, weight, 1e-6)
    expected = torch.zeros(5, 96)
    if hidden is not None:
        expected = expected + hidden
    if added is not None:
        expected = expected + added.sum(0)
    if residual:
        torch.testing.assert_close(total, expected)
    torch.testing.assert_close(normed, rms_norm(expected, weight, 1e-6))


@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim"), [(6, 2, 32), (4, 4, 16), (8, 1, 16), (6, 3, 16), (24, 12, 16)]
)
def test_rotate_store(heads, kv_heads, dim):
    rows, entries = 4, torch.tensor([7, 2, 3, 9])
    parts = normal(2, rows, (heads + 2 * kv_heads) * dim)
    norms = normal(dim, seed=1), normal(dim, seed=2)
    angles = normal(rows, dim // 2, seed=3).repeat(1, 2)
    rotary = angles.cos(), angles.sin()
    keys, values = torch.full((10, kv_heads, dim), 5.0), torch.full((10, kv_heads, dim), 6.0)
    got = rows_.rotate_store(parts, norms, 1e-6, rotary, keys, values, entries)
    q, k, v = parts.sum(0).view(rows, -1, dim).split((heads, kv_heads, kv_heads), dim=1)
    torch.testing.assert_close(got, rotate(rms_norm(q, norms[0], 1e-6), *rotary))
    torch.testing.assert_close(keys[entries], rotate(rms_norm(k, norms[1], 1e-6), *rotary))
    torch.testing.assert_close(values[entries], v)
    assert (keys[[0, 1, 4, 5, 6, 8]] == 5).all() and (values[[0, 1, 4, 5, 6, 8]] == 6).all()


def test_many_rows_take_one_wave_of_programs_and_see_the_whole_tail():
    for rows in range(17, 129):
        for slots in (1, 64, 320, 384, 1920, 5120):
            plan = attention.plan_of(4 * rows, 8, slots, dim=128, available=227 * 1024)
            tiles, tails = -(-4 * rows // plan.rows), -(-slots // plan.tail)
            assert plan.stretches >= 1 and plan.tail % plan.keys == 0
            assert 8 * tiles * (plan.stretches + tails) <= attention._WAVE or plan.stretches + tails == 2


@pytest.mark.parametrize("length", [0, 1, 63, 64, 200, 421])
@pytest.mark.parametrize(("rows", "slots"), [(1, 150), (7, 150), (25, 700)])
def test_attend_merges_the_prompt_with_a_masked_tail(length, rows, slots):
    heads, kv_heads, dim = 6, 2, 16
    q = normal(rows, heads, dim)
    keys, values = (
        normal(length + slots + 1, kv_heads, dim, seed=1),
        normal(length + slots + 1, kv_heads, dim, seed=2),
    )
    mask = (normal(rows, slots, seed=3) > 0.5).to(torch.uint8)
    mask[:, 0] = 1
    mask[0, :] = 0  # a padding row, which sees the prompt alone
    if length == 0:
        mask[0, slots - 1] = 1
    seen = torch.cat((torch.ones(rows, length), mask), dim=1).bool()
    expected = functional.scaled_dot_product_attention(
        q.transpose(0, 1),
        keys[: length + slots].transpose(0, 1),
        values[: length + slots].transpose(0, 1),
        attn_mask=seen,
        enable_gqa=True,
    )
    got = attention.attend(q, keys, values, torch.tensor([length]), mask)
    torch.testing.assert_close(got.view(rows, heads, dim), expected.transpose(0, 1), rtol=1e-4, atol=1e-5)
    if length == 0:
        alone = attention.attend(q, keys, values, torch.tensor([0]), mask, prompt=False)
        torch.testing.assert_close(
            alone.view(rows, heads, dim), expected.transpose(0, 1), rtol=1e-4, atol=1e-5
        )
