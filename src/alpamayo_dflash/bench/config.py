"""What a user sets about the benchmarks. Nothing here imports torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from alpamayo_dflash.common.options import (
    MOST_BLOCK,
    check_at_least,
    check_positive,
    check_range,
    check_whole,
    whole_numbers,
)
from alpamayo_dflash.decode.config import Sampling
from alpamayo_dflash.target.formats import TargetOptions

CHUNK_WINDOWS = 4
"""Clips of a chunk of those that the benchmark of distillation writes."""
_LEAST_SIZE = 32


@dataclass(frozen=True)
class BenchConfig(TargetOptions):
    """Measure the decoder's speed.

    Attributes:
        target: `random:r1-10b`, `random:medium`, `random:small` (random weights of that size), or
            folder or hub id of a checkpoint, or tiny.
        device: torch device.
        rows: rows of the verify passes that are timed, with commas between; the block's own and a round's are
            timed too.
        draft_layers: layers of the drafts that are timed; the first one's drafts decode.
        block_size: of the drafts.
        context_len: of the drafts.
        draft_vocab: tokens of the drafts' reduced head.
        coc_tokens: tokens of the text that decode figures are for.
        window_tokens: with `window`, tokens of a window's text instead.
        acceptance: acceptance length that the replay gives texts of that length.
        temperature: of sampling.
        repeats: of each timing.
        texts: how many texts of each kind are decoded, the first of them untimed.
        lossless_prompts: prompts on which speculative and autoregressive texts are compared.
        row_width: rows of both loops' passes where they must be equal; the block's by default.
        coc_counts: CSV of CoC lengths (columns tokens, steps); empty leaves the table of lengths out.
        transformers: time transformers too.
        window: time whole windows instead, from camera frames to a trajectory, and their parts.
        beside: time the target with what is asked for in FP8 beside the same target as its checkpoint holds
            it, in turns, instead: parts and whole windows, memory, and losslessness at one row width.
        quick: with `window`: our windows and the floors alone, at most 12 texts and 40 windows, and a table
            beside the cards that were measured before.
        train: time steps of a draft's training instead, at the size of a `random:` target: with AdamW, with
            Muon, and with a gru head taught by kl; at 64 blocks, and at the most that fit.
        most_blocks: with `train`: no more blocks than this are tried.
        windows: how many of equal rounds are timed for the spread of a window's time.
        seed: of weights, prompts and noise.
        out: the JSON file to write.

    Raises:
        ValueError: a value outside its range.
    """

    target: str = "random:r1-10b"
    device: str = "cuda"
    rows: str = "1,8,16,32,48,64,96,256"
    draft_layers: str = "2,5"
    block_size: int = 8
    context_len: int = 64
    draft_vocab: int = 4096
    coc_tokens: int = 17
    window_tokens: int = 14
    acceptance: float = 6.25
    temperature: float = 0.6
    repeats: int = 30
    texts: int = 48
    lossless_prompts: int = 20
    row_width: int | None = None
    coc_counts: str = ""
    transformers: bool = True
    window: bool = False
    beside: bool = False
    quick: bool = False
    train: bool = False
    most_blocks: int = 32768
    windows: int = 400
    seed: int = 0
    out: Path = Path("docs/results/engine.json")

    def __post_init__(self) -> None:
        """Check the ranges."""
        check_range(2, MOST_BLOCK, block_size=self.block_size)
        check_positive(context_len=self.context_len, draft_vocab=self.draft_vocab, row_width=self.row_width)
        check_at_least(2, coc_tokens=self.coc_tokens, window_tokens=self.window_tokens, repeats=self.repeats)
        check_at_least(3, texts=self.texts, windows=self.windows)
        check_at_least(1, acceptance=self.acceptance)
        check_at_least(0, lossless_prompts=self.lossless_prompts)
        check_whole(seed=self.seed)
        Sampling(self.temperature)
        if self.quick and not self.window:
            raise ValueError("quick goes with window; the decoder's own benchmark has no quick form")
        check_at_least(64, most_blocks=self.most_blocks)
        if self.target_format.fp8 and (self.transformers or self.train):
            raise ValueError(
                f"weights in fp8 ({', '.join(self.target_format.fp8)}) with transformers or train, which are "
                "timed on the checkpoint's own weights; give --no-transformers, and no train"
            )
        if sum((self.train, self.window, self.beside)) > 1:
            raise ValueError("train, window and beside are benchmarks of their own; ask for one of them")
        if self.beside and not self.target_format.fp8:
            raise ValueError("beside times a target in FP8; give --weights fp8, or the expert's or vision's")
        if self.train and not self.target.startswith("random:"):
            raise ValueError(
                f"target is {self.target!r}; train takes random:r1-10b, random:medium or random:small, whose "
                "sizes alone it needs"
            )
        _ = self.row_counts, self.layer_counts

    @property
    def text_tokens(self) -> int:
        """Tokens of the texts that are timed: the mean of real CoCs with its end, or a window's median."""
        return self.window_tokens if self.window or self.beside else self.coc_tokens

    @property
    def row_counts(self) -> list[int]:
        """Rows of the timed passes, ascending, the block's among them."""
        return sorted({*whole_numbers(self.rows, "rows"), self.block_size})

    @property
    def layer_counts(self) -> list[int]:
        """Layers of the timed drafts, in the order given."""
        return list(dict.fromkeys(whole_numbers(self.draft_layers, "draft_layers")))


