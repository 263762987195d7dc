"""One thread a test process: the models are tiny, and the suite runs in several processes."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

# Triton reads this once, when it is first imported, and any test module's imports may do that.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)
