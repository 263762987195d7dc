"""The benchmark of distillation, run whole at a small size beside this revision's own `distill`."""

from pathlib import Path

import pytest

import alpamayo_dflash
from alpamayo_dflash.bench import distill
from alpamayo_dflash.bench.config import BenchDistillConfig
from alpamayo_dflash.bench.figures import distill_figures
from alpamayo_dflash.clips.source import ClipSource
from alpamayo_dflash.common.artefacts import read_json
from alpamayo_dflash.world.config import WorldConfig
from alpamayo_dflash.world.run import run as write_world
from tests.unit.test_bench_distill import SMALL

SOURCE = Path(alpamayo_dflash.__file__).parents[1]


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
