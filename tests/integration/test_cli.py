"""The command line on a random tiny target and a few clips: the chain, interruptions, bad input."""

from __future__ import annotations

import json
import shutil
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from alpamayo_dflash.cli.main import main
from alpamayo_dflash.clips.source import ClipSource
from alpamayo_dflash.common.artefacts import write_json
from alpamayo_dflash.decode.decoder import SpeculativeDecoder
from alpamayo_dflash.draft.config import DraftConfig
from alpamayo_dflash.draft.model import DFlashDraft
from alpamayo_dflash.evaluate.arms import Arms
from alpamayo_dflash.evaluate.hardness import BOUNDS
from alpamayo_dflash.standins import config as standins_config
from alpamayo_dflash.target import checkpoint
from tests.helpers.random_target import random_target

LAYERS, WIDTH = 4, 32
SHORT = ["--max-tokens", "10"]


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A world of two chunks, a target with small images, and drafts that fit and that do not."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("cli")
    arguments = ["--num-chunks", "2", "--clips-per-chunk", "3", "--seed", "5", "--workers", "1"]
    assert main(["world", "--out", str(folder / "world"), *arguments]) == 0
    target = random_target(folder / "made", layers=LAYERS, hidden=WIDTH)
    target.save_pretrained(folder / "target")
    config = json.loads((folder / "target" / "config.json").read_text())
    (folder / "target" / "config.json").write_text(
        json.dumps(config | {"min_pixels": 4096, "max_pixels": 8192})
    )
    for name, changes in {
        "draft": {},
        "draft-16": {"block_size": 16},
        "draft-other-taps": {"num_target_layers": LAYERS + 1, "target_layer_ids": (0, LAYERS)},
        "draft-other-width": {"hidden_size": WIDTH * 2},
    }.items():
        DFlashDraft.random(draft_config(target.vocab_size, **changes)).save_pretrained(folder / name)
    return folder


def draft_config(vocab_size: int, **changes: Any) -> DraftConfig:
    values: dict[str, Any] = {
        "hidden_size": WIDTH,
        "num_layers": 1,
        "num_heads": 2,
        "num_kv_heads": 1,
        "head_dim": 16,
        "intermediate_size": 32,
        "vocab_size": vocab_size,
        "block_size": 8,
        "context_len": 4,
        "target_layer_ids": (0, 2),
        "num_target_layers": LAYERS,
        "mask_token_id": vocab_size,
    }
    return DraftConfig(**(values | changes))


Command = Callable[..., dict[str, Any]]


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Command:
    """Run a command that must succeed; the last line of its standard output, read."""

    def run(*arguments: object) -> dict[str, Any]:
        capsys.readouterr()
        assert main([str(each) for each in arguments]) == 0
        answer: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
        return answer

    return run


def evaluation(work: Path, out: Path, *more: object, draft: str = "draft", world: str = "world") -> list[str]:
    given = [
        *("evaluate", "--draft-model", work / draft, "--alpamayo-model", work / "target"),
        *("--cache-dir", work / world, "--output-dir", out, *SHORT),
    ]
    return [str(each) for each in (*given, *more)]


def test_the_chain(work: Path, tmp_path: Path, command: Command) -> None:
    common = ["--model-path", work / "target", "--cache-dir", work / "world", "--chunks", "0", *SHORT]
    counts = ["--num-samples", 2, "--num-target-layers", 2]
    chosen = command("layers", *common, *counts, "--output-dir", tmp_path / "layers")
    assert len(chosen["target_layers"]) == 2
    command(
        "distill", *common, "--output-dir", tmp_path / "data", "--layers-file", tmp_path / "layers",
        "--context-len", "4", "--samples-per-clip", "2",
    )  # fmt: skip
    command(
        "train", "--target-model", work / "target", "--data-dir", tmp_path / "data", "--output-dir",
        tmp_path / "train", "--num-epochs", "1", "--num-draft-layers", "1", "--held-out", "0.5",
    )  # fmt: skip
    result = command(
        *evaluation(work, tmp_path / "evaluation", "--chunks", "1", "--detailed-timing", draft="none"),
        "--draft-model", tmp_path / "train" / "draft",
    )  # fmt: skip
    check_evaluation(result, clips=3)
    written = tmp_path / "evaluation" / "evaluation.json"
    report = command("report", "--evaluation", written, "--out", tmp_path / "report")
    page = Path(report["report"]).read_text()
    assert page.count('class="chart-figure"') == len(list(Path(report["plots"]).glob("*-dark.svg"))) > 10


