"""Shard after shard, a checkpoint's weights in FP8; the bits are those that loading with the format makes."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from alpamayo_dflash.common.artefacts import provenance, read_json, write_json
from alpamayo_dflash.common.fields import shown, value_of
from alpamayo_dflash.common.machine import check_device
from alpamayo_dflash.convert.config import ConvertConfig
from alpamayo_dflash.target.alpamayo import Alpamayo
from alpamayo_dflash.target.checkpoint import checkpoint_folder, target_identity, write_fp8
from alpamayo_dflash.target.config import CONFIG
from alpamayo_dflash.target.quantised import INPUT_SCALE, WEIGHT_SCALE

RECORD = "convert.json"


def run(config: ConvertConfig) -> dict[str, Any]:
    """Convert; a folder that holds this conversion is left as it is.

    Returns:
        `layers` in FP8, `tensors`, `weight_bytes`, `shards`, `largest_shard_bytes`, `source` (the official
        files' hash), `format` and `nothing_to_do`.

    Raises:
        ValueError: the checkpoint is missing, broken or in FP8 already, or `out` holds another one.
    """
    started = time.time()
    device = check_device(config.device)
    folder = checkpoint_folder(config.checkpoint, local_files_only=config.local_files_only)
    model = Alpamayo.on_meta(folder, local_files_only=config.local_files_only)
    source = target_identity(folder, model.vlm_files)
    settings = {
        "source": source.hash,
        "format": {
            "parts": list(config.target_format.fp8),
            "weights": "float8_e4m3fn",
            "scales": f"X.{WEIGHT_SCALE}, float32 [outputs, 1], which X.weight is multiplied by",
            "inputs": f"cast row by row as they come; there is no X.{INPUT_SCALE}",
        },
    }
    if (config.out / CONFIG).exists():
        return _already(config.out, settings)
    summary = write_fp8(model, folder, config.out, config.target_format, device=device)
    made = provenance(config, started, {"target": source.hash})
    write_json(config.out / RECORD, summary | settings | {"provenance": made})
    # The folder counts as whole from now on.
    model.save_config(config.out, config.target_format)
    return summary | settings | {"nothing_to_do": False, "out": str(config.out)}


def _already(out: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """What a finished folder's record says.

    Raises:
        ValueError: the folder holds another checkpoint.
    """
    record = read_json(out / RECORD) if (out / RECORD).is_file() else {}
    found = {key: record.get(key) for key in settings}
    if found != settings:
        source = value_of(record, "source", str, "", where=str(out / RECORD))
        what = (
            f"one made of {source[:12]} with {shown(record.get('format'))}"
            if source
            else "not a converted one"
        )
        raise ValueError(f"{out}: holds another checkpoint ({what}); give an empty folder")
    record.pop("provenance", None)
    return record | {"nothing_to_do": True, "out": str(out)}
