"""Reading and writing drafts on disk.

Our layout is z-lab's: their tensor names, and a `config.json` of Qwen3 keys with `architectures:
["DFlashDraftModel"]`, `num_target_layers` and `dflash_config {target_layer_ids, mask_token_id, block_size}`.
Ours adds the tensor `mask_embedding` [C], the key `context_len` (null: every state), the keys of
`dflash_config` again at top level (where FlashDrive's files have them), `tap_convention: "layer_output"`,
and, with `trained_embeddings`, the tensors `embed_tokens.weight` and `lm_head.weight` [V, C]. A reduced head
is the key `draft_vocab_size` and the tensor `draft_token_ids` int64 [Vd], the ascending target ids of its
columns; a head on previous picks (`draft.heads`) is the keys `previous_head` and `previous_size` and the
tensors `previous.*`. Only our layout has these.

FlashDrive's published Alpamayo drafts are known by `context_len` and the keys of the draft at top level with
`mask_embedding.pt` beside them; then `architectures` and `num_target_layers` may be absent. Their taps are
layer outputs too. z-lab's files name no `context_len`: their drafts see every state before the anchor, and
their mask embedding is a row of the target's table, which `bind` takes.

Reading names every key that is missing, unknown or changes the arithmetic, and guesses none: a tap that is
one layer off costs a sixth of the accepted tokens, and nothing else shows it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from alpamayo_dflash.common.artefacts import atomic_folder, read_json, write_json, write_record
from alpamayo_dflash.common.fields import file_name, value_of
from alpamayo_dflash.common.identity import Fingerprint, identity_of
from alpamayo_dflash.common.tensors import FLOATS, MOST_PICKLED, read_pickled, read_tensors, save_tensors
from alpamayo_dflash.draft.config import FULL_CONTEXT, DraftConfig
from alpamayo_dflash.draft.heads import head_shapes, moved_rows
from alpamayo_dflash.target.rotary import rope_settings

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
CONFIG = "config.json"
MASK_FILE = "mask_embedding.pt"
PROVENANCE = "provenance.json"
KEPT_IDS = "draft_token_ids"
PREVIOUS_OUT = "previous.out.weight"

ARCHITECTURE = "DFlashDraftModel"
TAP_CONVENTION = "layer_output"

# Our name -> the key of a Qwen3 config.
_SHAPE_KEYS = {
    "hidden_size": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "intermediate_size": "intermediate_size",
    "vocab_size": "vocab_size",
    "num_target_layers": "num_target_layers",
}
# Keys of the draft itself: in `dflash_config`, at top level, or (equal) in both.
_DRAFT_KEYS = ("target_layer_ids", "mask_token_id", "block_size")


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) and value else [value]


# Keys that change the arithmetic, with the only values that this network computes.
_FIXED: dict[str, Callable[[Any], bool]] = {
    "model_type": lambda value: value == "qwen3",
    "hidden_act": lambda value: value == "silu",
    "attention_bias": lambda value: value is False,
    "tie_word_embeddings": lambda value: value is False,
    "attention_dropout": lambda value: value == 0,
    "rope_scaling": lambda value: value is None,
    "use_sliding_window": lambda value: value is False,
    "layer_types": lambda value: value is None or all(kind == "full_attention" for kind in _listed(value)),
    "is_causal": lambda value: value in (None, False),
    "input_embedding_scale": lambda value: value in (None, 1, 1.0),
    "tap_convention": lambda value: value == TAP_CONVENTION,
    "pruned_heads": lambda value: not value,
}
# Keys that mean nothing for the arithmetic here.
_IGNORED = {
    *("_name_or_path", "auto_map", "bos_token_id", "chunk_size_feed_forward", "dtype", "eos_token_id"),
    *("id2label", "initializer_range", "is_encoder_decoder", "label2id", "max_position_embeddings"),
    *("max_window_layers", "output_attentions", "output_hidden_states", "pad_token_id", "problem_type"),
    *("return_dict", "sliding_window", "torch_dtype", "transformers_version", "use_cache"),
    # What transformers 4 writes into every config, about generation, tasks and encoders.
    *("add_cross_attention", "bad_words_ids", "begin_suppress_tokens", "cross_attention_hidden_size"),
    *("decoder_start_token_id", "diversity_penalty", "do_sample", "early_stopping", "finetuning_task"),
    *("encoder_no_repeat_ngram_size", "exponential_decay_length_penalty", "forced_bos_token_id"),
    *("forced_eos_token_id", "is_decoder", "length_penalty", "max_length", "min_length"),
    *("no_repeat_ngram_size", "num_beam_groups", "num_beams", "num_return_sequences", "output_scores"),
    *("prefix", "remove_invalid_values", "repetition_penalty", "return_dict_in_generate", "sep_token_id"),
    *("suppress_tokens", "task_specific_params", "temperature", "tf_legacy_loss", "tie_encoder_decoder"),
    *("tokenizer_class", "top_k", "top_p", "torchscript", "typical_p", "use_bfloat16"),
}
_OWN = {
    *("architectures", "context_len", "dflash_config", "rms_norm_eps", "rope_parameters", "rope_theta"),
    "trained_embeddings",
}
_REDUCED = "draft_vocab_size"
_PREVIOUS = ("previous_head", "previous_size")
_OURS = {_REDUCED, *_PREVIOUS}
"""Keys that our layout alone has."""
_KNOWN = _IGNORED | _OWN | set(_FIXED) | set(_SHAPE_KEYS.values()) | set(_DRAFT_KEYS)


def tensor_shapes(config: DraftConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of a draft in our layout."""
    c, d, inner = config.hidden_size, config.head_dim, config.intermediate_size
    q, kv = config.num_heads * d, config.num_kv_heads * d
    layer = {
        "self_attn.q_proj": (q, c),
        "self_attn.k_proj": (kv, c),
        "self_attn.v_proj": (kv, c),
        "self_attn.o_proj": (c, q),
        "self_attn.q_norm": (d,),
        "self_attn.k_norm": (d,),
        "mlp.gate_proj": (inner, c),
        "mlp.up_proj": (inner, c),
        "mlp.down_proj": (c, inner),
        "input_layernorm": (c,),
        "post_attention_layernorm": (c,),
    }
    shapes: dict[str, tuple[int, ...]] = {
        "fc.weight": (c, config.feature_size),
        "hidden_norm.weight": (c,),
        "norm.weight": (c,),
        "mask_embedding": (c,),
    }
    for index in range(config.num_layers):
        shapes |= {f"layers.{index}.{name}.weight": shape for name, shape in layer.items()}
    if config.trained_embeddings:
        shapes |= {"embed_tokens.weight": (config.vocab_size, c), "lm_head.weight": (config.vocab_size, c)}
    if config.draft_vocab_size is not None:
        shapes[KEPT_IDS] = (config.draft_vocab_size,)
    if config.previous_head is not None:
        head = head_shapes(config.previous_head, c, config.previous_size, config.columns)
        shapes |= {f"previous.{name}": shape for name, shape in head.items()}
    return shapes


