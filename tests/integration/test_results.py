"""The results that ship, recomputed on fewer clips with the shipped target."""

import json
from pathlib import Path

import pytest

from alpamayo_dflash.bench.cards import cards_of, read_cards
from alpamayo_dflash.bench.figures import (
    distill_figures,
    figures,
    format_figures,
    medians,
    spread,
    train_figures,
    window_figures,
)
from alpamayo_dflash.bench.floors import TextShape, expert_work, floors, format_floors, window_floors
from alpamayo_dflash.cli.main import main, parse
from alpamayo_dflash.common.artefacts import read_json
from alpamayo_dflash.evaluate.acceptance import study_figures
from alpamayo_dflash.evaluate.hardness import violations
from alpamayo_dflash.report.tables import study_tables
from alpamayo_dflash.standins.config import world_figures_path
from alpamayo_dflash.target.checkpoint import SHIPPED, VLMFiles, target_identity

RESULTS = Path(__file__).parents[2] / "docs" / "results"
TAPS = "1,2,4,6"


@pytest.fixture(scope="module")
def command():
    def run(*arguments):
        from contextlib import redirect_stdout
        from io import StringIO

        out = StringIO()
        with redirect_stdout(out):
            status = main([str(argument) for argument in arguments])
        lines = out.getvalue().splitlines()
        return status, json.loads(lines[-1]) if lines else None

    return run


@pytest.fixture(scope="module")
def trained(tmp_path_factory, command):
    """A small world, and drafts of block 8 and 16 trained on it for a few seconds."""
    folder = tmp_path_factory.mktemp("results")
    assert command("world", "--out", folder / "world", "--num-chunks", 2, "--clips-per-chunk", 10)[0] == 0
    distil = ("--model-path", "tiny", "--cache-dir", folder / "world", "--output-dir", folder / "data")
    status, _ = command("distill", *distil, "--chunks", 0, "--target-layers", TAPS, "--samples-per-clip", 2)
    assert status == 0
    for size in (8, 16):
        status, _ = command(
            *("train", "--target-model", "tiny", "--data-dir", folder / "data"),
            *("--output-dir", folder / f"train{size}", "--block-size", size, "--num-draft-layers", 1),
            *(
                "--max-steps",
                30,
                "--num-epochs",
                30,
                "--batch-size",
                48,
                "--learning-rate",
                2e-3,
                "--held-out",
                0.3,
            ),
        )
        assert status == 0
    return folder


def test_no_file_names_the_packages_folder(trained):
    written = [path for kind in ("json", "jsonl") for path in trained.rglob(f"*.{kind}")]
    assert len(written) >= 6
    for path in written:
        assert str(SHIPPED) not in path.read_text(), path
    config = read_json(trained / "train8" / "train.json")["provenance"]["config"]
    assert config["run"]["target_model"] == "tiny"
    assert read_json(trained / "data" / "manifest-rank0.json")["provenance"]["config"]["model_path"] == "tiny"


def test_lossless(trained, command):
    status, found = command(
        *("lossless", "--alpamayo-model", "tiny", "--cache-dir", trained / "world"),
        *("--chunks", 1, "--num-samples", 6, "--out", trained / "lossless.json"),
        *("--draft-models", trained / "train8" / "draft", trained / "train16" / "draft"),
    )
    assert status == 0
    assert found["autoregressive_equals_transformers"] == 6
    for each in found["drafts"]:
        assert each["greedy_identical"] == each["sampled_identical"] == 6
    lengths = {each["name"]: each["greedy_acceptance_length"] for each in found["drafts"]}
    assert lengths["random-8"] <= 1.3
    assert lengths["trained-8"] > lengths["random-8"]


def test_in_bfloat16_an_evaluation_tells_near_ties_from_errors(trained, command):
    status, found = command(
        *("evaluate", "--alpamayo-model", "tiny", "--cache-dir", trained / "world"),
        *("--draft-model", trained / "train8" / "draft", "--chunks", 1, "--num-samples", 4),
        *("--dtype", "bfloat16", "--temperature", 1.2, "--output-dir", trained / "bfloat16"),
    )
    assert status == 0
    lossless = found["lossless"]
    different = 2 * lossless["of"] - lossless["greedy_identical"] - lossless["sampled_identical"]
    assert lossless["of"] == 4
    assert (lossless["near_ties"], lossless["not_near_ties"]) == (different, 0)


