"""Which draft recipe is best on the tiny world: recipes trained side by side, measured by decoding at T 0.6.

A unit is one recipe with one training seed on one amount of data. Each is trained, decoded and put into the
results file before the next begins, so the file grows, and the same command goes on from it.
"""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alpamayo_dflash.cli.demo import DemoConfig, stages
from alpamayo_dflash.common.artefacts import provenance, read_json, write_record
from alpamayo_dflash.common.fields import shown, value_of
from alpamayo_dflash.common.options import check_at_least, check_positive

if TYPE_CHECKING:
    from alpamayo_dflash.cli.demo import Stages
    from alpamayo_dflash.decode.config import Sampling
    from alpamayo_dflash.decode.verify import Prefilled
    from alpamayo_dflash.draft.model import DFlashDraft
    from alpamayo_dflash.evaluate.acceptance import ClipCounts
    from alpamayo_dflash.target.alpamayo import Alpamayo
    from alpamayo_dflash.target.prompt import Prompt
    from alpamayo_dflash.train.config import TrainConfig

CONTEXT, LONG_CONTEXT = 16, 64
"""States before the anchor that a draft sees: in all recipes, and in those named for it."""
DECODING_SEEDS, VALIDATION_SEEDS = 6, 3
PROTOTYPE, PLAIN = "prototype", "dflash"
DATA = ("all", "tenth")
"""The demo's training clips, or a tenth of them."""
TENTH = 10
PEER_FILE = "peer.json"
_TEST_CHUNKS = 4


@dataclass(frozen=True)
class Recipe:
    """What differs from plain DFlash as the demo trains it.

    Attributes:
        options: of `train`.
        long: how many times as many steps.
    """

    options: Mapping[str, Any]
    long: int = 1


_PLAIN = {
    "context_len": CONTEXT,
    "previous_head": "none",
    "loss_type": "ce",
    "ce_weight_start": 1.0,
    "ce_weight_end": 0.8,
    "position_weights": "decay",
    "prefix_weight_gamma": None,
    "optimizer": "adamw",
}
"""Plain DFlash, in all that recipes differ in: what `train` does by default is another matter."""
_GRU = {"previous_head": "gru", "loss_type": "kl"}
_MUON = _GRU | {"optimizer": "muon"}
RECIPES = {
    PROTOTYPE: Recipe({"context_len": 1, "prefix_weight_gamma": 3.0}),
    PLAIN: Recipe({}),
    "long context": Recipe({"context_len": LONG_CONTEXT}),
    "dpace": Recipe({"position_weights": "dpace"}),
    "kl": Recipe({"loss_type": "kl"}),
    "bigram kl": Recipe(_GRU | {"previous_head": "bigram"}),
    "mlp kl": Recipe(_GRU | {"previous_head": "mlp"}),
    "gru kl": Recipe(_GRU),
    "gru ce": Recipe(_GRU | {"loss_type": "ce"}),
    "gru tv": Recipe(_GRU | {"loss_type": "tv"}),
    "gru lk": Recipe(_GRU | {"loss_type": "lk"}),
    "gru kl+lk": Recipe(_GRU | {"loss_type": "kl+lk"}),
    "gru ce+kl": Recipe(_GRU | {"loss_type": "ce+kl", "ce_weight_start": 0.5, "ce_weight_end": 0.5}),
    "gru kl dpace": Recipe(_GRU | {"position_weights": "dpace"}),
    "gru kl, long context": Recipe(_GRU | {"context_len": LONG_CONTEXT}),
    "bigram kl muon": Recipe(_MUON | {"previous_head": "bigram"}),
    "mlp kl muon": Recipe(_MUON | {"previous_head": "mlp"}),
    "gru kl muon": Recipe(_MUON),
    "gru kl, three times": Recipe(_GRU, long=3),
    "bigram kl muon, three times": Recipe(_MUON | {"previous_head": "bigram"}, long=3),
    "mlp kl muon, three times": Recipe(_MUON | {"previous_head": "mlp"}, long=3),
    "gru kl muon, three times": Recipe(_MUON, long=3),
}
"""By name; the first two are compared against."""


