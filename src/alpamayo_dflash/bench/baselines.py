"""A whole window by transformers itself, from frames in memory to a trajectory on the host: the baselines.

Both resize on the CPU, wherever the target is, write the text with `generate`, and run the plain expert on
the cache that it leaves. Several samples are the prompt repeated as a batch, as the reference draws them
(specification 7): the vision tower and the prompt's pass run for every one.

*Eager*: a dynamic cache, every pass launched from Python. *Compiled*: transformers' own fast way
(`bench/compiled.py`). It is timed whole on the Qwen3-VL; where only the text model runs compiled, its window
is composed of the eager one's other parts and that many compiled passes, and the results say so.

Shapes: S sample, N way-points.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import CompileConfig

from alpamayo_dflash.bench.clocks import WARM, PartClock
from alpamayo_dflash.bench.compiled import compiled_text_model, tried, why_not_compiled
from alpamayo_dflash.bench.figures import SIX
from alpamayo_dflash.bench.generation import Generator, Texts
from alpamayo_dflash.clips.window import Window
from alpamayo_dflash.common.machine import Clock
from alpamayo_dflash.evaluate.reference import action_prefix
from alpamayo_dflash.report.tables import WINDOW_PARTS
from alpamayo_dflash.target.alpamayo import Alpamayo
from alpamayo_dflash.target.prompt import Prompt, build_prompt

_SAMPLES = (1, SIX)


class TransformersWindow:
    """A window by transformers and the plain expert.

    Args:
        target: the model.
        generate: writes the texts.
    """

    def __init__(self, target: Alpamayo, generate: Generator) -> None:
        self._target, self._generate = target, generate

    def __call__(self, window: Window, clock: PartClock) -> Tensor:
        """The trajectories, float32 [S, N, 3] on the host; marks every one of `WINDOW_PARTS` on the clock."""
        target, texts = self._target, self._generate.texts
        clock.start()
        prompt = cpu_prompt(target, window)
        inputs = target.transformers_inputs(prompt)
        clock.mark("preprocess")
        output = self._generate(inputs, clock)
        token_ids = output.sequences[:, len(prompt) :].tolist()
        held = len(prompt) + texts.passes  # the last token was never read
        prefix = action_prefix(output.past_key_values, token_ids, prompt, held)
        noise = torch.randn(texts.samples, target.n_waypoints, 2, device=target.device)
        action = target.denoise(noise, prefix)
        xyz, _ = target.trajectory(action, prompt.ego_history_xyz, prompt.ego_history_rot)
        xyz = xyz.cpu()
        clock.mark("action")
        return xyz


def cpu_prompt(target: Alpamayo, window: Window) -> Prompt:
    """The prompt with its frames resized on the CPU, wherever the target is."""
    return build_prompt(window, target.config, target.tokenizer, target.special, target.patch_shape)


def eager_windows(
    target: Alpamayo, window: Window, *, tokens: int, temperature: float, repeats: int
) -> dict[str, Any]:
    """The eager baseline, with one sample and six.

    Args:
        target: the model.
        window: its frames in ordinary memory.
        tokens: of each text.
        temperature: of sampling.
        repeats: windows that are timed.

    Returns:
        `transformers_window_ms`, whole windows by samples, and `transformers_parts_ms`, likewise and by part.

    Raises:
        ValueError: the window does not fit the target, or its trajectory is not finite.
    """
    whole, parts = {}, {}
    with torch.inference_mode(False), torch.no_grad():
        for samples in _SAMPLES:
            generate = Generator(target, target.vlm, Texts(tokens, samples, temperature))
            run = TransformersWindow(target, generate)
            whole[str(samples)], parts[str(samples)] = _timed(run, window, repeats, target.device)
    return {"transformers_window_ms": whole, "transformers_parts_ms": parts}


def compiled_windows(
    target: Alpamayo,
    window: Window,
    eager: Mapping[str, Any],
    *,
    tokens: int,
    temperature: float,
    repeats: int,
    compile_config: CompileConfig | None = None,
) -> dict[str, Any]:
    """The compiled baseline, with one sample and six.

    Args:
        target: the model.
        window: as in `eager_windows`.
        eager: what that returned, for windows that are composed.
        tokens: likewise.
        temperature: likewise.
        repeats: likewise.
        compile_config: how the pass is compiled; None for transformers' own choice.

    Returns:
        by samples `compiled_token_ms`, `compiled_window_ms`, `compiled_parts_ms`, and about them
        `compiled_on` ("vl" or "text": the model that ran compiled), `compiled_window` ("measured" whole or
        "composed") and `compiled_told` (see `compiled.tried`). Of what did not run compiled there is
        `compiled_told` alone. Where transformers would compile nothing, `compiled_because` alone.

    Raises:
        ValueError: see `eager_windows`.
    """
    because = why_not_compiled(target.device, compile_config)
    if because is not None:
        return {"compiled_because": because}
    found: dict[str, Any] = {
        f"compiled_{name}": {} for name in ("on", "window", "told", "token_ms", "window_ms", "parts_ms")
    }
    how: dict[str, Any] = {"repeats": repeats, "compile_config": compile_config}
    for samples in _SAMPLES:
        texts = Texts(tokens, samples, temperature)
        each = _whole(target, window, texts, **how)
        if "window_ms" not in each:
            others = {name: eager[f"transformers_{name}"][str(samples)] for name in ("window_ms", "parts_ms")}
            composed = _composed(target, window, texts, others, **how)
            each = composed | {"told": each["told"] | composed["told"]}
        for name, value in each.items():
            found[f"compiled_{name}"][str(samples)] = value
    return found


def _whole(
    target: Alpamayo, window: Window, texts: Texts, *, repeats: int, compile_config: CompileConfig | None
) -> dict[str, Any]:
    """Windows timed whole on the Qwen3-VL."""
    static = len(target.prompt(window))

    def run() -> tuple[list[float], dict[str, list[float]]]:
        generate = Generator(target, target.vlm, texts, static=static, compile_config=compile_config)
        return _timed(TransformersWindow(target, generate), window, repeats, target.device)

    timed, told = tried(target.vlm, run)
    if timed is None:
        return {"told": {"vl": told}}
    whole, parts = timed
    return {
        "on": "vl",
        "window": "measured",
        "told": {"vl": told},
        "token_ms": [round(ms / texts.passes, 4) for ms in parts["decode"]],
        "window_ms": whole,
        "parts_ms": parts,
    }


def _composed(
    target: Alpamayo,
    window: Window,
    texts: Texts,
    eager: Mapping[str, Any],
    *,
    repeats: int,
    compile_config: CompileConfig | None,
) -> dict[str, Any]:
    """Windows whose texts come from the text model alone, all else from the eager windows' own timings."""
    with torch.inference_mode(False), torch.no_grad():
        prompt = target.prompt(window)
        alone = compiled_text_model(target, prompt, texts, repeats=repeats, compile_config=compile_config)
    if alone["on"] is None:
        return {"told": alone["told"]}
    decode = alone["decode_ms"]
    before = eager["parts_ms"]["decode"]
    whole = [
        round(window_ms - slow + fast, 4)
        for window_ms, slow, fast in zip(eager["window_ms"], before, decode, strict=True)
    ]
    return {
        "on": "text",
        "window": "composed",
        "told": alone["told"],
        "token_ms": [round(ms / texts.passes, 4) for ms in decode],
        "window_ms": whole,
        "parts_ms": {**eager["parts_ms"], "decode": decode},
    }


def _timed(
    run: Callable[[Window, PartClock], Tensor], window: Window, repeats: int, device: torch.device
) -> tuple[list[float], dict[str, list[float]]]:
    """Whole windows by the host's clock, and their parts by the device's."""
    host, clock = Clock(device), PartClock(device)
    whole: list[float] = []
    parts: dict[str, list[float]] = {part: [] for part in WINDOW_PARTS}
    for index in range(WARM + repeats):
        started = host.now_ms()
        xyz = run(window, clock)
        ended = host.now_ms()
        if not xyz.isfinite().all():
            raise ValueError(
                "the window's trajectory is not finite: the target's weights or dtype are at fault"
            )
        if index < WARM:
            continue
        whole.append(round(ended - started, 4))
        for part, ms in clock.parts_ms().items():
            parts[part].append(ms)
    return whole, parts
