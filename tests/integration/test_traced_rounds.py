"""Rounds that also say what target and draft thought: the same texts, and the numbers of plain softmaxes."""

from dataclasses import asdict

import pytest
import torch

from alpamayo_dflash import DecodeConfig, Recorder, SpeculativeDecoder
from alpamayo_dflash.decode.config import Sampling
from alpamayo_dflash.decode.rollouts import teacher_forced
from alpamayo_dflash.decode.sampling import Choice, Chooser, distribution, mask_bias
from alpamayo_dflash.decode.scores import NOTHING_CHOSEN, TOP, RoundScores, Scorer, place_scores, score_all
from alpamayo_dflash.report.clip_trace import probability
from tests.helpers.proposers import Known, NotANumber, Oracle, Random, Reduced
from tests.helpers.random_target import random_draft, random_prompt, random_target

LOOPS = pytest.mark.parametrize("loop", ["host", "device"])
LIMIT = 20


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    return random_target(tmp_path_factory.mktemp("vlm"), push=1.5, sharpness=4.0)


@pytest.fixture(scope="module")
def prompt(target):
    return random_prompt(target, seed=1)


@pytest.fixture(scope="module")
def texts(target, prompt):
    return decoded(SpeculativeDecoder(target), prompt).token_ids


def decoded(decoder, prompt, observer=None, temperature=0.6, samples=3):
    chosen = {"temperature": temperature, "num_traj_samples": samples, "max_new_tokens": LIMIT}
    return decoder.generate(prompt, observer=observer, trajectories=False, **chosen)


def head_draft(target, kind, few):
    draft = random_draft(
        target,
        target_layer_ids=(0, target.num_layers - 1),
        draft_vocab_size=few,
        previous_head=kind,
        previous_size=16,
    )
    if few is not None:
        draft.draft_token_ids.copy_(torch.arange(few) * 2)
    return draft


def proposer(kind, target, prompt, texts):
    """A decoder's draft and lists, by name."""
    oracle = {"texts": texts, "prompt_length": len(prompt), "errors": 0.25}
    few = sorted({token for text in texts for token in text} | set(range(0, 200, 2)), reverse=True)
    made = {
        "none": lambda: (None, []),
        "oracle": lambda: (Oracle(target.vocab_size, 8, **oracle), []),
        "reduced": lambda: (Reduced(target.vocab_size, 8, ids=few, **oracle), []),
        "gru": lambda: (head_draft(target, "gru", None), []),
        "reduced gru": lambda: (head_draft(target, "gru", 100), []),
        "list": lambda: (Random(target.vocab_size, 8), [Known(texts, errors=0.3, tree=True)]),
    }
    return made[kind]()


KINDS = pytest.mark.parametrize("kind", ["none", "oracle", "reduced", "gru", "reduced gru", "list"])


@LOOPS
@KINDS
@pytest.mark.parametrize("temperature", [0.0, 0.6])
def test_texts_and_rounds_are_the_same_with_and_without(target, prompt, texts, *, loop, kind, temperature):
    runs = []
    for scores in (False, True):
        draft, listed = proposer(kind, target, prompt, texts)  # anew: some draw their words
        recorder = Recorder(scores=scores)
        decoder = SpeculativeDecoder(target, draft, DecodeConfig(loop=loop), proposers=listed)
        result = decoded(decoder, prompt, recorder, temperature)
        traces = [part for each in recorder.rounds for part in each.samples]
        assert all((part.scores is not None) == scores for part in traces)
        runs.append((result.token_ids, result.stops, [(part.proposed, part.emitted) for part in traces]))
    assert runs[0] == runs[1]
    assert len(recorder.first_scores) == len(result.coc)


