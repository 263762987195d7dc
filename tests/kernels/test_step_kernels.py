"""The steps of a round as kernels, as PyTorch operations and as the rules that they stand for."""

import copy

import pytest
import torch

from alpamayo_dflash.decode import steps
from alpamayo_dflash.decode.proposer import Proposed, unite
from alpamayo_dflash.decode.stops import StopRules

steps_triton = pytest.importorskip("alpamayo_dflash.decode.steps_triton")
E, T, EOS, PERIOD, OTHER_EOS = 3, 4, 5, 6, 8
CPU = torch.device("cpu")
IDS = torch.tensor([0, 1, 2, E, T, EOS, PERIOD, 7, 8])


def rules(mode="hint", marks=True):
    return StopRules(E if marks else None, T if marks else None, (EOS, OTHER_EOS), PERIOD, mode)


def drawn_tokens(samples, places, generator):
    """Tokens of which few end a text before the last, and many of those lead to its end."""
    tokens = torch.randint(0, 9, (samples, places), generator=generator)
    tokens[torch.rand(tokens.shape, generator=generator) < 0.85] = 7
    lots = torch.rand(samples, generator=generator)
    tokens[lots < 0.4, -1] = PERIOD
    tokens[lots > 0.7, -1] = E
    return tokens


def state_of(seed, samples=3, block=5, limit=12, beyond=0):
    """A round's state after some rounds; `beyond` of each sample's rows stand beyond the block."""
    generator = torch.Generator().manual_seed(seed)
    rows = block + beyond
    state = steps.State(
        samples=samples,
        block=block,
        sample_rows=rows,
        width=samples * rows + 2,
        per_sample=20,
        slots=20 * samples,
        device=CPU,
    )
    state.tokens.copy_(torch.randint(0, 9, state.tokens.shape, generator=generator))
    state.lengths.copy_(torch.randint(1, limit + 1, (samples,), generator=generator))
    state.done.copy_((torch.rand(samples, generator=generator) < 0.2).long())
    state.done[state.lengths == limit] = 3
    state.limit.fill_(limit)
    state.bases.copy_(torch.arange(samples) * 20)
    chains, lengths = state.listed
    chains.copy_(drawn_tokens(samples, chains.shape[1], generator))
    lengths.copy_(torch.randint(0, block, (samples,), generator=generator))
    lengths[torch.rand(samples, generator=generator) < 0.5] = block - 1
    lengths[torch.rand(samples, generator=generator) < 0.5] = 0
    for name in ("proposed", "drafted", "offered", "failed", "pending", "previous"):
        getattr(state, name).fill_(77)  # poison: every element must be written
    state.report.fill_(-5)
    return state, generator


def snapshot(state):
    tensors = vars(state) | dict(zip(("chains", "chain_lengths"), state.listed, strict=True))
    return {name: value.clone() for name, value in tensors.items() if isinstance(value, torch.Tensor)}


@pytest.mark.parametrize("mode", ["hint", "off"])
@pytest.mark.parametrize("marks", [True, False])
@pytest.mark.parametrize("reduced", [True, False])
def test_kernels_are_the_plain_steps_and_these_the_rules(mode, marks, reduced):
    check_steps(mode, marks, reduced, nobody=False)


@pytest.mark.parametrize("mode", ["hint", "off"])
def test_without_a_draft_what_others_offer_is_proposed(mode):
    check_steps(mode, marks=True, reduced=False, nobody=True)


@pytest.mark.parametrize("beyond", [0, 1])
def test_end_marks_have_as_many_rows_beyond_the_block_as_there_are(beyond):
    assert rules().most_forced == 2 and rules("off").most_forced == 1 and not rules(marks=False).most_forced
    check_steps("hint", marks=True, reduced=False, nobody=False, beyond=beyond)


