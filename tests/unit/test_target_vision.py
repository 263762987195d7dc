"""The batched vision tower against transformers' own."""

import pytest
import torch
from transformers_versions import image_features

from alpamayo_dflash.target.vision import encode_images


@pytest.fixture(scope="module")
def visual():
    from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLVisionConfig
    from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLVisionModel

    torch.manual_seed(0)
    config = Qwen3VLVisionConfig(
        depth=3,
        hidden_size=32,
        num_heads=2,
        intermediate_size=48,
        out_hidden_size=40,
        num_position_embeddings=64,
        deepstack_visual_indexes=[0, 2],
        patch_size=8,
    )
    model = Qwen3VLVisionModel(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


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


def test_refuses_patches_that_do_not_fill_the_grids(visual):
    with pytest.raises(ValueError, match="23 patches"):
        encode_images(visual, torch.randn(23, 384), torch.tensor([[1, 4, 6]]))


def test_refuses_video(visual):
    with pytest.raises(ValueError, match="temporal"):
        encode_images(visual, torch.randn(48, 384), torch.tensor([[2, 4, 6]]))
