import dataclasses

import pytest
import torch

from alpamayo_dflash.draft.model import DFlashDraft
from tests.unit.test_draft_config import GOOD

V, C, X, B = GOOD.vocab_size, GOOD.hidden_size, GOOD.context_len, GOOD.block_size


def bound(config=GOOD, seed=1):
    """A draft whose weights are large enough that every part of it matters, with its target's tables."""
    generator = torch.Generator().manual_seed(seed)
    draft = DFlashDraft.random(config, seed).eval()
    with torch.no_grad():
        for parameter in draft.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.4 + (parameter.ndim == 1))
    tables = torch.randn(2, V, C, generator=generator)
    draft.bind(tables[0], tables[1], config.num_target_layers)
    return draft


def norm(x, weight, eps):
    return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight


def rope(x, position, config):
    half = config.head_dim // 2
    angle = position / config.rope_theta ** (torch.arange(half).double() / half)
    cos, sin = angle.cos(), angle.sin()
    return torch.cat((x[:half] * cos - x[half:] * sin, x[half:] * cos + x[:half] * sin))


def naive(draft, context, anchor):
    """DFlash for one block, head by head and token by token, in double precision: [b, C]."""
    config = draft.config
    w = {name: tensor.double() for name, tensor in draft.state_dict().items()}
    eps, d, group = config.rms_norm_eps, config.head_dim, config.num_heads // config.num_kv_heads
    features = norm(context.double() @ w["fc.weight"].T, w["hidden_norm.weight"], eps)
    block = [draft.embedding[anchor].double()] + [w["mask_embedding"]] * (config.block_size - 1)
    x = torch.stack(block)
    for index in range(config.num_layers):
        layer = {name.split(".", 2)[2]: t for name, t in w.items() if name.startswith(f"layers.{index}.")}
        h = norm(x, layer["input_layernorm.weight"], eps)
        source = torch.cat((features, h))
        out = torch.zeros(config.block_size, config.num_heads * d).double()
        for head in range(config.num_heads):
            rows = slice(head * d, (head + 1) * d)
            kv_rows = slice(head // group * d, (head // group + 1) * d)
            q = norm(h @ layer["self_attn.q_proj.weight"][rows].T, layer["self_attn.q_norm.weight"], eps)
            k = norm(
                source @ layer["self_attn.k_proj.weight"][kv_rows].T, layer["self_attn.k_norm.weight"], eps
            )
            v = source @ layer["self_attn.v_proj.weight"][kv_rows].T
            q = torch.stack([rope(row, len(features) + i, config) for i, row in enumerate(q)])
            k = torch.stack([rope(row, i, config) for i, row in enumerate(k)])
            out[:, rows] = (q @ k.T / d**0.5).softmax(-1) @ v
        x = x + out @ layer["self_attn.o_proj.weight"].T
        h = norm(x, layer["post_attention_layernorm.weight"], eps)
        gate, up = h @ layer["mlp.gate_proj.weight"].T, h @ layer["mlp.up_proj.weight"].T
        x = x + (gate * gate.sigmoid() * up) @ layer["mlp.down_proj.weight"].T
    return norm(x, w["norm.weight"], eps)


def contexts(lengths, seed=3):
    generator = torch.Generator().manual_seed(seed)
    states = torch.randn(len(lengths), X, GOOD.feature_size, generator=generator)
    for row, length in enumerate(lengths):
        states[row, : X - length] = 0
    return states


def test_equals_the_naive_network_also_with_short_contexts():
    draft = bound()
    lengths = [X, 3, 1, 0]
    states, anchors = contexts(lengths), torch.tensor([7, 0, 39, 5])
    hidden = draft(states, torch.tensor(lengths), anchors)
    for row, length in enumerate(lengths):
        expected = naive(draft, states[row, X - length :], int(anchors[row]))
        torch.testing.assert_close(hidden[row].double(), expected[1:], atol=2e-5, rtol=1e-5)


def test_empty_slots_are_not_seen():
    draft = bound()
    lengths, anchors = torch.tensor([2, 4]), torch.tensor([1, 2])
    states = contexts(lengths.tolist())
    noisy = states.clone()
    noisy[0, : X - 2] = 50.0
    noisy[1, : X - 4] = -50.0
    assert torch.equal(draft(states, lengths, anchors), draft(noisy, lengths, anchors))


def test_shared_states_give_the_same_as_separate_ones():
    draft = bound()
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(9, GOOD.feature_size, generator=generator)
    entries = torch.randint(0, 9, (3, X), generator=generator)
    lengths, anchors = torch.tensor([X, 2, 4]), torch.tensor([3, 3, 9])
    shared = draft(states, lengths, anchors, entries)
    torch.testing.assert_close(shared, draft(states[entries], lengths, anchors), atol=1e-5, rtol=1e-5)


def test_wanted_masks_get_the_same_as_all():
    draft = bound()
    lengths, anchors = torch.tensor([X, 2]), torch.tensor([3, 9])
    wanted = torch.tensor([[1, 0, 1], [0, 1, 0]]).bool()
    states = contexts(lengths.tolist())
    some = draft(states, lengths, anchors, wanted_R=wanted.flatten().nonzero()[:, 0])
    torch.testing.assert_close(some, draft(states, lengths, anchors)[wanted], atol=1e-5, rtol=1e-5)


def test_states_are_read_in_the_dtype_that_they_were_kept_in():
    draft, lengths, anchors = bound(), torch.tensor([X, 2]), torch.tensor([3, 9])
    kept = contexts(lengths.tolist()).bfloat16()
    assert torch.equal(draft(kept, lengths, anchors), draft(kept.float(), lengths, anchors))


def test_block_tokens_see_each_other_in_both_directions_and_all_context():
    draft = bound()
    lengths, anchors = torch.tensor([X]), torch.tensor([7])
    states = contexts([X]).requires_grad_()
    hidden = draft(states, lengths, anchors)
    (gradient,) = torch.autograd.grad(hidden[0, 0].sum(), states)
    assert bool((gradient[0].abs().sum(-1) > 0).all())
    # The last mask's key reaches the first mask: with another block size the first prediction differs.
    longer = bound(dataclasses.replace(GOOD, block_size=B + 1))
    assert not torch.allclose(longer(states, lengths, anchors)[0, 0], hidden[0, 0], atol=1e-4)


def test_propose_gives_logits_of_the_bound_head():
    draft = bound()
    lengths, anchors = torch.tensor([X, 1]), torch.tensor([4, 6])
    states = contexts(lengths.tolist())
    proposal = draft.propose(states, lengths, anchors)
    assert proposal.token_ids is None
    assert proposal.logits.shape == (2, B - 1, V)
    assert not proposal.logits.requires_grad
    torch.testing.assert_close(proposal.logits, draft(states, lengths, anchors) @ draft.head.T)
    assert (draft.taps, draft.context_len, draft.block_size) == ((0, 2), X, B)


@pytest.mark.parametrize(
    ("rows", "width", "layers", "said"),
    [
        (V, C + 4, 3, "hidden size is 16, the target's 20"),
        (V + 2, C, 3, "40 tokens, the target's 42"),
        (V, C, 4, r"taps layers \[0, 2\] of a target with 3 layers; this target has 4"),
    ],
)
def test_bind_refuses_another_target_and_names_both_numbers(rows, width, layers, said):
    draft = DFlashDraft.random(GOOD)
    table = torch.zeros(rows, width)
    with pytest.raises(ValueError, match=said):
        draft.bind(table, table, layers)


def test_an_unbound_draft_says_so():
    with pytest.raises(ValueError, match="bind it"):
        DFlashDraft.random(GOOD).propose(contexts([X]), torch.tensor([X]), torch.tensor([0]))


def test_bind_takes_the_target_s_dtype_and_stores_nothing_of_it():
    draft = DFlashDraft.random(GOOD)
    names = set(draft.state_dict())
    table = torch.randn(V, C).bfloat16()
    draft.bind(table, table, 3)
    assert {parameter.dtype for parameter in draft.parameters()} == {torch.bfloat16}
    assert set(draft.state_dict()) == names
    logits = draft.propose(contexts([X]).bfloat16(), torch.tensor([X]), torch.tensor([0])).logits
    exact = bound_like(draft, table).propose(contexts([X]), torch.tensor([X]), torch.tensor([0])).logits
    assert logits.dtype == torch.bfloat16
    torch.testing.assert_close(logits.float(), exact, atol=0.15, rtol=0.1)


def bound_like(draft, table):
    wide = DFlashDraft(draft.config)
    wide.load_state_dict({name: tensor.float() for name, tensor in draft.state_dict().items()})
    wide.bind(table.float(), table.float(), 3)
    return wide


def test_own_embeddings_are_used_in_place_of_the_target_s():
    config = dataclasses.replace(GOOD, trained_embeddings=True)
    draft = bound(config)
    states, lengths, anchors = contexts([X]), torch.tensor([X]), torch.tensor([3])
    before = draft.propose(states, lengths, anchors).logits
    other = torch.randn(V, C)
    draft.bind(other, other, 3)
    assert torch.equal(draft.propose(states, lengths, anchors).logits, before)
    with torch.no_grad():
        draft.embed_tokens.weight[3] += 1
    assert not torch.equal(draft.propose(states, lengths, anchors).logits, before)


def test_random_drafts_repeat_with_their_seed():
    one, same, other = (DFlashDraft.random(GOOD, seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not torch.equal(one["fc.weight"], other["fc.weight"])


def test_a_reduced_head_has_the_whole_head_s_columns():
    config = dataclasses.replace(GOOD, draft_vocab_size=4)
    whole = bound()
    draft = DFlashDraft(config).eval()
    ids = torch.tensor([2, 3, 17, 39])
    draft.load_state_dict(whole.state_dict() | {"draft_token_ids": ids})
    draft.bind(whole.embedding, whole.head, 3)
    states, lengths, anchors = contexts([X, 2]), torch.tensor([X, 2]), torch.tensor([4, 30])
    proposal = draft.propose(states, lengths, anchors)
    assert draft.embedding is not draft.head
    assert draft.head.shape == (4, C)
    assert proposal.token_ids.tolist() == ids.tolist()
    assert proposal.token_ids is draft.propose(states, lengths, anchors).token_ids
    torch.testing.assert_close(proposal.logits, whole.propose(states, lengths, anchors).logits[..., ids])
