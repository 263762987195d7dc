"""The study of recipes: its ceilings against plain arithmetic, and a small one run, resumed and refused."""

import pytest

from alpamayo_dflash.cli.study import (
    _PLAIN,
    PEER_FILE,
    RECIPES,
    PeerDraft,
    StudyConfig,
    _bench_parts,
    ceilings,
    run,
)
from alpamayo_dflash.common.artefacts import read_json, write_json
from alpamayo_dflash.decode.config import DecodeConfig, Sampling
from alpamayo_dflash.decode.decoder import SpeculativeDecoder
from alpamayo_dflash.decode.observer import Recorder
from alpamayo_dflash.decode.sampling import distribution, mask_bias
from alpamayo_dflash.draft.config import FULL_CONTEXT
from alpamayo_dflash.evaluate.acceptance import PEERS, study_figures
from alpamayo_dflash.evaluate.ceilings import Continuations, IndependentOracle
from alpamayo_dflash.standins.validate import held_out
from alpamayo_dflash.target.alpamayo import Alpamayo
from tests.helpers.random_target import random_draft

SAMPLING = Sampling(0.6, 0.98)


@pytest.fixture(scope="module")
def target():
    return Alpamayo.from_pretrained("tiny")


@pytest.fixture(scope="module")
def prompts(target):
    return [target.prompt(view) for view, _ in held_out(3, seed=11)]


def whole_blocks(text, rules, block):
    """Passes where every block is right, and the rules' own continuation of its last token behind it."""
    passes, last = 0, 0
    while last < len(text) - 1:
        proposed = list(text[last + 1 : last + block])
        while (forced := rules.forced(proposed[-1])) is not None:
            proposed.append(forced)
        last, passes = last + len(proposed) + 1, passes + 1
    return passes


def test_the_texts_oracle_takes_whole_blocks(target, prompts):
    found = ceilings(target, prompts, 8, SAMPLING, range(2))
    writer, beyond = SpeculativeDecoder(target), 0
    for clip, prompt in enumerate(prompts):
        texts = [writer.generate(prompt, seed=seed, trajectories=False).token_ids[0] for seed in range(2)]
        assert found["text"][clip] == sum(whole_blocks(text, writer.rules, 8) for text in texts)
        assert found["text"][clip] <= found["independent"][clip] <= sum(map(len, texts)) - 2
        beyond += sum((len(text) - 1) % 8 in (1, 2) for text in texts)
    assert beyond  # some text's end marks alone would take a pass


def test_plain_says_all_that_recipes_differ_in():
    """What `train` does by default may change; a recipe without a word on it must not."""
    assert set(_PLAIN) == {"context_len", *(key for recipe in RECIPES.values() for key in recipe.options)}


def test_a_benchmark_without_a_rounds_rows_is_refused():
    raw = {"verify_ms": {"8": [4.5]}, "picks_ms": {"no": [0.4]}, "round_ms": {}}
    assert _bench_parts(raw, 8, "bench.json") == {"verify_ms": {"8": [4.5]}, "picks_ms": {"no": [0.4]}}
    with pytest.raises(ValueError, match=r"bench\.json: no pass of 10 rows was timed.*--rows"):
        _bench_parts(raw, 10, "bench.json")
    with pytest.raises(ValueError, match=r"bench\.json: no picks_ms"):
        _bench_parts({"verify_ms": {}}, 10, "bench.json")


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
        assert max(len(part.emitted) for part in parts) <= 10


def small(folder, **options):
    base = {"epochs": 1, "clips_per_chunk": 1, "test_clips": 2, "training_seeds": 1}
    return StudyConfig(out=folder / "out", results=folder / "study.json", **(base | options))


PEER = {"recipe": PEERS["equal-steps"], "data": "all", "seed": 0, "steps": 7, "train_s": 1.5}


