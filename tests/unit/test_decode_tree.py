import random

import numpy as np
import pytest

from alpamayo_dflash.decode.cache import ROOT, Tail
from alpamayo_dflash.decode.tree import Tree, walk


def test_a_slot_sees_its_ancestors_and_itself():
    tail = Tail(8)
    a = tail.add(10)
    b = tail.add(11, a)
    c = tail.add(12, a)
    d = tail.add(13, c)
    assert [tail.positions[s] for s in (a, b, c, d)] == [0, 1, 1, 2]
    seen = tail.visible([a, b, c, d], 4)
    assert seen.tolist() == [
        [True, False, False, False],
        [True, True, False, False],
        [True, False, True, False],
        [True, False, True, True],
    ]


def test_freed_slots_are_used_again_and_see_nothing_of_their_past():
    tail = Tail(6)
    path = [tail.add(0)]
    for token in range(1, 4):
        path.append(tail.add(token, path[-1]))
    tail.keep(path[:2])
    assert tail.high_water == 2
    other = tail.add(9)
    assert other == 2
    assert tail.visible([other], 6).tolist() == [[False, False, True, False, False, False]]


def test_random_use_agrees_with_parent_pointers():
    rng = random.Random(0)
    tail = Tail(40)
    parent: dict[int, int] = {}
    for _ in range(200):
        if len(parent) == 40 or (parent and rng.random() < 0.2):
            leaf = rng.choice(list(parent))
            kept = set()
            while leaf != ROOT:
                kept.add(leaf)
                leaf = parent[leaf]
            tail.keep(kept)
            parent = {s: p for s, p in parent.items() if s in kept}
        above = rng.choice([ROOT, *parent])
        slot = tail.add(0, above)
        assert slot not in parent
        parent[slot] = above
        assert tail.high_water == max(parent) + 1
    for slot in parent:
        expected = np.zeros(40, dtype=bool)
        walker = slot
        while walker != ROOT:
            expected[walker] = True
            walker = parent[walker]
        assert (tail.visible([slot], 40)[0] == expected).all()


def test_a_full_tail_says_so():
    tail = Tail(1)
    tail.add(0)
    with pytest.raises(ValueError, match="1 slots"):
        tail.add(0)


def test_equal_tokens_share_a_row():
    tree = Tree(Tail(20))
    anchor = tree.add(7, ROOT)
    one = tree.add_chain([1, 2, 3], anchor)
    two = tree.add_chain([1, 2, 4], anchor)
    assert one[:2] == two[:2] and one[2] != two[2]
    assert tree.slots == [anchor, *one, two[2]]
    assert tree.child(one[1], 4) == two[2]
    assert tree.child(one[0], 4) is None


def chooser(table, log):
    """A target that says table[sample, slot], and notes how it was asked."""

    def choose(pairs):
        log.append(list(pairs))
        return [table[pair] for pair in pairs]

    return choose


def test_walk_accepts_the_longest_prefix_and_the_targets_own_token():
    tree = Tree(Tail(20))
    anchor = tree.add(7, ROOT)
    chain = tree.add_chain([1, 2, 3], anchor)
    table = dict(zip([(0, s) for s in [anchor, *chain]], [1, 2, 9, 8], strict=True))
    log = []
    got = walk(tree, {0: [anchor, *chain]}, chooser(table, log), {0: 99}, lambda t: False)[0]
    assert got.path == [anchor, chain[0], chain[1]]
    assert got.tokens == [1, 2, 9]
    assert len(log) == 1


def test_walk_stops_behind_a_stop_token_and_keeps_its_row():
    tree = Tree(Tail(20))
    anchor = tree.add(7, ROOT)
    chain = tree.add_chain([1, 5, 3], anchor)
    table = dict(zip([(0, s) for s in [anchor, *chain]], [1, 5, 3, 8], strict=True))
    got = walk(tree, {0: [anchor, *chain]}, chooser(table, []), {0: 99}, lambda t: t == 5)[0]
    assert got.tokens == [1, 5]
    assert got.path == [anchor, chain[0], chain[1]]


def test_walk_respects_room():
    tree = Tree(Tail(20))
    anchor = tree.add(7, ROOT)
    chain = tree.add_chain([1, 2, 3], anchor)
    table = dict(zip([(0, s) for s in [anchor, *chain]], [1, 2, 3, 8], strict=True))
    for room in (1, 2, 3, 4):
        got = walk(tree, {0: [anchor, *chain]}, chooser(table, []), {0: room}, lambda t: False)[0]
        assert got.tokens == [1, 2, 3, 8][:room]


def test_a_sample_goes_on_along_anothers_proposal():
    tree = Tree(Tail(20))
    anchor = tree.add(7, ROOT)
    own = tree.add_chain([1, 2], anchor)
    other = tree.add_chain([4, 5, 6], anchor)
    table = {(0, s): 0 for s in [anchor, *own]} | {(1, s): 0 for s in [anchor, *other]}
    table |= {(0, anchor): 4, (0, other[0]): 5, (0, other[1]): 8}
    log = []
    got = walk(
        tree, {0: [anchor, *own], 1: [anchor, *other]}, chooser(table, log), {0: 99, 1: 99}, lambda t: False
    )
    assert got[0].tokens == [4, 5, 8]
    assert got[0].path == [anchor, other[0], other[1]]
    assert got[1].tokens == [0]
    assert log[1:] == [[(0, other[0])], [(0, other[1])]]
