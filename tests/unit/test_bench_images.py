"""The times from frames to patches, as far as a CPU has them."""

import torch

from alpamayo_dflash.bench.images import preprocess
from alpamayo_dflash.target.alpamayo import Alpamayo


def test_a_cpu_has_the_one_way():
    target = Alpamayo.from_pretrained("tiny")
    with torch.inference_mode():
        found = preprocess(target, 2)
    assert found["frame_bytes"] == 16 * 1080 * 1920 * 3
    assert "not on a GPU" in found["images_plain_because"]
    assert set(found) == {"frame_bytes", "images_plain_because", "preprocess_ms"}
    [times] = found["preprocess_ms"].values()
    assert len(times) == 2 and min(times) > 0
