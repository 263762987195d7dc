"""The options of draft training."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

from alpamayo_dflash.common.options import (
    MOST_BLOCK,
    check_above_zero,
    check_at_least,
    check_fraction,
    check_positive,
    check_range,
    check_whole,
    parse_layers,
)
from alpamayo_dflash.distill.config import DEFAULT_HELD_OUT, BadShardRule
from alpamayo_dflash.target.formats import TargetOptions
from alpamayo_dflash.train.terms import Term, parse_mix

OptimizerName = Literal["adamw", "muon"]


def _best_optimizer() -> OptimizerName:
    """Muon where the installed torch has it, from 2.9 on; else AdamW."""
    major, minor = importlib.metadata.version("torch").split(".")[:2]
    return "muon" if (int(major), int(minor)) >= (2, 9) else "adamw"


DEFAULT_OPTIMIZER = _best_optimizer()
DEFAULT_BLOCK_SIZE = 8
DEFAULT_NUM_LAYERS = 5
DEFAULT_PREVIOUS_HEAD = "bigram"

# Decay of the position weights by block size, as published with DFlash.
_GAMMA = {8: 4.0, 10: 5.0, 16: 7.0}


@dataclass(frozen=True)
class DataOptions:
    """What a draft is trained and validated on.

    Attributes:
        data_dir: folder that `distill` wrote.
        trajectory_labels: keep labels that are trajectory tokens; else they are masked.
        stride: use every stride-th response position as an anchor.
        held_out: share of the clips held out, chosen by a hash of the clip id.
        held_out_chunks: hold out the clips of these chunks instead, such as 8-9.
        train_clips: train on so many clips only, those whose ids have the lowest hashes; all if left out.
        num_workers: threads that make batches ahead: on a GPU, and where the data does not fit cache_gib; 0
            makes them in line.
        cache_gib: keep data in memory up to this size, GiB, for training and for held-out clips each.
        on_bad_shard: fail at a shard that is missing, corrupt or of another run; skip reads all shards before
            training, leaves out those with a fault and counts them in train.json.
        other_target: go on although the data was made with another target of the same shape.
    """

    data_dir: Path
    trajectory_labels: bool = False
    stride: int = 1
    held_out: float = DEFAULT_HELD_OUT
    held_out_chunks: str | None = None
    train_clips: int | None = None
    num_workers: int = 2
    cache_gib: float = 4.0
    on_bad_shard: BadShardRule = "fail"
    other_target: bool = False

    def __post_init__(self) -> None:
        """Check the ranges."""
        check_positive(stride=self.stride, train_clips=self.train_clips)
        check_at_least(0, num_workers=self.num_workers, cache_gib=self.cache_gib)
        if self.held_out_chunks is None:
            check_fraction(held_out=self.held_out)


@dataclass(frozen=True)
class RunOptions(TargetOptions):
    """Where a run's files lie, what it runs on, and how it is watched.

    Attributes:
        target_model: folder or hub id of the Alpamayo checkpoint, or tiny; embedding and head are read.
        output_dir: gets draft/ (the best draft), checkpoint/ (to resume from), logs/ and train.json.
        save_every: evaluate and save every so many steps, besides every epoch's end; 0: only there.
        log_interval: steps between log entries.
        real_acceptance: hub cache that holds the dataset: at every evaluation held-out clips are decoded with
            the draft, greedily and at temperature 0.6, and the best draft is chosen by the latter. The first
            process decodes; the target is loaded beside the training.
        real_acceptance_clips: how many held-out clips are decoded.
        real_acceptance_seeds: texts of each at temperature 0.6, with seeds 0, 1, ….
        seed: of new weights and of the order of blocks.
        device: torch device; under torchrun, cuda takes the local rank's.
        dtype: of the arithmetic; weights and optimizer are float32 in any case.
        resume: auto continues from output_dir's checkpoint if there is one; must requires one; never starts
            over.
        local_files_only: never ask the hub for the target's files.
        take_over: go on where the disk cannot tell whether another run has the folder.
    """

    target_model: str
    output_dir: Path
    save_every: int = 0
    log_interval: int = 20
    real_acceptance: Path | None = None
    real_acceptance_clips: int = 32
    real_acceptance_seeds: int = 1
    seed: int = 0
    device: str = "cpu"
    dtype: Literal["float32", "bfloat16"] = "float32"
    resume: Literal["auto", "must", "never"] = "auto"
    local_files_only: bool = False
    take_over: bool = False

    def __post_init__(self) -> None:
        """Check the ranges."""
        check_positive(log_interval=self.log_interval)
        check_positive(
            real_acceptance_clips=self.real_acceptance_clips,
            real_acceptance_seeds=self.real_acceptance_seeds,
        )
        check_at_least(0, save_every=self.save_every)
        check_whole(seed=self.seed)


@dataclass(frozen=True)
class DraftOptions:
    """The draft that is trained.

    Attributes:
        block_size: tokens of a block, the known one included; init_from's, or 8, where it is left out.
        num_draft_layers: layers of a new draft (5 where it is left out); init_from's otherwise.
        context_len: states before the anchor that the draft sees; init_from's or the data's if left out.
        target_layers: layers to tap among the data's, such as 1,9,17; init_from's, or all, if left out.
        draft_vocab_size: tokens of a reduced head, the commonest of the training responses and the end marks;
            0 for the whole head; init_from's, or the whole, if left out.
        previous_head: what the pick of one place adds to the logits of the next: bigram, mlp, gru, or none;
            init_from's, or bigram, where it is left out.
        previous_size: size of that head's code; init_from's, or 64, where it is left out.
        init_from: start from this draft (folder) in place of random weights.
        full_vocab: with init_from: resize the draft to the target's vocabulary.
        train_embeddings: train copies of the target's embedding and head, kept in the draft.
    """

    block_size: int | None = None
    num_draft_layers: int | None = None
    context_len: int | None = None
    target_layers: str | None = None
    draft_vocab_size: int | None = None
    previous_head: Literal["none", "bigram", "mlp", "gru"] | None = None
    previous_size: int | None = None
    init_from: Path | None = None
    full_vocab: bool = False
    train_embeddings: bool = False

    def __post_init__(self) -> None:
        """Check ranges, and that options which need each other are given together."""
        check_positive(
            num_draft_layers=self.num_draft_layers,
            context_len=self.context_len,
            previous_size=self.previous_size,
        )
        check_at_least(0, draft_vocab_size=self.draft_vocab_size)
        check_range(2, MOST_BLOCK, block_size=self.block_size)
        parse_layers(self.target_layers)
        if self.full_vocab and self.init_from is None:
            raise ValueError("full_vocab resizes an existing draft; give init_from too")
        if self.draft_vocab_size and self.train_embeddings:
            raise ValueError("draft_vocab_size takes rows of the target's head; train_embeddings has its own")


@dataclass(frozen=True)
class LossOptions:
    """What a draft is taught (`docs/training.md`).

    Attributes:
        loss_type: ce on the labels, kl, tv or lk to the target's stored top-k logits, or several with +
            between, such as ce+kl.
        labels: of ce: emitted, the tokens of the responses, or argmax, the target's best stored token there.
        ce_weight_start: weight of ce beside other losses at the first step; they share the rest equally.
        ce_weight_end: the same at the last step; linear between.
        kl_temperature: divides both sides' logits in kl.
        position_weights: decay: exp(-(i-1)/gamma) for the block's i-th mask; dpace: what the position does to
            the expected accepted prefix.
        prefix_weight_gamma: gamma of decay; 4, 5 or 7 for block size 8, 10, 16 where it is left out.
        dpace_alpha: smoothing of dpace.
    """

    loss_type: str = "kl"
    labels: Literal["emitted", "argmax"] = "emitted"
    ce_weight_start: float = 1.0
    ce_weight_end: float = 0.8
    kl_temperature: float = 1.0
    position_weights: Literal["decay", "dpace"] = "decay"
    prefix_weight_gamma: float | None = None
    dpace_alpha: float = 0.5

    def __post_init__(self) -> None:
        """Check the ranges, and the mix's names."""
        check_above_zero(kl_temperature=self.kl_temperature, prefix_weight_gamma=self.prefix_weight_gamma)
        check_range(
            0,
            1,
            ce_weight_start=self.ce_weight_start,
            ce_weight_end=self.ce_weight_end,
            dpace_alpha=self.dpace_alpha,
        )
        parse_mix(self.loss_type)

    @property
    def terms(self) -> tuple[Term, ...]:
        """The terms of the loss."""
        return parse_mix(self.loss_type)

    @property
    def needs_teacher(self) -> bool:
        """Whether training reads the target's stored logits."""
        return self.labels == "argmax" or any(term.needs_teacher for term in self.terms)


