"""Packages hidden from an interpreter as if they were not installed.

Run as a program, it runs the command line once for each case of its standard input, a JSON list of
[hidden packages, arguments], each in a fork of its own; it prints a JSON list of [exit status, standard
error].
"""

import contextlib
import importlib
import io
import json
import os
import sys
from importlib.machinery import PathFinder


class _Finder(PathFinder):
    hidden = frozenset()

    @classmethod
    def find_spec(cls, fullname, path=None, target=None):
        if fullname.partition(".")[0] in cls.hidden:
            return None
        return super().find_spec(fullname, path, target)


def hide(names):
    """Hide packages, none of which may have been imported."""
    there = sorted(name for name in names if name in sys.modules)
    assert not there, f"already imported: {there}"
    _Finder.hidden = frozenset(names)
    sys.meta_path = [_Finder if finder is PathFinder else finder for finder in sys.meta_path]


def _in_a_fork(hidden, arguments):
    reading, writing = os.pipe()
    if os.fork() == 0:
        from alpamayo_dflash.cli.main import main

        hide(hidden)
        said = io.StringIO()
        with contextlib.redirect_stderr(said):
            status = main(arguments)
        os.write(writing, json.dumps([status, said.getvalue()]).encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading, encoding="utf-8") as answer:
        text = answer.read()
    os.wait()
    return json.loads(text)


if __name__ == "__main__":
    for module in sys.argv[1:]:  # once, for all forks
        importlib.import_module(module)
    print(json.dumps([_in_a_fork(*case) for case in json.loads(sys.stdin.read())]))
