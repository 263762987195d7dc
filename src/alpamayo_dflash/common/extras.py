"""Packages that only a part of the work needs: which extra of this package brings each, and who lacks one.

Decoding a window needs none of them. An import of one stands in `with needs(EXTRA):`, so that where it is
missing the command that brings it is named, at the moment when it is needed. What is looked for is the one
package that is imported, not all of its extra: a machine may have a part of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec

EXTRAS = {
    "clips": ("physical_ai_av", "av", "pandas", "pyarrow", "scipy", "PIL"),
    "train": ("tensorboard", "pyarrow"),
    "report": ("altair", "vl_convert", "jinja2", "tensorboard"),
}
"""By extra, the modules that it brings."""

DISTRIBUTIONS = {"PIL": "pillow", "vl_convert": "vl-convert-python"}
"""What a module is called in the package index, where that is not its own name."""

_PURPOSES = {
    "clips": "clips, real and synthetic, are read and written with it",
    "train": "training needs it",
    "report": "the page of a run needs it",
}


class MissingPackageError(ModuleNotFoundError):
    """A package of an extra is not installed; the message names the command that brings it."""


@contextmanager
def needs(extra: str) -> Iterator[None]:
    """Around imports of an extra's packages.

    Raises:
        MissingPackageError: one of them is not there. Any other failure of an import goes on as it is.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        module = (error.name or "").partition(".")[0]
        if module not in EXTRAS[extra] or isinstance(error, MissingPackageError):
            raise
        raise _missing(module, extra) from error


def check_extra(extra: str) -> None:
    """Before long work that needs a whole extra in the end.

    Raises:
        MissingPackageError: one of its packages is not there.
    """
    for module in EXTRAS[extra]:
        if find_spec(module) is None:
            raise _missing(module, extra)


def _missing(module: str, extra: str) -> MissingPackageError:
    package = DISTRIBUTIONS.get(module, module)
    command = f"pip install 'alpamayo-dflash[{extra}]'"
    return MissingPackageError(f"{package} is not installed; {_PURPOSES[extra]}: {command}", name=module)
