import pytest
import torch

from alpamayo_dflash.draft.blocks import (
    anchors,
    attention_mask,
    block_rows,
    context_slots,
    label_positions,
)


@pytest.mark.parametrize(("length", "stride"), [(0, 1), (1, 1), (2, 1), (9, 1), (9, 3), (10, 3)])
def test_anchors_have_a_token_after_them(length, stride):
    naive = [position for position in range(0, length, stride) if position + 1 < length]
    assert anchors(length, stride).tolist() == naive


@pytest.mark.parametrize("context_len", [1, 3, 8])
def test_context_slots_equal_the_naive_version(context_len):
    prompt_states, length = 4, 7
    positions = torch.arange(length)
    entries, filled = context_slots(positions, torch.full((length,), prompt_states), context_len)
    states = [("prompt", i) for i in range(prompt_states)] + [("response", i) for i in range(length)]
    for anchor in range(length):
        before = [state for state in states if state < ("response", anchor)]
        seen = before[-context_len:]
        assert filled[anchor] == len(seen)
        got = [states[entry] for entry in entries[anchor].tolist()]
        assert got[context_len - len(seen) :] == seen


def test_labels_end_with_the_response():
    positions = torch.tensor([0, 3, 5, 6])
    at, inside = label_positions(positions, torch.tensor([8, 8, 8, 8]), 4)
    for row, anchor in enumerate(positions.tolist()):
        naive = [anchor + i for i in range(1, 4) if anchor + i < 8]
        assert at[row][inside[row]].tolist() == naive
    assert bool((at < 8).all())


def test_a_block_sees_filled_slots_and_itself():
    seen = attention_mask(torch.tensor([0, 2, 3]), 3, 2)
    assert seen.shape == (3, 1, 1, 5)
    assert seen[:, 0, 0].int().tolist() == [[0, 0, 0, 1, 1], [0, 1, 1, 1, 1], [1, 1, 1, 1, 1]]


@pytest.mark.parametrize("block_size", [2, 4, 8])
def test_masks_stand_after_the_known_token_of_their_block(block_size):
    tokens = torch.arange(3 * block_size).view(3, block_size)
    masks = torch.arange(3 * (block_size - 1))
    assert torch.equal(block_rows(masks, block_size), tokens[:, 1:].flatten()[masks])
