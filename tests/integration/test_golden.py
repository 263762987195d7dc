"""Parity with recorded numbers of the official code, item by item (tolerances: the fixtures' README).

ALPAMAYO_GOLDEN names the folder that holds the fixture sets; the default lies beside the checkout. Nothing
here depends on a set's sizes: layers, heads, bins, steps, way-points, cameras, frames, history points.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional

from alpamayo_dflash.clips.window import Window
from alpamayo_dflash.decode.config import DecodeConfig
from alpamayo_dflash.decode.decoder import SpeculativeDecoder
from alpamayo_dflash.target.alpamayo import Alpamayo, time_grid
from alpamayo_dflash.target.checkpoint import OPTIONAL_TENSORS
from alpamayo_dflash.target.config import HistoryTokenizerConfig
from alpamayo_dflash.target.expert import ActionPrefix
from alpamayo_dflash.target.images import smart_size
from alpamayo_dflash.target.motion import (
    action_of_tokens,
    decode_history,
    encode_history,
    initial_speed,
    tokens_of_action,
)
from alpamayo_dflash.target.prompt import CAMERA_TEXT, Prompt, PromptEmbeddings, build_prompt, render
from alpamayo_dflash.target.qwen3 import run_layers

GIVEN = os.environ.get("ALPAMAYO_GOLDEN")
ROOT = Path(GIVEN) if GIVEN else Path(__file__).resolve().parents[3] / "shared" / "golden"
# ROOT holds sets, or is one.
FOUND = [*ROOT.glob("checkpoint/config.json"), *ROOT.glob("*/checkpoint/config.json")]
SETS = sorted(path.parent.parent for path in FOUND)
CASES = [path.with_suffix("") for folder in SETS for path in sorted((folder / "cases").glob("*.json"))]
SINGLE = [case for case in CASES if not case.name.endswith("_multi")]
MULTI = [case for case in CASES if case.name.endswith("_multi")]

pytestmark = pytest.mark.skipif(not SETS and not GIVEN, reason=f"no golden fixtures under {ROOT}")


def case_id(case: Path) -> str:
    return f"{case.parent.parent.name}-{case.name}"


single = pytest.mark.parametrize("path", SINGLE, ids=case_id)
multi = pytest.mark.parametrize("path", MULTI, ids=case_id)
each_set = pytest.mark.parametrize("folder", SETS, ids=lambda folder: folder.name)


def close(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    assert actual.shape == expected.shape
    difference = (actual - expected).abs().max().item()
    assert difference <= tolerance, f"largest difference {difference:.2e}, allowed {tolerance:.0e}"


def equal(actual: Tensor, expected: Tensor) -> None:
    assert actual.shape == expected.shape
    assert torch.equal(actual.long(), expected.long()), f"{int((actual != expected).sum())} values differ"


@functools.cache
def load_target(folder: Path) -> Alpamayo:
    return Alpamayo.from_pretrained(folder / "checkpoint")


@dataclass(frozen=True)
class Case:
    """A recorded case and what the target makes of it."""

    target: Alpamayo
    facts: dict[str, Any]
    recorded: dict[str, Tensor]
    window: Window
    prompt: Prompt
    embeddings: PromptEmbeddings


@functools.cache
def load_case(path: Path) -> Case:
    target = load_target(path.parent.parent)
    facts = json.loads(path.with_suffix(".json").read_text())
    recorded = load_file(path.with_suffix(".safetensors"))
    cameras, frames = facts["n_cameras"], facts["frames_per_camera"]
    height, width = facts["frame_hw"]
    image = np.array(Image.open(path.parent / facts["frames_uint8_png"]).convert("RGB"))
    window = Window(
        clip_id=path.name,
        t0_us=0,
        cameras=camera_indices(facts),
        frames=image.reshape(cameras, frames, height, width, 3),
        ego_history_xyz=recorded["ego_history_xyz"][0, 0].numpy(),
        ego_history_rot=recorded["ego_history_rot"][0, 0].numpy(),
    )
    config = dataclasses.replace(
        target.config, min_pixels=facts["min_pixels"], max_pixels=facts["max_pixels"]
    )
    prompt = build_prompt(
        window, config, target.tokenizer, target.special, target.patch_shape, **prompt_options(facts)
    )
    with torch.no_grad():
        embeddings = target.embed(prompt)
    return Case(target, facts, recorded, window, prompt, embeddings)


def camera_indices(facts: dict[str, Any]) -> tuple[int, ...]:
    """The cameras that the prompt names; R1's names none, and there only the order counts."""
    named = [index for index, name in CAMERA_TEXT.items() if f"{name}: " in facts["prompt_text"]]
    return tuple(facts.get("camera_indices") or named or range(facts["n_cameras"]))


