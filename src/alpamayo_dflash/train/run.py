"""The training stage: from distillation data to a draft folder."""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from torch import Tensor

from alpamayo_dflash.clips.lists import parse_chunks
from alpamayo_dflash.common.artefacts import (
    provenance,
    read_json,
    recover_folder,
    to_plain,
    write_record,
)
from alpamayo_dflash.common.extras import check_extras
from alpamayo_dflash.common.fields import build, shown, value_of
from alpamayo_dflash.common.identity import Fingerprint, is_made_from
from alpamayo_dflash.common.locks import mark_of, owned
from alpamayo_dflash.common.processes import Processes, join
from alpamayo_dflash.common.progress import Live, Monitor
from alpamayo_dflash.distill.config import BadShardRule, DistillConfig
from alpamayo_dflash.distill.data import DistillData
from alpamayo_dflash.distill.shards import DistillSample, training_counts
from alpamayo_dflash.draft.formats import check_place, draft_identity, read_config
from alpamayo_dflash.draft.model import DFlashDraft
from alpamayo_dflash.target.checkpoint import FrozenTarget, read_target, target_identity
from alpamayo_dflash.target.formats import OPTIONS
from alpamayo_dflash.train.checkpoint import STATE, read_state
from alpamayo_dflash.train.config import DEFAULTS, TrainConfig, flattened
from alpamayo_dflash.train.data import BlockData, of_few_clips, split_samples
from alpamayo_dflash.train.memory import training_bytes
from alpamayo_dflash.train.real import Evaluate, OpenEvaluate, RealAcceptance, RealRequest
from alpamayo_dflash.train.start import (
    Vocabulary,
    acting_options,
    check_data,
    choose_tokens,
    end_token_ids,
    first_draft,
)
from alpamayo_dflash.train.trainer import Progress, Trainer

SUMMARY = "train.json"

# Options that a continued run may change: they do not move its numbers. The target counts by its hash.
# Where files lie is free: of the target, the data and the first draft the hashes are compared.
# What a step does is compared over all processes.
_FREE = frozenset(
    (
        "batch_size",
        *("output_dir", "num_workers", "cache_gib", "resume", "other_target", "local_files_only"),
        *("target_model", "data_dir", "init_from", "take_over", "on_bad_shard"),
    )
)


def run(config: TrainConfig, open_evaluate: OpenEvaluate | None = None) -> dict[str, Any]:
    """Train, or continue, or report that there is nothing to do.

    Args:
        config: the options.
        open_evaluate: makes what decodes held-out clips for `real_acceptance`; the command has its own.

    Returns:
        what `train.json` holds: the draft's folder, the acceptance length of the best draft (`chosen_by` says
        which: simulated, expected or real) and of every evaluation, losses, counts of clips, responses and
        blocks, and provenance.

    Raises:
        ValueError: data, target, draft and options do not fit each other, a file is missing or corrupt, or
            real acceptance is asked for and nobody decodes, or decoding does not fit the memory.
        MissingPackageError: a package that training needs is not installed.
    """
    check_extras("train")  # before an hour of data and models
    started = time.time()
    real = config.run.real_acceptance
    if (real is None) != (open_evaluate is None):
        raise ValueError(
            f"real_acceptance is {real} and open_evaluate is {open_evaluate}; give both or neither (the "
            "command `train` has its own)"
        )
    with join(config.run.device) as processes:
        summary, checkpoint = config.run.output_dir / SUMMARY, config.run.output_dir / "checkpoint"
        target = read_target(config.run.target_model, local_files_only=config.run.local_files_only)
        data = DistillData(config.data.data_dir, on_bad_shard=config.data.on_bad_shard)
        identity = target_identity(target.folder, target.vlm_files, config.run.target_format)
        checked = None if config.data.other_target else identity
        check_data(data.manifest, target, config.data.data_dir, identity=checked)
        bad = _leave_out_bad(data, config.data.on_bad_shard, processes)  # before anything is written
        options = flattened(to_plain(config))
        formats = {key for key in OPTIONS if options[key] == "checkpoint"}  # as before there was a choice
        compared = {key: value for key, value in options.items() if key not in _FREE | formats}
        mark = mark_of(compared | {"number of processes": processes.world_size})
        with owned(config.run.output_dir, mark, processes.rank, take_over=config.run.take_over):
            if processes.first:
                for folder in (checkpoint, config.run.output_dir / "draft"):
                    recover_folder(folder)
            processes.wait()
            state = _earlier(config, processes.world_size, data)
            models = _models(config, data, identity)
            parents = {name: model.hash for name, model in models.items()}
            parents["distill_target"] = data.manifest["settings"]["target"]
            if state is not None:
                _check_parents(checkpoint, state, models, parents)
                if state["progress"]["step"] == state["total_steps"] and summary.exists():
                    return {**read_json(summary), "nothing_to_do": True}
            trainer, counts = _trainer(config, data, target, processes, parents=parents, started=started)
            if open_evaluate is not None:
                trainer.evaluate = _evaluate(trainer, open_evaluate, data)
            if state is not None:
                trainer.resume(
                    checkpoint,
                    build(Progress, state["progress"], str(checkpoint / STATE)),
                    state["total_steps"],
                )
            elif processes.first:
                check_place(config.run.output_dir / "draft")  # before anything is removed
                # What an earlier run left must not be taken for this one's after an interruption.
                summary.unlink(missing_ok=True)
                shutil.rmtree(checkpoint, ignore_errors=True)
            processes.wait()
            _fit(trainer, processes)
            result = _result(trainer, counts | {"bad_shards": bad}, started)
            if processes.first:
                write_record(summary, result)
            processes.wait()
    return result


