"""How fast distillation data are written: clips from the disk, texts of one length, with and without a draft.

Three arms on the same clips: an earlier revision's `distill`, token by token, in a process of its own; ours
token by token; and ours with a draft whose proposals are replayed. The wall time is that of the windows
alone, from the first clip that is read to the last shard that is written, all compiled and captured before.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from alpamayo_dflash.bench.config import CHUNK_WINDOWS, BenchConfig, BenchDistillConfig
from alpamayo_dflash.bench.figures import distill_figures
from alpamayo_dflash.bench.replay import Replay
from alpamayo_dflash.bench.setup import Bench, gpu
from alpamayo_dflash.clips.lists import parse_chunks
from alpamayo_dflash.clips.source import ClipSource
from alpamayo_dflash.clips.window import Window
from alpamayo_dflash.common.artefacts import provenance, write_json
from alpamayo_dflash.common.identity import Fingerprint
from alpamayo_dflash.common.machine import Clock, Stopwatch
from alpamayo_dflash.decode.config import Sampling
from alpamayo_dflash.decode.decoder import SpeculativeDecoder
from alpamayo_dflash.decode.rollouts import Rollout, Rollouts
from alpamayo_dflash.distill.config import DistillConfig
from alpamayo_dflash.distill.data import DistillData
from alpamayo_dflash.distill.run import data_settings, windows_of, write_windows
from alpamayo_dflash.distill.shards import DistillSample
from alpamayo_dflash.distill.writer import RankWriter
from alpamayo_dflash.evaluate.near_ties import Loop, parting
from alpamayo_dflash.world.config import WorldConfig
from alpamayo_dflash.world.run import run as write_world

_DRIVER = Path(__file__).with_name("distill_before.py")
_NOBODY = Fingerprint("0" * 64, lambda: "0" * 64)
_MORE_TOKENS = 64  # room of a replay after a text
Texts = Mapping[str, list[list[int]]]
"""By clip, the greedy one first."""


def run(config: BenchDistillConfig) -> dict[str, Any]:
    """Measure, and write the results.

    Raises:
        ValueError: the target, the device, the clips or the earlier revision are not there.
    """
    started = time.time()
    write_clips(config)
    arms: dict[str, Any] = {}
    if config.before is not None:
        arms["before"] = before(config, config.before)
    bench = Bench(bench_config(config))
    with tempfile.TemporaryDirectory() as folder:
        writing = Writing(bench, config, Path(folder))
        arms["autoregressive"], plain = writing.autoregressive()
        arms["replayed"], drafted = writing.replayed(plain)
        compared = writing.compare(plain, drafted)
    raw = {"windows": config.windows, "arms": arms, "texts": compared}
    found = {"figures": distill_figures(raw), "replayed": ["windows_per_s", "prompt_share_of_wall"]}
    rest = {"gpu": gpu(bench.device), "raw": raw, "provenance": provenance(config, started)}
    write_json(config.out, found | rest)
    return found | {"texts": compared, "out": str(config.out), "passed": not compared["not_near_ties"]}


def write_clips(config: BenchDistillConfig) -> None:
    """Write the clips, unless they are there.

    Raises:
        ValueError: the folder holds others.
    """
    chunks = config.windows // CHUNK_WINDOWS + 1
    workers = os.cpu_count() or 1
    world = WorldConfig(config.clips_dir, chunks, CHUNK_WINDOWS, seed=config.seed, workers=workers)
    write_world(world, size=(config.height, config.width))


def bench_config(config: BenchDistillConfig) -> BenchConfig:
    """The target, the draft and the replay's rate, as `bench` makes them."""
    return BenchConfig(
        target=config.target,
        device=config.device,
        draft_layers=str(config.draft_layers),
        block_size=config.block_size,
        context_len=config.context_len,
        coc_tokens=config.tokens,
        acceptance=config.acceptance,
        seed=config.seed,
    )


