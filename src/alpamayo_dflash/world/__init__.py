"""The synthetic world: scenes, their pictures and motion, their words, and the clips written from them.

Names are loaded on first use, so that the config alone costs nothing. `render` and `run` are modules here;
take the functions of the same names from them.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from alpamayo_dflash.world.config import WorldConfig
    from alpamayo_dflash.world.facts import EVENT_SHARES, Event, Facts
    from alpamayo_dflash.world.read import SceneRecord, read_facts, read_scenes
    from alpamayo_dflash.world.render import frames, window
    from alpamayo_dflash.world.scene import Scene, sample_scene, scene_seed

_HOME = {
    "WorldConfig": "config",
    "EVENT_SHARES": "facts",
    "Event": "facts",
    "Facts": "facts",
    "SceneRecord": "read",
    "read_facts": "read",
    "read_scenes": "read",
    "frames": "render",
    "window": "render",
    "Scene": "scene",
    "sample_scene": "scene",
    "scene_seed": "scene",
}

__all__ = [
    "EVENT_SHARES",
    "Event",
    "Facts",
    "Scene",
    "SceneRecord",
    "WorldConfig",
    "frames",
    "read_facts",
    "read_scenes",
    "sample_scene",
    "scene_seed",
    "window",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
