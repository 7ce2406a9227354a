"""Names of classes as labels in a picture, which has fonts for some scripts, and little room."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib import font_manager

from repvgg_jax.terminal import printable

_LONGEST = 24
# matplotlib's own font, which is always there, and those for Chinese, Japanese and Korean that systems come with.
_FONTS = (
    "DejaVu Sans", "Noto Sans CJK JP", "Noto Sans CJK SC", "Noto Sans JP", "Noto Sans SC", "Source Han Sans",
    "WenQuanYi Zen Hei", "WenQuanYi Micro Hei", "Droid Sans Fallback", "Hiragino Sans", "PingFang SC",
    "Apple SD Gothic Neo", "Arial Unicode MS", "Microsoft YaHei", "Yu Gothic", "Malgun Gothic", "SimHei",
)  # fmt: skip


def class_labels(class_names: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return labels for a picture, and the fonts that draw them.

    Args:
      class_names: Names of any text, of any length.

    Returns:
      A label for each class, which is its name, as one line of at most 24 characters. Where the fonts at hand lack a
      character, it is '#' and the place of the name in `class_names`, from 0.
    """
    names = [printable(name) for name in class_names]
    fonts, lacking = [], {ord(character) for name in names for character in name}
    for font in _FONTS:
        if not lacking:
            break
        found = _characters(font)
        if lacking & found or font == _FONTS[0]:
            fonts.append(font)
            lacking -= found
    labels = [f"#{index}" if lacking & set(map(ord, name)) else _shortened(name) for index, name in enumerate(names)]
    return labels, fonts or [_FONTS[0]]


def _characters(font: str) -> set[int]:
    """Return the characters that a font has; none where it is not installed."""
    try:
        path = font_manager.findfont(font, fallback_to_default=False)
        return set(font_manager.get_font(path).get_charmap())
    except (ValueError, OSError, RuntimeError):
        return set()


def _shortened(name: str) -> str:
    return name if len(name) <= _LONGEST else f"{name[: _LONGEST - 8]}…{name[-7:]}"