def before(config: BenchDistillConfig, source: Path) -> dict[str, Any]:
    """Time an earlier revision's `distill`.

    Args:
        config: see BenchDistillConfig.
        source: its source folder.

    Raises:
        ValueError: the folder holds no package, or it failed; the message has its last words.
    """
    source = source.resolve()
    if not (source / "alpamayo_dflash" / "__init__.py").is_file():
        raise ValueError(f"before is {source}, which holds no alpamayo_dflash; give a revision's src")
    given = {
        "bench": {"target": config.target, "device": config.device, "seed": config.seed},
        "distill": {
            "model_path": config.target,
            "device": config.device,
            **_kept(config),
        },
        "clips_dir": str(config.clips_dir.resolve()),
        "warm_chunks": "0",
        "timed_chunks": _timed_chunks(config),
    }
    # What else is on the path stays there; a revision that is named for this process is not that one's.
    paths = [str(source), *filter(None, [os.environ.get("PYTHONPATH")])]
    named = {name: value for name, value in os.environ.items() if name != "ALPAMAYO_DFLASH_REVISION"}
    done = subprocess.run(  # noqa: S603
        [sys.executable, "-P", str(_DRIVER), json.dumps(given)],
        env=named | {"PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise ValueError(f"before, {source}: ended with {done.returncode}:\n{done.stderr[-2000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    if Path(found["package"]).parent != source:
        raise ValueError(f"before is {source}, but {found['package']} was imported")
    del found["package"]
    return found


def _kept(config: BenchDistillConfig) -> dict[str, Any]:
    """What is sampled and kept, in all arms alike."""
    return {
        "context_len": config.context_len,
        "max_tokens": config.tokens,
        "samples_per_clip": config.samples_per_clip,
        "shard_size": config.shard_size,
        "seed": config.seed,
        "keep_going": False,
    }


def _timed_chunks(config: BenchDistillConfig) -> str:
    return f"1-{config.windows // CHUNK_WINDOWS}"


@dataclass(frozen=True)
class Arm:
    """What an arm took.

    Attributes:
        wall_s: of all windows, by the host's clock.
        vision_ms: of each window, on the device.
        prompt_ms: likewise.
        windows: how many.
        tokens: of all texts.
        emitted: of these those after each text's first.
        passes: verify passes that each text took part in.
    """

    wall_s: float
    vision_ms: list[float]
    prompt_ms: list[float]
    windows: int
    tokens: int
    emitted: int
    passes: int


class Writing:
    """Writes sets of the same clips.

    Args:
        bench: target, draft and the replay's rate.
        config: see BenchDistillConfig.
        folder: for the sets.
    """

    def __init__(self, bench: Bench, config: BenchDistillConfig, folder: Path) -> None:
        self._bench, self._config, self._folder = bench, config, folder
        self._source = ClipSource(config.clips_dir)
        self._clock, self._count = Clock(bench.device), 0

    def autoregressive(self) -> tuple[dict[str, Any], Texts]:
        """Token by token: the times, and the texts of all windows."""
        rollouts = Rollouts(self._bench.target, **self._options())
        _, warm = self._write(rollouts, "0")
        arm, texts = self._write(rollouts, _timed_chunks(self._config))
        return asdict(arm), {**warm, **texts}

    def replayed(self, known: Texts) -> tuple[dict[str, Any], Texts]:
        """With a draft and a replay: the times, and the texts.

        Args:
            known: texts of all windows, to begin with. What is written at a block's rows is asked first:
                after a near-tie a text of another width would be all wrong.
        """
        config, target = self._config, self._bench.target
        replay = Replay(
            samples=config.samples_per_clip,
            length=config.tokens + _MORE_TOKENS,
            block=config.block_size,
            rate=self._bench.rate,
            vocab=target.traj_ids.start or target.vocab_size,
            device=self._bench.device,
        )
        more: dict[str, Any] = {"draft": self._bench.draft, "proposers": [replay]}
        rollouts = ReplayedRollouts(target, **self._options(), **more)
        rollouts.replay, rollouts.known = replay, known
        for chunks in ("0", _timed_chunks(config)):
            rollouts.known = {**rollouts.known, **self._write(rollouts, chunks)[1]}
        arm, texts = self._write(rollouts, _timed_chunks(config))
        return asdict(arm), texts

    def compare(self, plain: Texts, drafted: Texts) -> dict[str, Any]:
        """How many texts with a draft are those without, and of the others how many part at a near-tie."""
        found = {"texts": 0, "equal": 0, "near_ties": 0, "not_near_ties": 0}
        for clip_id, texts in drafted.items():
            for index, pair in enumerate(zip(plain[clip_id], texts, strict=True)):
                found["texts"] += 1
                if pair[0] == pair[1]:
                    found["equal"] += 1
                else:
                    near = self._near_tie(clip_id, index, pair)
                    found["near_ties" if near else "not_near_ties"] += 1
        return found

    def _near_tie(self, clip_id: str, index: int, texts: tuple[list[int], list[int]]) -> bool:
        config, bench, window = self._config, self._bench, self._source.window(clip_id)
        loops = []
        for draft, text in zip((None, bench.draft), texts, strict=True):
            decoder = SpeculativeDecoder(bench.target, draft)
            step = 1 if draft is None else config.block_size
            read = decoder.prefill(window)
            rows = decoder.device_rounds.sample_rows * config.samples_per_clip
            loops.append(Loop(decoder, read, text, step, rows))
        # The first text is greedy, and the k-th after it has the noise of sample k.
        sampling = Sampling(0.0) if index == 0 else self._distill("0").sampling
        found = parting(*loops, sampling=sampling, seed=config.seed, sample=max(0, index - 1))
        return found.near_tie

    def _options(self) -> dict[str, Any]:
        config = self._config
        return {
            "taps": self._bench.draft.taps,
            "context_len": config.context_len,
            "max_tokens": config.tokens,
        }

    def _distill(self, chunks: str) -> DistillConfig:
        config = self._config
        self._count += 1
        return DistillConfig(
            model_path=config.target,
            cache_dir=config.clips_dir,
            output_dir=self._folder / str(self._count),
            chunks=chunks,
            target_layers=",".join(map(str, sorted(self._bench.draft.taps))),
            num_workers=config.num_workers,
            device=config.device,
            **_kept(config),
        )

    def _write(self, rollouts: Rollouts, chunks: str) -> tuple[Arm, Texts]:
        config, target = self._distill(chunks), self._bench.target
        clip_ids = self._source.clip_ids(parse_chunks(chunks))
        settings = data_settings(config, target, _NOBODY, clip_ids, 1)
        per_shard = max(1, config.shard_size // config.samples_per_clip)
        writer = RankWriter(
            config.output_dir, 0, settings, clip_ids, clips_per_shard=per_shard, provenance={}
        )
        writer.begin()
        rollouts.watch = watch = Stopwatch(target.device)
        emitted, passes, start = rollouts.emitted, rollouts.passes, self._clock.now_ms()
        windows = windows_of(config, self._source, clip_ids, target.device)
        write_windows(rollouts, self._source, windows, writer, config)
        wall_s = (self._clock.now_ms() - start) / 1e3
        parts = {name: [round(ms, 4) for ms in found] for name, found in watch.each_ms().items()}
        samples = DistillData(config.output_dir).samples
        arm = Arm(
            wall_s=round(wall_s, 4),
            vision_ms=parts["vision"],
            prompt_ms=parts["prompt"],
            windows=len(clip_ids),
            tokens=sum(len(sample.token_ids) for sample in samples),
            emitted=rollouts.emitted - emitted,
            passes=rollouts.passes - passes,
        )
        return arm, _texts(samples)


class ReplayedRollouts(Rollouts):
    """Rollouts whose texts are known, by window, and proposed to them.

    Attributes:
        replay: among the proposers.
        known: the texts.
    """

    replay: Replay
    known: Texts

    def read(self, window: Window) -> None:
        """See Rollouts."""
        self._clip_id = window.clip_id
        super().read(window)

    def write(
        self, sampling: Sampling, *, seed: int = 0, num_samples: int = 1, greedy_first: bool = False
    ) -> list[Rollout]:
        """See Rollouts."""
        self.replay.load(self.known[self._clip_id], seed)
        return super().write(sampling, seed=seed, num_samples=num_samples, greedy_first=greedy_first)


def _texts(samples: list[DistillSample]) -> Texts:
    texts: dict[str, list[list[int]]] = {}
    for sample in samples:
        texts.setdefault(sample.clip_id, []).append(list(sample.token_ids))
    return texts
