"""Fuzzing: inputs made from sound artefacts, what each call of a reader may end in, and the counts of both.

`ALPAMAYO_FUZZ=large` takes many more inputs, `ALPAMAYO_FUZZ_SEED` others; see `tests/faults/conftest.py`.
"""

from __future__ import annotations

import collections
import contextlib
import copy
import faulthandler
import json
import os
import resource
import signal
import sys
from pathlib import Path

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

LARGE = os.environ.get("ALPAMAYO_FUZZ") == "large"
SEED = int(os.environ.get("ALPAMAYO_FUZZ_SEED", "0"))
TIMES = 20 if LARGE else 2 / 3
SECONDS, GROWTH_BYTES = 20, 2**30
"""The most that one input may take of time, and of address space beyond what the process has."""

TRAP = "fuzzing_trap"
"""A module that no reader may import; configs name it."""

COUNTS: dict[str, collections.Counter] = collections.defaultdict(collections.Counter)


def fuzzed(inputs):
    """A test of so many inputs times `TIMES`, drawn by hypothesis."""

    def wrap(test):
        profile = settings(
            max_examples=max(1, round(inputs * TIMES)),
            deadline=None,  # `bounded` is the bound: hypothesis' own would count the first call's imports
            database=None,
            suppress_health_check=list(HealthCheck),
            phases=(Phase.generate, Phase.shrink) if not LARGE else (Phase.generate,),
            print_blob=False,
        )
        return seed(SEED)(profile(test))

    return wrap


class HangError(BaseException):
    """An input took longer than `SECONDS`."""


@contextlib.contextmanager
def bounded():
    """Bound the time and the memory of what runs inside."""

    def late(*_):
        raise HangError(f"longer than {SECONDS} s")

    before = signal.signal(signal.SIGALRM, late)
    limits = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + GROWTH_BYTES, limits[1]))
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    faulthandler.dump_traceback_later(5 * SECONDS, exit=True)  # a hang inside a library hears no signal
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()
        signal.setitimer(signal.ITIMER_REAL, 0)
        resource.setrlimit(resource.RLIMIT_AS, limits)
        signal.signal(signal.SIGALRM, before)


def tried(reader, name, read):
    """Call a reader on one input: a result, or a ValueError that says `name`, the file or what holds it.

    Every other exception is a fault, and so are a message without end, and an import of what a file names.
    """
    COUNTS[reader]["inputs"] += 1
    with bounded():
        try:
            read()
        except ValueError as error:
            said = str(error)
            assert str(name) in said, f"the message does not say {name}: {type(error).__name__}: {said[:300]}"
            assert len(said) < 400_000
            COUNTS[reader]["refused"] += 1
        else:
            COUNTS[reader]["read"] += 1
    assert TRAP not in sys.modules


def fuzz_file(reader, inputs, read, made, *, file, folder):
    """Read a file as it is, then as what `made(its bytes)` draws, then as it was again.

    Args:
        reader: its name in the counts.
        inputs: how many.
        read: reads the file.
        made: a strategy of bytes, made from the sound ones.
        file: what is replaced.
        folder: what every refusal must name: the file's folder, or the whole artefact's.
    """
    sound = file.read_bytes()
    read()

    @fuzzed(inputs)
    @given(made(sound))
    def each(data):
        file.write_bytes(data)
        tried(reader, folder, read)

    each()
    file.write_bytes(sound)
    read()


# What may stand in the place of any value.
VALUES = (
    *(None, True, False, 0, 1, -1, 7, 2**31, -(2**31) - 1, 2**62, 2**63, 10**400, -(10**400)),
    *(0.5, -0.0, -1.5, 1e-300, 1e300, 1e308),
    *("", "text", ".", "..", "../x", "/etc/passwd", "a/b", "a\\b", "a\0b", "a\nb", "x" * 300, "x" * 70_000),
    *("\ud800", "é", "0", "-1", "9" * 5000, "inf", f"{TRAP}.Class", f"{TRAP}--{TRAP}.Class"),
    *([], [[]], [1, "a", None], [0] * 2000, ["a", "a"], [None], [{}], [1.5], [-1], [2**70]),
    *({}, {"a": 1}, {"": {}}, {"_target_": f"{TRAP}.Class"}, {"AutoModel": f"{TRAP}.Class"}),
)
# Keys by which configs name code.
KEYS = ("auto_map", "trust_remote_code", "_target_", "custom_pipelines", "architectures", "", "a", "x" * 300)
# What stands in the place of a value as text, for it is no JSON, or JSON that asks for too much.
TEXTS = (
    *("NaN", "Infinity", "-Infinity", "1e999", "9" * 5000, "-" + "9" * 5000, "nul", "", "'a'", "0x1", "01"),
    *("[" * 100_000, "[" * 100_000 + "]" * 100_000, '{"a":' * 50_000 + "1" + "}" * 50_000),
    *("[" * 63 + "]" * 63, '"\\ud800"', '"\\udc00\\ud800"', '{"a": 1, "a": 2}', '"\x00"', "[1,]", "/* */ 1"),
    *("1" + "0" * 400, "-0", "1E400", '"' + "\\u0000" * 9 + '"'),
)
_MARK = "\x01here\x01"