def test_the_shipped_page_is_small_fast_and_quiet():
    shipped = read_json(RESULTS / "page_tiny.json")
    figures = shipped["figures"]
    assert shipped["clips"] == 1000
    assert figures["open_s"] < 3
    assert figures["bytes"] < 30e6
    assert figures["console_errors"] == figures["requests"] == figures["axe_serious"] == 0
    assert figures["trace_ms_per_clip"] > 0
    assert figures["trace_bytes_per_clip"] > 0


def test_the_shipped_lossless_result_is_whole():
    shipped = read_json(RESULTS / "lossless_tiny.json")
    assert shipped["passed"]
    assert shipped["clips"] == shipped["autoregressive_equals_transformers"] == 200
    assert {each["name"] for each in shipped["drafts"]} == {
        "trained-8",
        "random-8",
        "trained-16",
        "random-16",
    }
    for each in shipped["drafts"]:
        assert each["greedy_identical"] == each["sampled_identical"] == each["of"] == 200
        lengths = {"trained": (4.0, 16.0), "random": (1.0, 1.3)}[each["kind"]]
        assert lengths[0] <= each["greedy_acceptance_length"] <= lengths[1]


def test_the_shipped_demo_reaches_what_it_must():
    shipped = read_json(RESULTS / "demo_tiny.json")
    clips = shipped["clips"]
    assert clips["attempted"] == clips["done"] == shipped["lossless"]["of"] >= 50
    assert (
        shipped["lossless"]["greedy_identical"] == shipped["lossless"]["sampled_identical"] == clips["done"]
    )
    assert shipped["settings"]["temperature"] == 0.6
    assert shipped["greedy"]["acceptance_length"] >= 6.66  # what plain DFlash had
    assert shipped["settings"]["block_size"] == 8
    assert shipped["acceptance_length"] >= 5.0
    assert shipped["speedup"]["decode_vs_autoregressive"] >= 1.8
    assert shipped["world"] == read_json(world_figures_path())["figures"]


@pytest.mark.parametrize(
    ("name", "samples", "fits"),
    [
        ("target_h200", 1, True),
        ("target_h200_small_cache", 1, True),
        ("target_h200_captured", 1, True),
        ("target_h200_captured_six", 6, True),
        ("target_h200_captured_draft", 1, False),
    ],
)
def test_the_real_size_loads_and_runs_in_its_bounds(name, samples, fits):
    shipped = read_json(RESULTS / f"{name}.json")
    gpu = shipped["gpu"]
    assert (shipped["tensors"], shipped["vocab_size"], shipped["dtype"]) == (1166, 155697, "bfloat16")
    assert shipped["load_s"] > 0
    load = shipped["host_peak_gib"] - shipped["host_before_gib"]
    assert shipped["host_load_gib"] == pytest.approx(load, abs=2e-4)
    assert shipped["host_over_shard"] == pytest.approx(load / shipped["largest_shard_gib"], abs=2e-4)
    assert shipped["host_over_shard"] < 1.2
    parts = shipped["weights_gib"] + gpu["cache_gib"] + gpu["activations_gib"]["vision_and_prefill"]
    assert parts < shipped["gpu_peak_gib"] + 0.01 < gpu["reserved_gib"] + 0.02
    assert gpu["needed_bytes"] == pytest.approx((gpu["reserved_gib"] + gpu["context_gib"]) * 2**30, rel=1e-4)
    assert gpu["fits_24gb"] == (gpu["needed_bytes"] < 24_564 * 2**20) is fits
    assert shipped["trajectory"] == shipped["trajectory"] | {"shape": [samples, 64, 3], "finite": True}


def test_the_shipped_world_lies_in_its_bounds():
    shipped = read_json(RESULTS / "world_tiny.json")
    assert shipped == read_json(world_figures_path())
    assert shipped["clips"] == 1200
    assert not violations(shipped["figures"])


@pytest.mark.parametrize(
    "name", ["world_tiny", "lossless_tiny", "tiny_sees", "distribution_tiny", "demo_tiny"]
)
def test_results_belong_to_the_shipped_target(name):
    made = read_json(RESULTS / f"{name}.json")["provenance"]
    identity = target_identity(SHIPPED, VLMFiles(SHIPPED / "vlm"))
    now = {1: identity.before(), 2: identity.hash}
    assert made["parents"]["target"] == now[made.get("identity", 1)]