def to_json(config: DraftConfig) -> dict[str, Any]:
    """The `config.json` of a draft in our layout, which z-lab's code reads too."""
    draft = {name: getattr(config, name) for name in _DRAFT_KEYS}
    return {
        "architectures": [ARCHITECTURE],
        "model_type": "qwen3",
        **{key: getattr(config, name) for name, key in _SHAPE_KEYS.items()},
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "tie_word_embeddings": False,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "layer_types": ["full_attention"] * config.num_layers,
        "use_sliding_window": False,
        "dflash_config": draft,
        **draft,
        "context_len": None if config.context_len == FULL_CONTEXT else config.context_len,
        "tap_convention": TAP_CONVENTION,
        "trained_embeddings": config.trained_embeddings,
        **({} if config.draft_vocab_size is None else {_REDUCED: config.draft_vocab_size}),
        **({} if config.previous_head is None else {key: getattr(config, key) for key in _PREVIOUS}),
    }


def from_json(
    values: Mapping[str, Any], where: str, *, context_len: int | None = None, mask_file: bool = False
) -> DraftConfig:
    """Read a draft's `config.json`, in our, z-lab's or FlashDrive's layout.

    Args:
        values: the file's object.
        where: the file's name, for messages.
        context_len: context length of a draft whose file names none (z-lab's keep every state).
        mask_file: whether the mask embedding lies beside the file, as FlashDrive has it.

    Raises:
        ValueError: a key is missing, unknown, contradicts another or asks for other arithmetic.
    """
    flashdrive = mask_file and all(values.get(key) is not None for key in ("context_len", *_DRAFT_KEYS))
    _check_convention(values, where, flashdrive=flashdrive)
    _check_keys(values, where)
    shape: dict[str, Any] = {
        name: None
        if flashdrive and key == "num_target_layers" and values.get(key) is None
        else value_of(values, key, int, where=where)
        for name, key in _SHAPE_KEYS.items()
    }
    places = {"in dflash_config": values.get("dflash_config", {}), "at top level": values}
    draft = {key: _agreed(places, key, where) for key in _DRAFT_KEYS}
    taps = draft["target_layer_ids"]
    if not isinstance(taps, list) or not all(type(tap) is int for tap in taps):
        raise ValueError(f"{where}: target_layer_ids is {taps!r}; it must be a list of layer numbers")
    own = "tap_convention" in values
    found = values.get("context_len", None if own else context_len)
    if found is None and own and "context_len" in values:
        found = FULL_CONTEXT
    if found is None:
        raise ValueError(f"{where}: no context_len; say how many states the draft sees (context_len=…)")
    mask = value_of(draft, "mask_token_id", int, where=where)
    if flashdrive and shape["vocab_size"] == mask + 1:
        shape["vocab_size"] = mask  # the row that was added to the target's table for the mask
    try:
        return DraftConfig(
            **shape,
            block_size=value_of(draft, "block_size", int, where=where),
            context_len=value_of({"context_len": found}, "context_len", int, where=where),
            target_layer_ids=tuple(taps),
            mask_token_id=mask,
            rms_norm_eps=value_of(values, "rms_norm_eps", float, where=where),
            rope_theta=_rope_theta(values, where),
            trained_embeddings=value_of(values, "trained_embeddings", bool, False, where=where),
            draft_vocab_size=None
            if values.get(_REDUCED) is None
            else value_of(values, _REDUCED, int, where=where),
            **_previous(values, where),
        )
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def _previous(values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The keys of a head on previous picks."""
    if values.get("previous_head") is None:
        return {}
    return {
        "previous_head": value_of(values, "previous_head", str, where=where),
        "previous_size": value_of(values, "previous_size", int, where=where),
    }


def _check_convention(values: Mapping[str, Any], where: str, *, flashdrive: bool) -> None:
    """Refuse a file whose numbering of taps is not known to mean layer outputs."""
    if "speculators_model_type" in values or "aux_hidden_state_layer_ids" in values:
        raise ValueError(f"{where}: a speculators draft, whose layer ids are one higher; convert it first")
    if flashdrive and values.get("architectures") is None:
        return
    if values.get("architectures") != [ARCHITECTURE]:
        raise ValueError(
            f"{where}: architectures is {values.get('architectures')!r}, not ['{ARCHITECTURE}']; "
            "what its taps count from is not known"
        )


def _check_keys(values: Mapping[str, Any], where: str) -> None:
    """Refuse unknown keys and values that ask for arithmetic that this network does not do."""
    inner = values.get("dflash_config", {})
    if not isinstance(inner, dict):
        raise ValueError(f"{where}: dflash_config is {inner!r}; it must be an object")
    known = _KNOWN | _OURS if "tap_convention" in values else _KNOWN
    unknown = sorted(set(values) - known)
    unknown += [f"dflash_config.{key}" for key in inner if key not in _DRAFT_KEYS]
    if unknown:
        raise ValueError(f"{where}: unknown keys {unknown}; they may change what the draft computes")
    for key, fits in _FIXED.items():
        if key in values and not fits(values[key]):
            raise ValueError(f"{where}: {key} is {values[key]!r}, which plain DFlash does not compute")


def _agreed(places: Mapping[str, Mapping[str, Any]], key: str, where: str) -> Any:
    """A key's value, which may stand in one of two places, or with one value in both."""
    found = {name: place[key] for name, place in places.items() if place.get(key) is not None}
    if not found:
        raise ValueError(f"{where}: no {key}, neither {' nor '.join(places)}")
    value = next(iter(found.values()))
    if any(other != value for other in found.values()):
        both = " and ".join(f"{other!r} {name}" for name, other in found.items())
        raise ValueError(f"{where}: {key} is {both}")
    return value


def _rope_theta(values: Mapping[str, Any], where: str) -> float:
    """The rotary base, from `rope_theta` (transformers 4) or `rope_parameters` (transformers 5)."""
    rope = rope_settings(values, where)
    parameters = values.get("rope_parameters") or {}
    if rope.rope_type != "default" or set(parameters) - {"rope_type", "rope_theta"}:
        raise ValueError(
            f"{where}: rope_parameters is {parameters!r}; only the default type is computed here"
        )
    return rope.rope_theta


def read_draft(
    folder: Path | str, *, context_len: int | None = None, own_mask: bool = True
) -> tuple[DraftConfig, dict[str, Tensor]]:
    """Read a draft's config and tensors, in the dtype of the file, on the CPU.

    Args:
        folder: holds `config.json` and `model.safetensors` (or shards with their index); a mask embedding may
            lie beside them in `mask_embedding.pt`, as FlashDrive has it.
        context_len: context length of a draft whose file names none.
        own_mask: refuse a draft that has no mask embedding of its own (z-lab's take a row of their target's
            table). With False such a draft comes without the tensor `mask_embedding`.

    Raises:
        ValueError: a file, key or tensor is missing, surplus, misshapen or corrupt; the message names it.
    """
    folder = draft_folder(folder)
    config = read_config(folder, context_len=context_len)
    tensors = _read_weights(folder)
    if "mask_embedding" not in tensors and (folder / MASK_FILE).exists():
        tensors["mask_embedding"] = _read_mask(folder / MASK_FILE)
    expected = tensor_shapes(config)
    if "mask_embedding" not in tensors and config.mask_token_id < config.vocab_size:
        if own_mask:
            raise ValueError(
                f"{folder}: the draft has no mask embedding of its own; it takes row {config.mask_token_id} "
                "of its target's table. Train from it with --init-from, which gives it one"
            )
        del expected["mask_embedding"]
    check_tensors(tensors, expected, str(folder))
    check_token_ids(tensors, config, str(folder))
    return config, tensors


def read_config(folder: Path | str, *, context_len: int | None = None) -> DraftConfig:
    """Read a draft's config alone; the arguments and errors are those of `read_draft`."""
    folder = draft_folder(folder)
    path, mask_file = folder / CONFIG, (folder / MASK_FILE).exists()
    return from_json(read_json(path), str(path), context_len=context_len, mask_file=mask_file)


def draft_folder(folder: Path | str) -> Path:
    """Where a draft lies: in the folder itself, or in the `draft` of what `train` wrote there, its best.

    Raises:
        ValueError: there is no such folder.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder; a draft's folder holds {CONFIG} and {WEIGHTS}")
    inner = folder / "draft"
    return inner if not (folder / CONFIG).exists() and (inner / CONFIG).exists() else folder


def check_tensors(tensors: Mapping[str, Tensor], expected: Mapping[str, tuple[int, ...]], where: str) -> None:
    """Raise ValueError for missing, surplus and misshapen tensors, and those of other dtypes, by name."""
    faults = [f"missing {name}" for name in sorted(expected.keys() - tensors.keys())]
    faults += [f"surplus {name}" for name in sorted(tensors.keys() - expected.keys())]
    faults += [
        f"{name} is {list(tensors[name].shape)}, not {list(shape)}"
        for name, shape in expected.items()
        if name in tensors and tuple(tensors[name].shape) != shape
    ]
    faults += [
        f"{name} is {tensor.dtype}, not of floating point"
        for name, tensor in tensors.items()
        if name != KEPT_IDS and tensor.dtype not in FLOATS
    ]
    if faults:
        raise ValueError(f"{where}: " + "; ".join(faults[:8]) + ("; …" if len(faults) > 8 else ""))


def check_token_ids(tensors: Mapping[str, Tensor], config: DraftConfig, where: str) -> None:
    """Raise ValueError unless the ids of a reduced head are ascending ids of the target; nothing if whole."""
    if config.draft_vocab_size is None:
        return
    ids = tensors[KEPT_IDS]
    if ids.dtype != torch.int64:
        raise ValueError(f"{where}: {KEPT_IDS} is {ids.dtype}; it must be int64")
    if len(ids) != config.draft_vocab_size:
        raise ValueError(f"{where}: {KEPT_IDS} has {len(ids)} ids, {_REDUCED} is {config.draft_vocab_size}")
    outside = ids[(ids < 0) | (ids >= config.vocab_size)].tolist()
    if outside:
        raise ValueError(
            f"{where}: {KEPT_IDS} {outside[:4]} out of range; the target's ids are 0 to "
            f"{config.vocab_size - 1}"
        )
    steps = ids.diff()
    if bool((steps < 0).any()):
        raise ValueError(f"{where}: {KEPT_IDS} must ascend; {int(ids[1:][steps < 0][0])} stands too late")
    if bool((steps == 0).any()):
        raise ValueError(f"{where}: {KEPT_IDS} holds {int(ids[1:][steps == 0][0])} twice")


def draft_identity(folder: Path | str) -> Fingerprint:
    """The identity of a draft: its config, its weights, and a mask embedding beside them.

    Raises:
        ValueError: there is no such folder, or its index is broken.
    """
    folder = draft_folder(folder)
    names = [CONFIG, *_weight_files(folder), *([MASK_FILE] if (folder / MASK_FILE).exists() else [])]
    return identity_of({name: folder / name for name in names}, folder)


def _weight_files(folder: Path) -> list[str]:
    """The names of a draft's weights: one file, or shards with an index."""
    index = folder / INDEX
    if (folder / WEIGHTS).exists() or not index.exists():
        return [WEIGHTS]
    weight_map = value_of(read_json(index), "weight_map", dict, where=str(index))
    return sorted({file_name(file, f"{index}: {name:.200}") for name, file in weight_map.items()})


def _read_weights(folder: Path) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for name in _weight_files(folder):
        tensors |= read_tensors(folder / name)
    return tensors


def _read_mask(path: Path) -> Tensor:
    """The mask embedding of a FlashDrive draft: a tensor, or the only one of a dictionary; [C] or [1, C]."""
    value = read_pickled(path)
    if isinstance(value, dict) and len(value) == 1:
        (value,) = value.values()
    if not isinstance(value, Tensor):
        raise ValueError(f"{path}: holds {type(value).__name__}, not a tensor")
    if value.layout != torch.strided or value.dtype not in FLOATS or value.numel() > MOST_PICKLED:
        raise ValueError(
            f"{path}: holds a {value.layout} of {value.dtype}, {list(value.shape)}; not a vector"
        )
    return value.detach().reshape(-1)


def write_draft(
    folder: Path | str,
    config: DraftConfig,
    tensors: Mapping[str, Tensor],
    *,
    provenance: Mapping[str, Any] | None = None,
) -> None:
    """Write a draft folder in our layout, whole or not at all. An earlier draft in it is replaced.

    Raises:
        ValueError: the tensors are not those of `config`, or the folder holds something other than a draft.
    """
    folder = Path(folder)
    check_tensors(tensors, tensor_shapes(config), str(folder))
    check_token_ids(tensors, config, str(folder))
    check_place(folder)
    with atomic_folder(folder) as temporary:
        write_files(temporary, config, tensors)
        if provenance is not None:
            write_record(temporary / PROVENANCE, provenance)


def check_place(folder: Path) -> None:
    """Raise ValueError if a folder that a draft would replace holds something other than a draft."""
    draft_files = {CONFIG, WEIGHTS, INDEX, MASK_FILE, PROVENANCE}
    inside = {file.name for file in folder.iterdir()} if folder.is_dir() else set()
    others = sorted(inside - draft_files)
    if others:
        raise ValueError(f"{folder}: holds {others[:4]}, so it is not a draft's folder; name another")


def write_files(folder: Path, config: DraftConfig, tensors: Mapping[str, Tensor]) -> None:
    """Write `config.json` and `model.safetensors` into a folder that the caller replaces atomically."""
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    save_tensors(plain, folder / WEIGHTS)
    write_json(folder / CONFIG, to_json(config))


def resize_vocabulary(
    config: DraftConfig, tensors: Mapping[str, Tensor], embedding_VC: Tensor, head_VC: Tensor
) -> tuple[DraftConfig, dict[str, Tensor]]:
    """Give a draft the target's vocabulary; new rows of its own embedding and head are the target's.

    The mask's id moves to one past the vocabulary; its embedding stays.
    """
    size = embedding_VC.shape[0]
    resized = dict(tensors)
    if config.trained_embeddings:
        for name, table in (("embed_tokens.weight", embedding_VC), ("lm_head.weight", head_VC)):
            old = tensors[name][:size]
            resized[name] = torch.cat((old, table[len(old) :].to(old)))
    if config.previous_head is not None and config.draft_vocab_size is None:
        resized[PREVIOUS_OUT] = moved_rows(tensors[PREVIOUS_OUT], None, None, size)
    return replace(config, vocab_size=size, mask_token_id=size), resized
