"""The two scores of target layers, kept as sums over generated tokens so that pooling ranks is exact.

Shapes: T tokens, C hidden, V vocabulary, L layers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from alpamayo_dflash.decode.sampling import mask_bias
from alpamayo_dflash.target.alpamayo import Alpamayo


@dataclass
class Scores:
    """Sums over generated tokens; dividing by `tokens` comes last.

    Attributes:
        tokens: number of generated tokens in the sums.
        state_sums: float64 [L, C], each layer's outputs at the generated tokens, summed.
        ce_sums: candidate layer to the sum of its early-exit cross-entropies, nats.
    """

    tokens: int
    state_sums: Tensor
    ce_sums: dict[int, float]

    @classmethod
    def empty(cls, num_layers: int, hidden_size: int, candidates: Sequence[int]) -> Scores:
        """Scores of no token."""
        state_sums = torch.zeros(num_layers, hidden_size, dtype=torch.float64)
        return cls(0, state_sums, dict.fromkeys(candidates, 0.0))

    def add(self, other: Scores) -> None:
        """Pool another part's sums into these.

        Raises:
            ValueError: the parts were made with other layers or another width.
        """
        if self.state_sums.shape != other.state_sums.shape or self.ce_sums.keys() != other.ce_sums.keys():
            raise ValueError("scores of different targets or candidate layers cannot be pooled")
        self.tokens += other.tokens
        self.state_sums += other.state_sums
        for layer, value in other.ce_sums.items():
            self.ce_sums[layer] += value

    def cosine(self) -> list[float]:
        """By layer, the cosine of its mean state over generated tokens to the last layer's."""
        assert self.tokens > 0
        return functional.cosine_similarity(self.state_sums, self.state_sums[-1:], dim=-1).tolist()

    def early_exit_ce(self) -> dict[int, float]:
        """Candidate layer to its mean early-exit cross-entropy, nats a generated token."""
        assert self.tokens > 0
        return {layer: value / self.tokens for layer, value in self.ce_sums.items()}

    def to_plain(self) -> dict[str, Any]:
        """What the scores' file holds; float64 goes through JSON without loss."""
        return {
            "tokens": self.tokens,
            "state_sums": self.state_sums.tolist(),
            "ce_sums": {str(layer): value for layer, value in self.ce_sums.items()},
        }

    @classmethod
    def from_plain(cls, content: Mapping[str, Any]) -> Scores:
        """Read what `to_plain` wrote."""
        state_sums = torch.tensor(content["state_sums"], dtype=torch.float64)
        ce_sums = {int(layer): value for layer, value in content["ce_sums"].items()}
        return cls(content["tokens"], state_sums, ce_sums)


@torch.no_grad()
def early_exit_ce(target: Alpamayo, states_TC: Tensor, token_ids: Sequence[int]) -> Tensor:
    """Cross-entropy of leaving after one layer: its output through the final norm and the head.

    Args:
        target: gives norm, head and the trajectory ids, which are masked as in generation.
        states_TC: the layer's output at the positions that predict `token_ids`.
        token_ids: T generated tokens.

    Returns:
        float32 [T], nats.
    """
    bias_V = mask_bias(target.traj_ids, target.vocab_size).to(states_TC.device)
    logits_TV = target.logits(target.final_norm(states_TC)) + bias_V
    labels_T = torch.tensor(token_ids, device=logits_TV.device)
    return functional.cross_entropy(logits_TV, labels_T, reduction="none")


def score_response(
    target: Alpamayo,
    states_LTC: Tensor,
    before_LC: Tensor,
    token_ids: Sequence[int],
    candidates: Sequence[int],
) -> Scores:
    """Score one generated response.

    Args:
        target: the target that wrote it.
        states_LTC: every layer's output at the response's tokens.
        before_LC: every layer's output at the prompt's last position, which predicts the first token.
        token_ids: the T tokens of the response.
        candidates: layers to leave early at.

    Returns:
        Sums over the T tokens.
    """
    predicting_LTC = torch.cat((before_LC.unsqueeze(1), states_LTC[:, :-1]), dim=1)
    ce_sums = {
        layer: early_exit_ce(target, predicting_LTC[layer], token_ids).double().sum().item()
        for layer in candidates
    }
    return Scores(len(token_ids), states_LTC.double().sum(1).cpu(), ce_sums)