def check_steps(mode, marks, reduced, *, nobody, beyond=None):
    rule = rules(mode, marks)
    beyond = rule.most_forced if beyond is None else beyond
    longest = 0
    known = steps.Marks.of(rule)
    for seed in range(40 if nobody else 25):
        state, generator = state_of(seed, beyond=beyond)
        state.note(known)
        other = copy.deepcopy(state)
        samples, block, count = state.samples, state.block, state.sample_rows
        columns = drawn_tokens(samples, block - 1, generator).flatten()
        agreeing = torch.rand(samples, 1, generator=generator) < 0.5  # with what others offer
        if reduced:
            columns = 8 - columns  # as `IDS` is turned round
        else:
            columns = torch.where(agreeing, state.listed[0], columns.view(samples, -1)).flatten()
        finite = torch.rand(samples * (block - 1), generator=generator) > 0.05
        ids = IDS.flip(0) if reduced else None
        drafted = None if nobody else steps.Picks(columns, finite, ids)
        before = snapshot(state)
        steps.propose(state, known, drafted, state.listed)
        steps_triton.propose(other, known, drafted, other.listed)
        expected, got = snapshot(state), snapshot(other)
        for name, value in expected.items():
            assert torch.equal(value, got[name]), (name, seed)
        picks = (columns if ids is None else ids[columns]).view(samples, -1).tolist()
        sound = torch.logical_and(finite.view(samples, -1).all(1), torch.tensor(not nobody)).tolist()
        for s in range(samples):
            proposed, drafted_count, offered = expected_proposal(
                rule, before, s, picks[s] if sound[s] else None, most=block - 1 + beyond
            )
            rows = state.row_tokens[s * count : (s + 1) * count].tolist()
            assert rows[1 : 1 + int(state.proposed[s])] == proposed, seed
            longest = max(longest, len(proposed))
            assert (int(state.drafted[s]), int(state.offered[s])) == (drafted_count, offered), seed

        choices = state.row_tokens.clone()
        choices[:-1] = state.row_tokens[1:]  # what was proposed, now and then something else
        wrong = torch.rand(len(choices), generator=generator) < 0.2
        choices[wrong] = torch.randint(0, 9, (int(wrong.sum()),), generator=generator)
        settled = torch.rand(len(choices), generator=generator) > 0.1
        finite = torch.rand(len(choices), generator=generator) > 0.1
        steps.accept(state, known, choices, settled, finite)
        steps_triton.accept(other, known, choices, settled, finite)
        expected, got = snapshot(state), snapshot(other)
        for name, value in expected.items():
            assert torch.equal(value, got[name]), (name, seed)
        # What was not settled is walked again, and only that.
        steps.accept(state, known, choices, torch.ones_like(settled), finite)
        steps_triton.accept(other, known, choices, torch.ones_like(settled), finite)
        assert not state.pending.any()
        for name, value in snapshot(state).items():
            assert torch.equal(value, snapshot(other)[name]), (name, seed)
    assert longest == block - 1 + beyond  # some proposal fills every row


def expected_proposal(rule, before, s, picks, *, most):
    """What the plain loop proposes, as a chain and cut to its rows, and how much of it is whose."""
    length, limit = int(before["lengths"][s]), int(before["limit"])
    if before["done"][s]:
        return [], 0, 0
    anchor, room = int(before["tokens"][s, length - 1]), limit - length
    if rule.reason(anchor):
        return [], 0, 0
    chain = before["chains"][s, : int(before["chain_lengths"][s])].tolist()
    asked = picks is not None and rule.forced(anchor) is None
    offers = [Proposed(chain, source="listed"), Proposed(picks if asked else (), source="draft")]
    tree = unite(offers, anchor, rule, room=room, most=99)
    nodes = tree.first_chain()[:most]
    tokens = [tree.tokens[node] for node in nodes]
    drafted = sum(tree.drafted[node] for node in nodes)
    return tokens, drafted, common(tokens, chain)


def common(first, second):
    equal = [a == b for a, b in zip(first, second, strict=False)]
    return equal.index(False) if False in equal else len(equal)


def test_autoregressive_rows():
    state, _ = state_of(3, block=1)
    other = copy.deepcopy(state)
    known = steps.Marks.of(rules())
    steps.propose(state, known, None, state.listed)
    steps_triton.propose(other, known, None, other.listed)
    for name in ("row_tokens", "row_positions", "row_slots", "next_positions", "seen", "pending"):
        assert torch.equal(getattr(state, name), getattr(other, name)), name
