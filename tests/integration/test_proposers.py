"""Proposals beside a draft's: any of them leaves the text as it is, and says which tokens are its own."""

import importlib.util
from pathlib import Path

import pytest
import torch

from alpamayo_dflash import DecodeConfig, Proposed, Recorder, SpeculativeDecoder
from alpamayo_dflash.decode.proposer import DRAFT, END_RULE, SOURCES, TARGET, unite
from alpamayo_dflash.decode.stops import StopReason, StopRules
from tests.helpers.proposers import Known, Oracle, Random
from tests.helpers.random_target import random_prompt, random_target

EXAMPLE = Path(__file__).parents[2] / "examples" / "own_proposer.py"
LOOPS = pytest.mark.parametrize("loop", ["host", "device"])
LIMIT = 20


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    return random_target(tmp_path_factory.mktemp("vlm"), push=1.5, sharpness=4.0)


@pytest.fixture(scope="module")
def prompts(target):
    return [random_prompt(target, seed=seed) for seed in (0, 1, 3, 5)]


def options(temperature=0.6, samples=6):
    chosen = {"temperature": temperature, "num_traj_samples": samples, "max_new_tokens": LIMIT}
    return chosen | {"trajectories": False}


@pytest.fixture(scope="module")
def truth(target, prompts):
    decoder = SpeculativeDecoder(target)
    return [decoder.generate(prompt, **options()).token_ids for prompt in prompts]


@LOOPS
@pytest.mark.parametrize("tree", [False, True])
@pytest.mark.parametrize("drafted", [None, "random", "oracle"])
def test_whatever_is_offered_the_text_is_the_targets(target, prompts, truth, *, loop, tree, drafted):
    for prompt, texts in zip(prompts, truth, strict=True):
        draft = {
            None: lambda: None,
            "random": lambda: Random(target.vocab_size, 8),
            "oracle": lambda texts=texts, prompt=prompt: Oracle(
                target.vocab_size, 8, texts=texts, prompt_length=len(prompt), errors=0.25
            ),
        }[drafted]()
        listed = [Known(texts, errors=0.3, tree=tree), Known(texts, errors=0.5, source="last window")]
        decoder = SpeculativeDecoder(target, draft, DecodeConfig(loop=loop), proposers=listed)
        got = decoder.generate(prompt, **options())
        assert got.token_ids == texts
        assert listed[0].begun == listed[1].begun == [(prompt.key, 6)]


@LOOPS
def test_a_perfect_list_needs_few_passes_and_counts_nothing_as_the_drafts(target, prompts, truth, loop):
    recorder = Recorder()
    config = DecodeConfig(loop=loop, sentence_end="off")
    decoder = SpeculativeDecoder(target, config=config, proposers=[Known(truth[1])])
    got = decoder.generate(prompts[1], observer=recorder, **options())
    assert got.token_ids == truth[1]
    assert got.acceptance_length > 2  # the target often goes on after an end mark, where the rule stops
    assert got.drafted == got.accepted == 0
    origins = [origin for trace in recorder.rounds for part in trace.samples for origin in part.origins]
    assert set(origins) <= {"phrase tree", TARGET, END_RULE}
    assert origins.count("phrase tree") > origins.count(TARGET)


@LOOPS
def test_every_token_has_a_source_and_every_node_a_parent(target, prompts, truth, loop):
    recorder = Recorder()
    draft = Oracle(target.vocab_size, 8, texts=truth[1], prompt_length=len(prompts[1]), errors=0.2)
    some = [text if index % 2 else [] for index, text in enumerate(truth[1])]
    listed = Known(some, errors=0.5, tree=loop == "host", count=3)
    decoder = SpeculativeDecoder(target, draft, DecodeConfig(loop=loop), proposers=[listed])
    got = decoder.generate(prompts[1], observer=recorder, **options())
    texts = [[token] for token in recorder.first_tokens]
    seen, drafted, accepted = set(), 0, 0
    for trace in recorder.rounds:
        for part in trace.samples:
            assert len(part.sources) == len(part.parents) == len(part.proposed)
            assert all(-1 <= parent < node for node, parent in enumerate(part.parents))
            assert len(part.origins) == len(part.emitted)
            assert [part.proposed[node] for node in part.taken] == list(part.emitted[: part.accepted])
            assert [part.parents[node] for node in part.taken] == [-1, *part.taken][: part.accepted]
            assert [part.sources[node] for node in part.taken] == list(part.origins[: part.accepted])
            texts[part.sample] += part.emitted
            seen |= set(part.origins)
            drafted, accepted = drafted + part.drafted, accepted + part.draft_accepted
    assert texts == got.token_ids
    assert (got.drafted, got.accepted) == (drafted, accepted)
    assert seen >= {DRAFT, TARGET}


def test_the_device_takes_a_trees_first_path(target, prompts, truth):
    recorder = Recorder()
    config = DecodeConfig(loop="device", sentence_end="off")
    decoder = SpeculativeDecoder(target, config=config, proposers=[Known(truth[1], tree=True)])
    decoder.generate(prompts[1], observer=recorder, **options())
    proposed = {part.proposed for trace in recorder.rounds for part in trace.samples if part.proposed}
    assert proposed == {(8, 9), (target.special.traj_future_start,)}  # the latter after its end mark


