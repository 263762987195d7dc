import pytest

from alpamayo_dflash.train.accept import Walk
from alpamayo_dflash.train.real import Difference, differences

TEXT = tuple(range(10, 19))  # places 0 to 8


def walk(*anchors, clip="a", text=TEXT):
    return Walk(clip, text, anchors)


@pytest.mark.parametrize(
    ("other", "expected"),
    [
        (walk(0, 4), None),
        (walk(0, 3, 6), (3, "accepted")),  # the first pass took token 3 here, and there the target chose it
        (walk(0, 5), (4, "accepted")),
        (walk(0, 4, 6), (6, "accepted")),
        (walk(0), (4, "accepted")),
        (walk(0, 4, text=(*TEXT[:6], 99, 17, 18)), (6, "text")),
        (walk(0, 4, text=TEXT[:7]), (7, "text")),
        (walk(0, 2, 4, text=(*TEXT[:6], 99)), (2, "accepted")),
        (walk(0, 3, text=(*TEXT[:3], 99)), (3, "text")),
    ],
)
def test_the_first_place_where_two_walks_part(other, expected):
    found = differences([walk(0, 4)], [other])
    assert found == ([] if expected is None else [Difference("a", *expected)])
    assert differences([other], [walk(0, 4)]) == found


def test_each_clip_has_its_first_difference():
    mine = [walk(0, 4, clip=name) for name in "abc"]
    real = [walk(0, 4, clip="a"), walk(0, 2, 4, clip="b"), walk(0, 8, clip="c")]
    assert differences(mine, real) == [Difference("b", 2, "accepted"), Difference("c", 4, "accepted")]
