"""The fast vision tower and the reuse of images on a CUDA device (run by hand: `pytest -m gpu`)."""

import copy
import os
from dataclasses import replace

# The products and attention of float32 tensors in float32: Triton would round their factors to TF32.
os.environ.setdefault("TRITON_F32_DEFAULT", "ieee")

import numpy as np
import pytest
import torch
from torch.nn import functional

from alpamayo_dflash.decode.config import DecodeConfig
from alpamayo_dflash.decode.decoder import SpeculativeDecoder
from alpamayo_dflash.decode.vision import VisionReader
from alpamayo_dflash.standins.validate import held_out
from alpamayo_dflash.target.alpamayo import Alpamayo
from alpamayo_dflash.target.vision import encode_images
from alpamayo_dflash.target.vision_fused import FusedVision, VisionPlan, why_plain_vision
from tests.helpers.small_vision import small_vision

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
GRID, PATCHES, VALUES = (20, 36), 720, 1536
KINDS = ["flash", "cudnn", "efficient"]


@pytest.fixture(scope="module")
def towers():
    """R1's tower in width, six blocks of it, in float32 and bfloat16."""
    torch.backends.cuda.matmul.allow_tf32 = False
    exact = small_vision(
        depth=6,
        hidden_size=1152,
        num_heads=16,
        intermediate_size=4304,
        out_hidden_size=4096,
        num_position_embeddings=2304,
        deepstack_visual_indexes=[1, 3, 4],
        patch_size=16,
    ).requires_grad_(False)
    for name, parameter in exact.named_parameters():
        parameter.normal_(std=0.03)
        if "norm" in name and name.endswith("weight"):
            parameter.add_(1)
    exact = exact.cuda()
    return exact, copy.deepcopy(exact).bfloat16()


def images(count, seed=0, patches=PATCHES):
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(count * patches, VALUES, generator=generator, device="cuda").bfloat16()


def grids(count, grid=GRID):
    return torch.tensor([[1, *grid]] * count)


def joined(features):
    return torch.cat((features.embeds.unsqueeze(0), features.deepstack))


def away(found, expected):
    """Relative distances: of the features, and of each level of deepstack ones."""
    return [
        float((a.double() - b.double()).norm() / b.double().norm())
        for a, b in zip(joined(found), joined(expected), strict=True)
    ]


@torch.inference_mode()
@pytest.mark.parametrize("gelu", ["rounded", "epilogue"])
@pytest.mark.parametrize("kind", KINDS)
def test_in_bfloat16_it_is_as_near_to_float32_as_the_plain_form(towers, kind, gelu):
    exact, tower = towers
    pixels, grid = images(6), grids(6)
    expected = encode_images(exact, pixels.float(), grid)
    plain = away(encode_images(tower, pixels, grid), expected)
    fast = away(FusedVision(tower, VisionPlan(attention=kind, gelu=gelu))(pixels, grid), expected)
    print(f"{kind}, {gelu}: fast {fast}, plain {plain}")
    assert all(a <= 1.05 * b for a, b in zip(fast, plain, strict=True))


@torch.inference_mode()
def test_in_float32_it_is_the_plain_one(towers):
    """Images of several sizes, one after another and again, by one graph a size."""
    exact, _ = towers
    fused = FusedVision(exact, VisionPlan(attention="efficient"))
    for count, grid in ((5, GRID), (1, (4, 6)), (3, (6, 34)), (5, GRID)):
        pixels = images(count, count, grid[0] * grid[1]).float()
        found, expected = fused(pixels, grids(count, grid)), encode_images(exact, pixels, grids(count, grid))
        assert max(away(found, expected)) < 1e-5
    assert list(fused.kept) == [(4, 6), (6, 34), GRID]


@torch.inference_mode()
@pytest.mark.parametrize("kind", [*KINDS, "plain"])
def test_company_does_not_matter(towers, kind):
    """The same bits alone, in each place of a group, and among sixteen."""
    _, tower = towers
    fused = FusedVision(tower, VisionPlan(attention="flash" if kind == "plain" else kind))

    def see(pixels, grid):
        return joined(encode_images(tower, pixels, grid) if kind == "plain" else fused(pixels, grid))

    pixels = images(16)
    tokens = PATCHES // 4
    together = see(pixels, grids(16))
    for image in range(16):
        alone = see(pixels[image * PATCHES : (image + 1) * PATCHES], grids(1))
        assert torch.equal(alone, together[:, image * tokens : (image + 1) * tokens]), image


