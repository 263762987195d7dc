"""Models as others load them, and what their processors give."""

from types import SimpleNamespace

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLTextModel

from alpamayo_dflash import Alpamayo
from alpamayo_dflash.target.prompt import Prompt


class TheirAlpamayo(nn.Module):
    """The attributes of NVIDIA's object, made of transformers' modules: `expert` is a text model."""

    def __init__(self, target: Alpamayo, *, stored_constants: bool = True) -> None:
        super().__init__()
        self.vlm = target.vlm
        self.expert = Qwen3VLTextModel._from_config(target.expert.config, attn_implementation="eager")
        del self.expert.embed_tokens
        self.expert.load_state_dict(target.expert.state_dict())
        self.action_in_proj = _Copy(target.action_in_proj, buffers=stored_constants)
        self.action_out_proj = nn.Linear(target.expert.config.hidden_size, 2)
        self.action_out_proj.load_state_dict(target.action_out_proj.state_dict())
        self.action_space = _Copy(target.action_space, buffers=stored_constants)
        self.tokenizer = PreTrainedTokenizerFast(tokenizer_object=target.tokenizer)
        self.config = SimpleNamespace(to_dict=lambda: dict(target.config.raw))


class _Copy(nn.Module):
    """Another module's tensors under their names, and nothing of its code."""

    def __init__(self, source: nn.Module, *, buffers: bool) -> None:
        super().__init__()
        for name, parameter in source.named_parameters(recurse=False):
            self.register_parameter(name, nn.Parameter(parameter.detach().clone()))
        if buffers:
            for name, buffer in source.named_buffers(recurse=False):
                self.register_buffer(name, buffer.clone())
        for name, child in source.named_children():
            self.add_module(name, _Copy(child, buffers=buffers))


def inputs_of(prompt: Prompt) -> dict[str, Tensor]:
    """What a processor of transformers gives for the prompt."""
    ids = prompt.input_ids[None]
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": prompt.pixel_values,
        "image_grid_thw": prompt.image_grid_thw,
    }
