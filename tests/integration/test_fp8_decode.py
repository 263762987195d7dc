"""Everything after the weights with a target in FP8: loops, drafts of another format, the stages' files."""

import json
from pathlib import Path

import pytest
import torch

from alpamayo_dflash.cli.main import main
from alpamayo_dflash.common.artefacts import read_json
from alpamayo_dflash.decode.config import DecodeConfig
from alpamayo_dflash.decode.decoder import SpeculativeDecoder
from alpamayo_dflash.decode.rollouts import teacher_forced
from alpamayo_dflash.evaluate.config import CompareWeightsConfig
from alpamayo_dflash.evaluate.distance import _Clip, summary
from alpamayo_dflash.target.formats import TargetFormat
from alpamayo_dflash.target.quantised import make_fp8
from tests.helpers import frozen_texts
from tests.helpers.proposers import Oracle, Random
from tests.helpers.random_target import random_draft, random_prompt, random_target

LIMIT = 20
LOOPS = pytest.mark.parametrize("loop", ["host", "device"])
TO_M = 1e-2  # as in test_frozen_texts.py
ALL = TargetFormat("fp8", "fp8", "fp8")


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    made = random_target(tmp_path_factory.mktemp("vlm"), push=1.5, sharpness=4.0)
    make_fp8(made, ALL)
    return made.requires_grad_(False)


@pytest.fixture(scope="module")
def prompts(target):
    return [random_prompt(target, seed=seed) for seed in (0, 3)]


def decode(decoder, prompt, temperature, samples, *, trajectories=False):
    options = {"max_new_tokens": LIMIT, "num_traj_samples": samples, "trajectories": trajectories}
    return decoder.generate(prompt, temperature=temperature, **options)


@LOOPS
@pytest.mark.parametrize("width", [None, 16])
@pytest.mark.parametrize(("temperature", "samples"), [(0.0, 1), (0.6, 3)])
def test_speculative_is_autoregressive(target, prompts, *, loop, width, temperature, samples):
    config = DecodeConfig(loop=loop, row_width=width)
    alone, rounds = SpeculativeDecoder(target, config=config), 0
    for number, prompt in enumerate(prompts):
        truth = decode(alone, prompt, temperature, samples)
        sizes, known = (target.vocab_size, 8), {"texts": truth.token_ids, "prompt_length": len(prompt)}
        for draft in (Random(*sizes, seed=number), Oracle(*sizes, **known, errors=0.25, seed=number)):
            found = decode(SpeculativeDecoder(target, draft, config), prompt, temperature, samples)
            assert found.token_ids == truth.token_ids
            assert found.stops == truth.stops
        rounds += truth.passes - found.passes
    assert rounds > 0  # the oracle was believed


def test_trajectories_are_those_of_the_texts(target, prompts):
    """The expert in FP8 reads the same cache with a draft and without, up to what float32 rounds."""
    truth = decode(SpeculativeDecoder(target), prompts[0], 0.6, 3, trajectories=True)
    draft = Oracle(target.vocab_size, 8, texts=truth.token_ids, prompt_length=len(prompts[0]), errors=0.25)
    found = decode(SpeculativeDecoder(target, draft), prompts[0], 0.6, 3, trajectories=True)
    assert found.token_ids == truth.token_ids
    assert bool(found.pred_xyz.isfinite().all())
    torch.testing.assert_close(found.pred_xyz, truth.pred_xyz, atol=0.05, rtol=0)


@pytest.fixture(scope="module")
def frozen():
    stored = json.loads(frozen_texts.FP8_FILE.read_text())
    assert stored["requests"] == frozen_texts.REQUESTS
    assert len(stored["clips"]) == frozen_texts.FP8_CLIPS
    return stored["clips"]


@LOOPS
def test_the_texts_are_the_frozen_ones(loop, frozen):
    target, config = frozen_texts.tiny_target("fp8"), DecodeConfig(loop=loop)
    alone = SpeculativeDecoder(target, config=config)
    windows = frozen_texts.windows(frozen_texts.FP8_CLIPS)
    for number, (window, clip) in enumerate(zip(windows, frozen, strict=True)):
        assert window.clip_id == clip["clip_id"]
        prompt = target.prompt(window)
        drafted = SpeculativeDecoder(target, frozen_texts.oracle(target, prompt, clip, number), config)
        for name, result in frozen_texts.generate(drafted, prompt, trajectories=False).items():
            assert result.token_ids == clip[name]["token_ids"], (clip["clip_id"], name)
            assert result.accepted > 0
    for name, result in frozen_texts.generate(alone, prompt).items():  # the last clip's trajectories too
        assert result.token_ids == clip[name]["token_ids"]
        expected = torch.tensor(clip[name]["pred_xyz"][loop])
        torch.testing.assert_close(result.pred_xyz[:, 3::4], expected, atol=TO_M, rtol=0)


