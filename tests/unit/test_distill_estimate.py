"""What a set will take, as it is printed."""

import re
import shutil

import pytest

from alpamayo_dflash.distill import estimate
from alpamayo_dflash.distill.config import response_bytes
from alpamayo_dflash.distill.estimate import TIMED_WINDOWS, WARM_WINDOWS, Pace, require_disk

SETTINGS = {
    "max_tokens": 128,
    "context_len": 64,
    "taps": [24, 30, 31, 32, 34],
    "hidden_size": 4096,
    "top_k": 128,
    "dtype": "bfloat16",
    "samples_per_clip": 3,
}


@pytest.fixture
def clock(monkeypatch):
    class Clock:
        now = 100.0

        def perf_counter(self):
            return self.now

    clock = Clock()
    monkeypatch.setattr(estimate, "time", clock)
    return clock


def test_disk_is_printed_for_this_rank_for_all_and_for_400_chunks(tmp_path, monkeypatch, capsys):
    free = shutil.disk_usage(tmp_path)._replace(free=10**12)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: free)
    each = response_bytes(
        num_tokens=40, context_len=64, num_taps=5, hidden_size=4096, top_k=128, dtype="bfloat16"
    )
    assert require_disk(tmp_path / "out", SETTINGS, 1000, ranks=4) == 3000 * each
    printed = capsys.readouterr().err
    assert f"disk needed: about {3000 * each / 1e9:.1f} GB for this rank" in printed
    assert f"{12000 * each / 1e9:.1f} GB for all 4; free: 1.0 TB" in printed
    assert f"disk for 400 chunks: about {120_000 * each / 1e9:.1f} GB, at 100 clips a chunk, 3" in printed
    assert "40 tokens a response" in printed
    with pytest.raises(ValueError, match=r"are needed, but only 1\.0 TB are free"):
        require_disk(tmp_path / "out", SETTINGS, 1_000_000, ranks=4)


@pytest.mark.parametrize("ranks", [1, 8])
def test_time_is_measured_once_on_the_windows_after_the_first(clock, capsys, ranks):
    pace = Pace(5000, ranks=ranks)
    for _ in range(WARM_WINDOWS):
        clock.now += 50.0  # compiling
        pace.window_done()
    for _ in range(TIMED_WINDOWS):
        assert pace.windows_per_s is None
        clock.now += 0.25
        pace.window_done()
    assert pace.windows_per_s == pytest.approx(4.0)
    printed = capsys.readouterr().err
    assert "4.00 windows a second, measured on this run's windows 3 to 10" in printed
    assert re.search(r"about 20\.8 min for the 4990 clips that are left", printed)
    hours = 40_000 / 4 / ranks / 3600
    wanted = f"{hours:.1f} h" if hours >= 1 else f"{60 * hours:.1f} min"
    assert f"{wanted} for 400 chunks of 100 clips on " in printed
    clock.now += 99.0
    pace.window_done()
    assert capsys.readouterr().err == ""
    assert pace.windows_per_s == pytest.approx(4.0)
