"""Fonts of plots and PDF. Text in scripts that they lack is spelled in Latin letters.

DejaVu Sans, which matplotlib brings, has Latin, Greek, Cyrillic, Hebrew, Arabic and more; Noto Sans CJK has Chinese,
Japanese and Korean. Without the package of the latter these are spelled as well.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from itertools import groupby
from typing import Any

BASE = "DejaVu Sans"


@contextmanager
def report_fonts() -> Iterator[None]:
    """Texts that are made and drawn inside get their glyphs from all fonts, the first one that has them."""
    import matplotlib

    with matplotlib.rc_context({"font.family": _families()}):
        yield


def spelled(text: str) -> str:
    """The text, with characters that no font has in Latin letters: ट्यूमर is Tyumr."""
    if text.isascii():
        return text
    return "".join(
        "".join(run) if known else _latin("".join(run)) for known, run in groupby(text, key=lambda one: _has(one))
    )


def face(text: str, bold: bool) -> dict[str, Any]:
    """matplotlib's `weight` and perhaps `family` of a text. The fonts of other scripts are not bold."""
    if bold and (text.isascii() or all(ord(one) in _characters(BASE) for one in text)):
        return {"weight": "bold", "family": BASE}
    return {"weight": "normal"}


def _latin(text: str) -> str:
    from anyascii import anyascii

    return str(anyascii(text))


def _has(character: str) -> bool:
    return character.isspace() or any(ord(character) in _characters(family) for family in _families())


@cache
def _families() -> list[str]:
    from matplotlib import font_manager

    try:
        from noto_cjk_sans_jp_regular import FONT_PATH
    except ImportError:
        return [BASE]
    font_manager.fontManager.addfont(str(FONT_PATH))
    return [BASE, font_manager.fontManager.ttflist[-1].name]


@cache
def _characters(family: str) -> frozenset[int]:
    from matplotlib import font_manager

    return frozenset(font_manager.get_font(font_manager.findfont(family)).get_charmap())
