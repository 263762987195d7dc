import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from alpamayo_dflash.train.config import TrainConfig
from alpamayo_dflash.train.data import BlockBatch
from alpamayo_dflash.train.loss import (
    BlockLoss,
    decay_weights,
    dpace_weights,
    head_rows,
    reduced_teacher,
    row_losses,
)
from alpamayo_dflash.train.optimizer import learning_rate_factor
from alpamayo_dflash.train.terms import ce_weight, parse_mix

BOTH = parse_mix("ce+kl")


@pytest.fixture
def rows():
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(6, 5, generator=generator)
    head = torch.randn(11, 5, generator=generator)
    labels = torch.randint(0, 11, (6,), generator=generator)
    logits = torch.randn(6, 4, generator=generator)
    ids = torch.stack([torch.randperm(11, generator=generator)[:4] for _ in range(6)])
    return hidden, head, labels, (logits, ids)


def naive_ce(hidden, head, label):
    scores = [math.exp(float(hidden.detach() @ row)) for row in head]
    return -math.log(scores[label] / sum(scores))


def naive_kl(hidden, head, logits, ids, temperature):
    target = [math.exp(value / temperature) for value in logits.tolist()]
    scores = [math.exp(float(hidden @ row) / temperature) for row in head]
    total = 0.0
    for value, token in zip(target, ids.tolist(), strict=True):
        p, q = value / sum(target), scores[token] / sum(scores)
        total += p * math.log(p / q) if p > 0 else 0.0
    return total * temperature**2


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_row_losses_equal_naive_loops(rows, temperature):
    hidden, head, labels, (logits, ids) = rows
    logits[2, 1] = -torch.inf  # a token that the target may not write
    ce, kl = row_losses(hidden, head, labels, (logits, ids), terms=BOTH, temperature=temperature)
    for row in range(6):
        assert float(ce[row]) == pytest.approx(naive_ce(hidden[row], head, int(labels[row])), abs=1e-5)
        expected = naive_kl(hidden[row], head, logits[row], ids[row], temperature)
        assert float(kl[row]) == pytest.approx(expected, abs=1e-5)


def test_a_shift_is_added_to_the_logits(rows):
    hidden, head, labels, teacher = rows
    codes, out = torch.randn(6, 3), torch.randn(11, 3)
    terms = parse_mix("ce+kl+tv+lk")
    shifted = row_losses(hidden, head, labels, teacher, terms=terms, shift=(codes, out))
    wide = torch.cat((hidden, codes), dim=1), torch.cat((head, out), dim=1)
    for found, expected in zip(shifted, row_losses(*wide, labels, teacher, terms=terms), strict=True):
        torch.testing.assert_close(found, expected)


def test_kl_is_zero_only_for_the_target_s_own_distribution():
    head = torch.eye(4)
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]])
    ids = torch.arange(4)[None]
    _, same = row_losses(logits, head, torch.tensor([0]), (logits, ids), terms=BOTH)
    assert float(same) == pytest.approx(0, abs=1e-6)
    # Mass on a token outside the target's k costs, although the k agree among themselves.
    _, outside = row_losses(logits, head, torch.tensor([0]), (logits[:, :3], ids[:, :3]), terms=BOTH)
    assert float(outside) > 0.01


def test_no_rows_give_no_loss_and_no_gradient():
    hidden = torch.zeros(0, 5, requires_grad=True)
    labels = torch.zeros(0, dtype=torch.int64)
    (ce,) = row_losses(hidden, torch.zeros(7, 5), labels, None, terms=parse_mix("ce"))
    assert ce.shape == (0,)
    ce.sum().backward()


def test_decay_weights_fall_from_one():
    expected = [math.exp(-(i - 1) / 3) for i in range(1, 8)]
    assert decay_weights(7, 3.0).tolist() == pytest.approx(expected)


