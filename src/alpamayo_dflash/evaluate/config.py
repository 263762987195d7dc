"""The options of the evaluation and of the measurements beside it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tyro.conf import Positional

from alpamayo_dflash.clips.config import DEFAULT_T0_US, MOTION_GAP_MS, FrameRule
from alpamayo_dflash.common.options import check_at_least, check_fraction, check_positive, check_whole
from alpamayo_dflash.decode.config import DecodeConfig, Sampled, Sampling, SentenceEnd
from alpamayo_dflash.target.formats import TargetOptions

ARMS = ("transformers", "autoregressive", "dflash")
"""transformers' own `generate`; the project's autoregressive loop; the speculative loop with the draft."""

SAMPLED_TEMPERATURE = 0.6
"""Temperature of the sampled identity check where the timed runs are greedy."""


@dataclass(frozen=True)
class EvaluateConfig(Sampled, TargetOptions):
    """Run the arms on the same clips: times, speed-ups, acceptance, losslessness and trajectory error.

    Attributes:
        draft_model: folder of the draft.
        cache_dir: hub cache folder that holds the clips' dataset (or that `world` wrote).
        alpamayo_model: folder or hub id of the target, or tiny.
        clip_id: evaluate this one clip.
        clip_ids: file with clip ids, one a line (or JSON or Parquet).
        chunks: chunks to take clips from, such as 0-3,7; all where neither clips nor chunks are given.
        num_samples: number of clips to take; all where it is left out.
        t0_us: moment in the clip, microseconds.
        max_tokens: limit of generated tokens.
        temperature: of the timed runs; 0 is greedy.
        top_p: nucleus mass of the timed runs.
        num_traj_samples: samples (CoC and trajectory) of each clip.
        seed: of sampling and of the trajectory's noise.
        compare: run all three arms, check losslessness, print and store the comparison; else dflash alone.
        verbose: print each round's block with accepted, rejected and target tokens marked.
        detailed_timing: split decode into draft, verify, sampling, cache and other.
        trace: store beside evaluation.json what a page of each clip shows, in two more decodes a clip: rounds
            with what target and draft thought of each token, frames, trajectories, times.
        audit: after the run, decode this many random clips again autoregressively and fail if a text differs
            that must not.
        take_over: go on where the disk cannot tell whether another run has the folder.
        local_files_only: never ask the hub for the target's files.
        sentence_end: rules at sentence ends; hint and off are lossless, force is not.
        row_width: run both loops at this number of rows (bit-equal passes in bfloat16).
        prompt_capacity: the longest prompt that the loops' cache holds, tokens.
        warmup: untimed runs of every arm before the first clip.
        frames: what happens to a clip whose frames may not be those of its stamps: strict refuses it, warn
            reads them by their order and says so.
        motion_gap_ms: the longest gap in the ego motion that is bridged around a moment that is needed.
        output_dir: folder of evaluation.json, of the rows kept while it runs, and of the traces.
        device: torch device.
        dtype: of the target's weights; the checkpoint's own where it is left out.
    """

    draft_model: Path
    cache_dir: Path
    alpamayo_model: str = "nvidia/Alpamayo-R1-10B"
    clip_id: str | None = None
    clip_ids: Path | None = None
    chunks: str | None = None
    num_samples: int | None = None
    t0_us: int = DEFAULT_T0_US
    max_tokens: int = 128
    temperature: float = 0.6
    top_p: float = 0.98
    num_traj_samples: int = 1
    seed: int = 0
    compare: bool = True
    verbose: bool = False
    detailed_timing: bool = False
    trace: bool = False
    audit: int = 0
    local_files_only: bool = False
    take_over: bool = False
    sentence_end: SentenceEnd = "hint"
    row_width: int | None = None
    prompt_capacity: int = 4096
    warmup: int = 1
    frames: FrameRule = "strict"
    motion_gap_ms: int = MOTION_GAP_MS
    output_dir: Path = Path("runs/evaluation")
    device: str = "cpu"
    dtype: Literal["float32", "bfloat16"] | None = None

    def __post_init__(self) -> None:
        """Check the ranges and that the clips are named in one way only."""
        check_positive(
            max_tokens=self.max_tokens,
            num_traj_samples=self.num_traj_samples,
            num_samples=self.num_samples,
            motion_gap_ms=self.motion_gap_ms,
        )
        _ = self.sampling, self.decode
        check_whole(seed=self.seed, t0_us=self.t0_us, audit=self.audit)
        check_at_least(0, warmup=self.warmup, audit=self.audit)
        if self.audit and not self.decode.lossless:
            raise ValueError(
                f"audit is {self.audit} with sentence_end force, which does not write the target's own text; "
                "audit hint or off"
            )
        named = [name for name in ("clip_id", "clip_ids", "chunks") if getattr(self, name) is not None]
        if len(named) > 1:
            raise ValueError(f"{' and '.join(named)} are given; name the clips in one way only")

    @property
    def sampled(self) -> Sampling:
        """How the sampled identity check chooses tokens."""
        return Sampling(SAMPLED_TEMPERATURE, self.top_p) if self.sampling.greedy else self.sampling

    @property
    def decode(self) -> DecodeConfig:
        """How both loops run."""
        return DecodeConfig(self.sentence_end, self.row_width, self.prompt_capacity)


@dataclass(frozen=True)
class LosslessConfig(Sampled, TargetOptions):
    """Count the clips whose speculative output equals the autoregressive one, for trained and random drafts.

    Attributes:
        draft_models: folders of trained drafts, one for each block size; each gets a random twin.
        cache_dir: hub cache folder that holds the clips' dataset.
        alpamayo_model: folder or hub id of the target, or tiny.
        chunks: chunks to take clips from; all where it is left out.
        num_samples: number of clips.
        t0_us: moment in the clip, microseconds.
        max_tokens: limit of generated tokens.
        temperature: of the sampled runs.
        top_p: nucleus mass of the sampled runs.
        seed: of sampling and of the random drafts' weights.
        out: the JSON file to write.
        device: torch device.
    """

    draft_models: tuple[Path, ...]
    cache_dir: Path
    alpamayo_model: str
    chunks: str | None = None
    num_samples: int = 200
    t0_us: int = DEFAULT_T0_US
    max_tokens: int = 128
    temperature: float = SAMPLED_TEMPERATURE
    top_p: float = 0.98
    seed: int = 0
    out: Path = Path("docs/results/lossless_tiny.json")
    device: str = "cpu"

    def __post_init__(self) -> None:
        """Check the ranges."""
        check_positive(num_samples=self.num_samples, max_tokens=self.max_tokens)
        if not self.draft_models:
            raise ValueError("draft_models is empty; give at least one draft's folder")
        check_whole(seed=self.seed, t0_us=self.t0_us)
        if self.sampling.greedy:
            raise ValueError(f"temperature is {self.temperature}; the sampled check needs one above 0")


@dataclass(frozen=True)
class DistributionConfig(Sampled, TargetOptions):
    """Compare the frequencies of sampled tokens over many seeds with the target's own distribution.

    Attributes:
        draft_model: folder of the draft of the speculative runs.
        cache_dir: hub cache folder that holds the clip.
        alpamayo_model: folder or hub id of the target, or tiny.
        clip_id: the prompt's clip; where it is left out, the most uncertain of a few.
        t0_us: moment in the clip, microseconds.
        seeds: number of seeds.
        sample_counts: samples a seed of each series.
        tokens: leading tokens whose joint frequencies are compared.
        temperature: of sampling.
        top_p: nucleus mass.
        level: a series fails if its chi-square p-value lies below this level, divided by the number of tests.
        out: the JSON file to write.
        device: torch device.
    """

    draft_model: Path
    cache_dir: Path
    alpamayo_model: str
    clip_id: str | None = None
    t0_us: int = DEFAULT_T0_US
    seeds: int = 20_000
    sample_counts: tuple[int, ...] = (1, 6)
    tokens: int = 3
    temperature: float = SAMPLED_TEMPERATURE
    top_p: float = 0.98
    level: float = 0.01
    out: Path = Path("docs/results/distribution_tiny.json")
    device: str = "cpu"

    def __post_init__(self) -> None:
        """Check the ranges."""
        check_positive(seeds=self.seeds, tokens=self.tokens)
        if not self.sample_counts or min(self.sample_counts) < 1:
            raise ValueError(
                f"sample_counts is {self.sample_counts}; give at least one count, each at least 1"
            )
        check_fraction(level=self.level)
        check_whole(t0_us=self.t0_us)
        _ = self.sampling


@dataclass(frozen=True)
class CompareWeightsConfig(Sampled, TargetOptions):
    """Measure how far a format of the weights is from the checkpoint: texts, what they name, trajectories.

    The checkpoint's own weights at another row width stand beside it: what rounding alone does.

    Attributes:
        cache_dir: hub cache folder that holds the clips' dataset.
        alpamayo_model: folder or hub id of the target, or tiny.
        draft_models: folders of drafts whose acceptance is measured on both.
        chunks: chunks to take clips from; all where it is left out.
        num_samples: number of clips; all where it is left out.
        t0_us: moment in the clip, microseconds.
        max_tokens: limit of generated tokens.
        temperature: of the sampled runs.
        top_p: nucleus mass of the sampled runs.
        num_traj_samples: samples (CoC and trajectory) of each clip's sampled run.
        seed: of sampling and of the trajectory's noise.
        row_width: rows of the passes of both formats.
        other_row_width: rows of the passes of the checkpoint's second run.
        prompt_capacity: the longest prompt that the loops' cache holds, tokens.
        local_files_only: never ask the hub for the target's files.
        out: the JSON file to write.
        device: torch device.
        dtype: of what is not in FP8; if left out float32 on a CPU, the checkpoint's own elsewhere.
    """

    cache_dir: Path
    alpamayo_model: str = "tiny"
    draft_models: tuple[Path, ...] = ()
    chunks: str | None = None
    num_samples: int | None = None
    t0_us: int = DEFAULT_T0_US
    max_tokens: int = 128
    temperature: float = SAMPLED_TEMPERATURE
    top_p: float = 0.98
    num_traj_samples: int = 1
    seed: int = 0
    row_width: int = 8
    other_row_width: int = 16
    prompt_capacity: int = 4096
    local_files_only: bool = False
    out: Path = Path("runs/weights.json")
    device: str = "cpu"
    dtype: Literal["float32", "bfloat16"] | None = None

    def __post_init__(self) -> None:
        """Check the ranges, and that there is something to compare."""
        check_positive(
            num_samples=self.num_samples,
            max_tokens=self.max_tokens,
            num_traj_samples=self.num_traj_samples,
            row_width=self.row_width,
            other_row_width=self.other_row_width,
            prompt_capacity=self.prompt_capacity,
        )
        check_whole(seed=self.seed, t0_us=self.t0_us)
        _ = self.sampling
        if not self.target_format.fp8:
            raise ValueError(
                "nothing to compare: weights, expert_weights and vision_weights are all 'checkpoint'; give "
                "weights fp8"
            )
        if self.row_width == self.other_row_width:
            raise ValueError(f"row_width and other_row_width are both {self.row_width}; give two widths")


@dataclass(frozen=True)
class VerifyConfig:
    """Read every record below folders and hold it to its checksum; fails if one is not what was written.

    Attributes:
        folders: whatever the stages wrote, or a cache of the dataset; files are taken too.
        workers: files read at a time.
    """

    folders: Positional[tuple[Path, ...]]
    workers: int = 4

    def __post_init__(self) -> None:
        """Check the count."""
        check_positive(workers=self.workers)
        if not self.folders:
            raise ValueError("no folder to verify; name one")


@dataclass(frozen=True)
class MeasureWorldConfig(Sampled, TargetOptions):
    """Measure how hard the world is, on the target's own sampled CoCs; fails outside the bounds.

    Attributes:
        alpamayo_model: folder or hub id of the target, or tiny.
        cache_dir: hub cache folder of a written world; scenes are drawn in memory where it is left out.
        chunks: chunks of the written world; all where it is left out.
        num_samples: number of clips.
        world_seed: seed of the world, where its scenes are drawn in memory.
        temperature: of the rollouts.
        top_p: nucleus mass of the rollouts.
        seed: of sampling.
        max_tokens: limit of generated tokens.
        out: the JSON file to write.
        device: torch device.
    """

    alpamayo_model: str = "tiny"
    cache_dir: Path | None = None
    chunks: str | None = None
    num_samples: int = 1200
    world_seed: int = 1
    temperature: float = SAMPLED_TEMPERATURE
    top_p: float = 0.98
    seed: int = 0
    max_tokens: int = 128
    out: Path = Path("docs/results/world_tiny.json")
    device: str = "cpu"

    def __post_init__(self) -> None:
        """Check the ranges."""
        check_positive(num_samples=self.num_samples, max_tokens=self.max_tokens)
        _ = self.sampling
        check_whole(seed=self.seed, world_seed=self.world_seed)
        if self.chunks is not None and self.cache_dir is None:
            raise ValueError("chunks is given without cache_dir; chunks belong to a written world")
