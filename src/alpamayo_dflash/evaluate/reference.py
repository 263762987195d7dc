"""The arm that users have today: `generate` of transformers on the target's own prompt.

The same mask of trajectory ids, temperature, nucleus, stop rule and token limit as the project's loops
(specification 7): generation ends one token after `<|traj_future_start|>`, because only then does the cache
hold that token's entry, which the action expert needs; the extra token is dropped.

Shapes: S sample, P prompt, T cache entries, V vocabulary, L layers, K KV heads, D head dim, N way-points.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList
from transformers.generation.stopping_criteria import StoppingCriteria, StoppingCriteriaList

from alpamayo_dflash.common.machine import Clock
from alpamayo_dflash.common.options import generator_seed
from alpamayo_dflash.decode.config import GREEDY_BELOW
from alpamayo_dflash.target.alpamayo import Alpamayo
from alpamayo_dflash.target.expert import ActionPrefix
from alpamayo_dflash.target.prompt import Prompt
from alpamayo_dflash.target.vlm import Qwen3VLTarget


@dataclass(frozen=True)
class Generated:
    """What `generate` gave.

    Attributes:
        token_ids: of each sample, through its first `<|traj_future_start|>` or eos, or up to the limit.
        prefix: the cache as the action expert reads it.
        prefill_ms: from the call to the first logits: vision and prompt.
        decode_ms: from there to the end.
    """

    token_ids: list[list[int]]
    prefix: ActionPrefix
    prefill_ms: float
    decode_ms: float


class MaskIds(LogitsProcessor):
    """Suppresses a range of ids.

    Args:
        ids: the range.
        at_first: is called once, when the first logits have come.
    """

    def __init__(self, ids: range, at_first: Callable[[], object] | None = None) -> None:
        self._ids = ids
        self._at_first = at_first

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Set the range's scores [S, V] to minus infinity."""
        if self._at_first is not None:
            self._at_first()
            self._at_first = None
        scores = scores.clone()
        scores[:, self._ids.start : self._ids.stop] = -torch.inf
        return scores


class OneAfter(StoppingCriteria):
    """A sample is finished once a token has followed `token`; transformers itself stops at eos."""

    def __init__(self, token: int, prompt_length: int) -> None:
        self._token = token
        self._start = prompt_length

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        """Whether each sample [S] is finished."""
        return (input_ids[:, self._start : -1] == self._token).any(dim=-1)


def generation_config(
    target: Alpamayo, *, temperature: float, top_p: float, max_new_tokens: int
) -> GenerationConfig:
    """The options of `generate` that ask for what the project's loops do."""
    sampling: dict[str, Any] = {"do_sample": False}
    if temperature >= GREEDY_BELOW:
        sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}
    return GenerationConfig(
        **sampling,
        max_new_tokens=max_new_tokens,
        eos_token_id=list(target.special.ends),
        pad_token_id=target.special.pad,
        return_dict_in_generate=True,
        use_cache=True,
    )


@torch.no_grad()
def generate(
    target: Alpamayo,
    prompt: Prompt,
    *,
    temperature: float,
    top_p: float,
    num_traj_samples: int,
    max_new_tokens: int,
    seed: int,
) -> Generated:
    """Run `target.vlm.generate` on a prompt; several samples are the prompt repeated as a batch."""
    torch.manual_seed(generator_seed(seed))
    clock = Clock(target.device)
    first_logits_at: list[float] = []
    mask = MaskIds(target.traj_ids, lambda: first_logits_at.append(clock.now_ms()))
    stop = OneAfter(target.special.traj_future_start, len(prompt))
    started = clock.now_ms()
    output = target.vlm.generate(
        **repeated(target.transformers_inputs(prompt), num_traj_samples),
        generation_config=generation_config(
            target, temperature=temperature, top_p=top_p, max_new_tokens=max_new_tokens
        ),
        logits_processor=LogitsProcessorList([mask]),
        stopping_criteria=StoppingCriteriaList([stop]),
    )
    ended = clock.now_ms()
    assert first_logits_at, "generate never asked for logits"
    token_ids = [cut(row, target) for row in output.sequences[:, len(prompt) :].tolist()]
    return Generated(
        token_ids=token_ids,
        prefix=action_prefix(output.past_key_values, token_ids, prompt),
        prefill_ms=first_logits_at[0] - started,
        decode_ms=ended - first_logits_at[0],
    )


def repeated(inputs: Mapping[str, Tensor], samples: int) -> dict[str, Tensor]:
    """A prompt's inputs for so many samples: repeated as a batch, images too (specification 7)."""
    return {name: tensor.repeat(samples, *[1] * (tensor.dim() - 1)) for name, tensor in inputs.items()}


def greedy_tokens(target: Alpamayo, prompt: Prompt, *, max_new_tokens: int) -> list[list[int]]:
    """The greedy tokens of transformers, one sample."""
    options: dict[str, Any] = {"temperature": 0.0, "top_p": 1.0, "num_traj_samples": 1, "seed": 0}
    return generate(target, prompt, max_new_tokens=max_new_tokens, **options).token_ids


def cut(token_ids: list[int], target: Alpamayo) -> list[int]:
    """A sample's tokens through the first `<|traj_future_start|>` or eos; all if there is neither."""
    stops = target.special.stops
    end = next((place for place, token in enumerate(token_ids) if token in stops), len(token_ids) - 1)
    return token_ids[: end + 1]


def action_prefix(
    cache: Any, token_ids: list[list[int]], prompt: Prompt, entries: int | None = None
) -> ActionPrefix:
    """The cache of `generate` in the expert's form (specification 7 and 8.2).

    The offset counts tokens through `<|traj_future_start|>`; a sample that lacks it has the sequence's
    length as its offset, one more than the cache holds entries for.

    Args:
        cache: of transformers.
        token_ids: of each sample.
        prompt: before them.
        entries: T, where the cache has room for more than it holds; None for all.
    """
    keys = torch.stack([layer.keys[:, :, :entries] for layer in cache.layers]).transpose(2, 3)
    values = torch.stack([layer.values[:, :, :entries] for layer in cache.layers]).transpose(2, 3)
    device = keys.device
    offsets = torch.tensor([len(prompt) + len(ids) for ids in token_ids], device=device)
    entries = keys.shape[2]
    return ActionPrefix(keys, values, offsets.clamp(max=entries), offsets + prompt.rope_delta)


@torch.no_grad()
def next_logits(target: Qwen3VLTarget, prompt: Prompt) -> Tensor:
    """Logits of the token after the prompt, float32 [V], from transformers' own forward; unmasked."""
    logits: Tensor = target.vlm(**target.transformers_inputs(prompt)).logits[0, -1]
    return logits.float()
