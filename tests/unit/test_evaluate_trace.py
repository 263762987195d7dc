"""The verbose trace: marked by signs as well as by colours."""

from __future__ import annotations

import io

from rich.console import Console

from alpamayo_dflash.decode.observer import RoundTrace
from alpamayo_dflash.evaluate.trace import RoundPrinter, round_line
from tests.helpers.traces import chain_trace

WORDS = ["Keep", "␣lane", "␣now", ".", "<end>"]


def test_marks_without_colour() -> None:
    sample = chain_trace(0, proposed=(1, 2, 3), accepted=1, emitted=(1, 4))
    line = round_line(sample, 7, WORDS.__getitem__)
    assert line.plain == "pass  7 sample 0 Keep | +␣lane -␣now -. =<end>"
    styles = {line.plain[span.start : span.end].strip(): span.style for span in line.spans}
    assert (styles["+␣lane"], styles["-␣now"], styles["=<end>"]) == ("green", "red", "bold cyan")


def test_a_round_that_ended_inside_the_block_shows_no_target_token() -> None:
    sample = chain_trace(0, proposed=(1, 4), accepted=2, emitted=(1, 4))
    assert "=" not in round_line(sample, 0, WORDS.__getitem__).plain


def test_printer_prints_one_line_a_sample() -> None:
    stream = io.StringIO()
    printer = RoundPrinter(Console(file=stream, width=20), WORDS.__getitem__)
    printer.on_prefill(100, (0, 0))
    one = chain_trace(0, proposed=(1,), accepted=1, emitted=(1, 2))
    two = chain_trace(1, proposed=(1,), accepted=0, emitted=(3,))
    printer.on_round(RoundTrace(index=0, rows=4, samples=(one, two)))
    lines = stream.getvalue().splitlines()
    assert len(lines) == 3  # long lines are not broken
    assert lines[0] == "prompt of 100 tokens, first: =Keep =Keep"
    assert lines[2].endswith("-␣lane =.")
