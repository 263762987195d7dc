"""Heads on previous picks: their arithmetic place by place and at once, their files, their rows."""

from dataclasses import replace

import pytest
import torch

from alpamayo_dflash.draft.formats import PREVIOUS_OUT, tensor_shapes
from alpamayo_dflash.draft.heads import KINDS, ChainedLogits, PreviousHead, moved_rows
from alpamayo_dflash.draft.model import DFlashDraft

C, R, V, S, B = 12, 6, 20, 3, 5


def head_of(kind, seed=0):
    head = PreviousHead(kind, C, R, V)
    generator = torch.Generator().manual_seed(seed)
    head.reset(generator)
    with torch.no_grad():
        head.out.weight.normal_(generator=generator)
        for parameter in head.parameters():
            if parameter.ndim == 1:
                parameter.normal_(generator=generator)
    return head


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_place_by_place_and_all_at_once_are_the_same(kind):
    torch.manual_seed(1)
    head, table = head_of(kind), torch.randn(V, C)
    hidden, before = torch.randn(S, B, C), torch.randint(0, V, (S, B))
    wanted = torch.rand(S, B) < 0.7
    at_once = head.out(head.codes(hidden[wanted], table[before], wanted.flatten().nonzero()[:, 0]))
    block = ChainedLogits(torch.zeros(S, B, V), None, hidden_SBC=hidden, embedding=table, previous=head)
    steps = torch.stack([block.shift(place, None, before[:, place]) for place in range(B)], dim=1)
    torch.testing.assert_close(at_once, steps[wanted])
    # Several rows of one text, each with picks of its own.
    rows = torch.tensor([2, 0, 2])
    picked = torch.randint(0, V, (3, B))
    again = torch.stack([block.shift(place, rows, picked[:, place]) for place in range(B)], dim=1)
    expected = head.out(head.codes(hidden[rows].flatten(0, 1), table[picked])).view(3, B, V)
    torch.testing.assert_close(again, expected)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_what_a_place_is_told(kind):
    """A bigram knows the last pick alone, a gru all of them; both others know the place's state."""
    torch.manual_seed(2)
    head, table, hidden = head_of(kind), torch.randn(V, C), torch.randn(1, B, C)
    picks = torch.randint(0, V, (1, B))

    def shifts(hidden, picks):
        block = ChainedLogits(torch.zeros(1, B, V), None, hidden_SBC=hidden, embedding=table, previous=head)
        return torch.stack([block.shift(place, None, picks[:, place]) for place in range(B)], dim=1)[0]

    other = picks.clone()
    other[0, 1] = (picks[0, 1] + 1) % V
    changed = (shifts(hidden, picks) != shifts(hidden, other)).any(-1).tolist()
    assert changed == [False, True, *[kind == "gru"] * (B - 2)]
    moved = hidden.clone()
    moved[0, 2] += 1
    changed = (shifts(hidden, picks) != shifts(moved, picks)).any(-1).tolist()
    assert changed == [False, False, kind != "bigram", False, False]


@pytest.mark.parametrize("kind", KINDS)
def test_a_new_head_adds_nothing_and_every_weight_gets_a_gradient_once_it_does(kind):
    head = PreviousHead(kind, C, R, V)
    head.reset(torch.Generator().manual_seed(0))
    hidden, table = torch.randn(S * B, C), torch.randn(S, B, C)
    assert not head.out(head.codes(hidden, table)).any()
    head = head_of(kind)
    head.out(head.codes(hidden, table)).square().sum().backward()
    assert all(parameter.grad.any() for parameter in head.parameters())


def small(kind, **changes):
    from tests.helpers.small_artefacts import draft_config

    size = {} if kind is None else {"previous_size": R}
    return replace(draft_config(), previous_head=kind, **size, **changes)


@pytest.mark.parametrize("kind", [None, *KINDS])
@pytest.mark.parametrize("reduced", [False, True])
def test_a_draft_with_a_head_is_written_and_read(kind, reduced, tmp_path):
    config = small(kind)
    if reduced:
        config = replace(config, draft_vocab_size=config.vocab_size // 2)
    draft = DFlashDraft.random(config, seed=4)
    found = {name: tuple(tensor.shape) for name, tensor in draft.state_dict().items()}
    assert found == tensor_shapes(config)
    draft.save_pretrained(tmp_path / "draft")
    again = DFlashDraft.from_pretrained(tmp_path / "draft")
    assert again.config == config
    for name, tensor in draft.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name


def test_a_head_changes_no_other_new_weight():
    plain = DFlashDraft.random(small(None), seed=5).state_dict()
    assert all(
        torch.equal(DFlashDraft.random(small(kind), seed=5).state_dict()[name], tensor)
        for kind in KINDS
        for name, tensor in plain.items()
    )


def test_what_is_no_head_is_refused(tmp_path):
    with pytest.raises(ValueError, match="previous_head is 'trigram'; it must be bigram, mlp, gru"):
        small("trigram")
    with pytest.raises(ValueError, match="previous_size is 0"):
        replace(small("gru"), previous_size=0)
    DFlashDraft.random(small("gru"), seed=0).save_pretrained(tmp_path / "draft")
    path = tmp_path / "draft" / "config.json"
    path.write_text(path.read_text().replace('"gru"', '"mlp"'))
    with pytest.raises(ValueError, match=r"surplus previous\.cell"):
        DFlashDraft.from_pretrained(tmp_path / "draft")
    path.write_text(path.read_text().replace('"mlp"', '"trigram"'))
    with pytest.raises(ValueError, match="previous_head is 'trigram'"):
        DFlashDraft.from_pretrained(tmp_path / "draft")
    path.write_text(path.read_text().replace('"trigram"', "7"))
    with pytest.raises(ValueError, match="previous_head"):
        DFlashDraft.from_pretrained(tmp_path / "draft")


def test_rows_move_with_their_tokens():
    out = torch.arange(8.0).view(4, 2) + 1
    before, after = torch.tensor([1, 3, 4, 9]), torch.tensor([0, 3, 9])
    assert moved_rows(out, before, after, 12).tolist() == [[0, 0], [3, 4], [7, 8]]
    whole = moved_rows(out, before, None, 12)
    assert whole.shape == (12, 2) and torch.equal(whole[before], out) and whole.count_nonzero() == 8
    assert torch.equal(moved_rows(whole, None, before, 12), out)
    assert PREVIOUS_OUT == "previous.out.weight"
