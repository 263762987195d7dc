"""Traces of rounds for tests: what a draft's chain did for a sample."""

from alpamayo_dflash.decode.observer import SampleTrace


def chain_trace(sample, proposed, accepted, emitted):
    """A chain of a draft's tokens after token 0 at position 0, of which the first ones were taken."""
    return SampleTrace(
        sample=sample,
        position=0,
        anchor=0,
        proposed=proposed,
        parents=tuple(range(-1, len(proposed) - 1)),
        sources=("draft",) * len(proposed),
        taken=tuple(range(accepted)),
        drafted=len(proposed),
        draft_accepted=accepted,
        emitted=emitted,
        origins=("draft",) * accepted + ("target",) * (len(emitted) - accepted),
    )
