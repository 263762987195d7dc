"""All of a checkpoint but its weights: the R1 release's keys and sizes, and smaller ones.

Sizes and keys are those of specification 1.2 and 1.3. Nothing here imports torch, so that a command line can
be made of it.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from tokenizers import Tokenizer

from alpamayo_dflash.common.artefacts import atomic_file, write_json
from alpamayo_dflash.common.options import check_whole
from alpamayo_dflash.target.config import ActionSpaceConfig
from alpamayo_dflash.target.rotary import Rope
from alpamayo_dflash.target.tokenizer import R1_NAMES, ROLES

RandomSize = Literal["r1-10b", "medium", "small"]

# Qwen's added tokens in the order of their ids (specification 2). The first fourteen are special.
QWEN_SPECIAL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
QWEN_ORDINARY = (
    "<tool_call>",
    "</tool_call>",
    "<|fim_prefix|>",
    "<|fim_middle|>",
    "<|fim_suffix|>",
    "<|fim_pad|>",
    "<|repo_name|>",
    "<|file_sep|>",
    "<tool_response>",
    "</tool_response>",
    "<think>",
    "</think>",
)
QWEN_ADDED = QWEN_SPECIAL + QWEN_ORDINARY
# Appended after the trajectory tokens (specification 2); the image's is Qwen's own.
_NEW_SPECIALS = [name for name in R1_NAMES if name != "image_pad"]


@dataclass(frozen=True)
class TargetShape:
    """The sizes that tell one Alpamayo from another; defaults are the R1 release's.

    Attributes:
        pieces: entries of the byte-level BPE, before the added tokens.
        added: the tokens that Qwen adds.
        spare_rows: rows of Qwen's own table beyond its tokenizer.
        future_bins: trajectory tokens of future actions.
        history_bins: of the ego history.
        hidden: width of the text model.
        layers: text layers, and expert layers.
        heads: query heads a text layer.
        kv_heads: key and value heads a layer, text and expert.
        head_dim: width of a head.
        mlp: width of the text MLP.
        mrope_section: frequencies of time, height and width; they add up to half of `head_dim`.
        rope_theta: base of the rotary frequencies.
        max_positions: the longest sequence.
        attention: the implementation that config.json names.
        vision_depth: blocks of the vision tower.
        vision_hidden: its width.
        vision_heads: its heads.
        vision_mlp: the width of its MLP.
        vision_positions: entries of the learned table of positions; a square number.
        deepstack: the blocks whose outputs go to the first text layers.
        expert_hidden: width of the expert.
        expert_heads: query heads of the expert.
        expert_mlp: width of its MLP.
        action_hidden: width of the action projection.
        action_space: constants of the actions.
        min_pixels: the least area of a resized image.
        max_pixels: the greatest.
        processor_pixels: the two in the Qwen3-VL preprocessor's file, which does not act.
    """

    pieces: int = 151_643
    added: tuple[str, ...] = QWEN_ADDED
    spare_rows: int = 267
    future_bins: int = 3000
    history_bins: int = 1000
    hidden: int = 4096
    layers: int = 36
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    mlp: int = 12_288
    mrope_section: tuple[int, int, int] = (24, 20, 20)
    rope_theta: float = 5e6
    max_positions: int = 262_144
    attention: str = "flash_attention_2"
    vision_depth: int = 27
    vision_hidden: int = 1152
    vision_heads: int = 16
    vision_mlp: int = 4304
    vision_positions: int = 2304
    deepstack: tuple[int, ...] = (8, 16, 24)
    expert_hidden: int = 2048
    expert_heads: int = 16
    expert_mlp: int = 8256
    action_hidden: int = 512
    action_space: ActionSpaceConfig = field(default_factory=ActionSpaceConfig)
    min_pixels: int = 163_840
    max_pixels: int = 196_608
    processor_pixels: tuple[int, int] = (65_536, 16_777_216)

    def __post_init__(self) -> None:
        """Check that the parts fit each other."""
        if 2 * sum(self.mrope_section) != self.head_dim:
            raise ValueError(
                f"mrope_section {self.mrope_section} must add up to half of head_dim {self.head_dim}"
            )
        for name, heads in (("heads", self.heads), ("expert_heads", self.expert_heads)):
            if heads % self.kv_heads:
                raise ValueError(f"{name} is {heads}; it must be a multiple of kv_heads {self.kv_heads}")
        if len(self.deepstack) > self.layers or max(self.deepstack) >= self.vision_depth:
            raise ValueError(
                f"deepstack {self.deepstack} needs as many text layers ({self.layers}) and blocks below "
                f"vision_depth {self.vision_depth}"
            )

    @property
    def traj_start(self) -> int:
        """The id of `<i0>`: the length of Qwen's tokenizer."""
        return self.pieces + len(self.added)

    @property
    def special_start(self) -> int:
        """The id of the first token after the trajectory tokens."""
        return self.traj_start + self.future_bins + self.history_bins

    @property
    def vocab_size(self) -> int:
        """V, rows of the embedding and of the head."""
        return self.special_start + len(_NEW_SPECIALS)

    def id_of(self, token: str) -> int:
        """The id of one of Qwen's added tokens."""
        return self.pieces + self.added.index(token)


