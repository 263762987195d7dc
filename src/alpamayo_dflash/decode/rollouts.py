"""What the target itself writes on a clip, and its states there. The prompt is read once for all of it.

Shapes: T tokens of a response, V vocabulary, C hidden, F taps·C, X context, P prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from alpamayo_dflash.clips.window import Window
from alpamayo_dflash.decode.config import DecodeConfig, Request, Sampling
from alpamayo_dflash.decode.loop import decode
from alpamayo_dflash.decode.observer import Observer
from alpamayo_dflash.decode.round_host import HostRound
from alpamayo_dflash.decode.stops import stop_rules
from alpamayo_dflash.decode.verify import Prefilled, Verifier
from alpamayo_dflash.target.alpamayo import Alpamayo
from alpamayo_dflash.target.prompt import Prompt


@dataclass(frozen=True)
class Rollout:
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
        self._round = HostRound(self._verifier, self._rules)

    def read(self, window: Window) -> None:
        """Run vision and the prompt's pass; `write` and `score` work on this window from now on.

        Raises:
            ValueError: the window does not fit the target, or its prompt is longer than the cache.
        """
        self._prefilled = self._verifier.prefill(self.target.prompt(window))

    @torch.inference_mode()
    def write(self, sampling: Sampling, *, seed: int = 0, num_samples: int = 1) -> list[Rollout]:
        """Let the target write.

        Args:
            sampling: temperature and nucleus; temperature 0 is greedy.
            seed: of the noise.
            num_samples: responses; the k-th is `generate`'s k-th with the same seed and sampling.
        """
        request = Request(sampling, seed, num_samples, self._max_tokens)
        decoded = decode(
            self._round, self._verifier, self._prefilled, request, rules=self._rules, observer=Observer()
        )
        return [Rollout(tuple(sample.tokens), str(sample.stop)) for sample in decoded.samples]

    def score(self, responses: Sequence[Sequence[int]]) -> list[TeacherForced]:
        """Run the target on given responses, all in one pass; equal beginnings are computed once.

        Args:
            responses: token ids of each, at least one.

        Returns:
            for each what `teacher_forced` gives, but prompt states of min(X, P) positions only.
        """
        cache = self._verifier.cache
        known = min(cache.context_len, cache.prompt_length)
        return _score(self._verifier, self._prefilled, responses, known)


@dataclass(frozen=True)
class TeacherForced:
    """What the target computes on a response.

    Attributes:
        logits: float32 [T, V], unmasked; row i predicts token i (row 0 is the prompt's last).
        states: [layers, T, C], the layers' outputs at the response's tokens.
        prompt_states: [layers, X, C], at the prompt's last X positions; right-aligned, zero on the left if
            the prompt is shorter.
    """

    logits: Tensor
    states: Tensor
    prompt_states: Tensor


def teacher_forced(
    target: Alpamayo,
    prompt: Prompt,
    token_ids: Sequence[int],
    *,
    layers: Sequence[int] = (),
    prompt_states: int = 0,
) -> TeacherForced:
    """Run the target on one response. See `teacher_forced_all`."""
    return teacher_forced_all(target, prompt, [token_ids], layers=layers, prompt_states=prompt_states)[0]


def teacher_forced_all(
    target: Alpamayo,
    prompt: Prompt,
    responses: Sequence[Sequence[int]],
    *,
    layers: Sequence[int] = (),
    prompt_states: int = 0,
) -> list[TeacherForced]:
    """Run the target on several responses to one prompt, which is read once.

    Args:
        target: the model.
        prompt: its prompt.
        responses: token ids of each, at least one.
        layers: layers whose outputs are wanted, in this order.
        prompt_states: X, how many of the prompt's last positions are wanted.

    Raises:
        ValueError: a response is empty or holds an id that the target does not have, or a layer is not one
            of the target's.
    """
    for response in responses:
        if not response:
            raise ValueError("a response has no tokens; there is nothing to score")
        wrong = [token for token in response if not 0 <= token < target.vocab_size]
        if wrong:
            raise ValueError(f"token id {wrong[0]} is not in the target's vocabulary of {target.vocab_size}")
    verifier = Verifier(target, taps=layers, context_len=prompt_states, prompt_capacity=len(prompt.input_ids))
    prefilled = verifier.prefill(prompt)
    # One after another: what one response's rows see has no other's slots between.
    return [_score(verifier, prefilled, [each], verifier.cache.context_len)[0] for each in responses]


def _score(
    verifier: Verifier, prefilled: Prefilled, responses: Sequence[Sequence[int]], prompt_states: int
) -> list[TeacherForced]:
    forced = verifier.force(prefilled, responses)
    taps, context, layers = verifier.cache.taps, verifier.cache.context_len, len(verifier.taps)
    with torch.no_grad():
        # New tensors: the caches are inference mode's, which autograd refuses, and are used again.
        states = _by_layer(taps[context - prompt_states : context], layers)
        return [
            TeacherForced(
                forced.logits(index)[:-1],
                _by_layer(taps[[context + slot for slot in path]], layers),
                states,
            )
            for index, path in enumerate(forced.paths)
        ]


def _by_layer(taps_TF: Tensor, layers: int) -> Tensor:
    """[T, layers·C] to a copy [layers, T, C]."""
    return (
        taps_TF.unflatten(-1, (layers, -1)).transpose(0, 1).contiguous().clone()
        if layers
        else taps_TF.new_zeros(0)
    )
