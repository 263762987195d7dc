"""The captured prompt pass on a CUDA device (run by hand: `pytest -m gpu`)."""

import dataclasses
from collections import Counter
from pathlib import Path

import pytest
import torch

from alpamayo_dflash.decode.decoder import SpeculativeDecoder
from alpamayo_dflash.decode.prompt_pass import PromptPass
from alpamayo_dflash.decode.verify import Verifier
from alpamayo_dflash.standins.validate import held_out
from alpamayo_dflash.target.alpamayo import Alpamayo

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
WINDOWS = 24


@pytest.fixture(scope="module")
def target():
    return Alpamayo.from_pretrained("tiny", dtype=torch.bfloat16, device="cuda")


@pytest.fixture(scope="module")
def views():
    return [view for view, _ in held_out(WINDOWS, seed=7)]


def longer(prompt, tokens):
    """The prompt with so many tokens of text before its last."""
    ids = torch.cat((prompt.input_ids[:-1], torch.full((tokens,), 100), prompt.input_ids[-1:]))
    last = prompt.position_ids[:, -1:]
    steps = torch.arange(tokens + 1)
    positions = torch.cat((prompt.position_ids[:, :-1], last + steps), dim=1)
    return dataclasses.replace(prompt, input_ids=ids, position_ids=positions)


@torch.inference_mode()
def left(verifier, prompt):
    logits = verifier.prefill(prompt).logits_V
    cache, length = verifier.cache, len(prompt)
    return [
        each.clone() for each in (logits, cache.keys[:, :length], cache.values[:, :length], cache.taps[:16])
    ]


def away(found, expected):
    return [
        float((a.float() - b.float()).norm() / b.float().norm()) for a, b in zip(found, expected, strict=True)
    ]


@pytest.mark.parametrize("taps", [(2, 5), (1, 7)])
def test_the_captured_pass_is_as_near_to_float32_as_the_exact_one(target, views, taps):
    """Prompts of several lengths one after another, by few graphs."""
    torch.backends.cuda.matmul.allow_tf32 = False
    exact = Alpamayo.from_pretrained("tiny", dtype=torch.float32, device="cuda")
    sizes = {"taps": taps, "context_len": 16, "prompt_capacity": 4096}
    captured, eager, reference = (Verifier(each, **sizes) for each in (target, target, exact))
    eager._read = PromptPass(target, eager.cache, eager._model, taps, graph=False)
    distances = {"captured": [], "eager": []}
    for index, view in enumerate(views):
        prompt = longer(target.prompt(view), (0, 40, 300, 7)[index % 4])
        expected = left(reference, prompt)
        distances["captured"].append(away(left(captured, prompt), expected))
        distances["eager"].append(away(left(eager, prompt), expected))
    assert len(captured._read.kept) == 2 and not eager._read.kept
    means = {name: torch.tensor(found).mean(0).tolist() for name, found in distances.items()}
    print(f"logits, keys, values, taps from float32: {means}")
    for found, plain in zip(means["captured"], means["eager"], strict=True):
        assert found <= 1.1 * plain


def test_what_was_read_before_does_not_show(target, views):
    """After other prompts, longer ones among them, a prompt leaves the same bits."""
    verifier = Verifier(target, taps=(2, 5), context_len=16, prompt_capacity=4096)
    prompts = [target.prompt(view) for view in views[:3]]
    first = left(verifier, prompts[0])
    for other in (prompts[1], longer(prompts[2], 50), longer(prompts[1], 400), prompts[2]):
        left(verifier, other)
    for one, other in zip(left(verifier, prompts[0]), first, strict=True):
        assert torch.equal(one, other)


def test_a_broken_prompt_leaves_nothing_behind(target, views):
    decoder, options = SpeculativeDecoder(target), {"num_traj_samples": 2, "seed": 1}
    good = decoder.generate(views[0], **options)
    prompt = target.prompt(views[1])
    pixels = prompt.pixel_values.clone()
    pixels[5] = float("nan")
    with pytest.raises(ValueError, match="logits are not finite after the prompt"):
        decoder.generate(dataclasses.replace(prompt, pixel_values=pixels), **options)
    again = decoder.generate(views[0], **options)
    assert again.token_ids == good.token_ids and torch.equal(again.pred_xyz, good.pred_xyz)


def test_the_host_waits_for_reports_alone(target, views, monkeypatch):
    """Between a prompt and its trajectory the host reads the first tokens, each round, and the end."""
    decoder, options = SpeculativeDecoder(target), {"num_traj_samples": 2, "seed": 1}
    prompt = target.prompt(views[0])
    for _ in range(2):
        rounds = decoder.generate(prompt, **options).rounds
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with pytest.warns(UserWarning) as said:
            decoder.generate(prompt, **options)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    waits = Counter(
        f"{Path(each.filename).name}:{each.lineno}" for each in said if "synchroniz" in str(each.message)
    )
    print(f"{rounds} rounds; waits: {dict(waits)}")
    rest = {place: count for place, count in waits.items() if not place.startswith("streams.py")}
    # The first tokens and the end; each round waits for the stream, which is how its report is read.
    assert sum(rest.values()) <= 2
