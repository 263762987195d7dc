"""The tiny Alpamayo's shape: the official layout's files, at a five-hundredth of the size.

Everything that the real checkpoint has is here (vision tower with deepstack, interleaved M-RoPE decoder,
trajectory and special tokens, action expert, flow matching); only the sizes differ.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from alpamayo_dflash.common.artefacts import write_json

# The added tokens of Qwen's tokenizer that a prompt can hold, in its order.
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
# How byte-level BPE of the Qwen family cuts text before merging: contractions, words with their leading
# blank, single digits, punctuation, line ends, other blanks.
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_CUT = "|".join(
    (
        _CONTRACTIONS,
        r"[^\r\n\p{L}\p{N}]?\p{L}+",
        r"\p{N}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    )
)
# The prompt's fixed words (specification 3.3), so that BPE learns them too.
_PROMPT_TEXT = (
    "system\nYou are a driving assistant that generates safe and accurate actions.",
    "user\n",
    "output the chain-of-thought reasoning of the driving process, then output the future trajectory.",
    "assistant\n",
)
_MERGED_WORDS = 1100  # pieces of the vocabulary: the 256 bytes and enough merges for whole words
_HISTORY_BINS = 256
_FUTURE_BINS = 64
_SPECIAL_TOKENS = 28  # appended after the trajectory tokens (specification 2)

_ACTION_SPACE = {
    "_target_": "alpamayo_r1.action_space.UnicycleAccelCurvatureActionSpace",
    "accel_mean": -0.2,
    "accel_std": 0.9,
    "curvature_mean": 0.0,
    "curvature_std": 0.012,
    "accel_bounds": [-9.8, 9.8],
    "curvature_bounds": [-0.33, 0.33],
    "dt": 0.1,
    "n_waypoints": 64,
    "theta_lambda": 1e-6,
    "theta_ridge": 1e-8,
    "v_lambda": 1e-6,
    "v_ridge": 1e-4,
    "a_lambda": 1e-4,
    "a_ridge": 1e-4,
    "kappa_lambda": 1e-4,
    "kappa_ridge": 1e-4,
}


def train_tokenizer(texts: list[str]) -> Any:
    """Train a byte-level BPE tokenizer in Qwen's form on the world's texts and the prompt's words."""
    from tokenizers import (
        AddedToken,
        Regex,
        Tokenizer,
        decoders,
        models,
        normalizers,
        pre_tokenizers,
        trainers,
    )

    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_CUT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=_MERGED_WORDS,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*texts, *_PROMPT_TEXT * 50], trainer)
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in QWEN_SPECIAL])
    return tokenizer


def vlm_config(base_vocabulary: int, ids: dict[str, int]) -> dict[str, Any]:
    """The config of the tiny Qwen3-VL.

    Args:
        base_vocabulary: size of the tokenizer before trajectory tokens.
        ids: text of each special token to its id.
    """
    return {
        "architectures": ["Qwen3VLForConditionalGeneration"],
        "model_type": "qwen3_vl",
        "image_token_id": ids["<|image_pad|>"],
        "video_token_id": ids["<|video_pad|>"],
        "vision_start_token_id": ids["<|vision_start|>"],
        "vision_end_token_id": ids["<|vision_end|>"],
        "tie_word_embeddings": False,
        "text_config": {
            "model_type": "qwen3_vl_text",
            "attention_bias": False,
            "attention_dropout": 0.0,
            "bos_token_id": ids["<|endoftext|>"],
            "eos_token_id": ids["<|im_end|>"],
            "head_dim": 32,
            "hidden_act": "silu",
            "hidden_size": 192,
            "initializer_range": 0.02,
            "intermediate_size": 416,
            "max_position_embeddings": 4096,
            "num_attention_heads": 6,
            "num_hidden_layers": 8,
            "num_key_value_heads": 2,
            "rms_norm_eps": 1e-6,
            "rope_theta": 10000,
            "rope_scaling": {"mrope_interleaved": True, "mrope_section": [6, 5, 5], "rope_type": "default"},
            "use_cache": True,
            "vocab_size": base_vocabulary,
        },
        "vision_config": {
            "model_type": "qwen3_vl",
            "depth": 4,
            "hidden_size": 96,
            "num_heads": 4,
            "intermediate_size": 256,
            "num_position_embeddings": 64,
            "deepstack_visual_indexes": [1, 2],
            "hidden_act": "gelu_pytorch_tanh",
            "in_channels": 3,
            "initializer_range": 0.02,
            "out_hidden_size": 192,
            "patch_size": 16,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
        },
    }


