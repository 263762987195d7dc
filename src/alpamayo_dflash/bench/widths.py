"""Speculative against autoregressive texts at speed: equal at one row width, near-ties only at two."""

from __future__ import annotations

from typing import Any

import torch

from alpamayo_dflash.bench.setup import Bench
from alpamayo_dflash.decode.config import Sampling
from alpamayo_dflash.evaluate.near_ties import Loop, parting

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
    width = config.row_width or config.block_size
    same, one = bench.decoder(None, width), bench.decoder(None)
    fast, replay = bench.replaying(width)
    found = {"prompts": config.lossless_prompts, "tokens": 0, "equal": 0, "texts": 0}
    wide = {"texts": 0, "equal": 0, "near_ties": 0, "not_near_ties": 0}
    largest = 0.0
    for index in range(config.lossless_prompts):
        prompt = bench.random_prompt(index)
        with torch.inference_mode():
            seen = bench.target.see(prompt)
            read = [d.verifier.read(prompt, seen) for d in (same, fast, one)]
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
                loops = (
                    Loop(one, read[2], narrow[0], 1, 1),
                    Loop(same, read[0], got[0], config.block_size, width),
                )
                found_there = parting(*loops, sampling=Sampling(temperature), seed=index)
                largest = max(largest, found_there.largest_difference)
                if narrow != got:
                    wide["near_ties" if found_there.near_tie else "not_near_ties"] += 1
    return {
        "one_row_width": found | {"row_width": width},
        "different_widths": wide | {"widths": [1, width], "largest_difference": largest},
        "passed": found["equal"] == found["texts"] and not wide["not_near_ties"],
    }