@dataclass(frozen=True)
class StudyConfig:
    """Train recipes side by side on the tiny world, and measure what they accept at temperature 0.6.

    The data are the demo's. Which recipe is best is chosen on validation clips; the results are of test clips
    that no training has seen.

    Attributes:
        out: folder of world, layers, data and drafts; it may be removed, and is then made again.
        results: JSON file of the results, which grows unit by unit; what it has is not done again.
        recipes: names of recipes with commas or semicolons between; all where it is left out.
        data: all, tenth (of the training clips), or both with a comma between.
        training_seeds: of each recipe, from 0 on.
        test_clips: clips of the test chunks.
        ceilings: measure the ceilings too.
        peer_drafts: folders of drafts that another trainer made, to be measured beside: each holds `draft/`
            and `peer.json`, an object with recipe (one of `evaluate.acceptance.PEERS`), data, seed, steps and
            train_s.
        bench: results file of `bench`, whose parts at R1's size give each recipe its ms a CoC.
        minutes: begin no unit after so many minutes.
        epochs: of a recipe that is not longer; the demo's.
        clips_per_chunk: clips of a chunk; the demo's.
        threads: of torch.
    """

    out: Path
    results: Path
    recipes: str | None = None
    data: str = "all"
    training_seeds: int = 3
    test_clips: int = 200
    ceilings: bool = True
    peer_drafts: tuple[Path, ...] = ()
    bench: Path | None = None
    minutes: float | None = None
    epochs: int = 8
    clips_per_chunk: int = 60
    threads: int = 1

    def __post_init__(self) -> None:
        """Check names and counts."""
        check_positive(
            training_seeds=self.training_seeds,
            test_clips=self.test_clips,
            epochs=self.epochs,
            clips_per_chunk=self.clips_per_chunk,
            threads=self.threads,
        )
        check_at_least(0, minutes=self.minutes)
        for what, given, known in (("recipes", self.recipe_names, RECIPES), ("data", self.amounts, DATA)):
            unknown = [name for name in given if name not in known]
            if unknown or not given:
                raise ValueError(f"{what}: {shown(unknown or given)} is none of {', '.join(known)}")
        there = _TEST_CHUNKS * self.clips_per_chunk
        if self.test_clips > there:
            raise ValueError(f"test_clips is {self.test_clips}; the test chunks have {there} clips")

    @property
    def recipe_names(self) -> list[str]:
        """The recipes to train."""
        if self.recipes is None:
            return list(RECIPES)
        return [name.strip() for name in self.recipes.split(";") if name.strip()]

    @property
    def amounts(self) -> list[str]:
        """The amounts of data to train on."""
        return [name.strip() for name in self.data.split(",") if name.strip()]


@dataclass(frozen=True)
class Unit:
    """One training."""

    recipe: str
    data: str
    seed: int

    @property
    def key(self) -> str:
        """Its name in the results."""
        return f"{self.recipe} | {self.data} | {self.seed}"


@dataclass(frozen=True)
class PeerDraft:
    """A draft that another trainer made, which is only decoded with.

    Attributes:
        folder: holds `draft/` and `peer.json`.
        unit: its name.
        draft: the hash of what decodes.
        steps: of its training.
        train_s: seconds of its training, all in all.
    """

    folder: Path
    unit: Unit
    draft: str
    steps: int
    train_s: float

    @property
    def key(self) -> str:
        """Its name in the results."""
        return self.unit.key

    @classmethod
    def read(cls, folder: Path) -> PeerDraft:
        """Read a folder.

        Raises:
            ValueError: a file is missing or damaged, or names what the study does not know.
        """
        from alpamayo_dflash.draft.formats import draft_identity
        from alpamayo_dflash.evaluate.acceptance import PEERS

        path = folder / PEER_FILE
        raw, where = read_json(path), str(path)
        recipe, data = (value_of(raw, key, str, where=where) for key in ("recipe", "data"))
        for what, given, known in (("recipe", recipe, PEERS.values()), ("data", data, DATA)):
            if given not in known:
                raise ValueError(f"{path}: {what} is {given!r}; it must be one of {'; '.join(known)}")
        steps, seed = (value_of(raw, key, int, where=where) for key in ("steps", "seed"))
        return cls(
            folder,
            Unit(recipe, data, seed),
            draft_identity(folder / "draft").hash,
            steps,
            value_of(raw, "train_s", float, where=where),
        )