SHAPES: dict[str, TargetShape] = {
    "r1-10b": TargetShape(),
    # About 1.3 GB: large enough to see where a load's memory goes on a machine without a GPU.
    "medium": TargetShape(
        hidden=1024,
        layers=24,
        heads=8,
        kv_heads=4,
        mlp=3072,
        vision_depth=4,
        vision_hidden=96,
        vision_heads=4,
        vision_mlp=256,
        vision_positions=64,
        deepstack=(1, 2),
        expert_hidden=256,
        expert_heads=4,
        expert_mlp=512,
        action_hidden=64,
    ),
    "small": TargetShape(
        pieces=1000,
        hidden=64,
        layers=3,
        heads=4,
        kv_heads=2,
        head_dim=16,
        mlp=128,
        mrope_section=(4, 2, 2),
        vision_depth=4,
        vision_hidden=32,
        vision_heads=2,
        vision_mlp=48,
        vision_positions=64,
        deepstack=(0, 1, 2),
        expert_hidden=48,
        expert_heads=4,
        expert_mlp=96,
        action_hidden=32,
        min_pixels=4096,
        max_pixels=8192,
    ),
}


@dataclass(frozen=True)
class RandomCheckpointConfig:
    """Which random checkpoint.

    Attributes:
        size: `r1-10b` has the R1 release's sizes; `medium` (about 1.3 GB) and `small` (2 MB) its layout.
        seed: with a tensor's name it fixes the tensor's values, on one kind of device.
        device: where the values are drawn; the CPU's and a GPU's generators give other values.
        shards: files of weights.

    Raises:
        ValueError: a value outside its range.
    """

    size: RandomSize = "r1-10b"
    seed: int = 0
    device: str = "cpu"
    shards: int = 5

    def __post_init__(self) -> None:
        """Check the ranges."""
        if self.size not in get_args(RandomSize):
            raise ValueError(f"size is {self.size!r}; known are {', '.join(get_args(RandomSize))}")
        check_whole(seed=self.seed)
        if not 1 <= self.shards <= 99_999:
            raise ValueError(f"shards is {self.shards}; it must be 1 to 99999")

    @property
    def shape(self) -> TargetShape:
        """The sizes."""
        return SHAPES[self.size]


def alpamayo_config(shape: TargetShape) -> dict[str, Any]:
    """config.json with the keys of the R1 release (specification 1.2); the Qwen3-VL files lie in `vlm`."""
    action_space = {
        "_target_": "alpamayo_r1.action_space.UnicycleAccelCurvatureActionSpace",
        **dataclasses.asdict(shape.action_space),
    }
    return {
        "model_type": "alpamayo_r1",
        "architectures": ["AlpamayoR1"],
        "dtype": "bfloat16",
        "model_dtype": "bfloat16",
        "vlm_name_or_path": "vlm",
        "vlm_backend": "qwenvl3",
        "attn_implementation": shape.attention,
        "traj_vocab_size": shape.future_bins + shape.history_bins,
        "tokens_per_history_traj": 48,
        "tokens_per_future_traj": 128,
        "vocab_size": shape.vocab_size,
        "traj_token_start_idx": shape.traj_start,
        "traj_token_ids": {
            role: shape.special_start + _NEW_SPECIALS.index(name) for role, name in ROLES.items()
        },
        "add_special_tokens": True,
        "min_pixels": shape.min_pixels,
        "max_pixels": shape.max_pixels,
        "keep_same_dtype": True,
        "expert_non_causal_attention": True,
        "expert_cfg": {
            "dtype": "bfloat16",
            "hidden_size": shape.expert_hidden,
            "intermediate_size": shape.expert_mlp,
            "num_attention_heads": shape.expert_heads,
            "head_dim": shape.head_dim,
        },
        "action_in_proj_cfg": {
            "_target_": "alpamayo_r1.models.action_in_proj.PerWaypointActionInProjV2",
            "hidden_size": shape.action_hidden,
            "max_freq": 100.0,
            "num_enc_layers": 2,
            "num_fourier_feats": 20,
        },
        "action_out_proj_cfg": {"_target_": "torch.nn.Linear"},
        "diffusion_cfg": {
            "_target_": "alpamayo_r1.diffusion.flow_matching.FlowMatching",
            "int_method": "euler",
            "x_dims": "???",
        },
        "action_space_cfg": action_space,
        "hist_traj_tokenizer_cfg": {
            "_target_": "alpamayo_r1.models.delta_tokenizer.DeltaTrajectoryTokenizer",
            "num_bins": shape.history_bins,
        },
        "traj_tokenizer_cfg": {
            "_target_": "alpamayo_r1.action_space.discrete_action_space.DiscreteTrajectoryTokenizer",
            "_recursive_": False,
            "action_space_cfg": action_space,
            "dims_min": [-10.0, -10.0],
            "dims_max": [10.0, 10.0],
            "num_bins": shape.future_bins,
        },
    }


