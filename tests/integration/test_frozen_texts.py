"""The same seed writes the same text as ever: against texts that an earlier revision wrote."""

import json

import pytest
import torch

from alpamayo_dflash.decode.config import DecodeConfig
from alpamayo_dflash.decode.decoder import SpeculativeDecoder
from tests.helpers import frozen_texts

# Rounding alone, by another processor or other threads, moves a far way-point (50 m) by up to 2.9e-3 m.
TO_M = 1e-2


@pytest.fixture(scope="module")
def target():
    return frozen_texts.tiny_target()


@pytest.fixture(scope="module")
def windows():
    return frozen_texts.windows()


@pytest.fixture(scope="module")
def frozen():
    stored = json.loads(frozen_texts.FILE.read_text())
    assert stored["requests"] == frozen_texts.REQUESTS
    assert len(stored["clips"]) == frozen_texts.CLIPS
    return stored["clips"]


@pytest.mark.parametrize("loop", ["host", "device"])
def test_the_texts_are_the_frozen_ones(loop, target, windows, frozen):
    """With a draft that is right three times in four; every fourth clip also without one, way-points and all.

    A draft's passes have other widths and round otherwise, which far way-points show beyond the tolerance.
    """
    config = DecodeConfig(loop=loop)
    alone = SpeculativeDecoder(target, config=config)
    for number, (window, clip) in enumerate(zip(windows, frozen, strict=True)):
        assert window.clip_id == clip["clip_id"]
        prompt = target.prompt(window)
        drafted = SpeculativeDecoder(target, frozen_texts.oracle(target, prompt, clip, number), config)
        for name, result in frozen_texts.generate(drafted, prompt, trajectories=False).items():
            assert_texts(result, clip, name)
            assert result.accepted > 0
        if number % 4 == 0:
            for name, result in frozen_texts.generate(alone, prompt).items():
                assert_texts(result, clip, name)
                expected = torch.tensor(clip[name]["pred_xyz"][loop])
                torch.testing.assert_close(result.pred_xyz[:, 3::4], expected, atol=TO_M, rtol=0)


def assert_texts(result, clip, name):
    assert result.token_ids == clip[name]["token_ids"], (clip["clip_id"], name)
    assert [str(stop) for stop in result.stops] == clip[name]["stops"]