def _leave_out_bad(data: DistillData, rule: BadShardRule, processes: Processes) -> dict[str, str]:
    """Look at the shards, and leave bad ones out where that is asked for; returns what is wrong with those.

    Raises:
        ValueError: a shard is bad and none is to be skipped, or all are bad.
    """
    if rule == "fail":
        if processes.first:
            data.check()
        processes.wait()
        return {}
    bad = processes.share(data.bad_shards | data.faults() if processes.first else {})
    data.leave_out(bad)
    if bad and processes.first:
        Console(stderr=True).print(f"{len(bad)} shards left out, the first: {next(iter(bad.values()))}")
    return bad


def _earlier(config: TrainConfig, world_size: int, data: DistillData) -> dict[str, Any] | None:
    """The state of the checkpoint to continue from, or None.

    Raises:
        ValueError: there is none and there must be, or it was made with other options.
    """
    folder = config.run.output_dir / "checkpoint"
    state = None if config.run.resume == "never" else read_state(folder)
    if state is None:
        if config.run.resume == "must":
            raise ValueError(f"{folder}: no checkpoint to resume from")
        return None
    options, stored = flattened(to_plain(config)), _options_of(state, folder)
    if unknown := stored.keys() - options.keys():
        raise ValueError(
            f"{folder}: made with options that this version does not have, {shown(sorted(unknown))}; go on "
            "with the version that made it, use another output_dir, or --resume never to start over"
        )
    first = None
    if config.draft.init_from is not None:
        context_len = config.draft.context_len or data.manifest["context_len"]
        first = read_config(config.draft.init_from, context_len=context_len)
    before, now = (
        acting_options(values, data.manifest, first, str(folder / STATE))
        for values in (DEFAULTS | stored, options)
    )
    _check_step(folder, before, state["world_size"], config, world_size)
    for key in now.keys() - _FREE:
        if before.get(key) != now[key]:
            raise ValueError(
                f"{folder}: made with {key} {shown(before.get(key))}, not {now[key]!r}; use the same "
                "options, another output_dir, or --resume never to start over"
            )
    return state