@LOOPS
def test_without_being_asked_nothing_is_scored(target, prompt, texts, loop, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("scored")

    monkeypatch.setattr(Scorer, "__init__", refuse)
    draft, _ = proposer("gru", target, prompt, texts)
    decoder = SpeculativeDecoder(target, draft, DecodeConfig(loop=loop))
    assert decoded(decoder, prompt, Recorder()).token_ids
    assert not any(shape.scored for shape in decoder.device_rounds.kept)
    with pytest.raises(AssertionError, match="scored"):
        decoded(decoder, prompt, Recorder(scores=True))


@LOOPS
@pytest.mark.parametrize("kind", ["oracle", "list"])
def test_each_emitted_token_has_the_probability_that_the_target_drew_from(target, prompt, texts, loop, kind):
    """Against a pass of the target over the whole text."""
    sampling, recorder = Sampling(0.6, 0.98), Recorder(scores=True)
    draft, listed = proposer(kind, target, prompt, texts)
    decoder = SpeculativeDecoder(target, draft, DecodeConfig(loop=loop), proposers=listed)
    got = decoded(decoder, prompt, recorder)
    assert got.token_ids == texts
    bias = mask_bias(target.traj_ids, target.vocab_size)
    for sample, text in enumerate(texts):
        logits = teacher_forced(target, prompt, text).logits
        expected = distribution(logits, bias, sampling).tolist()
        emitted = [recorder.first_scores[sample]]
        for each in recorder.rounds:
            for part in each.samples:
                if part.sample == sample:
                    assert len(part.scores.target) >= len(part.proposed) + 1
                    emitted += [part.scores.target[index] for index in part.scores.at]
        assert [place.chosen for place in emitted] == text
        for place, row, known in zip(emitted, expected, logits + bias, strict=True):
            pairs = zip((place.chosen, *place.ids), (place.chosen_logit, *place.logits), strict=True)
            places = {name: [value] for name, value in asdict(place).items()}
            for token, logit in pairs:
                found = probability(places, 0, logit, sampling.temperature)
                assert found == pytest.approx(row[token], abs=1e-4)
            assert place.ids[0] == int(known.argmax())
            assert place.chosen_rank == int((known > known[place.chosen]).sum())
            assert place.log_sum_exp == pytest.approx(float(known.logsumexp(0)), abs=1e-3)


def test_both_rounds_say_the_same(target, prompt, texts):
    found = []
    for loop in ("host", "device"):
        recorder = Recorder(scores=True)
        draft, _ = proposer("reduced gru", target, prompt, texts)
        decoded(SpeculativeDecoder(target, draft, DecodeConfig(loop=loop)), prompt, recorder, samples=1)
        found.append([part for each in recorder.rounds for part in each.samples])
    assert len(found[0]) == len(found[1])
    draft_places = 0
    for one, other in zip(*found, strict=True):
        assert one.emitted == other.emitted
        assert one.scores.at == other.scores.at
        for name in ("target", "draft"):
            pair = getattr(one.scores, name), getattr(other.scores, name)
            assert len(pair[0]) == len(pair[1])
            for mine, theirs in zip(*pair, strict=True):
                assert (mine.chosen, mine.chosen_rank) == (theirs.chosen, theirs.chosen_rank)
                assert mine.ids == theirs.ids
                assert mine.logits == pytest.approx(theirs.logits, abs=1e-3)
                assert mine.nucleus_mass == pytest.approx(theirs.nucleus_mass, abs=1e-3)
        draft_places += len(one.scores.draft)
        assert [each.chosen for each in one.scores.draft[: len(one.emitted)]] == list(
            one.emitted[: len(one.scores.draft)]
        )
    assert draft_places


def test_what_a_candidate_did_not_settle_is_scored_again(target, prompt, texts, monkeypatch):
    """On a GPU a choice may have to be made again with a sort; its place names what was chosen then."""
    choose = Chooser.__call__

    def unsettled(self, *rows):
        choice = choose(self, *rows)
        wrong = torch.zeros_like(choice.columns)
        return Choice(wrong, torch.zeros_like(choice.settled), choice.finite)

    monkeypatch.setattr(Chooser, "__call__", unsettled)
    recorder = Recorder(scores=True)
    decoder = SpeculativeDecoder(target, Random(target.vocab_size, 8), DecodeConfig(loop="device"))
    assert decoded(decoder, prompt, recorder).token_ids == texts
    parts = [part for each in recorder.rounds for part in each.samples]
    assert parts
    for part in parts:
        assert tuple(part.scores.target[index].chosen for index in part.scores.at) == part.emitted
        assert [place.chosen for place in part.scores.draft[:1]] == list(
            part.emitted[: len(part.scores.draft)][:1]
        )


@LOOPS
def test_a_draft_that_failed_thought_nothing(target, prompt, texts, loop):
    recorder = Recorder(scores=True)
    decoder = SpeculativeDecoder(target, NotANumber(target.vocab_size, 8), DecodeConfig(loop=loop))
    with pytest.warns(UserWarning, match="the draft failed"):
        got = decoded(decoder, prompt, recorder)
    assert got.token_ids == texts
    assert got.draft_failures
    assert not any(part.scores.draft for each in recorder.rounds for part in each.samples)


def test_a_text_that_is_ended_by_force_is_scored_as_far_as_the_target_wrote(target, prompt, texts):
    config = DecodeConfig(sentence_end="force")
    runs = []
    for scores in (False, True):
        draft, _ = proposer("oracle", target, prompt, texts)
        recorder = Recorder(scores=scores)
        runs.append(decoded(SpeculativeDecoder(target, draft, config), prompt, recorder).token_ids)
    assert runs[0] == runs[1]
    parts = [part for each in recorder.rounds for part in each.samples]
    assert all(len(part.scores.at) == len(part.emitted) for part in parts)


def test_a_token_that_a_reduced_head_lacks_has_no_rank():
    ids = torch.tensor([9, 4, 7])
    scorer = Scorer((12, range(10, 12)), Sampling(0.5, 0.7), token_ids=ids, device=torch.device("cpu"))
    logits = torch.tensor([[1.0, 3.0, 2.0]]).expand(3, -1)
    there, lacking, nothing = score_all(scorer, logits, [7, 3, NOTHING_CHOSEN])
    assert (there.ids, there.logits) == ((4, 7, 9), (3.0, 2.0, 1.0))
    assert (there.chosen, there.chosen_logit, there.chosen_rank) == (7, 2.0, 1)
    assert (lacking.chosen, lacking.chosen_logit, lacking.chosen_rank) == (3, None, None)
    assert (nothing.chosen, nothing.chosen_rank) == (None, None)
    # exp of 6, 4, 2: the first has 0.867 of it, and is the whole nucleus of 0.7.
    assert there.nucleus_logit == 3.0
    assert there.nucleus_mass == pytest.approx(0.867, abs=1e-3)


def test_masked_tokens_are_never_named():
    scorer = Scorer((12, range(4, 12)), Sampling(0.0, 0.5), device=torch.device("cpu"))
    [place] = score_all(scorer, torch.arange(12.0)[None], [3])
    assert place.ids == (3, 2, 1, 0)
    assert place.nucleus_logit == 0.0  # greedy: nothing is cut
    assert place.nucleus_mass == pytest.approx(1.0)
    assert len(place.ids) < TOP


def test_a_choice_that_is_not_settled_is_not_named():
    """On a GPU a choice after a rejected token may stay open; its place is scored all the same."""
    device = torch.device("cpu")
    scores = RoundScores((12, range(10, 12)), Sampling(0.6), samples=2, rows=4, places=2, device=device)
    logits = torch.randn(10, 16, generator=torch.Generator().manual_seed(0))  # rows and columns of padding
    columns = torch.arange(10) % 9
    settled = torch.arange(10) != 1
    draft = torch.randn(4, 12, generator=torch.Generator().manual_seed(1))
    scores(logits, columns, settled, (draft, None))
    (target, by_draft), (second, _) = scores.read()
    assert [place.chosen for place in target] == [0, None, 2, 3]
    assert [place.chosen for place in by_draft] == [0, None]
    assert [place.chosen for place in second] == [4, 5, 6, 7]
    alone = Scorer((12, range(10, 12)), Sampling(0.6), device=device)
    assert target[2] == place_scores(alone(logits[2:3], columns[2:3])[0].tolist())
