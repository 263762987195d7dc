"""The stage: three arms on the same clips, measured, compared and kept."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress

from alpamayo_dflash.clips.cache import find_snapshot
from alpamayo_dflash.clips.lists import chosen_clips
from alpamayo_dflash.clips.source import ClipSource, failure_kind
from alpamayo_dflash.clips.window import Window, constant_velocity, min_ade
from alpamayo_dflash.common.artefacts import (
    IDENTITY,
    move_aside,
    provenance,
    read_json,
    to_plain,
    write_record,
)
from alpamayo_dflash.common.fields import value_of
from alpamayo_dflash.common.identity import Fingerprint, is_made_from
from alpamayo_dflash.common.locks import mark_of, owned
from alpamayo_dflash.common.machine import Clock
from alpamayo_dflash.decode.config import Sampling
from alpamayo_dflash.decode.observer import StageTimer
from alpamayo_dflash.draft.formats import draft_identity
from alpamayo_dflash.draft.model import DFlashDraft
from alpamayo_dflash.evaluate import metrics
from alpamayo_dflash.evaluate.arms import CLIP_ERRORS, Arms, Run, acceptance_of, rounds_of
from alpamayo_dflash.evaluate.audit import audit
from alpamayo_dflash.evaluate.clip_traces import ClipTraces
from alpamayo_dflash.evaluate.config import EvaluateConfig
from alpamayo_dflash.evaluate.recorded import read_rows
from alpamayo_dflash.evaluate.rows import ClipRow, Failure, Identity, Named, RowStore, Trajectory
from alpamayo_dflash.evaluate.trace import LEGEND, RoundPrinter, piece_of
from alpamayo_dflash.report.evaluation import read_evaluation
from alpamayo_dflash.target.alpamayo import open_target
from alpamayo_dflash.target.formats import OPTIONS
from alpamayo_dflash.target.prompt import Prompt
from alpamayo_dflash.world.facts import Facts
from alpamayo_dflash.world.language import read
from alpamayo_dflash.world.read import SCENES_FILE, read_facts

RESULT = "evaluation.json"
ROWS = "rows.jsonl"

# Options that do not change the numbers, or say where something lies: models count by their identities, the
# dataset by its revision, clips by their ids.
_FREE = frozenset(
    (
        *(
            "output_dir",
            "verbose",
            "trace",
            "audit",
            "local_files_only",
            "frames",
            "motion_gap_ms",
            "take_over",
        ),
        *("draft_model", "alpamayo_model", "cache_dir", "clip_id", "clip_ids", "chunks", "num_samples"),
        *OPTIONS,  # the target's hash tells them
    )
)


def run(config: EvaluateConfig) -> dict[str, Any]:
    """Evaluate, or continue an evaluation that was interrupted, or report that there is nothing to do.

    With `audit`, what is written is audited then, however it came to be. With `trace`, clips of a finished
    evaluation that have no trace get one.

    Returns:
        The JSON object of `evaluation.json` without its rows and provenance; once audited, with `passed`.

    Raises:
        ValueError: bad input, or no clip could be evaluated; the message says why.
    """
    started = time.time()
    console = Console(file=sys.stderr)
    source = ClipSource(config.cache_dir, frames=config.frames, motion_gap_ms=config.motion_gap_ms)
    clip_ids = chosen_clips(
        source,
        clip_id=config.clip_id,
        clip_ids=config.clip_ids,
        chunks=config.chunks,
        count=config.num_samples,
    )
    draft = DFlashDraft.from_pretrained(config.draft_model)
    target, identity = open_target(
        config.alpamayo_model,
        device=config.device,
        dtype=config.dtype,
        local_files_only=config.local_files_only,
        format_=config.target_format,
    )
    arms = Arms(target, draft, config)
    # A draft may have been trained anew in its folder since.
    models = {"target": identity, "draft": replace(draft_identity(config.draft_model), exact=True)}
    parents = {name: model.hash for name, model in models.items()}
    head = _head(arms, parents, source.revision, clip_ids)
    with owned(config.output_dir, mark_of(head), take_over=config.take_over):
        path = config.output_dir / RESULT
        found = read_json(path) if path.exists() else None
        is_ours = found is not None and _is_head(found.get("head"), head, models, path)
        if is_ours:
            read_evaluation(path, rounds=False)
        traces = ClipTraces(arms, mark_of(head)) if config.trace else None
        if found is not None and is_ours and not config.verbose and not _failed(found, path):
            if traces is not None and traces.complete(rows := read_rows(found, str(path)), source, console):
                found |= {"clip_rows": rows, "trace": metrics.trace_summary(rows)}
                write_record(path, found)
                return _shown(_audited(found, arms, source, parents, console), config)
            console.print(
                f"nothing to do: {path} is this evaluation",
                highlight=False,
                markup=False,
            )
            return _shown(_audited(found, arms, source, parents, console), config) | {"nothing_to_do": True}
        store: RowStore[ClipRow] = RowStore(config.output_dir / ROWS, head)
        failures = _evaluate_clips(arms, source, clip_ids, store, console=console, traces=traces)
        rows = store.rows()
        if traces is not None:
            traces.complete(rows, source, console)
        result = metrics.evaluation_summary(rows, failures, attempted=len(clip_ids)) | _settings(arms)
        result["frames_noted"] = dict(source.noted)
        if result["draft_failures"]:
            console.print(f"the draft failed {result['draft_failures']} times", style="red", highlight=False)
        made = provenance(config, started, parents)
        if found is not None and not is_ours:
            move_aside(path, mark_of(found.get("head")), "another evaluation")
        write_record(path, result | {"head": head, "provenance": made, "clip_rows": rows})
        if not failures:  # else a later run does these clips again, and only these
            store.remove()
        return _shown(_audited(result, arms, source, parents, console), config)


def _head(
    arms: Arms, parents: Mapping[str, str], revision: str | None, clip_ids: Sequence[str]
) -> dict[str, Any]:
    """What makes rows of two runs comparable: options as they act, models, dataset and clips."""
    options = {name: value for name, value in to_plain(arms.config).items() if name not in _FREE}
    options["device"] = str(arms.target.device)
    options["dtype"] = str(arms.target.dtype).removeprefix("torch.")
    return {
        "identity": IDENTITY,
        "options": options,
        "parents": dict(parents),
        "dataset": revision,
        "clips": list(clip_ids),
    }


def _failed(result: Mapping[str, Any], path: Path) -> int:
    """How many clips of a written evaluation failed."""
    return value_of(value_of(result, "clips", dict, where=str(path)), "failed", int, where=str(path))


def _is_head(found: Any, head: Mapping[str, Any], models: Mapping[str, Fingerprint], path: Path) -> bool:
    """Whether a stored head is this run's; one of before by the rule of before."""
    if not isinstance(found, dict) or "identity" in found:
        return bool(found == head)
    options, parents = (value_of(found, key, dict, {}, where=str(path)) for key in ("config", "parents"))
    options = {name: options.get(name) for name in head["options"]}
    options["dtype"] = options["dtype"] or head["options"]["dtype"]  # left out, it was the target's own
    if (options, found.get("clips")) != (head["options"], head["clips"]):
        return False
    return all(
        is_made_from(name, str(parents.get(name)), found, models[name], path) for name in ("draft", "target")
    )


