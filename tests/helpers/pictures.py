"""Frames that a resize finds hard, and the sizes that it is tried at."""

import json
import os
from pathlib import Path

import numpy as np

_GIVEN = os.environ.get("ALPAMAYO_GOLDEN")
_GOLDEN = Path(_GIVEN) if _GIVEN else Path(__file__).resolve().parents[3] / "shared" / "golden"


def recorded_sizes():
    """(height, width, new height, new width) of every golden set, where there are any."""
    files = [*_GOLDEN.glob("units/resize.json"), *_GOLDEN.glob("*/units/resize.json")]
    rows = [row for path in files for row in json.loads(path.read_text())]
    return {tuple(row[name] for name in ("h", "w", "out_h", "out_w")) for row in rows}


SIZES = {
    (1080, 1920, 320, 576),  # R1's
    (1080, 1900, 320, 576),
    (1080, 1920, 1088, 1920),  # one side stays
    (704, 1300, 704, 1280),
    (64, 96, 64, 96),
    (47, 61, 192, 256),
    (1, 7, 32, 64),
    (301, 203, 96, 64),
}


def frames(cameras, count, height, width, *, seed=0):
    """uint8 [cameras, count, height, width, 3]: noise, checkerboards, which overshoot, black and white."""
    generator = np.random.default_rng(seed)
    made = generator.integers(0, 256, (cameras, count, height, width, 3), dtype=np.uint8)
    rows, columns = np.arange(height)[:, None, None], np.arange(width)[:, None]
    board = (rows // 3 + columns // 3 + np.arange(3)) % 2 * 255
    made[:, :, :, width // 2 :] = board[:, width // 2 :]
    if height > 8:
        made[:, 0, : height // 8] = 0
        made[:, 0, -(height // 8) :] = 255
    return made