def test_fp8_moves_the_words_less_than_bfloat16_does(frozen):
    """Why no layer is left out: Kullback-Leibler divergences from float32 on the frozen texts' places."""
    targets = {name: frozen_texts.tiny_target() for name in ("float32", "bfloat16", "fp8")}
    targets["bfloat16"].to(torch.bfloat16)
    make_fp8(targets["fp8"], TargetFormat(text="fp8"))
    found = {name: [] for name in targets}
    for window, clip in zip(frozen_texts.windows(frozen_texts.FP8_CLIPS), frozen, strict=True):
        (tokens,) = clip["greedy"]["token_ids"]
        for name, target in targets.items():
            with torch.inference_mode():
                forced = teacher_forced(target, target.prompt(window), tokens, layers=(0,), prompt_states=1)
            found[name].append(forced.logits.float().log_softmax(-1))
    logs = {name: torch.cat(each) for name, each in found.items()}
    exact = logs["float32"]
    apart = {name: (exact - each).nan_to_num(0.0) for name, each in logs.items()}  # masked in both
    distance = {name: float((exact.exp() * each).sum(-1).mean()) for name, each in apart.items()}
    assert 0 < distance["fp8"] < distance["bfloat16"]


# The stages.


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A world of four clips in two chunks, and a target with small images."""
    folder = tmp_path_factory.mktemp("stages")
    clips = ["--num-chunks", "2", "--clips-per-chunk", "2", "--seed", "5", "--workers", "1"]
    assert main(["world", "--out", str(folder / "world"), *clips]) == 0
    target = random_target(folder / "made", layers=5, push=0.5)
    target.save_pretrained(folder / "target")
    path = folder / "target/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"min_pixels": 4096, "max_pixels": 8192}))
    random_draft(target).save_pretrained(folder / "draft")
    return folder


def run(capsys, *arguments):
    """A command's exit status, JSON object and standard error."""
    capsys.readouterr()
    status = main([str(each) for each in arguments])
    captured = capsys.readouterr()
    return status, json.loads(captured.out or "null"), captured.err


def distill(work, *more):
    given = (
        "distill",
        "--model-path",
        work / "target",
        "--cache-dir",
        work / "world",
        "--target-layers",
        "0,2",
    )
    return (*given, "--max-tokens", 12, "--context-len", 5, "--top-k-logits", 7, *more)


def train(work, data, *more):
    given = ("train", "--target-model", work / "target", "--data-dir", data, "--held-out-chunks", "1")
    return (*given, "--max-steps", 2, "--block-size", 4, "--num-draft-layers", 1, "--batch-size", 4, *more)


def test_distill_and_train(work, capsys):
    """The manifest names the format; training knows the data as the FP8 target's, and as nobody else's."""
    status, _, _ = run(capsys, *distill(work, "--weights", "fp8", "--output-dir", work / "data"))
    assert status == 0
    (manifest,) = (work / "data").glob("manifest*.json")
    settings = read_json(manifest)["settings"]
    assert settings["target_weights"] == {"text": "fp8", "expert": "float32", "vision": "float32"}
    status, _, err = run(capsys, *train(work, work / "data", "--output-dir", work / "refused"))
    assert status == 2 and "made with another target" in err
    out = ("--output-dir", work / "train")
    status, result, _ = run(capsys, *train(work, work / "data", "--weights", "fp8", *out))
    assert status == 0 and result["steps"] == 2
    status, result, err = run(capsys, *distill(work, "--output-dir", work / "data"))
    assert status == 2 and "target" in err  # the folder holds the FP8 target's data


def evaluate(work, out, *more):
    given = ("evaluate", "--draft-model", work / "draft", "--alpamayo-model", work / "target")
    given += ("--cache-dir", work / "world", "--chunks", "0", "--output-dir", out, "--max-tokens", 12)
    return (*given, "--warmup", 0, *more)


def test_evaluate(work, tmp_path, capsys):
    """A draft made for the bfloat16 target proposes to the FP8 one; all arms write the same."""
    fp8 = ("--weights", "fp8", "--vision-weights", "fp8", "--expert-weights", "fp8")
    status, result, _ = run(capsys, *evaluate(work, tmp_path, *fp8))
    assert status == 0
    assert result["settings"]["target_weights"] == dict.fromkeys(("text", "expert", "vision"), "fp8")
    counts = result["lossless"]
    assert counts["greedy_identical"] == counts["sampled_identical"] == counts["of"] == 2
    assert counts["autoregressive_equals_transformers"] == 2
    status, result, err = run(capsys, *evaluate(work, tmp_path, *fp8))
    assert status == 0 and "nothing to do" in err
    # Another format is another evaluation.
    status, result, err = run(capsys, *evaluate(work, tmp_path))
    assert status == 0 and "nothing to do" not in err
    assert result["settings"]["target_weights"]["text"] == "float32"


