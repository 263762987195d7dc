"""The training loop: steps, schedules, evaluation, checkpoints. One loop for one process and for many."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from alpamayo_dflash.common.artefacts import IDENTITY
from alpamayo_dflash.common.processes import Processes
from alpamayo_dflash.common.progress import Monitor
from alpamayo_dflash.draft.model import DFlashDraft
from alpamayo_dflash.train.accept import AcceptanceCounts, counts_of, simulate
from alpamayo_dflash.train.checkpoint import load_training, save_training
from alpamayo_dflash.train.config import TrainConfig
from alpamayo_dflash.train.data import BlockBatch, BlockData, Blocks, step_count, step_share
from alpamayo_dflash.train.expected import MOST_RESPONSES, expect
from alpamayo_dflash.train.feed import batches_on
from alpamayo_dflash.train.loss import BlockLoss
from alpamayo_dflash.train.optimizer import (
    MAX_GRADIENT_NORM,
    WARMUP_SHARE,
    learning_rate_factor,
    make_optimizer,
)
from alpamayo_dflash.train.real import Evaluate, compared
from alpamayo_dflash.train.terms import ce_weight, shares


@dataclass
class Progress:
    """How far a run has come; what a checkpoint stores of it.

    Attributes:
        step: steps done.
        best_length: acceptance length of the best draft so far, by the trainer's `choice`.
        best_step: the step it was found at; −1 before the first evaluation.
        evaluations: step, epoch and counts of every evaluation.
        losses: step, the loss's terms, the gradient's norm and the learning rate at every log entry; with a
            reduced head also how many of the step's labels it has no row for.
    """

    step: int = 0
    best_length: float = 0.0
    best_step: int = -1
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    losses: list[dict[str, Any]] = field(default_factory=list)


REAL, EXPECTED, SIMULATED = "real acceptance", "expected acceptance", "simulated acceptance"
CHOICES = {
    REAL: "real_acceptance_length",
    EXPECTED: "expected_acceptance_length",
    SIMULATED: "acceptance_length",
}
"""What the best draft may be chosen by, and the number of an evaluation that it is."""


class FirstFault:
    """The first step whose report is not finite, kept on the device, so that noting a step does not wait."""

    def __init__(self, device: str) -> None:
        self._step = torch.full((), -1, device=device)
        self._report = torch.zeros((), device=device)

    def note(self, step: int, report: Tensor) -> None:
        """Look at a step's report."""
        first = ~torch.isfinite(report).all() & (self._step < 0)
        self._step = torch.where(first, step, self._step)
        self._report = torch.where(first, report, self._report)

    def check(self, names: Sequence[str]) -> None:
        """Raise ValueError if there is one; this waits for the device.

        Args:
            names: what a report's numbers are, for the message.
        """
        step = int(self._step)
        if step < 0:
            return
        found = zip(names, self._report.tolist(), strict=True)
        raise ValueError(
            f"the loss or its gradient is not finite at step {step}: "
            f"{', '.join(f'{name} {value:g}' for name, value in found)}; the last checkpoint is whole"
        )


