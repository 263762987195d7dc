"""The main job on one CPU: world, layers, data, training and evaluation, one after another."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alpamayo_dflash.common.artefacts import provenance, read_json, write_record
from alpamayo_dflash.common.fields import value_of
from alpamayo_dflash.common.options import check_positive

if TYPE_CHECKING:
    from rich.console import Console

    from alpamayo_dflash.distill.config import DistillConfig
    from alpamayo_dflash.evaluate.config import EvaluateConfig
    from alpamayo_dflash.layers.config import LayersConfig
    from alpamayo_dflash.train.config import TrainConfig
    from alpamayo_dflash.world.config import WorldConfig

GREEDY = ("arms", "speedup", "acceptance_length", "acceptance_rate", "passes_per_coc", "acceptance_counts")
"""What the summary holds of the greedy evaluation."""


@dataclass(frozen=True)
class DemoConfig:
    """Run the whole chain on the synthetic world with the tiny target; run again, it goes on where it was.

    Attributes:
        out: folder of everything: world, layers, data, draft, evaluation, summary.json and the report.
        num_chunks: chunks of the world; the last ones are held out, and the one before them validates.
        held_out_chunks: chunks that only the evaluation sees.
        clips_per_chunk: clips of a chunk.
        num_samples: held-out clips to evaluate.
        temperature: of the evaluation; a greedy one is beside it.
        layers_clips: training clips whose rollouts choose the layers.
        num_target_layers: layers to tap.
        context_len: tapped prompt positions that the draft sees.
        samples_per_clip: responses a training clip; the first is greedy, the others sampled.
        block_size: of the draft.
        num_draft_layers: of the draft.
        num_epochs: of the draft's training.
        batch_size: blocks a step.
        learning_rate: peak of the draft's training.
        seed: of the world, of sampling and of the draft.
        workers: processes that write the world.
        threads: of torch. The tiny target's products are too small to gain from a second, and on a busy
            machine threads that wait for each other make every stage many times slower.
    """

    out: Path
    num_chunks: int = 10
    held_out_chunks: int = 1
    clips_per_chunk: int = 60
    num_samples: int = 60
    temperature: float = 0.6
    layers_clips: int = 16
    num_target_layers: int = 4
    context_len: int = 16
    samples_per_clip: int = 3
    block_size: int = 8
    num_draft_layers: int = 2
    num_epochs: int = 8
    batch_size: int = 128
    learning_rate: float = 2e-3
    seed: int = 0
    workers: int = 2
    threads: int = 1

    def __post_init__(self) -> None:
        """Check that there is something to train on and enough to evaluate."""
        check_positive(threads=self.threads, layers_clips=self.layers_clips)
        check_positive(clips_per_chunk=self.clips_per_chunk)
        if not 1 <= self.held_out_chunks <= self.num_chunks - 2:
            raise ValueError(
                f"held_out_chunks is {self.held_out_chunks}; it must be at least 1 and leave two of "
                f"num_chunks ({self.num_chunks}) to training and its validation"
            )
        there = self.held_out_chunks * self.clips_per_chunk
        if not 1 <= self.num_samples <= there:
            raise ValueError(f"num_samples is {self.num_samples}; the held-out chunks have {there} clips")
        stages(self)  # their configs check the rest

    @property
    def training(self) -> str:
        """The chunks that training sees; the last of them chooses the best checkpoint."""
        return f"0-{self.num_chunks - self.held_out_chunks - 1}"

    @property
    def held_out(self) -> str:
        """The chunks to evaluate on."""
        return f"{self.num_chunks - self.held_out_chunks}-{self.num_chunks - 1}"


@dataclass(frozen=True)
class Stages:
    """The configs of the demo's stages."""

    world: WorldConfig
    layers: LayersConfig
    distill: DistillConfig
    train: TrainConfig
    evaluate: EvaluateConfig
    greedy: EvaluateConfig


def stages(config: DemoConfig, target: str = "tiny") -> Stages:
    """Turn the demo's options into those of its stages."""
    from alpamayo_dflash.distill.config import DistillConfig
    from alpamayo_dflash.evaluate.config import EvaluateConfig
    from alpamayo_dflash.layers.config import LayersConfig
    from alpamayo_dflash.train.config import TrainConfig
    from alpamayo_dflash.world.config import WorldConfig

    world, data, train = config.out / "world", config.out / "data", config.out / "train"
    evaluate = EvaluateConfig(
        draft_model=train / "draft",
        alpamayo_model=target,
        cache_dir=world,
        chunks=config.held_out,
        num_samples=config.num_samples,
        temperature=config.temperature,
        seed=config.seed,
        detailed_timing=True,
        trace=True,
        local_files_only=True,
        output_dir=config.out / "evaluation",
    )
    return Stages(
        world=WorldConfig(
            out=world,
            num_chunks=config.num_chunks,
            clips_per_chunk=config.clips_per_chunk,
            seed=config.seed,
            workers=config.workers,
        ),
        layers=LayersConfig(
            model_path=target,
            cache_dir=world,
            output_dir=config.out / "layers",
            chunks=config.training,
            num_samples=config.layers_clips,
            num_target_layers=config.num_target_layers,
            seed=config.seed,
            plot=True,
            local_files_only=True,
        ),
        distill=DistillConfig(
            model_path=target,
            cache_dir=world,
            output_dir=data,
            chunks=config.training,
            layers_file=config.out / "layers",
            context_len=config.context_len,
            samples_per_clip=config.samples_per_clip,
            seed=config.seed,
            local_files_only=True,
        ),
        train=TrainConfig.flat(
            target_model=target,
            data_dir=data,
            output_dir=train,
            block_size=config.block_size,
            num_draft_layers=config.num_draft_layers,
            num_epochs=config.num_epochs,
            batch_size=config.batch_size,
            learning_rate=config.learning_rate,
            held_out_chunks=str(config.num_chunks - config.held_out_chunks - 1),
            seed=config.seed,
            local_files_only=True,
        ),
        evaluate=evaluate,
        greedy=replace(
            evaluate,
            temperature=0.0,
            detailed_timing=False,
            trace=False,
            output_dir=config.out / "evaluation-greedy",
        ),
    )


