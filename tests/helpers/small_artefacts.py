"""Small sound artefacts of every stage, made by the stages' own writers in a fraction of a second."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import torch

from alpamayo_dflash import DFlashDraft
from alpamayo_dflash.common.artefacts import provenance, write_json
from alpamayo_dflash.distill.writer import ClipResult, RankWriter, Response
from alpamayo_dflash.draft.config import DraftConfig
from alpamayo_dflash.evaluate.metrics import evaluation_summary
from alpamayo_dflash.layers.config import LayersConfig
from alpamayo_dflash.layers.score import Scores
from alpamayo_dflash.report.tables import WORLD_FIGURES
from alpamayo_dflash.train.checkpoint import save_training
from alpamayo_dflash.train.config import TrainConfig
from alpamayo_dflash.train.optimizer import make_optimizer

LAYERS, HIDDEN, TAPS, CONTEXT, TOP_K, VOCABULARY = 4, 16, (0, 2), 5, 3, 40
CLIPS = tuple(f"clip-{number}" for number in range(4))
MADE = {"config": {}, "parents": {"target": "a" * 64}, "device": "cpu", "versions": {"torch": "2.13.0"}}
MADE |= {"identity": 2, "revision": "abc", "created": "2026-01-01", "command": "x", "wall_s": 1.0, "seed": 0}


def draft_config() -> DraftConfig:
    """A draft of one layer."""
    return DraftConfig(
        hidden_size=HIDDEN,
        num_layers=1,
        num_heads=2,
        num_kv_heads=1,
        head_dim=8,
        intermediate_size=8,
        vocab_size=VOCABULARY,
        block_size=4,
        context_len=4,
        target_layer_ids=TAPS,
        num_target_layers=LAYERS,
        mask_token_id=VOCABULARY,
    )


def write_draft(folder: Path) -> DFlashDraft:
    """A draft's folder."""
    draft = DFlashDraft.random(draft_config())
    draft.save_pretrained(folder)
    return draft


def write_distill(folder: Path, *, world_size: int = 1, most_shards: int | None = None) -> dict:
    """A distillation set of four clips, one of which failed; returns its settings.

    With `most_shards` each rank is interrupted after so many.
    """
    settings = {
        "identity": 2,
        "target": "a" * 64,
        "clips": "def",
        "world_size": world_size,
        "taps": list(TAPS),
        "context_len": CONTEXT,
        "top_k": TOP_K,
        "full_vocab": False,
        "hidden_size": HIDDEN,
        "vocab_size": VOCABULARY,
        "num_target_layers": LAYERS,
        "dtype": "float32",
        "seed": 0,
        "t0_us": 5_100_000,
    }
    for rank in range(world_size):
        part = RankWriter(
            folder, rank, settings, CLIPS, clips_per_shard=2, provenance=dict(MADE), again=lambda _: False
        )
        part.begin()
        for clips in part.remaining[:most_shards]:
            part.write([_responses(clip_id) for clip_id in clips])
    return settings


def _responses(clip_id: str) -> ClipResult:
    number = int(clip_id[-1])
    if number == 3:
        return ClipResult(clip_id, 0, failure="broken video", files={"camera.zip": [1, 2], "lost.zip": None})
    generator = torch.Generator().manual_seed(number)
    length = 3 + number
    tensors = {
        "prompt_states": torch.randn(CONTEXT, len(TAPS), HIDDEN, generator=generator),
        "states": torch.randn(length, len(TAPS), HIDDEN, generator=generator),
        "topk_logits": torch.randn(length, TOP_K, generator=generator),
        "topk_ids": torch.randint(VOCABULARY, (length, TOP_K), generator=generator, dtype=torch.int32),
    }
    response = Response(tuple(range(length)), f"text {number}", "traj_future_start", 0.0, 0.98, 0, tensors)
    return ClipResult(clip_id, 0, (response,))


def write_scores(folder: Path, *, world_size: int = 2) -> LayersConfig:
    """The ranks' scores of `layers`, and the config that pools them."""
    for rank in range(world_size):
        scores = Scores(4, torch.randn(LAYERS, HIDDEN).double(), dict.fromkeys(range(LAYERS), 1.5 + rank))
        content = {
            "settings": {"identity": 2, "target": "a" * 64, "world_size": world_size, "layers": [0, 1, 2, 3]},
            "scores": scores.to_plain(),
            "clips": {"attempted": 2, "done": 1, "failed": 1},
            "clip_ids": [f"clip-{rank}"],
            "failures": [{"clip_id": "x", "reason": "no frames", "kind": "file", "files": {"a.zip": [1, 2]}}],
            "provenance": MADE,
        }
        write_json(folder / f"scores-rank{rank}of{world_size}.json", content)
    return LayersConfig(output_dir=folder, aggregate=True, num_target_layers=2, plot=False)


