"""A toy to train on: phrases that the prompt's states foretell, in the real formats on disk."""

import json

import torch
from safetensors.torch import load_file, save_file

from alpamayo_dflash.distill.writer import ClipResult, RankWriter, Response
from alpamayo_dflash.target.checkpoint import read_target, target_identity
from alpamayo_dflash.train.config import TrainConfig

V, C, LAYERS, TAPS, CONTEXT = 64, 32, 3, (0, 2), 6
TRAJ_START, TRAJ = 52, 8
PHRASES, CLIPS = 6, 40


def write_target(folder):
    """What training reads of a checkpoint in the official layout; the rest is left out."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    text = "vlm.model.language_model."
    shapes = {
        text + "embed_tokens.weight": (V, C),
        "vlm.lm_head.weight": (V, C),
        text + "norm.weight": (C,),
    }
    tensors = {
        name: torch.ones(shape) if len(shape) == 1 else torch.randn(shape, generator=generator)
        for name, shape in shapes.items()
    }
    save_file(tensors, folder / "model.safetensors")
    config = {
        "model_type": "alpamayo_r1",
        "vlm_name_or_path": "vlm",
        "vocab_size": V,
        "traj_token_start_idx": TRAJ_START,
        "traj_vocab_size": TRAJ,
        "expert_cfg": {"hidden_size": 16},
        "hist_traj_tokenizer_cfg": {"num_bins": 4},
    }
    (folder / "config.json").write_text(json.dumps(config))
    write_vlm(folder, LAYERS)
    return tensors[text + "embed_tokens.weight"]


def write_vlm(folder, layers):
    """The text model's shape, as training reads it."""
    shape = {
        "hidden_size": C,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "intermediate_size": 48,
    }
    (folder / "vlm").mkdir(exist_ok=True)
    path = folder / "vlm" / "config.json"
    path.write_text(json.dumps({"model_type": "qwen3_vl", "text_config": shape | {"rope_theta": 1e6}}))


def toy_response(embedding, clip, sample):
    """A phrase of the clip's own; every state holds its token and the phrase, as a target's states would."""
    phrase = clip % PHRASES
    words = torch.Generator().manual_seed(100 + phrase)
    tokens = torch.randperm(TRAJ_START, generator=words)[: 9 + phrase % 3]
    plan = torch.randn(len(TAPS), C, generator=words)
    noise = torch.Generator().manual_seed(clip * 10 + sample)
    prompt = plan + 0.1 * torch.randn(CONTEXT, len(TAPS), C, generator=noise)
    states = plan + 0.5 * embedding[tokens][:, None] + 0.1 * torch.randn(len(tokens), 2, C, generator=noise)
    logits = torch.tensor([6.0, 2.0, 1.0]).expand(len(tokens), 3).contiguous()
    others = torch.randint(0, V, (len(tokens), 2), generator=noise)
    return Response(
        token_ids=tuple(tokens.tolist()),
        text="",
        stop="traj_future_start",
        temperature=0.6 if sample else 0.0,
        top_p=0.98,
        seed=sample,
        tensors={
            "prompt_states": prompt,
            "states": states,
            "topk_logits": logits,
            "topk_ids": torch.cat((tokens[:, None], others), dim=1).int(),
        },
    )


def identity_of(folder):
    target = read_target(folder)
    return target_identity(target.folder, target.vlm_files)


def make_toy(folder):
    """Target and distillation data; returns the folder."""
    embedding = write_target(folder / "target")
    settings = {
        "identity": 2,
        "target": identity_of(folder / "target").hash,
        "world_size": 1,
        "taps": list(TAPS),
        "context_len": CONTEXT,
        "top_k": 3,
        "full_vocab": False,
        "hidden_size": C,
        "vocab_size": V,
        "num_target_layers": LAYERS,
        "dtype": "float32",
        "t0_us": 0,
    }
    clips = [f"clip-{number}" for number in range(CLIPS)]
    writer = RankWriter(folder / "data", 0, settings, clips, clips_per_shard=16, provenance={})
    writer.begin()
    while not writer.complete:
        writer.write(
            [
                ClipResult(
                    clip,
                    number // 10,
                    tuple(toy_response(embedding, number, sample) for sample in range(2)),
                )
                for clip in writer.remaining[0]
                for number in [int(clip.split("-")[1])]
            ]
        )
    return folder


def options(made, out, **changes):
    """Plain DFlash with cross-entropy, unless `changes` say otherwise."""
    values = {
        "loss_type": "ce",
        "previous_head": None if "init_from" in changes else "none",
        "num_epochs": 2,
        "batch_size": 96,
        "learning_rate": 3e-3,
        "num_draft_layers": 1,
        "held_out_chunks": "3",
        "log_interval": 1,
        **changes,
    }
    return TrainConfig.flat(str(made / "target"), made / "data", out, **values)


def weights(folder):
    return load_file(folder / "model.safetensors")
