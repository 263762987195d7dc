"""One clip decoded without a draft and with one: the same text, in fewer passes of the target.

    python examples/decode_clip.py CLIPS DRAFT

CLIPS is a folder of clips in the dataset's layout (`alpamayo-dflash world --out CLIPS` makes such), DRAFT a
draft's folder (`examples/train_draft.py` makes one).
"""

import argparse

from alpamayo_dflash import Alpamayo, ClipSource, DFlashDraft, SpeculativeDecoder

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("clips")
    parser.add_argument("draft")
    given = parser.parse_args()
    source = ClipSource(given.clips)
    window = source.window(source.clip_ids()[0])
    target = Alpamayo.from_pretrained("tiny")
    draft = DFlashDraft.from_pretrained(given.draft)
    plain = SpeculativeDecoder(target).generate(window, temperature=0.6, seed=0)
    drafted = SpeculativeDecoder(target, draft).generate(window, temperature=0.6, seed=0)
    if drafted.token_ids != plain.token_ids:
        raise SystemExit(f"not lossless: {drafted.coc[0]!r} and {plain.coc[0]!r}")
    metres = float((drafted.pred_xyz - plain.pred_xyz).abs().max())
    print(plain.coc[0])
    print(f"passes without a draft: {plain.passes}, with it: {drafted.passes}")
    print(f"trajectories of {drafted.pred_xyz.shape[1]} way-points, at most {metres:.1e} m apart")