def places(value, path=()):
    """Every place in a JSON value, as a path of keys and indices."""
    yield path
    if isinstance(value, dict):
        for key in value:
            yield from places(value[key], (*path, key))
    elif isinstance(value, list):
        for index in range(len(value)):
            yield from places(value[index], (*path, index))


def inside(value, path):
    """The value at a place."""
    for key in path:
        value = value[key]
    return value


def with_change(raw, path, change):
    """A copy in which the box that holds a place, and the key there, went through `change`."""
    copied = copy.copy(raw)
    if len(path) > 1:
        copied[path[0]] = with_change(raw[path[0]], path[1:], change)
    else:
        change(copied, path[0])
    return copied


def with_value(raw, path, value):
    """A copy with another value at a place."""
    return with_change(raw, path, lambda box, key: box.__setitem__(key, value)) if path else value


@st.composite
def changed_values(draw, raw):
    """A JSON value, changed in one to three places."""
    for _ in range(draw(st.sampled_from((1, 1, 2, 3)))):
        every = list(places(raw))
        path = every[draw(st.integers(0, len(every) - 1))]
        match draw(st.sampled_from(("replace", "replace", "replace", "drop", "add", "move", "number"))):
            case "replace":
                raw = with_value(raw, path, draw(st.sampled_from(VALUES)))
            case "drop" if path:
                raw = with_change(raw, path, lambda box, key: box.__delitem__(key))
            case "add" if isinstance(inside(raw, path), dict):
                added = {draw(st.sampled_from(KEYS)): draw(st.sampled_from(VALUES))}
                raw = with_value(raw, path, inside(raw, path) | added)
            case "move":
                raw = with_value(raw, path, inside(raw, every[draw(st.integers(0, len(every) - 1))]))
            case _:
                raw = with_value(raw, path, draw(st.integers(-10, 10) | st.integers() | st.floats()))
    return raw


def encoded(value):
    """JSON, whatever the value holds."""
    return json.dumps(value).encode()


@st.composite
def json_files(draw, raw):
    """The bytes of a file that was the JSON value `raw`."""
    kind = draw(st.sampled_from(("value",) * 8 + ("text", "text", "bytes", "bytes", "any")))
    if kind == "text":
        path = draw(st.sampled_from(list(places(raw))))
        text = encoded(with_value(raw, path, _MARK)).replace(encoded(_MARK), b"@@")
        return text.replace(b"@@", draw(st.sampled_from(TEXTS)).encode("utf-8", "surrogatepass"))
    if kind == "bytes":
        return draw(damaged(encoded(raw)))
    if kind == "any":
        leaf = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
        return encoded(
            draw(st.recursive(leaf, lambda s: st.lists(s) | st.dictionaries(st.text(), s), max_leaves=9))
        )
    return encoded(draw(changed_values(raw)))


@st.composite
def damaged(draw, data):
    """Bytes that were `data`: cut, flipped, filled, doubled, or others altogether."""
    place = draw(st.integers(0, max(len(data) - 1, 0)))
    match draw(st.sampled_from(("cut", "flip", "flip", "zeros", "drop", "head", "twice", "others", "swap"))):
        case "cut":
            return data[:place]
        case "flip":
            changed = bytearray(data)
            for _ in range(draw(st.integers(1, 8))):
                if changed:
                    changed[draw(st.integers(0, len(changed) - 1))] ^= draw(st.integers(1, 255))
            return bytes(changed)
        case "zeros":
            count = draw(st.integers(1, 4096))
            return data[:place] + bytes(min(count, len(data) - place)) + data[place + count :]
        case "drop":
            return data[:place] + data[place + draw(st.integers(1, 64)) :]
        case "head":
            heads = (
                b"\xef\xbb\xbf",
                b"\xff\xfe",
                b"PK\x03\x04",
                b"\x80\x04K\x01.",
                b"\x89PNG",
                b"\0" * 8,
                b" ",
            )
            return draw(st.sampled_from(heads)) + data
        case "twice":
            return data + data
        case "swap":
            return data[place:] + data[:place]
        case _:
            return draw(st.binary(max_size=200))