class Trainer:
    """Trains a draft and keeps the best."""

    def __init__(
        self,
        config: TrainConfig,
        draft: DFlashDraft,
        *,
        train: BlockData,
        held_out: BlockData,
        drawn: BlockData | None = None,
        masked_ids: range,
        processes: Processes,
        parents: Mapping[str, str],
        save_best: Callable[[DFlashDraft], None],
        evaluate: Evaluate | None = None,
    ) -> None:
        """Set up optimizer, schedules and progress.

        Args:
            config: the options.
            draft: bound, on this process's device.
            train: responses to train on.
            held_out: responses to walk through.
            drawn: held-out responses that were drawn at a temperature, with the target's logits; the best
                draft is then chosen by what it is expected to accept of them.
            masked_ids: ids that are never proposed.
            processes: this process among the run's.
            parents: hashes of what the draft is made from; checkpoints keep them.
            save_best: writes the draft's folder.
            evaluate: decodes held-out clips with the draft; the best draft is then chosen by what that gives
                at temperature 0.6. Only the first process calls it, but all are to have one or none.

        Raises:
            ValueError: there are fewer blocks than processes, or the warm-up is no shorter than the run.
        """
        self.config, self.draft, self.train = config, draft, train
        self.held_out, self.drawn = held_out, drawn
        self.masked_ids, self.processes, self.save_best = masked_ids, processes, save_best
        self.evaluate = evaluate
        self.parents = dict(parents)
        self.num_blocks = len(train.blocks(range(len(train)), config.data.stride))
        self.steps_per_epoch = step_count(self.num_blocks, config.schedule.batch_size, processes.world_size)
        self.total_steps = config.schedule.num_epochs * self.steps_per_epoch
        if config.schedule.max_steps is not None:
            self.total_steps = min(self.total_steps, config.schedule.max_steps)
        warmup = config.schedule.warmup_steps
        self.warmup_steps = math.ceil(WARMUP_SHARE * self.total_steps) if warmup is None else warmup
        if self.warmup_steps >= self.total_steps > 1:
            raise ValueError(f"warmup_steps is {warmup}; it must be below the run's {self.total_steps} steps")
        self.optimizer = make_optimizer(draft, config, processes.world_size)
        self._peaks = [group["lr"] for group in self.optimizer.param_groups]
        loss = BlockLoss(draft, config)
        self._losses = [term.name for term in loss.terms]
        self.loss: nn.Module = loss
        if processes.world_size > 1:
            self.loss = nn.parallel.DistributedDataParallel(self.loss)
        self.progress = Progress()

    def resume(self, folder: Path, progress: Progress, total_steps: int) -> None:
        """Go on from a checkpoint.

        Raises:
            ValueError: it belongs to another draft or to a run of another length, chose its best draft by
                something else, or is corrupt.
        """
        if total_steps != self.total_steps:
            raise ValueError(f"{folder}: of a run of {total_steps} steps; this one has {self.total_steps}")
        if any(CHOICES[self.choice] not in entry for entry in progress.evaluations):
            raise ValueError(
                f"{folder}: its evaluations lack {CHOICES[self.choice]}, by which the best draft is chosen; "
                "go on with the version that made it, use another output_dir, or --resume never to start over"
            )
        load_training(folder, self.draft, self.optimizer)
        self.progress = progress

    def fit(self, checkpoint: Path, monitor: Monitor) -> None:
        """Train to the end; evaluate and save at the start, every `save_every` steps and every epoch's end.

        Args:
            checkpoint: folder of the checkpoint.
            monitor: told of every step and evaluation.

        Raises:
            ValueError: the loss or its gradient was not finite; this is found out, and the first such step
                named, at the next log entry or evaluation, and nothing is written after that step.
        """
        if self.progress.best_step < 0:
            self._evaluate(monitor)
        fault = FirstFault(self.processes.device)
        for batch in self._batches():
            report = self.step(batch)
            step = self.progress.step
            fault.note(step, report)
            logs, due = step % self.config.run.log_interval == 0 or step == self.total_steps, self._due(step)
            if logs or due:
                fault.check(self._report_names)  # before anything is written
            if logs:
                self.progress.losses.append(self._totals(report))
                monitor.logged(self.progress.losses[-1], self._losses)
            monitor.stepped(step)
            if due:
                self._evaluate(monitor)
                if self.processes.first:
                    save_training(checkpoint, self.draft, self.optimizer, self._state())
                self.processes.wait()

    def _due(self, step: int) -> bool:
        every = self.config.run.save_every
        return (
            step == self.total_steps or step % self.steps_per_epoch == 0 or bool(every and step % every == 0)
        )

    def _batches(self) -> Iterator[BlockBatch]:
        """The batches of this process that are still to come."""

        def parts() -> Iterator[Blocks]:
            start = self.progress.step
            for epoch in range(start // self.steps_per_epoch, -(-self.total_steps // self.steps_per_epoch)):
                blocks = self.train.epoch(self.config.run.seed, epoch, self.config.data.stride)
                for step in range(self.steps_per_epoch):
                    number = epoch * self.steps_per_epoch + step
                    if start <= number < self.total_steps:
                        place = (self.processes.rank, self.processes.world_size)
                        yield blocks[step_share(len(blocks), self.steps_per_epoch, step, *place)]

        return batches_on(self.processes.device, self.train, parts(), self.config.data.num_workers)

    def step(self, batch: BlockBatch) -> Tensor:
        """One step of the optimizer.

        Each term is a weighted mean over the label rows of *all* processes: each divides its own sum by the
        mean weight of a process, and DDP averages the gradients. So more processes with smaller batches take
        the same step as one with a larger batch. The report stays on the device.

        Returns:
            `BlockLoss`'s report, summed over all processes, and the gradient's norm.
        """
        config, progress = self.config, self.progress
        factor = learning_rate_factor(progress.step, self.total_steps, self.warmup_steps)
        for group, peak in zip(self.optimizer.param_groups, self._peaks, strict=True):
            group["lr"] = peak * factor
        self.optimizer.zero_grad()
        device_type = self.processes.device.partition(":")[0]
        with torch.autocast(device_type, torch.bfloat16, enabled=config.run.dtype == "bfloat16"):
            sums, report = self.loss(batch)
        report = self.processes.add(report)
        masses = (report[: len(sums)] / self.processes.world_size).clamp_min(1e-12)
        found = dict(zip(self._losses, zip(sums, masses, strict=True), strict=True))
        # A term of no weight gets no backward pass: 0 times what is not finite would be nan.
        parts = [share * found[name][0] / found[name][1] for name, share in self.shares.items() if share]
        sum(parts[1:], parts[0]).backward()
        norm = nn.utils.clip_grad_norm_(self.draft.parameters(), MAX_GRADIENT_NORM)
        self.optimizer.step()
        progress.step += 1
        return torch.cat((report, norm[None]))

    @property
    def choice(self) -> str:
        """What the best draft is chosen by, a key of `CHOICES`."""
        if self.evaluate is not None:
            return REAL
        return SIMULATED if self.drawn is None else EXPECTED

    @property
    def shares(self) -> dict[str, float]:
        """Weight of each term of the loss at the present step."""
        start, end = self.config.loss.ce_weight_start, self.config.loss.ce_weight_end
        return shares(self.config.loss.terms, ce_weight(self.progress.step, self.total_steps, start, end))

    @property
    def _report_names(self) -> list[str]:
        """What the numbers of a step's report are."""
        weights = [f"weight of {name}" for name in self._losses]
        return [*weights, *self._losses, "labels outside the draft's vocabulary", "gradient norm"]

    def _totals(self, report: Tensor) -> dict[str, Any]:
        """A log entry of the step just done; losses are weighted means."""
        values, count = report.tolist(), len(self._losses)
        masses, sums, (outside, norm) = values[:count], values[count : 2 * count], values[2 * count :]
        means = (total / max(mass, 1e-12) for mass, total in zip(masses, sums, strict=True))
        entry = {"step": self.progress.step, **dict(zip(self._losses, means, strict=True))}
        if self.draft.token_ids is not None:
            entry["labels_outside_vocab"] = int(outside)
        return entry | {"gradient_norm": norm, "learning_rate": self.optimizer.param_groups[0]["lr"]}

    def _evaluate(self, monitor: Monitor) -> None:
        """Walk through the held-out responses, decode if asked to, and keep the draft if it is the best."""
        progress, mine = self.progress, self._share(self.held_out)
        counts = self._added(counts_of(simulate(self.draft, self.held_out, self.masked_ids, mine)))
        entry = {
            "step": progress.step,
            "epoch": progress.step / self.steps_per_epoch,
            "acceptance_length": counts.length,
            "tokens": counts.tokens,
            "passes": int(counts.passes),
        }
        entry |= self._expected() | self._decoded()
        length = entry[CHOICES[self.choice]]
        progress.evaluations.append(entry)
        monitor.evaluated(entry)
        if length > progress.best_length:
            progress.best_length, progress.best_step = length, progress.step
            if self.processes.first:
                self.save_best(self.draft)

    def _share(self, data: BlockData, most: int | None = None) -> Tensor:
        """This process's part of some responses: of all, or of so many that lie evenly among them."""
        places = torch.arange(len(data))
        if most is not None and len(data) > most:
            places = torch.arange(most) * len(data) // most
        return places[self.processes.rank :: self.processes.world_size]

    def _added(self, counts: AcceptanceCounts) -> AcceptanceCounts:
        """The sum of all processes' counts."""
        both = torch.tensor([counts.tokens, counts.passes], dtype=torch.float64, device=self.processes.device)
        tokens, passes = self.processes.add(both).tolist()
        return AcceptanceCounts(int(tokens), passes)

    def _expected(self) -> dict[str, Any]:
        """What drawn responses let expect; nothing where there are none."""
        if self.drawn is None:
            return {}
        counts = self._added(expect(self.draft, self.drawn, self._share(self.drawn, MOST_RESPONSES)))
        return {"expected_acceptance_length": counts.length}

    def _decoded(self) -> dict[str, Any]:
        """What decoding held-out clips gives, on every process; nothing where nobody decodes."""
        if self.evaluate is None:
            return {}
        entry: dict[str, Any] = {}
        if self.processes.first:
            entry = compared(self.draft, self.held_out, self.masked_ids, self.evaluate(self.draft))
        return self.processes.share(entry)

    def _state(self) -> dict[str, Any]:
        return {
            "config": self.config,
            "world_size": self.processes.world_size,
            "progress": self.progress,
            "total_steps": self.total_steps,
            "parents": self.parents,
            "identity": IDENTITY,
        }
