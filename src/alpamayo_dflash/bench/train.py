"""`bench --train`: steps of a draft's training at a target's size, beside the card's peak.

Weights, states and tokens are random; sizes and counts are real: responses of 14 to 20 tokens, an anchor at
each position, the last prompt states before them. Batches come through the trainer's own feed from host
memory, and steps are the trainer's own.
"""

from __future__ import annotations

import functools
import gc
import itertools
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from alpamayo_dflash.bench.config import BenchConfig
from alpamayo_dflash.bench.figures import spread, timing_quartiles, train_figures
from alpamayo_dflash.bench.setup import gpu, published_taps, untrained_draft
from alpamayo_dflash.common.artefacts import provenance, write_json
from alpamayo_dflash.common.machine import GpuMemory, Moment, Stopwatch, between_ms, check_device, current
from alpamayo_dflash.common.options import generator_seed
from alpamayo_dflash.common.processes import Processes
from alpamayo_dflash.distill.shards import DistillSample
from alpamayo_dflash.draft.config import DraftConfig
from alpamayo_dflash.draft.heads import PreviousKind
from alpamayo_dflash.draft.model import DFlashDraft
from alpamayo_dflash.standins.blueprint import SHAPES, TargetShape
from alpamayo_dflash.train.config import TrainConfig
from alpamayo_dflash.train.data import BlockBatch, BlockData, Blocks
from alpamayo_dflash.train.feed import batches_on
from alpamayo_dflash.train.trainer import Trainer

SMALL_BLOCKS = 64
"""Blocks of the small step, and where the search for the large one begins."""
_SHORTEST, _LONGEST = 14, 20
_STORED = 128
_POOL = 8
_THREADS = 4
_WARM = 3
_TRIED = 2


_T = TypeVar("_T")


@dataclass(frozen=True)
class Case:
    """What is trained, and how.

    Attributes:
        name: in the figures' keys.
        layers: of the draft.
        optimizer: adamw or muon.
        loss_type: of `TrainConfig`.
        previous_head: the draft's head on previous picks.
    """

    name: str
    layers: int
    optimizer: Any = "adamw"
    loss_type: str = "ce"
    previous_head: PreviousKind | None = None


def cases(layer_counts: list[int]) -> list[Case]:
    """Of each draft AdamW, Muon, and a head on previous picks taught by the target's distribution."""
    found = []
    for layers in layer_counts:
        name = f"{layers}_layers"
        found += [
            Case(name, layers),
            Case(f"{name}_muon", layers, optimizer="muon"),
            Case(f"{name}_kl_gru", layers, loss_type="kl", previous_head="gru"),
        ]
    return found


class SyntheticSet:
    """Random responses as a distillation set has them; a few tensors stand for all.

    Args:
        shape: of the draft.
        responses: how many.
        seed: of everything random.

    Attributes:
        folder: a name for messages.
        manifest: what `BlockData` reads of one.
        samples: the responses.
    """

    def __init__(self, shape: DraftConfig, responses: int, seed: int) -> None:
        self.folder = Path("random")
        generator = torch.Generator().manual_seed(generator_seed(seed))
        lengths = torch.randint(_SHORTEST, _LONGEST + 1, (responses,), generator=generator).tolist()
        tokens = torch.randint(shape.vocab_size, (_LONGEST,), generator=generator).tolist()
        taps = len(shape.target_layer_ids)
        self.manifest = {
            "taps": list(shape.target_layer_ids),
            "context_len": shape.context_len,
            "bytes": 0,
        }
        self.samples = [
            DistillSample(f"{index}", 0, 0, 0, 0.0, 1.0, 0, tuple(tokens[:length]), "", "", "random", index)
            for index, length in enumerate(lengths)
        ]
        self._pool = [
            {
                "prompt_states": _normal((shape.context_len, taps, shape.hidden_size), generator),
                "states": _normal((_LONGEST, taps, shape.hidden_size), generator),
                "topk_logits": 4 * _normal((_LONGEST, _STORED), generator).float(),
                "topk_ids": torch.randint(shape.vocab_size, (_LONGEST, _STORED), generator=generator).int(),
            }
            for _ in range(_POOL)
        ]

    def tensors(self, sample: DistillSample) -> dict[str, Tensor]:
        """One response's tensors, cut to its length."""
        found = self._pool[sample.index % _POOL]
        return {
            name: tensor if name == "prompt_states" else tensor[: len(sample.token_ids)]
            for name, tensor in found.items()
        }