def _audited(
    result: Mapping[str, Any], arms: Arms, source: ClipSource, parents: Mapping[str, str], console: Console
) -> Mapping[str, Any]:
    """A result that stands in the output folder, audited there if the options ask for that."""
    if not arms.config.audit:
        return result
    path = arms.config.output_dir / RESULT
    audit(path, arms, source, parents, console)
    return read_json(path)


def _shown(result: Mapping[str, Any], config: EvaluateConfig) -> dict[str, Any]:
    """What the command prints: the object without its long parts."""
    hidden = ("head", "provenance", "clip_rows")
    plain = {name: value for name, value in result.items() if name not in hidden}
    if "audit" in plain:  # a failed one stays one, until it is made again
        plain["audit"] = {name: value for name, value in plain["audit"].items() if name != "provenance"}
        plain["passed"] = plain["audit"]["passed"]
    return plain | {"evaluation": str(config.output_dir / RESULT)}


def _settings(arms: Arms) -> dict[str, Any]:
    """The options that a reader of the numbers must know."""
    config = arms.config
    return {
        "settings": {
            "temperature": config.temperature,
            "top_p": config.top_p,
            "num_traj_samples": config.num_traj_samples,
            "sampled_check_temperature": config.sampled.temperature,
            "sentence_end": config.sentence_end,
            "lossless_mode": config.decode.lossless,
            "row_width": config.row_width,
            "block_size": arms.block_size,
            "dtype": str(arms.target.dtype).removeprefix("torch."),
            "threads": torch.get_num_threads(),
            "target_weights": arms.target.weight_formats,
        }
    }


def _evaluate_clips(
    arms: Arms,
    source: ClipSource,
    clip_ids: Sequence[str],
    store: RowStore[ClipRow],
    *,
    console: Console,
    traces: ClipTraces | None,
) -> list[Failure]:
    """Do the clips that are not in the store yet; returns those that failed."""
    failures: list[Failure] = []
    facts = scene_facts(arms.config.cache_dir)
    todo = [clip_id for clip_id in clip_ids if clip_id not in store]
    if arms.config.verbose:
        console.print(LEGEND)
    warm = False
    with Progress(console=console, disable=arms.config.verbose) as progress:
        task = progress.add_task("clips", total=len(clip_ids), completed=len(clip_ids) - len(todo))
        for number, clip_id in enumerate(todo):
            try:
                window = source.window(clip_id, arms.config.t0_us)
                if not warm:
                    _warm_up(arms, window)
                    warm = True
                prompt = arms.target.prompt(window)
                row = evaluate_clip(arms, window, prompt, facts.get(clip_id), turn=number, console=console)
                if traces is not None:
                    row["trace"] = traces.add(window, prompt, row)
                store.add(row)
            except CLIP_ERRORS as error:
                failures.append({"clip_id": clip_id, "error": str(error), "kind": failure_kind(error)})
                console.print(f"clip {clip_id} failed: {error}", style="red", highlight=False, markup=False)
            progress.advance(task)
    return failures


