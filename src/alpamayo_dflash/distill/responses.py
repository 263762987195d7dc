"""The target's responses on one clip, and what is kept of each.

Shapes: T tokens, V vocabulary, C hidden, X context, k top logits.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from alpamayo_dflash.decode import Sampling
from alpamayo_dflash.decode.sampling import mask_bias
from alpamayo_dflash.distill.writer import Response

if TYPE_CHECKING:
    from alpamayo_dflash.clips import Window
    from alpamayo_dflash.decode import TeacherForced
    from alpamayo_dflash.distill.config import DistillConfig
    from alpamayo_dflash.layers.rollout import Rollouts
    from alpamayo_dflash.target import Alpamayo

GREEDY = 0.0


def top_k_of(config: DistillConfig, target: Alpamayo) -> int:
    """How many logits are kept: never more than there are unmasked tokens."""
    allowed = target.vocab_size - (0 if config.full_vocab else len(target.traj_ids))
    return min(config.top_k_logits, allowed)


def respond(rollouts: Rollouts, window: Window, config: DistillConfig) -> tuple[Response, ...]:
    """Let the target write on a window: once greedily, the other times sampled.

    The prompt is read once. The sampled responses are samples 0, 1, ... of `generate` with the config's seed,
    temperature and nucleus.

    Args:
        rollouts: of the target, tapping the wanted layers.
        window: what the target sees.
        config: sampling, counts and what is kept.

    Returns:
        `samples_per_clip` responses, the greedy one first.

    Raises:
        ValueError: the window does not fit the target, or its prompt is too long.
    """
    rollouts.read(window)
    greedy = Sampling(GREEDY, config.top_p)
    written = [(greedy, response) for response in rollouts.write(greedy, seed=config.seed)]
    if config.samples_per_clip > 1:
        sampled = Sampling(config.temperature, config.top_p)
        more = rollouts.write(sampled, seed=config.seed, num_samples=config.samples_per_clip - 1)
        written += [(sampled, response) for response in more]
    forced = rollouts.score([response.token_ids for _, response in written])
    return tuple(
        Response(
            token_ids=response.token_ids,
            text=rollouts.target.coc_text(response.token_ids),
            stop=response.stop,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            seed=config.seed,
            tensors=kept_tensors(rollouts.target, states, config),
        )
        for (sampling, response), states in zip(written, forced, strict=True)
    )


@torch.inference_mode()
def kept_tensors(target: Alpamayo, forced: TeacherForced, config: DistillConfig) -> dict[str, torch.Tensor]:
    """What is stored of one response.

    Args:
        target: the model, for the trajectory ids, which are masked unless `full_vocab`.
        forced: the target's states and logits on the response.
        config: `top_k_logits`, `full_vocab` and `dtype` are used.

    Returns:
        On the CPU: prompt_states [X, taps, C] and states [T, taps, C] in the storage dtype, topk_logits
        float32 [T, k], topk_ids int32 [T, k].
    """
    logits_TV = forced.logits
    if not config.full_vocab:
        logits_TV = logits_TV + mask_bias(target.traj_ids, target.vocab_size).to(logits_TV.device)
    topk_logits, topk_ids = logits_TV.topk(top_k_of(config, target), dim=-1)
    dtype = forced.states.dtype if config.dtype is None else getattr(torch, config.dtype)
    return {
        # Copies of their own: a shard takes no two tensors of one storage.
        "prompt_states": _copy(forced.prompt_states.transpose(0, 1), dtype),
        "states": _copy(forced.states.transpose(0, 1), dtype),
        "topk_logits": topk_logits.to("cpu", torch.float32),
        "topk_ids": topk_ids.to("cpu", torch.int32),
    }


def _copy(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A copy on the CPU, contiguous."""
    return tensor.to("cpu", dtype).clone(memory_format=torch.contiguous_format)