def _normal(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator).bfloat16()


class Setup:
    """A case's trainer and its data.

    Args:
        config: of the benchmark.
        case: what is trained.

    Attributes:
        counts: the sizes that the operations of a step are counted from.
    """

    def __init__(self, config: BenchConfig, case: Case) -> None:
        self._config, self._case, self._device = config, case, check_device(config.device)
        target = SHAPES[config.target.removeprefix("random:")]
        shape = draft_shape(config, case, target)
        draft = untrained_draft(shape, self._device)
        tables = torch.randn(2, shape.vocab_size, shape.hidden_size, device=self._device) * 0.02
        draft.bind(tables[0], tables[1], target.layers)
        synthetic = SyntheticSet(shape, -(-config.most_blocks // (_SHORTEST - 1)), config.seed)
        self.data = BlockData(
            synthetic,
            synthetic.samples,
            shape,
            teacher=case.loss_type != "ce",
            unlabelled=range(0),
            cache_bytes=2**62,
        )
        self._all = self.data.blocks(range(len(self.data)))
        self.trainer = Trainer(
            train_config(config, case),
            draft,
            train=self.data,
            held_out=self.data,
            masked_ids=range(0),
            processes=Processes(0, 1, str(self._device)),
            parents={},
            save_best=lambda _: None,
        )
        self.counts = _weights(draft)

    def batches(self, blocks: int, steps: int) -> Iterator[BlockBatch]:
        """The same blocks again and again, through the trainer's feed."""
        parts: Iterator[Blocks] = itertools.repeat(self._all[:blocks], steps)
        return batches_on(str(self._device), self.data, parts, _THREADS)

    def fits(self, blocks: int) -> bool:
        """Whether some steps of so many blocks fit the device."""

        def steps() -> bool:
            for batch in self.batches(blocks, _TRIED):
                self.trainer.step(batch)
            return True

        return bool(self._if_it_fits(steps))

    def largest(self) -> dict[str, Any]:
        """`timed` of the largest power of two of blocks that fits, up to `most_blocks`.

        Raises:
            ValueError: not even the small step fits.
        """
        blocks = SMALL_BLOCKS
        while 2 * blocks <= self._config.most_blocks and self.fits(2 * blocks):
            blocks *= 2
        while blocks >= SMALL_BLOCKS:  # many steps may need a little more than a few
            found = self._if_it_fits(functools.partial(self.timed, blocks))
            if found is not None:
                return found
            blocks //= 2
        raise ValueError(f"{self._case.name}: a step of {SMALL_BLOCKS} blocks does not fit {self._device}")

    def _if_it_fits(self, call: Callable[[], _T]) -> _T | None:
        """What a call gives; None where the device's memory does not reach, which is then free again."""
        try:
            return call()
        except torch.OutOfMemoryError:
            pass
        # After the exception is gone, and with it the frames that hold tensors.
        self.trainer.optimizer.zero_grad()
        gc.collect()
        torch.cuda.empty_cache()
        return None

    def timed(self, blocks: int) -> dict[str, Any]:
        """Counts, milliseconds and the most memory of steps of so many blocks.

        `step_ms` is from one step's end to the next's, batches made and copied meanwhile; `step_alone_ms`
        with a batch that is there already.
        """
        memory, watch = GpuMemory(self._device), Stopwatch(self._device)
        repeats = self._config.repeats + _WARM
        fed, alone = [watch.moment()], []
        for batch in self.batches(blocks, repeats):
            self.trainer.step(batch)
            fed.append(watch.moment())
        peak = memory.phase_peak()
        alone.append(watch.moment())
        for _ in range(repeats):
            self.trainer.step(batch)
            alone.append(watch.moment())
        rows, context = len(batch.label_rows), len(batch.states)
        return {
            "blocks": blocks,
            "block_rows": blocks * self.data.config.block_size,
            "context_rows": context,
            "label_rows": rows,
            "attention_operations": _attention_operations(self.data.config, blocks),
            "peak_bytes": peak,
            "step_ms": _between(fed),
            "step_alone_ms": _between(alone),
        }


def run(config: BenchConfig) -> dict[str, Any]:
    """Measure, and write the results.

    Raises:
        ValueError: the target has no size by that name, the device is not there, or a step does not fit.
    """
    started, device = time.time(), check_device(config.device)
    raw: dict[str, Any] = {"cases": {}}
    with current(device):
        for case in cases(config.layer_counts):
            raw["cases"][case.name] = measured(config, case)
    found = {
        "figures": train_figures(raw),
        "spread": spread(raw, train_figures),
        "training": rows_of(raw),
        "gpu": gpu(device),
    }
    rest = {"timings": timing_quartiles(raw), "raw": raw, "provenance": provenance(config, started)}
    write_json(config.out, found | rest)
    return found | {"out": str(config.out)}


def measured(config: BenchConfig, case: Case) -> dict[str, Any]:
    """A case's sizes and, by name, its small and its large step."""
    print(f"bench: training, {case.name}", file=sys.stderr)
    setup = Setup(config, case)
    most = setup.largest()
    steps = {"most": most, "small": most if most["blocks"] == SMALL_BLOCKS else setup.timed(SMALL_BLOCKS)}
    found = setup.counts | {"optimizer": case.optimizer, "loss_type": case.loss_type, "steps": steps}
    del setup
    gc.collect()
    if check_device(config.device).type == "cuda":
        torch.cuda.empty_cache()
    return found


def _between(moments: list[Moment]) -> list[float]:
    """Milliseconds from each moment to the next, without the first few."""
    return [round(between_ms(*pair), 4) for pair in itertools.pairwise(moments)][_WARM:]


def draft_shape(config: BenchConfig, case: Case, target: TargetShape) -> DraftConfig:
    """A draft of the target's width with its whole head, as `train` makes one."""
    return DraftConfig(
        hidden_size=target.hidden,
        num_layers=case.layers,
        num_heads=target.heads,
        num_kv_heads=target.kv_heads,
        head_dim=target.head_dim,
        intermediate_size=target.mlp,
        vocab_size=target.vocab_size,
        block_size=config.block_size,
        context_len=config.context_len,
        target_layer_ids=published_taps(target.layers),
        num_target_layers=target.layers,
        mask_token_id=target.vocab_size,
        previous_head=case.previous_head,
    )


def train_config(config: BenchConfig, case: Case) -> TrainConfig:
    """The trainer's options: bfloat16 products, as many steps as anyone may ask for."""
    return TrainConfig.flat(
        "",
        Path(),
        Path(),
        batch_size=SMALL_BLOCKS,
        num_epochs=10**6,
        optimizer=case.optimizer,
        loss_type=case.loss_type,
        previous_head=case.previous_head,
        device=config.device,
        dtype="bfloat16",
    )


def _weights(draft: DFlashDraft) -> dict[str, int]:
    """Numbers in the layers' matrices, in `fc`, in the head, and in all that is trained."""
    layers = [parameter for layer in draft.layers for parameter in layer.parameters() if parameter.ndim == 2]
    return {
        "layer_weights": sum(parameter.numel() for parameter in layers),
        "fc_weights": draft.fc.weight.numel(),
        "head_weights": draft.head.numel(),
        "parameters": sum(parameter.numel() for parameter in draft.parameters()),
    }


def _attention_operations(shape: DraftConfig, blocks: int) -> int:
    """Scores and sums of all layers, forward and backward: three times 4 · queries · keys · heads · size."""
    pairs = blocks * shape.block_size * (shape.context_len + shape.block_size)
    return 12 * pairs * shape.num_heads * shape.head_dim * shape.num_layers


def rows_of(raw: dict[str, Any]) -> list[dict[str, Any]]:
    """A line for each timed step, as the report's table has them."""
    keys = train_figures(raw)
    lines = []
    for name, case in raw["cases"].items():
        for size, step in case["steps"].items():
            suffix = name if size == "most" else f"{name}_{SMALL_BLOCKS}"
            figures = {
                key: keys[f"{key}_{suffix}"] for key in ("step_ms", "label_rows_per_s", "mfu", "peak_gib")
            }
            lines.append({"case": name, "blocks": step["blocks"], **figures})
    return lines