def peer_folder(folder, target, **shape):
    """A draft with random weights that sees the whole prompt, as if another trainer had made it."""
    draft = random_draft(target, context_len=FULL_CONTEXT, block_size=8, **shape)
    draft.save_pretrained(folder / "draft")
    write_json(folder / PEER_FILE, PEER)
    return folder


@pytest.mark.slow
def test_a_small_study(tmp_path, target):
    first = run(small(tmp_path, recipes="dflash", ceilings=False))
    assert (first["units_done"], first["units_left"]) == (1, 0) and "ceilings" not in first
    second = run(small(tmp_path, recipes="dflash; bigram kl"))
    assert (second["units_done"], second["units_left"]) == (1, 0)
    kept = read_json(tmp_path / "study.json")
    assert list(kept["units"]) == ["dflash | all | 0", "bigram kl | all | 0"]
    assert kept["figures"] == study_figures(kept)
    assert sum(kept["ceilings"]["text"]) <= sum(kept["units"]["dflash | all | 0"]["sampled_passes"])
    trained = read_json(tmp_path / "out" / "drafts" / "dflash-all-0" / "train.json")
    assert trained["provenance"]["config"]["optimizer"]["optimizer"] == "adamw"
    assert kept["units"]["bigram kl | all | 0"]["options"] == {"previous_head": "bigram", "loss_type": "kl"}
    with pytest.raises(ValueError, match="another test_clips"):
        run(small(tmp_path, test_clips=1))

    peer = peer_folder(tmp_path / "peer", target)
    third = run(small(tmp_path, recipes="dflash; bigram kl", peer_drafts=(peer,)))
    assert (third["units_done"], third["units_left"]) == (1, 0)
    entry = read_json(tmp_path / "study.json")["units"]["speculators, equal steps | all | 0"]
    assert (entry["steps"], entry["train_s"], entry["options"]) == (7, 1.5, {})
    kept = read_json(tmp_path / "study.json")
    tokens, passes = sum(kept["sampled_tokens"]), sum(entry["sampled_passes"])
    assert third["all"]["recipes"][PEERS["equal-steps"]]["acceptance_length"] == round(tokens / passes, 4)
    assert list(third["best_over_speculators"]["all"]) == ["equal_steps"]
    other = peer_folder(tmp_path / "other", target, intermediate_size=32)
    with pytest.raises(ValueError, match=r"equal steps . all . 0 is of another draft"):
        run(small(tmp_path, recipes="dflash", peer_drafts=(other,)))


def test_a_peers_folder_is_checked(tmp_path, target):
    peer = peer_folder(tmp_path / "peer", target)
    assert PeerDraft.read(peer).key == "speculators, equal steps | all | 0"
    with pytest.raises(ValueError, match=r"other: is speculators, equal steps . all . 0, and so is .*peer"):
        other = peer_folder(tmp_path / "other", target)
        run(small(tmp_path, peer_drafts=(peer, other)))
    for change, message in (
        ({"recipe": "banana"}, "recipe is 'banana'; it must be one of speculators, equal steps;"),
        ({"data": "half"}, "data is 'half'; it must be one of all; tenth"),
        ({"steps": None}, "no steps"),
        ({"train_s": "long"}, "train_s is 'long'"),
    ):
        write_json(peer / PEER_FILE, PEER | change)
        with pytest.raises(ValueError, match=message):
            PeerDraft.read(peer)
    with pytest.raises(ValueError, match=r"peer\.json"):
        PeerDraft.read(tmp_path)


def test_what_a_study_does_not_know(tmp_path):
    with pytest.raises(ValueError, match=r"recipes: .*'banana'.* is none of prototype"):
        small(tmp_path, recipes="banana")
    with pytest.raises(ValueError, match="test_clips is 9; the test chunks have 4"):
        small(tmp_path, test_clips=9)
    with pytest.raises(ValueError, match=r"data: .* is none of all, tenth"):
        small(tmp_path, data="half")
