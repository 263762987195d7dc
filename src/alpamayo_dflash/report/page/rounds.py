"""A traced round as the tree that a page draws, with what target and draft thought of its tokens."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

from alpamayo_dflash.report.clip_trace import ClipTrace, Places, Round, probability
from alpamayo_dflash.report.page.islands import visible

TARGET = "target"

Alternative = tuple[str, float, float]
"""A token's text, its probability in what the decode draws from, and at temperature 1 without a cut."""


@dataclass
class Node:
    """A token in the tree of a round, or a text's first token.

    Attributes:
        piece: its text.
        source: who proposed it; "target" for the target's own, and for the anchor what it came from.
        state: "anchor", "accepted", "rejected" or "own", the target's own.
        x: how many tokens after the anchor.
        y: the lane that it is drawn in; 0 is the topmost.
        parent: index of the node before it; −1 for the anchor.
        place: of the round's target places the one that it was chosen, or not chosen, at.
        p: the probability that the target gave it there, in what the decode draws from; None where that is
            not known: it is not among the likeliest eight, and was not chosen.
        p1: the same at temperature 1, uncut.
        rank: how many tokens the target thought likelier.
        draft_place: of the round's draft places the one for this token; None where the draft says nothing.
        q: the draft's probability; None as for `p`.
        draft_rank: how many tokens the draft thought likelier.
    """

    piece: str
    source: str
    state: str
    x: int = 0
    y: int = 0
    parent: int = -1
    place: int | None = None
    p: float | None = None
    p1: float | None = None
    rank: int | None = None
    draft_place: int | None = None
    q: float | None = None
    draft_rank: int | None = None

    def shown(self) -> dict[str, Any]:
        """As the page's JSON; what is None is left out."""
        return {name: value for name, value in vars(self).items() if value is not None}


class RoundView(TypedDict):
    """A round of one sample.

    Attributes:
        index: the pass's number; samples may share one.
        position: of the anchor among the text's tokens.
        nodes: the anchor, then what was proposed in that order, then the target's own.
        emitted: the nodes that the text goes on with.
        target: the alternatives at each of the target's places.
        draft: the same of the draft.
    """

    index: int
    position: int
    nodes: list[dict[str, Any]]
    emitted: list[int]
    target: list[list[Alternative]]
    draft: list[list[Alternative]]


def _short(number: float) -> float:
    """Four digits: what a reader sees of a probability, and no more of the file."""
    return float(f"{number:.4g}")


def _odds(trace: ClipTrace, places: Places, index: int, logit: float) -> tuple[float, float]:
    """A token's probability in what the decode draws from, and at temperature 1."""
    drawn = probability(places, index, logit, trace["temperature"])
    plain = math.exp(min(0.0, logit - places["log_sum_exp"][index]))
    return _short(drawn), _short(plain)


def _piece(trace: ClipTrace, token: int) -> str:
    return visible(trace["pieces"][str(token)])


def alternatives(trace: ClipTrace, places: Places) -> list[list[Alternative]]:
    """The likeliest tokens at each place."""
    found = []
    for index, (ids, logits) in enumerate(zip(places["ids"], places["logits"], strict=True)):
        pairs = zip(ids, logits, strict=True)
        found.append([(_piece(trace, one), *_odds(trace, places, index, logit)) for one, logit in pairs])
    return found


@dataclass(frozen=True)
class _Thought:
    """What a model thought of a token at a place; Nones where it is not known."""

    p: float | None = None
    p1: float | None = None
    rank: int | None = None


def _thought(trace: ClipTrace, places: Places, index: int, token: int) -> _Thought:
    """Of a token that was chosen there, or is among the likeliest."""
    logit, rank = None, None
    if places["chosen"][index] == token:
        logit, rank = places["chosen_logit"][index], places["chosen_rank"][index]
    elif token in places["ids"][index]:
        rank = places["ids"][index].index(token)
        logit = places["logits"][index][rank]
    if logit is None:
        return _Thought()
    return _Thought(*_odds(trace, places, index, logit), rank)


def first_node(trace: ClipTrace, sample: int) -> dict[str, Any]:
    """A text's first token, which the prompt's own pass gives."""
    token = trace["first_tokens"][sample]
    node = Node(_piece(trace, token), TARGET, "own", place=0)
    thought = _thought(trace, trace["first"], sample, token)
    node.p, node.p1, node.rank = thought.p, thought.p1, thought.rank
    return node.shown()


def round_views(trace: ClipTrace, sample: int) -> Iterator[RoundView]:
    """The rounds of a text, in order."""
    source = TARGET
    for each in trace["rounds"][sample]:
        nodes, emitted = _nodes(trace, each, source)
        if emitted:
            source = nodes[emitted[-1]].source
        yield {
            "index": each["index"],
            "position": each["position"],
            "nodes": [node.shown() for node in nodes],
            "emitted": emitted,
            "target": alternatives(trace, each["target"]),
            "draft": alternatives(trace, each["draft"]),
        }


def _nodes(trace: ClipTrace, each: Round, anchor_source: str) -> tuple[list[Node], list[int]]:
    """The tree of a round, and which of its nodes were emitted."""
    nodes = [Node(_piece(trace, each["anchor"]), anchor_source, "anchor")]
    taken = set(each["taken"])
    for node, (token, parent) in enumerate(zip(each["proposed"], each["parents"], strict=True)):
        state = "accepted" if node in taken else "rejected"
        child = Node(_piece(trace, token), visible(each["sources"][node]), state, parent=parent + 1)
        nodes.append(_judged(trace, each, child, token, nodes[parent + 1].x + 1, parent + 1))
    emitted = [node + 1 for node in each["taken"]]
    for k in range(len(emitted), len(each["emitted"])):
        token, parent = each["emitted"][k], emitted[-1] if emitted else 0
        child = Node(_piece(trace, token), visible(each["origins"][k]), "own", parent=parent)
        emitted.append(len(nodes))
        nodes.append(_judged(trace, each, child, token, nodes[parent].x + 1, each["at"][k]))
    for one, lane in zip(nodes, lanes([one.parent for one in nodes], emitted), strict=True):
        one.y = lane
    return nodes, emitted


def _judged(trace: ClipTrace, each: Round, node: Node, token: int, x: int, place: int) -> Node:  # noqa: PLR0917
    """The node with its place, and with what target and draft thought of it there."""
    node.x, node.place = x, place
    thought = _thought(trace, each["target"], place, token)
    node.p, node.p1, node.rank = thought.p, thought.p1, thought.rank
    if x <= len(each["draft"]["ids"]):
        drafted = _thought(trace, each["draft"], x - 1, token)
        node.draft_place, node.q, node.draft_rank = x - 1, drafted.p, drafted.rank
    return node


def lanes(parents: Sequence[int], path: Collection[int]) -> list[int]:
    """A tree's lanes: the path stays in one, and so does a first child; every other child begins a new one.

    Args:
        parents: of each node, a node before it; −1 for the first one alone.
        path: nodes that are taken before the others after the same parent.
    """
    children: list[list[int]] = [[] for _ in parents]
    for node, parent in enumerate(parents[1:], 1):
        children[parent].append(node)
    found, used, waiting = [0] * len(parents), 0, [(0, True)]
    while waiting:
        node, goes_on = waiting.pop()
        if not goes_on:
            used += 1
        found[node] = found[parents[node]] if goes_on and node else used
        ordered = sorted(children[node], key=lambda child: child not in path)
        waiting += [(child, child == ordered[0]) for child in reversed(ordered)]
    return found