def prompt_options(facts: dict[str, Any]) -> dict[str, Any]:
    route = re.search(r"<\|route_start\|>(.*?)<\|route_end\|>", facts["prompt_text"], re.DOTALL)
    options: dict[str, Any] = {"camera_text": "frame 0 <|vision_start|>" in facts["prompt_text"]}
    return options | ({"route": route[1]} if route else {})


@dataclass(frozen=True)
class Pass:
    """One causal pass over the prompt and given ids: every layer's output, and the cache."""

    hidden: Tensor  # [L + 1, P + G, C]
    final: Tensor  # [P + G, C]
    keys: Tensor  # [L, P + G, K, D]
    values: Tensor


@torch.no_grad()
def run(case: Case, token_ids: Tensor) -> Pass:
    target, prompt, embeddings = case.target, case.prompt, case.embeddings
    rows = len(prompt) + len(token_ids)
    own = (torch.arange(len(prompt), rows) + prompt.rope_delta).expand(3, -1)
    hidden = torch.cat((embeddings.hidden, functional.embedding(token_ids, target.embedding)))
    states, keys, values = [hidden], [], []
    deepstack = target.deepstack_after_layer(embeddings)

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        keys.append(k)
        values.append(v)
        groups = q.shape[1] // k.shape[1]
        q_HRD, k_HRD, v_HRD = (
            x.transpose(0, 1) for x in (q, k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1))
        )
        return functional.scaled_dot_product_attention(q_HRD, k_HRD, v_HRD, is_causal=True).transpose(0, 1)

    def after_layer(layer: int, out: Tensor) -> Tensor:
        states.append(deepstack(layer, out))
        return states[-1]

    rotary = target.rotary(torch.cat((prompt.position_ids, own), dim=1))
    out = run_layers(target.text_layers, hidden, rotary, attend, after_layer)
    return Pass(torch.stack(states), target.final_norm(out), torch.stack(keys), torch.stack(values))


def action_prefix(case: Case, sequences: Tensor) -> ActionPrefix:
    """The cache that the expert reads after sequences int64 [S, P + G], and how far it sees into it."""
    prompt_length, kept = len(case.prompt), sequences.shape[1] - 1
    passes = [run(case, row[prompt_length:kept]) for row in sequences]
    ends = sequences == case.target.special.traj_future_start
    offsets = torch.where(ends.any(1), ends.int().argmax(1) + 1, sequences.shape[1])
    return ActionPrefix(
        keys=torch.stack([p.keys for p in passes], dim=1),
        values=torch.stack([p.values for p in passes], dim=1),
        lengths=offsets.clamp(max=kept),
        positions=offsets + case.prompt.rope_delta,
    )


@functools.cache
def whole_pass(path: Path) -> Pass:
    case = load_case(path)
    return run(case, case.recorded["generated_ids"][0])


@functools.cache
def single_prefix(path: Path) -> ActionPrefix:
    case = load_case(path)
    return action_prefix(case, torch.cat((case.prompt.input_ids, case.recorded["generated_ids"][0]))[None])


def test_fixtures_are_found():
    assert SETS, f"ALPAMAYO_GOLDEN is {GIVEN!r}, but no checkpoint/config.json lies in a folder of it"
    assert SINGLE


