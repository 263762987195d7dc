"""Calls to the hub end, whatever the other side does."""

import threading
import time

import pytest

from alpamayo_dflash.common.hub import STALL_VARIABLE, ended


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setenv(STALL_VARIABLE, "0.2")


def test_an_answer_or_an_error_is_passed_on(tmp_path):
    assert ended(lambda: 5, "a number", tmp_path) == 5
    with pytest.raises(KeyError, match="none"):
        ended(lambda: {}["none"], "a number", tmp_path)


def test_a_call_that_brings_nothing_is_given_up(tmp_path):
    stop = threading.Event()
    with pytest.raises(TimeoutError, match=r"chunk 3: nothing came from the hub for 0\.2 s"):
        ended(lambda: stop.wait(60), "chunk 3", tmp_path)
    stop.set()


def test_a_slow_call_that_brings_bytes_goes_on(tmp_path):
    blob = tmp_path / "blobs" / "a.incomplete"
    blob.parent.mkdir()

    def slow():
        for _ in range(12):  # far beyond the limit
            with blob.open("ab") as stream:
                stream.write(b"x")
            time.sleep(0.05)
        return blob.stat().st_size

    assert ended(slow, "chunk 3", tmp_path) == 12


@pytest.mark.parametrize("text", ["0", "-1", "nan", "inf", "soon"])
def test_a_limit_that_is_none_is_named(monkeypatch, tmp_path, text):
    monkeypatch.setenv(STALL_VARIABLE, text)
    with pytest.raises(ValueError, match=f"{STALL_VARIABLE} is '{text}'"):
        ended(lambda: 5, "a number", tmp_path)
