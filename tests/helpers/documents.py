"""The code blocks and the commands of a Markdown document."""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_COMMAND = re.compile(r"(alpamayo-dflash|torchrun) ")
_OF_A_SHELL = set("|&;<>$`")


@dataclass(frozen=True)
class Block:
    """What stands between two fences, or one command in a line of text.

    Attributes:
        document: the file's name.
        line: where it stands, from 1.
        section: the heading above it.
        kind: the word after the fence; "inline" for a command in a line of text.
        text: its lines.
    """

    document: str
    line: int
    section: str
    kind: str
    text: str

    @property
    def place(self) -> str:
        return f"{self.document}:{self.line}"


def blocks(path: Path) -> Iterator[Block]:
    """A document's blocks in order; an indented one, whose kind nothing tells, is a ValueError."""
    section, kind, start = "", None, 0
    inside: list[str] = []
    before = ""
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        if line.startswith("```") and kind is None:
            kind, start, inside = line.removeprefix("```").strip(), number, []
        elif line.startswith("```"):
            yield Block(path.name, start, section, str(kind), "\n".join(inside))
            kind = None
        elif kind is not None:
            inside.append(line)
        else:
            if line.startswith(("    ", "\t")) and not before.strip():
                raise ValueError(f"{path.name}:{number}: an indented block; fence it, with its kind")
            if line.startswith("#"):
                section = line.lstrip("#").strip()
            for text in re.findall(r"`([^`]+)`", line):
                if _COMMAND.match(text):
                    yield Block(path.name, number, section, "inline", text)
        before = line
    if kind is not None:
        raise ValueError(f"{path.name}:{start}: a block without an end")


def commands(text: str) -> list[list[str]]:
    """The words of each command of a bash block; what only a shell can do is a ValueError."""
    lines = text.replace("\\\n", " ").splitlines()
    found = [words for line in lines if (words := shlex.split(line, comments=True))]
    for words in found:
        if strange := sorted(_OF_A_SHELL & set("".join(words))):
            raise ValueError(f"{shlex.join(words)}: {' '.join(strange)} needs a shell")
        if re.fullmatch(r"[A-Z_]+=.*", words[0]):
            raise ValueError(f"{shlex.join(words)}: begins with a variable, which nothing here sets")
    return found
