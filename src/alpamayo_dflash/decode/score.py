"""The target's own view of a given response: logits and layer outputs under teacher forcing.

The response goes through the same pass as everything else, as one chain of rows behind the prompt.

Shapes: T tokens of the response, V vocabulary, C hidden, X context.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from alpamayo_dflash.decode.tail import ROOT
from alpamayo_dflash.decode.verify import Prefilled, Verifier
from alpamayo_dflash.decode.walk import Tree
from alpamayo_dflash.target.model import Alpamayo
from alpamayo_dflash.target.prompt import Prompt


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
        _check(target, response)
    verifier = Verifier(target, taps=layers, context_len=prompt_states, prompt_capacity=len(prompt.input_ids))
    prefilled = verifier.prefill(prompt)
    return [_score(verifier, prefilled, response) for response in responses]


def _check(target: Alpamayo, response: Sequence[int]) -> None:
    if not response:
        raise ValueError("a response has no tokens; there is nothing to score")
    wrong = [token for token in response if not 0 <= token < target.vocab_size]
    if wrong:
        raise ValueError(f"token id {wrong[0]} is not in the target's vocabulary of {target.vocab_size}")


def _score(verifier: Verifier, prefilled: Prefilled, response: Sequence[int]) -> TeacherForced:
    verifier.begin(prefilled, len(response))
    cache, layers = verifier.cache, len(verifier.taps)
    tree = Tree(cache.tail)
    slots = tree.add_chain(response, ROOT)
    logits = verifier.rows(slots)
    context = cache.context_len
    with torch.no_grad():
        # New tensors: the caches are inference mode's, which autograd refuses, and are used again.
        return TeacherForced(
            torch.cat((prefilled.logits_V.unsqueeze(0), logits[:-1])),
            _by_layer(cache.taps[context + slots[0] : context + slots[-1] + 1], layers),
            _by_layer(cache.taps[:context], layers),
        )


def _by_layer(taps_TF: Tensor, layers: int) -> Tensor:
    """[T, layers·C] to a copy [layers, T, C]."""
    return (
        taps_TF.unflatten(-1, (layers, -1)).transpose(0, 1).contiguous().clone()
        if layers
        else taps_TF.new_zeros(0)
    )
