"""The captured form of the pass over given texts, with graphs that a CPU replays, beside the plain one."""

import pytest
import torch

from alpamayo_dflash.decode import verify
from alpamayo_dflash.decode.verify import Recording, Verifier, bucket_of_rows
from alpamayo_dflash.standins.validate import held_out
from alpamayo_dflash.target.alpamayo import Alpamayo

LAYERS, CONTEXT = (2, 5), 16


class Replayed:
    """A captured call that is run anew."""

    made = 0

    def __init__(self, call):
        Replayed.made += 1
        self.replay = call
        call()


@pytest.fixture(scope="module")
def target():
    return Alpamayo.from_pretrained("tiny", dtype=torch.float32).requires_grad_(False)


@pytest.fixture(scope="module")
def prompts(target):
    return [target.prompt(window) for window, _ in held_out(2, seed=3)]


@pytest.fixture
def captures(monkeypatch):
    Replayed.made = 0
    monkeypatch.setattr(verify, "CapturedCall", Replayed)
    monkeypatch.setattr(Verifier, "_can_capture", True)


def texts(*lengths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(1000, (length,), generator=generator).tolist() for length in lengths]


def verifier_of(target, prompt, **options):
    recording = Recording(LAYERS, CONTEXT)
    return Verifier(target, prompt_capacity=len(prompt.input_ids), recording=recording, **options)


def forced(verifier, prompt, responses, **options):
    found = verifier.force(verifier.prefill(prompt), responses, **options)
    states = [verifier.cache.recorded[[CONTEXT + slot for slot in path]].clone() for path in found.paths]
    return [found.logits(index) for index in range(len(responses))], states


@pytest.mark.parametrize("row_width", [None, 8])
@pytest.mark.parametrize("lengths", [(1,), (5, 9, 14), (60, 70, 80), (150, 160)])
def test_padded_passes_give_what_exact_ones_give(target, prompts, captures, lengths, row_width):
    responses = texts(*lengths)
    responses.append([*responses[-1][:-1], 7])  # a beginning of two texts
    plain = forced(verifier_of(target, prompts[0]), prompts[0], responses)
    again = forced(verifier_of(target, prompts[0], row_width=row_width), prompts[0], responses, graph=True)
    for one, other in zip(plain, again, strict=True):
        for expected, found in zip(one, other, strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_a_graph_serves_texts_of_a_like_number_of_rows_on_any_prompt(target, prompts, captures):
    capacity = max(prompts, key=lambda prompt: len(prompt.input_ids))
    verifier = verifier_of(target, capacity)
    forced(verifier, prompts[0], texts(5, 9), graph=True)
    held = [forced(verifier, prompts[0], texts(5, 9), graph=True)[0]]
    kept = held[0][0].clone()
    for prompt in prompts:
        found, _ = forced(verifier, prompt, texts(4, 8, seed=1), graph=True)
        expected, _ = forced(verifier_of(target, prompt), prompt, texts(4, 8, seed=1))
        for one, other in zip(expected, found, strict=True):
            torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-4)
    assert Replayed.made == 1
    assert torch.equal(held[0][0], kept), "a later replay wrote over logits that were handed out"


def test_graphs_are_let_go_when_the_cache_moves(target, prompts, captures):
    verifier = verifier_of(target, prompts[0])
    forced(verifier, prompts[0], texts(9), graph=True)
    forced(verifier, prompts[0], texts(300), graph=True)
    assert len(verifier.forced) == 1
    assert Replayed.made == 2


def test_buckets_hold_what_they_are_for():
    for count in (1, 16, 17, 128, 129, 192, 1000):
        bucket = bucket_of_rows(count)
        assert count <= bucket < count + 64
    assert [bucket_of_rows(count) for count in (1, 42, 129)] == [16, 48, 192]
