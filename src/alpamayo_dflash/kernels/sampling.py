"""`sampling.choose` without a sort, as kernels; the noise of `decode.noise` is made where it is used.

The best few of the perturbed logits are found, and of each the mass above it. The first of them that lies in
the nucleus is the choice: whatever is better than it does not.

Shapes: R rows, V columns, M chunks of columns, N candidates.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

_WORD = tl.constexpr(2.0**-32)


@triton.jit
def _gumbel(position, ids, key0, key1):
    """Noise of token ids at a position, float32 (see `noise.row_noise`)."""
    c0 = (ids // 4).to(tl.uint32)
    c1 = position.to(tl.uint32) + tl.zeros_like(c0)
    c2 = tl.zeros_like(c0)
    c3 = tl.zeros_like(c0)
    k0 = key0.to(tl.uint32)
    k1 = key1.to(tl.uint32)
    m0 = tl.full(c0.shape, 0xD2511F53, tl.uint32)
    m1 = tl.full(c0.shape, 0xCD9E8D57, tl.uint32)
    s0 = tl.full((1,), 0x9E3779B9, tl.uint32)
    s1 = tl.full((1,), 0xBB67AE85, tl.uint32)
    k0 = k0 + tl.zeros_like(s0)
    k1 = k1 + tl.zeros_like(s1)
    for _ in tl.static_range(10):
        high0 = tl.umulhi(c0, m0)
        low0 = c0 * m0
        high1 = tl.umulhi(c2, m1)
        low1 = c2 * m1
        c0 = high1 ^ c1 ^ k0
        c1 = low1
        c2 = high0 ^ c3 ^ k1
        c3 = low0
        k0 = k0 + s0
        k1 = k1 + s1
    which = ids % 4
    word = tl.where(which == 0, c0, tl.where(which == 1, c1, tl.where(which == 2, c2, c3)))
    uniform = (word.to(tl.float64) + 0.5) * _WORD
    return (-tl.log(-tl.log(uniform))).to(tl.float32)


@triton.jit
def _inverse(keys_ptr, row, inverse_temperature):
    """What a row's logits are multiplied by: 1 where it has no key of noise, and so is greedy."""
    return tl.where(tl.load(keys_ptr + 2 * row) < 0, 1.0, inverse_temperature)


@triton.jit
def _scores(
    logits_ptr, ids_ptr, column, inside, inverse_temperature, mask_start, mask_stop, REDUCED: tl.constexpr
):
    """Tempered, masked logits of some columns, with their target ids and whether all logits are finite.

    One that is not finite is never the best: a NaN has no place in a comparison.
    """
    logits = tl.load(logits_ptr + column, mask=inside, other=0.0).to(tl.float32)
    ids = tl.load(ids_ptr + column, mask=inside, other=0) if REDUCED else column.to(tl.int64)
    finite = (logits == logits) & (tl.abs(logits) < float("inf"))
    hidden = (ids >= mask_start) & (ids < mask_stop)
    scores = tl.where(hidden | ~inside | ~finite, -float("inf"), logits * inverse_temperature)
    return scores, ids, tl.min(finite.to(tl.int32), axis=0)


