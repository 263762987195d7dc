"""Distillation data on a CUDA device (run by hand: `pytest -m gpu`)."""

import threading

import pytest
import torch

from alpamayo_dflash.common.machine import Download
from alpamayo_dflash.decode.config import DecodeConfig, Sampling
from alpamayo_dflash.decode.rollouts import Rollouts
from alpamayo_dflash.distill.config import DistillConfig
from alpamayo_dflash.distill.data import DistillData
from alpamayo_dflash.distill.run import run
from alpamayo_dflash.standins.validate import held_out
from alpamayo_dflash.target.alpamayo import Alpamayo
from alpamayo_dflash.target.images import lie_pinned, staged
from alpamayo_dflash.world.config import WorldConfig
from alpamayo_dflash.world.run import run as write_world
from tests.helpers.random_target import random_draft

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
TAPS, CONTEXT, TOKENS, BLOCK = (2, 5), 16, 40, 8


@pytest.fixture(scope="module")
def target():
    return Alpamayo.from_pretrained("tiny", dtype=torch.bfloat16, device="cuda").requires_grad_(False)


@pytest.fixture(scope="module")
def windows():
    return [window for window, _ in held_out(6, seed=7)]


@pytest.fixture(scope="module")
def draft(target):
    shape = {"block_size": BLOCK, "context_len": 32, "target_layer_ids": (1, 4)}
    heads = {"num_heads": 4, "num_kv_heads": 4, "head_dim": 16}
    return random_draft(target, **shape, **heads)


def rolled(target, windows, **options):
    rollouts = Rollouts(target, taps=TAPS, context_len=CONTEXT, max_tokens=TOKENS, **options)
    found = []
    for window in windows:
        rollouts.read(staged(window, target.device))
        texts = rollouts.write(Sampling(0.6), num_samples=3, greedy_first=True)
        found.append((texts, rollouts.score([text.token_ids for text in texts])))
    return found


def test_at_one_row_width_a_draft_changes_no_bit(target, windows, draft):
    config = DecodeConfig(row_width=BLOCK)
    plain = rolled(target, windows, config=config)
    drafted = rolled(target, windows, config=config, draft=draft)
    for (texts, forced), (others, again) in zip(plain, drafted, strict=True):
        assert texts == others
        for one, other in zip(forced, again, strict=True):
            assert torch.equal(one.logits, other.logits)
            assert torch.equal(one.states, other.states)
            assert torch.equal(one.prompt_states, other.prompt_states)


def test_a_greedy_sample_among_sampled_ones_is_what_it_is_alone(target, windows):
    """At one row width, where company rounds nothing otherwise."""
    config = DecodeConfig(row_width=BLOCK)
    rollouts = Rollouts(target, taps=TAPS, context_len=CONTEXT, max_tokens=TOKENS, config=config)
    for window in windows:
        rollouts.read(window)
        alone = rollouts.write(Sampling(0.0)) + rollouts.write(Sampling(0.6), num_samples=2)
        assert rollouts.write(Sampling(0.6), num_samples=3, greedy_first=True) == alone


def test_device_rounds_are_captured_once_for_all_windows(target, windows):
    rollouts = Rollouts(target, taps=TAPS, context_len=CONTEXT, max_tokens=TOKENS)
    counts = []
    for window in windows:
        rollouts.read(window)
        rollouts.write(Sampling(0.0))
        texts = rollouts.write(Sampling(0.6), num_samples=2)
        rollouts.score([text.token_ids for text in texts])
        counts.append((rollouts._verifier.cache.generation, len(rollouts._engine.device_rounds.kept)))
    assert len(set(counts[1:])) == 1
    assert counts[-1][1] == 2


def test_frames_are_staged_in_pinned_memory_of_their_own(target, windows):
    one, other = (staged(window, target.device) for window in windows[:2])
    assert lie_pinned(one.frames)
    assert (one.frames == windows[0].frames).all()
    assert (other.frames == windows[1].frames).all()


def test_a_download_waits_for_what_was_enqueued_before_its_mark():
    device = torch.device("cuda")
    download, found = Download(device), {}
    value = torch.zeros(1 << 22, device=device)
    for _ in range(200):
        value = value + 1
    ready = download.mark()
    thread = threading.Thread(target=lambda: found.update(download({"value": value}, ready)))
    thread.start()
    thread.join()
    assert found["value"].device.type == "cpu"
    assert found["value"].eq(200).all()


def test_the_stage_writes_the_same_set_twice(tmp_path):
    """Read ahead, captured, written behind: the same bytes again, whatever waited for what."""
    write_world(WorldConfig(tmp_path / "world", num_chunks=2, clips_per_chunk=8, workers=2))
    options = {"target_layers": "2,5", "max_tokens": TOKENS, "shard_size": 6, "device": "cuda"}
    hashes = []
    for name in ("one", "other"):
        out = tmp_path / name
        run(
            DistillConfig(
                model_path="tiny",
                cache_dir=tmp_path / "world",
                output_dir=out,
                target_dtype="bfloat16",
                num_workers=3,
                **options,
            )
        )
        data = DistillData(out)
        data.verify()
        hashes.append([shard["sha256"] for shard in data.manifest["shards"]])
        assert data.manifest["provenance"]["0"]["weights"] == "fused"
    assert hashes[0] == hashes[1]
    assert len(hashes[0]) == 8


def test_captured_passes_over_texts_give_what_uncaptured_ones_give(target, windows):
    """Up to rounding of other numbers of rows; and the same bits for the same texts."""
    rollouts = Rollouts(target, taps=TAPS, context_len=CONTEXT, max_tokens=TOKENS)
    texts = [[list(range(start, start + 9 + 3 * index)) for start in (3, 50, 99)] for index in range(4)]
    first = []
    for _ in range(2):
        for window, responses in zip(windows, texts, strict=False):
            rollouts.read(window)
            scored = rollouts.score(responses)
            verifier = rollouts._verifier
            plain = verifier.force(rollouts._prefilled, responses)
            for index, found in enumerate(scored):
                torch.testing.assert_close(found.logits, plain.logits(index)[:-1], rtol=0.05, atol=0.1)
            first.append([found.logits for found in scored])
        assert 1 <= len(verifier.forced) <= 4
    for one, other in zip(first[:4], first[4:], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
