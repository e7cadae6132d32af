"""A sheet of square cells to draw on: one character fills one cell, and one cell becomes one visual token.

After pixel shuffle a visual token of `nano` covers 28 x 28 pixels of a tile. Text is centred in such cells and the
whole sheet is shifted by a few pixels, so that a token sees its own character, never exactly in the middle.
"""

from functools import lru_cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

CELL = 28
TILE_CELLS = 8
FONT = Path(__file__).with_name("DejaVuSansMono-Bold.ttf")

Colour = tuple[int, int, int]
Mask = npt.NDArray[np.float32]


@lru_cache(maxsize=512)
def glyph(character: str, cell: int) -> Mask:
    """The coverage, 0 to 1, of one character centred in a cell x cell square."""
    font = ImageFont.truetype(str(FONT), round(cell * 32 / CELL))
    square = Image.new("L", (cell, cell), 0)
    # "ls": baseline-left anchoring keeps all characters of a row on one line
    left = (cell - font.getlength(character)) / 2
    ImageDraw.Draw(square).text((left, cell * 0.91), character, fill=255, font=font, anchor="ls")
    return np.asarray(square, dtype=np.float32)[:, :, None] / np.float32(255)


class Canvas:
    """A picture under way: `rows` x `columns` cells on coloured paper.

    cell: pixels a cell is wide; 28 is what a tile holds, more makes a larger picture that tiling scales down.
    shift: (x, y) in units of a 28-pixel cell's pixels, applied to everything drawn.
    """

    def __init__(self, rows: int, columns: int, paper: Colour, *, cell: int = CELL, shift: tuple[int, int] = (0, 0)):
        self.rows, self.columns, self.cell = rows, columns, cell
        self.shift = (round(shift[0] * cell / CELL), round(shift[1] * cell / CELL))
        self.pixels = np.empty((rows * cell, columns * cell, 3), np.uint8)
        self.pixels[:] = paper

    def text(self, row: int, column: int, text: str, ink: Colour) -> None:
        """Prints `text` from a cell on to the right, one character a cell."""
        for offset, character in enumerate(text):
            if character != " ":
                x, y = (column + offset) * self.cell, row * self.cell
                self.blend(glyph(character, self.cell), x + self.shift[0], y + self.shift[1], ink)

    def box(self, left: float, top: float, right: float, bottom: float, colour: Colour) -> None:
        """Fills a rectangle given in cells."""
        (dx, dy), (height, width) = self.shift, self.pixels.shape[:2]
        x0, x1 = (min(max(round(x * self.cell) + dx, 0), width) for x in (left, right))
        y0, y1 = (min(max(round(y * self.cell) + dy, 0), height) for y in (top, bottom))
        self.pixels[y0:y1, x0:x1] = colour

    def shape(self, mask: Mask, left: float, top: float, colour: Colour) -> None:
        """Blends a shape's coverage with its upper left corner at a point given in cells."""
        self.blend(mask, round(left * self.cell) + self.shift[0], round(top * self.cell) + self.shift[1], colour)

    def blend(self, mask: Mask, x: int, y: int, colour: Colour) -> None:
        """Paints `colour` through a mask at a pixel position; what falls outside the sheet is cut off."""
        height, width = self.pixels.shape[:2]
        x0, y0 = max(x, 0), max(y, 0)
        x1, y1 = min(x + mask.shape[1], width), min(y + mask.shape[0], height)
        if x0 >= x1 or y0 >= y1:
            return
        coverage = mask[y0 - y : y1 - y, x0 - x : x1 - x]
        under = self.pixels[y0:y1, x0:x1]
        ink = np.asarray(colour, np.float32)
        under[:] = (under + coverage * (ink - under) + 0.5).astype(np.uint8)