@triton.jit(do_not_specialize=["mask_start", "mask_stop"])
def candidates_kernel(
    logits_ptr,
    stride,
    ids_ptr,
    keys_ptr,
    positions_ptr,
    tops_ptr,
    masses_ptr,
    finite_ptr,
    values_ptr,
    columns_ptr,
    vocab,
    chunks,
    inverse_temperature,
    mask_start,
    mask_stop,
    GREEDY: tl.constexpr,
    REDUCED: tl.constexpr,
    CANDIDATES: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Program (r, m): of a chunk of row r, the largest score, the sum of exp, the best perturbed scores."""
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    column = chunk * BLOCK_V + tl.arange(0, BLOCK_V)
    inside = column < vocab
    scores, ids, finite = _scores(
        logits_ptr + row * stride,
        ids_ptr,
        column,
        inside,
        _inverse(keys_ptr, row, inverse_temperature),
        mask_start,
        mask_stop,
        REDUCED,
    )
    at = row * chunks + chunk
    tl.store(finite_ptr + at, finite)
    perturbed = scores
    if not GREEDY:
        top = tl.max(scores, axis=0)
        safe = tl.where(top == -float("inf"), 0.0, top)
        tl.store(tops_ptr + at, top)
        tl.store(masses_ptr + at, tl.sum(tl.exp(scores - safe), axis=0))
        key0 = tl.load(keys_ptr + 2 * row)
        noise = _gumbel(tl.load(positions_ptr + row), ids, key0, tl.load(keys_ptr + 2 * row + 1))
        perturbed = scores + tl.where(key0 < 0, 0.0, noise)
    for rank in tl.static_range(CANDIDATES):
        value, best = tl.max(perturbed, axis=0, return_indices=True, return_indices_tie_break_left=True)
        tl.store(values_ptr + at * CANDIDATES + rank, value)
        # Where all is -inf any place may be the best one; no column beyond the last is ever named.
        tl.store(columns_ptr + at * CANDIDATES + rank, tl.minimum(chunk * BLOCK_V + best, vocab - 1))
        perturbed = tl.where(tl.arange(0, BLOCK_V) == best, -float("inf"), perturbed)


@triton.jit
def rank_kernel(
    logits_ptr,
    stride,
    keys_ptr,
    tops_ptr,
    masses_ptr,
    finite_ptr,
    values_ptr,
    columns_ptr,
    best_columns_ptr,
    best_scores_ptr,
    normaliser_ptr,
    chosen_ptr,
    settled_ptr,
    all_finite_ptr,
    chunks,
    inverse_temperature,
    FIRST: tl.constexpr,
    CANDIDATES: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """Program r: the best of the chunks' candidates in order; FIRST: the first of them is the choice."""
    row = tl.program_id(0).to(tl.int64)
    m = tl.arange(0, BLOCK_M)
    inside = m < chunks
    finite = tl.load(finite_ptr + row * chunks + m, mask=inside, other=1)
    tl.store(all_finite_ptr + row, tl.min(finite, axis=0).to(tl.int1))
    i = tl.arange(0, BLOCK_M * CANDIDATES)
    real = i < chunks * CANDIDATES
    values = tl.load(values_ptr + row * chunks * CANDIDATES + i, mask=real, other=-float("inf"))
    if not FIRST:
        tops = tl.load(tops_ptr + row * chunks + m, mask=inside, other=-float("inf"))
        masses = tl.load(masses_ptr + row * chunks + m, mask=inside, other=0.0)
        top = tl.max(tops, axis=0)
        total = tl.sum(masses * tl.exp(tops - top), axis=0)
        tl.store(normaliser_ptr + row, top + tl.log(total))
    for rank in tl.static_range(1 if FIRST else CANDIDATES):
        _, best = tl.max(values, axis=0, return_indices=True, return_indices_tie_break_left=True)
        best = tl.minimum(best, chunks * CANDIDATES - 1)
        column = tl.load(columns_ptr + row * chunks * CANDIDATES + best)
        if FIRST:
            tl.store(chosen_ptr + row, column.to(tl.int64))
            tl.store(settled_ptr + row, (column >= 0).to(tl.int1))
        else:
            score = tl.load(logits_ptr + row * stride + column).to(tl.float32)
            score = score * _inverse(keys_ptr, row, inverse_temperature)
            # A place without a candidate (fewer columns than places) must never pass.
            value = tl.max(values, axis=0)
            score = tl.where(value == -float("inf"), -float("inf"), score)
            tl.store(best_columns_ptr + row * CANDIDATES + rank, column)
            tl.store(best_scores_ptr + row * CANDIDATES + rank, score)
            values = tl.where(i == best, -float("inf"), values)


@triton.jit(do_not_specialize=["mask_start", "mask_stop"])
def mass_kernel(
    logits_ptr,
    stride,
    ids_ptr,
    keys_ptr,
    best_scores_ptr,
    normaliser_ptr,
    above_ptr,
    vocab,
    chunks,
    inverse_temperature,
    mask_start,
    mask_stop,
    REDUCED: tl.constexpr,
    CANDIDATES: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Program (r, m): the mass in a chunk that is strictly more probable than each candidate."""
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    column = chunk * BLOCK_V + tl.arange(0, BLOCK_V)
    scores, _, _ = _scores(
        logits_ptr + row * stride,
        ids_ptr,
        column,
        column < vocab,
        _inverse(keys_ptr, row, inverse_temperature),
        mask_start,
        mask_stop,
        REDUCED,
    )
    probabilities = tl.exp(scores - tl.load(normaliser_ptr + row))
    for rank in tl.static_range(CANDIDATES):
        candidate = tl.load(best_scores_ptr + row * CANDIDATES + rank)
        above = tl.sum(tl.where(scores > candidate, probabilities, 0.0), axis=0)
        tl.store(above_ptr + (row * chunks + chunk) * CANDIDATES + rank, above)


@triton.jit
def settle_kernel(
    best_columns_ptr,
    best_scores_ptr,
    above_ptr,
    chosen_ptr,
    settled_ptr,
    chunks,
    top_p,
    CANDIDATES: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """Program r: the first candidate in the nucleus."""
    row = tl.program_id(0).to(tl.int64)
    m = tl.arange(0, BLOCK_M)
    n = tl.arange(0, CANDIDATES)
    at = (row * chunks + m[:, None]) * CANDIDATES + n[None, :]
    above = tl.sum(tl.load(above_ptr + at, mask=(m < chunks)[:, None], other=0.0), axis=0)
    real = tl.load(best_scores_ptr + row * CANDIDATES + n) > -float("inf")
    inside = (above < top_p) & real
    first = tl.min(tl.where(inside, n, CANDIDATES), axis=0)
    tl.store(settled_ptr + row, (first < CANDIDATES).to(tl.int1))
    taken = tl.where(first < CANDIDATES, first, 0)
    tl.store(chosen_ptr + row, tl.load(best_columns_ptr + row * CANDIDATES + taken).to(tl.int64))


_MISSED = 1e-6
"""About the share of rows for which no candidate lies in the nucleus, and which are sorted."""
_BLOCK_V = 2048


class Candidates:
    """The kernels with their buffers, for one number of rows and columns.

    Args:
        rows: R.
        vocab: V.
        masked: target ids that are never chosen.
        token_ids: int64 [V], the target id of each column, or None where they are the same.
        temperature: 0 takes the arg max.
        top_p: nucleus mass.
        device: where.
    """

    def __init__(
        self,
        rows: int,
        vocab: int,
        masked: range,
        token_ids: Tensor | None,
        *,
        temperature: float,
        top_p: float,
        device: torch.device,
    ) -> None:
        self._rows, self._vocab, self._ids, self._top_p = rows, vocab, token_ids, top_p
        self._greedy = temperature == 0
        self._first = self._greedy or top_p >= 1  # the best perturbed logit is the answer
        self._places = 1 if self._first else _candidates(top_p)
        self._scaled = (1.0 if self._greedy else 1 / temperature), masked.start, masked.stop
        count = self._chunks = -(-vocab // _BLOCK_V)
        self._block_m = max(2, 1 << (count - 1).bit_length())  # a power of two that holds a row's chunks

        def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.empty(rows, *shape, dtype=dtype, device=device)

        places = self._places
        self._tops, self._masses = empty(count), empty(count)
        self._chunk_finite = empty(count, dtype=torch.int32)
        self._values, self._columns = empty(count, places), empty(count, places, dtype=torch.int32)
        self._best_columns, self._best_scores = empty(places, dtype=torch.int32), empty(places)
        self._normaliser, self._above = empty(), empty(count, places)
        self._choice = (
            empty(dtype=torch.int64).zero_(), empty(dtype=torch.bool).fill_(True), empty(dtype=torch.bool)
        )  # fmt: skip

    def __call__(
        self, logits_RV: Tensor, keys_R2: Tensor, positions_R: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Columns, whether each is settled, and whether the row is finite (`decode.sampling.Choice`)."""
        assert logits_RV.stride(1) == 1 and len(logits_RV) == self._rows
        self._find(logits_RV, keys_R2, positions_R)
        if not self._first:
            self._settle(logits_RV, keys_R2)
        return self._choice

    def _find(self, logits: Tensor, keys: Tensor, positions: Tensor) -> None:
        """The best perturbed logits in order; where the best is the answer, that is all."""
        candidates_kernel[(self._rows, self._chunks)](
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
            GREEDY=self._greedy,
            REDUCED=self._ids is not None,
            CANDIDATES=self._places,
            BLOCK_V=_BLOCK_V,
            num_warps=8,
        )
        rank_kernel[(self._rows,)](
            logits,
            logits.stride(0),
            keys,
            self._tops,
            self._masses,
            self._chunk_finite,
            self._values,
            self._columns,
            self._best_columns,
            self._best_scores,
            self._normaliser,
            *self._choice,
            self._chunks,
            self._scaled[0],
            FIRST=self._first,
            CANDIDATES=self._places,
            BLOCK_M=self._block_m,
            num_warps=4,
        )

    def _settle(self, logits: Tensor, keys: Tensor) -> None:
        """Of the candidates the first that lies in the nucleus."""
        mass_kernel[(self._rows, self._chunks)](
            logits,
            logits.stride(0),
            logits if self._ids is None else self._ids,
            keys,
            self._best_scores,
            self._normaliser,
            self._above,
            self._vocab,
            self._chunks,
            *self._scaled,
            REDUCED=self._ids is not None,
            CANDIDATES=self._places,
            BLOCK_V=_BLOCK_V,
            num_warps=8,
        )
        settle_kernel[(self._rows,)](
            self._best_columns,
            self._best_scores,
            self._above,
            *self._choice[:2],
            self._chunks,
            self._top_p,
            CANDIDATES=self._places,
            BLOCK_M=self._block_m,
            num_warps=4,
        )


def _candidates(top_p: float) -> int:
    """How many perturbed logits are tested; each lies outside the nucleus with the mass outside it."""
    outside = min(max(1 - top_p, 1e-9), 1 - 1e-9)
    wanted = math.log(_MISSED) / math.log(outside)
    return next((count for count in (2, 4, 8) if count >= wanted), 16)
