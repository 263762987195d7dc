"""Prompts: text, images, history and positions, each against a slow or a worked-out reference."""

from __future__ import annotations

import dataclasses
import re

import numpy as np
import pytest
import torch

from alpamayo_dflash import SpeculativeDecoder
from alpamayo_dflash.target.alpamayo import Alpamayo
from alpamayo_dflash.target.config import AlpamayoConfig, HistoryTokenizerConfig
from alpamayo_dflash.target.images import patches, resize, smart_size
from alpamayo_dflash.target.motion import encode_history
from alpamayo_dflash.target.prompt import fuse_history, mrope_positions, render
from alpamayo_dflash.target.vlm import extract_section
from tests.helpers import random_target as factory
from tests.helpers.transformers_versions import image_features, rope_index


@pytest.fixture(scope="module")
def r1(tmp_path_factory: pytest.TempPathFactory) -> Alpamayo:
    return factory.odd_target(tmp_path_factory.mktemp("r1"))


@pytest.fixture(scope="module")
def later(tmp_path_factory: pytest.TempPathFactory) -> Alpamayo:
    return factory.odd_target(tmp_path_factory.mktemp("later"), "1.5")


def config(version: str = "r1") -> AlpamayoConfig:
    return AlpamayoConfig.from_dict(factory.odd_config(version))


def test_text_of_r1():
    text = render(config(), (0, 1), 2)
    image = "<|vision_start|><|image_pad|><|vision_end|>"
    history = "<|traj_history_start|>" + "<|traj_history|>" * 15 + "<|traj_history_end|>"
    assert f"<|im_start|>user\n{image * 4}{history}output the chain-of-thought" in text
    assert text.startswith("<|im_start|>system\nYou are a driving assistant")
    assert text.endswith("future trajectory.<|im_end|>\n<|im_start|>assistant\n<|cot_start|>")


def test_text_of_1_5_names_cameras_and_frames():
    text = render(config("1.5"), (0, 6), 2, route="Turn left in 20 m")
    image = "<|vision_start|><|image_pad|><|vision_end|>"
    frames = f"frame 0 {image}frame 1 {image}"
    assert f"user\nFront left camera: {frames}Front telephoto camera: {frames}<|traj_history_start|>" in text
    assert "<|traj_history_end|><|route_start|>Turn left in 20 m<|route_end|>output the" in text
    assert "camera" not in render(config("1.5"), (0, 6), 2, camera_text=False)


def test_a_question_of_1_5():
    text = render(config("1.5"), (1,), 1, question="Is it red?")
    assert "<|vision_end|><|question_start|>Is it red?<|question_end|><|im_end|>\n" in text
    assert text.endswith("<|im_start|>assistant\n<|answer_start|>")
    assert "traj_history" not in text


@pytest.mark.parametrize("options", [{"camera_text": True}, {"route": "left"}, {"question": "why"}])
def test_r1_refuses_what_only_1_5_knows(options: dict[str, object]):
    with pytest.raises(ValueError, match="this checkpoint is R1"):
        render(config(), (0,), 1, **options)


def test_an_unnamed_camera_is_refused():
    with pytest.raises(ValueError, match="camera 9 has no name"):
        render(config("1.5"), (9,), 1)


def test_prompt_fits_transformers(r1: Alpamayo):
    """Positions, rope delta and image features equal what transformers makes of the same inputs."""
    prompt = r1.prompt(factory.odd_window())
    inputs = r1.transformers_inputs(prompt)
    positions, delta = rope_index(r1.vlm.model, inputs)
    assert torch.equal(prompt.position_ids, positions[:, 0])
    assert prompt.rope_delta == delta.item()
    assert prompt.key == "clip@5"
    assert len(prompt) == prompt.input_ids.shape[0]
    assert (prompt.input_ids == r1.special.image_pad).sum() == prompt.image_grid_thw.prod(-1).sum() // 4
    with torch.no_grad():
        embeddings = r1.embed(prompt)
        features, _ = image_features(
            r1.vlm.model.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"])
        )
    # Equal images go through the tower together, so rounding differs from transformers' loop over images.
    seen = embeddings.hidden[embeddings.image_positions]
    torch.testing.assert_close(seen, torch.cat(features), atol=2e-5, rtol=1e-5)