@dataclass(frozen=True)
class OptimizerOptions:
    """How weights move.

    Attributes:
        optimizer: adamw, or muon: Muon for the matrices of the network, with AdamW for all else. By default
            muon, with a torch before 2.9, which has none, adamw.
        learning_rate: peak rate as it is used; not multiplied by the number of processes unless scale_lr.
        scale_lr: multiply the learning rate by the number of processes.
        weight_decay: on matrices but embeddings, decoupled.
        embed_lr_scale: learning rate of those copies, as a part of learning_rate.
    """

    optimizer: OptimizerName = DEFAULT_OPTIMIZER
    learning_rate: float = 6e-4
    scale_lr: bool = False
    weight_decay: float = 0.01
    embed_lr_scale: float = 0.1

    def __post_init__(self) -> None:
        """Check the ranges."""
        check_above_zero(learning_rate=self.learning_rate, embed_lr_scale=self.embed_lr_scale)
        check_at_least(0, weight_decay=self.weight_decay)


@dataclass(frozen=True)
class ScheduleOptions:
    """How many steps there are, of how many blocks.

    Attributes:
        num_epochs: passes over all blocks.
        max_steps: end after this many steps; the schedules end there too.
        batch_size: blocks a step *per process*.
        warmup_steps: steps of linear warm-up; 10% of all where it is left out. A cosine to 0 follows.
    """

    num_epochs: int = 5
    max_steps: int | None = None
    batch_size: int = 64
    warmup_steps: int | None = None

    def __post_init__(self) -> None:
        """Check the ranges."""
        check_positive(num_epochs=self.num_epochs, batch_size=self.batch_size, max_steps=self.max_steps)
        check_at_least(0, warmup_steps=self.warmup_steps)


