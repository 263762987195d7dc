"""Kernels run in Triton's interpreter, which `tests/conftest.py` chooses."""

import functools
import inspect
import os

import pytest


@pytest.fixture(autouse=True)
def _interpreted():
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("kernels are interpreted only; tests/gpu runs them compiled")


@functools.cache
def _builtins(part):
    from triton.language import core

    return [(name, member) for name, member in inspect.getmembers(part) if core.is_builtin(member)]


@pytest.fixture(autouse=True)
def _one_search_for_builtins(monkeypatch, _interpreted):
    """At every launch and call the interpreter looks through Triton's language, a fifth of the time here."""
    interpreter = pytest.importorskip("triton.runtime.interpreter")

    def patch(part, *rest):  # a builder and, of later Tritons, a scope
        for name, member in _builtins(part):
            if getattr(part, name) is member:  # else it is replaced already
                interpreter._patch_attr(part, name, member, *rest)

    monkeypatch.setattr(interpreter, "_patch_builtin", patch)
