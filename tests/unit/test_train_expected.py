"""The expected acceptance against draws with shared noise, enumeration, and blocks formed one by one."""

import dataclasses
import itertools

import pytest
import torch

from alpamayo_dflash.common.nucleus import cut
from alpamayo_dflash.decode.config import Sampling
from alpamayo_dflash.decode.sampling import choose, distribution, mask_bias
from alpamayo_dflash.draft.model import DFlashDraft
from alpamayo_dflash.train.accept import walk_responses
from alpamayo_dflash.train.expected import agreement, expect, expected_passes
from tests.unit.test_train_data import CONFIG, Set, block_data, naive_blocks

VOCAB, SAMPLING = 6, Sampling(0.6, 0.9)


@pytest.mark.parametrize("seed", range(3))
def test_the_agreement_is_how_often_both_choose_the_same(seed):
    """The decoder's own choice, of the target's and the draft's logits with the same noise."""
    generator = torch.Generator().manual_seed(seed)
    target, draft = torch.randn(2, VOCAB, generator=generator)
    bias, draws = mask_bias(range(0), VOCAB), 200_000
    noise = -(-torch.rand(draws, VOCAB, generator=generator).log()).log()
    rows = (logits.expand(draws, VOCAB) for logits in (target, draft))
    chosen, picked = (choose(logits, bias, SAMPLING, noise) for logits in rows)
    # The target's are stored in another order.
    order = torch.randperm(VOCAB, generator=generator)
    p = cut((target[None, order] / SAMPLING.temperature).softmax(-1), SAMPLING.top_p)
    q = cut((draft[None] / SAMPLING.temperature).softmax(-1), SAMPLING.top_p)
    torch.testing.assert_close(p[0, order.argsort()], distribution(target[None], bias, SAMPLING)[0])
    found = {}
    for token in chosen.unique().tolist():
        mine = chosen == token
        place = (order == token).nonzero()[0, 0]
        found[token] = float(agreement(p, q[:, order], p[:, place], q[:, token]))
        sure = max(2e-3, 5 * (0.25 / int(mine.sum())) ** 0.5)
        assert found[token] == pytest.approx(float((picked[mine] == token).float().mean()), abs=sure)
    assert min(found.values()) < 0.9 and max(found.values()) > 0.2


def test_of_the_target_only_what_is_stored_counts():
    """A draft's mass on tokens that are not stored counts, and what it cannot pick is never kept."""
    p, q = torch.tensor([[0.7, 0.3]]), torch.tensor([[0.5, 0.25]])
    # Σ max(p_y, q_y · 0.7/0.5), and 1.4 times the quarter elsewhere.
    first = agreement(p, q, p[:, 0], q[:, 0])
    assert float(first) == pytest.approx(1 / (0.7 + 0.35 + 0.35))
    assert float(agreement(p, q, p[:, 0], torch.zeros(1))) == 0
    twice = torch.tensor([[0.7, 0.3, 0.0, 0.0]]), torch.tensor([[0.1, 0.0, 0.8, 0.8]])
    assert float(agreement(*twice, p[:, 0], torch.tensor([0.1]))) == pytest.approx(1 / (0.7 + 0.3 + 0.9 * 7))
    same = agreement(p, p, p[:, 1], p[:, 1])
    assert float(same) == pytest.approx(1)


def enumerated(kept, length):
    """The passes of one response by all ways in which its picks may be kept or not."""
    masks = kept.shape[1]

    def after(anchor):
        if anchor >= length - 1:
            return 0.0
        labelled, total = min(masks, length - 1 - anchor), 0.0
        for outcome in itertools.product((True, False), repeat=labelled):
            chance = 1.0
            for place, is_kept in enumerate(outcome):
                chance *= float(kept[anchor, place]) if is_kept else 1 - float(kept[anchor, place])
            count = outcome.index(False) if False in outcome else labelled
            total += chance * (1 + after(anchor + count + 1))
        return total

    return after(0)


def some_kept(lengths, masks, generator):
    """Random probabilities of every block, with 0 beyond the responses' ends."""
    parts = []
    for length in lengths:
        kept = torch.rand(max(0, length - 1), masks, generator=generator, dtype=torch.float64)
        left = length - 1 - torch.arange(len(kept))
        parts.append(kept * (torch.arange(masks) < left[:, None]))
    return parts


def test_passes_are_those_of_all_ways_enumerated():
    lengths = (6, 1, 2, 0, 4)
    parts = some_kept(lengths, 3, torch.Generator().manual_seed(1))
    found = expected_passes(torch.cat(parts), torch.tensor(lengths))
    assert found.tolist() == pytest.approx(
        [enumerated(kept, length) for kept, length in zip(parts, lengths, strict=True)]
    )


