"""Each term of the loss against its formula on whole vocabularies, in probabilities."""

import itertools

import pytest
import torch

from alpamayo_dflash.train.loss import reduced_teacher
from alpamayo_dflash.train.terms import LOSSES, LabelRows, ce_weight, parse_mix, shares

V, K = 11, 4
FORMULAS = {
    "kl": lambda p, q: sum(a * torch.log(a / b) for a, b in zip(p, q, strict=True) if a > 0),
    "tv": lambda p, q: (p - q).abs().sum() / 2,
    "lk": lambda p, q: -torch.log(torch.minimum(p, q).sum()),
}


def softmax(logits):
    """Without logs and shifts."""
    scores = logits.double().exp()
    return scores / scores.sum()


def made(rows=6, k=K, seed=0):
    """The draft's logits, and the target's with their tokens; one token of the second row is left out."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, V, generator=generator)
    stored = 2 * torch.randn(rows, k, generator=generator)
    stored[1, 0] = -torch.inf
    ids = torch.stack([torch.randperm(V, generator=generator)[:k] for _ in range(rows)])
    return logits, (stored, ids)


def losses(name, logits, teacher, labels=None, temperature=1.0):
    labels = torch.zeros(len(logits), dtype=torch.int64) if labels is None else labels
    return LOSSES[name].rows(LabelRows(logits, labels, teacher, temperature))


def whole(stored, ids):
    """The target's distribution over the whole vocabulary [V]."""
    return torch.zeros(V, dtype=torch.float64).index_add(0, ids, softmax(stored))


@pytest.mark.parametrize("name", FORMULAS)
@pytest.mark.parametrize("k", [K, V])
def test_a_term_is_its_formula_on_the_whole_vocabulary(name, k):
    logits, (stored, ids) = made(k=k)
    found = losses(name, logits, (stored, ids))
    assert found.shape == (6,)
    for row in range(6):
        p, q = whole(stored[row], ids[row]), softmax(logits[row])
        assert float(found[row]) == pytest.approx(float(FORMULAS[name](p, q)), abs=1e-6)


def test_every_term_that_needs_the_teacher_has_its_formula_here():
    assert {name for name, term in LOSSES.items() if term.needs_teacher} == set(FORMULAS)
    assert list(LOSSES) == [term.name for term in LOSSES.values()]


def test_cross_entropy_is_minus_the_log_of_the_labels_probability():
    logits, _ = made()
    labels = torch.tensor([3, 0, 10, 5, 5, 1])
    for row, found in enumerate(losses("ce", logits, None, labels)):
        expected = -torch.log(softmax(logits[row])[labels[row]])
        assert float(found) == pytest.approx(float(expected), abs=1e-6)


def test_the_temperature_is_of_kl_alone():
    logits, teacher = made()
    for name in ("tv", "lk"):
        assert torch.equal(losses(name, logits, teacher), losses(name, logits, teacher, temperature=2.0))
    p, q = softmax(teacher[0][0] / 2), softmax(logits[0] / 2)[teacher[1][0]]
    assert float(losses("kl", logits, teacher, temperature=2.0)[0]) == pytest.approx(
        4 * float(FORMULAS["kl"](p, q)), abs=1e-6
    )


def test_total_variation_is_one_minus_the_overlap_and_below_the_log_of_acceptance():
    """On full support; and where the draft is the target, nothing is lost."""
    logits, (stored, ids) = made(k=V)
    tv, lk = losses("tv", logits, (stored, ids)), losses("lk", logits, (stored, ids))
    for row in range(6):
        overlap = torch.minimum(whole(stored[row], ids[row]), softmax(logits[row])).sum()
        assert float(tv[row]) == pytest.approx(1 - float(overlap), abs=1e-6)
    torch.testing.assert_close(lk, -torch.log1p(-tv))
    assert bool((tv < lk).all())
    same = (logits, (logits, torch.arange(V).expand(6, V)))
    for name in FORMULAS:
        torch.testing.assert_close(losses(name, *same), torch.zeros(6), atol=1e-6, rtol=0)


def test_mass_outside_the_stored_tokens_counts_whole():
    logits = torch.tensor([[0.0, 0.0, 0.0, 0.0]])
    teacher = torch.tensor([[0.0, 0.0]]), torch.tensor([[0, 1]])
    assert float(losses("tv", logits, teacher)) == pytest.approx(0.5)


