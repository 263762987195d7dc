import pytest

from alpamayo_dflash.decode.proposer import Proposed, unite
from alpamayo_dflash.decode.stops import StopReason, StopRules

E, T, EOS, P, OTHER_EOS = 90, 91, 92, 13, 93


def rules(mode, period=P):
    return StopRules(E, T, (EOS, OTHER_EOS), period, mode)


def shape(rules, anchor, drafted):
    """What is proposed after `anchor` where a draft says so much."""
    return unite([Proposed(drafted, source="draft")], anchor, rules, room=99, most=99).tokens


@pytest.mark.parametrize(
    ("mode", "anchor", "drafted", "proposal"),
    [
        # every mode: the end marks come together, nothing follows the end
        ("off", 1, [2, 3, 4], [2, 3, 4]),
        ("off", 1, [2, E, 4], [2, E, T]),
        ("off", 1, [2, 3, E], [2, 3, E, T]),
        ("off", 1, [2, T, 4], [2, T]),
        ("off", 1, [2, EOS, 4], [2, EOS]),
        ("off", 1, [2, OTHER_EOS, 4], [2, OTHER_EOS]),
        ("off", E, [5, 6], [T]),
        ("off", E, [], [T]),
        ("off", P, [5, 6], [5, 6]),
        ("off", 1, [P, 6], [P, 6]),
        # hint: the end marks after a period, wherever it is
        ("hint", P, [], [E, T]),
        ("hint", P, [5, 6], [E, T]),
        ("hint", 1, [2, P, 5, 6], [2, P, E, T]),
        ("hint", 1, [2, 3, P], [2, 3, P, E, T]),
        ("hint", 1, [2, E, 5], [2, E, T]),
        ("hint", 1, [], []),
        # force, rule 2: a period in the place of an end that has none before it
        ("force", 1, [2, E, 5], [2, P]),
        ("force", 1, [E, 5], [P]),
        ("force", 1, [2, P, E, 5], [2, P, E, T]),
        ("force", P, [E, 5], [E, T]),
        ("force", 1, [2, P, 5], [2, P, 5]),
    ],
)
def test_shape(mode, anchor, drafted, proposal):
    assert shape(rules(mode), anchor, drafted) == proposal


@pytest.mark.parametrize("mode", ["hint", "force", "off"])
def test_without_a_period_only_the_ends_grammar_holds(mode):
    assert shape(rules(mode, None), 1, [2, E, 5]) == [2, E, T]
    assert shape(rules(mode, None), 1, [2, P, 5]) == [2, P, 5]
    assert rules(mode, None).forced_end(P) == []


def test_forced_end_is_for_force_after_a_period_only():
    assert rules("force").forced_end(P) == [E, T]
    assert rules("force").forced_end(1) == []
    assert rules("hint").forced_end(P) == []
    assert rules("off").forced_end(P) == []


def test_reason():
    assert rules("off").reason(T) is StopReason.TRAJ_FUTURE_START
    assert rules("off").reason(EOS) is StopReason.EOS
    assert rules("off").reason(E) is None
