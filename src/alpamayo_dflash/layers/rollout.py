"""What the target itself writes on a clip, and its states there. The prompt is read once for all of it.

Shapes: T tokens of a response, V vocabulary, C hidden, F taps·C, X context, P prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from alpamayo_dflash.decode.config import DecodeConfig, Request, Sampling
from alpamayo_dflash.decode.loop import Decode, autoregressive
from alpamayo_dflash.decode.observer import Observer
from alpamayo_dflash.decode.rollout import stop_rules
from alpamayo_dflash.decode.score import TeacherForced
from alpamayo_dflash.decode.tail import ROOT
from alpamayo_dflash.decode.verify import Verifier
from alpamayo_dflash.decode.walk import Tree

if TYPE_CHECKING:
    from alpamayo_dflash.clips.window import Window
    from alpamayo_dflash.target import Alpamayo


@dataclass(frozen=True)
class Written:
    """One response of the target.

    Attributes:
        token_ids: T ids as emitted, through `<|traj_future_start|>`, eos or the limit.
        stop: why it ended, in the decoder's words.
    """

    token_ids: tuple[int, ...]
    stop: str


class Rollouts:
    """Rolls the target out by the autoregressive loop, on one window at a time.

    Args:
        target: the model.
        taps: layers whose outputs are kept.
        context_len: X, how many of the prompt's last positions keep them.
        max_tokens: the most tokens a response may have.

    Raises:
        ValueError: a tap is not a layer of the target.
    """

    def __init__(self, target: Alpamayo, *, taps: Sequence[int], context_len: int, max_tokens: int) -> None:
        config = DecodeConfig()
        self.target = target
        self._max_tokens = max_tokens
        self._rules = stop_rules(target, config)
        self._verifier = Verifier(
            target, taps=taps, context_len=context_len, prompt_capacity=config.prompt_capacity
        )

    def read(self, window: Window) -> None:
        """Run vision and the prompt's pass; `write` and `score` work on this window from now on.

        Raises:
            ValueError: the window does not fit the target, or its prompt is longer than the cache.
        """
        self._prefilled = self._verifier.prefill(self.target.prompt(window))

    @torch.inference_mode()
    def write(self, sampling: Sampling, *, seed: int = 0, num_samples: int = 1) -> list[Written]:
        """Let the target write.

        Args:
            sampling: temperature and nucleus; temperature 0 is greedy.
            seed: of the noise.
            num_samples: responses; the k-th is `generate`'s k-th with the same seed and sampling.
        """
        self._verifier.begin(self._prefilled, num_samples * (self._max_tokens + 1))
        decode = Decode(
            self._verifier,
            self._prefilled,
            Request(sampling, seed, num_samples, self._max_tokens),
            rules=self._rules,
            observer=Observer(),
        )
        autoregressive(decode, decode.samples)
        return [Written(tuple(sample.tokens), str(sample.stop)) for sample in decode.samples]

    @torch.inference_mode()
    def score(self, responses: Sequence[Sequence[int]]) -> list[TeacherForced]:
        """Run the target on given responses, all in one pass; equal beginnings are computed once.

        Args:
            responses: token ids of each, at least one.

        Returns:
            for each what `decode.teacher_forced` gives, but prompt states of min(X, P) positions only.
        """
        verifier, cache = self._verifier, self._verifier.cache
        verifier.begin(self._prefilled, sum(len(response) for response in responses))
        tree = Tree(cache.tail)
        chains = [tree.add_chain(response, ROOT) for response in responses]
        logits_RV = verifier.rows(tree.slots)
        row = {slot: index for index, slot in enumerate(tree.slots)}
        known = min(cache.context_len, cache.prompt_length)
        prompt_states = self._by_layer(cache.taps[cache.context_len - known : cache.context_len])
        return [
            TeacherForced(
                torch.cat((self._prefilled.logits_V[None], logits_RV[[row[slot] for slot in chain[:-1]]])),
                self._by_layer(cache.taps[[cache.context_len + slot for slot in chain]]),
                prompt_states,
            )
            for chain in chains
        ]

    def _by_layer(self, taps_TF: Tensor) -> Tensor:
        """[T, F] to a copy [taps, T, C]."""
        taps_TLC: Tensor = taps_TF.unflatten(-1, (len(self._verifier.taps), -1))
        return taps_TLC.transpose(0, 1).clone()