def stored_commands():
    """The arguments of the results' commands; tiny's folder of then has the name of today."""
    commands = {}
    for path in [*RESULTS.glob("*.json"), world_figures_path()]:
        words = read_json(path).get("provenance", {}).get("command", "").split()
        if words and words[0] in ("alpamayo-dflash", "main.py"):
            then = "src/alpamayo_dflash/tiny/checkpoint"
            commands[path.stem] = ["tiny" if word == then else word for word in words[1:]]
    return commands


def test_every_stored_command_parses():
    commands = stored_commands()
    assert len(commands) >= 10
    assert sum("tiny" in words for words in commands.values()) == 6
    for name, words in commands.items():
        assert parse(words)[0] == words[0], name


def test_the_worlds_figures_hold_loosely_on_few_clips(tmp_path, command):
    """Frequencies that do not depend on how many clips there are."""
    _, found = command("measure-world", "--num-samples", 48, "--out", tmp_path / "world.json")
    assert 0.5 <= found["figures"]["period"] <= 0.87
    assert found["figures"]["differ"] >= 0.5
    assert 0.25 <= found["figures"]["top_ten"] <= 0.6


ENGINE_TARGETS = {
    "verify_8_over_floor": 1.4,
    "verify_64_over_floor": 1.65,
    "verify_256_over_floor": 2.8,
    "draft_over_verify": 0.08,
    "round_overhead": 0.04,
    "round_six_over_one": 1.3,
    "decode_six_over_one": 1.7,
}
ENGINE_SPEEDUPS = {
    "decode_vs_transformers": 25,
    "decode_vs_autoregressive": 4.2,
    "prefill_vs_transformers": 1.3,
}


ENGINE_RUNS = {"engine_h200": "H200", "engine_h100": "H100"}


@pytest.mark.parametrize("name", ENGINE_RUNS)
def test_the_engines_figures_follow_from_their_raw_timings(name):
    shipped = read_json(RESULTS / f"{name}.json")
    raw = shipped["raw"]
    found = figures(raw)
    assert found == shipped["figures"]
    assert spread(raw) == shipped["spread"]
    assert floors(raw) == shipped["floors"]
    assert all(found[key] <= most for key, most in ENGINE_TARGETS.items())
    assert all(found[key] >= least for key, least in ENGINE_SPEEDUPS.items())
    assert set(shipped["replayed"]) <= set(found)
    replay = raw["replay"]
    assert replay["emitted_1"] / replay["passes_1"] == pytest.approx(6.25, rel=0.05)
    assert ENGINE_RUNS[name] in shipped["gpu"]["name"]
    assert shipped["provenance"]["command"].startswith("alpamayo-dflash bench ")
    assert len(shipped["provenance"]["revision"]) == 40
    # The floors' count of weights is the count of the parameters, norms aside.
    layers, head = raw["shape"]["layers"], raw["shape"]["vocab"] * raw["shape"]["hidden"]
    weights = 2 * (layers * TextShape(**raw["shape"]).layer_weights + head)
    assert weights == pytest.approx(raw["weight_bytes"], rel=1e-4)


@pytest.mark.parametrize("name", ENGINE_RUNS)
def test_the_engine_was_lossless_and_its_rounds_allocate_and_wait_for_nothing(name):
    shipped = read_json(RESULTS / f"{name}.json")
    same, other = shipped["lossless"]["one_row_width"], shipped["lossless"]["different_widths"]
    assert same["prompts"] == 200 and same["equal"] == same["texts"] == 400
    assert other["equal"] + other["near_ties"] == other["texts"] and not other["not_near_ties"]
    profile = shipped["profile"]
    assert profile["allocations"] == 0
    calls = profile["host_calls"]
    # One launch and one wait a round; the profiler itself waits once for the device.
    assert calls["cudaGraphLaunch"] == calls["cudaStreamSynchronize"] == profile["rounds"]
    assert not [name for name in calls if "Malloc" in name or "Memcpy" in name]
    copies = [row for row in profile["device_per_round"] if row["name"].startswith("Memcpy DtoH")]
    assert [row["launches"] for row in copies] == [1.0]