def vlm_config(shape: TargetShape) -> dict[str, Any]:
    """The Qwen3-VL config.json (specification 1.3).

    Its vocabulary is Qwen's own table, 151,936 rows in the release: the tokenizer's length and the spare
    rows; the checkpoint's `vocab_size` takes its place on loading.
    """
    return {
        "architectures": ["Qwen3VLForConditionalGeneration"],
        "model_type": "qwen3_vl",
        "image_token_id": shape.id_of("<|image_pad|>"),
        "video_token_id": shape.id_of("<|video_pad|>"),
        "vision_start_token_id": shape.id_of("<|vision_start|>"),
        "vision_end_token_id": shape.id_of("<|vision_end|>"),
        "tie_word_embeddings": False,
        "text_config": {
            "model_type": "qwen3_vl_text",
            "attention_bias": False,
            "attention_dropout": 0.0,
            "bos_token_id": shape.id_of("<|endoftext|>"),
            "eos_token_id": shape.id_of("<|im_end|>"),
            "head_dim": shape.head_dim,
            "hidden_act": "silu",
            "hidden_size": shape.hidden,
            "initializer_range": 0.02,
            "intermediate_size": shape.mlp,
            "max_position_embeddings": shape.max_positions,
            "num_attention_heads": shape.heads,
            "num_hidden_layers": shape.layers,
            "num_key_value_heads": shape.kv_heads,
            "rms_norm_eps": 1e-6,
            **Rope(shape.rope_theta, shape.mrope_section).to_json(),
            "use_cache": True,
            "vocab_size": shape.traj_start + shape.spare_rows,
        },
        "vision_config": {
            "model_type": "qwen3_vl",
            "depth": shape.vision_depth,
            "hidden_size": shape.vision_hidden,
            "num_heads": shape.vision_heads,
            "intermediate_size": shape.vision_mlp,
            "num_position_embeddings": shape.vision_positions,
            "deepstack_visual_indexes": list(shape.deepstack),
            "hidden_act": "gelu_pytorch_tanh",
            "in_channels": 3,
            "initializer_range": 0.02,
            "out_hidden_size": shape.hidden,
            "patch_size": 16,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
        },
    }


def preprocessor_config(shape: TargetShape) -> dict[str, Any]:
    """Qwen3-VL's preprocessor_config.json; the pixel limits that act are those of the checkpoint."""
    shortest, longest = shape.processor_pixels
    return {
        "image_processor_type": "Qwen2VLImageProcessorFast",
        "processor_class": "Qwen3VLProcessor",
        "size": {"shortest_edge": shortest, "longest_edge": longest},
        "patch_size": 16,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    }


def tokenizer_config(shape: TargetShape) -> dict[str, Any]:
    """What transformers reads beside tokenizer.json."""
    return {
        "tokenizer_class": "Qwen2Tokenizer",
        "add_bos_token": False,
        "add_prefix_space": False,
        "bos_token": None,
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "model_max_length": shape.max_positions,
    }


def write_vlm(folder: Path, shape: TargetShape, tokenizer: Tokenizer) -> None:
    """Write what the checkpoint takes from a Qwen3-VL repository: config, tokenizer, preprocessor.

    Args:
        folder: is made if it does not exist.
        shape: the sizes.
        tokenizer: has `shape.pieces` entries and the added tokens.
    """
    with atomic_file(folder / "tokenizer.json") as temporary:
        tokenizer.save(str(temporary))
    write_json(folder / "tokenizer_config.json", tokenizer_config(shape))
    write_json(folder / "preprocessor_config.json", preprocessor_config(shape))
    write_json(folder / "config.json", vlm_config(shape))