# Tokens.


@each_set
def test_token_ids(folder: Path):
    target, tokens = load_target(folder), json.loads((folder / "tokens.json").read_text())
    assert target.vocab_size == tokens["vocab_size"] == len(target.embedding) == len(target.head)
    assert target.traj_ids.start == tokens["traj_token_start_idx"]
    assert target.config.history_token_start_idx == tokens["hist_token_start_idx"]
    assert target.special.pad == tokens["pad_token_id"]
    assert target.special.eos == tokens["eos_token_id"]
    for name, index in tokens["special_token_ids"].items():
        assert target.tokenizer.token_to_id(f"<|{name}|>") == index, name
    for name, index in tokens["qwen_special"].items():
        assert target.tokenizer.token_to_id(name) == index, name
    for role, index in tokens["traj_token_ids"].items():
        name = {"history": "traj_history", "future": "traj_future"}.get(role, f"traj_{role}")
        assert target.tokenizer.token_to_id(f"<|{name}|>") == index, role


@each_set
def test_token_probes(folder: Path):
    target, tokens = load_target(folder), json.loads((folder / "tokens.json").read_text())
    for text, ids in tokens["probes"].items():
        assert target.tokenizer.encode(text, add_special_tokens=False).ids == ids, text


@each_set
def test_every_recorded_tensor_is_loaded(folder: Path):
    recorded = json.loads((folder / "state_dict.json").read_text())
    state = load_target(folder).state_dict()
    assert {name: list(state[name].shape) for name in recorded} == {
        name: shape for name, (shape, _) in recorded.items()
    }
    assert state.keys() - recorded.keys() <= OPTIONAL_TENSORS  # 1.5 does not store its buffers


# Prompt.


@single
def test_prompt_text(path: Path):
    case = load_case(path)
    frames = case.window.frames.shape[1]
    text = render(case.target.config, case.window.cameras, frames, **prompt_options(case.facts))
    assert text == case.facts["prompt_text"]


@single
def test_fused_ids(path: Path):
    case = load_case(path)
    equal(case.prompt.input_ids, case.recorded["input_ids"][0])
    placeholders = case.recorded["input_ids_unfused"][0] == case.target.special.traj_history
    same = case.prompt.input_ids == case.recorded["input_ids_unfused"][0]
    assert torch.equal(same, ~placeholders)


@single
def test_positions(path: Path):
    case = load_case(path)
    equal(case.prompt.position_ids, case.recorded["position_ids"][:, 0])
    assert case.prompt.rope_delta == case.facts["rope_delta"] == case.recorded["rope_deltas"].item()
    start, count = len(case.prompt), case.recorded["generated_ids"].shape[1]
    own = torch.arange(start, start + count) + case.prompt.rope_delta
    equal(own.expand(3, -1), case.recorded["gen_position_ids"][:, 0])


@single
def test_pixel_values(path: Path):
    case = load_case(path)
    equal(case.prompt.image_grid_thw, case.recorded["image_grid_thw"])
    scaled = (case.recorded["pixel_u8"].float() - 127.5) / 127.5
    expected = scaled.unsqueeze(2).expand(-1, -1, case.target.patch_shape.temporal, -1, -1).flatten(1)
    assert torch.equal(case.prompt.pixel_values, expected)
    if "pixel_values_image0" in case.recorded:
        first = case.recorded["pixel_values_image0"]
        assert torch.equal(case.prompt.pixel_values[: len(first)], first)


# The vision tower and the text model.


@single
def test_vision_features(path: Path):
    case = load_case(path)
    close(case.embeddings.hidden[case.embeddings.image_positions], case.recorded["vision_embeds"], 1e-5)
    close(case.embeddings.deepstack, case.recorded["deepstack"], 1e-5)


@single
def test_prompt_states_after_every_layer(path: Path):
    case, done = load_case(path), whole_pass(path)
    prompt = slice(len(case.prompt))
    close(done.hidden[:, prompt], case.recorded["prompt_hidden"], 1e-4)
    close(done.final[prompt], case.recorded["prompt_final_norm"], 1e-4)