def test_dpace_weights_equal_the_naive_sums():
    ce = torch.tensor([[0.1, 2.0, 0.5, 1.0], [0.0, 0.3, 9.0, 9.0], [1.0, 0.2, 0.4, 0.6]])
    labelled = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 1, 1]]).bool()
    found = dpace_weights(ce.requires_grad_(), labelled, 0.5)
    assert not found.requires_grad
    for row in range(3):
        q = [0.5 * math.exp(-value) + 0.5 for value in ce[row].tolist()]
        present = [j for j in range(4) if labelled[row, j]]
        for j in range(4):
            naive = sum(math.prod(q[i] for i in present if i <= m) for m in present if m >= j)
            assert float(found[row, j]) == pytest.approx(naive if j in present else 0.0, abs=1e-6)


def test_ce_weight_is_linear():
    assert [ce_weight(step, 5, 1.0, 0.8) for step in range(5)] == pytest.approx([1, 0.95, 0.9, 0.85, 0.8])
    assert ce_weight(0, 1, 1.0, 0.8) == 1.0


def test_learning_rate_warms_up_and_falls_to_zero():
    factors = [learning_rate_factor(step, 10, 4) for step in range(10)]
    assert factors[:4] == [0.25, 0.5, 0.75, 1.0]
    assert factors[4] == 1.0
    assert factors[7] == pytest.approx(0.5)
    assert factors == sorted(factors[:4]) + sorted(factors[4:], reverse=True)
    assert learning_rate_factor(10, 10, 4) == pytest.approx(0)
    assert learning_rate_factor(0, 10, 0) == 1.0


KEPT = torch.tensor([1, 2, 5, 6, 9])


def test_head_rows_are_the_places_of_kept_tokens():
    tokens = torch.tensor([[0, 1, 2], [9, 10, 5]])
    rows, inside = head_rows(tokens, KEPT)
    assert inside.tolist() == [[False, True, True], [True, False, True]]
    assert rows.tolist() == [[0, 0, 1], [4, 0, 2]]


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_kl_over_a_reduced_head_leaves_out_what_it_does_not_keep(rows, temperature):
    hidden, head, labels, (logits, ids) = rows
    ids[3] = torch.tensor([0, 3, 4, 7])  # none is kept
    teacher, some = reduced_teacher((logits, ids), KEPT)
    _, kl = row_losses(hidden, head[KEPT], labels * 0, teacher, terms=BOTH, temperature=temperature)
    assert bool(kl.isfinite().all())
    for row in range(6):
        kept = [place for place, token in enumerate(ids[row].tolist()) if token in KEPT.tolist()]
        assert bool(some[row]) == bool(kept)
        if kept:
            columns = torch.tensor([KEPT.tolist().index(int(ids[row, place])) for place in kept])
            expected = naive_kl(hidden[row], head[KEPT], logits[row, kept], columns, temperature)
            assert float(kl[row]) == pytest.approx(expected, abs=1e-5)
    assert not bool(some[3])


class Fixed(torch.nn.Module):
    """A draft whose states are given: one block."""

    def __init__(self, hidden, head, token_ids, block_size):
        super().__init__()
        self.hidden, self.head, self.token_ids = hidden, head, token_ids
        self.config = SimpleNamespace(block_size=block_size)
        self.previous = None

    def forward(self, *_):
        return self.hidden


