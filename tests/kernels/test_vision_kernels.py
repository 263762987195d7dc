"""The vision tower's kernels and its fast form against their plain forms, in Triton's interpreter."""

import pytest
import torch
from torch.nn import functional

from alpamayo_dflash.kernels import fp8
from alpamayo_dflash.target.qwen3 import rotate
from alpamayo_dflash.target.vision import encode_images, rotary_tables_2d
from alpamayo_dflash.target.vision_fused import FusedVision, VisionPlan
from tests.helpers.small_vision import small_vision

vision = pytest.importorskip("alpamayo_dflash.kernels.vision")


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("width", [72, 64])
@pytest.mark.parametrize("shared", [False, True])
def test_a_sum_and_its_layer_norm(width, shared):
    added, weight, shift = normal(6, width, seed=1), normal(width, seed=2), normal(width, seed=3)
    hidden = normal(3 if shared else 6, width) + 5
    total, normed = vision.add_layer_norm(hidden, added, weight, shift, 1e-6)
    expected = added + (hidden.repeat(2, 1) if shared else hidden)
    assert torch.equal(total, expected)
    torch.testing.assert_close(normed, functional.layer_norm(expected, (width,), weight, shift, 1e-6))


def test_a_layer_norm_alone():
    x, weight, shift = normal(4, 288), normal(288, seed=2), normal(288, seed=3)
    total, normed = vision.add_layer_norm(x, None, weight, shift, 1e-6)
    assert total is x
    torch.testing.assert_close(normed, functional.layer_norm(x, (288,), weight, shift, 1e-6))


@pytest.mark.parametrize("width", [72, 64])
def test_a_layer_norm_that_is_cast(width):
    hidden, added = normal(5, width), normal(5, width, seed=1)
    hidden[2, 3] = float("nan")
    rest = normal(width, seed=2), normal(width, seed=3), 1e-6
    total, normed = vision.add_layer_norm(hidden, added, *rest)
    got, rows = vision.add_layer_norm_cast(hidden, added, *rest)
    for found, expected in zip((got, rows.values, rows.scales), (total, *fp8.cast_rows(normed)), strict=True):
        torch.testing.assert_close(found.float(), expected.float(), rtol=0, atol=0, equal_nan=True)


def test_in_half_precision_the_sum_is_rounded_before_the_norm():
    """In float16, since the interpreter does not round to the nearest bfloat16."""
    hidden, added = normal(4, 72).half() * 40, normal(4, 72, seed=1).half()
    weight, shift = normal(72, seed=2).half(), normal(72, seed=3).half()
    total, normed = vision.add_layer_norm(hidden, added, weight, shift, 1e-6)
    assert torch.equal(total, hidden + added)
    expected = functional.layer_norm((hidden + added).float(), (72,), weight.float(), shift.float(), 1e-6)
    assert (normed.float() - expected).abs().max() <= 2**-11 * expected.abs().max()


@pytest.mark.parametrize(("heads", "dim"), [(2, 72), (3, 32), (3, 24)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_queries_and_keys_are_rotated_where_they_lie(heads, dim, dtype):
    cos, sin = rotary_tables_2d(4, 2, 2, dim, torch.device("cpu"))
    qkv = normal(16, 3 * heads * dim).to(dtype)
    q, k, v = qkv.clone().view(2, 8, 3, heads, dim).unbind(2)
    q, k = (rotate(x.float(), cos, sin).to(dtype) for x in (q, k))
    vision.rotate_in_place(qkv, cos, sin, heads)
    for got, expected in zip(qkv.view(2, 8, 3, heads, dim).unbind(2), (q, k, v), strict=True):
        assert torch.equal(got, expected)


def plain_attention(qkv, patches, heads):
    q, k, v = (
        x.transpose(1, 2) for x in qkv.view(-1, patches, 3, heads, qkv.shape[1] // 3 // heads).unbind(2)
    )
    out = functional.scaled_dot_product_attention(q, k, v)
    return out.transpose(1, 2).reshape(len(qkv), -1)


def test_the_librarys_attention_is_the_same():
    qkv = normal(24, 3 * 2 * 72)
    got = vision.attend_images(qkv, 12, 2, "flash")
    torch.testing.assert_close(got, plain_attention(qkv, 12, 2), rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def visual():
    """Heads of 72, as R1's."""
    return small_vision(hidden_size=144, depth=2, deepstack_visual_indexes=[0, 1]).requires_grad_(False)


def same(got, expected):
    assert got.deepstack.shape == expected.deepstack.shape
    torch.testing.assert_close(got.embeds, expected.embeds, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(got.deepstack, expected.deepstack, rtol=1e-4, atol=1e-4)


def test_the_fast_tower_is_the_plain_one(visual):
    grid = torch.tensor([[1, 2, 6]] * 5 + [[1, 2, 2]])
    pixels = normal(64, 384)
    got = FusedVision(visual)(pixels, grid)
    same(got, encode_images(visual, pixels, grid))


def test_a_tower_whose_last_block_is_not_tapped_and_one_without_levels():
    for tapped in ([0], []):
        visual = small_vision(depth=2, deepstack_visual_indexes=tapped).requires_grad_(False)
        pixels, grid = normal(4, 384), torch.tensor([[1, 2, 2]])
        got = FusedVision(visual)(pixels, grid)
        assert len(got.deepstack) == len(tapped)
        same(got, encode_images(visual, pixels, grid))


def test_company_does_not_matter_to_the_fast_tower(visual):
    fused, pixels, grid = (
        FusedVision(visual, VisionPlan(streams=2)),
        normal(24, 384),
        torch.tensor([[1, 2, 2]]),
    )
    found = fused(pixels, grid.expand(6, 3)).embeds
    for image in (0, 3, 5):
        assert torch.equal(fused(pixels[4 * image : 4 * image + 4], grid).embeds[0], found[image])


def test_few_sizes_are_kept(visual):
    fused = FusedVision(visual)
    for width in (2, 4, 6, 8, 2, 10):
        fused._lanes((2, width))
    assert list(fused.kept) == [(2, 6), (2, 8), (2, 2), (2, 10)]


def test_patches_that_do_not_fill_the_grids_are_refused(visual):
    with pytest.raises(ValueError, match="23 patches"):
        FusedVision(visual)(normal(23, 384), torch.tensor([[1, 4, 6]]))