def test_the_bound_on_the_accepted_prefix():
    """For any acceptances a_i: log of Σ_m Π_{i≤m} a_i is at least log B − Σ lk_i."""
    a = torch.rand(50, 7, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    expected = a.cumprod(dim=1).sum(dim=1)
    assert bool((expected.log() >= torch.tensor(7.0).log() + a.log().sum(dim=1)).all())


EXTREMES = {
    "sure": torch.tensor([[0.0, -torch.inf, -torch.inf, -torch.inf]]),
    "nearly sure": torch.tensor([[500.0, -500.0, 0.0, -torch.inf]]),
    "flat": torch.zeros(1, K),
}


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("stored", EXTREMES.values(), ids=EXTREMES)
@pytest.mark.parametrize("favourite", [0, 1, 9])
@pytest.mark.parametrize("height", [0.0, 50.0, 1e4])
def test_losses_and_gradients_are_finite_at_extremes(name, stored, favourite, height):
    logits = torch.zeros(1, V)
    logits[0, favourite] = height
    logits.requires_grad_()
    loss = losses(name, logits, (stored, torch.tensor([[0, 1, 2, 3]])))
    (gradient,) = torch.autograd.grad(loss.sum(), logits)
    assert bool(loss.isfinite().all())
    assert bool(gradient.isfinite().all())


@pytest.mark.parametrize("name", FORMULAS)
def test_a_reduced_head_leaves_the_other_tokens_out(name):
    """Left-out tokens share row 0 of the head with the token that has it; a row without any stays finite."""
    logits, (stored, ids) = made()
    kept = torch.tensor([1, 2, 5, 6, 9])
    ids[0], ids[3] = torch.tensor([1, 3, 4, 5]), torch.tensor([0, 3, 4, 7])
    teacher, some = reduced_teacher((stored, ids), kept)
    small = logits[:, kept].clone().requires_grad_()
    found = losses(name, small, teacher)
    (gradient,) = torch.autograd.grad((found * some).sum(), small)
    assert bool(found.isfinite().all()) and bool(gradient.isfinite().all())
    assert not bool(gradient[3].any())
    for row in some.nonzero()[:, 0].tolist():
        p = whole(stored[row], ids[row])[kept]
        expected = FORMULAS[name](p / p.sum(), softmax(logits[row, kept]))
        assert float(found[row].detach()) == pytest.approx(float(expected), abs=1e-6)


def test_gradients_of_lk_raise_what_the_draft_offers_too_little_of():
    """Tokens with q < p rise and all others fall; where little is accepted, faster than under tv."""
    logits, teacher = made()
    logits.requires_grad_()
    lk, tv = losses("lk", logits, teacher), losses("tv", logits, teacher)
    (of_lk,) = torch.autograd.grad(lk.sum(), logits)
    (of_tv,) = torch.autograd.grad(tv.sum(), logits)
    for row in range(6):
        p, q = whole(teacher[0][row], teacher[1][row]), softmax(logits[row].detach())
        assert torch.equal(of_lk[row] < 0, q < p)
    torch.testing.assert_close(of_lk, of_tv / (1 - tv.detach())[:, None])


def test_with_a_target_that_is_sure_lk_is_cross_entropy():
    logits, (_, ids) = made()
    logits.requires_grad_()
    sure = torch.full((6, K), -torch.inf)
    sure[:, 2] = 0.0
    lk, ce = losses("lk", logits, (sure, ids)), losses("ce", logits, None, ids[:, 2])
    torch.testing.assert_close(lk, ce)
    torch.testing.assert_close(*(torch.autograd.grad(loss.sum(), logits)[0] for loss in (lk, ce)))


def test_any_mix_is_named_in_any_order():
    for count in range(1, len(LOSSES) + 1):
        for names in itertools.permutations(LOSSES, count):
            mix = parse_mix("+".join(names))
            assert [term.name for term in mix] == [name for name in LOSSES if name in names]


@pytest.mark.parametrize("wrong", ["", "mse", "ce+", "ce+ce", "ce,kl", "CE", "kl+ tv"])
def test_a_wrong_mix_is_named_with_what_would_be_right(wrong):
    with pytest.raises(ValueError, match=r"^loss_type is '.*'; it must be one of ce, kl, tv, lk, or several"):
        parse_mix(wrong)


@pytest.mark.parametrize(
    ("mix", "expected"),
    [
        ("ce", {"ce": 1.0}),
        ("kl", {"kl": 1.0}),
        ("ce+kl", {"ce": 0.9, "kl": 1 - 0.9}),
        ("lk+ce+kl", {"ce": 0.9, "kl": (1 - 0.9) / 2, "lk": (1 - 0.9) / 2}),
        ("tv+kl", {"kl": 0.5, "tv": 0.5}),
    ],
)
def test_cross_entropy_has_its_share_and_the_others_equal_parts_of_the_rest(mix, expected):
    assert shares(parse_mix(mix), ce_weight(1, 3, 1.0, 0.8)) == expected