@LOOPS
def test_the_example_is_lossless_and_saves_passes(target, prompts, truth, loop):
    spec = importlib.util.spec_from_file_location("own_proposer", EXAMPLE)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    assert len(EXAMPLE.read_text().splitlines()) <= 40
    seen = example.SeenBefore()
    decoder = SpeculativeDecoder(target, config=DecodeConfig(loop=loop), proposers=[seen])
    for prompt, texts in zip(prompts, truth, strict=True):
        assert decoder.generate(prompt, **options()).token_ids == texts
        seen.texts += texts
    again = decoder.generate(prompts[0], **options())
    assert again.token_ids == truth[0]
    assert again.acceptance_length > 1.5


class Padded(Oracle):
    """Has more columns than the vocabulary; those beyond are the likeliest, and mean nothing."""

    def propose(self, context, context_lengths, anchors):
        block = super().propose(context, context_lengths, anchors)
        block.logits = torch.nn.functional.pad(block.logits, (0, 5), value=1e9)
        return block


@LOOPS
def test_columns_beyond_a_drafts_vocabulary_are_padding(target, prompts, truth, loop):
    draft = Padded(target.vocab_size, 8, texts=truth[1], prompt_length=len(prompts[1]))
    got = SpeculativeDecoder(target, draft, DecodeConfig(loop=loop)).generate(prompts[1], **options())
    assert got.token_ids == truth[1]
    assert got.accepted > 0


@LOOPS
def test_too_few_columns_are_an_error(target, prompts, loop):
    draft = Random(target.vocab_size - 1, 8)
    decoder = SpeculativeDecoder(target, draft, DecodeConfig(loop=loop))
    with pytest.raises(ValueError, match=f"{target.vocab_size - 1} columns; its vocabulary has"):
        decoder.generate(prompts[1], **options())


@LOOPS
def test_closing_asks_no_draft(monkeypatch, target, prompts, truth, loop):
    """The pass that writes a last token for the action expert has no logits, and no block before it."""
    prompt, texts = prompts[2], truth[2]
    end, mark = target.special.traj_future_start, target.special.cot_end
    assert any(text[-1] == end and mark not in text for text in texts)  # no rule has proposed it
    draft = Random(target.vocab_size, 8)
    config = DecodeConfig(loop=loop, sentence_end="off")
    decoder = SpeculativeDecoder(target, draft, config)
    passes, run = [], decoder.verifier.run
    monkeypatch.setattr(
        decoder.verifier,
        "run",
        lambda *rows, logits=True, **more: (
            passes.append((logits, len(draft.calls))) or run(*rows, logits=logits, **more)
        ),
    )
    got = decoder.generate(prompt, **options())
    assert got.token_ids == texts
    assert StopReason.TRAJ_FUTURE_START in got.stops
    assert [logits for logits, _ in passes] == [True] * got.rounds + [False]
    assert passes[-1][1] == passes[-2][1]


def test_a_captured_proposer_runs_in_the_devices_rounds_alone(target, prompts):
    class Nothing:
        source = "nothing"

        def __call__(self, state):
            return state.listed[0], torch.zeros_like(state.lengths)

    decoder = SpeculativeDecoder(target, config=DecodeConfig(loop="host"), proposers=[Nothing()])
    with pytest.raises(ValueError, match="device's rounds alone"):
        decoder.generate(prompts[1], **options())
    decoder = SpeculativeDecoder(target, proposers=[Nothing()])
    expected = SpeculativeDecoder(target).generate(prompts[1], **options()).token_ids
    assert decoder.generate(prompts[1], **options()).token_ids == expected
    with pytest.raises(ValueError, match="must be Listed"):
        SpeculativeDecoder(target, proposers=["draft"])


@pytest.mark.parametrize(
    ("tokens", "parents", "message"),
    [((1, 2), (-1,), "2 tokens have 1 parents"), ((1, 2), (-1, 1), "token 1 is 1"), ((1,), (-2,), "0 is -2")],
)
def test_a_proposal_that_is_no_tree_is_refused(tokens, parents, message):
    with pytest.raises(ValueError, match=message):
        Proposed(tokens, parents)


def test_equal_tokens_after_one_parent_are_one_node_of_the_first_source():
    rules = StopRules(90, 91, (92,), 13, "hint")
    offers = [
        Proposed((1, 2, 3), source="last window"),
        Proposed((1, 2, 4), source="mine"),
        Proposed((1, 5, 13), source=DRAFT),
        Proposed((1, 2, 6), (-1, 0, 0), source="phrase tree"),
    ]
    tree = unite(offers, 7, rules, room=99, most=99)
    assert tree.tokens == [1, 2, 3, 4, 5, 13, 6, 90, 91]
    assert tree.parents == [-1, 0, 1, 1, 0, 4, 0, 5, 7]
    assert tree.sources == [
        *("phrase tree", "phrase tree", "last window", "mine", DRAFT, DRAFT, "phrase tree"),
        *(END_RULE, END_RULE),
    ]
    assert [tree.tokens[node] for node, own in enumerate(tree.drafted) if own] == [1, 5, 13]
    assert tree.first_chain() == [0, 1, 2]
    assert SOURCES == ("phrase tree", "last window", DRAFT, END_RULE)
    short = unite(offers, 7, rules, room=2, most=99)
    assert short.tokens == [1, 2, 5, 6]
    assert unite(offers, 7, rules, room=99, most=3).tokens == [1, 2, 3]
    assert unite(offers, 7, rules, room=1, most=99).tokens == []
    assert unite(offers, 13, rules, room=99, most=99).tokens == [90, 91]