def test_a_converted_target_evaluates_the_same(work, tmp_path, capsys):
    fp8 = ("--weights", "fp8")
    status, _, _ = run(capsys, "convert", "--checkpoint", work / "target", "--out", tmp_path / "stored", *fp8)
    assert status == 0
    first = run(capsys, *evaluate(work, tmp_path / "made", "--no-compare", *fp8))
    stored = ("--alpamayo-model", tmp_path / "stored")
    second = run(capsys, *evaluate(work, tmp_path / "second", "--no-compare", *stored))
    assert first[0] == second[0] == 0
    rows = [read_json(tmp_path / name / "evaluation.json")["clip_rows"] for name in ("made", "second")]
    kept = [
        [(row["coc"], row["first_tokens"], row["rounds"], row["trajectory"]) for row in each] for each in rows
    ]
    assert kept[0] == kept[1]


def test_layers_and_measurements_name_the_format(work, tmp_path, capsys):
    given = ("--model-path", work / "target", "--cache-dir", work / "world", "--num-samples", 2)
    given += ("--output-dir", tmp_path, "--num-target-layers", 2, "--max-tokens", 8, "--weights", "fp8")
    status, result, _ = run(capsys, "layers", *given)
    assert status == 0
    assert read_json(Path(result["scores_file"]))["settings"]["target_weights"]["text"] == "fp8"
    given = ("--target", work / "target", "--device", "cpu", "--max-tokens", 4, "--out", tmp_path / "m.json")
    status, result, _ = run(capsys, "measure-target", *given, "--expert-weights", "fp8")
    assert status == 0 and result["target_weights"]["expert"] == "fp8"


def test_compare_weights(work, tmp_path, capsys):
    """Every arm on the same clips: the formats are named, and what they change is counted."""
    given = ("--cache-dir", work / "world", "--alpamayo-model", work / "target", "--num-samples", 3)
    given += ("--draft-models", work / "draft", "--max-tokens", 12, "--out", tmp_path / "w.json")
    status, result, err = run(capsys, "compare-weights", *given, "--weights", "fp8", "--num-traj-samples", 2)
    assert status == 0 and "acceptance length" in err
    checkpoint, other, changed = result["arms"].values()
    assert checkpoint["equal_greedy"] == checkpoint["equal_sampled"] == 1.0
    assert other["equal_greedy"] == 1.0 and other["row_width"] == 16  # in float32 widths are equal
    assert changed["target_weights"] == {"text": "fp8", "expert": "float32", "vision": "float32"}
    assert (
        changed["acceptance_length"].keys() == checkpoint["acceptance_length"].keys() == {str(work / "draft")}
    )
    assert result["clips"] == {"attempted": 3, "done": 3, "failed": 0}
    assert len(result["differing"]) == round(3 * (1 - changed["equal_greedy"]))
    assert changed["min_ade_m"] != checkpoint["min_ade_m"]
    stored = read_json(tmp_path / "w.json")
    parents = stored["provenance"]["parents"]
    assert parents["target"] != parents["changed"] and stored["arms"] == result["arms"]
    with pytest.raises(ValueError, match="nothing to compare"):
        CompareWeightsConfig(work / "world")
    with pytest.raises(ValueError, match="both 8"):
        CompareWeightsConfig(work / "world", weights="fp8", other_row_width=8)


def clip(greedy, sampled, named=None, error=None, accepted=(4, 2)):
    return _Clip([greedy], sampled, named, error, {"d": accepted})


def test_the_comparisons_counts():
    reference = {
        "a": clip([1], [[1], [2]], (True, True), 1.0),
        "b": clip([2], [[3], [4]], (True, False), 2.0),
    }
    changed = {
        "a": clip([1], [[1], [5]], (True, False), 1.5),
        "b": clip([9], [[3], [4]], (False, False), 2.0, (2, 2)),
    }
    assert summary(changed, reference, ["a", "b"]) == {
        "equal_greedy": 0.5,
        "equal_sampled": 0.75,
        "named": {"manoeuvre": 0.5, "cause": 0.0, "of": 2},
        "min_ade_m": 1.75,
        "acceptance_length": {"d": 1.5},
    }