def _peers(folders: Sequence[Path]) -> list[PeerDraft]:
    """Read all folders.

    Raises:
        ValueError: one cannot be read, or two are of one name.
    """
    found: dict[str, PeerDraft] = {}
    for folder in folders:
        peer = PeerDraft.read(folder)
        if peer.key in found:
            raise ValueError(f"{folder}: is {peer.key}, and so is {found[peer.key].folder}")
        found[peer.key] = peer
    return list(found.values())


def run(config: StudyConfig) -> dict[str, Any]:
    """Do what the results file lacks.

    Returns:
        the figures, how many units were done now, how many are still to do, and the file.

    Raises:
        ValueError: the file is of another study, or bad input.
    """
    import torch

    from alpamayo_dflash.evaluate.acceptance import study_figures

    torch.set_num_threads(config.threads)
    started = time.time()
    peers = _peers(config.peer_drafts)
    study = _Study(config)
    wanted: list[Unit | PeerDraft] = [*_units(config), *peers]
    todo = [unit for unit in wanted if not study.has(unit)]
    done = 0
    for unit in todo:
        if config.minutes is not None and time.time() - started > 60 * config.minutes:
            break
        print(f"study: {unit.key} ({done + 1} of {len(todo)})", file=sys.stderr)
        if isinstance(unit, PeerDraft):
            study.add_peer(unit)
        else:
            study.add(unit)
        done += 1
    if config.ceilings and "ceilings" not in study.results:
        study.add_ceilings()
    results = study.results
    parts = read_json(config.bench, "raw")["raw"] if config.bench else results.get("bench_raw")
    if parts is not None:
        results["bench_raw"] = _bench_parts(parts, results["round_rows"], str(config.bench or config.results))
    results["figures"] = study_figures(results)
    results["provenance"] = provenance(config, started, {"target": results["target"]})
    write_record(config.results, results)
    left = len(todo) - done
    return {"results": str(config.results), "units_done": done, "units_left": left, **results["figures"]}


def _bench_parts(raw: Mapping[str, Any], rows: int, where: str) -> dict[str, Any]:
    """Of a benchmark's times those that a round's milliseconds are made of.

    Raises:
        ValueError: it has none of a pass of so many rows, or of the draft's picks.
    """
    for key in ("verify_ms", "picks_ms"):
        value_of(raw, key, dict, where=where)
    if str(rows) not in raw["verify_ms"]:
        raise ValueError(f"{where}: no pass of {rows} rows was timed, which is a round's; see bench --rows")
    return {key: raw[key] for key in ("verify_ms", "picks_ms")}


def _units(config: StudyConfig) -> Iterator[Unit]:
    """In the order in which they are wanted: every recipe once before one has its second seed."""
    for data in config.amounts:
        for seed in range(config.training_seeds):
            for recipe in config.recipe_names:
                yield Unit(recipe, data, seed)


