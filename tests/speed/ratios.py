"""`make speed`: what is fast over its plain form, on the tiny target on a CPU, beside the kept ratios.

python -m tests.speed.ratios [--write] [--results FILE] [--turns N]

A ratio that is worse than the kept one by more than the tolerance ends it with exit status 1. Every arm runs
once a turn, so that what else the machine does falls on all alike. Ratios of another processor differ: there
run it with `--write --results FILE` on the revision before, and with `--results FILE` on yours.
"""

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from alpamayo_dflash import DecodeConfig, Observer, SpeculativeDecoder
from alpamayo_dflash.bench.baselines import TransformersWindow
from alpamayo_dflash.bench.clocks import PartClock
from alpamayo_dflash.bench.config import BenchConfig
from alpamayo_dflash.bench.generation import Generator, Texts
from alpamayo_dflash.bench.prompt import before
from alpamayo_dflash.bench.replay import Replay
from alpamayo_dflash.bench.setup import Bench
from alpamayo_dflash.bench.vision import ready
from alpamayo_dflash.bench.window import Windows
from alpamayo_dflash.common.artefacts import provenance, read_json, write_record
from alpamayo_dflash.common.machine import Clock
from alpamayo_dflash.decode.verify import Prefilled
from alpamayo_dflash.decode.vision import VisionReader
from alpamayo_dflash.draft.model import DFlashDraft
from alpamayo_dflash.target.checkpoint import SHIPPED, VLMFiles, target_identity
from alpamayo_dflash.target.vision import encode_images
from tests.helpers.speed_ratios import RATIOS, TEXTS, most, speed_figures, worse

RESULTS = Path(__file__).parents[2] / "docs" / "results" / "speed_tiny_cpu.json"
WARM = 2
WINDOWS, CALLS = 2, 3
"""Of whole windows and of shorter arms so many a turn; the fastest counts."""
ROOM = 64  # tokens beyond a text, for the blocks after it
CPU = torch.device("cpu")


@dataclass(frozen=True)
class SpeedConfig:
    """What is measured.

    Attributes:
        turns: how often every arm runs; a multiple of the texts, each at least twice.
        seed: of the draft's weights, the window's frames and the first text.

    Raises:
        ValueError: turns is no such number.
    """

    turns: int = 2 * TEXTS
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the turns."""
        if self.turns < 2 * TEXTS or self.turns % TEXTS:
            raise ValueError(f"turns is {self.turns}; it must be a multiple of {TEXTS}, at least {2 * TEXTS}")


class ReplayedDraft(Observer):
    """A draft that runs, and whose word is then the replay's: for the host's rounds, with one sample.

    Args:
        draft: what runs.
        replay: knows the text.
        vocab: V.
    """

    def __init__(self, draft: DFlashDraft, replay: Replay, vocab: int) -> None:
        self._draft, self._replay, self._vocab, self._length = draft, replay, vocab, 1
        self.taps, self.context_len, self.block_size = draft.taps, draft.context_len, draft.block_size

    def bind(self, embedding: torch.Tensor, head: torch.Tensor, num_layers: int) -> None:
        """See BlockDraft."""
        self._draft.bind(embedding, head, num_layers)

    def propose(self, context: torch.Tensor, lengths: torch.Tensor, anchors: torch.Tensor) -> SimpleNamespace:
        """See BlockDraft."""
        self._draft.propose(context, lengths, anchors)
        state: Any = SimpleNamespace(samples=1, lengths=torch.tensor([self._length]))
        tokens, _ = self._replay(state)
        logits = torch.zeros(1, self.block_size - 1, self._vocab)
        return SimpleNamespace(logits=logits.scatter_(2, tokens[..., None], 1e4), token_ids=None)

    def on_prefill(self, prompt_tokens: int, first_tokens: tuple[int, ...]) -> None:
        """See Observer."""
        self._length = 1

    def on_round(self, trace: Any) -> None:
        """See Observer."""
        self._length += len(trace.samples[0].emitted)


class Pair:
    """One loop with and without replayed proposals, each after its own reading of the prompt.

    Args:
        bench: target and draft.
        loop: host or device.
    """

    def __init__(self, bench: Bench, loop: str) -> None:
        self._bench, self._observer = bench, Observer()
        capacity = -(-len(bench.prompt.input_ids) // 64) * 64
        config: Any = DecodeConfig(prompt_capacity=capacity, loop=loop)
        self._plain = SpeculativeDecoder(bench.target, None, config)
        if loop == "device":
            self._fast, self._replay = bench.replaying()
        else:
            self._replay = Replay(
                samples=1,
                length=bench.config.text_tokens + ROOM,
                block=bench.config.block_size,
                rate=bench.rate,
                vocab=bench.target.traj_ids.start,
                device=CPU,
            )
            self._observer = ReplayedDraft(bench.draft, self._replay, bench.target.vocab_size)
            self._fast = SpeculativeDecoder(bench.target, self._observer, config)
        self._read: tuple[Prefilled, Prefilled] = tuple(
            decoder.prefill(bench.prompt) for decoder in (self._plain, self._fast)
        )

    def plain(self, seed: int) -> tuple[float, list[list[int]], int]:
        """Milliseconds of a text one token a pass, the text, and its passes."""
        result = self._plain.generate(self._read[0], **self._options(seed))
        return result.timings.decode_ms, result.token_ids, result.rounds

    def fast(self, seed: int, known: list[list[int]]) -> float:
        """Milliseconds of the same text with replayed proposals.

        Raises:
            RuntimeError: it is another text.
        """
        self._replay.load(known, seed)
        result = self._fast.generate(self._read[1], observer=self._observer, **self._options(seed))
        if result.token_ids != known:
            raise RuntimeError(f"seed {seed}: {known} without proposals, {result.token_ids} with them")
        return result.timings.decode_ms

    def _options(self, seed: int) -> dict[str, Any]:
        return self._bench.options(1, seed, self._bench.config.text_tokens)


class Arms:
    """Everything that is timed, by name.

    Args:
        bench: target, draft and prompt.
    """

    def __init__(self, bench: Bench) -> None:
        self._bench, target = bench, bench.target
        self._host, self._device = Pair(bench, "host"), Pair(bench, "device")
        self._windows = Windows(bench)
        texts = Texts(bench.config.text_tokens, 1, bench.config.temperature)
        self._theirs = TransformersWindow(target, Generator(target, target.vlm, texts))
        self._passes = texts.passes
        self._verifier = bench.decoder(None).verifier
        self._prompt = ready(target, bench.prompt)
        self._seen = self._verifier.vision(self._prompt)
        self._before = before(self._verifier, bench.prompt, self._seen)
        self._reader = VisionReader(target)
        self._clock = Clock(CPU)

    def turn(self, seed: int) -> dict[str, float]:
        """Milliseconds of every arm, once, on the text of a seed."""
        found: dict[str, float] = {}
        for loop, pair in (("host", self._host), ("device", self._device)):
            plain = [pair.plain(seed) for _ in range(CALLS)]
            _, known, passes = plain[0]
            found[f"autoregressive_{loop}"] = min(ms for ms, *_ in plain)
            found[f"decode_{loop}"] = min(pair.fast(seed, known) for _ in range(CALLS))
        found["pass"] = found["autoregressive_host"] / passes
        windows = [self._whole(seed) for _ in range(WINDOWS)]
        found |= {name: min(each[name] for each in windows) for name in windows[0]}
        visual, prompt = self._bench.target.vlm.model.visual, self._prompt
        short: dict[str, Callable[[], object]] = {
            "vision": lambda: self._reader(prompt),
            "vision_before": lambda: encode_images(
                visual, prompt.pixel_values, prompt.image_grid_thw, group=None
            ),
            "prompt": lambda: self._verifier.read(self._bench.prompt, self._seen),
            "prompt_before": self._before,
        }
        # The first call after another arm finds the processor's caches cold.
        calls = [{name: self._ms(call) for name, call in short.items()} for _ in range(CALLS)]
        found |= {name: min(each[name] for each in calls) for name in short}
        return {name: round(ms, 4) for name, ms in found.items()}

    def _whole(self, seed: int) -> dict[str, float]:
        """A window by us and one by transformers with the plain expert, and a pass of the latter's text."""
        ours, parts = self._windows.timed(1, seed).wall_ms, PartClock(CPU)
        theirs = self._ms(lambda: self._theirs(self._windows.window, parts))
        token_ms = parts.parts_ms()["decode"] / self._passes
        return {"window": ours, "transformers_window": theirs, "transformers_pass": token_ms}

    def _ms(self, call: Callable[[], object]) -> float:
        start = self._clock.now_ms()
        call()
        return self._clock.now_ms() - start


