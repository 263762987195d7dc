"""Every number that a user can set is checked when the config is built: no value is found out late."""

import dataclasses
import math
import typing
from pathlib import Path

import numpy as np
import pytest
import torch

from alpamayo_dflash.cli.main import COMMANDS, _load
from alpamayo_dflash.common.options import (
    check_above_zero,
    check_at_least,
    check_positive,
    check_range,
    check_whole,
    generator_seed,
)
from alpamayo_dflash.decode.config import DecodeConfig, Request, Sampling

NEEDED = {
    "target_layers": "1,3",
    "model_path": "tiny",
    "alpamayo_model": "tiny",
    "target_model": "tiny",
    "target": "tiny",
    "draft_models": (Path("draft"),),
    "chunks": "0",
}
SEEDS = ("seed", "world_seed")
# A negative moment or rank is refused where clips and ranks are known; see their own tests.
LATER = ("t0_us", "rank", "world_size", "start_chunk", "end_chunk", "num_chunks")


def built(config, **changes):
    """A config of its class with the least that it needs."""
    values = {}
    for field in dataclasses.fields(config):
        if field.name in NEEDED and (
            field.default is dataclasses.MISSING or field.name in ("target_layers", "model_path")
        ):
            values[field.name] = NEEDED[field.name]
        elif field.default is dataclasses.MISSING or field.name == "cache_dir":
            values[field.name] = Path("somewhere")
    if config.__name__ == "CompareWeightsConfig":
        values["weights"] = "fp8"  # something must differ
    return config(**(values | changes))


def numbers(config):
    """The names of a config's numbers, with their type."""
    hints = typing.get_type_hints(config)
    for field in dataclasses.fields(config):
        if typing.get_origin(hints[field.name]) is tuple:
            continue
        kinds = {hints[field.name], *typing.get_args(hints[field.name])}
        for kind in (int, float):
            if kind in kinds and bool not in kinds:
                yield field.name, kind


CONFIGS = {command.config: _load(command.config) for command in COMMANDS.values()}
CASES = [(config, *number) for config in CONFIGS.values() for number in numbers(config)]


def test_the_list_is_whole():
    assert len(CONFIGS) == len(COMMANDS)
    assert len(CASES) > 90


@pytest.mark.parametrize(
    ("config", "name"),
    [(config, name) for config, name, kind in CASES if kind is float],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_a_number_is_finite(config, name):
    built(config)
    for value in (math.nan, math.inf, -math.inf):
        with pytest.raises(ValueError, match=name):
            built(config, **{name: value})


@pytest.mark.parametrize(
    ("config", "name"),
    [(config, name) for config, name, kind in CASES if kind is int and name not in (*SEEDS, *LATER)],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_a_count_is_not_negative(config, name):
    with pytest.raises(ValueError, match=name):
        built(config, **{name: -1})


@pytest.mark.parametrize(
    ("config", "name"),
    [(config, name) for config, name, _ in CASES if name in SEEDS],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_any_whole_number_is_a_seed(config, name):
    for seed in (-1, 0, 2**63, -(2**63) - 1, 2**200, np.int64(5)):
        assert getattr(built(config, **{name: seed}), name) == seed
    with pytest.raises(ValueError, match=name):
        built(config, **{name: 1.5})


def test_a_seed_is_reduced_for_other_generators():
    small = (0, 1, 2**62, 2**63 - 1)
    assert [generator_seed(seed) for seed in small] == list(small)
    large = [generator_seed(seed) for seed in (-1, -2, 2**63, 2**63 + 1, 2**64, 2**200)]
    assert len({*large, *small}) == len(large) + len(small)
    for seed in large:
        torch.Generator().manual_seed(seed)
        np.random.default_rng(seed)
    with pytest.raises(ValueError, match=r"seed is 1\.5"):
        generator_seed(1.5)


def test_messages_name_option_value_and_what_is_right():
    cases = [
        (check_at_least, (0,), math.inf, "cache_gib is inf; it must be at least 0, and finite"),
        (check_at_least, (0,), math.nan, "cache_gib is nan; it must be at least 0, and finite"),
        (check_positive, (), 8.5, "cache_gib is 8.5; it must be a whole number"),
        (check_positive, (), 0, "cache_gib is 0; it must be at least 1"),
        (check_above_zero, (), math.inf, "cache_gib is inf; it must be above 0, and finite"),
        (check_range, (2, 64), 65, "cache_gib is 65; it must be 2 to 64"),
        (check_whole, (), "7", "cache_gib is '7'; it must be a whole number"),
    ]
    for check, bounds, value, message in cases:
        with pytest.raises(ValueError, match=f"^{message}$"):
            check(*bounds, cache_gib=value)


def test_a_request_checks_itself():
    for wrong in ({"num_samples": 0}, {"max_new_tokens": 1.5}, {"seed": 0.5}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            Request(Sampling(), **wrong)
    with pytest.raises(ValueError, match="prompt_capacity"):
        DecodeConfig(prompt_capacity=1.5)
