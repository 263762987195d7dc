"""Decodes two clips of a world that `alpamayo-dflash world` wrote, on the tiny target; it takes `[clips]`."""

import sys

import alpamayo_dflash
from alpamayo_dflash import Alpamayo, ClipSource, SpeculativeDecoder

if __name__ == "__main__":
    source = ClipSource(sys.argv[1])
    decoder = SpeculativeDecoder(Alpamayo.from_pretrained("tiny"))
    print(alpamayo_dflash.__version__, alpamayo_dflash.__file__)
    for clip in source.clip_ids()[:2]:
        result = decoder.generate(source.window(clip), temperature=0.0)
        assert result.coc[0] and result.pred_xyz.isfinite().all(), result
        print(clip, result.coc[0])