def _warm_up(arms: Arms, window: Window) -> None:
    """Untimed runs, so that the first clip does not pay for what is set up once."""
    prompt = arms.target.prompt(window)
    for _ in range(arms.config.warmup):
        for arm in arms.names:
            arms.timed(arm, prompt)


def scene_facts(cache_dir: Path) -> Mapping[str, Facts]:
    """The facts of a written world's scenes; empty for real clips."""
    if not (find_snapshot(cache_dir) / SCENES_FILE).is_file():
        return {}
    return read_facts(cache_dir)


def evaluate_clip(
    arms: Arms, window: Window, prompt: Prompt, facts: Facts | None, *, turn: int, console: Console
) -> ClipRow:
    """One clip through every arm, and what is counted on it.

    Args:
        arms: the arms.
        window: the clip at its moment.
        prompt: its prompt.
        facts: of its scene, if it is a synthetic one.
        turn: its number; the arms' order turns with it, so that none is always first.
        console: where `verbose` prints.
    """
    config = arms.config
    names = arms.names
    order = names[turn % len(names) :] + names[: turn % len(names)]
    runs = {arm: arms.timed(arm, prompt) for arm in order}
    dflash = runs["dflash"]
    assert dflash.result is not None and dflash.recorder is not None
    row: ClipRow = {
        "clip_id": window.clip_id,
        "prompt_tokens": len(prompt),
        "coc": dflash.coc,
        "arms": {arm: runs[arm].times for arm in names},
        "acceptance": acceptance_of(dflash.result),
        "first_tokens": list(dflash.recorder.first_tokens),
        "rounds": rounds_of(dflash.recorder),
    }
    if config.compare:
        row["identity"] = _identity(arms, runs, prompt)
    if config.detailed_timing:
        row["parts_ms"] = _parts(arms, prompt)
    if config.verbose:
        console.print(f"\n{window.key}", style="bold", highlight=False, markup=False)
        arms.again("dflash", prompt, config.sampling, RoundPrinter(console, piece_of(arms.target.tokenizer)))
    if window.ego_future_xyz is not None:
        row["trajectory"] = _trajectory(window, dflash)
    if facts is not None:
        row["named"] = _named(facts, dflash.coc[0])
    return row


def _identity(arms: Arms, runs: Mapping[str, Run], prompt: Prompt) -> Identity:
    """Compare the loops greedily and sampled, and the autoregressive one with transformers greedily.

    Of the two samplings, the timed runs have done one; the other is decoded after the same prompts. Of texts
    that differ it is found out whether they part at a near-tie.
    """
    config = arms.config

    def tokens(arm: str, sampling: Sampling) -> list[list[int]]:
        if sampling == config.sampling:
            return runs[arm].token_ids
        return arms.again(arm, prompt, sampling).token_ids

    greedy = config.sampling if config.sampling.greedy else Sampling(0.0, config.top_p)
    written = [
        (sampling, tokens("autoregressive", sampling), tokens("dflash", sampling))
        for sampling in (greedy, config.sampled)
    ]
    same_greedy, same_sampled = (one == other for _, one, other in written)
    if config.sampling.greedy:
        transformers = runs["transformers"].token_ids
    else:
        transformers = arms.transformers_greedy(prompt)
    counts = [arms.near_ties(*each) for each in written] if config.decode.lossless else []
    return {
        "greedy": same_greedy,
        "sampled": same_sampled,
        "autoregressive_equals_transformers": transformers[0] == written[0][1][0],
        "near_ties": sum(near for near, _ in counts),
        "not_near_ties": sum(others for _, others in counts),
    }


def _parts(arms: Arms, prompt: Prompt) -> dict[str, float]:
    """Decode once more with a clock around each part; what no part covers is `other`."""
    timer = StageTimer(Clock(arms.target.device).now_ms)
    result = arms.again("dflash", prompt, arms.config.sampling, timer)
    parts = dict(timer.totals_ms)
    parts["other"] = max(0.0, result.timings.decode_ms - sum(parts.values()))
    return {part: round(parts[part], 4) for part in metrics.PARTS}


def _trajectory(window: Window, run: Run) -> Trajectory:
    """Errors of a run's trajectories, and of constant velocity."""
    future = window.ego_future_xyz
    assert future is not None, "the caller has looked"
    predicted = run.xyz.cpu().numpy()
    straight = constant_velocity(window.ego_history_xyz, len(future))
    return {
        "min_ade_m": round(min_ade(predicted, future), 5),
        "constant_velocity_ade_m": round(min_ade(straight, future), 5),
    }


def _named(facts: Facts, text: str) -> Named:
    """Whether a text names the scene's manoeuvre and its cause."""
    manoeuvre, cause = read(text)
    return {"manoeuvre": manoeuvre == facts.manoeuvre, "cause": cause == facts.cause}