def test_cameras_are_sorted(r1: Alpamayo):
    window = factory.odd_window((0, 1, 6))
    shuffled = dataclasses.replace(window, cameras=(6, 0, 1), frames=window.frames[[2, 0, 1]])
    assert torch.equal(r1.prompt(window).pixel_values, r1.prompt(shuffled).pixel_values)


def test_history_is_written_over_its_placeholders(r1: Alpamayo):
    prompt, special = r1.prompt(factory.odd_window()), r1.special
    assert (prompt.input_ids != special.traj_history).all()
    start = prompt.input_ids.tolist().index(special.traj_history_start)
    ids = prompt.input_ids[start + 1 : start + 16]
    window = factory.odd_window()
    history = torch.from_numpy(window.ego_history_xyz), torch.from_numpy(window.ego_history_rot)
    bins = encode_history(*history, r1.config.history_tokenizer)
    assert torch.equal(ids, bins + factory.BASE + factory.FUTURE_BINS)
    assert prompt.input_ids[start + 16] == special.traj_history_end


def test_windows_that_do_not_fit_are_refused(r1: Alpamayo):
    window = factory.odd_window()
    bad = {
        "15 history placeholders, but the history gives 12": {
            "ego_history_xyz": window.ego_history_xyz[1:],
            "ego_history_rot": window.ego_history_rot[1:],
        },
        "must be": {"ego_history_rot": window.ego_history_rot[1:]},
        "frames are float64": {"frames": window.frames.astype(np.float64)},
        "2 cameras, but frames of 3": {"cameras": (0, 1)},
        "frames are uint8": {"frames": window.frames[:, :0]},
    }
    for message, changes in bad.items():
        with pytest.raises(ValueError, match=message):
            r1.prompt(dataclasses.replace(window, **changes))


def test_fusing_counts():
    ids = torch.tensor([5, 9, 9, 1])
    assert fuse_history(ids, torch.tensor([7, 8]), 9).tolist() == [5, 7, 8, 1]
    assert ids.tolist() == [5, 9, 9, 1]
    with pytest.raises(ValueError, match="2 history placeholders, but the history gives 3"):
        fuse_history(ids, torch.tensor([7, 8, 6]), 9)


def test_positions_of_one_image():
    pad = 0
    ids = torch.tensor([1, 2, pad, pad, pad, pad, pad, pad, 3])
    positions, delta = mrope_positions(ids, torch.tensor([[1, 4, 6]]), image_pad=pad, merge=2)
    assert positions.tolist() == [
        [0, 1, 2, 2, 2, 2, 2, 2, 5],
        [0, 1, 2, 2, 2, 3, 3, 3, 5],
        [0, 1, 2, 3, 4, 2, 3, 4, 5],
    ]
    assert delta == 6 - 9


def test_release_size_positions():
    """Sixteen images of 10 by 18 tokens: rope_delta is -2592, whatever the text (specification 5)."""
    image = [1, *[0] * 180, 2]
    ids = torch.tensor([3] * 20 + image * 16 + [3] * 74)
    grid = torch.tensor([[1, 20, 36]] * 16)
    positions, delta = mrope_positions(ids, grid, image_pad=0, merge=2)
    assert len(ids) == 3006
    assert delta == -2592
    assert positions[:, -1].tolist() == [3005 - 2592] * 3


def test_release_size_resize():
    size = smart_size(1080, 1920, factor=32, min_pixels=163840, max_pixels=196608)
    assert size == (320, 576)
    with pytest.raises(ValueError, match="aspect ratio"):
        smart_size(1, 201, factor=32, min_pixels=1, max_pixels=9999)


