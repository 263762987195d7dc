"""Where a Chain-of-Causation ends, and what is proposed at its end.

Pure functions on token ids. The end of a CoC is `<|cot_end|>` and then `<|traj_future_start|>`.

What the modes do (`DecodeConfig.sentence_end`), P standing for the period, E for `<|cot_end|>`, T for
`<|traj_future_start|>`:

- every mode: E in a proposal, or as anchor, is followed by T, and nothing is proposed after T or eos.
- `hint`: P in a proposal, or as anchor, is followed by E T. A draft is not asked after a P that is the
  anchor. The target decides, so the output does not change.
- `force`, the first prototype's two rules, not lossless: (1) when the anchor is P, E T are *emitted*, as far
  as the token limit allows, and the sample stops; neither draft nor target is asked. (2) where the draft
  proposes E with no P before it, P is proposed in its place and the proposal ends there; the target verifies
  that P as it does any proposed token, and if it accepts it, the pass ends without the target's own token
  after it: P is the next anchor, and rule 1 acts on it.
- `off`: nothing more than every mode does.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from alpamayo_dflash.decode.config import DecodeConfig, SentenceEnd
from alpamayo_dflash.target.vlm import Qwen3VLTarget


class StopReason(StrEnum):
    """Why a sample's text ended."""

    TRAJ_FUTURE_START = "traj_future_start"
    EOS = "eos"
    LIMIT = "limit"
    FORCED = "forced"  # the end marks were written by `force`, not by the target


@dataclass(frozen=True)
class StopRules:
    """The tokens that matter at a CoC's end, and the mode.

    Attributes:
        cot_end: id of `<|cot_end|>`; None, like the next, in a bare Qwen3-VL's vocabulary without it. Then
            texts end at eos alone, and no end marks are proposed or forced.
        traj_future_start: id of `<|traj_future_start|>`.
        eos: ids that end a turn, `<|im_end|>` above all.
        period: id of the sentence's period; None if the tokenizer has no single token for it, and then
            `hint` and `force` do nothing.
        mode: see the module's text.
    """

    cot_end: int | None
    traj_future_start: int | None
    eos: tuple[int, ...]
    period: int | None
    mode: SentenceEnd = "hint"

    def reason(self, token: int) -> StopReason | None:
        """Why decoding stops after `token`, or None if it goes on."""
        if token == self.traj_future_start:
            return StopReason.TRAJ_FUTURE_START
        return StopReason.EOS if token in self.eos else None

    def forced(self, previous: int) -> int | None:
        """The token that a proposal always goes on with after `previous`, or None."""
        if self.cot_end is None or self.traj_future_start is None:
            return None
        if previous == self.cot_end:
            return self.traj_future_start
        return self.cot_end if self.mode == "hint" and previous == self.period else None

    @property
    def most_forced(self) -> int:
        """How many tokens `forced` puts one after the other at most."""
        if self.cot_end is None or self.traj_future_start is None:
            return 0
        return 2 if self.mode == "hint" and self.period is not None else 1

    def forced_end(self, anchor: int) -> list[int]:
        """The tokens that `force` emits after this anchor without asking (rule 1), or none."""
        if self.mode != "force" or anchor != self.period:
            return []
        return [mark for mark in (self.cot_end, self.traj_future_start) if mark is not None]

    def ends_sentence(self, previous: int, token: int) -> bool:
        """Whether a period, and nothing more, is proposed in the place of `token` (rule 2)."""
        return self.mode == "force" and token == self.cot_end and self.period not in (None, previous)


def stop_rules(target: Qwen3VLTarget, config: DecodeConfig) -> StopRules:
    """The target's end tokens."""
    special = target.special
    return StopRules(
        cot_end=special.cot_end,
        traj_future_start=special.traj_future_start,
        eos=special.ends,
        period=special.period,
        mode=config.sentence_end,
    )
