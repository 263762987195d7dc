"""The fast decoder and the fast draft against their plain forms, in Triton's interpreter."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional

from alpamayo_dflash.decode import verify as verify_module
from alpamayo_dflash.decode.config import DecodeConfig
from alpamayo_dflash.decode.decoder import SpeculativeDecoder
from alpamayo_dflash.decode.forward import FusedModel
from alpamayo_dflash.decode.observer import Recorder
from alpamayo_dflash.draft.config import FULL_CONTEXT, DraftConfig
from alpamayo_dflash.draft.model import DFlashDraft
from alpamayo_dflash.target.formats import TargetFormat
from alpamayo_dflash.target.quantised import make_fp8
from alpamayo_dflash.target.qwen3_fused import FusedDecoder
from alpamayo_dflash.target.weights import FP8Product, share_storage

attention = pytest.importorskip("alpamayo_dflash.kernels.attention")


@pytest.fixture(autouse=True)
def _few_stretches(monkeypatch):
    """Two of a tile each: prompts are short here, and every empty stretch is a program to interpret."""
    plans = {most: replace(plan, keys=16, stretches=2) for most, plan in attention._PLANS.items()}
    monkeypatch.setattr(attention, "_PLANS", plans)


def draft_of(target=None, *, hidden=128, vocab=90, block=4, context=6, heads=4, kv_heads=2, dim=32):
    config = DraftConfig(
        hidden_size=hidden if target is None else target.hidden_size,
        num_layers=2,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=dim,
        intermediate_size=160,
        vocab_size=vocab if target is None else target.vocab_size,
        block_size=block,
        context_len=context,
        target_layer_ids=(0, 2),
        num_target_layers=4 if target is None else target.num_layers,
        mask_token_id=vocab,
    )
    return DFlashDraft.random(config, seed=1).eval()


@pytest.mark.parametrize("window", [6, FULL_CONTEXT])
@torch.inference_mode()
def test_the_fast_draft_says_what_the_plain_one_says(window):
    from alpamayo_dflash.draft.fused import FusedDraft, places

    # A prompt shorter than the context; a draft that sees every state has room for the longest prompt.
    draft, samples, per_sample, prompt = draft_of(context=window), 2, 24, 4
    generator = torch.Generator().manual_seed(0)
    draft.bind(torch.randn(90, 128, generator=generator), torch.randn(90, 128, generator=generator), 4)
    block, context, slots = 4, 6, samples * per_sample
    taps = torch.zeros(context + slots + 1, 256)
    taps[context - prompt : context] = torch.randn(prompt, 256, generator=generator)
    fast = FusedDraft(draft, taps, context=context, samples=samples, per_sample=per_sample, slots=slots)
    fast.begin(prompt)
    bases = torch.tensor([0, per_sample])
    tokens = torch.randint(0, 90, (samples, per_sample), generator=generator)
    state = SimpleNamespace(
        tokens=tokens,
        lengths=torch.ones(2, dtype=torch.int64),
        previous=torch.zeros(2, dtype=torch.int64),
        bases=bases,
    )
    for step in range(5):
        placed = fast._placed(state)
        wanted = places(state, fast._first, block=block, context=context, window=window, slots=slots)
        for name, value in vars(wanted).items():
            assert torch.equal(value, getattr(placed, name)), name
        got = fast(state).logits
        contexts, lengths = [], []
        for s in range(samples):
            anchor = int(state.lengths[s]) - 1
            states = torch.cat((taps[context - prompt : context], taps[context + int(bases[s]) :][:anchor]))
            states = states[-window:]
            lengths.append(len(states))
            contexts.append(functional.pad(states, (0, 0, context + per_sample - len(states), 0)))
        anchors = tokens.gather(1, state.lengths[:, None] - 1)[:, 0]
        expected = draft.propose(torch.stack(contexts), torch.tensor(lengths), anchors).logits
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
        # The pass writes the states of the whole block, those of rejected tokens too.
        for s in range(samples):
            at = context + int(bases[s]) + int(state.lengths[s]) - 1
            taps[at : at + block] = torch.randn(block, 256, generator=generator)
        state.previous = state.lengths - 1
        state.lengths = state.lengths + torch.tensor([[1, 4], [4, 2], [3, 1], [1, 1], [2, 2]][step])


@pytest.mark.parametrize(("loop", "together"), [("host", False), ("device", True)])
def test_the_fused_model_writes_what_the_plain_one_writes(monkeypatch, tmp_path, loop, together):
    """Weights as another's model has them, one by one, or together as our loader lays them."""
    from tests.helpers.random_target import random_prompt, random_target

    target = random_target(tmp_path, push=1.5, sharpness=4.0)
    if together:
        share_storage(target.vlm)
    layers = FusedDecoder(target.text_layers, target.vlm.model.language_model.norm).layers
    assert {len(layer.qkv.weights) for layer in layers} == {1 if together else 3}
    prompt = random_prompt(target, seed=3)
    options = {"max_new_tokens": 6, "trajectories": False, "num_traj_samples": 2}
    draft = draft_of(
        target, context=8, heads=target.num_heads, kv_heads=target.num_kv_heads, dim=target.head_dim
    )
    config = DecodeConfig(loop=loop)
    expected = [SpeculativeDecoder(target, d, config) for d in (None, draft)]
    plain = [decoder.generate(prompt, **options) for decoder in expected]
    monkeypatch.setattr(verify_module, "text_model", FusedModel)
    for before, d, wanted in zip(expected, (None, draft), plain, strict=True):
        decoder = SpeculativeDecoder(target, d, config)
        got = decoder.generate(prompt, **options)
        assert got.token_ids == wanted.token_ids
        a, b = before.verifier.cache, decoder.verifier.cache
        length = a.prompt_length + 2
        torch.testing.assert_close(a.keys[:, :length], b.keys[:, :length], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(a.values[:, :length], b.values[:, :length], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(
            a.taps[: a.context_len + 1], b.taps[: a.context_len + 1], rtol=1e-4, atol=1e-4
        )


def test_the_fused_model_in_fp8_writes_what_the_plain_one_writes(monkeypatch, tmp_path):
    from tests.helpers.random_target import random_prompt, random_target

    target = random_target(tmp_path, push=1.5, sharpness=4.0)
    make_fp8(target, TargetFormat(text="fp8"))
    layers = FusedDecoder(target.text_layers, target.vlm.model.language_model.norm).layers
    assert all(isinstance(layer.qkv, FP8Product) for layer in layers)
    prompt, config = random_prompt(target, seed=3), DecodeConfig(loop="device")
    options = {"max_new_tokens": 6, "trajectories": False, "num_traj_samples": 2}
    expected = SpeculativeDecoder(target, None, config).generate(prompt, **options)
    monkeypatch.setattr(verify_module, "text_model", FusedModel)
    decoder = SpeculativeDecoder(target, None, config)
    assert isinstance(decoder.verifier._model, FusedModel)
    assert decoder.generate(prompt, **options).token_ids == expected.token_ids


@pytest.mark.parametrize("context", [8, FULL_CONTEXT])
def test_both_forms_of_a_draft_propose_the_same_in_a_decoder(monkeypatch, tmp_path, context):
    """The plain form asked by the host's loop, the fast one in the device's rounds."""
    from tests.helpers.random_target import random_prompt, random_target

    target = random_target(tmp_path, push=1.5, sharpness=4.0)
    draft = draft_of(target, context=context, heads=2, kv_heads=2, dim=target.head_dim)
    options = {"max_new_tokens": 9, "trajectories": False, "temperature": 0.0}
    rounds = {}
    for loop, static in (("host", False), ("device", True)):
        monkeypatch.setattr(DFlashDraft, "has_static_block", static)
        config = DecodeConfig(loop=loop, sentence_end="off", prompt_capacity=48)
        decoder = SpeculativeDecoder(target, draft, config)
        rounds[loop] = []
        for seed in (3, 5):  # the second behind a shorter prompt, by the same round
            recorder = Recorder()
            prompt = random_prompt(target, seed=seed, length=40 - seed)
            decoder.generate(prompt, observer=recorder, **options)
            rounds[loop] += [trace.samples[0] for trace in recorder.rounds]
        assert bool(decoder.device_rounds.kept) == static
    assert [trace.emitted for trace in rounds["host"]] == [trace.emitted for trace in rounds["device"]]
    for plain, fast in zip(rounds["host"], rounds["device"], strict=True):
        # The device never proposes beyond the block; the limit cuts both.
        assert fast.proposed == plain.proposed[: len(fast.proposed)] and fast.proposed


@torch.inference_mode()
def test_a_text_that_went_wrong_leaves_nothing_behind():
    from alpamayo_dflash.draft.fused import FusedDraft

    draft, per_sample = draft_of(), 64
    generator = torch.Generator().manual_seed(0)
    draft.bind(torch.randn(90, 128, generator=generator), torch.randn(90, 128, generator=generator), 4)
    taps = torch.randn(6 + per_sample + 1, 256, generator=generator)
    fast = FusedDraft(draft, taps, context=6, samples=1, per_sample=per_sample, slots=per_sample)
    state = SimpleNamespace(
        tokens=torch.ones(1, per_sample, dtype=torch.int64),
        lengths=torch.tensor([40]),
        previous=torch.tensor([38]),
        bases=torch.zeros(1, dtype=torch.int64),
    )
    fast.begin(6)
    good = taps[6 + 38].clone()
    taps[6 + 38] = float("nan")
    assert not torch.isfinite(fast(state).logits).any()
    taps[6 + 38] = good
    fast.begin(6)
    state.lengths, state.previous = torch.tensor([4]), torch.tensor([2])
    assert torch.isfinite(fast(state).logits).all()
