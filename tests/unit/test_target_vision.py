"""The batched vision tower against transformers' own."""

import pytest
import torch
from torch import nn

from alpamayo_dflash.target.fp8 import FP8Linear
from alpamayo_dflash.target.vision import encode_images
from alpamayo_dflash.target.vision_fused import misfit_vision, why_plain_vision
from tests.helpers.small_vision import small_vision
from tests.helpers.transformers_versions import image_features


@pytest.fixture(scope="module")
def visual():
    return small_vision()


@pytest.mark.parametrize("grids", [[(1, 4, 6)] * 5, [(1, 4, 6), (1, 2, 2), (1, 2, 2), (1, 8, 10)]])
def test_equal_to_transformers(visual, grids):
    patches = sum(h * w for _, h, w in grids)
    pixels = torch.randn(patches, 3 * 2 * 8 * 8)
    grid = torch.tensor(grids)
    with torch.no_grad():
        ours = encode_images(visual, pixels, grid)
        embeds, deepstack = image_features(visual(pixels, grid_thw=grid))
    torch.testing.assert_close(ours.embeds, embeds, atol=2e-5, rtol=1e-5)
    for level, expected in enumerate(deepstack):
        torch.testing.assert_close(ours.deepstack[level], expected, atol=2e-5, rtol=1e-5)


def features(visual, images_NTK, grid, **options):
    """Of the last image, by encoding all. The largest grid has a GELU that three threads share unevenly."""
    grids = torch.tensor([[1, *grid]] * len(images_NTK))
    with torch.no_grad():
        found = encode_images(visual, images_NTK.flatten(0, 1), grids, **options)
    tokens = len(found.embeds) // len(images_NTK)
    return torch.cat((found.embeds[None], found.deepstack))[:, -tokens:]


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("grid", [(2, 2), (4, 6), (20, 22)])
def test_company_does_not_matter(visual, grid, threads):
    images = torch.randn(16, grid[0] * grid[1], 384)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        alone = features(visual, images[-1:], grid)
        for first in (14, 13, 12, 11, 0):
            assert torch.equal(features(visual, images[first:], grid), alone), 16 - first
        together = features(visual, images, grid, group=None)
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(together, alone, atol=2e-5, rtol=1e-5)


def test_company_of_other_sizes_does_not_matter(visual):
    one, other = torch.randn(24, 384), torch.randn(4, 384)
    grid = torch.tensor([[1, 4, 6], [1, 2, 2], [1, 4, 6]])
    with torch.no_grad():
        found = encode_images(visual, torch.cat((one, other, one)), grid).embeds
    assert torch.equal(found[:6], found[7:])
    assert torch.equal(found[:6], features(visual, one[None], (4, 6))[0])


@pytest.mark.parametrize(
    "name", ["patch_embed", "blocks.0.attn.qkv", "blocks.1.mlp", "blocks.1.mlp.linear_fc1", "merger"]
)
def test_what_is_more_than_its_weights_is_called_by_fours(visual, name):
    images, called = torch.randn(6, 24, 384), []
    expected = features(visual, images, (4, 6))

    def halve(_module, _inputs, output):
        called.append(output)
        return output / 2

    handle = visual.get_submodule(name).register_forward_hook(halve)
    try:
        halved, together = (features(visual, images, (4, 6), **each) for each in ({}, {"group": None}))
        alone = features(visual, images[-1:], (4, 6))
    finally:
        handle.remove()
    assert len({output.shape for output in called[:2]}) == 1 and len(called) >= 4
    assert torch.equal(halved, alone) and not torch.allclose(halved, expected)
    torch.testing.assert_close(halved, together, atol=2e-5, rtol=1e-5)


def test_gradients_by_fours_are_those_of_all_at_once(visual):
    pixels, grid = torch.randn(6 * 24, 384), torch.tensor([[1, 4, 6]] * 6)
    found = []
    for group in (4, None):
        visual.zero_grad()
        encode_images(visual, pixels, grid, group=group).embeds.square().mean().backward()
        found.append([weight.grad.clone() for weight in visual.parameters() if weight.grad is not None])
    visual.zero_grad()
    assert len(found[0]) == len(found[1]) > 0
    for grouped, together in zip(*found, strict=True):
        torch.testing.assert_close(grouped, together, atol=1e-5, rtol=1e-4)


def test_tables_that_are_kept_can_be_trained_with(visual):
    """They are made in inference mode first, and then asked for where gradients are taken."""
    pixels, grid = torch.randn(60, 384), torch.tensor([[1, 6, 10]])
    with torch.inference_mode():
        expected = encode_images(visual, pixels, grid).embeds
    got = encode_images(visual, pixels, grid).embeds
    got.sum().backward()
    assert torch.equal(got, expected)
    visual.zero_grad()


def test_refuses_patches_that_do_not_fill_the_grids(visual):
    with pytest.raises(ValueError, match="23 patches"):
        encode_images(visual, torch.randn(23, 384), torch.tensor([[1, 4, 6]]))


def test_refuses_video(visual):
    with pytest.raises(ValueError, match="temporal"):
        encode_images(visual, torch.randn(48, 384), torch.tensor([[2, 4, 6]]))


def test_why_a_tower_runs_in_its_plain_form(tmp_path):
    from tests.helpers.random_target import random_target

    target = random_target(tmp_path)
    assert why_plain_vision(target) == "the weights are on the cpu, not on a GPU"


def test_towers_that_are_more_than_their_weights():
    tower, float32 = small_vision(), torch.float32
    assert misfit_vision(tower, float32) is None
    assert misfit_vision(tower, torch.bfloat16) == (
        "visual.patch_embed is torch.float32, the embedding torch.bfloat16"
    )
    for path, found in (
        ("patch_embed", "Qwen3VLVisionPatchEmbed with hooks"),
        ("blocks.1.mlp", "Qwen3VLVisionMLP with hooks"),
        ("blocks.1.mlp.act_fn", "GELUTanh with hooks"),
        ("merger.norm", "LayerNorm with hooks"),
    ):
        handle = tower.get_submodule(path).register_forward_hook(lambda *_: None)
        name, _, kind = found.partition(" ")
        assert misfit_vision(tower, float32).endswith(f"visual.{path} is a {name} {kind}"), path
        handle.remove()
    tower.merger.act_fn = nn.SiLU()
    assert misfit_vision(tower, float32) == "visual.merger.act_fn is a SiLU"
    for width, found in ((40, "an FP8Linear of 32 inputs and 40 outputs, no multiples of 16"), (48, None)):
        in_fp8 = small_vision(intermediate_size=width).to(torch.bfloat16)
        made = in_fp8.blocks[0].mlp.linear_fc1 = FP8Linear.in_place_of(in_fp8.blocks[0].mlp.linear_fc1)
        assert "an FP8Linear whose bias is torch.float32" in misfit_vision(in_fp8, torch.bfloat16)
        made.to(torch.bfloat16)
        name = "visual.blocks.0.mlp.linear_fc1 is "
        assert misfit_vision(in_fp8, torch.bfloat16) == (None if found is None else name + found)
    tower = small_vision()
    tower.blocks[2].attn.qkv.bias = None
    assert misfit_vision(tower, float32) == "visual.blocks.2.attn.qkv is a Linear without a bias"
    assert "'silu'" in misfit_vision(small_vision(hidden_act="silu"), float32)
    assert "heads are 8 wide" in misfit_vision(small_vision(hidden_size=16), float32)
    assert "heads are 20 wide" in misfit_vision(small_vision(hidden_size=40), float32)
