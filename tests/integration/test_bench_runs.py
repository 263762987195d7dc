"""The benchmarks, run whole at a small size: what they write follows from their raw timings."""

import pytest
import torch

from alpamayo_dflash.bench.config import BenchConfig
from alpamayo_dflash.bench.figures import figures, spread, train_figures, window_figures
from alpamayo_dflash.bench.floors import floors, window_floors
from alpamayo_dflash.cli import main as cli
from alpamayo_dflash.common.artefacts import read_json
from alpamayo_dflash.report.tables import bench_tables
from tests.unit.test_bench import FIGURES
from tests.unit.test_bench_train import SMALL


@pytest.fixture
def _not_warmed(monkeypatch):
    """On a CPU nothing is compiled or captured by the first calls."""
    for name in ("baselines.WARM", "clocks.WARM", "generation.WARM", "window._WARM"):
        monkeypatch.setattr(f"alpamayo_dflash.bench.{name}", 0)


@pytest.mark.usefixtures("_not_warmed")
@pytest.mark.slow
def test_a_small_run(tmp_path, capsys):
    out, counts = tmp_path / "engine.json", tmp_path / "counts.csv"
    counts.write_text("tokens,steps\n3,5\n5,1\n")
    options = ["--target", "random:small", "--device", "cpu", "--rows", "1", "--repeats", "2", "--texts", "3"]
    options += ["--lossless-prompts", "2", "--coc-counts", str(counts), "--out", str(out)]
    assert cli.main(["bench", *options]) == 0
    printed = capsys.readouterr()
    assert "over floor" in printed.err and "speculative, replayed" in " ".join(printed.err.split())
    written = read_json(out)
    assert written["figures"] == figures(written["raw"])
    assert written["floors"] == floors(written["raw"])
    assert written["spread"] == spread(written["raw"])
    picks = {f"picks_{kind}_head_over_verify" for kind in ("no", "bigram", "mlp", "gru")}
    assert set(written["figures"]) == (set(FIGURES) | {"verify_1_over_floor", "verify_10_over_floor"} | picks)
    assert {"round_overhead", "decode_vs_transformers"} <= set(written["replayed"])
    assert written["lossless"]["passed"] and written["lossless"]["one_row_width"]["equal"] == 4
    reason = {"because": "transformers compiles nothing by itself on a device of type cpu"}
    assert written["raw"]["compiled"] == {"1": reason, "6": reason}
    assert [row["coc_tokens"] for row in written["coc_lengths"]] == [3, 3, 5, 5]
    assert {row["bound"] for row in written["floors"]["rows"]} <= {"bytes", "operations"}


@pytest.mark.usefixtures("_not_warmed")
def test_a_small_run_of_whole_windows(tmp_path, capsys):
    out = tmp_path / "window.json"
    options = ["--target", "random:small", "--device", "cpu", "--repeats", "2", "--out", str(out)]
    assert cli.main(["bench", "--window", "--texts", "3", "--windows", "3", *options]) == 0
    printed = " ".join(capsys.readouterr().err.split())
    assert "A window, camera to trajectory" in printed and "action expert" in printed
    written = read_json(out)
    raw = written["raw"]
    assert written["figures"] == window_figures(raw)
    assert written["floors"] == window_floors(raw)
    assert written["spread"] == spread(raw, window_figures)
    assert {"window_ms", "window_six_over_one", "window_p99_over_p50"} <= set(written["figures"])
    assert 0 < written["figures"]["window_overhead"] < 1
    assert set(raw["window_parts_ms"]["6"]) == {"preprocess", "vision", "prompt", "decode", "action"}
    assert raw["text_tokens"] == 14 and len(raw["equal_window_ms"]) == 3
    assert set(raw["expert_ms"]) == {"plain_1", "plain_6"}
    assert "not on a GPU" in raw["expert_plain_because"]


@pytest.mark.usefixtures("_not_warmed")
def test_a_quick_run_is_of_our_windows_alone(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("alpamayo_dflash.bench.window._QUICK_WINDOWS", 2)
    monkeypatch.setattr("alpamayo_dflash.bench.window._QUICK_TEXTS", 1)
    out = tmp_path / "window.json"
    options = ["--target", "random:small", "--device", "cpu", "--repeats", "2", "--out", str(out)]
    assert cli.main(["bench", "--window", "--quick", *options]) == 0
    assert "A window, camera to trajectory" in " ".join(capsys.readouterr().err.split())
    written = read_json(out)
    raw = written["raw"]
    assert written["figures"] == window_figures(raw)
    assert len(raw["equal_window_ms"]) == 2 and len(raw["window_ms"]["6"]) == 1
    assert not {"vision_ms", "prompt_pass_ms", "expert_ms", "transformers_window_ms"} & set(raw)
    assert set(written["parts"]) == {"ours_1", "ours_6", "floor"}
    with pytest.raises(ValueError, match="quick goes with window"):
        BenchConfig(quick=True)


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch before 2.9 has no Muon")
def test_a_run_writes_figures_that_follow_from_its_raw_timings(tmp_path, capsys):
    arguments = ["bench", "--train", "--out", str(tmp_path / "train.json"), "--most-blocks", "64"]
    options = [part for key, value in SMALL.items() for part in (f"--{key.replace('_', '-')}", str(value))]
    assert cli.main([*arguments, *options, "--repeats", "2"]) == 0
    capsys.readouterr()
    found = read_json(tmp_path / "train.json")
    assert found["figures"] == train_figures(found["raw"])
    assert list(found["raw"]["cases"]) == ["1_layers", "1_layers_muon", "1_layers_kl_gru"]
    step = found["raw"]["cases"]["1_layers"]["steps"]["most"]
    assert (step["blocks"], step["block_rows"], len(step["step_ms"])) == (64, 512, 2)
    (table,) = bench_tables(found)
    assert [row[:2] for row in table.rows[:2]] == [("1 layers", "64")] * 2
