"""Sums whose gradients are taken chunk by chunk equal plain autograd over all rows at once."""

import itertools
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from alpamayo_dflash.draft.model import DFlashDraft
from alpamayo_dflash.train.config import TrainConfig
from alpamayo_dflash.train.loss import BlockLoss, padded_head, row_losses
from alpamayo_dflash.train.loss_fused import Part, parts_of, sums_with_gradients
from alpamayo_dflash.train.terms import parse_mix
from tests.unit.test_draft_config import GOOD
from tests.unit.test_train_data import LENGTHS, Set, block_data

KEPT = torch.arange(0, 40, 2)


@pytest.mark.parametrize("most_rows", [1, 3, 4, 7, 100])
def test_parts_are_whole_blocks_of_all_rows_in_order(most_rows):
    counts = [3, 0, 2, 1, 4, 4, 0, 0, 1, 3]
    ends = torch.tensor(counts).cumsum(0).tolist()
    parts = parts_of(ends, most_rows)
    assert [block for part in parts for block in range(len(counts))[part.blocks]] == list(range(len(counts)))
    assert [row for part in parts for row in range(sum(counts))[part.rows]] == list(range(sum(counts)))
    for part in parts:
        own = counts[part.blocks]
        assert part.rows.stop - part.rows.start == sum(own)
        assert sum(own) <= most_rows or sum(count > 0 for count in own) == 1
    # None could have been longer.
    for part, following in itertools.pairwise(parts):
        assert sum(counts[part.blocks]) + counts[following.blocks.start] > most_rows


def test_blocks_without_a_label_are_one_part():
    assert parts_of([0, 0], 4) == [Part(slice(0, 2), slice(0, 0))]


def draft_of(**changes):
    draft = DFlashDraft.random(replace(GOOD, **changes), 3)
    generator = torch.Generator().manual_seed(5)
    if draft.config.draft_vocab_size:
        draft.draft_token_ids.copy_(KEPT)
    tables = torch.randn(2, 40, GOOD.hidden_size, generator=generator)
    draft.bind(tables[0], tables[1], 3)
    if draft.previous is not None:
        with torch.no_grad():
            draft.previous.out.weight.normal_(generator=generator)
    return draft


def gradients(draft, config, chunk_elements, weights):
    """Sums, report, and the gradients of a mix of the sums, as the trainer makes one."""
    data = block_data(Set())
    batch = data.batch(data.blocks(range(len(LENGTHS))))
    loss = BlockLoss(draft, config, chunk_elements)
    with torch.autocast("cpu", torch.bfloat16, enabled=config.run.dtype == "bfloat16"):
        sums, report = loss(batch)
    chosen = {term.name: total for term, total in zip(loss.terms, sums, strict=True)}
    mixed = [weights[term.name] * chosen[term.name] / report[0] for term in config.loss.terms]
    parameters = [parameter for parameter in draft.parameters() if parameter.requires_grad]
    found = torch.autograd.grad(sum(mixed), parameters)
    return torch.stack([total.detach() for total in sums]), report, found


@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ({}, {}),
        ({}, {"loss_type": "kl", "kl_temperature": 2.0, "position_weights": "dpace"}),
        ({"previous_head": "gru", "previous_size": 6}, {"loss_type": "ce+kl+tv+lk"}),
        ({"previous_head": "bigram", "draft_vocab_size": 20}, {"loss_type": "ce+lk", "labels": "argmax"}),
        ({"draft_vocab_size": 20}, {"loss_type": "ce+kl", "position_weights": "dpace"}),
        ({"trained_embeddings": True}, {"loss_type": "ce+tv"}),
    ],
)
@pytest.mark.parametrize("chunk_rows", [1, 5, 20])
def test_chunks_give_the_sums_and_gradients_of_plain_autograd(shape, options, chunk_rows):
    draft, config = draft_of(**shape), TrainConfig.flat("", Path(), Path(), **options)
    weights = {"ce": 0.3, "kl": 0.5, "tv": 0.7, "lk": 0.11}
    plain, plain_report, expected = gradients(draft, config, 1 << 20, weights)
    sums, report, found = gradients(draft, config, chunk_rows * len(draft.head), weights)
    torch.testing.assert_close(sums, plain)
    torch.testing.assert_close(report, plain_report)
    for one, other in zip(found, expected, strict=True):
        assert bool(other.any())
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_under_autocast_chunks_are_as_near_to_float32_as_plain_autograd():
    draft = draft_of(previous_head="gru", previous_size=6)
    config, weights = TrainConfig.flat("", Path(), Path(), loss_type="ce+kl"), {"ce": 0.3, "kl": 0.7}
    low = config.changed(dtype="bfloat16")
    (*_, exact), (*_, plain), (*_, chunked) = (
        gradients(draft, options, elements, weights)
        for options, elements in ((config, 1 << 20), (low, 1 << 20), (low, 200))
    )

    def distance(found):
        return sum(float((a - b).square().sum()) for a, b in zip(found, exact, strict=True)) ** 0.5

    size = distance([torch.zeros_like(each) for each in exact])
    assert 0 < distance(plain) < 0.05 * size
    assert 0 < distance(chunked) < 0.05 * size


def test_only_what_is_asked_for_has_a_gradient():
    x = torch.ones(4, 2, requires_grad=True)
    seen = []

    def sums_of(part, by_row, shared):
        seen.append((part.rows, by_row[0].requires_grad, shared[0].requires_grad))
        product = by_row[0] @ shared[0]
        return (product.sum(), product.square().sum()), torch.ones(2)

    head = torch.full((2, 3), 2.0)
    parts = parts_of([2, 4], 2)
    (first, second), masses = sums_with_gradients(sums_of, parts, by_row=(x,), shared=(head,), graded=(1,))
    assert not first.requires_grad and second.requires_grad
    assert masses.tolist() == [2, 2]
    assert seen == [(slice(0, 2), True, False), (slice(2, 4), True, False)]
    (0.5 * second).backward()
    assert torch.equal(x.grad, 0.5 * 2 * (torch.ones(4, 2) @ head) @ head.T)
    with torch.no_grad():
        (_, again), _ = sums_with_gradients(sums_of, parts, by_row=(x,), shared=(head,), graded=(1,))
    assert torch.equal(again, second.detach()) and not again.requires_grad


@pytest.mark.parametrize("loss_type", ["ce", "ce+kl+tv+lk"])
def test_rows_added_to_the_head_change_nothing(loss_type):
    """Losses and gradients, with a shift beside."""
    generator = torch.Generator().manual_seed(2)
    head, out = torch.randn(41, 8, generator=generator), torch.randn(41, 4, generator=generator)
    labels = torch.tensor([0, 40, 7])
    teacher = torch.randn(3, 5, generator=generator), torch.tensor([[0, 1, 2, 3, 40]] * 3)
    found = []
    for wide, bias in ((head, None), padded_head(head)):
        hidden = torch.linspace(-1, 1, 24).view(3, 8).requires_grad_()
        codes = torch.linspace(1, -1, 12).view(3, 4).requires_grad_()
        shift = codes, torch.nn.functional.pad(out, (0, 0, 0, len(wide) - len(out)))
        losses = row_losses(hidden, wide, labels, teacher, terms=parse_mix(loss_type), shift=shift, bias=bias)
        sum(losses).sum().backward()
        found.append((*losses, hidden.grad, codes.grad))
    assert len(padded_head(head)[0]) == 64
    for plain, padded in zip(*found, strict=True):
        torch.testing.assert_close(padded, plain, rtol=1e-5, atol=1e-6)