@single
def test_response_states_after_every_layer(path: Path):
    case, done = load_case(path), whole_pass(path)
    response = slice(len(case.prompt), None)
    close(done.hidden[:, response], case.recorded["gen_hidden"], 1e-4)
    close(done.final[response], case.recorded["gen_final_norm"], 1e-4)


@single
def test_logits(path: Path):
    case, done = load_case(path), whole_pass(path)
    logits = case.target.logits(done.final[len(case.prompt) - 1 : -1]).detach()
    close(logits, case.recorded["gen_logits"], 1e-4)
    close(logits[0], case.recorded["last_logits"], 1e-4)


@single
def test_greedy_ids(path: Path):
    case, done = load_case(path), whole_pass(path)
    logits = case.target.logits(done.final[len(case.prompt) - 1 : -1]).detach()
    unmasked = logits.argmax(-1)
    logits[:, case.target.traj_ids.start : case.target.traj_ids.stop] = -torch.inf
    equal(logits.argmax(-1), case.recorded["generated_ids"][0])
    # The recorded logits are not masked: forgetting the mask would be visible in these steps.
    changed = (unmasked != logits.argmax(-1)).sum().item()
    assert changed == case.facts["steps_where_mask_changes_argmax"]


@single
def test_texts(path: Path):
    case = load_case(path)
    ids = case.recorded["generated_ids"][0].tolist()
    text = case.target.tokenizer.decode(ids, skip_special_tokens=False)
    assert text == case.facts["generated_text"]
    assert case.target.coc_text(ids) == case.facts["cot"]
    for name in ("cot", "meta_action", "answer"):
        assert case.target.section([*case.prompt.input_ids.tolist(), *ids], name) == case.facts[name]


@single
def test_transformers_generate_gives_the_same_ids(path: Path):
    case = load_case(path)
    inputs = case.target.transformers_inputs(case.prompt)
    limit = case.facts["max_new_tokens"]
    special = case.target.special
    stops = {"eos_token_id": special.stops, "pad_token_id": special.pad}
    masked = list(case.target.traj_ids)
    out = case.target.vlm.generate(
        **inputs, **stops, suppress_tokens=masked, do_sample=False, max_new_tokens=limit
    )
    generated = out[0, len(case.prompt) :].tolist()
    recorded = case.recorded["generated_ids"][0].tolist()
    stop = special.traj_future_start
    assert generated == (recorded[: recorded.index(stop) + 1] if stop in recorded else recorded[:limit])
    assert case.target.vlm.model.rope_deltas.item() == case.prompt.rope_delta


# The expert.


def check_prefix(prefix: ActionPrefix, recorded: dict[str, Tensor], waypoints: int) -> None:
    positions = prefix.positions[:, None] + torch.arange(waypoints)
    equal(positions.expand(3, -1, -1), recorded["expert_position_ids"])
    visible = torch.arange(prefix.keys.shape[2]) < prefix.lengths[:, None]
    visible = functional.pad(visible, (0, waypoints), value=True)
    equal(visible, recorded["expert_attention_mask"][:, 0] == 0)


@single
def test_expert_positions_and_mask(path: Path):
    case, prefix = load_case(path), single_prefix(path)
    assert prefix.keys.shape[2] == case.facts["kv_len_before_actions"]
    check_prefix(prefix, case.recorded, case.target.n_waypoints)


@single
def test_velocity_at_every_recorded_step(path: Path):
    check_velocities(load_case(path), single_prefix(path), load_case(path).recorded)


@torch.no_grad()
def check_velocities(case: Case, prefix: ActionPrefix, recorded: dict[str, Tensor]) -> None:
    steps = zip(recorded["step_t"], recorded["step_x"], recorded["step_velocity"], strict=True)
    for t, x, velocity in steps:
        close(case.target.velocity(x, t.expand(len(x)), prefix), velocity, 3e-5)