def write_checkpoint(folder: Path, config: TrainConfig) -> tuple[DFlashDraft, torch.optim.Optimizer]:
    """A trainer's checkpoint after a step."""
    draft = DFlashDraft.random(draft_config())
    optimizer = make_optimizer(draft, config, 1)
    for parameter in draft.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    entry = {"step": 1, "epoch": 0.5, "acceptance_length": 1.5}
    progress = {"step": 1, "best_length": 1.5, "best_step": 1, "evaluations": [entry], "losses": [entry]}
    state = {
        "config": provenance(config, 0.0)["config"],
        "world_size": 1,
        "identity": 2,
        "parents": {"distill": "b" * 64, "target": "a" * 64, "distill_target": "a" * 64},
        "progress": progress,
        "total_steps": 4,
    }
    save_training(folder, draft, optimizer, state)
    return draft, optimizer


_ROUND = {"position": 0, "anchor": 5, "proposed": [6, 7, 8], "parents": [-1, 0, 1]}
_ROUND |= {"sources": ["draft"] * 3, "taken": [0], "emitted": [6, 9], "origins": ["draft", "target"]}
_TIMES = {"preprocess_ms": 1.0, "vision_ms": None, "prompt_ms": 3.0, "prefill_ms": 50.0, "decode_ms": 100.0}
_TIMES |= {"action_ms": 5.0, "total_ms": 155.0, "tokens": 40}


def clip_row(number: int) -> dict:
    """A row of an evaluation."""
    return {
        "clip_id": f"clip-{number}",
        "prompt_tokens": 10,
        "coc": ["Keep <distance> & go."],
        "arms": {arm: dict(_TIMES) for arm in ("transformers", "autoregressive", "dflash")},
        "acceptance": {
            "tokens_after_first": 2,
            "passes": 1,
            "drafted": 3,
            "accepted": 1,
            "draft_failures": 0,
        },
        "identity": {
            "greedy": True,
            "sampled": True,
            "autoregressive_equals_transformers": True,
            "near_ties": 0,
            "not_near_ties": 0,
        },
        "trajectory": {"min_ade_m": 0.5, "constant_velocity_ade_m": 1.5},
        "named": {"manoeuvre": True, "cause": False},
        "parts_ms": {"draft": 1.0, "verify": 2.0, "other": 0.5},
        "first_tokens": [5],
        "rounds": [[dict(_ROUND)]],
    }


def evaluation() -> dict:
    """An evaluation's JSON object, audited."""
    rows = [clip_row(number) for number in range(2)]
    failures = [{"clip_id": "x", "error": "no <frames>", "kind": "file"}]
    place = {"token": 6, "piece": "a", "logit": 1.0, "wide_logit": 1.0, "score": None, "wide_score": None}
    difference = {"clip_id": "clip-0", "sample": 0, "kind": "token", "message": "it differs", "position": 1}
    difference |= {"stored": place, "own": place | {"token": None, "piece": None}, "round_index": None}
    audit = {"clips": 2, "texts": 2, "equal": 1, "near_ties": 0, "differences": [difference], "failures": []}
    world = dict.fromkeys(WORLD_FIGURES, 0.5)
    bounds = {name: [0.1, 0.9] for name in WORLD_FIGURES}
    return json.loads(
        json.dumps(
            evaluation_summary(rows, failures, 3)
            | {"settings": {"temperature": 0.0}, "frames_noted": {"fewer stamps": 1}}
            | {"head": {"identity": 2, "options": {"seed": 0}, "parents": {}, "clips": []}}
            | {"provenance": MADE, "clip_rows": rows}
            | {"audit": audit | {"asked": 2, "passed": False, "provenance": MADE}}
            | {"training": {"evaluations": [{"step": 1, "acceptance_length": 1.5}], "best_step": 1}}
            | {"world": world, "world_here": world, "world_bounds": bounds}
        )
    )


PICTURE = b"no picture"


def clip_trace() -> dict:
    """What a page shows of a clip; its frame is `PICTURE`."""
    place = {"ids": [6, 7], "logits": [2.0, 1.0], "log_sum_exp": 2.4, "tempered_log_sum_exp": 3.5}
    place |= {"nucleus_mass": 0.99, "nucleus_logit": 1.0, "chosen": 6, "chosen_logit": 2.0, "chosen_rank": 0}

    def places(count: int) -> dict:
        return {name: [value] * count for name, value in place.items()}

    scores = {"target": places(4), "at": [0, 1], "draft": places(1)}
    frame = {"camera": "camera_front_wide_120fov", "index": 0, "file": "front-0.jpg"}
    frame |= {"sha256": hashlib.sha256(PICTURE).hexdigest()}
    return {
        "evaluation": "abc",
        "clip_id": "clip-0",
        "t0_us": 5_100_000,
        "temperature": 0.6,
        "top_p": 0.98,
        "block_size": 4,
        "equal": True,
        "coc": ["Keep <distance> & go."],
        "pieces": {str(token): f" <{token}>" for token in range(5, 10)},
        "first_tokens": [5],
        "first": places(1),
        "rounds": [[{"index": 0, **_ROUND, **scores}]],
        "bars": [{"name": "prefill", "start_ms": 0.0, "end_ms": 5.0}],
        "frames": [frame],
        "step_s": 0.1,
        "history_xy": [[-1.0, 0.0], [0.0, 0.0]],
        "future_xy": [[1.0, 0.5]],
        "predicted_xy": [[[1.0, 0.4]]],
    }
