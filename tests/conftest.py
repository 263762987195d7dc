"""One thread a test process: the models are tiny, and the suite runs in several processes."""

import atexit
import gc
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest

# The files that take longest, in seconds of a CPU from some 120 down to 15.
LONGEST = (
    *("test_lossless.py", "test_audit.py", "test_kills.py", "test_expert_kernels.py", "test_docs.py"),
    *("test_cli.py", "test_fast_forms.py", "test_frozen_texts.py", "test_train.py", "test_results.py"),
    *("test_study.py", "test_bench_runs.py", "test_prompt_pass.py", "test_step_kernels.py"),
    *("test_baselines.py", "test_heads.py", "test_train_decode.py", "test_identity.py", "test_near_ties.py"),
    *("test_fp8_decode.py", "test_choose_kernels.py", "test_fuzz_json.py", "test_image_kernels.py"),
    *(
        "test_tiny.py",
        "test_fuzz_clips.py",
        "test_bench_formats.py",
        "test_wheel.py",
        "test_layers_distill.py",
    ),
)


def pytest_configure(config):
    """xdist hands files out in the order of collection, not by how many tests they hold."""
    config.option.loadscopereorder = False


def pytest_collection_modifyitems(items):
    """The longest files first: the last to start are short, and no process waits long for another's end."""
    rank = {name: at for at, name in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(item.path.name, len(rank)))


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