@dataclass(frozen=True)
class TrainConfig:
    """Train a draft on distillation data, from scratch or from an existing draft.

    Run it under torchrun to use several processes (DDP: NCCL on GPUs, gloo on CPUs). Run again, it continues
    from its last checkpoint, or reports that there is nothing to do.

    Attributes:
        data: what is read.
        run: files, device, checkpoints.
        draft: the network.
        loss: its terms and weights.
        optimizer: and its rates.
        schedule: steps and batches.
    """

    data: DataOptions
    run: RunOptions
    draft: DraftOptions = field(default_factory=DraftOptions)
    loss: LossOptions = field(default_factory=LossOptions)
    optimizer: OptimizerOptions = field(default_factory=OptimizerOptions)
    schedule: ScheduleOptions = field(default_factory=ScheduleOptions)

    # Options stand by component; the command's flags, and keywords here, are their names alone.

    @classmethod
    def flat(cls, target_model: str, data_dir: Path, output_dir: Path, **options: Any) -> TrainConfig:
        """A config from options by name alone, whichever component they are of.

        Raises:
            TypeError: there is no such option.
        """
        given = {"target_model": target_model, "data_dir": data_dir, "output_dir": output_dir, **options}
        return cls(**{name: kind(**_taken(given, kind)) for name, kind in _components(given).items()})

    def changed(self, **options: Any) -> TrainConfig:
        """The same with other values of some options, by name alone.

        Raises:
            TypeError: there is no such option.
        """
        parts = _components(options)
        return TrainConfig(
            **{name: replace(getattr(self, name), **_taken(options, kind)) for name, kind in parts.items()}
        )


_PARTS: dict[str, Any] = {
    "data": DataOptions,
    "run": RunOptions,
    "draft": DraftOptions,
    "loss": LossOptions,
    "optimizer": OptimizerOptions,
    "schedule": ScheduleOptions,
}
DEFAULTS = {
    option.name: option.default
    for kind in _PARTS.values()
    for option in fields(kind)
    if option.default is not MISSING
}
"""Of every option that may be left out, by name alone."""


def flattened(config: Mapping[str, Any]) -> dict[str, Any]:
    """Options by name alone, of a config as JSON holds it."""
    return {name: value for part in config.values() for name, value in part.items()}


def _taken(options: Mapping[str, Any], kind: Any) -> dict[str, Any]:
    """Those of a component."""
    names = {option.name for option in fields(kind)}
    return {name: value for name, value in options.items() if name in names}


def _components(options: Mapping[str, Any]) -> dict[str, Any]:
    """The components by name, once each option is of one of them."""
    known = {option.name for kind in _PARTS.values() for option in fields(kind)}
    if unknown := sorted(options.keys() - known):
        raise TypeError(f"training has no option {', '.join(unknown)}")
    return _PARTS


def decay_gamma(block_size: int, given: float | None) -> float:
    """The decay of the position weights: the given one, else the published one, else half the block."""
    if given is not None:
        return given
    return _GAMMA.get(block_size, block_size / 2)
