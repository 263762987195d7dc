"""A random target with odd sizes, in the official layout, for the tests of `target`. No fixture is needed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from alpamayo_dflash.clips.window import Window
from alpamayo_dflash.target.alpamayo import Alpamayo
from alpamayo_dflash.target.config import AlpamayoConfig

ADDED = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
]
BASE = 256 + len(ADDED)
BINS, FUTURE_BINS, TRAJ = 12, 5, 17
POINTS, WAYPOINTS, STEPS = 5, 7, 3


def write_vlm(folder: Path, **changes: Any) -> Path:
    """A Qwen3-VL folder with no weights; `changes` go over the top level of its config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in ADDED])
    tokenizer.save(str(folder / "tokenizer.json"))
    config: dict[str, Any] = {
        "architectures": ["Qwen3VLForConditionalGeneration"],
        "model_type": "qwen3_vl",
        "image_token_id": 256 + ADDED.index("<|image_pad|>"),
        "video_token_id": 256 + ADDED.index("<|video_pad|>"),
        "vision_start_token_id": 256 + ADDED.index("<|vision_start|>"),
        "vision_end_token_id": 256 + ADDED.index("<|vision_end|>"),
        "tie_word_embeddings": False,
        "text_config": {
            "model_type": "qwen3_vl_text",
            "hidden_size": 48,
            "intermediate_size": 56,
            "num_hidden_layers": 3,
            "num_attention_heads": 6,
            "num_key_value_heads": 3,
            "head_dim": 16,
            "hidden_act": "silu",
            "rms_norm_eps": 1e-6,
            "rope_theta": 1e6,
            "rope_scaling": {"mrope_interleaved": True, "mrope_section": [4, 2, 2], "rope_type": "default"},
            "attention_bias": False,
            "initializer_range": 0.2,
            "vocab_size": 300,
        },
        "vision_config": {
            "model_type": "qwen3_vl",
            "depth": 2,
            "hidden_size": 16,
            "num_heads": 2,
            "intermediate_size": 24,
            "num_position_embeddings": 16,
            "deepstack_visual_indexes": [0, 1],
            "hidden_act": "gelu_pytorch_tanh",
            "in_channels": 3,
            "out_hidden_size": 48,
            "patch_size": 4,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "initializer_range": 0.2,
        },
    }
    (folder / "config.json").write_text(json.dumps(config | changes))
    return folder


def raw_config(version: str = "r1", **changes: Any) -> dict[str, Any]:
    """A config.json; `changes` go over its top level."""
    package, model = ("alpamayo_r1", "AlpamayoR1") if version == "r1" else ("alpamayo1_5", "Alpamayo1_5")
    special = BASE + TRAJ
    raw: dict[str, Any] = {
        "model_type": package,
        "architectures": [model],
        "dtype": "float32",
        "vlm_name_or_path": "vlm",
        "vocab_size": special + 28,
        "traj_token_start_idx": BASE,
        "traj_vocab_size": TRAJ,
        "traj_token_ids": {
            "history": special + 15,
            "future": special + 16,
            "history_start": special + 5,
            "future_start": special + 12,
            "history_end": special + 7,
            "future_end": special + 14,
        },
        "tokens_per_history_traj": POINTS * 3,
        "tokens_per_future_traj": WAYPOINTS * 2,
        "min_pixels": 128,
        "max_pixels": 512,
        "expert_cfg": {
            "hidden_size": 24,
            "intermediate_size": 40,
            "num_attention_heads": 6,
            "head_dim": 16,
            "dtype": "float32",
        },
        "action_in_proj_cfg": {
            "_target_": f"{package}.models.action_in_proj.PerWaypointActionInProjV2",
            "hidden_size": 20,
            "max_freq": 30.0,
            "num_enc_layers": 3,
            "num_fourier_feats": 8,
        },
        "action_out_proj_cfg": {"_target_": "torch.nn.Linear"},
        "action_space_cfg": {
            "_target_": f"{package}.action_space.UnicycleAccelCurvatureActionSpace",
            "dt": 0.25,
            "n_waypoints": WAYPOINTS,
        },
        "diffusion_cfg": {
            "_target_": f"{package}.diffusion.flow_matching.FlowMatching",
            "int_method": "euler",
            "num_inference_steps": STEPS,
            "x_dims": "???",
        },
        "hist_traj_tokenizer_cfg": {
            "_target_": f"{package}.models.delta_tokenizer.DeltaTrajectoryTokenizer",
            "num_bins": BINS,
        },
        "traj_tokenizer_cfg": {
            "_target_": f"{package}.action_space.discrete_action_space.DiscreteTrajectoryTokenizer",
            "num_bins": FUTURE_BINS,
        },
        "a_key_that_nobody_knows": {"x": 1},
    }
    return raw | changes


def build(folder: Path, version: str = "r1", seed: int = 0) -> Alpamayo:
    """A random target whose Qwen3-VL files lie in folder/vlm."""
    torch.manual_seed(seed)
    return Alpamayo.from_config(AlpamayoConfig.from_dict(raw_config(version)), write_vlm(folder / "vlm"))


def window(cameras: tuple[int, ...] = (0, 1, 6), frames: int = 2, seed: int = 0) -> Window:
    """Noise images and a gentle left turn."""
    generator = np.random.default_rng(seed)
    heading = np.linspace(-0.2, 0.0, POINTS)
    xyz = np.stack((np.linspace(-4.0, 0.0, POINTS), 0.1 * heading, 0 * heading), axis=-1)
    rot = np.zeros((POINTS, 3, 3))
    rot[:, 0, 0] = rot[:, 1, 1] = np.cos(heading)
    rot[:, 1, 0], rot[:, 0, 1] = np.sin(heading), -np.sin(heading)
    rot[:, 2, 2] = 1.0
    return Window(
        clip_id="clip",
        t0_us=5,
        cameras=cameras,
        frames=generator.integers(0, 256, (len(cameras), frames, 20, 36, 3), dtype=np.uint8),
        ego_history_xyz=xyz.astype(np.float32),
        ego_history_rot=rot.astype(np.float32),
    )
