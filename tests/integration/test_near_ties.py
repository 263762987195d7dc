"""Where roundings differ the loops may part at near-ties, and nowhere else; those are told from errors."""

from dataclasses import replace

import pytest
import torch

from alpamayo_dflash.decode.cache import ROOT
from alpamayo_dflash.decode.config import Sampling
from alpamayo_dflash.decode.decoder import SpeculativeDecoder
from alpamayo_dflash.decode.sampling import choose
from alpamayo_dflash.decode.tree import Tree
from alpamayo_dflash.draft.config import DraftConfig
from alpamayo_dflash.draft.model import DFlashDraft
from alpamayo_dflash.evaluate.arms import Arms
from alpamayo_dflash.evaluate.config import EvaluateConfig
from alpamayo_dflash.evaluate.near_ties import Loop, choices_within, parting
from alpamayo_dflash.evaluate.run import _identity
from alpamayo_dflash.standins.validate import held_out
from alpamayo_dflash.target.alpamayo import Alpamayo
from tests.helpers.proposers import Oracle
from tests.helpers.random_target import random_prompt, random_target

BLOCK, PROMPTS, LIMIT, OFF = 8, 24, 24, 0.02


class Rounded:
    """A text model whose logits are off by up to so much, always the same for the same ones."""

    def __init__(self, model, off=OFF):
        self._model, self._off = model, off
        self.prompt, self.rows = model.prompt, model.rows

    def logits(self, normed):
        logits = self._model.logits(normed).float()
        return logits + self._off * torch.sin(1e4 * logits)


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    """With a head so flat that the best two are often as good as equal."""
    folder = tmp_path_factory.mktemp("vlm")
    return random_target(folder, push=0.5, sharpness=1.0, hidden=64, mlp=256)


def loops_of(target, prompt, sampling, *, rounded=True):
    options = {"temperature": sampling.temperature, "top_p": sampling.top_p, "seed": 3}
    options |= {"max_new_tokens": LIMIT, "trajectories": False}
    plain = SpeculativeDecoder(target)
    read = plain.prefill(prompt)
    [text] = plain.generate(read, **options).token_ids
    draft = Oracle(target.vocab_size, BLOCK, texts=[text], prompt_length=len(prompt), errors=0.1)
    fast = SpeculativeDecoder(target, draft)
    if rounded:
        fast.verifier._model = Rounded(fast.verifier._model)
    fast_read = fast.prefill(prompt)
    [other] = fast.generate(fast_read, **options).token_ids
    return Loop(plain, read, text, 1, 1), Loop(fast, fast_read, other, BLOCK, BLOCK)


@pytest.mark.parametrize("sampling", [Sampling(0.0), Sampling(0.6)])
def test_texts_part_at_near_ties_alone(target, sampling):
    parted = 0
    for seed in range(PROMPTS):
        loops = loops_of(target, random_prompt(target, seed=seed), sampling)
        found = parting(*loops, sampling=sampling, seed=3)
        assert 0.5 * OFF < found.largest_difference < 1.1 * OFF
        if loops[0].text == loops[1].text:
            assert found.position is None and not found.near_tie
            continue
        parted += 1
        assert found.near_tie, found
        assert loops[0].text[: found.position] == loops[1].text[: found.position]
    assert 2 <= parted < PROMPTS


@pytest.mark.parametrize("sampling", [Sampling(0.0), Sampling(0.6)])
def test_in_bfloat16_too(tmp_path, sampling):
    """Where texts part at all: whether any does depends on the processor."""
    target = random_target(tmp_path, push=0.5, sharpness=1.0, hidden=64, mlp=256, dtype=torch.bfloat16)
    for seed in range(8):
        loops = loops_of(target, random_prompt(target, seed=seed), sampling, rounded=False)
        found = parting(*loops, sampling=sampling, seed=3)
        assert found.near_tie == (loops[0].text != loops[1].text)


def test_the_second_best_token_is_a_near_tie_where_it_is_near_enough(target):
    """Greedy, against margins found one by one."""
    seen = set()
    for seed in range(6):
        narrow, wide = loops_of(target, random_prompt(target, seed=seed), Sampling(0.0))
        for position in range(1, len(narrow.text)):
            narrow.decoder.verifier.begin(narrow.read, LIMIT)
            tail = Tree(narrow.decoder.verifier.cache.tail)
            slots = tail.add_chain(narrow.text[:position], ROOT)
            logits = [narrow.decoder.verifier.rows([slot]) for slot in slots][-1][0].clone()
            logits[list(target.traj_ids)] = float("-inf")
            best, second = logits.topk(2).indices.tolist()
            if best != narrow.text[position]:
                continue  # an exact tie
            other = [*narrow.text[:position], second, *narrow.text[position + 1 :]]
            found = parting(narrow, replace(wide, text=other), sampling=Sampling(0.0), seed=3)
            margin = float(logits[best] - logits[second])
            assert found.position == position
            assert found.near_tie == (margin <= 2 * found.largest_difference)
            seen.add(found.near_tie)
    assert seen == {True, False}


