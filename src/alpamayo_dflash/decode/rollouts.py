"""What the target itself writes on a clip, and its states there. The prompt is read once for all of it.

Shapes: T tokens of a response, V vocabulary, C hidden, F taps·C, X context, P prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from alpamayo_dflash.clips.window import Window
from alpamayo_dflash.common.machine import Stopwatch, current, device_index
from alpamayo_dflash.decode.config import DecodeConfig, Request, Sampling
from alpamayo_dflash.decode.engine import Engine
from alpamayo_dflash.decode.observer import Observer
from alpamayo_dflash.decode.proposer import BlockDraft, Captured, Listed
from alpamayo_dflash.decode.verify import Prefilled, Recording, Verifier
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
    """Rolls the target out, with or without a draft, on one window at a time.

    Args:
        target: the model.
        taps: layers whose outputs `score` gives.
        context_len: X, how many of the prompt's last positions have them.
        max_tokens: the most tokens a response may have.
        draft: proposes blocks; None lets the target write token by token. The texts are the same.
        config: see DecodeConfig; not `sentence_end="force"`, whose texts are not the target's own.
        proposers: propose beside the draft.
        watch: times "vision" and "prompt".

    Attributes:
        target: the model.
        watch: see above; another may take its place.
        emitted: tokens after the first that `write` has given so far.
        passes: verify passes that each response took part in, likewise.

    Raises:
        ValueError: a tap is not a layer of the target, the draft does not fit it, or `force`.
    """

    def __init__(
        self,
        target: Alpamayo,
        *,
        taps: Sequence[int],
        context_len: int,
        max_tokens: int,
        draft: BlockDraft | None = None,
        config: DecodeConfig | None = None,
        proposers: Sequence[Listed | Captured] = (),
        watch: Stopwatch | None = None,
    ) -> None:
        config = config or DecodeConfig()
        if not config.lossless:
            raise ValueError(f"sentence_end is {config.sentence_end!r}; rollouts are the target's own texts")
        self.target, self.emitted, self.passes = target, 0, 0
        self._max_tokens, self.watch = max_tokens, watch
        recording = Recording(tuple(taps), context_len)
        self._engine = Engine(target, draft, config, proposers=proposers, recording=recording)
        self._verifier = self._engine.verifier

    def read(self, window: Window) -> None:
        """Run vision and the prompt's pass; `write` and `score` work on this window from now on.

        Raises:
            ValueError: the window does not fit the target, or its prompt is longer than the cache.
        """
        self._prefilled = self._verifier.prefill(self.target.prompt(window), self.watch)

    @torch.inference_mode()
    def write(
        self, sampling: Sampling, *, seed: int = 0, num_samples: int = 1, greedy_first: bool = False
    ) -> list[Rollout]:
        """Let the target write.

        Args:
            sampling: temperature and nucleus; temperature 0 is greedy.
            seed: of the noise.
            num_samples: responses; the k-th is `generate`'s k-th with the same seed and sampling.
            greedy_first: the first is greedy, and the k-th after it is `generate`'s k-th.

        Raises:
            ValueError: the target's logits are not finite.
        """
        request = Request(sampling, seed, num_samples, self._max_tokens, greedy_first)
        with current(self.target.device):
            round_ = self._engine.round(request)
            # No action expert reads the cache, so that a pass for the last tokens would be for nothing.
            decoded = self._engine.decode(round_, self._prefilled, request, Observer(), close=False)
        self.emitted += sum(len(sample.tokens) - 1 for sample in decoded.samples)
        self.passes += sum(sample.passes for sample in decoded.samples)
        return [Rollout(tuple(sample.tokens), str(sample.stop)) for sample in decoded.samples]

    def score(self, responses: Sequence[Sequence[int]]) -> list[TeacherForced]:
        """Run the target on given responses, all in one pass; equal beginnings are computed once.

        That the responses decide alone what is computed makes it the same with any draft.

        Args:
            responses: token ids of each, at least one.

        Returns:
            for each what `teacher_forced` gives, but prompt states of min(X, P) positions only.
        """
        cache = self._verifier.cache
        known = min(cache.recorded_context, cache.prompt_length)
        with current(self.target.device):
            return _score(self._verifier, self._prefilled, responses, known, graph=True)


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
    recording = Recording(tuple(layers), prompt_states)
    verifier = Verifier(target, prompt_capacity=len(prompt.input_ids), recording=recording)
    prefilled = verifier.prefill(prompt)
    # One after another: what one response's rows see has no other's slots between.
    return [_score(verifier, prefilled, [each], verifier.cache.recorded_context)[0] for each in responses]


def _score(
    verifier: Verifier,
    prefilled: Prefilled,
    responses: Sequence[Sequence[int]],
    prompt_states: int,
    *,
    graph: bool = False,
) -> list[TeacherForced]:
    forced = verifier.force(prefilled, responses, graph=graph)
    states_TF, context = verifier.cache.recorded, verifier.cache.recorded_context
    layers, device = len(verifier.recorded), verifier.target.device
    with torch.no_grad():
        # New tensors: the caches are inference mode's, which autograd refuses, and are used again.
        states = _by_layer(states_TF[context - prompt_states : context], layers)
        return [
            TeacherForced(
                forced.logits(index)[:-1],
                _by_layer(states_TF[device_index([context + slot for slot in path], device)], layers),
                states,
            )
            for index, path in enumerate(forced.paths)
        ]


def _by_layer(states_TF: Tensor, layers: int) -> Tensor:
    """[T, layers·C] to a copy [layers, T, C]."""
    return (
        states_TF.unflatten(-1, (layers, -1)).transpose(0, 1).contiguous().clone()
        if layers
        else states_TF.new_zeros(0)
    )
