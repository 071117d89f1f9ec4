"""Set text in a font from a package: lines and pages to read, of which it is known what they say."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from photographs import RgbImage

_PAPER, _INK = (255, 255, 255), (0, 0, 0)
_LEADING = 1.3  # distance of two lines of a page, in font sizes


def _font(content: bytes, size: int) -> Any:
    from PIL import ImageFont

    # The simple layout engine is in every build of Pillow; the other one needs a library of the system.
    return ImageFont.truetype(io.BytesIO(content), size, layout_engine=ImageFont.Layout.BASIC)


def render_line(text: str, font: bytes, size: int, margin: int) -> RgbImage:
    """Draw one line of black text on white paper, which is as large as the text and the margin around it.

    Parameters
    ----------
    text
        What to draw.
    font
        Content of a TrueType file.
    size
        Size of the font in pixels.
    margin
        Empty pixels on all sides.
    """
    from PIL import Image, ImageDraw

    loaded = _font(font, size)
    left, top, right, bottom = loaded.getbbox(text)
    paper = Image.new("RGB", (int(right - left) + 2 * margin, int(bottom - top) + 2 * margin), _PAPER)
    ImageDraw.Draw(paper).text((margin - left, margin - top), text, fill=_INK, font=loaded)
    return np.asarray(paper)


def render_page(text: str, font: bytes, size: int, width: int, height: int) -> RgbImage:
    """Draw black text on white paper of `height` x `width` pixels, broken between words; what is too much is left out.

    Parameters
    ----------
    text
        What to draw.
    font
        Content of a TrueType file.
    size
        Size of the font in pixels; the margin is as wide.
    width, height
        Size of the page in pixels.
    """
    from PIL import Image, ImageDraw

    loaded = _font(font, size)
    paper = Image.new("RGB", (width, height), _PAPER)
    pen = ImageDraw.Draw(paper)
    lines = _broken(text.split(), lambda line: loaded.getlength(line) <= width - 2 * size)
    leading = int(_LEADING * size)
    for index, line in enumerate(lines[: (height - 2 * size) // leading]):
        pen.text((size, size + index * leading), line, fill=_INK, font=loaded)
    return np.asarray(paper)


def _broken(words: Sequence[str], fits: Callable[[str], bool]) -> list[str]:
    lines = [""]
    for word in words:
        longer = f"{lines[-1]} {word}".strip()
        if fits(longer):
            lines[-1] = longer
        else:
            lines.append(word)
    return lines


def phrases(text: str, words: int) -> list[str]:
    """Cut text into runs of `words` words each, of letters, digits and plain punctuation."""
    plain = re.findall(r"[A-Za-z0-9][A-Za-z0-9.,'-]*", text)
    return [" ".join(plain[start : start + words]) for start in range(0, len(plain) - words + 1, words)]
