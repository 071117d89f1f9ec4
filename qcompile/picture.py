"""Pictures of lines, dots and words, as SVG and as PNG, without a library for either."""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass, field
from xml.sax.saxutils import escape

import numpy as np
import numpy.typing as npt

#: Pixels of the PNG in a unit of length.
SCALE = 2
#: The font of the PNG, 5 x 7 dots: a letter, and its columns from left to right, the top dot in the lowest bit.
_FONT = """
( 001C224100  ) 0041221C00  , 0050300000  - 0808080808  . 0060600000  / 2010080402  _ 4040404040  : 0036360000
0 3E5149453E  1 00427F4000  2 4261514946  3 2141454B31  4 1814127F10  5 2745454539  6 3C4A494930  7 0171090503
8 3649494936  9 064949291E  A 7E1111117E  B 7F49494936  C 3E41414122  D 7F4141221C  E 7F49494941  F 7F09090901
G 3E4149497A  H 7F0808087F  I 00417F4100  J 2040413F01  K 7F08142241  L 7F40404040  M 7F020C027F  N 7F0408107F
O 3E4141413E  P 7F09090906  Q 3E4151215E  R 7F09192946  S 4649494931  T 01017F0101  U 3F4040403F  V 1F2040201F
W 3F4038403F  X 6314081463  Y 0708700807  Z 6151494543  a 2054545478  b 7F48444438  c 3844444420  d 384444487F
e 3854545418  f 087E090102  g 0C5252523E  h 7F08040478  i 00447D4000  j 2040443D00  k 7F10284400  l 00417F4000
m 7C04180478  n 7C08040478  o 3844444438  p 7C14141408  q 081414187C  r 7C08040408  s 4854545420  t 043F444020
u 3C4040207C  v 1C2040201C  w 3C4030403C  x 4428102844  y 0C5050503C  z 4464544C44
"""
_GLYPHS = dict(zip(_FONT.split()[::2], map(bytes.fromhex, _FONT.split()[1::2]), strict=True))
#: What stands for a letter that the font does not have.
_UNKNOWN = bytes.fromhex("7F4141417F")
Pixels = npt.NDArray[np.uint8]


@dataclass
class Picture:
    """What is drawn, in the order in which it is; coordinates are in units from the upper left corner.

    Parameters
    ----------
    width, height : int
    """

    width: int
    height: int
    _shapes: list[_Line | _Dot | _Words] = field(default_factory=list)

    def line(self, start: tuple[float, float], end: tuple[float, float], colour: str, width: float = 1.0) -> None:
        """Draw a line."""
        self._shapes.append(_Line(start, end, colour, width))

    def dot(self, place: tuple[float, float], radius: float, colour: str) -> None:
        """Draw a filled circle."""
        self._shapes.append(_Dot(place, radius, colour))

    def words(self, place: tuple[float, float], text: str, anchor: str = "start", colour: str = "#222222") -> None:
        """Write on a base line; `anchor` is start, middle or end, as in SVG."""
        self._shapes.append(_Words(place, text, anchor, colour))

    def svg(self) -> str:
        """Return it as SVG."""
        size = f'width="{self.width}" height="{self.height}" viewBox="0 0 {self.width} {self.height}"'
        style = "<style>text{font:12px sans-serif}</style>"
        ground = f'<rect width="{self.width}" height="{self.height}" fill="#ffffff"/>'
        shapes = [shape.svg() for shape in self._shapes]
        head = f'<svg xmlns="http://www.w3.org/2000/svg" {size}>'
        return "\n".join([head, style, ground, *shapes, "</svg>\n"])

    def png(self) -> bytes:
        """Return it as PNG."""
        pixels = np.full((self.height * SCALE, self.width * SCALE, 3), 255, np.uint8)
        for shape in self._shapes:
            shape.paint(pixels)
        rows = np.pad(pixels.reshape(len(pixels), -1), ((0, 0), (1, 0)))  # each row names its filter first: none
        header = struct.pack(">IIBBBBB", self.width * SCALE, self.height * SCALE, 8, 2, 0, 0, 0)
        chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(rows.tobytes(), 9)), (b"IEND", b""))
        return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(*chunk) for chunk in chunks)


@dataclass(frozen=True)
class _Line:
    start: tuple[float, float]
    end: tuple[float, float]
    colour: str
    width: float

    def svg(self) -> str:
        (x1, y1), (x2, y2) = self.start, self.end
        where = f'x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"'
        return f'<line {where} stroke="{self.colour}" stroke-width="{self.width:g}"/>'

    def paint(self, pixels: Pixels) -> None:
        ends = SCALE * np.array([self.start, self.end])
        steps = int(np.abs(ends[1] - ends[0]).max()) + 2
        thick = max(1, round(self.width * SCALE))
        for x, y in np.linspace(ends[0], ends[1], steps).round().astype(int) - thick // 2:
            pixels[max(0, y) : y + thick, max(0, x) : x + thick] = _rgb(self.colour)


@dataclass(frozen=True)
class _Dot:
    place: tuple[float, float]
    radius: float
    colour: str

    def svg(self) -> str:
        return f'<circle cx="{self.place[0]:.1f}" cy="{self.place[1]:.1f}" r="{self.radius:g}" fill="{self.colour}"/>'

    def paint(self, pixels: Pixels) -> None:
        y, x = np.ogrid[: pixels.shape[0], : pixels.shape[1]]
        inside = np.hypot(x - SCALE * self.place[0], y - SCALE * self.place[1]) <= SCALE * self.radius
        pixels[inside] = _rgb(self.colour)


@dataclass(frozen=True)
class _Words:
    place: tuple[float, float]
    text: str
    anchor: str
    colour: str

    def svg(self) -> str:
        where = f'x="{self.place[0]:.1f}" y="{self.place[1]:.1f}" text-anchor="{self.anchor}"'
        return f'<text {where} fill="{self.colour}">{escape(self.text)}</text>'

    def paint(self, pixels: Pixels) -> None:
        columns = b"".join(_GLYPHS.get(letter, _UNKNOWN if letter != " " else bytes(5)) + b"\0" for letter in self.text)
        dots = (np.frombuffer(columns, np.uint8)[None, :] >> np.arange(7)[:, None]) & 1
        drawn = np.kron(dots, np.ones((SCALE, SCALE), np.uint8)).astype(bool)
        before = {"start": 0.0, "middle": 0.5, "end": 1.0}[self.anchor] * drawn.shape[1]
        left, top = round(SCALE * self.place[0] - before), round(SCALE * self.place[1]) - drawn.shape[0]
        rows, at = np.nonzero(drawn)
        rows, at = rows + top, at + left
        seen = (rows >= 0) & (rows < pixels.shape[0]) & (at >= 0) & (at < pixels.shape[1])
        pixels[rows[seen], at[seen]] = _rgb(self.colour)


def _rgb(colour: str) -> tuple[int, ...]:
    return tuple(bytes.fromhex(colour[1:]))


def _chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
