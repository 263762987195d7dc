"""Kernels run in Triton's interpreter, which `tests/conftest.py` chooses."""

import os

import pytest


@pytest.fixture(autouse=True)
def _interpreted():
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("kernels are interpreted only; tests/gpu runs them compiled")
