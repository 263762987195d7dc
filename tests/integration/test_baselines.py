"""Whole windows by transformers itself: what they compute, how they are timed, what is told of failures."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import CompileConfig

from alpamayo_dflash.bench.baselines import TransformersWindow, compiled_windows, eager_windows
from alpamayo_dflash.bench.clocks import PartClock
from alpamayo_dflash.bench.compiled import compiled_texts, text_model
from alpamayo_dflash.bench.generation import Generator, Texts
from alpamayo_dflash.clips.window import Window
from alpamayo_dflash.evaluate.reference import greedy_tokens
from alpamayo_dflash.report.tables import WINDOW_PARTS
from alpamayo_dflash.standins.untrained import noise_window
from alpamayo_dflash.target.alpamayo import Alpamayo
from alpamayo_dflash.target.expert import ActionPrefix

TOKENS = 4


@pytest.fixture(scope="module")
def target() -> Alpamayo:
    return Alpamayo.from_pretrained("tiny").requires_grad_(False)


@pytest.fixture(scope="module")
def window() -> Window:
    whole = noise_window(0)
    return replace(whole, frames=whole.frames[:, :, ::4, ::4].copy())


def traced(backend: str = "eager") -> CompileConfig:
    """Compiled on a CPU too; the backend runs the traced pass operation by operation."""
    config = CompileConfig(backend=backend, mode=None)
    config._compile_all_devices = True
    return config


def run(target: Alpamayo, window: Window, generate: Generator) -> tuple[torch.Tensor, dict[str, float]]:
    clock = PartClock(target.device)
    torch.manual_seed(3)
    with torch.no_grad():
        return TransformersWindow(target, generate)(window, clock), clock.parts_ms()


def test_the_eager_windows_trajectory_follows_from_its_text(target: Alpamayo, window: Window) -> None:
    """Against one pass of transformers over prompt and text, and the plain expert after it."""
    xyz, parts = run(target, window, Generator(target, target.vlm, Texts(TOKENS, 2, 0.0)))
    assert sorted(parts) == sorted(WINDOW_PARTS) and all(ms > 0 for ms in parts.values())
    prompt = target.prompt(window)
    (text,) = greedy_tokens(target, prompt, max_new_tokens=TOKENS)
    assert len(text) == TOKENS
    inputs = target.transformers_inputs(prompt)
    inputs["input_ids"] = torch.cat((inputs["input_ids"], torch.tensor([text[:-1]])), dim=1)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    if "mm_token_type_ids" in inputs:
        inputs["mm_token_type_ids"] = (inputs["input_ids"] == target.special.image_pad).int()
    with torch.no_grad():
        layers = target.vlm(**inputs, use_cache=True).past_key_values.layers
        keys, values = (
            torch.stack([getattr(layer, name) for layer in layers]) for name in ("keys", "values")
        )
        length = torch.tensor([len(prompt) + TOKENS - 1])
        prefix = ActionPrefix(
            keys.transpose(2, 3), values.transpose(2, 3), length, length + 1 + prompt.rope_delta
        )
        torch.manual_seed(3)
        for noise, got in zip(torch.randn(2, 1, target.n_waypoints, 2), xyz, strict=True):
            action = target.denoise(noise, prefix)
            (expected,), _ = target.trajectory(action, prompt.ego_history_xyz, prompt.ego_history_rot)
            torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("samples", [1, 2])
def test_a_static_cache_gives_the_eager_windows_trajectory(
    target: Alpamayo, window: Window, samples: int
) -> None:
    texts = Texts(TOKENS, samples, 0.0)
    eager, _ = run(target, window, Generator(target, target.vlm, texts))
    static = Generator(target, target.vlm, texts, static=len(target.prompt(window)))
    for _ in range(2):  # the second after a reset of the cache
        again, _ = run(target, window, static)
        torch.testing.assert_close(again, eager, atol=1e-4, rtol=1e-4)


def test_texts_are_of_one_length_and_free_of_trajectory_tokens(target: Alpamayo, window: Window) -> None:
    inputs = target.transformers_inputs(target.prompt(window))
    clock = PartClock(target.device)
    clock.start()
    # So hot that every id is about as probable; unmasked, some of 144 tokens would be trajectory's.
    output = Generator(target, target.vlm, Texts(24, 6, 1e4))(inputs, clock)
    written = output.sequences[:, inputs["input_ids"].shape[1] :]
    assert written.shape == (6, 24)
    banned = (written >= target.traj_ids.start) & (written < target.traj_ids.stop)
    assert not banned.any() and len(written.unique()) > 60
    assert not target.vlm.model.visual._forward_hooks and not target.vlm.model.visual._forward_pre_hooks


def test_texts_too_short_to_time() -> None:
    with pytest.raises(ValueError, match="tokens is 1"):
        Texts(1, 1, 0.6)


def test_the_text_model_alone_is_the_vls_on_a_text_without_images(target: Alpamayo) -> None:
    model = text_model(target)
    ids = torch.randint(0, target.traj_ids.start, (1, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, target.vlm(input_ids=ids).logits)
    theirs = {tensor.data_ptr() for tensor in target.vlm.parameters()}
    assert {tensor.data_ptr() for tensor in model.parameters()} <= theirs


def test_windows_are_timed_whole_and_by_parts(target: Alpamayo, window: Window) -> None:
    with torch.inference_mode():  # as the benchmark's stages run
        found = eager_windows(target, window, tokens=TOKENS, temperature=0.6, repeats=2)
    for samples in ("1", "6"):
        whole, parts = found["transformers_window_ms"][samples], found["transformers_parts_ms"][samples]
        assert list(parts) == list(WINDOW_PARTS)
        for each, *of in zip(whole, *parts.values(), strict=True):
            assert 0.9 * each < sum(of) <= each + 0.01
    six, one = (found["transformers_parts_ms"][samples]["vision"] for samples in ("6", "1"))
    assert min(six) > 2 * min(one)  # the images of every sample


def test_on_a_cpu_transformers_compiles_nothing(target: Alpamayo, window: Window) -> None:
    found = compiled_windows(target, window, {}, tokens=TOKENS, temperature=0.6, repeats=2)
    assert found == {"compiled_because": "transformers compiles nothing by itself on a device of type cpu"}


@pytest.mark.slow
def test_compiled_windows_are_timed_whole_on_the_vl(target: Alpamayo, window: Window) -> None:
    with torch.inference_mode():
        found = compiled_windows(
            target, window, {}, tokens=TOKENS, temperature=0.6, repeats=2, compile_config=traced()
        )
    assert found["compiled_on"] == {"1": "vl", "6": "vl"}
    assert found["compiled_window"] == {"1": "measured", "6": "measured"}
    for samples in ("1", "6"):
        # One graph for all texts: no recompiling between them, and no break inside.
        assert found["compiled_told"][samples]["vl"] == {"graphs": 1, "graph_breaks": 0, "cudagraph_skips": 0}
        decode = found["compiled_parts_ms"][samples]["decode"]
        tokens = [round(ms / (TOKENS - 1), 4) for ms in decode]
        assert found["compiled_token_ms"][samples] == tokens
        assert len(found["compiled_window_ms"][samples]) == len(decode) == 2
    assert "_compiled_call" not in vars(target.vlm)


def eager_raw() -> dict[str, Any]:
    """Timings of eager windows, as `eager_windows` returns them."""
    parts = {part: [10.0, 20.0] for part in WINDOW_PARTS} | {"decode": [400.0, 500.0]}
    return {
        "transformers_window_ms": {"1": [450.0, 590.0], "6": [950.0, 990.0]},
        "transformers_parts_ms": {"1": parts, "6": parts},
    }


def break_vl(monkeypatch: pytest.MonkeyPatch, target: Alpamayo) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise TypeError("this class takes no static cache")

    monkeypatch.setattr(target.vlm, "generate", refuse)


@pytest.mark.slow
def test_where_the_vl_does_not_run_windows_are_composed(
    target: Alpamayo, window: Window, monkeypatch: pytest.MonkeyPatch
) -> None:
    break_vl(monkeypatch, target)
    found = compiled_windows(
        target, window, eager_raw(), tokens=TOKENS, temperature=0.6, repeats=2, compile_config=traced()
    )
    assert found["compiled_on"] == {"1": "text", "6": "text"}
    assert found["compiled_window"] == {"1": "composed", "6": "composed"}
    told = found["compiled_told"]["6"]
    assert told["vl"] == {"error": "TypeError: this class takes no static cache"}
    assert told["text"]["graphs"] == 1
    decode, token = found["compiled_parts_ms"]["1"]["decode"], found["compiled_token_ms"]["1"]
    assert token == [round(ms / (TOKENS - 1), 4) for ms in decode]
    whole = [pytest.approx(50.0 + decode[0]), pytest.approx(90.0 + decode[1])]
    assert found["compiled_window_ms"]["1"] == whole
    assert found["compiled_parts_ms"]["1"]["vision"] == [10.0, 20.0]


def test_where_nothing_compiles_the_result_says_why(target: Alpamayo, window: Window) -> None:
    found = compiled_windows(
        target, window, eager_raw(), tokens=2, temperature=0.6, repeats=2, compile_config=traced("nowhere")
    )
    assert found["compiled_window_ms"] == found["compiled_on"] == {}
    for samples in ("1", "6"):
        told = found["compiled_told"][samples]
        assert "Invalid backend: 'nowhere'" in told["vl"]["error"]
        assert "Invalid backend: 'nowhere'" in told["text"]["error"]


def test_a_run_that_compiled_nothing_is_no_compiled_one(target: Alpamayo, window: Window) -> None:
    """transformers leaves compiling out in silence where its own conditions fail."""
    found = compiled_texts(target, target.prompt(window), Texts(2, 1, 0.6), repeats=1)
    assert (found["on"], found["decode_ms"]) == (None, [])
    assert found["told"]["vl"] == found["told"]["text"] == {"error": "generate ran and compiled nothing"}


@pytest.mark.slow
def test_compiled_texts_fall_back_on_the_text_model(
    target: Alpamayo, window: Window, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt, texts = target.prompt(window), Texts(3, 1, 0.6)
    break_vl(monkeypatch, target)
    found = compiled_texts(target, prompt, texts, repeats=2, compile_config=traced())
    assert found["on"] == "text" and len(found["decode_ms"]) == 2
    assert list(found["told"]) == ["vl", "text"]