def alpamayo_config(base_vocabulary: int) -> dict[str, Any]:
    """The tiny checkpoint's config.json, in the keys of the R1 release (specification 1.2)."""
    traj_vocabulary = _FUTURE_BINS + _HISTORY_BINS
    special = base_vocabulary + traj_vocabulary
    return {
        "model_type": "alpamayo_r1",
        "architectures": ["AlpamayoR1"],
        "dtype": "bfloat16",
        "model_dtype": "bfloat16",
        "vlm_name_or_path": "vlm",
        "vlm_backend": "qwenvl3",
        "attn_implementation": "sdpa",
        "traj_vocab_size": traj_vocabulary,
        "tokens_per_history_traj": 48,
        "tokens_per_future_traj": 128,
        "vocab_size": special + _SPECIAL_TOKENS,
        "traj_token_start_idx": base_vocabulary,
        "traj_token_ids": {
            "history_start": special + 5,
            "history_end": special + 7,
            "future_start": special + 12,
            "future_end": special + 14,
            "history": special + 15,
            "future": special + 16,
        },
        "add_special_tokens": True,
        "min_pixels": 4096,
        "max_pixels": 8192,
        "keep_same_dtype": True,
        "expert_non_causal_attention": True,
        "expert_cfg": {
            "dtype": "bfloat16",
            "hidden_size": 128,
            "intermediate_size": 256,
            "num_attention_heads": 4,
            "head_dim": 32,
        },
        "action_in_proj_cfg": {
            "_target_": "alpamayo_r1.models.action_in_proj.PerWaypointActionInProjV2",
            "hidden_size": 64,
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
        "action_space_cfg": _ACTION_SPACE,
        "hist_traj_tokenizer_cfg": {
            "_target_": "alpamayo_r1.models.delta_tokenizer.DeltaTrajectoryTokenizer",
            "num_bins": _HISTORY_BINS,
        },
        "traj_tokenizer_cfg": {
            "_target_": "alpamayo_r1.action_space.discrete_action_space.DiscreteTrajectoryTokenizer",
            "_recursive_": False,
            "action_space_cfg": _ACTION_SPACE,
            "dims_min": [-10.0, -10.0],
            "dims_max": [10.0, 10.0],
            "num_bins": _FUTURE_BINS,
        },
    }


def write_blueprint(folder: Path, texts: list[str]) -> None:
    """Write all of a tiny checkpoint but its weights: config.json and vlm/ with tokenizer and processor.

    Args:
        folder: where; made if it is not there.
        texts: what the tokenizer is trained on.
    """
    tokenizer = train_tokenizer(texts)
    vlm = folder / "vlm"
    vlm.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(vlm / "tokenizer.json"))
    base = tokenizer.get_vocab_size()
    ids = {token: tokenizer.token_to_id(token) for token in QWEN_SPECIAL}
    write_json(vlm / "config.json", vlm_config(base, ids))
    write_json(
        vlm / "tokenizer_config.json",
        {
            "tokenizer_class": "Qwen2Tokenizer",
            "add_bos_token": False,
            "add_prefix_space": False,
            "bos_token": None,
            "eos_token": "<|im_end|>",
            "pad_token": "<|endoftext|>",
            "model_max_length": 4096,
        },
    )
    write_json(
        vlm / "preprocessor_config.json",
        {
            "image_processor_type": "Qwen2VLImageProcessorFast",
            "processor_class": "Qwen3VLProcessor",
            "size": {"shortest_edge": 4096, "longest_edge": 8192},
            "patch_size": 16,
            "temporal_patch_size": 2,
            "merge_size": 2,
            "image_mean": [0.5, 0.5, 0.5],
            "image_std": [0.5, 0.5, 0.5],
        },
    )
    write_json(folder / "config.json", alpamayo_config(base))
