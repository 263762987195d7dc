"""The config of data generation, and the disk space that it will take."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from alpamayo_dflash.clips.config import DEFAULT_T0_US, MOTION_GAP_MS, FrameRule
from alpamayo_dflash.common.options import check_positive, check_whole, parse_layers
from alpamayo_dflash.common.ranks import share_of
from alpamayo_dflash.decode.config import DecodeConfig, Sampled
from alpamayo_dflash.target.formats import TargetOptions

EXPECTED_TOKENS = 40
"""Tokens a response in the estimate of disk space: 99 in 100 real responses are shorter (R1: p99 36)."""

BadShardRule = Literal["fail", "skip"]

DEFAULT_HELD_OUT = 0.1
"""Share of clips that training holds out by default; the recorded counts are of the others."""

_ITEM_BYTES = {"float32": 4, "bfloat16": 2}


@dataclass(frozen=True)
class DistillConfig(Sampled, TargetOptions):
    """Let the target write on training clips; keep its token ids, tapped states and top-k logits.

    Attributes:
        model_path: folder or hub id of the Alpamayo checkpoint, or tiny.
        cache_dir: hub cache that holds the dataset.
        output_dir: where shards, tables and manifests go.
        chunks: chunks to take clips from, such as 0-3,7; all where neither it nor the next three are given.
        start_chunk: first chunk.
        end_chunk: one past the last chunk.
        num_chunks: number of chunks from `start_chunk` on, instead of `end_chunk`.
        rank: this process's number; taken from torchrun's RANK when absent.
        world_size: number of processes; taken from torchrun's WORLD_SIZE when absent.
        target_layers: layers to tap, such as 1,9,17; instead of the choice in `layers_file`.
        layers_file: `layers.json`, or the folder that holds it.
        context_len: prompt positions whose states are kept, counted from the prompt's end.
        top_k_logits: logits kept for each token; all where the vocabulary is smaller.
        full_vocab: labels keep trajectory tokens: top-k is taken over the unmasked logits.
        samples_per_clip: responses a clip; the first is greedy, the others are sampled.
        temperature: of the sampled responses.
        top_p: nucleus of the sampled responses.
        max_tokens: limit of new tokens a response.
        draft_path: folder of a draft that proposes; it changes the speed alone (in bfloat16 near-ties too,
            unless `row_width` is given).
        row_width: run every pass after the prompt's at this many rows, one response after another, so that in
            bfloat16 too the data are the same with and without a draft.
        shard_size: responses a shard; what an interruption can cost.
        seed: of the sampled responses.
        t0_us: the moment of each clip, microseconds on its clock.
        dtype: of the stored states; the target's own where it is left out. Logits are always float32.
        target_dtype: of the target's weights; if left out float32 on a CPU, the checkpoint's own elsewhere.
        frames: what happens to a clip whose frames may not be those of its stamps: strict refuses it, warn
            reads them by their order and says so.
        motion_gap_ms: the longest gap in the ego motion that is bridged around a moment that is needed.
        num_workers: threads that read clips and stage their frames ahead of the model; for each, two windows'
            frames (100 MB a window of the dataset's) are in memory.
        device: torch device; plain "cuda" means this process's own under torchrun.
        retry_failed: try every clip that failed before again; without it those of which a file has changed.
        take_over: go on where the disk cannot tell whether another run has the folder.
        local_files_only: never ask the hub for the checkpoint.
        keep_going: record a clip that fails and go on; else stop there (a later run continues).

    Raises:
        ValueError: a value is out of its range, or two options contradict each other; the message names them.
    """

    model_path: str
    cache_dir: Path
    output_dir: Path
    chunks: str | None = None
    start_chunk: int | None = None
    end_chunk: int | None = None
    num_chunks: int | None = None
    rank: int | None = None
    world_size: int | None = None
    target_layers: str | None = None
    layers_file: Path | None = None
    context_len: int = 16
    top_k_logits: int = 128
    full_vocab: bool = False
    samples_per_clip: int = 3
    temperature: float = 0.6
    top_p: float = 0.98
    max_tokens: int = 128
    draft_path: Path | None = None
    row_width: int | None = None
    shard_size: int = 256
    seed: int = 0
    t0_us: int = DEFAULT_T0_US
    dtype: Literal["float32", "bfloat16"] | None = None
    target_dtype: Literal["float32", "bfloat16"] | None = None
    frames: FrameRule = "strict"
    motion_gap_ms: int = MOTION_GAP_MS
    num_workers: int = 4
    device: str = "cpu"
    local_files_only: bool = False
    retry_failed: bool = False
    take_over: bool = False
    keep_going: bool = True

    def __post_init__(self) -> None:
        """Check every value that can be checked without the target and the clips."""
        check_positive(
            context_len=self.context_len,
            top_k_logits=self.top_k_logits,
            samples_per_clip=self.samples_per_clip,
            max_tokens=self.max_tokens,
            shard_size=self.shard_size,
            motion_gap_ms=self.motion_gap_ms,
            num_workers=self.num_workers,
        )
        _ = self.sampling, self.decode
        check_whole(seed=self.seed, t0_us=self.t0_us)
        if self.samples_per_clip > 1 and self.temperature == 0:
            raise ValueError("temperature is 0 with samples_per_clip above 1: all would equal the greedy one")
        parse_layers(self.target_layers)
        if (self.target_layers is None) == (self.layers_file is None):
            raise ValueError("name the layers to tap with one of target_layers and layers_file")
        share_of(self.rank, self.world_size, {})
        self.chunk_numbers([])

    @property
    def decode(self) -> DecodeConfig:
        """How the target is decoded; raises ValueError where a value lies outside its range."""
        return DecodeConfig(row_width=self.row_width)

    def chunk_numbers(self, existing: list[int]) -> list[int] | None:
        """The chunks of `start_chunk`, `end_chunk` and `num_chunks` among the existing ones.

        Args:
            existing: the chunks that the dataset has.

        Returns:
            ascending chunk numbers; None where none of the three is given.

        Raises:
            ValueError: the range is empty or given twice.
        """
        given = (self.start_chunk, self.end_chunk, self.num_chunks)
        if all(value is None for value in given):
            return None
        if self.chunks is not None:
            raise ValueError("give chunks, or start_chunk with end_chunk or num_chunks, not both")
        if self.end_chunk is not None and self.num_chunks is not None:
            raise ValueError("give end_chunk or num_chunks, not both")
        start = self.start_chunk or 0
        end = start + self.num_chunks if self.num_chunks is not None else self.end_chunk
        if start < 0 or (end is not None and end <= start):
            raise ValueError(f"chunks from {start} to before {end} are none")
        return [chunk for chunk in existing if chunk >= start and (end is None or chunk < end)]


def response_bytes(
    *, num_tokens: int, context_len: int, num_taps: int, hidden_size: int, top_k: int, dtype: str
) -> int:
    """Bytes that one response takes in a shard: tapped states, top-k logits and their ids."""
    states = (context_len + num_tokens) * num_taps * hidden_size * _ITEM_BYTES[dtype]
    return states + num_tokens * top_k * (4 + 4)
