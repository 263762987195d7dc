import dataclasses
from pathlib import Path

import pytest
import torch

from alpamayo_dflash.common.ahead import read_ahead
from alpamayo_dflash.distill.shards import DistillSample, is_held_out
from alpamayo_dflash.draft.model import DFlashDraft
from alpamayo_dflash.train.data import BlockData, Blocks, split_samples, step_count, step_share
from tests.unit.test_draft_config import GOOD

CONFIG = GOOD  # taps (0, 2), context 5, block 4, vocabulary 40
LENGTHS = (7, 1, 2, 9, 4)
PROMPT = (6, 6, 3, 6, 2)  # prompt states; the set fills short prompts up to 6 with zeros at the left


def sample(index, length, clip="clip", chunk=0, temperature=0.0):
    token_ids = tuple((7 * index + 3 * i) % 40 for i in range(length))
    return DistillSample(clip, chunk, 0, 0, temperature, 1.0, 0, token_ids, "", "", "rank0-0", index)


class Set:
    """A distillation set in memory, with three taps in another order than the draft's."""

    folder = Path("set")

    def __init__(self):
        self.manifest = {"taps": [2, 1, 0], "context_len": 6, "bytes": 10}
        self.samples = [sample(index, length) for index, length in enumerate(LENGTHS)]
        self.reads = 0
        generator = torch.Generator().manual_seed(4)

        def random(*shape):
            return torch.randn(*shape, generator=generator)

        self.content = [
            {
                "prompt_states": torch.cat(
                    (torch.zeros(6 - prompt, 3, CONFIG.hidden_size), random(prompt, 3, CONFIG.hidden_size))
                ),
                "states": random(length, 3, CONFIG.hidden_size),
                "topk_logits": random(length, 5),
                "topk_ids": torch.randint(0, 40, (length, 5), generator=generator).int(),
            }
            for prompt, length in zip(PROMPT, LENGTHS, strict=True)
        ]

    def tensors(self, sample):
        self.reads += 1
        return self.content[sample.index]


def block_data(found=None, config=CONFIG, unlabelled=range(0), cache_bytes=1 << 20):
    found = found or Set()
    return BlockData(
        found, found.samples, config, teacher=True, unlabelled=unlabelled, cache_bytes=cache_bytes
    )


def naive_blocks(found, config):
    """Every block of the set, formed with lists: (context states, anchor, labels, teacher rows)."""
    columns = [found.manifest["taps"].index(tap) for tap in config.target_layer_ids]
    blocks = []
    for row, tensors in zip(found.samples, found.content, strict=True):
        prompt = [state[columns].flatten() for state in tensors["prompt_states"] if bool(state.any())]
        own = [state[columns].flatten() for state in tensors["states"]]
        for anchor in range(len(row.token_ids) - 1):
            context = (prompt + own[:anchor])[-config.context_len :]
            at = [i for i in range(anchor + 1, anchor + config.block_size) if i < len(row.token_ids)]
            labels = [row.token_ids[i] for i in at]
            teacher = [(tensors["topk_logits"][i], tensors["topk_ids"][i]) for i in at]
            blocks.append((context, row.token_ids[anchor], labels, teacher))
    return blocks


def test_batches_equal_naively_formed_blocks():
    found = Set()
    data = block_data(found)
    blocks = data.blocks(range(len(data)))
    naive = naive_blocks(found, CONFIG)
    assert len(blocks) == len(naive) == 6 + 0 + 1 + 8 + 3
    for size in (len(naive), 5):  # in one batch, and in several that cut responses
        row = 0
        for start in range(0, len(naive), size):
            batch = data.batch(blocks[start : start + size])
            assert torch.equal(batch.label_rows, batch.labelled.flatten().nonzero()[:, 0])
            teacher_row = 0
            for i in range(len(batch.anchors)):
                context, anchor, labels, teacher = naive[row]
                filled = int(batch.context_lengths[i])
                assert filled == len(context)
                seen = batch.states[batch.entries[i]][CONFIG.context_len - filled :]
                assert torch.equal(seen, torch.stack(context))
                assert int(batch.anchors[i]) == anchor
                assert batch.labels[i][batch.labelled[i]].tolist() == labels
                assert bool(batch.labelled[i, : len(labels)].all())
                for logits, ids in teacher:
                    assert torch.equal(batch.teacher_logits[teacher_row], logits)
                    assert batch.teacher_ids[teacher_row].tolist() == ids.tolist()
                    teacher_row += 1
                row += 1
            assert teacher_row == len(batch.teacher_logits)
        assert row == len(naive)


def test_nothing_from_the_anchor_on_reaches_a_block():
    """Perturb tokens and states from the anchor on: the context and the predictions stay as they were."""
    draft = DFlashDraft.random(CONFIG, 3)
    tables = torch.randn(2, 40, CONFIG.hidden_size)
    draft.bind(tables[0], tables[1], 3)
    found, anchor = Set(), 3
    block = Blocks(torch.tensor([3]), torch.tensor([anchor]))
    clean = block_data(found).batch(block)
    hidden = draft(clean.states, clean.context_lengths, clean.anchors, clean.entries)

    changed = Set()
    changed.content[3]["states"][anchor:] += 100
    tokens = changed.samples[3].token_ids
    later = tuple((token + 11) % 40 for token in tokens[anchor + 1 :])
    changed.samples[3] = dataclasses.replace(changed.samples[3], token_ids=(*tokens[: anchor + 1], *later))
    leaked = block_data(changed).batch(block)
    assert torch.equal(leaked.states[leaked.entries], clean.states[clean.entries])
    assert torch.equal(draft(leaked.states, leaked.context_lengths, leaked.anchors, leaked.entries), hidden)
    assert not torch.equal(leaked.labels, clean.labels)

    # The test can fail: the state just before the anchor does reach it, and so does the anchor's token.
    before = Set()
    before.content[3]["states"][anchor - 1] += 1
    moved = block_data(before).batch(block)
    assert not torch.equal(draft(moved.states, moved.context_lengths, moved.anchors, moved.entries), hidden)
    other = (clean.anchors + 1) % 40
    assert not torch.equal(draft(clean.states, clean.context_lengths, other, clean.entries), hidden)


