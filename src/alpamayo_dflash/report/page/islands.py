"""Foreign values in a page: JSON that no markup can end, and text whose every character is seen."""

from __future__ import annotations

import json
import unicodedata
from typing import Any

_ESCAPES = str.maketrans({sign: f"\\u{ord(sign):04x}" for sign in "<>&"})
_PICTURES = 0x2400  # ␀, the first of Unicode's pictures of control characters
_UNSEEN = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}


def island(value: Any) -> str:
    r"""A value as the text of a `<script type="application/json">`.

    What could end the element, or begin another, stands as `\u003c` and so on, which JSON reads as the sign;
    so does every sign outside ASCII, lone surrogates among them.

    Raises:
        ValueError: a number in it is not finite.
    """
    return json.dumps(value, allow_nan=False, separators=(",", ":")).translate(_ESCAPES)


def visible(text: str) -> str:
    r"""Text in which every character is seen.

    Control characters become their pictures (␀, ␛, ␡); what else has no form of its own, such as marks of
    writing direction, joiners and lone surrogates, becomes `\u202e`, `\U000e0001`.
    """
    return "".join(map(_seen, text))


def _seen(sign: str) -> str:
    if unicodedata.category(sign) not in _UNSEEN:
        return sign
    code = ord(sign)
    if code < 0x20:
        return chr(_PICTURES + code)
    if code == 0x7F:
        return "␡"
    return f"\\u{code:04x}" if code <= 0xFFFF else f"\\U{code:08x}"
