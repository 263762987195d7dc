"""Where transformers 4.57 and 5 differ for a test that calls their Qwen3-VL; told by what is there."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from unittest import mock

from torch import Tensor
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLVisionModel

_KINDS = "mm_token_type_ids"


def rope_index(model: Any, inputs: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Positions [3, 1, P] and rope delta of a Qwen3-VL's inputs."""
    takes = inspect.signature(model.get_rope_index).parameters
    index: tuple[Tensor, Tensor] = model.get_rope_index(**{k: v for k, v in inputs.items() if k in takes})
    return index


def forward_inputs(vlm: Any, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inputs that its forward takes: 5 finds the images by the tokens' kinds, unknown to 4.57."""
    known = _KINDS in inspect.signature(vlm.forward).parameters
    return {name: value for name, value in inputs.items() if known or name != _KINDS}


def image_features(seen: Any) -> tuple[Any, Any]:
    """Features and deepstack features of what the vision tower, or `get_image_features`, gives."""
    return seen if isinstance(seen, tuple) else (seen.pooler_output, seen.deepstack_features)


@contextmanager
def drawn_in_order() -> Iterator[None]:
    """One seed gives one model: 4.57 draws the vision tower's weights after the text model's, 5 before."""
    made = Qwen3VLVisionModel.__init__

    def make(self: Any, *arguments: Any, **options: Any) -> None:
        made(self, *arguments, **options)
        self.post_init()  # nothing is drawn a second time

    with mock.patch.object(Qwen3VLVisionModel, "__init__", make):
        yield
