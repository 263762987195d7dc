"""Speculative against autoregressive texts at speed: equal at one row width, near-ties only at two."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from alpamayo_dflash.decode import Prefilled, SpeculativeDecoder
from alpamayo_dflash.decode.config import Sampling
from alpamayo_dflash.decode.noise import row_noise, stream_keys
from alpamayo_dflash.decode.sampling import mask_bias, nucleus
from alpamayo_dflash.decode.tail import ROOT
from alpamayo_dflash.decode.walk import Tree
from alpamayo_dflash.evaluate.bench.setup import Bench

_TOKENS = 24
_ALWAYS_COMPARED = 10
"""Prompts whose logits at the two widths are compared even where the texts are equal."""


def compare(bench: Bench) -> dict[str, Any]:
    """Decode random prompts greedily and sampled, by the autoregressive loop and with replayed proposals.

    Returns:
        the texts that are equal at one row width, those at different widths, and of the others how many part
        at a near-tie (design, invariant 1); and whether losslessness held.
    """
    config = bench.config
    width = config.block_size
    same, one = bench.decoder(None, width), bench.decoder(None)
    fast, replay = bench.replaying(width)
    found = {"prompts": config.lossless_prompts, "tokens": 0, "equal": 0, "texts": 0}
    wide = {"texts": 0, "equal": 0, "near_ties": 0, "not_near_ties": 0}
    largest = 0.0
    for index in range(config.lossless_prompts):
        prompt = bench.random_prompt(index)
        with torch.inference_mode():
            embeddings = bench.target.embed(prompt)
            read = [d.verifier.read(prompt, embeddings) for d in (same, fast, one)]
        for temperature in (0.0, config.temperature):
            options = bench.options(1, index, _TOKENS) | {"temperature": temperature}
            expected = same.generate(read[0], **options).token_ids
            replay.load(expected, index)
            got = fast.generate(read[1], **options).token_ids
            found["texts"] += 1
            found["tokens"] += len(expected[0])
            found["equal"] += got == expected
            narrow = one.generate(read[2], **options).token_ids
            wide["texts"] += 1
            wide["equal"] += narrow == got
            if narrow != got or index < _ALWAYS_COMPARED:
                arms = _Arm(same, read[0], got[0]), _Arm(one, read[2], narrow[0])
                difference, near = _tie(*arms, sampling=Sampling(temperature), seed=index)
                largest = max(largest, difference)
                if narrow != got:
                    wide["near_ties" if near else "not_near_ties"] += 1
    return {
        "one_row_width": found | {"row_width": width},
        "different_widths": wide | {"widths": [1, width], "largest_difference": largest},
        "passed": found["equal"] == found["texts"] and not wide["not_near_ties"],
    }


@dataclass(frozen=True)
class _Arm:
    """A decoder, its reading of a prompt, and what it wrote."""

    decoder: SpeculativeDecoder
    read: Prefilled
    text: Sequence[int]


def _tie(wide: _Arm, narrow: _Arm, *, sampling: Sampling, seed: int) -> tuple[float, bool]:
    """The largest difference of logits on the common text, and whether the texts part at a near-tie there.

    A near-tie: the margin, of the two best perturbed logits or to the nucleus' edge, is below twice that
    difference (both in units of the tempered logits).
    """
    part = next((i for i, (a, b) in enumerate(zip(wide.text, narrow.text, strict=False)) if a != b), None)
    shared = list(wide.text[: len(wide.text) - 1 if part is None else part])
    a, b = (_forced_logits(arm, shared) for arm in (wide, narrow))
    largest = float((a - b).abs().max())
    if part is None:
        return largest, False
    target, temper = wide.decoder.target, 1.0 if sampling.greedy else sampling.temperature
    scores = (a[part] / temper + mask_bias(target.traj_ids, target.vocab_size).to(a.device))[None]
    perturbed, edge = scores, float("inf")
    if not sampling.greedy:
        keys = stream_keys(seed, wide.read.prompt.key, [0], a.device)
        perturbed = scores + row_noise(keys, torch.tensor([part], device=a.device), target.vocab_size)
        inside = nucleus(scores.softmax(-1), sampling.top_p)
        threshold = scores.masked_fill(~inside, float("inf")).min()
        both = torch.tensor([wide.text[part], narrow.text[part]], device=a.device)
        edge = float((scores[0, both] - threshold).abs().min())
        perturbed = perturbed.masked_fill(~inside, float("-inf"))
    best = perturbed[0].topk(2).values
    margin = min(float(best[0] - best[1]), edge)
    return largest, margin < 2 * largest / temper


def _forced_logits(arm: _Arm, text: Sequence[int]) -> Tensor:
    """Logits [len(text) + 1, V] of a text's tokens and the one behind it, at the decoder's width."""
    verifier = arm.decoder.verifier
    verifier.begin(arm.read, 64)
    step = verifier.row_width or 1
    slots = Tree(verifier.cache.tail).add_chain(text, ROOT)
    parts = [verifier.rows(slots[start : start + step]) for start in range(0, len(slots), step)]
    return torch.cat([arm.read.logits_V[None], *parts])
