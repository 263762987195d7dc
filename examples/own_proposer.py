"""A proposer of one's own: after a sample's last words it offers what followed them in texts seen before.

Run `python examples/own_proposer.py CLIPS CLIP...`: a folder in the dataset's layout (`alpamayo-dflash world
--out CLIPS` makes such) and ids. The text stays the target's own; a good guess saves passes.
"""

import argparse
from collections.abc import Sequence
from typing import Any

from alpamayo_dflash import Alpamayo, ClipSource, Listed, Proposed, SpeculativeDecoder


class SeenBefore(Listed):
    """Looks the last two tokens up in the texts that it has been told."""

    def __init__(self) -> None:
        self.texts: list[list[int]] = []

    def propose(self, samples: Sequence[Any]) -> list[Proposed]:
        """What followed, in the latest text that holds the two."""
        return [Proposed(self.after(sample.tokens[-2:]), source="seen before") for sample in samples]

    def after(self, last: list[int]) -> list[int]:
        """At most seven tokens."""
        ends = ((text, end) for text in reversed(self.texts) for end in range(len(last), len(text)))
        return next((text[end : end + 7] for text, end in ends if text[end - len(last) : end] == last), [])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("clips")
    parser.add_argument("clip", nargs="+")
    given = parser.parse_args()
    seen, source = SeenBefore(), ClipSource(given.clips)
    decoder = SpeculativeDecoder(Alpamayo.from_pretrained("tiny"), proposers=[seen])
    for clip in given.clip:
        result = decoder.generate(source.window(clip), temperature=0.0)
        seen.texts += result.token_ids
        print(f"{result.coc[0]} ({result.acceptance_length:.2f} tokens a pass)")
