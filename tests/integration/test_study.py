"""The study of recipes: its ceilings against plain arithmetic, and a small one run, resumed and refused."""

import math

import pytest

from alpamayo_dflash.cli.study import StudyConfig, ceilings, run
from alpamayo_dflash.common.artefacts import read_json
from alpamayo_dflash.decode.config import DecodeConfig, Sampling
from alpamayo_dflash.decode.decoder import SpeculativeDecoder
from alpamayo_dflash.decode.observer import Recorder
from alpamayo_dflash.decode.sampling import distribution, mask_bias
from alpamayo_dflash.evaluate.acceptance import study_figures
from alpamayo_dflash.evaluate.ceilings import Continuations, IndependentOracle
from alpamayo_dflash.standins.validate import held_out
from alpamayo_dflash.target.alpamayo import Alpamayo

SAMPLING = Sampling(0.6, 0.98)


@pytest.fixture(scope="module")
def target():
    return Alpamayo.from_pretrained("tiny")


@pytest.fixture(scope="module")
def prompts(target):
    return [target.prompt(view) for view, _ in held_out(3, seed=11)]


def test_the_texts_oracle_takes_whole_blocks(target, prompts):
    found = ceilings(target, prompts, 8, SAMPLING, range(2))
    writer = SpeculativeDecoder(target)
    for clip, prompt in enumerate(prompts):
        lengths = [writer.generate(prompt, seed=seed, trajectories=False).emitted for seed in range(2)]
        assert found["text"][clip] == sum(math.ceil(length / 8) for length in lengths)
        assert found["text"][clip] <= found["independent"][clip] <= sum(lengths)


def test_marginals_are_sums_over_continuations(target, prompts):
    """Two places against the product of both distributions, and the first against the target's own."""
    rules = SpeculativeDecoder(target).rules
    known = Continuations(target, SAMPLING, rules)
    known.read(prompts[0])
    written = SpeculativeDecoder(target).generate(prompts[0], seed=3, trajectories=False).token_ids[0]
    texts = [tuple(written[:end]) for end in range(1, len(written))]
    text = max(texts, key=lambda text: len(known.marginals(text, 2)[1]))
    first, second = known.marginals(text, 2)

    decoder = SpeculativeDecoder(target)
    read, bias = decoder.prefill(prompts[0]), mask_bias(target.traj_ids, target.vocab_size)

    def after(*tokens):
        logits = decoder.verifier.force(read, [tokens]).logits(0)[-1:]
        return distribution(logits, bias, SAMPLING)[0].double()

    own = after(*text)
    assert set(first) == set(own.nonzero().flatten().tolist())
    summed = sum(own[token] * after(*text, token) for token in first)
    for token, mass in second.items():
        assert mass == pytest.approx(float(summed[token]), abs=2e-3)
    assert len(second) > 1 and sum(second.values()) > 0.99


def test_the_independent_oracles_first_pick_is_always_right(target, prompts):
    rules = SpeculativeDecoder(target).rules
    oracle = IndependentOracle(target, 8, SAMPLING, rules)
    decoder = SpeculativeDecoder(target, None, DecodeConfig(loop="device"), proposers=[oracle])
    for seed in range(3):
        oracle.seed, recorder = seed, Recorder()
        result = decoder.generate(prompts[1], seed=seed, trajectories=False, observer=recorder)
        plain = SpeculativeDecoder(target).generate(prompts[1], seed=seed, trajectories=False)
        assert result.token_ids == plain.token_ids
        parts = [part for trace in recorder.rounds for part in trace.samples]
        assert all(part.proposed[0] == part.emitted[0] for part in parts)
        assert max(len(part.emitted) for part in parts) <= 8


def small(folder, **options):
    base = {"epochs": 1, "clips_per_chunk": 1, "test_clips": 2, "training_seeds": 1}
    return StudyConfig(out=folder / "out", results=folder / "study.json", **(base | options))


@pytest.mark.slow
def test_a_small_study(tmp_path):
    first = run(small(tmp_path, recipes="dflash", ceilings=False))
    assert (first["units_done"], first["units_left"]) == (1, 0) and "ceilings" not in first
    second = run(small(tmp_path, recipes="dflash; bigram kl"))
    assert (second["units_done"], second["units_left"]) == (1, 0)
    kept = read_json(tmp_path / "study.json")
    assert list(kept["units"]) == ["dflash | all | 0", "bigram kl | all | 0"]
    assert kept["figures"] == study_figures(kept)
    assert sum(kept["ceilings"]["text"]) <= sum(kept["units"]["dflash | all | 0"]["sampled_passes"])
    assert kept["units"]["bigram kl | all | 0"]["options"] == {"previous_head": "bigram", "loss_type": "kl"}
    with pytest.raises(ValueError, match="another test_clips"):
        run(small(tmp_path, test_clips=1))


def test_what_a_study_does_not_know(tmp_path):
    with pytest.raises(ValueError, match=r"recipes: .*'banana'.* is none of prototype"):
        small(tmp_path, recipes="banana")
    with pytest.raises(ValueError, match="test_clips is 9; the test chunks have 4"):
        small(tmp_path, test_clips=9)
    with pytest.raises(ValueError, match=r"data: .* is none of all, tenth"):
        small(tmp_path, data="half")
