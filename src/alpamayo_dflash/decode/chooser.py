"""`sampling.choose` for a loop that never looks at the host: noise by place, no sort, fixed buffers.

Shapes: R rows, V columns (of the target's head or a draft's reduced one), M chunks, N candidates.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from alpamayo_dflash.decode.config import Sampling
from alpamayo_dflash.decode.noise import row_noise
from alpamayo_dflash.decode.sampling import choose, mask_bias

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
        from alpamayo_dflash.decode import choose_kernels as kernels

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
        from alpamayo_dflash.decode import choose_kernels as kernels

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