@single
@torch.no_grad()
def test_expert_states_at_the_first_step(path: Path):
    case, prefix = load_case(path), single_prefix(path)
    target, recorded = case.target, case.recorded
    x, t = recorded["step_x"][0], recorded["step_t"][0]
    states: list[Tensor] = []

    def after_layer(layer: int, hidden: Tensor) -> Tensor:
        states.append(hidden[0])
        return hidden

    target.velocity(x, t.expand(1), prefix, after_layer)
    embedded = target.action_in_proj(x, t.expand(1))
    close(embedded, recorded["expert_embeds_step0"], 5e-5)
    close(torch.stack([embedded[0], *states]), recorded["expert_hidden_step0"], 5e-5)
    close(target.expert.norm(states[-1])[None], recorded["expert_out_step0"], 5e-5)


def check_rollout(case: Case, prefix: ActionPrefix, recorded: dict[str, Tensor], steps: int) -> None:
    trace: list[tuple[Tensor, Tensor, Tensor]] = []
    action = case.target.denoise(
        recorded["noise"], prefix, num_steps=steps, observe=lambda step, t, x, v: trace.append((t, x, v))
    )
    assert torch.equal(torch.stack([t for t, _, _ in trace]), recorded["step_t"])
    close(torch.stack([x for _, x, _ in trace]), recorded["step_x"], 3e-4)
    close(torch.stack([v for _, _, v in trace]), recorded["step_velocity"], 3e-4)
    close(action, recorded["action"], 5e-5)
    single_case = case.recorded
    history = single_case["ego_history_xyz"][0, 0], single_case["ego_history_rot"][0, 0]
    xyz, rot = case.target.trajectory(action, *history)
    close(xyz[None, None], recorded["pred_xyz"], 1e-4)
    close(rot[None, None], recorded["pred_rot"], 1e-5)


@single
def test_free_run_to_the_trajectory(path: Path):
    case = load_case(path)
    check_rollout(case, single_prefix(path), case.recorded, case.facts["n_euler_steps"])


@single
def test_decoder_from_the_prompt_to_the_path(path: Path):
    case, recorded = load_case(path), load_case(path).recorded
    steps = {"num_inference_steps": case.facts["n_euler_steps"]}
    target = copy.copy(case.target)
    target.config = dataclasses.replace(target.config, **steps)
    decoder = SpeculativeDecoder(target, config=DecodeConfig(prompt_capacity=len(case.prompt)))
    limit = case.facts["max_new_tokens"]
    got = decoder.generate(case.prompt, temperature=0.0, max_new_tokens=limit, action_noise=recorded["noise"])
    ids, stop = recorded["generated_ids"][0].tolist(), case.target.special.traj_future_start
    assert got.token_ids == [ids[: ids.index(stop) + 1] if stop in ids else ids]
    assert got.coc == [case.facts["cot"]]
    assert got.pred_xyz is not None and got.pred_rot is not None
    close(got.pred_xyz[None, None], recorded["pred_xyz"], 1e-4)
    close(got.pred_rot[None, None], recorded["pred_rot"], 1e-5)


@multi
def test_several_samples_of_one_prompt(path: Path):
    case = load_case(path.with_name(path.name.removesuffix("_multi")))
    facts = json.loads(path.with_suffix(".json").read_text())
    recorded = load_file(path.with_suffix(".safetensors"))
    prefix = action_prefix(case, recorded["sequences_raw"])
    assert prefix.keys.shape[2] == facts["kv_len_before_actions"]
    check_prefix(prefix, recorded, case.target.n_waypoints)
    check_velocities(case, prefix, recorded)
    check_rollout(case, prefix, recorded, len(recorded["step_t"]))
    texts = [case.target.coc_text(row[len(case.prompt) :].tolist()) for row in recorded["sequences_padded"]]
    assert texts == facts["cot"]


# Units.


