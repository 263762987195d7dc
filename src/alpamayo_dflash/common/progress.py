"""What a person sees of a training run: a live line on the terminal and TensorBoard logs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from alpamayo_dflash.common.extras import needs

_FLUSH_S = 10
"""How long an event may wait to be seen by who reads the logs; TensorBoard's own are two minutes."""


class Monitor:
    """Is told how a run goes; this one shows nothing."""

    def stepped(self, step: int) -> None:
        """A step is done."""

    def logged(self, entry: dict[str, Any], losses: Sequence[str]) -> None:
        """A log entry: step, gradient_norm, learning_rate and, by these names, losses."""

    def evaluated(self, entry: dict[str, Any]) -> None:
        """An evaluation: step, acceptance_length, tokens, passes, and `expected_…` and `real_…` if any."""


class Live(Monitor):
    """A progress line on standard error, and TensorBoard event files. Use it as a context manager."""

    def __init__(self, logs: Path, total_steps: int, first_step: int) -> None:
        """Open both.

        Args:
            logs: folder of the event files.
            total_steps: of the run.
            first_step: steps done already; entries after it, of an interrupted run, are hidden.
        """
        with needs("train"):
            from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(logs, purge_step=first_step + 1, flush_secs=_FLUSH_S)
        self._writer.add_scalar("run/total_steps", total_steps, first_step)  # for who reads the logs alone
        self._bar = Progress(
            TextColumn("train"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[loss]}"),
            TextColumn("{task.fields[acceptance]}"),
            console=Console(stderr=True),
        )
        self._task = self._bar.add_task("", total=total_steps, completed=first_step, loss="", acceptance="")

    def __enter__(self) -> Live:
        self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.stop()
        self._writer.close()

    def stepped(self, step: int) -> None:
        """Move the bar."""
        self._bar.update(self._task, completed=step)

    def logged(self, entry: dict[str, Any], losses: Sequence[str]) -> None:
        """Show and log losses."""
        self._bar.update(self._task, loss=" ".join(f"{name} {entry[name]:.3f}" for name in losses))
        self._log("train", entry)

    def evaluated(self, entry: dict[str, Any]) -> None:
        """Show and log the acceptance lengths, and say where simulated and real ones part."""
        shown = f"acceptance {entry['acceptance_length']:.2f}"
        if "expected_acceptance_length" in entry:
            shown += f" expected {entry['expected_acceptance_length']:.2f}"
        if "real_acceptance_length" in entry:
            shown += f" real {entry['real_acceptance_length']:.2f}"
        self._bar.update(self._task, acceptance=shown)
        if "real_difference" in entry:
            self._bar.console.print(_difference(entry), style="red", highlight=False, markup=False)
        self._log("held_out", entry)

    def _log(self, group: str, entry: dict[str, Any]) -> None:
        for name, value in entry.items():
            if name != "step" and isinstance(value, (int, float)):
                self._writer.add_scalar(f"{group}/{name}", value, entry["step"])


def _difference(entry: dict[str, Any]) -> str:
    """Where a real greedy walk first left the simulated one, in a sentence."""
    first = entry["real_difference"]
    what = {
        "text": "the target wrote another token than the data has",
        "accepted": "one of the two took the draft's token and the other did not",
    }[first["what"]]
    return (
        f"step {entry['step']}: simulated and real acceptance differ on {entry['real_differing']} of "
        f"{entry['real_compared']} clips, first on {first['clip_id']} at token {first['place']}: {what}"
    )
