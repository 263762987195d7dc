"""The benchmark of distillation: its figures, and one small run beside this revision's own `distill`."""

import re
import sys
from pathlib import Path

import pytest

import alpamayo_dflash
from alpamayo_dflash.bench import distill, distill_before
from alpamayo_dflash.bench.config import BenchDistillConfig
from alpamayo_dflash.bench.figures import distill_figures
from alpamayo_dflash.clips.source import ClipSource
from alpamayo_dflash.common.artefacts import read_json
from alpamayo_dflash.world.config import WorldConfig
from alpamayo_dflash.world.run import run as write_world

SOURCE = Path(alpamayo_dflash.__file__).parents[1]
SMALL = {"target": "random:small", "device": "cpu", "windows": 4, "height": 64, "width": 96}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"windows": 6}, "windows is 6; it must be a multiple of 4"),
        ({"windows": 0}, "windows is 0"),
        ({"height": 31}, "height is 31; a video's must be even, and 32 or more"),
        ({"width": 1921}, "width is 1921; a video's must be even"),
        ({"tokens": 1}, "tokens is 1"),
        ({"samples_per_clip": 1}, "samples_per_clip is 1"),
        ({"num_workers": 0}, "num_workers is 0"),
        ({"block_size": 1}, "block_size is 1"),
    ],
)
def test_bad_values_are_named(tmp_path, values, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        BenchDistillConfig(tmp_path, **values)


def test_figures_by_hand():
    arms = {
        "before": {"wall_s": 8.0, "prefill_ms": [500.0, 500.0]},
        "autoregressive": {"wall_s": 2.0, "vision_ms": [100.0, 100.0], "prompt_ms": [150.0, 250.0]},
        "replayed": {
            "wall_s": 0.8,
            "vision_ms": [100.0, 100.0],
            "prompt_ms": [140.0, 220.0],
            "emitted": 75,
            "passes": 12,
        },
    }
    assert distill_figures({"windows": 2, "arms": arms}) == {
        "windows_per_s": 2.5,
        "prompt_share_of_wall": 0.7,
        "windows_per_s_ar": 1.0,
        "prompt_share_of_wall_ar": 0.3,
        "windows_per_s_before": 0.25,
        "prompt_share_of_wall_before": 0.125,
        "over_before": 4.0,
        "acceptance_length": 6.25,
    }
    del arms["before"]
    assert "over_before" not in distill_figures({"windows": 2, "arms": arms})


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """Those that the benchmark would write, without a process for each processor."""
    folder = tmp_path_factory.mktemp("clips")
    write_world(WorldConfig(folder, num_chunks=2, clips_per_chunk=4, workers=1), size=(64, 96))
    return folder


def test_a_small_run(clips, tmp_path):
    """All arms write texts of one length on the same windows; what is replayed is what the target writes."""
    config = BenchDistillConfig(clips, out=tmp_path / "distill.json", num_workers=2, before=SOURCE, **SMALL)
    answer = distill.run(config)
    kept = read_json(config.out)
    arms = kept["raw"]["arms"]
    tokens = config.windows * config.samples_per_clip * config.tokens
    assert [arm["tokens"] for arm in arms.values()] == [tokens] * 3
    assert [arm["windows"] for arm in arms.values()] == [config.windows] * 3
    assert list(arms) == ["before", "autoregressive", "replayed"]
    for arm in arms.values():
        lists = [arm[name] for name in ("vision_ms", "prompt_ms", "prefill_ms") if name in arm]
        assert all(len(times) == config.windows and min(times) > 0 for times in lists)
        assert sum(map(sum, lists)) / 1e3 < arm["wall_s"]
    assert arms["autoregressive"]["passes"] == arms["autoregressive"]["emitted"]
    assert answer["figures"]["acceptance_length"] > 5
    assert answer["texts"] == {"texts": 12, "equal": 12, "near_ties": 0, "not_near_ties": 0}
    assert answer["passed"]
    assert kept["figures"] == answer["figures"] == distill_figures(kept["raw"])


def test_the_clips_have_the_size_asked_for(clips):
    config = BenchDistillConfig(clips, **SMALL)
    distill.write_clips(config)  # finds them
    source = ClipSource(clips)
    assert len(source.clip_ids()) == config.windows + 4
    assert source.window(source.clip_ids()[0]).frames.shape[2:] == (64, 96, 3)
    with pytest.raises(ValueError, match="holds another world"):
        distill.write_clips(BenchDistillConfig(clips, **(SMALL | {"width": 98})))


def test_an_earlier_revision_that_is_not_there_or_fails(clips, tmp_path, monkeypatch):
    config = BenchDistillConfig(clips, before=tmp_path, **SMALL)
    with pytest.raises(ValueError, match="holds no alpamayo_dflash; give a revision's src"):
        distill.before(config, tmp_path)
    (tmp_path / "alpamayo_dflash").mkdir()
    (tmp_path / "alpamayo_dflash" / "__init__.py").write_text("raise RuntimeError('of long ago')")
    with pytest.raises(ValueError, match=r"ended with 1:[\s\S]*of long ago"):
        distill.before(config, tmp_path)


def test_modules_are_found_by_their_names_of_any_time():
    assert distill_before.module("nowhere", "bench.figures") is sys.modules[distill_figures.__module__]
    with pytest.raises(ModuleNotFoundError, match=re.escape("has none of nowhere, nor.here")):
        distill_before.module("nowhere", "nor.here")
