"""Random targets in the official layout, with prompts, windows and drafts for them. No fixture is needed.

Nothing here is trained. `SMALL` is what the decoding tests run on (`random_target`): its head is scaled so
that the next token is uncertain but not uniform. With `push`, the tokens of a text's end get more probable,
and texts end by themselves. `ODD` is for the tests of `target` (`odd_target`): few sizes are powers of two.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from alpamayo_dflash.clips.window import Window
from alpamayo_dflash.draft.config import DraftConfig
from alpamayo_dflash.draft.model import DFlashDraft
from alpamayo_dflash.target.alpamayo import Alpamayo
from alpamayo_dflash.target.config import AlpamayoConfig
from alpamayo_dflash.target.prompt import Prompt, mrope_positions
from tests.helpers.transformers_versions import drawn_in_order

QWEN_TOKENS = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
]
SENTENCES = [
    "Stop for the red light ahead.",
    "Keep distance to the lead vehicle because it is directly ahead in the same lane",
    "Nudge left since the parked truck reaches into the lane.",
]
NEW_SPECIALS = 28
BASE = 256 + len(QWEN_TOKENS)
"""Tokens of `ODD`'s Qwen3-VL, which are bytes and these; Alpamayo's come behind."""
BINS, FUTURE_BINS, TRAJ = 12, 5, 17
"""Of `ODD`'s trajectory tokens: bins of the history, bins of the future, and how many there are."""
POINTS, WAYPOINTS, STEPS = 5, 7, 3
"""Of `ODD`: poses of the history, way-points, Euler steps."""
PACKAGES = {"r1": ("alpamayo_r1", "AlpamayoR1"), "1.5": ("alpamayo1_5", "Alpamayo1_5")}


@dataclass(frozen=True)
class Sizes:
    """What a random Qwen3-VL's files say of it.

    Attributes:
        text: keys of its language half's config; those left out are transformers' defaults.
        vision: keys of its vision tower's config, likewise.
        learnt: texts from which the tokenizer learns merges; without any its tokens are bytes.
    """

    text: Mapping[str, Any]
    vision: Mapping[str, Any]
    learnt: tuple[str, ...] = ()


SMALL = Sizes(
    text={
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "rope_theta": 5000000,
        "initializer_range": 0.1,
    },
    vision={
        "depth": 1,
        "hidden_size": 16,
        "num_heads": 2,
        "intermediate_size": 32,
        "num_position_embeddings": 16,
    }
    | {"deepstack_visual_indexes": [0]},
    learnt=tuple(SENTENCES),
)
ODD = Sizes(
    text={
        "hidden_size": 48,
        "intermediate_size": 56,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "num_key_value_heads": 3,
        "head_dim": 16,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "attention_bias": False,
        "initializer_range": 0.2,
        "vocab_size": 300,
    },
    vision={
        "depth": 2,
        "hidden_size": 16,
        "num_heads": 2,
        "intermediate_size": 24,
        "num_position_embeddings": 16,
        "deepstack_visual_indexes": [0, 1],
        "hidden_act": "gelu_pytorch_tanh",
        "in_channels": 3,
        "patch_size": 4,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "initializer_range": 0.2,
    },
)


def write_vlm(folder: Path, sizes: Sizes) -> int:
    """Write a Qwen3-VL's configuration and tokenizer, without weights; return the tokenizer's size."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(sizes.learnt, trainer)
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in QWEN_TOKENS])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    size = tokenizer.get_vocab_size()
    tokens = {"image": "image_pad", "video": "video_pad"}
    tokens |= {name: name for name in ("vision_start", "vision_end")}
    head_dim = sizes.text["head_dim"]
    section = head_dim // 8
    rotary = {
        "rope_type": "default",
        "mrope_interleaved": True,
        "mrope_section": [head_dim // 2 - 2 * section, section, section],
    }
    config = {
        "architectures": ["Qwen3VLForConditionalGeneration"],
        "model_type": "qwen3_vl",
        **{f"{key}_token_id": tokenizer.token_to_id(f"<|{token}|>") for key, token in tokens.items()},
        "tie_word_embeddings": False,
        "text_config": {"model_type": "qwen3_vl_text", "vocab_size": size, "rope_scaling": rotary}
        | sizes.text,
        "vision_config": {"model_type": "qwen3_vl", "out_hidden_size": sizes.text["hidden_size"]}
        | sizes.vision,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return size


def alpamayo_config(size: int, traj_vocab: int, version: str, **keys: Any) -> dict[str, Any]:
    """Alpamayo's config.json on a Qwen3-VL with a tokenizer of `size` tokens; `keys` are its other keys."""
    package, model = PACKAGES[version]
    return {
        "model_type": package,
        "architectures": [model],
        "dtype": "float32",
        "vocab_size": size + traj_vocab + NEW_SPECIALS,
        "traj_token_start_idx": size,
        "traj_vocab_size": traj_vocab,
        **keys,
    }