def run(config: DemoConfig) -> dict[str, Any]:
    """Run every stage, then write summary.json and the report.

    Returns:
        The summary without its rows: the evaluation's object, `greedy` (the same keys of the greedy one, see
        `GREEDY`), `world` (the world's figures, as shipped) and `world_here` (the same over this run's own
        training clips), and the seconds of each stage.

    Raises:
        ValueError: the shipped target or its figures are missing.
    """
    import torch
    from rich.console import Console

    from alpamayo_dflash.evaluate.run import RESULT
    from alpamayo_dflash.report.evaluation import read_evaluation
    from alpamayo_dflash.standins.config import world_figures_path

    started = time.time()
    torch.set_num_threads(config.threads)
    console = Console(file=sys.stderr)
    figures = read_json(world_figures_path())["figures"]
    plan = stages(config)
    path = config.out / "summary.json"
    seconds, nothing_to_do = _run_stages(plan, console)
    if nothing_to_do and path.exists():
        return _report(config, read_evaluation(path)) | {"nothing_to_do": True}
    summary = _summary(plan, figures) | {"seconds": seconds}
    where = plan.evaluate.output_dir / RESULT
    evaluated = value_of(read_json(where), "provenance", dict, where=str(where))
    parents = value_of(evaluated, "parents", dict[str, str], where=f"{where}: provenance")
    summary["provenance"] = provenance(config, started, parents, identity=evaluated.get("identity", 1))
    write_record(path, summary)
    return _report(config, summary)


def _run_stages(plan: Stages, console: Console) -> tuple[dict[str, float], bool]:
    """Run the stages in order; the seconds that each took, and whether no evaluation had anything to do."""
    from alpamayo_dflash.distill.run import run as distill
    from alpamayo_dflash.evaluate.run import run as evaluate
    from alpamayo_dflash.layers.run import run as layers
    from alpamayo_dflash.train.run import run as train
    from alpamayo_dflash.world.run import run as world

    steps: dict[str, Callable[[], dict[str, Any]]] = {
        "world": partial(world, plan.world),
        "layers": partial(layers, plan.layers),
        "distill": partial(distill, plan.distill),
        "train": partial(train, plan.train),
        "evaluate": partial(evaluate, plan.evaluate),
        "greedy": partial(evaluate, plan.greedy),
    }
    seconds: dict[str, float] = {}
    idle: dict[str, bool] = {}
    for number, (name, step) in enumerate(steps.items(), start=1):
        console.rule(f"{number}/{len(steps)} {name}")
        began = time.time()
        idle[name] = "nothing_to_do" in step()
        seconds[name] = round(time.time() - began, 1)
    return seconds, idle["evaluate"] and idle["greedy"]


def _summary(plan: Stages, figures: dict[str, float]) -> dict[str, Any]:
    """The evaluation with its rows, and the world's figures: shipped, and over the training clips."""
    from alpamayo_dflash.distill.data import DistillData
    from alpamayo_dflash.evaluate.hardness import BOUNDS, coc_tokens, figures_of
    from alpamayo_dflash.report.evaluation import read_evaluation
    from alpamayo_dflash.target.checkpoint import read_target

    evaluation: dict[str, Any] = read_evaluation(plan.evaluate.output_dir / "evaluation.json")
    cot_end = read_target(plan.evaluate.alpamayo_model).special().cot_end
    sampled: dict[str, list[tuple[str, int]]] = {}
    for sample in DistillData(plan.distill.output_dir).samples:
        if sample.temperature > 0:
            response = (sample.text, coc_tokens(sample.token_ids, cot_end))
            sampled.setdefault(sample.clip_id, []).append(response)
    path = plan.train.run.output_dir / "train.json"
    training = read_json(path)
    kinds = {"evaluations": list[dict[str, Any]], "best_step": int}
    greedy = read_evaluation(plan.greedy.output_dir / "evaluation.json")
    return evaluation | {
        "greedy": {key: greedy[key] for key in GREEDY},
        "training": {key: value_of(training, key, kind, where=str(path)) for key, kind in kinds.items()},
        "world": figures,
        "world_here": figures_of(list(sampled.values())),
        "world_here_clips": len(sampled),
        "world_bounds": BOUNDS,
    }


def _report(config: DemoConfig, summary: dict[str, Any]) -> dict[str, Any]:
    """Write the report and return what the command prints."""
    from alpamayo_dflash.report.page.runs import read_runs
    from alpamayo_dflash.report.run import write_report

    written = write_report(read_runs([config.out]), config.out / "report")
    hidden = ("clip_rows", "head", "provenance")
    plain = {name: value for name, value in summary.items() if name not in hidden}
    return plain | {"summary": str(config.out / "summary.json"), "report": written["report"]}
