"""A draft for a checkpoint of one's own, from clips to a decoded text, in six calls of the Python API.

    python examples/train_draft.py TARGET CLIPS OUT

TARGET is a folder in the official layout, or `tiny`; CLIPS a folder of clips in the dataset's layout with
chunks 0 and 1 (`alpamayo-dflash world --out CLIPS --num-chunks 2 --clips-per-chunk 6` makes such); OUT gets
`data` and `train/draft`. The sizes suit `tiny` and seconds on a CPU, not quality: a real draft wants
thousands of clips (`docs/training.md`).
"""

import argparse
from pathlib import Path

from alpamayo_dflash import Alpamayo, ClipSource, DFlashDraft, SpeculativeDecoder
from alpamayo_dflash.distill.config import DistillConfig
from alpamayo_dflash.distill.run import run as distill
from alpamayo_dflash.train.config import TrainConfig
from alpamayo_dflash.train.run import run as train

# Plain DFlash of one layer; what chunk 1 holds is not trained on.
SMALL = {"num_draft_layers": 1, "previous_head": "none", "held_out_chunks": "1"}
SHORT = {"num_epochs": 5, "batch_size": 64, "learning_rate": 3e-3}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("target")
    parser.add_argument("clips", type=Path)
    parser.add_argument("out", type=Path)
    given = parser.parse_args()
    target, data = given.target, given.out / "data"
    distill(DistillConfig(target, given.clips, data, target_layers="1,2,4,6", samples_per_clip=6))
    trained = train(TrainConfig.flat(target, data, given.out / "train", **SMALL, **SHORT))
    draft = DFlashDraft.from_pretrained(trained["draft"])
    source = ClipSource(given.clips)
    decoder = SpeculativeDecoder(Alpamayo.from_pretrained(target), draft)
    result = decoder.generate(source.window(source.clip_ids([1])[0]), seed=0)
    print(f"{trained['steps']} steps; on a held-out clip {result.acceptance_length:.2f} tokens a pass:")
    print(result.coc[0])
