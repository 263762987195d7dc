import pytest
import torch

from alpamayo_dflash.train.start import choose_tokens

COUNTS = {3: 5, 11: 9, 4: 5, 8: 1, 15: 100}
MASKED = range(14, 18)


def choose(size, counts=COUNTS, always=(12, 8, 16)):
    return choose_tokens(counts, size, vocab_size=20, always=always, masked=MASKED)


@pytest.mark.parametrize(
    ("size", "kept", "counted", "filled"),
    [
        (2, [8, 12], 1, 0),  # end marks alone; 16 is one, but masked
        (4, [3, 8, 11, 12], 3, 0),  # of 3 and 4, equally common, the lower
        (5, [3, 4, 8, 11, 12], 4, 0),
        (8, [0, 1, 2, 3, 4, 8, 11, 12], 4, 3),
        (16, [*range(14), 18, 19], 4, 11),
    ],
)
def test_the_commonest_and_the_end_marks_are_kept_and_masked_ids_never(size, kept, counted, filled):
    found = choose(size)
    assert found.token_ids.dtype == torch.int64
    assert found.token_ids.tolist() == kept
    assert (found.counted, found.filled) == (counted, filled)


@pytest.mark.parametrize("size", [1, 17])
def test_sizes_that_cannot_be_are_refused(size):
    with pytest.raises(ValueError, match=rf"draft_vocab_size is {size}; it must be 2 .* to 16"):
        choose(size)


def test_the_order_of_the_counts_does_not_matter():
    turned = dict(reversed(COUNTS.items()))
    assert torch.equal(choose(4).token_ids, choose(4, turned).token_ids)
