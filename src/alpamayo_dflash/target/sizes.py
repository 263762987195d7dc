"""The sizes of a Qwen3-VL, held to what a model can have."""

from __future__ import annotations

from typing import Any

from alpamayo_dflash.common.fields import checked, naming
from alpamayo_dflash.common.options import check_range

_LAYERS, _WIDTH, _COUNT = 1024, 2**20, 2**14
# The most that the sizes of a Qwen3-VL may be: far beyond any model, and below what no machine can hold.
_SIZES = {
    "text_config": {
        "hidden_size": _WIDTH,
        "intermediate_size": _WIDTH,
        "num_hidden_layers": _LAYERS,
        "num_attention_heads": _COUNT,
        "num_key_value_heads": _COUNT,
        "head_dim": _COUNT,
        "vocab_size": 2**24,
    },
    "vision_config": {
        "depth": _LAYERS,
        "hidden_size": _WIDTH,
        "intermediate_size": _WIDTH,
        "num_heads": _COUNT,
        "in_channels": 64,
        "patch_size": 1024,
        "spatial_merge_size": 64,
        "temporal_patch_size": 64,
        "out_hidden_size": _WIDTH,
        "num_position_embeddings": 2**20,
    },
}


def check_sizes(config: Any, where: str) -> None:
    """Refuse sizes that no model has, before modules are made of them.

    Args:
        config: a Qwen3VLConfig.
        where: its file, for messages.

    Raises:
        ValueError: a size is no whole number above 0, beyond its limit, or no multiple of another.
    """
    for part, sizes in _SIZES.items():
        for size, most in sizes.items():
            value = checked(getattr(getattr(config, part), size), int, f"{where}: {part}.{size}")
            with naming(f"{where}: {part}"):
                check_range(1, most, **{size: value})
    text, vision = config.text_config, config.vision_config
    for part, above, below in (
        (text, "num_attention_heads", "num_key_value_heads"),
        (vision, "hidden_size", "num_heads"),
    ):
        if getattr(part, above) % getattr(part, below):
            raise ValueError(
                f"{where}: {above} {getattr(part, above)} is no multiple of {below} {getattr(part, below)}"
            )
