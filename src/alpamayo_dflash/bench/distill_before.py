"""Times the `distill` of whichever revision is on the path; `bench.distill` runs it with an earlier one's.

    PYTHONPATH=<that revision>/src python -P distill_before.py '{"target": …}'

It stands alone: of the package it uses only what every revision since `ada2e04` has, by name where a module
has moved. The last line that it prints is a JSON object.
"""

from __future__ import annotations

import importlib
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

_PACKAGE = "alpamayo_dflash"
_NO_HASH = "0" * 64


def module(*places: str) -> ModuleType:
    """The first of these modules of the package that there is.

    Raises:
        ModuleNotFoundError: there is none.
    """
    for place in places:
        try:
            return importlib.import_module(f"{_PACKAGE}.{place}")
        except ModuleNotFoundError as error:
            if not str(error.name).startswith(_PACKAGE):
                raise
    raise ModuleNotFoundError(f"{_PACKAGE} has none of {', '.join(places)}")


class Times:
    """When the stage began and ended its windows, and how long each prompt's pass took on the device."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._passes: list[tuple[Any, Any]] = []
        self.wall_s = 0.0

    def mark(self) -> Any:
        """A place in the device's work; on a CPU the time in milliseconds."""
        if not self._cuda:
            return time.perf_counter() * 1e3
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def prefill(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """The method, timed by marks."""

        def timed(*args: Any, **options: Any) -> Any:
            start = self.mark()
            result = original(*args, **options)
            self._passes.append((start, self.mark()))
            return result

        return timed

    def whole(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """The function, timed by the host's clock until the device is done; only its last call counts."""

        def timed(*args: Any, **options: Any) -> Any:
            self._passes.clear()
            start = time.perf_counter()
            result = original(*args, **options)
            if self._cuda:
                torch.cuda.synchronize()
            self.wall_s = time.perf_counter() - start
            return result

        return timed

    def prefill_ms(self) -> list[float]:
        """Of each window."""
        if self._cuda:
            return [round(start.elapsed_time(end), 4) for start, end in self._passes]
        return [round(end - start, 4) for start, end in self._passes]


def hand_over(stage: ModuleType, target: Any) -> None:
    """Let the stage take this target in place of one that it loads."""
    if hasattr(stage, "load_target"):
        stage.load_target = lambda *_, **__: (target, _NO_HASH)  # type: ignore[attr-defined]
    else:
        fingerprint = module("common.identity").Fingerprint(_NO_HASH, lambda: _NO_HASH)
        stage.open_target = lambda *_, **__: (target, fingerprint)  # type: ignore[attr-defined]


def main() -> None:
    """Write data on some clips untimed and on others timed, and print what that took."""
    given = json.loads(sys.argv[1])
    stage, verify, config = module("distill.run"), module("decode.verify"), module("distill.config")
    bench = module("bench.config", "evaluate.bench.config").BenchConfig(**given["bench"])
    made = module("bench.setup", "evaluate.bench.setup").Bench(bench)
    target, taps = made.target, sorted(made.draft.config.target_layer_ids)
    hand_over(stage, target)
    times = Times(target.device)
    verify.Verifier.prefill = times.prefill(verify.Verifier.prefill)
    stage.write_windows = times.whole(stage.write_windows)  # type: ignore[attr-defined]
    with tempfile.TemporaryDirectory() as folder:
        for name in ("warm", "timed"):
            out = Path(folder) / name
            options = given["distill"] | {"chunks": given[f"{name}_chunks"]}
            options |= {"target_layers": ",".join(map(str, taps))}
            options |= {"cache_dir": Path(given["clips_dir"]), "output_dir": out}
            answer = stage.run(config.DistillConfig(**options))
    found = {
        "wall_s": round(times.wall_s, 4),
        "prefill_ms": times.prefill_ms(),
        "windows": answer["clips"]["done"],
        "tokens": answer["tokens"],
        "revision": module("common.artefacts", "artefacts").git_revision(),
        "package": str(Path(importlib.import_module(_PACKAGE).__file__ or "").parent),
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