def test_trajectory_tokens_are_no_labels_and_no_targets_of_kl():
    found = Set()
    ids = range(10, 30)
    everything, batch = (
        data.batch(data.blocks(range(len(LENGTHS))))
        for data in (block_data(found), block_data(found, unlabelled=ids))
    )
    trajectory = everything.labelled & (everything.labels >= 10) & (everything.labels < 30)
    assert bool(trajectory.any())
    assert torch.equal(batch.labelled, everything.labelled & ~trajectory)
    assert len(batch.teacher_logits) == int(batch.labelled.sum())
    left_out = (batch.teacher_ids >= 10) & (batch.teacher_ids < 30)
    assert bool(left_out.any())
    assert torch.equal(batch.teacher_logits == -torch.inf, left_out)


def test_an_epoch_is_every_block_once_in_its_own_order():
    data = block_data()
    first, again, second = data.epoch(1, 0), data.epoch(1, 0), data.epoch(1, 1)
    pairs = [
        list(zip(b.responses.tolist(), b.positions.tolist(), strict=True)) for b in (first, again, second)
    ]
    assert pairs[0] == pairs[1] != pairs[2]
    assert sorted(pairs[0]) == sorted(pairs[2])
    assert len(set(pairs[0])) == 18
    strided = data.blocks([3], stride=3)
    assert strided.positions.tolist() == [0, 3, 6]


@pytest.mark.parametrize(
    ("blocks", "batch", "world"), [(18, 4, 1), (18, 4, 2), (3, 1, 2), (7, 100, 3), (10, 5, 2)]
)
def test_steps_share_out_every_block_once(blocks, batch, world):
    steps = step_count(blocks, batch, world)
    shares = [
        list(range(blocks))[step_share(blocks, steps, step, rank, world)]
        for step in range(steps)
        for rank in range(world)
    ]
    assert [block for share in shares for block in share] == list(range(blocks))
    assert min(len(share) for share in shares) >= 1
    assert max(len(share) for share in shares) <= max(batch, 2)


def test_too_few_blocks_are_refused():
    with pytest.raises(ValueError, match="2 blocks are too few for 3"):
        step_count(2, 8, 3)


def test_memory_is_used_up_to_its_limit():
    found = Set()
    data = block_data(found)
    for _ in range(2):
        data.batch(data.blocks([0, 3]))
    assert found.reads == 2
    tight = Set()
    data = block_data(tight, cache_bytes=0)
    for _ in range(2):
        data.batch(data.blocks([0, 3]))
    assert tight.reads == 4
    assert not data.fits


def test_reading_ahead_keeps_the_order_and_passes_errors_on():
    for threads in (0, 1, 3):
        assert list(read_ahead(range(20), lambda item: item * item, threads)) == [i * i for i in range(20)]
        with pytest.raises(ZeroDivisionError):
            list(read_ahead([1, 0], lambda item: 1 // item, threads))


def test_the_split_is_by_clip_and_stays():
    samples = [sample(i, 3, clip=f"clip-{i // 3}", chunk=i // 30) for i in range(300)]
    train, held_out = split_samples(samples, share=0.2, chunks=None)
    sides = [{row.clip_id for row in side} for side in (train, held_out)]
    assert not sides[0] & sides[1]
    assert 8 <= len(sides[1]) <= 35
    assert len(train) + len(held_out) == 300
    fewer, _ = split_samples(samples[:150], share=0.2, chunks=None)
    assert {row.clip_id for row in fewer} <= sides[0]
    assert is_held_out("clip-1", 0.999999)
    train, held_out = split_samples(samples, share=0.2, chunks=[2, 9])
    assert {row.chunk for row in held_out} == {2, 9}
    assert {row.chunk for row in train} == set(range(10)) - {2, 9}


@pytest.mark.parametrize(("chunks", "said"), [([77], "no held-out clip"), ([0], "no training clip")])
def test_an_empty_side_is_refused(chunks, said):
    with pytest.raises(ValueError, match=said):
        split_samples([sample(0, 3), sample(1, 3)], share=0.5, chunks=chunks)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            {"num_target_layers": 9, "target_layer_ids": (0, 7)},
            r"has taps \[2, 1, 0\]; the draft also needs \[7\]",
        ),
        ({"context_len": 7}, "keeps 6 prompt states; the draft's context_len is 7"),
        ({"vocab_size": 20}, "outside the vocabulary of 20"),
    ],
)
def test_a_draft_that_the_set_cannot_feed_is_refused(change, said):
    with pytest.raises(ValueError, match=said):
        block_data(config=dataclasses.replace(CONFIG, **change))


def test_states_that_are_not_finite_are_refused():
    found = Set()
    found.content[0]["states"][2, 0, 0] = torch.nan
    with pytest.raises(ValueError, match="not finite"):
        block_data(found).batch(Blocks(torch.tensor([0]), torch.tensor([0])))
