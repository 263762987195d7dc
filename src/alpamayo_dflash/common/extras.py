"""Packages that only a part of the work needs: which extra of this package brings each, and who lacks one.

Decoding a window needs none of them. An import of one stands in `with needs(EXTRA):`, so that where it is
missing the command that brings it is named, at the moment when it is needed. What is looked for is the one
package that is imported, not all of its extra: a machine may have a part of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
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


class MissingPackageError(ModuleNotFoundError):
    """Packages of an extra are not installed; the message names them, and the command that brings them.

    Attributes:
        name: the first of them, as a module.
    """


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
        raise _missing([module], [extra]) from error


def check_extras(*extras: str) -> None:
    """Before work that needs whole extras, sooner or later.

    Raises:
        MissingPackageError: some of their packages are not there.
    """
    missing = dict.fromkeys(
        module for extra in extras for module in EXTRAS[extra] if find_spec(module) is None
    )
    if missing:
        raise _missing(list(missing), [extra for extra in extras if missing.keys() & set(EXTRAS[extra])])


def _missing(modules: Sequence[str], extras: Sequence[str]) -> MissingPackageError:
    names = ", ".join(DISTRIBUTIONS.get(module, module) for module in modules)
    command = f"pip install 'alpamayo-dflash[{','.join(extras)}]'"
    verb = "is" if len(modules) == 1 else "are"
    return MissingPackageError(f"{names} {verb} not installed; to install: {command}", name=modules[0])