@torch.no_grad()
def measure(config: SpeedConfig) -> dict[str, list[float]]:
    """Milliseconds by arm, one a turn."""
    made = BenchConfig(target="tiny", device="cpu", draft_layers="2", transformers=False, seed=config.seed)
    arms = Arms(Bench(made))
    seeds = [config.seed + turn % TEXTS for turn in range(config.turns)]
    for seed in seeds[:1] * WARM + seeds[:TEXTS]:  # windows ask the target for their texts once, untimed
        arms.turn(seed)
    turns = [arms.turn(seed) for seed in seeds]
    return {name: [turn[name] for turn in turns] for name in turns[0]}


def show(found: dict[str, Any], kept: dict[str, Any] | None) -> None:
    """A line a ratio: now with its spread, the kept one with its, and what it may be."""
    print(f"{'ratio':<36}{'now':>8}{'95 %':>18}{'kept':>10}{'95 %':>18}{'at most':>10}")
    for name in RATIOS:
        columns = f"{name:<36}{found['figures'][name]:>8.3f}{_range(found, name):>18}"
        if kept is not None and name in kept["figures"]:
            columns += f"{kept['figures'][name]:>10.3f}{_range(kept, name):>18}"
            columns += f"{most(name, kept['figures']):>10.3f}"
        print(columns)


def _range(found: dict[str, Any], name: str) -> str:
    low, high = found["spread"][name]
    return f"[{low:.3f}, {high:.3f}]"


def main() -> int:
    """Measure, print, and compare or write; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--write", action="store_true", help="keep these ratios in place of the others")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where ratios are kept")
    parser.add_argument("--turns", type=int, default=SpeedConfig.turns, help="how often every arm runs")
    given = parser.parse_args()
    config, started = SpeedConfig(given.turns), time.time()
    kept = read_json(given.results) if given.results.exists() else None
    if kept is None and not given.write:
        raise SystemExit(f"{given.results}: no such file; make it with --write on the revision before")
    torch.set_num_threads(1)
    raw = measure(config)
    found = speed_figures(raw)
    show(found, kept)
    if given.write:
        parents = {"target": target_identity(SHIPPED, VLMFiles(SHIPPED / "vlm")).hash}
        made = provenance(config, started, parents)
        write_record(given.results, found | {"raw": raw, "provenance": made})
        print(f"kept in {given.results}")
        return 0
    assert kept is not None
    failed = worse(found["figures"], kept["figures"])
    for name in failed:
        allowed = f"{RATIOS[name].tolerance:.0%}"
        print(f"{name}: worse than the kept ratio by more than {allowed}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