def test_patches_against_loops():
    images = torch.randint(0, 256, (2, 3, 8, 12), dtype=torch.uint8, generator=torch.manual_seed(0))
    values, grid = patches(images, patch=2, merge=2, temporal=2)
    assert grid.tolist() == [[1, 4, 6]] * 2
    expected = [
        torch.stack([images[n, :, y : y + 2, x : x + 2]] * 2, dim=1).flatten()
        for n in range(2)
        for block_y in range(2)
        for block_x in range(3)
        for y in (4 * block_y, 4 * block_y + 2)
        for x in (4 * block_x, 4 * block_x + 2)
    ]
    assert torch.equal(values, (torch.stack(expected).float() - 127.5) / 127.5)


def test_resize_keeps_uint8_and_its_range():
    images = torch.zeros(1, 3, 40, 40, dtype=torch.uint8)
    images[..., 20:] = 255
    out = resize(images, 16, 16)
    assert out.dtype == torch.uint8
    assert out.shape == (1, 3, 16, 16)
    assert out.min() == 0
    assert out.max() == 255
    assert torch.equal(resize(images, 40, 40), images)


def test_a_zero_step_is_the_even_middle_bin():
    xyz = torch.zeros(3, 3)
    rot = torch.eye(3).expand(3, 3, 3)
    assert encode_history(xyz, rot, HistoryTokenizerConfig()).tolist() == [500] * 9


@pytest.mark.parametrize(
    ("text", "name", "expected"),
    [
        ("a <|cot_end|> b <|cot_end|>", "cot", "a"),
        ("x<|cot_start|>y<|cot_start|> z<|cot_end|>", "cot", "z"),
        ("no end", "cot", ""),
        ("a<|cot_end|><|answer_start|>b<|answer_end|>", "answer", "b"),
    ],
)
def test_sections(text: str, name: str, expected: str):
    assert extract_section(text, name) == expected


def test_coc_text_of_ids(r1: Alpamayo):
    ids = r1.tokenizer.encode(
        "Stop for the light.<|cot_end|><|traj_future_start|>", add_special_tokens=False
    ).ids
    assert r1.coc_text(ids) == "Stop for the light."
    assert r1.coc_text(ids[:-2]) == ""


def test_prompt_of_1_5_has_the_named_text(later: Alpamayo):
    prompt = later.prompt(factory.odd_window(), route="left")
    text = later.tokenizer.decode(prompt.input_ids.tolist(), skip_special_tokens=False)
    assert "Front left camera: frame 0 <|vision_start|>" in text
    assert "<|route_start|>left<|route_end|>output" in text
    answer = later.prompt(factory.odd_window(), question="Is it red?")
    assert answer.input_ids[-1] == later.special.answer_start


CONTROL = ["<|image_pad|>", "<|im_end|>", "<|traj_history|>", "<|cot_end|>", "<i3>", "<|video_pad|>"]


@pytest.mark.parametrize("option", ["route", "question"])
@pytest.mark.parametrize("token", CONTROL)
def test_a_users_text_writes_no_control_token(later: Alpamayo, option: str, token: str):
    with pytest.raises(ValueError, match=f"{option} .* holds the control token {re.escape(token)}"):
        later.prompt(factory.odd_window(), **{option: f"Turn left {token} now"})


@pytest.mark.parametrize("text", ["", "<|", "<|image_pad", "< |im_end| >", "<|im_end>", "<i 3>", "ü 😀"])
def test_a_users_text_is_text(later: Alpamayo, text: str):
    plain = later.tokenizer.encode(text, add_special_tokens=False).ids
    start, end = (later.tokenizer.token_to_id(f"<|route_{side}|>") for side in ("start", "end"))
    ids = later.prompt(factory.odd_window(), route=text).input_ids.tolist()
    assert ids[ids.index(start) + 1 : ids.index(end)] == plain


def test_a_question_asks_for_no_trajectory(later: Alpamayo):
    prompt = later.prompt(factory.odd_window(), question="Is it red?")
    assert len(prompt.ego_history_xyz) == 0
    decoder = SpeculativeDecoder(later)
    assert decoder.generate(prompt, max_new_tokens=3).pred_xyz is None
    with pytest.raises(ValueError, match="has no ego history"):
        decoder.generate(prompt, trajectories=True)
    with pytest.raises(ValueError, match="route 'left' is given with a question"):
        later.prompt(factory.odd_window(), question="Is it red?", route="left")
