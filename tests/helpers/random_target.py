"""A tiny target with random weights, and prompts for it: what the decoding tests run on.

Nothing here is trained. The head is scaled so that the next token is uncertain but not uniform. With `push`,
the tokens of a text's end get more probable, so that texts end by themselves.
"""

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

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


def vlm_folder(
    folder: Path, *, layers: int, hidden: int, heads: int, kv_heads: int, head_dim: int, mlp: int
) -> int:
    """Write a Qwen3-VL configuration and a tokenizer; return the tokenizer's size."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    tokenizer.add_special_tokens(QWEN_TOKENS)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    size = tokenizer.get_vocab_size()
    ids = {
        name: tokenizer.token_to_id(f"<|{name}|>")
        for name in ("image_pad", "video_pad", "vision_start", "vision_end")
    }
    section = head_dim // 8
    text = {
        "model_type": "qwen3_vl_text",
        "hidden_size": hidden,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "vocab_size": size,
        "rope_theta": 5000000,
        "rope_scaling": {
            "rope_type": "default",
            "mrope_interleaved": True,
            "mrope_section": [head_dim // 2 - 2 * section, section, section],
        },
        "initializer_range": 0.1,
    }
    vision = {
        "model_type": "qwen3_vl",
        "depth": 1,
        "hidden_size": 16,
        "num_heads": 2,
        "intermediate_size": 32,
        "out_hidden_size": hidden,
        "num_position_embeddings": 16,
        "deepstack_visual_indexes": [0],
    }
    config = {
        "model_type": "qwen3_vl",
        "image_token_id": ids["image_pad"],
        "video_token_id": ids["video_pad"],
        "vision_start_token_id": ids["vision_start"],
        "vision_end_token_id": ids["vision_end"],
        "tie_word_embeddings": False,
        "text_config": text,
        "vision_config": vision,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return size


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
    size = vlm_folder(
        folder, layers=layers, hidden=hidden, heads=heads, kv_heads=kv_heads, head_dim=head_dim, mlp=mlp
    )
    config = AlpamayoConfig.from_dict(
        {
            "model_type": "alpamayo_r1",
            "architectures": ["AlpamayoR1"],
            "dtype": "float32",
            "vlm_name_or_path": str(folder),
            "traj_vocab_size": traj_vocab,
            "traj_token_start_idx": size,
            "vocab_size": size + traj_vocab + NEW_SPECIALS,
            "traj_token_ids": {},
            "add_special_tokens": True,
            "expert_cfg": {
                "hidden_size": 24,
                "intermediate_size": 48,
                "num_attention_heads": 4,
                "head_dim": head_dim,
            },
            "action_in_proj_cfg": {"hidden_size": 16},
            "hist_traj_tokenizer_cfg": {"num_bins": 4},
            "traj_tokenizer_cfg": {"num_bins": 4, "dims_min": [-10, -10], "dims_max": [10, 10]},
            "action_space_cfg": {},
            "diffusion_cfg": {},
        }
    )
    torch.manual_seed(seed)
    with drawn_in_order():
        target = Alpamayo.from_config(config, folder)
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