@dataclass(frozen=True)
class BenchKernelsConfig:
    """Measure the project's kernels against the libraries', at R1's sizes, on a GPU.

    Attributes:
        device: torch device.
        rows: rows, with commas between.
        prompt: prompt tokens of the attention.
        repeats: of each timing.
        plans: time the action expert's kernels under many plans instead: `attention`, `products` or both,
            with a comma between.
        seed: of the random numbers.
        out: the JSON file to write.

    Raises:
        ValueError: a value outside its range.
    """

    device: str = "cuda"
    rows: str = "1,8,16,32,48,64,96,256"
    prompt: int = 3008
    repeats: int = 30
    plans: str = ""
    seed: int = 0
    out: Path = Path("docs/results/kernels.json")

    def __post_init__(self) -> None:
        """Check the ranges."""
        check_positive(prompt=self.prompt)
        check_whole(seed=self.seed)
        check_at_least(2, repeats=self.repeats)
        unknown = set(self.plan_kinds) - {"attention", "products"}
        if unknown:
            raise ValueError(f"plans is {self.plans!r}; it may hold attention and products")
        _ = self.row_counts

    @property
    def plan_kinds(self) -> list[str]:
        """Which kernels are timed under many plans."""
        return [kind for kind in self.plans.split(",") if kind]

    @property
    def row_counts(self) -> list[int]:
        """Rows, ascending."""
        return sorted(set(whole_numbers(self.rows, "rows")))


@dataclass(frozen=True)
class BenchDistillConfig:
    """Measure how fast distillation data are written: windows of clips that are read from the disk.

    Texts are random ones that all end at their limit. With a draft the proposals are replayed, at an
    acceptance length that is given.

    Attributes:
        clips_dir: hub cache with the clips; synthetic ones are written there unless they are there already.
        target: as of `bench`.
        device: torch device.
        windows: that are timed, a multiple of 4; 4 more come first, untimed.
        height: of the clips' pictures, pixels.
        width: likewise.
        tokens: of each text.
        samples_per_clip: texts a window; the first is greedy.
        acceptance: acceptance length of the replay.
        block_size: of the draft.
        draft_layers: of the draft.
        context_len: prompt positions whose states are kept, and that the draft sees.
        shard_size: responses a shard.
        num_workers: threads that read clips and stage their frames.
        before: source folder of an earlier revision, whose `distill` is timed on the same clips in a process
            of its own.
        seed: of weights, clips and noise.
        out: the JSON file to write.

    Raises:
        ValueError: a value outside its range.
    """

    clips_dir: Path
    target: str = "random:r1-10b"
    device: str = "cuda"
    windows: int = 48
    height: int = 1080
    width: int = 1920
    tokens: int = 14
    samples_per_clip: int = 3
    acceptance: float = 6.25
    block_size: int = 8
    draft_layers: int = 2
    context_len: int = 64
    shard_size: int = 24
    num_workers: int = 8
    before: Path | None = None
    seed: int = 0
    out: Path = Path("docs/results/distill.json")

    def __post_init__(self) -> None:
        """Check the ranges."""
        check_range(2, MOST_BLOCK, block_size=self.block_size)
        check_at_least(2, tokens=self.tokens, samples_per_clip=self.samples_per_clip)
        check_at_least(1, acceptance=self.acceptance)
        check_positive(
            windows=self.windows,
            draft_layers=self.draft_layers,
            context_len=self.context_len,
            shard_size=self.shard_size,
            num_workers=self.num_workers,
        )
        check_whole(seed=self.seed)
        if self.windows % CHUNK_WINDOWS:
            raise ValueError(f"windows is {self.windows}; it must be a multiple of {CHUNK_WINDOWS}")
        for name in ("height", "width"):
            size = getattr(self, name)
            if size < _LEAST_SIZE or size % 2:
                raise ValueError(f"{name} is {size}; a video's must be even, and {_LEAST_SIZE} or more")


@dataclass(frozen=True)
class MeasureTargetConfig(TargetOptions):
    """Measure a target's loading and memory, and run one window of noise images to a trajectory.

    Attributes:
        target: folder or hub id of the checkpoint, or tiny; it must be on this machine.
        device: torch device.
        dtype: of the weights; the checkpoint's own where it is left out (float32 on a CPU).
        max_tokens: limit of generated tokens.
        num_traj_samples: samples (CoC and trajectory) of the window.
        draft_layers: layers of an untrained draft that proposes; 0 for none.
        prompt_capacity: the longest prompt that the cache holds, tokens.
        seed: of the images and of sampling.
        cold: ask the system to forget the weight files first, so that they are read from the disk.
        out: the JSON file to write.
    """

    target: str
    device: str = "cuda"
    dtype: Literal["float32", "bfloat16"] | None = None
    max_tokens: int = 32
    num_traj_samples: int = 1
    draft_layers: int = 0
    prompt_capacity: int = 4096
    seed: int = 0
    cold: bool = False
    out: Path = Path("docs/results/target_h200.json")

    def __post_init__(self) -> None:
        """Check the ranges."""
        check_positive(
            max_tokens=self.max_tokens,
            num_traj_samples=self.num_traj_samples,
            prompt_capacity=self.prompt_capacity,
        )
        check_whole(seed=self.seed, draft_layers=self.draft_layers)
        check_at_least(0, draft_layers=self.draft_layers)