@pytest.mark.parametrize("position_weights", ["decay", "dpace"])
def test_labels_outside_a_reduced_head_get_no_weight_and_are_counted(rows, position_weights):
    hidden, head, _, (logits, ids) = rows
    labels = torch.tensor([[5, 3, 9, 1, 0, 2]])  # 3 and 0 are not kept
    ids[4] = torch.tensor([0, 3, 4, 7])
    hidden.requires_grad_()
    options = TrainConfig.flat("", Path(), Path(), loss_type="kl", position_weights=position_weights)
    labelled = torch.ones(1, 6, dtype=torch.bool)
    batch = BlockBatch(*(torch.zeros(1),) * 4, labels, labelled, torch.arange(6), [6], logits, ids)
    (ce, kl), sums = BlockLoss(Fixed(hidden, head[KEPT], KEPT, 7), options)(batch)
    inside = [0, 2, 3, 5]
    each = [
        naive_ce(h, head[KEPT], KEPT.tolist().index(token)) if token in KEPT.tolist() else math.inf
        for h, token in zip(hidden, labels[0].tolist(), strict=True)
    ]
    weights = decay_weights(6, 3.5)
    if position_weights == "dpace":
        weights = dpace_weights(torch.tensor([each]), labelled, options.loss.dpace_alpha)[0]
    assert float(ce.detach()) == pytest.approx(sum(float(weights[i]) * each[i] for i in inside), rel=1e-5)
    taught = [i for i in range(6) if set(ids[i].tolist()) & set(KEPT.tolist())]
    assert 4 not in taught
    assert sums[:2].tolist() == pytest.approx([float(weights[at].sum()) for at in (inside, taught)])
    assert sums[2:4].tolist() == pytest.approx([float(ce.detach()), float(kl.detach())])
    assert int(sums[4]) == 2
    (gradient,) = torch.autograd.grad(ce, hidden)
    assert [i for i in range(6) if bool(gradient[i].any())] == inside


def test_labels_may_be_the_targets_best_tokens(rows):
    hidden, head, _, (logits, ids) = rows
    logits[0, int(logits[0].argmax())] = -torch.inf  # what may not be written is no label
    labels, labelled = torch.zeros(1, 6, dtype=torch.int64), torch.ones(1, 6, dtype=torch.bool)
    batch = BlockBatch(*(torch.zeros(1),) * 4, labels, labelled, torch.arange(6), [6], logits, ids)
    options = TrainConfig.flat("", Path(), Path(), loss_type="ce", labels="argmax")
    best = [max(zip(*row, strict=True))[1] for row in zip(logits.tolist(), ids.tolist(), strict=True)]
    (ce,), _ = BlockLoss(Fixed(hidden, head, None, 7), options)(batch)
    each = [naive_ce(h, head, token) for h, token in zip(hidden, best, strict=True)]
    weights = decay_weights(6, 3.5).tolist()
    assert float(ce) == pytest.approx(sum(w * loss for w, loss in zip(weights, each, strict=True)), rel=1e-5)
    # In a reduced head the best token may have no row, and the next best does not take its place.
    (_,), report = BlockLoss(Fixed(hidden, head[KEPT], KEPT, 7), options)(batch)
    inside = [token in KEPT.tolist() for token in best]
    assert float(report[0]) == pytest.approx(sum(w for w, kept in zip(weights, inside, strict=True) if kept))
    assert int(report[-1]) == 6 - sum(inside) > 0


def test_a_head_of_previous_tokens_shifts_the_loss(rows):
    hidden, head, labels, teacher = rows
    codes, out = torch.randn(6, 3, requires_grad=True), torch.randn(11, 3, requires_grad=True)
    labelled = torch.ones(1, 6, dtype=torch.bool)
    anchors = torch.tensor([4])
    batch = BlockBatch(
        *(torch.zeros(1),) * 3, anchors, labels[None], labelled, torch.arange(6), [6], *teacher
    )
    draft = Fixed(hidden, head, None, 7)
    draft.previous = SimpleNamespace(out=SimpleNamespace(weight=out))
    asked = []
    draft.shift_codes = lambda *given: asked.append(given) or codes
    options = TrainConfig.flat("", Path(), Path(), loss_type="tv")
    (_, tv), _ = BlockLoss(draft, options)(batch)
    assert [value is other for value, other in zip(asked[0], (hidden, anchors), strict=False)] == [True] * 2
    assert asked[0][2] is batch.labels
    assert asked[0][3] is batch.label_rows
    wide = torch.cat((hidden, codes), dim=1), torch.cat((head, out), dim=1)
    (expected,) = row_losses(*wide, labels, teacher, terms=parse_mix("tv"))
    torch.testing.assert_close(tv, (expected * decay_weights(6, 3.5)).sum())
    assert all(bool(gradient.any()) for gradient in torch.autograd.grad(tv, (codes, out)))
