import dataclasses

import pytest
import torch

from alpamayo_dflash.draft.model import DFlashDraft
from alpamayo_dflash.train.accept import (
    AcceptanceCounts,
    Walk,
    accepted_prefix,
    counts_of,
    simulate,
    walk_responses,
)
from tests.unit.test_train_data import CONFIG, PROMPT, Set, block_data


def test_the_prefix_ends_at_the_first_miss_or_missing_label():
    labels = torch.tensor([[1, 2, 3], [1, 2, 3], [1, 2, 0], [1, 2, 3]])
    predicted = torch.tensor([[1, 2, 3], [9, 2, 3], [1, 2, 0], [1, 9, 3]])
    labelled = torch.tensor([[1, 1, 1], [1, 1, 1], [1, 1, 0], [1, 1, 1]]).bool()
    assert accepted_prefix(predicted, labels, labelled).tolist() == [3, 0, 2, 1]


@pytest.mark.parametrize(
    ("accepted", "anchors"),
    [
        (0, [list(range(9)), [], [0, 1, 2, 3]]),
        (3, [[0, 4, 8], [], [0]]),
        (2, [[0, 3, 6], [], [0, 3]]),
    ],
)
def test_a_walk_starts_each_pass_after_the_token_that_ended_the_last(accepted, anchors):
    """Responses of 10, 1 and 5 tokens; every block has the same number of drafted tokens accepted."""
    lengths = torch.tensor([10, 1, 5])

    def same(blocks):
        left = lengths[blocks.responses] - 1 - blocks.positions
        return left.clamp_max(accepted)

    assert walk_responses(lengths, same) == anchors


def test_a_perfect_draft_takes_the_block_size_a_pass():
    """A block of 8 advances by 8: 7 drafted tokens and the target's own."""
    lengths = torch.tensor([17])
    anchors = walk_responses(
        lengths, lambda blocks: (lengths[blocks.responses] - 1 - blocks.positions).clamp_max(7)
    )
    assert anchors == [[0, 8]]
    assert counts_of([Walk("clip", tuple(range(17)), tuple(anchors[0]))]).length == 8.0


def test_the_simulation_equals_decoding_one_response_at_a_time():
    """A loop as a decoder has it: propose at the last kept token, compare token by token, keep one more."""
    found = Set()
    data = block_data(found)
    draft = DFlashDraft.random(CONFIG, 0)
    tables = torch.randn(2, 40, CONFIG.hidden_size, generator=torch.Generator().manual_seed(1))
    draft.bind(tables[0], tables[1], 3)
    # Most responses are rewritten to what the draft proposes, so that some tokens are accepted.
    for index in (0, 3):
        tokens = list(found.samples[index].token_ids)
        batch = data.batch(data.blocks([index])[:1])
        logits = draft(batch.states, batch.context_lengths, batch.anchors, batch.entries) @ draft.head.T
        tokens[1:3] = logits[0].argmax(-1).tolist()[:2]
        found.samples[index] = type(found.samples[index])(
            **{**vars(found.samples[index]), "token_ids": tuple(tokens)}
        )
    data = block_data(found)
    masked = range(38, 40)
    tokens_done, passes, best = 0, 0, 0
    for sample, tensors in zip(found.samples, found.content, strict=True):
        columns = [found.manifest["taps"].index(tap) for tap in CONFIG.target_layer_ids]
        prompt = tensors["prompt_states"][-PROMPT[sample.index] :]
        states = torch.cat((prompt, tensors["states"]))[:, columns].flatten(1)
        position = 0
        while position < len(sample.token_ids) - 1:
            before = states[: len(prompt) + position][-CONFIG.context_len :]
            context = torch.zeros(1, CONFIG.context_len, CONFIG.feature_size)
            context[0, CONFIG.context_len - len(before) :] = before
            anchor = torch.tensor([sample.token_ids[position]])
            logits = draft.propose(context, torch.tensor([len(before)]), anchor).logits[0]
            logits[:, masked.start : masked.stop] = -torch.inf
            kept = 0
            for proposed, truth in zip(
                logits.argmax(-1).tolist(), sample.token_ids[position + 1 :], strict=False
            ):
                if proposed != truth:
                    break
                kept += 1
            best = max(best, kept)
            advance = min(kept + 1, len(sample.token_ids) - 1 - position)
            tokens_done, passes, position = tokens_done + advance, passes + 1, position + advance
    assert best >= 2
    walks = simulate(draft, data, masked)
    assert counts_of(walks) == AcceptanceCounts(tokens_done, passes)
    assert [walk.token_ids for walk in walks] == [sample.token_ids for sample in found.samples]
    halves = [simulate(draft, data, masked, torch.arange(start, 5, 2)) for start in (0, 1)]
    assert halves == [walks[start::2] for start in (0, 1)]


def test_a_reduced_head_is_walked_with_the_target_s_ids():
    """Keeping every token that may be proposed changes nothing; a label that is not kept is not matched."""
    data = block_data(Set())
    tables = torch.randn(2, 40, CONFIG.hidden_size, generator=torch.Generator().manual_seed(1))
    whole = DFlashDraft.random(CONFIG, 0)
    whole.bind(tables[0], tables[1], 3)
    batch = data.batch(data.blocks([0, 3]))
    hidden = whole(batch.states, batch.context_lengths, batch.anchors, batch.entries)
    ids = (hidden @ whole.head.T)[..., :38].argmax(-1).unique()
    found = Set()
    for index in (0, 3):  # rewritten to what the draft proposes first
        tokens = list(found.samples[index].token_ids)
        first = data.batch(data.blocks([index])[:1])
        states = whole(first.states, first.context_lengths, first.anchors, first.entries)
        tokens[1:3] = (states @ whole.head.T)[0, :2, :38].argmax(-1).tolist()
        found.samples[index] = dataclasses.replace(found.samples[index], token_ids=tuple(tokens))
    data = block_data(found)
    counts = {}
    for name, kept in (("all", torch.arange(38)), ("proposed", ids), ("none", torch.tensor([38, 39]))):
        draft = DFlashDraft(dataclasses.replace(CONFIG, draft_vocab_size=len(kept)))
        draft.load_state_dict(whole.state_dict() | {"draft_token_ids": kept})
        draft.bind(tables[0], tables[1], 3)
        counts[name] = counts_of(simulate(draft, data, range(38, 40)))
    assert counts["all"] == counts_of(simulate(whole, data, range(38, 40)))
    assert counts["all"].passes < counts["none"].passes == counts["none"].tokens
    assert counts["proposed"].passes < counts["none"].passes