def check_evaluation(result: dict[str, Any], clips: int) -> None:
    """The keys that the issue names, and what a right evaluation has in them."""
    assert [result["clips"][key] for key in ("attempted", "done", "failed")] == [clips, clips, 0]
    lossless = result["lossless"]
    assert lossless["greedy_identical"] == lossless["sampled_identical"] == lossless["of"] == clips
    assert lossless["autoregressive_equals_transformers"] == clips
    assert result["acceptance_length"] >= 1.0
    assert 0.0 <= result["acceptance_rate"] <= 1.0
    arms = result["arms"]
    assert list(arms) == ["transformers", "autoregressive", "dflash"]
    for times in arms.values():
        parts = sum(times[name] for name in ("prefill_ms", "decode_ms", "action_ms"))
        assert all(times[name] > 0 for name in ("prefill_ms", "decode_ms", "action_ms"))
        assert times["total_ms"] > parts / 2  # medians do not add up exactly
    assert arms["autoregressive"]["tokens"] == arms["dflash"]["tokens"]
    assert {"decode_vs_autoregressive", "decode_vs_transformers"} <= set(result["speedup"])
    assert result["coc_names"]["of"] == clips
    assert result["trajectory"]["of"] == clips


def test_several_samples_and_a_trace(work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--num-samples", 1, "--num-traj-samples", 3, "--verbose", "--temperature", "1.0"]
    assert main(evaluation(work, tmp_path, *options)) == 0
    captured = capsys.readouterr()
    result = json.loads(captured.out)
    check_evaluation(result, clips=1)
    assert "pass  0 sample 2" in captured.err
    kept = json.loads((tmp_path / "evaluation.json").read_text())
    assert len(kept["clip_rows"][0]["coc"]) == 3
    assert {"versions", "revision", "parents", "wall_s"} <= set(kept["provenance"])


def test_dflash_alone(work: Path, tmp_path: Path, command: Command) -> None:
    result = command(*evaluation(work, tmp_path, "--num-samples", 1, "--no-compare"))
    assert list(result["arms"]) == ["dflash"]
    assert result["speedup"] is None
    assert result["lossless"]["of"] == 0


def test_all_arms_give_the_same_greedy_trajectory(work: Path) -> None:
    """What transformers' cache hands to the expert is what the loops hand to it."""
    from alpamayo_dflash.cli.main import parse
    from alpamayo_dflash.target.alpamayo import Alpamayo

    _, config = parse(evaluation(work, Path("unused"), "--temperature", 0, "--num-traj-samples", 2))
    target = Alpamayo.from_pretrained(work / "target")
    arms = Arms(target, DFlashDraft.from_pretrained(work / "draft"), config)
    source = ClipSource(work / "world")
    prompt = target.prompt(source.window(source.clip_ids()[0]))
    runs = [arms.timed(arm, prompt) for arm in arms.names]
    assert runs[0].token_ids == runs[1].token_ids == runs[2].token_ids
    for run in runs[1:]:
        torch.testing.assert_close(run.xyz, runs[0].xyz, atol=1e-3, rtol=1e-4)
    assert (runs[0].xyz[0] - runs[0].xyz[1]).abs().max() > 1e-2  # the samples' noise differs


def test_an_interrupted_evaluation_goes_on(
    work: Path, tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = evaluation(work, tmp_path, "--num-samples", 3, "--warmup", 0)
    timed = Arms.timed
    calls: list[str] = []

    def interrupted(self: Arms, arm: str, prompt: Any) -> Any:
        if len(calls) == 4:
            raise KeyboardInterrupt
        calls.append(prompt.key)
        return timed(self, arm, prompt)

    monkeypatch.setattr(Arms, "timed", interrupted)
    assert main(arguments) == 130
    assert not (tmp_path / "evaluation.json").exists()

    def counted(self: Arms, arm: str, prompt: Any) -> Any:
        calls.append(prompt.key)
        return timed(self, arm, prompt)

    monkeypatch.setattr(Arms, "timed", counted)
    check_evaluation(command(*arguments), clips=3)
    assert len(calls) == 4 + 2 * 3  # the first clip is not done again
    assert command(*arguments)["nothing_to_do"]
    assert len(calls) == 10
    assert [path.name for path in tmp_path.iterdir()] == ["evaluation.json"]


def test_force_is_marked_as_not_lossless(work: Path, tmp_path: Path, command: Command) -> None:
    result = command(*evaluation(work, tmp_path, "--num-samples", 1, "--sentence-end", "force"))
    assert result["settings"]["lossless_mode"] is False


def test_lossless_command(work: Path, tmp_path: Path, command: Command) -> None:
    out = tmp_path / "lossless.json"
    drafts = ["--draft-models", work / "draft", work / "draft-16"]
    given = ["--alpamayo-model", work / "target", "--cache-dir", work / "world", *SHORT]
    result = command("lossless", *drafts, *given, "--num-samples", 4, "--out", out)
    assert result["passed"]
    assert result["autoregressive_equals_transformers"] == result["clips"] == 4
    kinds = {(each["kind"], each["block_size"]) for each in result["drafts"]}
    assert kinds == {("trained", 8), ("random", 8), ("trained", 16), ("random", 16)}
    assert all(
        each["greedy_identical"] == each["sampled_identical"] == each["of"] == 4 for each in result["drafts"]
    )
    assert json.loads(out.read_text())["provenance"]["parents"]
    assert [path.name for path in tmp_path.iterdir()] == ["lossless.json"]


def test_lossless_command_sees_a_difference(
    work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    generate = SpeculativeDecoder.generate

    def wrong(self: SpeculativeDecoder, *arguments: Any, **options: Any) -> Any:
        result = generate(self, *arguments, **options)
        if self.draft is not None and options["temperature"] == 0.0:
            result.token_ids[0][-1] += 1
        return result

    monkeypatch.setattr(SpeculativeDecoder, "generate", wrong)
    given = ["--alpamayo-model", work / "target", "--cache-dir", work / "world", *SHORT]
    arguments = [
        "lossless",
        "--draft-models",
        work / "draft",
        *given,
        "--num-samples",
        1,
        "--out",
        tmp_path / "l.json",
    ]
    assert main([str(each) for each in arguments]) == 1
    result = json.loads(capsys.readouterr().out)
    assert result["drafts"][0]["greedy_identical"] == 0
    assert result["drafts"][0]["sampled_identical"] == 1
    assert len(result["differences"]) == 1


def test_distribution_command(work: Path, tmp_path: Path, command: Command) -> None:
    given = [
        "--alpamayo-model",
        work / "target",
        "--cache-dir",
        work / "world",
        "--draft-model",
        work / "draft",
    ]
    counts = ["--seeds", 150, "--sample-counts", 1, 2, "--tokens", 2]
    result = command("distribution", *given, *counts, "--out", tmp_path / "d.json")
    assert result["passed"]
    assert result["reference_difference"] < 1e-5
    names = [test["name"] for test in result["tests"]]
    assert sum(name.startswith("joint") for name in names) == 4
    assert sum("noise of different" in name for name in names) == 5


def test_measure_world_outside_the_bounds(
    work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["--alpamayo-model", work / "target", "--cache-dir", work / "world", "--num-samples", 4, *SHORT]
    assert main([str(each) for each in ("measure-world", *given, "--out", tmp_path / "w.json")]) == 1
    result = json.loads(capsys.readouterr().out)
    assert set(result["figures"]) == set(BOUNDS)
    assert result["violations"]
    assert json.loads((tmp_path / "w.json").read_text())["figures"] == result["figures"]


def test_demo(work: Path, tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    figures = {name: low for name, (low, _) in BOUNDS.items()}
    write_json(tmp_path / "world_tiny.json", {"figures": figures})
    monkeypatch.setattr(checkpoint, "SHIPPED", work / "target")
    monkeypatch.setattr(standins_config, "world_figures_path", lambda: tmp_path / "world_tiny.json")
    out = tmp_path / "demo"
    sizes = {
        "num-chunks": 3, "clips-per-chunk": 2, "num-samples": 2, "layers-clips": 2, "num-target-layers": 2,
        "context-len": 4, "num-draft-layers": 1, "num-epochs": 1, "workers": 1,
    }  # fmt: skip
    options = [each for name, size in sizes.items() for each in (f"--{name}", size)]
    arguments = ["demo", "--out", out, *options]
    result = command(*arguments)
    check_evaluation(result, clips=2)
    assert result["world"] == figures
    assert set(result["world_here"]) == set(figures)
    summary = json.loads((out / "summary.json").read_text())
    assert summary["acceptance_length"] == result["acceptance_length"]
    assert summary["settings"]["temperature"] == 0.6
    greedy = json.loads((out / "evaluation-greedy" / "evaluation.json").read_text())
    assert greedy["settings"]["temperature"] == 0
    assert [result["trace"][key] for key in ("clips", "lacking", "unequal")] == [2, 0, 0]
    assert len(list((out / "evaluation" / "trace").glob("*/clip.json"))) == 2
    assert greedy["trace"] is None
    assert result["greedy"]["arms"] == greedy["arms"] and set(greedy["arms"]) == set(result["arms"])
    assert result["report"] == str(out / "report" / "report.html")
    page = Path(result["report"]).read_text()
    charts = ("decode-parts", "block-places", "sources", "losses", "training-acceptance", "layers-early-exit")
    assert all(f'id="figure-{name}"' in page for name in charts)
    assert "all of 2 clips equal" in page
    before = (out / "train" / "draft" / "model.safetensors").stat().st_mtime_ns
    again = command(*arguments)
    assert again["nothing_to_do"]
    assert again["arms"] == result["arms"]
    assert json.loads((out / "summary.json").read_text()) == summary
    assert (out / "train" / "draft" / "model.safetensors").stat().st_mtime_ns == before


# Bad input: exit status 2, one clear line, nothing half-written.


def refused(arguments: Sequence[object], capsys: pytest.CaptureFixture[str]) -> str:
    """Run a command that must be refused; its line on standard error."""
    capsys.readouterr()
    assert main([str(each) for each in arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    return captured.err.splitlines()[-1]


def test_a_missing_checkpoint_file(work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(work / "target", tmp_path / "target")
    (tmp_path / "target" / "model.safetensors").unlink()
    out = tmp_path / "out"
    message = refused([*evaluation(work, out), "--alpamayo-model", tmp_path / "target"], capsys)
    assert "model.safetensors" in message
    assert not out.exists()


@pytest.mark.parametrize(
    ("draft", "named"),
    [("draft-other-taps", "layers"), ("draft-other-width", "hidden size"), ("nowhere", "no such folder")],
)
def test_a_draft_that_does_not_fit(
    draft: str, named: str, work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert named in refused(evaluation(work, out, draft=draft), capsys)
    assert not out.exists()


def test_an_unknown_clip(work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert "no-such-clip" in refused(evaluation(work, out, "--clip-id", "no-such-clip"), capsys)
    assert not out.exists()


def test_an_empty_list_of_clips(work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "clips.txt").write_text("\n\n")
    message = refused(evaluation(work, tmp_path / "out", "--clip-ids", tmp_path / "clips.txt"), capsys)
    assert "no clip" in message
    assert "7" in refused(evaluation(work, tmp_path / "out", "--num-samples", 7), capsys)  # of six
    assert not (tmp_path / "out").exists()


def test_a_prompt_longer_than_the_cache(
    work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    message = refused(evaluation(work, tmp_path / "out", "--prompt-capacity", 32), capsys)
    assert "the cache holds at most 32" in message
    assert not (tmp_path / "out").exists()


def test_layers_out_of_range(work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--model-path", work / "target", "--cache-dir", work / "world"]
    message = refused(["layers", *given, "--output-dir", tmp_path / "out", "--layers", f"0,{LAYERS}"], capsys)
    assert str(LAYERS) in message
    assert not (tmp_path / "out").exists()


def damage_a_clip(world: Path) -> str:
    """Replace one clip's front-wide video by garbage; returns the clip."""
    archive = next(world.glob("**/camera_front_wide_120fov.chunk_0000.zip"))
    with zipfile.ZipFile(archive) as file:
        content = {name: file.read(name) for name in file.namelist()}
    video = next(name for name in sorted(content) if name.endswith(".mp4"))
    content[video] = content[video][:64] + b"\0" * 256
    with zipfile.ZipFile(archive, "w") as file:
        for name, data in content.items():
            file.writestr(name, data)
    return video.split(".")[0]


def test_a_corrupt_video_is_counted_and_the_rest_goes_on(
    work: Path, tmp_path: Path, command: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(work / "world", tmp_path / "world")
    broken = damage_a_clip(tmp_path / "world")
    (tmp_path / "target").symlink_to(work / "target")
    (tmp_path / "draft").symlink_to(work / "draft")
    result = command(*evaluation(tmp_path, tmp_path / "out", "--chunks", "0"))
    assert [result["clips"][key] for key in ("attempted", "done", "failed")] == [3, 2, 1]
    assert result["clips"]["failures"][0]["clip_id"] == broken
    assert "camera_front_wide_120fov" in result["clips"]["failures"][0]["error"]
    alone = evaluation(tmp_path, tmp_path / "alone", "--clip-id", broken)
    assert "camera_front_wide_120fov" in refused(alone, capsys)
    assert not (tmp_path / "alone").exists()


@pytest.mark.parametrize("damage", ["truncated", "one byte flipped"])
def test_a_corrupt_shard(
    work: Path, tmp_path: Path, command: Command, capsys: pytest.CaptureFixture[str], damage: str
) -> None:
    common = ["--model-path", work / "target", "--cache-dir", work / "world", "--chunks", "0", *SHORT]
    command(
        "distill", *common, "--output-dir", tmp_path / "data", "--target-layers", "0,2", "--context-len", 4
    )
    shard = next((tmp_path / "data" / "shards").glob("*.safetensors"))
    content = bytearray(shard.read_bytes())
    content[-100] ^= 0x40
    shard.write_bytes(content[:-100] if damage == "truncated" else content)
    given = [
        "--target-model",
        work / "target",
        "--data-dir",
        tmp_path / "data",
        "--num-draft-layers",
        1,
        "--held-out",
        0.5,
    ]
    message = refused(["train", *given, "--output-dir", tmp_path / "out", "--num-epochs", 1], capsys)
    assert shard.name in message
    assert not (tmp_path / "out" / "train.json").exists()
    less = [*given, "--output-dir", tmp_path / "out", "--num-epochs", 1, "--on-bad-shard", "skip"]
    assert "no shard is sound" in refused(["train", *less], capsys)  # it is the only one


def test_a_device_that_is_not_there(work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--model-path", work / "target", "--cache-dir", work / "world", "--output-dir", tmp_path / "out"]
    message = refused(["layers", *given, "--num-target-layers", 2, "--device", "nowhere"], capsys)
    assert "'nowhere'" in message
    assert not (tmp_path / "out").exists()
