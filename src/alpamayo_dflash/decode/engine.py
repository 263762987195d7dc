"""What writes texts after prompts: a target with its cache, where texts end, proposers, and the rounds.

`SpeculativeDecoder` and `Rollouts` stand on it. It knows nothing of trajectories and times nothing.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

from alpamayo_dflash.common.options import MOST_BLOCK
from alpamayo_dflash.decode.config import DecodeConfig, Request
from alpamayo_dflash.decode.loop import Decoded, Round, decode
from alpamayo_dflash.decode.observer import Observer
from alpamayo_dflash.decode.proposer import (
    BlockDraft,
    Captured,
    DraftProposer,
    Listed,
    Proposers,
    SharedDraft,
)
from alpamayo_dflash.decode.round_device import DeviceRounds
from alpamayo_dflash.decode.round_host import HostRound
from alpamayo_dflash.decode.stops import stop_rules
from alpamayo_dflash.decode.verify import Prefilled, Recording, Verifier
from alpamayo_dflash.target.vlm import Qwen3VLTarget

_DRAFT_FAILED = (  # one text for all, so that Python shows it once
    "the draft failed in some rounds: its logits are not finite, or it raised an error. The target went on "
    "alone there; Result.draft_failures counts them"
)


class Engine:
    """Writes the texts of one prompt at a time.

    Args:
        target: the model.
        draft: proposes blocks; None for none.
        config: see DecodeConfig.
        proposers: propose beside the draft.
        recording: what the verifier records apart from the draft's taps; None for nothing.

    Attributes:
        config: see DecodeConfig.
        draft: bound to the target.
        verifier: the target with its cache, which holds one prompt at a time.
        rules: where texts end.
        device_rounds: the rounds on the device, by shape.

    Raises:
        ValueError: the draft does not fit the target, a proposer is of neither kind, or a layer to record is
            none of the target's.
    """

    def __init__(
        self,
        target: Qwen3VLTarget,
        draft: BlockDraft | None,
        config: DecodeConfig,
        *,
        proposers: Sequence[Listed | Captured] = (),
        recording: Recording | None = None,
    ) -> None:
        self.config = config
        self.draft = draft = None if draft is None else bound(draft, target)
        self.verifier = Verifier(
            target,
            taps=draft.taps if draft is not None else (),
            context_len=draft.context_len if draft is not None else 0,
            prompt_capacity=config.prompt_capacity,
            row_width=config.row_width,
            vision_reuse_bytes=config.vision_reuse_mib * 2**20,
            recording=recording or Recording(),
        )
        self.rules = stop_rules(target, config)
        listed = [proposer for proposer in proposers if isinstance(proposer, Listed)]
        self._captured = [proposer for proposer in proposers if not isinstance(proposer, Listed)]
        for proposer in self._captured:
            if not callable(proposer):
                raise ValueError(f"proposer {proposer!r} must be Listed, or callable as Captured is")
        by_draft = None if draft is None else DraftProposer(draft, self.verifier.cache, self.rules)
        self._host_round = HostRound(self.verifier, self.rules, by_draft, listed)
        self.device_rounds = DeviceRounds(self.verifier, self.rules, Proposers(draft, listed, self._captured))

    def round(self, request: Request, *, scored: bool = False) -> Round:
        """The round that serves a request, on the device or the host.

        Args:
            request: what is asked.
            scored: whether the observer wants scores.

        Raises:
            ValueError: a `Captured` proposer, and the rounds cannot run on the device.
        """
        wanted = self.config.loop
        if wanted == "auto":
            on_gpu = self.verifier.target.device.type == "cuda"
            wanted = "device" if on_gpu or self._captured else "host"
        reason = self.device_rounds.unsuited if wanted == "device" else None
        if wanted == "device" and reason is None:
            return self.device_rounds.round(request, scored=scored)
        if self._captured:
            raise ValueError(
                f"a Captured proposer runs in the device's rounds alone: {reason or 'loop is host'}"
            )
        if reason is not None:
            warnings.warn(f"decoding runs in the plain, slower loop on the host: {reason}", stacklevel=3)
        return self._host_round

    def decode(
        self, round_: Round, prefilled: Prefilled, request: Request, observer: Observer, *, close: bool = True
    ) -> Decoded:
        """Write the samples of a prompt that was read; see `loop.decode`. A draft that fails is warned of."""
        decoded = decode(
            round_,
            self.verifier,
            prefilled,
            request,
            rules=self.rules,
            observer=observer,
            close=close,
        )
        if decoded.draft_failures:
            warnings.warn(_DRAFT_FAILED, stacklevel=3)
        return decoded


def bound(draft: BlockDraft, target: Qwen3VLTarget) -> BlockDraft:
    """A draft bound to a target; where another target has it already, and it may be shared, a copy.

    Raises:
        ValueError: the draft does not fit the target.
    """
    if not 2 <= draft.block_size <= MOST_BLOCK:
        raise ValueError(f"the draft's block_size is {draft.block_size}; it must be 2 to {MOST_BLOCK}")
    # Its class is asked: a wrapper that hands attributes through is itself what proposes.
    if issubclass(type(draft), SharedDraft) and isinstance(draft, SharedDraft):
        draft = draft.apart(target.embedding)
    draft.bind(target.embedding, target.head, target.num_layers)
    return draft
