"""A draft's picks in the device's rounds: its block, and tokens chosen of it with the noise of their places.

Shapes: S sample, b block, B places (b − 1), V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from alpamayo_dflash.decode.config import Sampling
from alpamayo_dflash.decode.proposer import BlockLogits, Chained, StaticBlock, draft_columns
from alpamayo_dflash.decode.sampling import Chooser
from alpamayo_dflash.decode.steps import Picks, State


class DraftPicks:
    """Asks a draft and chooses. It owns buffers; on a GPU it is captured with the round.

    Args:
        block: the draft for one shape.
        samples: S.
        places: B.
        target_ids: the target's V, and its ids that are never chosen.
        sampling: temperature and top_p.
        device: where.
        keep_logits: whether `logits` is kept.

    Attributes:
        logits: [S·B, Vd or more], what the last picks were chosen of, and the target's ids of the columns or
            None; None where that is not kept, or the draft failed.
    """

    def __init__(
        self,
        block: StaticBlock,
        *,
        samples: int,
        places: int,
        target_ids: tuple[int, range],
        sampling: Sampling,
        device: torch.device,
        keep_logits: bool = False,
    ) -> None:
        self._keep = keep_logits
        self.logits: tuple[Tensor, Tensor | None] | None = None
        self._block, self._places = block, places
        self._target_ids, self._sampling = target_ids, sampling
        self._keys = torch.zeros(samples * places, 2, dtype=torch.int64, device=device)
        self._steps = torch.arange(places, device=device)
        self._choose: Chooser | None = None  # made when the draft's first word tells its columns

    def begin(self, keys_S2: Tensor, prompt_length: int) -> None:
        """Texts with these streams of noise begin after a prompt of so many tokens."""
        self._keys.copy_(keys_S2.repeat_interleave(self._places, 0))
        self._block.begin(prompt_length)

    def __call__(self, state: State) -> Picks:
        """The tokens after each sample's last one; what the draft raises is raised."""
        self.logits = None
        block = self._block(state)
        if isinstance(block, Chained):
            return self._one_by_one(block, state)
        logits = block.logits.flatten(0, 1).contiguous()
        places = (state.lengths[:, None] + self._steps).flatten()
        picked = self._chooser(block, len(logits))(logits, self._keys, places)
        if self._keep:
            self.logits = logits, block.token_ids
        return Picks(picked.columns, picked.finite, block.token_ids)

    def _one_by_one(self, block: Chained, state: State) -> Picks:
        """The same of a draft that fills its places in one after the other."""
        ids, choose = block.token_ids, self._chooser(block, state.samples)
        columns = draft_columns(block, self._target_ids[0])
        keys_S2 = self._keys.view(state.samples, -1, 2)[:, 0].contiguous()
        tokens = state.tokens.gather(1, state.lengths[:, None] - 1)[:, 0]
        picked, finite, kept = [], [], []
        for place in range(self._places):
            shift = block.shift(place, None, tokens)
            logits = block.logits[:, place, :columns].float() + shift[:, :columns].float()
            choice = choose(logits, keys_S2, state.lengths + place)
            chosen = choice.columns.clone()  # the chooser's own are written over at the next place
            tokens = chosen if ids is None else ids[chosen]
            picked.append(chosen)
            finite.append(choice.finite.clone())
            kept += [logits] if self._keep else []
        if self._keep:
            self.logits = torch.stack(kept, 1).flatten(0, 1), ids
        return Picks(torch.stack(picked, 1).flatten(), torch.stack(finite, 1).flatten(), ids)

    def _chooser(self, block: BlockLogits, rows: int) -> Chooser:
        if self._choose is None:
            vocab_size, masked = self._target_ids
            self._choose = Chooser(
                rows,
                draft_columns(block, vocab_size),
                masked=masked,
                token_ids=block.token_ids,
                sampling=self._sampling,
                device=self._keys.device,
            )
        return self._choose
