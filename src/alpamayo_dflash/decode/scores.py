"""What target and draft thought of a round's places, for observers that want it (`Observer.wants_scores`).

The host's rounds score what they look at; a device round has a second report of its own, `RoundScores`. Both
ask `Scorer`, after the tokens are chosen, so that it changes none of them.

Shapes: S sample, b block, W rows of one sample, R rows, V vocabulary (of the target, or of a draft's
reduced head).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from alpamayo_dflash.common.nucleus import nucleus
from alpamayo_dflash.decode.config import Sampling
from alpamayo_dflash.decode.observer import PlaceScores
from alpamayo_dflash.decode.sampling import mask_bias

TOP = 8
"""How many of the likeliest tokens are named."""
NOTHING_CHOSEN = -1
_WIDTH = 2 * TOP + 7  # ids, their logits, four numbers of the row, and the chosen token with two of its own


class Scorer:
    """Scores rows of logits; it launches work and reads nothing back, so it can be captured.

    Args:
        target_ids: the target's V, and its ids that are never chosen.
        sampling: temperature and top_p of the decode.
        token_ids: int64 [V], the target's id of each column of a reduced head, or None.
        device: where.
    """

    def __init__(
        self,
        target_ids: tuple[int, range],
        sampling: Sampling,
        *,
        token_ids: Tensor | None = None,
        device: torch.device,
    ) -> None:
        vocab_size, masked = target_ids
        self._columns = vocab_size if token_ids is None else len(token_ids)
        self.token_ids = token_ids
        self._bias = mask_bias(masked, self._columns, token_ids).to(device)
        self._sampling = Sampling(1.0, 1.0) if sampling.greedy else sampling
        self._column_of: Tensor | None = None  # by the target's id; -1 where the head lacks it
        if token_ids is not None:
            at = torch.arange(len(token_ids), device=device)
            self._column_of = torch.full((vocab_size,), -1, device=device).scatter(0, token_ids, at)

    def __call__(self, logits_RV: Tensor, chosen_R: Tensor) -> Tensor:
        """Score.

        Args:
            logits_RV: [R, V or more] in any float type; columns from V on are not read.
            chosen_R: int64, the target's ids; `NOTHING_CHOSEN` for none.

        Returns:
            float64 [R, ...], which holds ids and float32 exactly; `place_scores` reads it on the host.
        """
        raw = logits_RV[:, : self._columns].float()
        logits = raw + self._bias
        tempered = torch.add(self._bias, raw, alpha=1 / self._sampling.temperature)
        probabilities = tempered.softmax(-1)
        inside = nucleus(probabilities, self._sampling.top_p) & (self._bias == 0)
        of_row = (
            logits.logsumexp(-1),
            tempered.logsumexp(-1),
            probabilities.masked_fill(~inside, 0.0).sum(-1),
            logits.masked_fill(~inside, float("inf")).amin(-1),
        )
        parts = (*self._likeliest(logits), *(each[:, None] for each in of_row))
        return torch.cat([each.double() for each in (*parts, *self._chosen(logits, chosen_R))], dim=1)

    def _likeliest(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """The ids and logits of the first `TOP`, of fewer columns with padding of logit minus infinity."""
        best = logits.topk(min(TOP, self._columns), dim=-1)
        ids = best.indices if self.token_ids is None else self.token_ids[best.indices]
        room = (0, TOP - ids.shape[1])
        return torch.nn.functional.pad(ids, room), torch.nn.functional.pad(
            best.values, room, value=float("-inf")
        )

    def _chosen(self, logits: Tensor, chosen_R: Tensor) -> tuple[Tensor, ...]:
        """The chosen tokens, their logits (not a number for those without) and ranks (then −1)."""
        columns = chosen_R
        if self._column_of is not None:
            columns = torch.where(chosen_R < 0, chosen_R, self._column_of[chosen_R.clamp_min(0)])
        lacking = (columns < 0)[:, None]
        logit = logits.gather(1, columns.clamp_min(0)[:, None])
        rank = (logits > logit).sum(-1, keepdim=True).masked_fill(lacking, -1)
        return chosen_R[:, None], logit.masked_fill(lacking, float("nan")), rank


def place_scores(row: Sequence[float]) -> PlaceScores:
    """One row of what `Scorer` gives."""
    pairs = [pair for pair in zip(row[:TOP], row[TOP : 2 * TOP], strict=True) if pair[1] != -math.inf]
    whole, tempered, mass, least, chosen, logit, rank = row[2 * TOP :]
    return PlaceScores(
        ids=tuple(int(token) for token, _ in pairs),
        logits=tuple(logit for _, logit in pairs),
        log_sum_exp=whole,
        tempered_log_sum_exp=tempered,
        nucleus_mass=mass,
        nucleus_logit=least,
        chosen=None if chosen < 0 else int(chosen),
        chosen_logit=None if math.isnan(logit) else logit,
        chosen_rank=None if rank < 0 else int(rank),
    )


def score_all(scorer: Scorer, logits_RV: Tensor, chosen: Sequence[int]) -> list[PlaceScores]:
    """Score rows and read them, each with the token chosen there (`NOTHING_CHOSEN` for none)."""
    chosen_R = torch.tensor(list(chosen), dtype=torch.int64, device=logits_RV.device)
    rows: list[list[float]] = scorer(logits_RV, chosen_R).tolist()
    return [place_scores(row) for row in rows]


Scored = tuple[list[PlaceScores], list[PlaceScores]]
"""A sample's places in a device round: after each of the target's W rows, and the draft's b − 1."""