class _Study:
    """The world, its data, the clips to decode, and the results so far."""

    def __init__(self, config: StudyConfig) -> None:
        from alpamayo_dflash.clips.lists import parse_chunks
        from alpamayo_dflash.clips.source import ClipSource
        from alpamayo_dflash.decode.config import DecodeConfig, Sampling
        from alpamayo_dflash.decode.round_device import rows_of_sample
        from alpamayo_dflash.decode.stops import stop_rules
        from alpamayo_dflash.target.alpamayo import open_target
        from alpamayo_dflash.train.trainer import EXPECTED

        self.config = config
        demo = DemoConfig(
            out=config.out,
            num_chunks=DemoConfig.num_chunks - DemoConfig.held_out_chunks + _TEST_CHUNKS,
            held_out_chunks=_TEST_CHUNKS,
            clips_per_chunk=config.clips_per_chunk,
            num_samples=config.test_clips,
            num_epochs=config.epochs,
            context_len=LONG_CONTEXT,
        )
        self.plan = stages(demo)
        _make_data(self.plan)
        self.target, identity = open_target("tiny", device="cpu", dtype="float32", local_files_only=True)
        source, moment = ClipSource(self.plan.world.out), self.plan.evaluate.t0_us
        tests = source.clip_ids(parse_chunks(demo.held_out))[: config.test_clips]
        validation = source.clip_ids(parse_chunks(self.plan.train.data.held_out_chunks))
        self.prompts = {
            name: [self.target.prompt(source.window(clip, moment)) for clip in clips]
            for name, clips in (("test", tests), ("validation", validation))
        }
        drawn = Sampling(self.plan.distill.temperature, self.plan.distill.top_p)
        self.greedy, self.drawn = Sampling(0.0, 1.0), drawn
        settings = {
            "target": identity.hash,
            "test_clips": tests,
            "validation_clips": validation,
            "temperature": drawn.temperature,
            "top_p": drawn.top_p,
            "block_size": demo.block_size,
            "round_rows": rows_of_sample(demo.block_size, stop_rules(self.target, DecodeConfig())),
            "decoding_seeds": DECODING_SEEDS,
            "validation_seeds": VALIDATION_SEEDS,
            "epochs": config.epochs,
            "chosen_by": EXPECTED,
        }
        self.results: dict[str, Any] = {**settings, "units": {}}
        if config.results.exists():
            self.results = read_json(config.results, "units", *settings)
            for key, value in settings.items():
                if self.results[key] != value:
                    raise ValueError(f"{config.results}: of a study with another {key}; name another file")

    def has(self, unit: Unit | PeerDraft) -> bool:
        """Whether the results have a unit.

        Raises:
            ValueError: they have one of that name and of another draft.
        """
        entry = self.results["units"].get(unit.key)
        if entry is not None and isinstance(unit, PeerDraft) and entry["draft"] != unit.draft:
            raise ValueError(
                f"{self.config.results}: {unit.key} is of another draft than {unit.folder}; "
                "name another file, or take the unit out"
            )
        return entry is not None

    def add_peer(self, peer: PeerDraft) -> None:
        """Decode with a draft that is there, and write the results."""
        from alpamayo_dflash.draft.model import DFlashDraft

        draft = DFlashDraft.from_pretrained(peer.folder / "draft")
        entry = {
            "options": {},
            "draft": peer.draft,
            "steps": peer.steps,
            "parameters": sum(parameter.numel() for parameter in draft.parameters()),
            "train_s": peer.train_s,
            **self._measured(draft),
        }
        self.results["units"][peer.key] = asdict(peer.unit) | entry
        write_record(self.config.results, self.results)

    def add(self, unit: Unit) -> None:
        """Train a unit's draft, decode with it, and write the results."""
        from alpamayo_dflash.draft.model import DFlashDraft
        from alpamayo_dflash.train.run import run as train

        recipe = RECIPES[unit.recipe]
        options = self._training(unit, recipe)
        began = time.time()
        trained = train(options)
        seconds = time.time() - began
        entry = {
            "options": dict(recipe.options),
            "steps": trained["steps"],
            "best_step": trained["best_step"],
            "parameters": trained["parameters"],
            "expected_acceptance_length": trained["acceptance_length"],
            "train_s": round(seconds, 1),
            **self._measured(DFlashDraft.from_pretrained(options.run.output_dir / "draft")),
        }
        self.results["units"][unit.key] = asdict(unit) | entry
        write_record(self.config.results, self.results)
        shutil.rmtree(options.run.output_dir / "checkpoint", ignore_errors=True)

    def _training(self, unit: Unit, recipe: Recipe) -> TrainConfig:
        plain, tenth = self.plan.train, unit.data == "tenth"
        # All chunks of the data but the one that validates.
        clips = (DemoConfig.num_chunks - DemoConfig.held_out_chunks - 1) * self.config.clips_per_chunk
        options: dict[str, Any] = {
            "output_dir": self.config.out / "drafts" / unit.key.replace(" | ", "-").replace(" ", "_"),
            "seed": unit.seed,
            "num_epochs": plain.schedule.num_epochs * recipe.long * (TENTH if tenth else 1),
            "train_clips": clips // TENTH if tenth else None,
        }
        return plain.changed(**(_PLAIN | options | dict(recipe.options)))

    def _measured(self, draft: DFlashDraft) -> dict[str, Any]:
        """What decoding with a draft accepts on validation and test clips."""
        from alpamayo_dflash.decode.config import DecodeConfig
        from alpamayo_dflash.decode.decoder import SpeculativeDecoder
        from alpamayo_dflash.evaluate.acceptance import count_clips

        decoder = SpeculativeDecoder(self.target, draft, DecodeConfig(loop="device"))
        began = time.time()
        (validation,) = count_clips(
            decoder, self.prompts["validation"], [(self.drawn, range(VALIDATION_SEEDS))]
        )
        sampled, greedy = count_clips(
            decoder, self.prompts["test"], [(self.drawn, range(DECODING_SEEDS)), (self.greedy, (0,))]
        )
        self._agree(sampled, greedy)
        return {
            "decode_s": round(time.time() - began, 1),
            "validation": {"tokens": sum(validation.tokens), "passes": sum(validation.passes)},
            "sampled_passes": list(sampled.passes),
            "greedy_passes": list(greedy.passes),
        }

    def _agree(self, sampled: ClipCounts, greedy: ClipCounts) -> None:
        """Texts do not depend on the draft, so every unit emits the same number of tokens on each clip.

        Raises:
            ValueError: this one does not: decoding was not lossless.
        """
        for name, counts in (("sampled_tokens", sampled), ("greedy_tokens", greedy)):
            known = self.results.setdefault(name, list(counts.tokens))
            for clip, (before, now) in enumerate(zip(known, counts.tokens, strict=True)):
                if before != now:
                    clip_id = self.results["test_clips"][clip]
                    raise ValueError(f"{clip_id}: {now} {name} where other drafts had {before}")

    def add_ceilings(self) -> None:
        """Decode with proposers that know the target."""
        block = int(self.results["block_size"])
        self.results["ceilings"] = ceilings(
            self.target, self.prompts["test"], block, self.drawn, range(DECODING_SEEDS)
        )
        write_record(self.config.results, self.results)