def random_target(
    folder: Path,
    *,
    seed: int = 0,
    layers: int = 3,
    hidden: int = 32,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 16,
    mlp: int = 64,
    traj_vocab: int = 8,
    sharpness: float = 3.0,
    push: float = 0.0,
    dtype: torch.dtype = torch.float32,
) -> Alpamayo:
    """Build the target in `folder`, which keeps its configuration and tokenizer."""
    changes = {
        "hidden_size": hidden,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
    }
    size = write_vlm(folder, replace(SMALL, text={**SMALL.text, **changes}))
    raw = alpamayo_config(
        size,
        traj_vocab,
        "r1",
        vlm_name_or_path=str(folder),
        traj_token_ids={},
        add_special_tokens=True,
        expert_cfg={
            "hidden_size": 24,
            "intermediate_size": 48,
            "num_attention_heads": 4,
            "head_dim": head_dim,
        },
        action_in_proj_cfg={"hidden_size": 16},
        hist_traj_tokenizer_cfg={"num_bins": 4},
        traj_tokenizer_cfg={"num_bins": 4, "dims_min": [-10, -10], "dims_max": [10, 10]},
        action_space_cfg={},
        diffusion_cfg={},
    )
    torch.manual_seed(seed)
    with drawn_in_order():
        target = Alpamayo.from_config(AlpamayoConfig.from_dict(raw), folder)
    with torch.no_grad():
        head = target.head
        head.normal_()
        head *= sharpness / hidden**0.5
        if push:
            # A component that every state has makes a bias of one column of the head.
            target.embedding[:, 0] = 2.0
            head[:, 0] = 0.0
            special, period = target.special, target.tokenizer.encode(".").ids[0]
            head[[special.cot_end, special.traj_future_start, special.eos, period], 0] = push
            head[special.eos, 0] -= 0.5
            head[period, 0] += 0.5
        # Undamped, a random expert amplifies rounding without bound over the Euler steps.
        project = target.action_in_proj
        frequencies = project.timestep_fourier_encoder.freqs.flatten().repeat(2)
        project.encoder.trunk[0].weight *= 0.3 / frequencies.repeat(3)
    target.to(dtype)
    return target


def random_prompt(target: Alpamayo, *, seed: int = 0, length: int = 20, images: int = 1) -> Prompt:
    """A prompt of random text tokens with images in its middle, of the given number of tokens."""
    generator = torch.Generator().manual_seed(seed)
    special = target.special
    grid = torch.tensor([[1, 4, 4]] * images)
    image = [special.vision_start, *([special.image_pad] * 4), special.vision_end]
    words = torch.randint(0, 256, (length - len(image) * images,), generator=generator).tolist()
    ids = torch.tensor(words[:3] + image * images + words[3:])
    position_ids, delta = mrope_positions(ids, grid, image_pad=special.image_pad, merge=2)
    pixels = torch.randn(16 * images, 1536, generator=generator)
    steps = torch.arange(-15.0, 1.0)
    xyz = torch.stack((steps * 0.5, torch.zeros(16), torch.zeros(16)), dim=-1)
    return Prompt(
        ids, pixels, grid, position_ids, delta, f"random{seed}@0", xyz, torch.eye(3).repeat(16, 1, 1)
    )


def random_draft(target: Alpamayo, **changes: Any) -> DFlashDraft:
    """A draft of one layer with random weights; unless others are given, its taps want five layers."""
    shape = {
        "hidden_size": target.hidden_size,
        "num_layers": 1,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 16,
        "intermediate_size": 64,
        "vocab_size": target.vocab_size,
        "block_size": 4,
        "context_len": 8,
        "target_layer_ids": (1, 4),
        "num_target_layers": target.num_layers,
        "mask_token_id": target.vocab_size,
    }
    config = DraftConfig(**(shape | changes))
    return DFlashDraft.random(config, 3).eval()


def odd_config(version: str = "r1", **changes: Any) -> dict[str, Any]:
    """The config.json of `odd_target`; `changes` go over its top level."""
    package, special = PACKAGES[version][0], BASE + TRAJ
    raw = alpamayo_config(
        BASE,
        TRAJ,
        version,
        vlm_name_or_path="vlm",
        traj_token_ids={
            "history": special + 15,
            "future": special + 16,
            "history_start": special + 5,
            "future_start": special + 12,
            "history_end": special + 7,
            "future_end": special + 14,
        },
        tokens_per_history_traj=POINTS * 3,
        tokens_per_future_traj=WAYPOINTS * 2,
        min_pixels=128,
        max_pixels=512,
        expert_cfg={
            "hidden_size": 24,
            "intermediate_size": 40,
            "num_attention_heads": 6,
            "head_dim": 16,
            "dtype": "float32",
        },
        action_in_proj_cfg={
            "_target_": f"{package}.models.action_in_proj.PerWaypointActionInProjV2",
            "hidden_size": 20,
            "max_freq": 30.0,
            "num_enc_layers": 3,
            "num_fourier_feats": 8,
        },
        action_out_proj_cfg={"_target_": "torch.nn.Linear"},
        action_space_cfg={
            "_target_": f"{package}.action_space.UnicycleAccelCurvatureActionSpace",
            "dt": 0.25,
            "n_waypoints": WAYPOINTS,
        },
        diffusion_cfg={
            "_target_": f"{package}.diffusion.flow_matching.FlowMatching",
            "int_method": "euler",
            "num_inference_steps": STEPS,
            "x_dims": "???",
        },
        hist_traj_tokenizer_cfg={
            "_target_": f"{package}.models.delta_tokenizer.DeltaTrajectoryTokenizer",
            "num_bins": BINS,
        },
        traj_tokenizer_cfg={
            "_target_": f"{package}.action_space.discrete_action_space.DiscreteTrajectoryTokenizer",
            "num_bins": FUTURE_BINS,
        },
        a_key_that_nobody_knows={"x": 1},
    )
    return raw | changes


def odd_target(folder: Path, version: str = "r1", seed: int = 0, *, layers: int = 3) -> Alpamayo:
    """A random target of `ODD` sizes whose Qwen3-VL files lie in folder/vlm."""
    write_vlm(folder / "vlm", replace(ODD, text={**ODD.text, "num_hidden_layers": layers}))
    torch.manual_seed(seed)
    return Alpamayo.from_config(AlpamayoConfig.from_dict(odd_config(version)), folder / "vlm")


def odd_window(cameras: tuple[int, ...] = (0, 1, 6), frames: int = 2, seed: int = 0) -> Window:
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
