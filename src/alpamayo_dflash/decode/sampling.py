"""From logits to tokens: mask, temper, cut the nucleus, add noise, take the arg max.

One nucleus predicate holds everywhere (`common/nucleus.py`). The same functions serve target and draft.

Shapes: R rows, V vocabulary (of the target, or of a draft's reduced head).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from alpamayo_dflash.common.nucleus import cut, nucleus
from alpamayo_dflash.decode.config import Sampling
from alpamayo_dflash.decode.noise import TokenNoise, row_noise, without_noise


def mask_bias(masked: range, vocab_size: int, token_ids: Tensor | None = None) -> Tensor:
    """What to add to logits so that masked target ids are never chosen.

    Args:
        masked: target ids that generation masks (the trajectory tokens).
        vocab_size: V, columns of the logits.
        token_ids: int64 [V], the target id of each column; None where column and id are the same.

    Returns:
        float32 [V], 0 or minus infinity.
    """
    ids = torch.arange(vocab_size, device="cpu") if token_ids is None else token_ids
    hidden = (ids >= masked.start) & (ids < masked.stop)
    return torch.zeros(ids.shape, dtype=torch.float32, device=ids.device).masked_fill_(hidden, float("-inf"))


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
    return cut(probabilities, sampling.top_p)


def choose(
    logits_RV: Tensor,
    bias_V: Tensor,
    sampling: Sampling,
    noise_RV: Tensor | None = None,
    *,
    greedy_R: Tensor | None = None,
) -> Tensor:
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
        greedy_R: bool [R], rows that are greedy all the same, whose noise is zero; None for none.

    Returns:
        int64 [R] column indices.
    """
    if sampling.greedy:
        return (logits_RV + bias_V).argmax(-1)
    assert noise_RV is not None, "sampling needs noise"
    scores = torch.add(bias_V, logits_RV, alpha=1 / sampling.temperature)
    if greedy_R is not None:  # untempered, so that no two logits are rounded to one
        scores = torch.where(greedy_R[:, None], logits_RV + bias_V, scores)
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
    """Chooses as `choose` does, for rounds that never look at the host: no sort, and buffers that stay.

    Args:
        rows: R.
        vocab: V.
        masked: target ids that are never chosen.
        token_ids: int64 [V], the target id of each column of a reduced head, or None.
        sampling: temperature and top_p.
        device: where; on a GPU the kernels run, elsewhere PyTorch's operations.
        kernels: whether the kernels run, wherever that is; left out, see `device`.
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
        self._vocab, self._ids, self._sampling = vocab, token_ids, sampling
        self._bias = mask_bias(masked, vocab, token_ids).to(device)
        self._candidates = None
        if device.type == "cuda" if kernels is None else kernels:
            from alpamayo_dflash.kernels.sampling import Candidates

            temperature = 0.0 if sampling.greedy else sampling.temperature
            self._candidates = Candidates(
                rows, vocab, masked, token_ids, temperature=temperature, top_p=sampling.top_p, device=device
            )

    def __call__(self, logits_RV: Tensor, keys_R2: Tensor, positions_R: Tensor) -> Choice:
        """Choose.

        Args:
            logits_RV: [R, V or more] in any float type; columns from V on are not read.
            keys_R2: int64, each row's stream (`noise.stream_keys`).
            positions_R: int64, index of the chosen token among the generated ones.
        """
        if self._candidates is not None:
            return Choice(*self._candidates(logits_RV, keys_R2, positions_R))
        logits = logits_RV[:, : self._vocab].float()
        columns = self.exactly(logits, keys_R2, positions_R)
        finite = torch.isfinite(logits).all(-1)
        return Choice(columns, torch.ones_like(finite), finite)

    def exactly(self, logits_RV: Tensor, keys_R2: Tensor, positions_R: Tensor) -> Tensor:
        """The choice by PyTorch's operations, with a sort where it takes one; it may read the device."""
        noise = greedy = None
        if not self._sampling.greedy:
            noise = row_noise(keys_R2, positions_R, self._vocab, self._ids)
            greedy = without_noise(keys_R2)
        logits = logits_RV[:, : self._vocab].float()
        return choose(logits, self._bias, self._sampling, noise, greedy_R=greedy)


class PlaceChooser:
    """Chooses as `choose` does, for the host's rounds, whose rows come and go; the noise is kept.

    Args:
        target_ids: the target's V, and its ids that are never chosen.
        sampling: temperature and top_p.
        noise: of the prompt's samples.
    """

    def __init__(self, target_ids: tuple[int, range], sampling: Sampling, noise: TokenNoise) -> None:
        self.vocab_size, self._masked = target_ids
        self._sampling, self._noise = sampling, noise
        self._bias = mask_bias(self._masked, self.vocab_size).to(noise.device)
        self._reduced: tuple[Tensor, Tensor] | None = None  # a reduced head's ids, and their bias

    def __call__(
        self, logits_RV: Tensor, samples: Sequence[int], positions: Sequence[int], ids: Tensor | None = None
    ) -> Tensor:
        """Choose for each row the token of samples[r] at positions[r].

        Args:
            logits_RV: float32 [R, V].
            samples: R sample indices.
            positions: R indices among the generated tokens.
            ids: int64 [V], the target id of each column of a reduced head, or None.

        Returns:
            int64 [R], columns of the logits.
        """
        noise = None if self._sampling.greedy else self._noise.rows(samples, positions)
        if ids is not None and (self._reduced is None or self._reduced[0] is not ids):
            self._reduced = (ids, mask_bias(self._masked, len(ids), ids))
        bias = self._bias if ids is None or self._reduced is None else self._reduced[1]
        if noise is not None and ids is not None:
            noise = noise[:, ids]
        greedy = [self._noise.streams[sample] is None for sample in samples]
        greedy_R = torch.tensor(greedy, device=logits_RV.device) if any(greedy) else None
        return choose(logits_RV, bias, self._sampling, noise, greedy_R=greedy_R)
