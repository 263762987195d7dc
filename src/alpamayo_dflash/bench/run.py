"""The stage: measure, compare, write the results."""

from __future__ import annotations

import sys
import time
from typing import Any

from alpamayo_dflash.bench.config import BenchConfig
from alpamayo_dflash.bench.decode import timings
from alpamayo_dflash.bench.figures import REPLAYED, coc_means, figures, spread, timing_quartiles
from alpamayo_dflash.bench.floors import floors
from alpamayo_dflash.bench.profile import profile
from alpamayo_dflash.bench.setup import Bench, gpu
from alpamayo_dflash.bench.widths import compare
from alpamayo_dflash.common.artefacts import provenance, write_json


def run(config: BenchConfig) -> dict[str, Any]:
    """Measure, and write the results.

    Raises:
        ValueError: the target cannot be loaded or the device is not there.
    """
    if config.window:
        from alpamayo_dflash.bench import window

        return window.run(config)
    if config.beside:
        from alpamayo_dflash.bench import formats

        return formats.run(config)
    if config.train:
        from alpamayo_dflash.bench import train

        return train.run(config)
    started = time.time()
    bench = Bench(config)
    raw = timings(bench)
    keys = figures(raw)
    found: dict[str, Any] = {
        "figures": keys,
        "spread": spread(raw),
        "replayed": [key for key in REPLAYED if key in keys],
        "floors": floors(raw),
        "coc_lengths": coc_means(raw),
        "profile": profile(bench),
        "lossless": None,
        "target_weights": bench.target.weight_formats,
    }

    def write() -> None:
        made = provenance(config, started)
        rest = {"timings": timing_quartiles(raw), "raw": raw, "gpu": gpu(bench.device), "provenance": made}
        write_json(config.out, found | rest)

    write()  # what took minutes is kept, whatever happens to the rest
    if config.lossless_prompts:
        print(f"bench: timed; comparing texts on {config.lossless_prompts} prompts", file=sys.stderr)
        found["lossless"] = compare(bench)
        write()
    passed = found["lossless"] is None or found["lossless"]["passed"]
    return {key: value for key, value in found.items() if key != "profile"} | {
        "out": str(config.out),
        "passed": passed,
    }
