"""The rotary settings of a text config, in the spelling of transformers 4.57 or of 5.

4.57 has `rope_theta` at top level and the rest in `rope_scaling`; 5 has all of it in `rope_parameters`, which
4.57 does not know, and still reads the older spelling. So whatever is written here is in the older one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from alpamayo_dflash.common.fields import is_number

_GROUPS = ("rope_scaling", "rope_parameters")
_VISION_THETA = 10_000.0


@dataclass(frozen=True)
class Rope:
    """The rotary settings of a text model. What transformers 4.57 and 5 assume of Qwen3-VL is the default.

    Attributes:
        rope_theta: the base, for which no default is right.
        mrope_section: frequencies of the axes (t, h, w).
        rope_type: of transformers; `mrope`, an older name of `default`, is read as that.
        mrope_interleaved: whether the axes take turns. Qwen3-VL's always do: transformers never asks.
    """

    rope_theta: float
    mrope_section: tuple[int, ...] = (24, 20, 20)
    rope_type: str = "default"
    mrope_interleaved: bool = True

    def to_json(self) -> dict[str, Any]:
        """The keys of a text config, as both versions read them."""
        values = dataclasses.asdict(self)
        theta = values.pop("rope_theta")
        return {"rope_theta": theta, "rope_scaling": values | {"mrope_section": list(self.mrope_section)}}


def rope_settings(text: Any, where: str = "text_config") -> Rope:
    """Read the rotary settings of a whole text config.

    Args:
        text: an object of config.json, or a config of transformers of either version.
        where: what messages call it.

    Raises:
        ValueError: there is no `rope_theta`, a value is of another kind, or two places disagree.
    """
    found = rope_values(text, where)
    if "rope_theta" not in found:
        raise ValueError(f"{where}: no rope_theta, neither at top level nor in {' or '.join(_GROUPS)}")
    return Rope(**found)


def rope_values(text: Any, where: str) -> dict[str, Any]:
    """The fields of `Rope` that a config, or a part of one, names itself; see `rope_settings`."""
    top = text if isinstance(text, Mapping) else vars(text)
    places = {"": {"rope_theta": top.get("rope_theta")}}
    for name in _GROUPS:
        group = top.get(name)
        if group is not None and not isinstance(group, Mapping):
            raise ValueError(f"{where}: {name} is {group!r}; it must be an object")
        places[f"{name}."] = dict(group or {})
    found: dict[str, Any] = {}
    origin: dict[str, str] = {}
    for place, values in places.items():
        # `type` is older than 4.57; where both stand, both versions take the other.
        named = {"rope_type": values.get("type")} | {k: v for k, v in values.items() if v is not None}
        for key, (fits, convert, wanted) in _KEYS.items():
            value = named.get(key)
            if value is None:
                continue
            if not fits(value):
                raise ValueError(f"{where}: {place}{key} is {value!r}; it must be {wanted}")
            value = convert(value)
            if found.setdefault(key, value) != value:
                raise ValueError(
                    f"{where}: {origin[key]} is {found[key]!r}, but {place}{key} is {value!r}; which acts "
                    "depends on the version of transformers"
                )
            origin.setdefault(key, f"{place}{key}")
    return found


def with_rope(text: Mapping[str, Any], rope: Rope) -> dict[str, Any]:
    """A text config's object with these settings, as both versions read them."""
    return {key: value for key, value in text.items() if key not in _GROUPS} | rope.to_json()


def _is_base(value: Any) -> bool:
    return is_number(value) and value > 0


def _is_sections(value: Any) -> bool:
    return (
        isinstance(value, (list, tuple))
        and len(value) == 3
        and all(type(n) is int and 0 <= n < 2**31 for n in value)
    )


_KEYS: dict[str, tuple[Callable[[Any], bool], Callable[[Any], Any], str]] = {
    "rope_theta": (_is_base, float, "a finite number above 0"),
    "mrope_section": (_is_sections, tuple, "a list of three whole numbers"),
    "rope_type": (
        lambda value: isinstance(value, str),
        lambda value: "default" if value == "mrope" else value,
        "a text",
    ),
    "mrope_interleaved": (lambda value: isinstance(value, bool), bool, "true or false"),
}


def vision_rope_theta(vision: Any) -> float:
    """The base of the vision tower's axial rotary positions; 4.57 has no setting for it."""
    return float((getattr(vision, "rope_parameters", None) or {}).get("rope_theta", _VISION_THETA))
