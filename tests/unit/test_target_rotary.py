"""The rotary settings in the spellings of transformers 4.57 and 5, and configs that both versions load."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Qwen3VLConfig

from alpamayo_dflash.standins.blueprint import SHAPES, vlm_config
from alpamayo_dflash.target.alpamayo import Alpamayo
from alpamayo_dflash.target.checkpoint import SHIPPED
from alpamayo_dflash.target.rotary import Rope, rope_settings, rope_values, with_rope
from tests.helpers import random_target as factory

GROUP = {"rope_type": "default", "mrope_section": [4, 2, 2], "mrope_interleaved": True}
OLD = {"rope_theta": 12345, "rope_scaling": GROUP}
NEW = {"rope_parameters": GROUP | {"rope_theta": 12345}}
ROPE = Rope(12345.0, (4, 2, 2))
SPELLINGS = pytest.mark.parametrize("spelling", [OLD, NEW], ids=["4.57", "5"])


def without(spelling: dict[str, Any], key: str) -> dict[str, Any]:
    return {
        name: {k: v for k, v in value.items() if k != key} if isinstance(value, dict) else value
        for name, value in spelling.items()
        if name != key
    }


def changed(spelling: dict[str, Any], key: str, value: Any) -> dict[str, Any]:
    """With a value where that spelling has the key."""
    if key in spelling:
        return spelling | {key: value}
    ((group, values),) = ((name, each) for name, each in spelling.items() if isinstance(each, dict))
    return spelling | {group: values | {key: value}}


def as_5_writes(raw: dict[str, Any]) -> dict[str, Any]:
    """A Qwen3-VL config.json as transformers 5 saves it, which has no older spelling beside its own."""
    text = dict(raw["text_config"])
    group = {**text.pop("rope_scaling"), "rope_theta": text.pop("rope_theta")}
    vision = raw["vision_config"] | {
        "model_type": "qwen3_vl_vision",
        "rope_parameters": {"rope_theta": 10000.0, "rope_type": "axial"},
    }
    return raw | {
        "text_config": text | {"rope_parameters": group, "dtype": "float32", "pad_token_id": None},
        "vision_config": vision,
        "dtype": "float32",
        "transformers_version": "5.17.0",
    }


@SPELLINGS
def test_both_spellings_say_the_same(spelling: dict[str, Any]) -> None:
    assert rope_settings(spelling) == ROPE
    assert rope_settings(OLD | NEW) == ROPE
    assert rope_values(spelling, "x") == vars(ROPE)


@SPELLINGS
@pytest.mark.parametrize(
    ("key", "default"),
    [("mrope_section", (24, 20, 20)), ("rope_type", "default"), ("mrope_interleaved", True)],
)
def test_what_is_missing_is_what_transformers_assumes(
    spelling: dict[str, Any], key: str, default: Any
) -> None:
    for given in (without(spelling, key), changed(spelling, key, None)):
        assert getattr(rope_settings(given), key) == default
        assert key not in rope_values(given, "x")


@SPELLINGS
def test_a_missing_base_is_an_error(spelling: dict[str, Any]) -> None:
    for given in (without(spelling, "rope_theta"), changed(spelling, "rope_theta", None), {}):
        with pytest.raises(ValueError, match=r"^a/config\.json: no rope_theta"):
            rope_settings(given, "a/config.json")


@SPELLINGS
@pytest.mark.parametrize(
    ("key", "value"),
    [
        *[("rope_theta", value) for value in ("1e6", 0, -1.0, float("nan"), float("inf"), True, [1e6], {})],
        *[("mrope_section", value) for value in (24, [4, 2], [4, 2, 2, 0], [4, 2, 2.0], [4, -2, 2], "424")],
        *[("mrope_section", [4, True, 2]), ("rope_type", 1), ("rope_type", ["default"])],
        *[("mrope_interleaved", value) for value in (0, "true", [])],
    ],
    ids=str,
)
def test_a_value_of_another_kind_is_named(spelling: dict[str, Any], key: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"^a file: .*{key} is .*; it must be"):
        rope_settings(changed(spelling, key, value), "a file")


@pytest.mark.parametrize("group", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize("value", ["default", [1], 3, []], ids=str)
def test_a_group_of_another_kind_is_named(group: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"x: {group} is .* it must be an object"):
        rope_settings(OLD | {group: value}, "x")


@pytest.mark.parametrize(
    ("key", "value"),
    [("rope_theta", 5e6), ("mrope_section", [8, 4, 4]), ("rope_type", "yarn"), ("mrope_interleaved", False)],
)
def test_places_that_disagree_are_refused(key: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"rope_parameters\.{key} is .*depends on the version"):
        rope_settings(OLD | changed(NEW, key, value))


@pytest.mark.parametrize(
    ("group", "expected"),
    [
        ({"type": "mrope"}, "default"),
        ({"rope_type": "mrope"}, "default"),
        ({"type": "linear", "factor": 2.0}, "linear"),
        ({"type": "mrope", "rope_type": "yarn"}, "yarn"),
        ({"type": "yarn", "rope_type": "default"}, "default"),
    ],
    ids=str,
)
def test_names_of_the_type(group: dict[str, Any], expected: str) -> None:
    assert rope_settings({"rope_theta": 1e4, "rope_scaling": group}).rope_type == expected


@SPELLINGS
def test_what_is_written_reads_the_same(spelling: dict[str, Any]) -> None:
    written = with_rope(spelling | {"head_dim": 16}, ROPE)
    assert rope_settings(json.loads(json.dumps(written))) == ROPE
    assert written["head_dim"] == 16
    assert set(written) == {"head_dim", "rope_theta", "rope_scaling"}


@SPELLINGS
def test_a_config_object_is_read(spelling: dict[str, Any]) -> None:
    """The object of the version that runs, from the older spelling, which both read."""
    raw = factory_config(with_rope(spelling, ROPE))
    assert rope_settings(Qwen3VLConfig.from_dict(raw).text_config) == ROPE


def factory_config(rope: dict[str, Any]) -> dict[str, Any]:
    raw = vlm_config(SHAPES["small"])
    text = {key: value for key, value in raw["text_config"].items() if not key.startswith("rope")}
    return raw | {"text_config": text | rope}


def test_our_own_configs_are_in_the_older_spelling(tmp_path: Path) -> None:
    factory.odd_target(tmp_path / "built").save_pretrained(tmp_path / "saved")
    files = [json.loads((path / "vlm" / "config.json").read_text()) for path in (SHIPPED, tmp_path / "saved")]
    for raw in (*files, vlm_config(SHAPES["r1-10b"])):
        text = raw["text_config"]
        assert "rope_parameters" not in text
        assert text["rope_theta"] > 0
        assert text["rope_scaling"]["rope_type"] == "default"
        rope = rope_settings(text)
        assert rope_settings(Qwen3VLConfig.from_dict(raw).text_config) == rope


def test_a_checkpoint_whose_config_5_wrote_is_the_same_target(tmp_path: Path) -> None:
    built = factory.odd_target(tmp_path / "built")
    built.save_pretrained(tmp_path / "old")
    built.save_pretrained(tmp_path / "new")
    path = tmp_path / "new" / "vlm" / "config.json"
    path.write_text(json.dumps(as_5_writes(json.loads(path.read_text()))))
    old, new = (Alpamayo.from_pretrained(tmp_path / name) for name in ("old", "new"))
    positions = torch.arange(12).reshape(3, 4) ** 2
    assert all(map(torch.equal, old.rotary(positions), new.rotary(positions)))
    inputs = old.transformers_inputs(old.prompt(factory.odd_window()))
    with torch.no_grad():
        assert torch.equal(old.vlm(**inputs).logits, new.vlm(**inputs).logits)
    new.save_pretrained(tmp_path / "again")
    again = json.loads((tmp_path / "again" / "vlm" / "config.json").read_text())
    assert "rope_parameters" not in again["text_config"]
    assert rope_settings(again["text_config"]) == rope_settings(old.vlm.config.text_config)
    assert again["vision_config"] == json.loads(path.read_text())["vision_config"]


def test_the_spelling_of_5_is_what_it_writes(tmp_path: Path) -> None:
    raw = vlm_config(SHAPES["small"])
    config = Qwen3VLConfig.from_dict(json.loads(json.dumps(raw)))
    if not hasattr(config.text_config, "rope_parameters"):
        pytest.skip("only transformers 5 writes it")
    config.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    expected = as_5_writes(raw)
    assert written["text_config"]["rope_parameters"] == expected["text_config"]["rope_parameters"]
    assert not {"rope_theta", "rope_scaling"} & set(written["text_config"])
    for key in ("model_type", "rope_parameters"):
        assert written["vision_config"][key] == expected["vision_config"][key]


def test_rope_type_mrope_loads(tmp_path: Path) -> None:
    factory.odd_target(tmp_path / "built").save_pretrained(tmp_path / "saved")
    path = tmp_path / "saved" / "vlm" / "config.json"
    raw = json.loads(path.read_text())
    raw["text_config"]["rope_scaling"]["rope_type"] = "mrope"
    path.write_text(json.dumps(raw))
    target = Alpamayo.from_pretrained(tmp_path / "saved")
    assert rope_settings(target.vlm.config.text_config).rope_type == "default"
