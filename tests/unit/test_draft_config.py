import dataclasses

import pytest

from alpamayo_dflash.draft.config import DraftConfig

GOOD = DraftConfig(
    hidden_size=16,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    intermediate_size=24,
    vocab_size=40,
    block_size=4,
    context_len=5,
    target_layer_ids=(0, 2),
    num_target_layers=3,
    mask_token_id=40,
)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"hidden_size": 0}, "hidden_size is 0"),
        ({"block_size": 1}, "block_size is 1"),
        ({"context_len": 0}, "context_len is 0"),
        ({"num_kv_heads": 3}, "num_kv_heads 3"),
        ({"head_dim": 7}, "head_dim is 7"),
        ({"target_layer_ids": ()}, "empty"),
        ({"target_layer_ids": (1, 1)}, "twice"),
        ({"target_layer_ids": (0, 3)}, r"\[3\] out of range.*0 to 2"),
        ({"target_layer_ids": (-1,)}, r"\[-1\] out of range"),
        ({"mask_token_id": -1}, "mask_token_id is -1"),
        ({"draft_vocab_size": 0}, "draft_vocab_size is 0; it must be 1 to the vocabulary's 40"),
        ({"draft_vocab_size": 41}, "draft_vocab_size is 41"),
        ({"draft_vocab_size": 9, "trained_embeddings": True}, "a whole head of its own"),
    ],
)
def test_a_wrong_value_is_named(change, said):
    with pytest.raises(ValueError, match=said):
        dataclasses.replace(GOOD, **change)


def test_feature_size_counts_the_taps():
    assert GOOD.feature_size == 32
