"""Decodes one window that is made of arrays, on the tiny target; prints the text. It takes no extra."""

import numpy as np

from alpamayo_dflash import Alpamayo, SpeculativeDecoder, Window

if __name__ == "__main__":
    xyz = np.zeros((16, 3), np.float32)
    xyz[:, 0] = np.linspace(-12.0, 0.0, 16)
    rot = np.tile(np.eye(3, dtype=np.float32), (16, 1, 1))
    frames = np.random.default_rng(0).integers(0, 256, (4, 4, 64, 96, 3), dtype=np.uint8)
    window = Window("of arrays", 5_100_000, (0, 1, 2, 6), frames, xyz, rot)
    result = SpeculativeDecoder(Alpamayo.from_pretrained("tiny")).generate(window, seed=0)
    assert result.coc[0] and tuple(result.pred_xyz.shape) == (1, 64, 3), result
    print(result.coc[0])
