"""What is timed of the vision tower, at a small size."""

import pytest
import torch

from alpamayo_dflash.bench import vision as bench
from alpamayo_dflash.target.vision_fused import FusedVision
from tests.helpers.random_target import random_prompt, random_target


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    return random_target(tmp_path_factory.mktemp("bench")).requires_grad_(False)


@pytest.fixture(scope="module")
def prompt(target):
    return random_prompt(target, length=60, images=8)


def test_the_forms_that_there_are_on_a_cpu(target, prompt):
    """Reuse checks by itself that as many images were known as it says."""
    found = bench.vision(target, prompt, 2)
    assert found["vision_plain_because"] == "the weights are on the cpu, not on a GPU"
    assert set(found["vision_ms"]) == {"before", "now"}
    assert set(found["vision_reuse_ms"]) == {"off", "none", "twelve"}
    assert all(len(times) >= 2 for kind in ("vision_ms", "vision_reuse_ms") for times in found[kind].values())


def test_reuse_that_is_not_what_it_says_is_an_error(target, prompt, monkeypatch):
    monkeypatch.setattr(bench, "_room", lambda *_: 1)
    with pytest.raises(RuntimeError, match="twelve: 0 of"):
        bench.vision(target, prompt, 2)


def test_windows_of_a_stream(prompt):
    prompts = bench.windows(prompt)
    assert len(prompts) == 24
    first, third = (prompts[at].pixel_values.view(8, -1) for at in (0, 2))
    assert torch.equal(first[2:], third[:6])
    assert len({float(each.pixel_values[0, 0]) for each in prompts}) == 24


def test_plans_need_the_fast_form(target, prompt):
    with pytest.raises(ValueError, match="fast form: the weights are on the cpu"):
        bench.vision_plans(target, prompt, 2)


def test_plans_of_the_fast_form(target, prompt, monkeypatch, capsys):
    """What a library or a card cannot do is left out, with a message."""
    pytest.importorskip("triton")
    asked = []

    class Tower(FusedVision):
        def __init__(self, visual, plan):
            self.plan = plan
            asked.append(plan)

        def __call__(self, pixels, grid):
            if self.plan.attention == "cudnn":
                raise RuntimeError("No available kernel")

    monkeypatch.setattr(bench, "FusedVision", Tower)
    monkeypatch.setattr(bench, "why_plain_vision", lambda _: None)
    found = bench.vision_plans(target, prompt, 2)["vision_plans_ms"]
    assert "cudnn" not in found and {"flash", "efficient"} <= set(found)
    assert "plans: cudnn: No available kernel" in capsys.readouterr().err
    assert len(found) == len(asked) - 1
    assert {plan.streams for plan in asked} == {1, 2, 3}
    assert {plan.gelu for plan in asked} == {None, "rounded"}
