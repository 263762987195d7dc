"""transformers' fast way of decoding, wherever it runs: on the Qwen3-VL, or else on its text model alone.

Compiling may fail on a machine (a compiler that is not there, an operation that cannot be traced). That is a
result: what was tried says why it did not run, and the benchmark goes on.

Shapes: P prompt tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch._dynamo.utils import counters
from transformers import CompileConfig, Qwen3Config, Qwen3ForCausalLM
from transformers.models.qwen3.modeling_qwen3 import Qwen3RotaryEmbedding

from alpamayo_dflash.bench.generation import Generator, Texts
from alpamayo_dflash.target.alpamayo import Alpamayo
from alpamayo_dflash.target.prompt import Prompt
from alpamayo_dflash.target.rotary import rope_settings

# What tracing, the compiler behind it, its tools and transformers' own checks raise.
_COMPILE_ERRORS = (
    *(RuntimeError, ValueError, TypeError, AttributeError, LookupError, AssertionError),
    *(ArithmeticError, OSError, ImportError),
)
_SHOWN = 500
_T = TypeVar("_T")


def why_not_compiled(device: torch.device, compile_config: CompileConfig | None) -> str | None:
    """Why transformers would compile nothing, or None."""
    if device.type == "cuda" or compile_config is not None:
        return None
    return f"transformers compiles nothing by itself on a device of type {device.type}"


def compiled_texts(
    target: Alpamayo,
    prompt: Prompt,
    texts: Texts,
    *,
    repeats: int,
    compile_config: CompileConfig | None = None,
) -> dict[str, Any]:
    """Decode times on the target's Qwen3-VL, or else on its text model alone.

    Args:
        target: whose weights are run.
        prompt: of the target.
        texts: what is decoded.
        repeats: texts that are timed.
        compile_config: see `Generator`.

    Returns:
        `on` ("vl" or "text"; None where neither ran), `decode_ms` of each text ([] likewise), and `told`,
        what `tried` tells of each model.
    """
    inputs = target.transformers_inputs(prompt)
    how: dict[str, Any] = {"repeats": repeats, "compile_config": compile_config}
    times, told = tried(target.vlm, lambda: _decode_ms(target, target.vlm, inputs, texts, **how))
    if times is not None:
        return {"on": "vl", "decode_ms": times, "told": {"vl": told}}
    alone = compiled_text_model(target, prompt, texts, **how)
    return alone | {"told": {"vl": told} | alone["told"]}


def compiled_text_model(
    target: Alpamayo,
    prompt: Prompt,
    texts: Texts,
    *,
    repeats: int,
    compile_config: CompileConfig | None = None,
) -> dict[str, Any]:
    """As `compiled_texts`, on the text model alone: its prompt is as long, and has no images."""
    model, given = text_model(target), target.transformers_inputs(prompt)
    inputs = {name: given[name] for name in ("input_ids", "attention_mask")}
    how: dict[str, Any] = {"repeats": repeats, "compile_config": compile_config}
    times, told = tried(model, lambda: _decode_ms(target, model, inputs, texts, **how))
    return {"on": None if times is None else "text", "decode_ms": times or [], "told": {"text": told}}


def _decode_ms(
    target: Alpamayo,
    model: Any,
    inputs: Mapping[str, Tensor],
    texts: Texts,
    *,
    repeats: int,
    compile_config: CompileConfig | None,
) -> list[float]:
    static = inputs["input_ids"].shape[1]
    generate = Generator(target, model, texts, static=static, compile_config=compile_config)
    return generate.decode_ms(inputs, repeats)


def tried(model: Any, run: Callable[[], _T]) -> tuple[_T | None, dict[str, Any]]:
    """Run what has transformers compile a model's pass; nothing that was compiled is there before or after.

    Args:
        model: whose `generate` is called.
        run: calls it.

    Returns:
        what `run` returned, and what was compiled: `graphs`, `graph_breaks` and `cudagraph_skips`; or None,
        and as `error` why it did not run, or ran without compiling.
    """
    _forget(model)
    counters.clear()
    try:
        # What a caller's inference mode makes could not be written over by a compiled pass.
        with torch.inference_mode(False), torch.no_grad():
            found = run()
    except _COMPILE_ERRORS as error:
        return None, {"error": f"{type(error).__name__}: {error}".strip()[:_SHOWN]}
    finally:
        graphs = counters["stats"]["unique_graphs"]
        breaks = sum(counters["graph_break"].values())
        skips = counters["inductor"]["cudagraph_skips"]
        _forget(model)
    if not graphs:
        return None, {"error": "generate ran and compiled nothing"}
    return found, {"graphs": graphs, "graph_breaks": breaks, "cudagraph_skips": skips}


def _forget(model: Any) -> None:
    """Let go of what transformers compiled, its CUDA graphs' memory too."""
    vars(model).pop("_compiled_call", None)
    torch.compiler.reset()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def text_model(target: Alpamayo) -> Any:
    """A Qwen3 of transformers on the weights of a target's text model, which are not copied.

    On a text without images it computes what the Qwen3-VL does.
    """
    text = target.vlm.config.text_config
    sizes: dict[str, Any] = {
        "vocab_size": target.vocab_size,
        "hidden_size": target.hidden_size,
        "intermediate_size": text.intermediate_size,
        "num_hidden_layers": target.num_layers,
        "num_attention_heads": target.num_heads,
        "num_key_value_heads": target.num_kv_heads,
        "head_dim": target.head_dim,
        "rms_norm_eps": text.rms_norm_eps,
        "rope_theta": rope_settings(text).rope_theta,
        "max_position_embeddings": text.max_position_embeddings,
        "tie_word_embeddings": False,
        "attn_implementation": "sdpa",
    }
    config = Qwen3Config(**sizes)
    with torch.device("meta"):
        model = Qwen3ForCausalLM(config)
    weights = {
        f"model.{name}": tensor for name, tensor in target.vlm.model.language_model.state_dict().items()
    }
    model.load_state_dict(weights | {"lm_head.weight": target.head}, assign=True)
    model.model.rotary_emb = Qwen3RotaryEmbedding(config).to(target.device)
    return model.eval().requires_grad_(False)
