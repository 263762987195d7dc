"""From logits to tokens: mask, temper, cut the nucleus, add noise, take the arg max.

One nucleus predicate holds everywhere: a token is in if the mass of strictly more probable tokens is below
top_p, so equally probable tokens are in or out together. The same functions serve target and draft.

Shapes: R rows, V vocabulary (of the target, or of a draft's reduced head).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from alpamayo_dflash.decode.config import Sampling
from alpamayo_dflash.decode.noise import row_noise


def mask_bias(masked: range, vocab_size: int, token_ids: Tensor | None = None) -> Tensor:
    """What to add to logits so that masked target ids are never chosen.

    Args:
        masked: target ids that generation masks (the trajectory tokens).
        vocab_size: V, columns of the logits.
        token_ids: int64 [V], the target id of each column; None where column and id are the same.

    Returns:
        float32 [V], 0 or minus infinity.
    """
    ids = torch.arange(vocab_size) if token_ids is None else token_ids
    hidden = (ids >= masked.start) & (ids < masked.stop)
    return torch.zeros(vocab_size, device=ids.device).masked_fill_(hidden, float("-inf"))


def nucleus(probabilities_RV: Tensor, top_p: float) -> Tensor:
    """Return bool [R, V]: the tokens for which the mass of strictly more probable tokens is below top_p."""
    if top_p >= 1:
        return torch.ones_like(probabilities_RV, dtype=torch.bool)
    ranked = probabilities_RV.sort(dim=-1, descending=True).values
    before = torch.nn.functional.pad(ranked.cumsum(-1)[..., :-1], (1, 0))
    # A tie's first member decides for all of it, and it is the last to pass if any passes: so the nucleus
    # is everything at least as probable as the last rank that passes.
    last = (before < top_p).sum(-1, keepdim=True).clamp_min(1) - 1
    return probabilities_RV >= ranked.gather(-1, last)


def distribution(logits_RV: Tensor, bias_V: Tensor, sampling: Sampling) -> Tensor:
    """The probabilities that `choose` draws from.

    Args:
        logits_RV: float32 [R, V].
        bias_V: from `mask_bias`.
        sampling: temperature and top_p.

    Returns:
        float32 [R, V]: tempered, cut to the nucleus and summing to 1; one-hot where sampling is greedy.
    """
    if sampling.greedy:
        best = (logits_RV + bias_V).argmax(-1)
        return torch.nn.functional.one_hot(best, logits_RV.shape[-1]).to(logits_RV.dtype)
    probabilities = torch.add(bias_V, logits_RV, alpha=1 / sampling.temperature).softmax(-1)
    kept = probabilities.masked_fill(~nucleus(probabilities, sampling.top_p), 0.0)
    return kept / kept.sum(-1, keepdim=True)


def choose(logits_RV: Tensor, bias_V: Tensor, sampling: Sampling, noise_RV: Tensor | None = None) -> Tensor:
    """Choose one token a row.

    Greedy: the arg max, the lowest id on ties. Otherwise the arg max of `log p + g` over the nucleus of the
    tempered distribution p, which with Gumbel noise g is a draw from it (design, invariant 2).

    The arg max over all tokens is taken first. Where the mass above it shows that it lies in the nucleus, it
    is the answer, and nothing need be sorted; the few other rows are done again over their nucleus.

    Args:
        logits_RV: float32 [R, V].
        bias_V: from `mask_bias`.
        sampling: temperature and top_p.
        noise_RV: float32 [R, V] Gumbel noise; not read if greedy.

    Returns:
        int64 [R] column indices.
    """
    if sampling.greedy:
        return (logits_RV + bias_V).argmax(-1)
    assert noise_RV is not None, "sampling needs noise"
    scores = torch.add(bias_V, logits_RV, alpha=1 / sampling.temperature)
    perturbed = scores + noise_RV
    picks = perturbed.argmax(-1)
    if sampling.top_p >= 1:
        return picks
    probabilities = scores.softmax(-1)
    above = (probabilities * (probabilities > probabilities.gather(-1, picks.unsqueeze(-1)))).sum(-1)
    outside = (above >= sampling.top_p).nonzero().flatten()
    if len(outside):
        inside = nucleus(probabilities[outside], sampling.top_p)
        picks[outside] = perturbed[outside].masked_fill(~inside, float("-inf")).argmax(-1)
    return picks


_MISSED = 1e-6
"""About the share of rows for which no candidate lies in the nucleus, and which are sorted."""
_BLOCK_V = 2048


@dataclass(frozen=True)
class Choice:
    """One token a row. The tensors are the chooser's own, and the next call overwrites them.

    Attributes:
        columns: int64 [R], columns of the logits.
        settled: bool [R]; false where none of the candidates lies in the nucleus, and then `exactly` knows.
        finite: bool [R], whether all of the row's logits are.
    """

    columns: Tensor
    settled: Tensor
    finite: Tensor


class Chooser:
    """Chooses as `sampling.choose` does.

    Args:
        rows: R.
        vocab: V.
        masked: target ids that are never chosen.
        token_ids: int64 [V], the target id of each column of a reduced head, or None.
        sampling: temperature and top_p.
        device: where; on a GPU the kernels run, elsewhere PyTorch's operations.
    """

    def __init__(
        self,
        rows: int,
        vocab: int,
        *,
        masked: range,
        token_ids: Tensor | None,
        sampling: Sampling,
        device: torch.device,
        kernels: bool | None = None,
    ) -> None:
        self._rows, self._vocab, self._masked = rows, vocab, masked
        self._ids, self._sampling = token_ids, sampling
        self._kernels = device.type == "cuda" if kernels is None else kernels
        self._bias = mask_bias(masked, vocab, token_ids).to(device)
        if self._kernels:
            self._allocate(device)

    def _allocate(self, device: torch.device) -> None:
        def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.empty(self._rows, *shape, dtype=dtype, device=device)

        count = -(-self._vocab // _BLOCK_V)
        self._chunks = count
        places = 1 if self._first else self._candidates
        self._tops, self._masses = empty(count), empty(count)
        self._chunk_finite = empty(count, dtype=torch.int32)
        self._values, self._columns = empty(count, places), empty(count, places, dtype=torch.int32)
        self._best_columns, self._best_scores = empty(places, dtype=torch.int32), empty(places)
        self._normaliser, self._above = empty(), empty(count, places)
        self._choice = Choice(
            empty(dtype=torch.int64).zero_(), empty(dtype=torch.bool).fill_(True), empty(dtype=torch.bool)
        )

    @property
    def _candidates(self) -> int:
        """How many perturbed logits are tested; each lies outside the nucleus with the mass outside it."""
        outside = min(max(1 - self._sampling.top_p, 1e-9), 1 - 1e-9)
        wanted = math.log(_MISSED) / math.log(outside)
        return next((count for count in (2, 4, 8) if count >= wanted), 16)

    @property
    def _first(self) -> bool:
        """Whether the best perturbed logit is the answer."""
        return self._sampling.greedy or self._sampling.top_p >= 1

    def __call__(self, logits_RV: Tensor, keys_R2: Tensor, positions_R: Tensor) -> Choice:
        """Choose.

        Args:
            logits_RV: [R, V or more] in any float type; columns from V on are not read.
            keys_R2: int64, each row's stream (`noise.stream_keys`).
            positions_R: int64, index of the chosen token among the generated ones.
        """
        if self._kernels:
            return self._run(logits_RV, keys_R2, positions_R)
        logits = logits_RV[:, : self._vocab].float()
        columns = self.exactly(logits, keys_R2, positions_R)
        finite = torch.isfinite(logits).all(-1)
        return Choice(columns, torch.ones_like(finite), finite)

    def exactly(self, logits_RV: Tensor, keys_R2: Tensor, positions_R: Tensor) -> Tensor:
        """The choice by PyTorch's operations, with a sort where it takes one; it may read the device."""
        noise = None
        if not self._sampling.greedy:
            noise = row_noise(keys_R2, positions_R, self._vocab, self._ids)
        return choose(logits_RV[:, : self._vocab].float(), self._bias, self._sampling, noise)

    def _run(self, logits: Tensor, keys: Tensor, positions: Tensor) -> Choice:
        assert logits.stride(1) == 1 and len(logits) == self._rows
        self._find(logits, keys, positions)
        if not self._first:
            self._settle(logits)
        return self._choice

    @property
    def _scaled(self) -> tuple[float, int, int]:
        """What logits are multiplied by, and the masked ids, as the kernels take them."""
        inverse = 1.0 if self._sampling.greedy else 1 / self._sampling.temperature
        return inverse, self._masked.start, self._masked.stop

    def _find(self, logits: Tensor, keys: Tensor, positions: Tensor) -> None:
        """The best perturbed logits in order; where the best is the answer, that is all."""
        from alpamayo_dflash.kernels import sampling as kernels

        choice, places = self._choice, 1 if self._first else self._candidates
        kernels.candidates_kernel[(self._rows, self._chunks)](
            logits,
            logits.stride(0),
            logits if self._ids is None else self._ids,
            keys,
            positions,
            self._tops,
            self._masses,
            self._chunk_finite,
            self._values,
            self._columns,
            self._vocab,
            self._chunks,
            *self._scaled,
            GREEDY=self._sampling.greedy,
            REDUCED=self._ids is not None,
            CANDIDATES=places,
            BLOCK_V=_BLOCK_V,
            num_warps=8,
        )
        kernels.rank_kernel[(self._rows,)](
            logits,
            logits.stride(0),
            self._tops,
            self._masses,
            self._chunk_finite,
            self._values,
            self._columns,
            self._best_columns,
            self._best_scores,
            self._normaliser,
            choice.columns,
            choice.settled,
            choice.finite,
            self._chunks,
            self._scaled[0],
            FIRST=self._first,
            CANDIDATES=places,
            BLOCK_M=self._block_m,
            num_warps=4,
        )

    def _settle(self, logits: Tensor) -> None:
        """Of the candidates the first that lies in the nucleus."""
        from alpamayo_dflash.kernels import sampling as kernels

        kernels.mass_kernel[(self._rows, self._chunks)](
            logits,
            logits.stride(0),
            logits if self._ids is None else self._ids,
            self._best_scores,
            self._normaliser,
            self._above,
            self._vocab,
            self._chunks,
            *self._scaled,
            REDUCED=self._ids is not None,
            CANDIDATES=self._candidates,
            BLOCK_V=_BLOCK_V,
            num_warps=8,
        )
        kernels.settle_kernel[(self._rows,)](
            self._best_columns,
            self._best_scores,
            self._above,
            self._choice.columns,
            self._choice.settled,
            self._chunks,
            self._sampling.top_p,
            CANDIDATES=self._candidates,
            BLOCK_M=self._block_m,
            num_warps=4,
        )

    @property
    def _block_m(self) -> int:
        """A power of two from 2 on that holds a row's chunks."""
        return max(2, 1 << (self._chunks - 1).bit_length())
