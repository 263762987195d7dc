"""One thread a test process: the models are tiny, and the suite runs in several processes."""

import atexit
import gc
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest


def pytest_collectstart():
    """Triton reads this once, when it is first imported, and any test module's imports may do that.

    Torch is imported here, because the process that only hands tests to others collects nothing.
    """
    import torch

    if not torch.cuda.is_available():
        os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_collection_finish():
    """What the imports made stays: a full collection that walks over it takes longer than most tests."""
    gc.freeze()
    atexit.register(gc.unfreeze)  # extensions report as leaks what is still there at the end


@pytest.fixture(autouse=True)
def _one_thread():
    import torch

    torch.set_num_threads(1)