def test_the_kernels_medians_follow_from_their_raw_timings():
    shipped = read_json(RESULTS / "kernels_h100.json")
    assert medians(shipped["raw"]) == shipped["medians"]
    found = shipped["medians"]
    # What the kernels are there for.
    for name, rows in found["products_ms"].items():
        assert rows["8"]["project"] < rows["8"]["cublas"], name
    attention = found["attention_36_layers_ms"]["8"]
    assert attention["project"] < attention["flash, prompt part alone"]
    assert 10 * found["choice_ms"]["8"]["project"] < found["choice_ms"]["8"]["sort, uncaptured"]


def test_the_heads_lengths_follow_from_their_counts():
    for name, row in read_json(RESULTS / "heads_tiny.json")["rows"].items():
        for sampled, counts in (("0.6", row["counts_t_0.6"]), ("0", [row["counts_t_0"]])):
            tokens, passes = (sum(each[key] for each in counts) for key in ("tokens_after_first", "passes"))
            assert row[f"acceptance_length_t_{sampled}"] == pytest.approx(tokens / passes, abs=1e-4), name


def test_the_cuda_tests_passed():
    shipped = read_json(RESULTS / "cuda_tests_h100.json")
    assert shipped["failed"] == 0 and shipped["passed"] >= 34


def test_the_studys_figures_and_its_table_in_the_documents_follow_from_its_counts():
    shipped = read_json(RESULTS / "draft_study_tiny.json")
    found = study_figures(shipped)
    assert found == shipped["figures"]
    assert found["ceiling_share_demo_steps"] >= 0.84
    peers = found["best_over_speculators"]["all"]
    assert peers["equal_steps"][1] >= 1.05 and peers["equal_time"][1] >= 1
    assert study_tables(found)[0].markdown() in (RESULTS.parent / "training.md").read_text()


def test_the_data_benchs_figures_follow_from_its_times():
    shipped = read_json(RESULTS / "distill_h200.json")
    assert shipped["figures"] == distill_figures(shipped["raw"])
    texts = shipped["raw"]["texts"]
    assert texts["equal"] + texts["near_ties"] == texts["texts"] == 144 and not texts["not_near_ties"]


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*train_h*.json")), ids=lambda path: path.stem)
def test_the_training_benchs_figures_follow_from_its_times(path):
    shipped = read_json(path)
    assert shipped["figures"] == train_figures(shipped["raw"])
    assert shipped["spread"] == spread(shipped["raw"], train_figures)


def test_the_ratios_of_fp8_follow_from_their_times():
    shipped = read_json(RESULTS / "fp8_h200.json")
    ratios = format_figures(shipped["raw"])
    assert shipped["figures"] == ratios | {
        name: value for name, value in shipped["figures"].items() if name.startswith("needed_gib")
    }
    assert shipped["spread"] == spread(shipped["raw"], format_figures)
    assert shipped["lossless"]["equal"] == shipped["lossless"]["texts"] == 400
    assert shipped["floors"] == format_floors(shipped["raw"])
    bars = {"prompt": 0.68, "vision": 0.82, "verify_8": 0.74, "verify_48": 0.72, "window": 0.75}
    assert all(ratios[f"{part}_over_bf16"] <= bar for part, bar in bars.items())
    assert ratios["expert_over_bf16"] < 1  # 0.72 was asked for, and is not reached


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*window_*.json")), ids=lambda path: path.stem)
def test_a_windows_figures_follow_from_its_raw_timings(path):
    shipped = read_json(path)
    raw = shipped["raw"]
    assert shipped["figures"] == window_figures(raw)
    assert shipped["spread"] == spread(raw, window_figures)
    assert shipped["floors"] == window_floors(raw)
    assert all(len(times) >= 20 for key in ("expert_ms", "expert_call_ms") for times in raw[key].values())
    for samples, operations in raw["expert_operations"].items():
        rows = int(samples) * raw["waypoints"]
        work = expert_work(TextShape(**raw["expert_shape"]), raw["prompt_tokens"], rows)
        assert (work.bytes, work.operations) == (raw["expert_bytes"], operations)
    assert path.stem.split("window_")[1].upper() in shipped["gpu"]["name"]
    assert "bench --window" in shipped["provenance"]["command"]
    assert len(shipped["provenance"]["revision"]) == 40


def test_the_shipped_cards_are_the_results():
    assert read_cards() == cards_of(RESULTS.glob("window_*.json"))
