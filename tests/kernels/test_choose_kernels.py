"""The choice without a sort against `sampling.choose`, in Triton's interpreter."""

import pytest
import torch

from alpamayo_dflash.decode.config import Sampling
from alpamayo_dflash.decode.noise import NO_NOISE, row_noise, stream_keys, token_noise
from alpamayo_dflash.decode.sampling import Chooser

module = pytest.importorskip("alpamayo_dflash.kernels.sampling")
VOCAB = 300
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch):
    monkeypatch.setattr(module, "_BLOCK_V", 128)


def places(rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    keys = torch.cat([stream_keys(seed, "clip@5", [seed % 3], "cpu") for seed in range(rows)])
    return keys, torch.arange(rows) * 3 % 7


def logits(rows: int, scale: float, width: int = VOCAB, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(rows, width, generator=generator) * scale).bfloat16().float()


def chooser(
    sampling: Sampling, rows: int, ids: torch.Tensor | None = None, *, kernels: bool = True
) -> Chooser:
    vocab = VOCAB if ids is None else len(ids)
    return Chooser(
        rows, vocab, masked=range(100, 140), token_ids=ids, sampling=sampling, device=CPU, kernels=kernels
    )


@pytest.mark.parametrize("temperature", [0.0, 0.6, 1.5])
@pytest.mark.parametrize("top_p", [0.02, 0.5, 0.98, 1.0])
@pytest.mark.parametrize("scale", [0.2, 4.0])
def test_it_chooses_as_the_plain_operations_do(temperature, top_p, scale):
    rows, sampling = 5, Sampling(temperature, top_p)
    keys, positions = places(rows)
    given = logits(rows, scale, VOCAB + 7)
    given[:, VOCAB:] = 100.0  # padding of the head, never read
    fast, plain = chooser(sampling, rows), chooser(sampling, rows, kernels=False)
    choice = fast(given, keys, positions)
    expected = plain(given, keys, positions)
    assert choice.finite.all()
    assert torch.equal(choice.columns[choice.settled], expected.columns[choice.settled])
    assert torch.equal(fast.exactly(given, keys, positions), expected.columns)
    if top_p >= 0.98:
        assert choice.settled.all()
    assert not ((choice.columns >= 100) & (choice.columns < 140)).any()


def test_no_candidate_in_the_nucleus_is_said():
    # Flat but for one token: the nucleus is that token alone, and noise puts many others before it.
    given = torch.zeros(1, VOCAB)
    given[0, 7] = 0.5
    sampling = Sampling(1.0, 1e-4)
    keys, positions = places(1)
    fast = chooser(sampling, 1)
    choice = fast(given, keys, positions)
    assert not choice.settled.any()
    assert fast.exactly(given, keys, positions).tolist() == [7]


def test_a_reduced_head_takes_the_noise_and_the_mask_of_its_target_ids():
    ids = torch.tensor([3, 4, 9, 50, 101, 139, 140, 222, 299])
    keys, positions = places(6)
    given = logits(6, 1.0, len(ids))
    for sampling in (Sampling(0.0, 1.0), Sampling(0.6, 0.98), Sampling(1.0, 1.0)):
        choice = chooser(sampling, 6, ids)(given, keys, positions)
        expected = chooser(sampling, 6, ids, kernels=False)(given, keys, positions)
        assert choice.settled.all()
        assert torch.equal(choice.columns, expected.columns)
        assert not set(choice.columns.tolist()) & {4, 5}
    whole = row_noise(keys, positions, VOCAB)
    torch.testing.assert_close(row_noise(keys, positions, len(ids), ids), whole[:, ids], rtol=0, atol=0)


def test_greedy_takes_the_lowest_of_equal_tokens():
    given = torch.zeros(2, VOCAB)
    given[0, [250, 30, 110]] = 5.0
    given[1, [299, 64]] = 5.0
    keys, positions = places(2)
    assert chooser(Sampling(0.0), 2)(given, keys, positions).columns.tolist() == [30, 64]


def test_rows_that_are_not_finite_are_flagged():
    given = logits(4, 1.0)
    given[1, 40], given[2, 299], given[3, 110] = float("nan"), float("inf"), float("-inf")
    keys, positions = places(4)
    for sampling in (Sampling(0.0), Sampling(0.6)):
        choice = chooser(sampling, 4)(given, keys, positions)
        assert choice.finite.tolist() == [True, False, False, False]


def test_a_rows_choice_depends_on_that_row_alone():
    keys, positions = places(4)
    given, changed = logits(4, 1.0), logits(4, 2.0, seed=9)
    changed[1] = given[2]
    fast = chooser(Sampling(0.6), 4)
    first = int(fast(given, keys, positions).columns[2])
    keys[1], positions[1] = keys[2], positions[2]
    assert int(fast(changed, keys, positions).columns[1]) == first


@pytest.mark.parametrize("top_p", [0.5, 0.98, 1.0])
@pytest.mark.parametrize("kernels", [True, False])
def test_a_row_without_noise_is_greedy_among_sampled_ones(top_p, kernels):
    keys, positions = places(6)
    given = logits(6, 0.5)
    sampled = chooser(Sampling(0.6, top_p), 6, kernels=kernels)
    before = sampled(given, keys, positions).columns.clone()
    greedy = chooser(Sampling(0.0), 6, kernels=kernels)(given, keys, positions).columns
    assert not torch.equal(before, greedy)
    keys[[1, 4]] = torch.tensor(NO_NOISE)
    choice = sampled(given, keys, positions)
    assert choice.settled[[1, 4]].all()
    assert torch.equal(choice.columns[[1, 4]], greedy[[1, 4]])
    assert torch.equal(choice.columns[[0, 2, 3, 5]], before[[0, 2, 3, 5]])
    assert torch.equal(sampled.exactly(given, keys, positions)[[1, 4]], greedy[[1, 4]])


@pytest.mark.parametrize("kernels", [True, False])
def test_a_greedy_row_tells_logits_apart_that_tempering_rounds_to_one(kernels):
    """1 / 0.6 is no power of two: of two neighbours in float32 the larger is chosen all the same."""
    low = torch.tensor(1.5)
    while low * (1 / 0.6) != torch.nextafter(low, torch.tensor(2.0)) * (1 / 0.6):
        low = torch.nextafter(low, torch.tensor(2.0))
    given = torch.zeros(1, VOCAB)
    given[0, 5], given[0, 200] = low, torch.nextafter(low, torch.tensor(2.0))
    keys = torch.tensor([NO_NOISE])
    choice = chooser(Sampling(0.6), 1, kernels=kernels)(given, keys, torch.zeros(1, dtype=torch.int64))
    assert choice.columns.tolist() == [200]


def test_noise_of_rows_is_the_noise_of_their_places():
    whole = token_noise(5, "w", [0, 2], [0, 3, 4], 50)
    keys = stream_keys(5, "w", [2, 0], "cpu")
    rows = row_noise(keys, torch.tensor([4, 3]), 50)
    assert torch.equal(rows[0], whole[2, 1])
    assert torch.equal(rows[1], whole[1, 0])