@each_set
def test_history_tokenizer(folder: Path):
    unit = load_file(folder / "units" / "delta_tokenizer.safetensors")
    configs = {
        "default": HistoryTokenizerConfig(),
        "bins41": HistoryTokenizerConfig(num_bins=41),
        "range": HistoryTokenizerConfig(256, (-2.0, -1.0, -0.5), (6.0, 1.0, 0.5)),
        "set": load_target(folder).config.history_tokenizer,
        "yaw": HistoryTokenizerConfig(predict_yaw=True),
    }
    for name, config in configs.items():
        bins = encode_history(unit["xyz"], unit["rot"], config)
        equal(bins, unit[f"tokens_{name}"])
        xyz, rot = decode_history(bins, config)
        close(xyz, unit[f"decoded_xyz_{name}"], 1e-4)
        if f"decoded_rot_{name}" in unit:
            close(rot, unit[f"decoded_rot_{name}"], 1e-4)


@each_set
def test_actions_to_trajectory(folder: Path):
    unit, space = action_space_unit(folder)
    history = unit["hist_xyz"], unit["hist_rot"]
    close(initial_speed(*history, space.config), unit["v0"], 1e-5)
    xyz, rot = space.to_trajectory(unit["action"], *history)
    close(xyz, unit["pred_xyz"], 1e-4)
    close(rot, unit["pred_rot"], 1e-5)
    equal(space.within_bounds(unit["action"]), unit["within_bounds"])


@each_set
def test_trajectory_to_actions(folder: Path):
    unit, space = action_space_unit(folder)
    history = unit["hist_xyz"], unit["hist_rot"]
    action = space.from_trajectory(unit["future_xyz"], unit["future_rot"], *history)
    close(action, unit["future_action"], 3e-4)
    close(action.double(), unit["future_action_f64"].double(), 3e-4)
    xyz, _ = space.to_trajectory(unit["future_action"], *history)
    close(xyz, unit["future_action_pred_xyz"], 1e-4)


@each_set
def test_future_tokens(folder: Path):
    unit, space = action_space_unit(folder)
    config = load_target(folder).config.future_tokenizer
    equal(tokens_of_action(unit["future_action"], config), unit["future_tokens"])
    action = action_of_tokens(unit["future_tokens"], config)
    xyz, _ = space.to_trajectory(action, unit["hist_xyz"], unit["hist_rot"])
    close(xyz, unit["future_tokens_decoded_xyz"], 1e-4)


def action_space_unit(folder: Path):
    return load_file(folder / "units" / "action_space.safetensors"), load_target(folder).action_space


@each_set
@torch.no_grad()
def test_action_projection(folder: Path):
    target, unit = load_target(folder), load_file(folder / "units" / "action_proj.safetensors")
    t = unit["t"].flatten()
    close(target.action_in_proj.sinus[0](unit["x"][..., 0]), unit["fourier_x0"], 2e-5)
    close(target.action_in_proj.timestep_fourier_encoder(t)[:, None], unit["fourier_t"], 2e-5)
    close(target.action_in_proj(unit["x"], t), unit["out"], 2e-5)
    close(target.action_out_proj(unit["out"]), unit["action_out"], 2e-5)


@each_set
def test_time_grid(folder: Path):
    for name, grid in load_file(folder / "units" / "time_grid.safetensors").items():
        assert torch.equal(time_grid(int(name.removeprefix("grid_"))), grid), name


@each_set
def test_resize_sizes(folder: Path):
    shape = load_target(folder).patch_shape
    for entry in json.loads((folder / "units" / "resize.json").read_text()):
        limits = {"min_pixels": entry["min_pixels"], "max_pixels": entry["max_pixels"]}
        size = smart_size(entry["h"], entry["w"], factor=shape.patch * shape.merge, **limits)
        assert size == (entry["out_h"], entry["out_w"]), entry
        grid_h, grid_w = size[0] // shape.patch, size[1] // shape.patch
        assert [1, grid_h, grid_w] == entry["grid"]
        assert grid_h * grid_w // shape.merge**2 == entry["tokens"]
