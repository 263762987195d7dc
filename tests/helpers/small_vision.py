"""A small vision tower with random weights, of transformers' own modules."""

import torch


def small_vision(**changes):
    """Three blocks, two levels of deepstack features, patches of 384 values; `changes` are of its config."""
    from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLVisionConfig
    from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLVisionModel

    torch.manual_seed(0)
    options = {
        "depth": 3,
        "hidden_size": 32,
        "num_heads": 2,
        "intermediate_size": 40,
        "out_hidden_size": 40,
        "num_position_embeddings": 64,
        "deepstack_visual_indexes": [0, 2],
        "patch_size": 8,
    }
    model = Qwen3VLVisionModel(Qwen3VLVisionConfig(**(options | changes))).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model