def test_where_nothing_is_uncertain_it_is_the_walk():
    lengths = torch.tensor([10, 1, 17, 5])
    generator = torch.Generator().manual_seed(2)
    parts = [kept.gt(0.3).double() for kept in some_kept(lengths.tolist(), 7, generator)]

    def accepted(blocks):
        pairs = zip(blocks.responses.tolist(), blocks.positions.tolist(), strict=True)
        return torch.tensor([int(parts[response][at].cumprod(0).sum()) for response, at in pairs])

    walked = [len(anchors) for anchors in walk_responses(lengths, accepted)]
    assert expected_passes(torch.cat(parts), lengths).tolist() == walked


def drawn_set():
    found = Set()
    for at, row in enumerate(found.samples):
        found.samples[at] = dataclasses.replace(row, temperature=0.6, top_p=0.9)
    for at, (row, tensors) in enumerate(zip(found.samples, found.content, strict=True)):
        # Five different tokens a row, the response's own among them.
        others = torch.tensor([[(token + 8 * i) % 40 for i in range(5)] for token in row.token_ids])
        others[:, 4] = others[:, 3]  # left out, twice the same token
        logits = tensors["topk_logits"] * 0.3
        logits[:, 3:] = -torch.inf
        found.content[at] = tensors | {"topk_ids": others.int(), "topk_logits": logits}
    return found


@pytest.mark.parametrize("kind", ["whole", "reduced", "head"])
def test_responses_are_expected_block_by_block(kind):
    """Each block formed with lists, each row's sum over the whole vocabulary."""
    found, never = drawn_set(), range(37, 40)
    head = {"previous_head": "mlp", "previous_size": 4} if kind == "head" else {}
    kept_ids = torch.arange(0, 40, 2) if kind == "reduced" else None
    config = dataclasses.replace(CONFIG, draft_vocab_size=None if kept_ids is None else 20, **head)
    draft = DFlashDraft.random(config, 0)
    if kept_ids is not None:
        draft.load_state_dict(draft.state_dict() | {"draft_token_ids": kept_ids})
    tables = torch.randn(2, 40, CONFIG.hidden_size, generator=torch.Generator().manual_seed(1))
    draft.bind(tables[0], tables[1], 3)
    if draft.previous is not None:
        torch.nn.init.normal_(draft.previous.out.weight, generator=torch.Generator().manual_seed(5))
    data = block_data(found, config, unlabelled=never)
    columns = range(40) if kept_ids is None else kept_ids.tolist()
    sampling = Sampling(0.6, 0.9)
    rows = []
    for context, anchor, labels, teacher in naive_blocks(found, config):
        states = torch.zeros(1, config.context_len, config.feature_size)
        states[0, config.context_len - len(context) :] = torch.stack(context)
        with torch.no_grad():
            proposed = draft.propose(states, torch.tensor([len(context)]), torch.tensor([anchor]))
            logits = proposed.logits[0]
            if kind == "head":
                for place, before in enumerate((anchor, *labels[:-1])):
                    logits[place] += proposed.shift(place, None, torch.tensor([before]))[0]
        row = torch.zeros(config.block_size - 1, dtype=torch.float64)
        for place, (label, (values, ids)) in enumerate(zip(labels, teacher, strict=True)):
            target = torch.full((40,), -torch.inf)
            target[ids.long()] = values
            whole = torch.full((40,), -torch.inf)
            whole[list(columns)] = logits[place]
            bias = mask_bias(never, 40)
            p, q = (
                distribution((each + bias)[None], torch.zeros(40), sampling)[0] for each in (target, whole)
            )
            if label in never:
                break  # no label, which ends the block
            if q[label] > 0:
                row[place] = 1 / float(p.maximum(q * p[label] / q[label]).sum())
        rows.append(row)
    lengths = torch.tensor([len(row.token_ids) for row in found.samples])
    plain = float(expected_passes(torch.stack(rows), lengths).sum())
    counts = expect(draft, data)
    assert counts.tokens == sum(max(0, length - 1) for length in lengths.tolist())
    assert counts.passes == pytest.approx(plain, rel=1e-5)
    assert counts.passes < 0.99 * counts.tokens  # something is kept
    halves = [expect(draft, data, torch.arange(start, 5, 2)) for start in (0, 1)]
    assert sum(half.passes for half in halves) == pytest.approx(counts.passes)
    assert sum(half.tokens for half in halves) == counts.tokens
    assert draft.training