class RoundScores:
    """A device round's second report: buffers of its own; on a GPU it is captured with the round.

    Args:
        target_ids: the target's V, and its ids that are never chosen.
        sampling: temperature and top_p.
        samples: S.
        rows: W.
        places: b − 1.
        device: where.
    """

    def __init__(
        self,
        target_ids: tuple[int, range],
        sampling: Sampling,
        *,
        samples: int,
        rows: int,
        places: int,
        device: torch.device,
    ) -> None:
        self._made = target_ids, sampling
        self._samples, self._rows, self._places = samples, rows, places
        self._target = Scorer(*self._made, device=device)
        self._draft: Scorer | None = None  # made when the draft's first word tells its columns
        pinned = device.type == "cuda"
        self._report, self._draft_report = (
            torch.zeros(samples, count, _WIDTH, dtype=torch.float64, device="cpu", pin_memory=pinned)
            for count in (rows, places)
        )

    def __call__(
        self,
        logits_RV: Tensor,
        columns_R: Tensor,
        settled_R: Tensor,
        draft: tuple[Tensor, Tensor | None] | None,
    ) -> None:
        """Score a round and enqueue the copy to the host.

        Args:
            logits_RV: the target's, [S·W or more, V or more].
            columns_R: int64, the target's choice after each row.
            settled_R: bool, whether that is known.
            draft: its logits [S·(b − 1), V or more] and its `token_ids`; None without one.
        """
        rows = self._samples * self._rows
        chosen = columns_R[:rows].masked_fill(~settled_R[:rows].bool(), NOTHING_CHOSEN)
        self._report.copy_(self._target(logits_RV[:rows], chosen).view(self._report.shape), non_blocking=True)
        if draft is not None:
            logits, ids = draft
            if self._draft is None:
                self._draft = Scorer(*self._made, token_ids=ids, device=logits.device)
            wanted = chosen.view(self._samples, self._rows)[:, : self._places].flatten()
            places = self._draft(logits, wanted).view(self._draft_report.shape)
            self._draft_report.copy_(places, non_blocking=True)

    def read(self) -> list[Scored]:
        """By sample the target's W places and the draft's b − 1; the device must have come so far."""
        target, draft = (
            [[place_scores(row) for row in sample] for sample in report.tolist()]
            for report in (self._report, self._draft_report)
        )
        return list(zip(target, draft, strict=True))
