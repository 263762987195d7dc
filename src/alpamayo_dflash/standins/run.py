"""The stage: train the tiny Alpamayo on the world, and measure what it sees."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from alpamayo_dflash.common.artefacts import atomic_folder, provenance, write_json
from alpamayo_dflash.common.options import generator_seed
from alpamayo_dflash.standins.config import MeasureTinyConfig, TinyTrainConfig
from alpamayo_dflash.standins.scenes import SceneStream, loader
from alpamayo_dflash.standins.tiny import write_blueprint
from alpamayo_dflash.standins.training import BatchForward, train_steps
from alpamayo_dflash.standins.validate import held_out, look
from alpamayo_dflash.target.alpamayo import Alpamayo, open_target
from alpamayo_dflash.target.config import AlpamayoConfig
from alpamayo_dflash.world.language import vocabulary_texts

_TOKENIZER_TEXTS = 20_000
_LOG_EVERY = 50


def run(config: TinyTrainConfig) -> dict[str, Any]:
    """Train; the folder `config.out` appears whole at the end, with `training.json` as its log.

    Raises:
        ValueError: `init_from` is not a checkpoint of the tiny shape.
    """
    started = time.time()
    console = Console(file=sys.stderr)
    torch.manual_seed(generator_seed(config.seed))
    with atomic_folder(config.out) as folder:
        target = _start(config, folder)
        log = _train(target, _random(folder), config, console)
        target.save_pretrained(folder, dtype=torch.bfloat16)
        summary = {
            "parameters": sum(p.numel() for p in target.parameters()),
            "checkpoint_bytes": (folder / "model.safetensors").stat().st_size,
            "log": log,
            "provenance": provenance(config, started),
        }
        write_json(folder / "training.json", summary)
    return {
        "out": str(config.out),
        "steps": log[-1]["step"] if log else 0,
        "parameters": summary["parameters"],
        "checkpoint_bytes": summary["checkpoint_bytes"],
    }


def measure(config: MeasureTinyConfig) -> dict[str, Any]:
    """Measure whether a checkpoint sees, on held-out scenes, and write the figures.

    Raises:
        ValueError: the checkpoint is missing or does not load.
    """
    started = time.time()
    target, identity = open_target(
        config.checkpoint, dtype=torch.float32, device=config.device, format_=config.target_format
    )
    seen = look(target, held_out(config.scenes, config.seed))
    parents = {"target": identity.hash}
    made = provenance(config, started, parents)
    formats = target.weight_formats
    write_json(config.out, {"held_out": seen, "target_weights": formats, "provenance": made})
    return {"held_out": seen, "out": str(config.out)}


def _start(config: TinyTrainConfig, folder: Path) -> Alpamayo:
    """The model to train, with its blueprint files in `folder`."""
    if config.init_from is None:
        write_blueprint(folder, vocabulary_texts(_TOKENIZER_TEXTS, config.seed))
        target = _random(folder)
    else:
        target = Alpamayo.from_pretrained(config.init_from, dtype=torch.float32)
        target.save_pretrained(folder)
    return target.to(device=config.device, dtype=torch.float32).train()


def _random(folder: Path) -> Alpamayo:
    """Random weights in the shape that a checkpoint folder's files tell."""
    return Alpamayo.from_config(AlpamayoConfig.from_file(folder / "config.json"), folder / "vlm")


def _train(
    target: Alpamayo, reader: Alpamayo, config: TinyTrainConfig, console: Console
) -> list[dict[str, float]]:
    """All steps; returns the log's rows. `reader` is a copy on the CPU for the workers that draw scenes."""
    torch.set_float32_matmul_precision("high")
    example = target.prompt(held_out(1, config.seed)[0][0])
    stream = SceneStream(reader, config.seed, config.batch_size)
    log: list[dict[str, float]] = []
    watched = held_out(config.validate_scenes, config.seed)
    batches = iter(loader(stream, config.workers))
    for row in train_steps(target, BatchForward(target, example), batches, config):
        step = int(row["step"])
        if step % _LOG_EVERY == 0:
            plain = {name: round(float(value), 5) for name, value in row.items()}
            console.print(" ".join(f"{name} {value:g}" for name, value in plain.items()), highlight=False)
            log.append(plain)
        if step % config.validate_every == 0 and step < config.steps:
            target.eval()
            seen = look(target, watched)
            target.train()
            console.print(f"step {step} held-out {seen}", highlight=False)
            log.append({"step": step} | seen)
    return log