def _options_of(state: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """A checkpoint's options by name alone.

    Raises:
        ValueError: it is of a version whose steps were others, and not finished.
    """
    config = state["config"]
    if all(isinstance(part, dict) for part in config.values()):
        return flattened(config)
    if state["progress"]["step"] < state["total_steps"]:
        raise ValueError(
            f"{folder}: unfinished, and of a version before options stood by component; go on with the "
            "version that made it, use another output_dir, or --resume never to start over"
        )
    then = {"loss_type": "ce"}  # what was the default then: plain DFlash
    if config.get("init_from") is None:
        then["previous_head"] = "none"
    return {**config, **{name: config.get(name) or default for name, default in then.items()}}


def _check_step(
    folder: Path, before: Mapping[str, Any], before_size: int, config: TrainConfig, world_size: int
) -> None:
    """Refuse to go on where a step would not be of the same blocks at the same rate.

    On another number of processes each takes other parts of a step's blocks, which rounds sums otherwise.

    Raises:
        ValueError: naming the batch size that would do, or the option that does not let the number change.
    """
    blocks = value_of(before, "batch_size", int, where=str(folder / STATE)) * before_size
    if config.schedule.batch_size * world_size != blocks:
        fitting = f"use a batch_size of {blocks // world_size}"
        if blocks % world_size:
            fitting = f"{world_size} processes cannot share them equally"
        raise ValueError(
            f"{folder}: made with {blocks} blocks a step on all processes ({before_size}), not with "
            f"{config.schedule.batch_size} on each of {world_size}; {fitting}"
        )
    if config.optimizer.scale_lr and world_size != before_size:
        raise ValueError(
            f"{folder}: made on {before_size} processes with scale_lr, which on {world_size} would change "
            "the learning rate; use as many"
        )


def _check_parents(
    checkpoint: Path, state: Mapping[str, Any], models: Mapping[str, Fingerprint], now: Mapping[str, str]
) -> None:
    """Refuse to go on from a checkpoint that was made from something else.

    Raises:
        ValueError: naming the parent that has changed.
    """
    before, where = state["parents"], checkpoint / STATE
    for name in sorted(before.keys() | now.keys()):
        found, current = str(before.get(name)), str(now.get(name))
        same = found == current
        if name in models and name in before:
            same = is_made_from(name, found, state, models[name], where)
            current = models[name].under(state, where)
        if not same:
            raise ValueError(
                f"{checkpoint}: made from another {name} (hash {found[:12]}, now "
                f"{current[:12]}); use another output_dir, or --resume never to start over"
            )


def _trainer(
    config: TrainConfig,
    data: DistillData,
    target: FrozenTarget,
    processes: Processes,
    *,
    parents: dict[str, str],
    started: float,
) -> tuple[Trainer, dict[str, Any]]:
    """Split the data, build the draft and its trainer; also the counts of the summary."""
    train, rest = split_samples(
        data.samples, share=config.data.held_out, chunks=parse_chunks(config.data.held_out_chunks)
    )
    train = of_few_clips(train, config.data.train_clips)
    held_out = [sample for sample in rest if sample.temperature == 0] or rest
    if all(len(sample.token_ids) < 2 for sample in held_out):
        raise ValueError(f"{config.data.data_dir}: no held-out response has a second token to predict")
    vocabulary = _vocabulary(config, data, train, target)
    draft = first_draft(config, data.manifest, target, None if vocabulary is None else vocabulary.token_ids)
    draft.bind(target.embedding.to(processes.device), target.head.to(processes.device), target.num_layers)
    unlabelled = range(0) if config.data.trajectory_labels else target.traj_ids
    cached = int(config.data.cache_gib * 2**30)
    teacher = config.loss.needs_teacher
    blocks = BlockData(data, train, draft.config, teacher=teacher, unlabelled=unlabelled, cache_bytes=cached)
    walked = BlockData(data, held_out, draft.config, teacher=False, unlabelled=range(0), cache_bytes=cached)
    hot = [sample for sample in rest if sample.temperature > 0 and len(sample.token_ids) > 1]
    drawn = None
    if hot:
        drawn = BlockData(data, hot, draft.config, teacher=True, unlabelled=unlabelled, cache_bytes=cached)

    def save_best(best: DFlashDraft) -> None:
        record = provenance(config, started, parents, device=processes.device)
        best.save_pretrained(config.run.output_dir / "draft", provenance=record)

    trainer = Trainer(
        config,
        draft,
        train=blocks,
        held_out=walked,
        drawn=drawn,
        masked_ids=target.traj_ids,
        processes=processes,
        parents=parents,
        save_best=save_best,
    )
    counts = {
        "train": _counts(train)
        | {"blocks": trainer.num_blocks}
        | _outside(train, draft.token_ids, unlabelled),
        "held_out": _counts(held_out)
        | {"greedy": all(sample.temperature == 0 for sample in held_out)}
        | _outside(held_out, draft.token_ids, range(0)),
    }
    if vocabulary is not None:
        size, filled = len(vocabulary.token_ids), vocabulary.filled
        counts["draft_vocab"] = {"size": size, "counted": vocabulary.counted, "filled": filled}
        if filled and processes.first:
            Console(stderr=True).print(
                f"draft_vocab_size {size}: the training responses have only {vocabulary.counted} different "
                f"tokens; {filled} others fill up"
            )
    return trainer, counts


def _evaluate(trainer: Trainer, open_evaluate: OpenEvaluate, data: DistillData) -> Evaluate:
    """What decodes held-out clips: on the first process."""
    if not trainer.processes.first:
        return _elsewhere
    settings, limit = data.manifest["settings"], DistillConfig.max_tokens
    return open_evaluate(
        RealRequest(
            trainer.draft,
            trainer.held_out.samples,
            max_tokens=value_of(settings, "max_tokens", int, limit, where=str(data.folder)),
            training_bytes=training_bytes(trainer.draft, trainer.config),
        )
    )


def _elsewhere(_: DFlashDraft) -> RealAcceptance:
    raise AssertionError("the first process decodes")


def _vocabulary(
    config: TrainConfig, data: DistillData, train: Sequence[DistillSample], target: FrozenTarget
) -> Vocabulary | None:
    """The tokens that a reduced head keeps; None where the options choose none."""
    if not config.draft.draft_vocab_size:
        return None
    share = config.data.held_out if config.data.held_out_chunks is None else None
    return choose_tokens(
        training_counts(data.manifest, train, held_out=share),
        config.draft.draft_vocab_size,
        vocab_size=len(target.head),
        always=end_token_ids(target),
        masked=target.traj_ids,
    )


def _outside(samples: Sequence[DistillSample], token_ids: Tensor | None, unlabelled: range) -> dict[str, int]:
    """How many labels (each response token after the first, once) a reduced head has no row for."""
    if token_ids is None:
        return {}
    kept = {*token_ids.tolist(), *unlabelled}
    return {
        "labels_outside_vocab": sum(token not in kept for sample in samples for token in sample.token_ids[1:])
    }


def _counts(samples: list[DistillSample]) -> dict[str, int]:
    """Clips and responses; those without a second token have no block and are counted apart."""
    return {
        "clips": len({sample.clip_id for sample in samples}),
        "responses": len(samples),
        "too_short": sum(len(sample.token_ids) < 2 for sample in samples),
    }


def _models(config: TrainConfig, data: DistillData, target: Fingerprint) -> dict[str, Fingerprint]:
    """Identities of what the draft is made from."""
    models, first = {"distill": data.identity, "target": target}, config.draft.init_from
    return models if first is None else models | {"init_from": draft_identity(first)}


def _fit(trainer: Trainer, processes: Processes) -> None:
    folder = trainer.config.run.output_dir
    if not processes.first:
        trainer.fit(folder / "checkpoint", Monitor())
        return
    with Live(folder / "logs", trainer.total_steps, trainer.progress.step) as live:
        trainer.fit(folder / "checkpoint", live)


def _result(trainer: Trainer, counts: dict[str, Any], started: float) -> dict[str, Any]:
    config, progress = trainer.config, trainer.progress
    return {
        "draft": str(config.run.output_dir / "draft"),
        "acceptance_length": progress.best_length,
        "chosen_by": trainer.choice,
        "best_step": progress.best_step,
        "steps": progress.step,
        "steps_per_epoch": trainer.steps_per_epoch,
        "parameters": sum(parameter.numel() for parameter in trainer.draft.parameters()),
        "draft_config": to_plain(trainer.draft.config),
        "train": counts["train"],
        "held_out": counts["held_out"],
        **({"draft_vocab": counts["draft_vocab"]} if "draft_vocab" in counts else {}),
        **({"bad_shards": counts["bad_shards"]} if counts["bad_shards"] else {}),
        "evaluations": progress.evaluations,
        "losses": progress.losses,
        "provenance": provenance(config, started, trainer.parents, device=trainer.processes.device),
    }