@torch.inference_mode()
@pytest.mark.parametrize("kind", KINDS)
def test_groups_side_by_side_are_the_same_bits(towers, kind):
    _, tower = towers
    one, two = (FusedVision(tower, VisionPlan(attention=kind, streams=streams)) for streams in (1, 2))
    for seed, count in enumerate((16, 3, 9, 16)):
        pixels = images(count, seed)
        assert torch.equal(joined(one(pixels, grids(count))), joined(two(pixels, grids(count))))


@torch.inference_mode()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_small_operations_round_as_the_plain_ones(dtype):
    from alpamayo_dflash.kernels.vision import add_layer_norm, rotate_in_place
    from alpamayo_dflash.target.qwen3 import rotate
    from alpamayo_dflash.target.vision import rotary_tables_2d

    def normal(*shape):
        return torch.randn(*shape, device="cuda").to(dtype)

    hidden, added, weight, shift = normal(2880, 1152), normal(2880, 1152), normal(1152), normal(1152)
    total, normed = add_layer_norm(hidden, added, weight, shift, 1e-6)
    assert torch.equal(total, hidden + added)
    expected = functional.layer_norm(total, (1152,), weight, shift, 1e-6)
    # A statistic's last bit moves a few values to the next one.
    step = 2.0 ** (-7 if dtype == torch.bfloat16 else -20)
    assert (normed - expected).abs().max() <= step * expected.abs().max()
    assert (normed != expected).float().mean() < (0.01 if dtype == torch.bfloat16 else 0.9)

    cos, sin = rotary_tables_2d(*GRID, 2, 72, torch.device("cuda"))
    qkv = normal(2 * PATCHES, 3 * 1152)
    q, k, v = qkv.clone().view(2, PATCHES, 3, 16, 72).unbind(2)
    rotate_in_place(qkv, cos, sin, 16)
    found = qkv.view(2, PATCHES, 3, 16, 72).unbind(2)
    assert torch.equal(found[2], v)
    for got, x in zip(found, (q, k), strict=False):
        expected = rotate(x.float(), cos, sin).to(dtype)
        assert (got - expected).abs().max() <= step * expected.abs().max()


@torch.inference_mode()
def test_features_that_are_kept_are_the_towers():
    """Windows that share three quarters of their images, one that is the same, and an old one again."""
    target = Alpamayo.from_pretrained("tiny", dtype=torch.bfloat16, device="cuda")
    view = held_out(1, seed=5)[0][0]
    prompt = target.prompt(view)
    once, again = VisionReader(target), VisionReader(target, reuse_bytes=2**26)
    count, rows = len(prompt.image_grid_thw), len(prompt.pixel_values) // len(prompt.image_grid_thw)
    pool = images(2 * count, 3, rows).view(2 * count, rows, -1)
    for first in (0, count // 4, count // 2, count // 2, 0):
        shown = pool[first : first + count].flatten(0, 1)
        asked = replace(prompt, pixel_values=shown)
        assert torch.equal(joined(again(asked)), joined(once(asked)))
    assert again.misses == count + 2 * (count // 4) and once.hits == 0


def sliding(views):
    """Windows of which each shares three of four frames of every camera with the one before."""
    frames = np.concatenate([view.frames for view in views], axis=1)
    return [
        replace(views[0], frames=np.ascontiguousarray(frames[:, at : at + 4]), t0_us=at) for at in range(5)
    ]


def test_hit_or_miss_words_and_trajectory_are_the_same():
    target = Alpamayo.from_pretrained("tiny", dtype=torch.bfloat16, device="cuda")
    assert why_plain_vision(target) is None
    views = sliding([view for view, _ in held_out(2, seed=3)])
    plain = SpeculativeDecoder(target, None, DecodeConfig(row_width=8))
    reusing = SpeculativeDecoder(target, None, DecodeConfig(row_width=8, vision_reuse_mib=64))
    for view in (*views, views[0]):
        options = {"num_traj_samples": 2, "seed": 6}
        expected, found = plain.generate(view, **options), reusing.generate(view, **options)
        assert found.token_ids == expected.token_ids
        assert torch.equal(found.pred_xyz, expected.pred_xyz)
        assert torch.equal(found.pred_rot, expected.pred_rot)
    reader = reusing.verifier.vision
    assert reader.hits >= 4 * 12 + 16 and reader.misses <= 16 + 4 * 4
