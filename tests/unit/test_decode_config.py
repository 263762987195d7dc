import subprocess
import sys

import pytest

from alpamayo_dflash.decode.config import DecodeConfig, Sampling


@pytest.mark.parametrize(
    ("temperature", "top_p", "named"),
    [(-0.1, 0.9, "-0.1"), (float("nan"), 0.9, "nan"), (0.6, 0.0, "0.0"), (0.6, 1.1, "1.1")],
)
def test_sampling_refuses(temperature, top_p, named):
    with pytest.raises(ValueError, match=named):
        Sampling(temperature, top_p)


def test_sampling_is_greedy_below_1e_5():
    assert Sampling(0.0).greedy
    assert Sampling(9e-6).greedy
    assert not Sampling(1e-5).greedy


@pytest.mark.parametrize(
    "wrong",
    [
        {"sentence_end": "maybe"},
        {"row_width": 0},
        {"prompt_capacity": 0},
        {"vision_reuse_mib": -1},
        {"vision_reuse_mib": 0.5},
    ],
)
def test_decode_config_refuses(wrong):
    with pytest.raises(ValueError, match=str(next(iter(wrong.values())))):
        DecodeConfig(**wrong)


def test_only_force_is_not_lossless():
    assert DecodeConfig().lossless
    assert DecodeConfig(sentence_end="off").lossless
    assert not DecodeConfig(sentence_end="force").lossless


def test_config_loads_without_torch():
    code = "import sys, alpamayo_dflash.decode.config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