def ceilings(
    target: Alpamayo, prompts: Sequence[Prompt], block: int, sampling: Sampling, seeds: Sequence[int]
) -> dict[str, list[int]]:
    """Passes by clip of proposers that know the target, `independent` and `text` (`evaluate.ceilings`)."""
    from alpamayo_dflash.decode.config import DecodeConfig
    from alpamayo_dflash.decode.decoder import SpeculativeDecoder
    from alpamayo_dflash.evaluate.acceptance import count_clips
    from alpamayo_dflash.evaluate.ceilings import IndependentOracle, TextOracle

    writer = SpeculativeDecoder(target)
    knows = TextOracle(block)
    independent = IndependentOracle(target, block, sampling, writer.rules)

    read: dict[str, Prefilled] = {}  # the writer's last prompt, by its key

    def tell_text(prompt: Prompt, sampling: Sampling, seed: int) -> None:
        if prompt.key not in read:
            read.clear()
            read[prompt.key] = writer.prefill(prompt)
        result = writer.generate(
            read[prompt.key],
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            seed=seed,
            trajectories=False,
        )
        knows.text = result.token_ids[0]

    def tell_seed(_: Prompt, __: Sampling, seed: int) -> None:
        independent.seed = seed

    found = {}
    for name, oracle, tell in (("text", knows, tell_text), ("independent", independent, tell_seed)):
        decoder = SpeculativeDecoder(target, None, DecodeConfig(loop="device"), proposers=[oracle])
        (counts,) = count_clips(decoder, prompts, [(sampling, seeds)], asked=tell)
        found[name] = list(counts.passes)
    return found


def _make_data(plan: Stages) -> None:
    """The demo's stages up to the data; what is finished is not done again."""
    from alpamayo_dflash.distill.run import run as distill
    from alpamayo_dflash.layers.run import run as layers
    from alpamayo_dflash.world.run import run as world

    world(plan.world)
    layers(plan.layers)
    distill(plan.distill)
