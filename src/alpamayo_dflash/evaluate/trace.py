"""`--verbose`: each round's block on the console, readable with and without colour."""

from __future__ import annotations

from collections.abc import Callable

from rich.console import Console
from rich.text import Text
from tokenizers import Tokenizer

from alpamayo_dflash.decode.observer import Observer, RoundTrace, SampleTrace

LEGEND = Text.assemble(
    "each pass: ", ("+accepted", "green"), " ", ("-rejected", "red"), " ", ("=the target's own", "bold cyan")
)


def piece_of(tokenizer: Tokenizer) -> Callable[[int], str]:
    """How a token id is shown: its text, with blanks and line ends made visible."""

    def piece(token: int) -> str:
        text: str = tokenizer.decode([token], skip_special_tokens=False)
        return text.replace(" ", "␣").replace("\n", "↵")

    return piece


def round_line(sample: SampleTrace, index: int, piece: Callable[[int], str]) -> Text:
    """One sample's part of a round in one line.

    Accepted tokens carry a plus sign and are green, rejected ones a minus sign and are red, and what the
    target wrote itself an equals sign and is cyan.
    """
    line = Text(f"pass {index:>2} sample {sample.sample} ", style="dim")
    line.append(piece(sample.anchor), style="default")
    line.append(" |", style="dim")
    marked = [
        *(("+", sample.proposed[node], "green") for node in sample.taken),
        *(("-", token, "red") for node, token in enumerate(sample.proposed) if node not in sample.taken),
        *(("=", token, "bold cyan") for token in sample.emitted[sample.accepted :]),
    ]
    for sign, token, style in marked:
        line.append(f" {sign}{piece(token)}", style=style)
    return line


class RoundPrinter(Observer):
    """Prints every round as it ends.

    Args:
        console: where to.
        piece: a token's text.
    """

    def __init__(self, console: Console, piece: Callable[[int], str]) -> None:
        self._console = console
        self._piece = piece

    def on_prefill(self, prompt_tokens: int, first_tokens: tuple[int, ...]) -> None:
        """Print the first tokens, which the prompt's own pass gives."""
        shown = " ".join(f"={self._piece(token)}" for token in first_tokens)
        self._print(Text(f"prompt of {prompt_tokens} tokens, first: {shown}", style="bold cyan"))

    def on_round(self, trace: RoundTrace) -> None:
        """Print one line a sample."""
        for sample in trace.samples:
            self._print(round_line(sample, trace.index, self._piece))

    def _print(self, line: Text) -> None:
        self._console.print(line, soft_wrap=True)
