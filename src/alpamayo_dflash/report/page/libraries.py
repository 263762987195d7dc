"""What the page needs beyond the package's own requirements."""

from __future__ import annotations

from importlib.util import find_spec

_NEEDED = {"altair": "altair", "vl_convert": "vl-convert-python", "jinja2": "jinja2"}


def check_libraries() -> None:
    """Raise ValueError for the first library that is missing, with the command that brings it."""
    for module, name in _NEEDED.items():
        if find_spec(module) is None:
            raise ValueError(
                f"{name} is not installed; the page needs it: pip install 'alpamayo-dflash[report]'"
            )