@pytest.mark.parametrize("sampling", [Sampling(0.0), Sampling(0.6)])
def test_a_wrong_token_is_no_near_tie(tmp_path, sampling):
    target = random_target(tmp_path, push=0.5, sharpness=12.0)
    one, other = loops_of(target, random_prompt(target, seed=1), sampling)
    wrong = list(other.text)
    wrong[2] = (wrong[2] + 17) % 250
    found = parting(one, Loop(other.decoder, other.read, wrong, BLOCK, BLOCK), sampling=sampling, seed=3)
    assert found.position == 2
    assert not found.near_tie


@pytest.mark.parametrize("sampling", [Sampling(0.0), Sampling(0.6), Sampling(1.0, 0.5), Sampling(1.0, 1.0)])
def test_choices_within_hold_every_choice_of_scores_that_far_off(sampling):
    generator = torch.Generator().manual_seed(0)
    bias = torch.zeros(40)
    bias[7:9] = float("-inf")
    sizes = []
    for _ in range(40):
        scores = torch.randn(40, generator=generator) * 2 + bias
        noise = torch.zeros(40) if sampling.greedy else -torch.rand(40, generator=generator).log().neg().log()
        exact = choices_within(scores, noise, sampling, 0.0)
        temper = 1.0 if sampling.greedy else sampling.temperature
        given = None if sampling.greedy else noise[None]
        chosen = choose((scores * temper)[None], torch.zeros(40), sampling, given)
        assert exact.nonzero().flatten().tolist() == chosen.tolist()
        possible = choices_within(scores, noise, sampling, 0.2)
        sizes.append(int(possible.sum()))
        assert possible[chosen].all()
        for _ in range(60):
            off = (torch.rand(40, generator=generator) * 2 - 1) * 0.2
            moved = choose(((scores + off) * temper)[None], torch.zeros(40), sampling, given)
            assert possible[moved].all()
    assert 1 < sum(sizes) / len(sizes) < 6


def test_a_nucleus_of_many_equal_tokens_lets_few_of_them_win():
    """No token is surely inside, but of the best few by noise one is: at most 2% of the mass is outside."""
    generator = torch.Generator().manual_seed(0)
    scores = 0.1 * torch.rand(300, generator=generator)
    noise = -torch.rand(300, generator=generator).log().neg().log()
    possible = choices_within(scores, noise, Sampling(1.0, 0.98), 0.05)
    assert possible[(scores + noise).argmax()]
    assert possible.sum() < 15
    for _ in range(200):
        off = (torch.rand(300, generator=generator) * 2 - 1) * 0.05
        assert possible[
            choose((scores + off)[None], torch.zeros(300), Sampling(1.0, 0.98), noise[None])
        ].all()


def test_an_evaluation_counts_them(tmp_path):
    checkpoint = "tiny"
    target = Alpamayo.from_pretrained(checkpoint)
    draft = DFlashDraft.random(
        DraftConfig(
            hidden_size=target.hidden_size,
            intermediate_size=64,
            num_layers=1,
            num_heads=target.num_heads,
            num_kv_heads=target.num_kv_heads,
            head_dim=target.head_dim,
            vocab_size=target.vocab_size,
            block_size=BLOCK,
            context_len=16,
            target_layer_ids=(1, 4),
            num_target_layers=target.num_layers,
            mask_token_id=target.vocab_size,
        )
    )
    config = EvaluateConfig(
        draft_model=tmp_path,
        cache_dir=tmp_path,
        alpamayo_model=checkpoint,
        temperature=1.5,
        num_traj_samples=2,
    )
    arms = Arms(target, draft, config)
    verifier = arms._decoders["dflash"].verifier
    verifier._model = Rounded(verifier._model, 0.5)
    near = different = 0
    for view, _ in held_out(6, seed=3):
        prompt = target.prompt(view)
        # At this temperature the third arm's run is not looked at.
        runs = {arm: arms.timed(arm, prompt) for arm in ("autoregressive", "dflash")}
        found = _identity(arms, runs, prompt)
        assert found["not_near_ties"] == 0
        near += found["near_ties"]
        texts = [
            arms.again(arm, prompt, Sampling(0.0, config.top_p)).token_ids
            for arm in ("autoregressive", "dflash")
        ]
        different += sum(a != b for a, b in zip(*texts, strict=True))
        pairs = zip(runs["autoregressive"].token_ids, runs["dflash"].token_ids, strict=True)
        different += sum(a != b for a, b in pairs)
    assert near == different > 0
