"""transformers' fast way of decoding on a CUDA device (run by hand: `pytest -m gpu`)."""

import pytest
import torch

from alpamayo_dflash.bench.baselines import compiled_windows, eager_windows
from alpamayo_dflash.bench.clocks import PartClock
from alpamayo_dflash.bench.compiled import compiled_text_model, tried
from alpamayo_dflash.bench.generation import Generator, Texts
from alpamayo_dflash.standins.untrained import noise_window
from alpamayo_dflash.target.alpamayo import Alpamayo

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
TOKENS = 6


@pytest.fixture(scope="module")
def target():
    return Alpamayo.from_pretrained("tiny", device="cuda", dtype=torch.float32).requires_grad_(False)


@pytest.mark.parametrize("samples", [1, 6])
def test_the_compiled_pass_writes_the_eager_text(target, samples):
    window, texts = noise_window(0), Texts(TOKENS, samples, 0.0)
    inputs = target.transformers_inputs(target.prompt(window))
    length = inputs["input_ids"].shape[1]

    def texts_of(static):
        generate = Generator(target, target.vlm, texts, static=static)
        clock, written = PartClock(target.device), []
        for _ in range(4):  # compiled, warmed up, captured, replayed
            clock.start()
            written.append(generate(inputs, clock).sequences[:, length:].tolist())
        assert all(ms > 0 for ms in clock.parts_ms().values())
        return written

    nothing, told = tried(target.vlm, lambda: texts_of(None))
    assert (nothing, told) == (None, {"error": "generate ran and compiled nothing"})
    with torch.no_grad():
        eager = texts_of(None)
    found, told = tried(target.vlm, lambda: texts_of(length))
    assert found == eager, told
    assert told == {"graphs": 1, "graph_breaks": 0, "cudagraph_skips": 0}


def test_windows_of_both_baselines(target):
    options = {"tokens": TOKENS, "temperature": 0.6, "repeats": 3}
    with torch.inference_mode():
        eager = eager_windows(target, noise_window(0), **options)
        found = compiled_windows(target, noise_window(0), eager, **options)
    assert found["compiled_on"] == {"1": "vl", "6": "vl"}, found["compiled_told"]
    for samples in ("1", "6"):
        decode = (eager["transformers_parts_ms"], found["compiled_parts_ms"])
        slow, fast = (sorted(each[samples]["decode"])[1] for each in decode)
        assert fast < slow  # launches are what the eager way spends its time on
        for raw, arm in ((eager, "transformers"), (found, "compiled")):
            whole = raw[f"{arm}_window_ms"][samples]
            parts = zip(*raw[f"{arm}_parts_ms"][samples].values(), strict=True)
            for each, of in zip(whole, map(sum, parts), strict=True):
                assert 0.9 * each < of <= each + 0.1


def test_the_text_model_alone_runs_compiled(target):
    texts = Texts(TOKENS, 1, 0.6)
    found = compiled_text_model(target, target.prompt(noise_window(0)), texts, repeats=3)
    assert found["on"] == "text" and len(found["decode_ms"]) == 3, found["told"]
