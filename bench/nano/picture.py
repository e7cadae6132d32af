"""A drawn picture: its pixels, what may be asked about it, and what each of its cells holds."""

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from .canvas import TILE_CELLS, Canvas
from .vocabulary import BARS, CHARACTERS, COLOURS, DAYS, HEADINGS, ITEMS, SHAPES

FIELDS = (
    "none", "shop", "item", "price", "total label", "total", "farewell", "sign word", "sign number",
    "heading", "row", "cell", "axis", "bar label", "bar", "object",
)  # fmt: skip
KEYS = ("none", *ITEMS, *DAYS, *BARS)

# What a cell's visual token should know, and how many values each has. 0 is "nothing of the kind".
LABELS: dict[str, int] = {
    "character": 1 + len(CHARACTERS),
    "field": len(FIELDS),
    "index": 8,  # of a character in its string
    "key": len(KEYS),  # the item, day or bar that a price, cell or bar belongs to
    "heading": 1 + len(HEADINGS),
    "value": 7,  # of a bar
    "highest": 2,
    "shape": 1 + len(SHAPES),
    "colour": 1 + len(COLOURS),
    "kin": 7,  # how many objects have this shape
    "count": 7,  # how many objects there are; known to every cell
    "previous": 1 + len(CHARACTERS),  # the characters to the left and to the right
    "next": 1 + len(CHARACTERS),
    "row 1": 1 + len(CHARACTERS),  # the first three characters of the row: what a price or a table cell belongs to
    "row 2": 1 + len(CHARACTERS),
    "row 3": 1 + len(CHARACTERS),
}
IGNORED = -1


@dataclass(frozen=True)
class Question:
    """One question, its only right answer, and the cell that each character of the answer is read from, if any."""

    task: str
    text: str
    answer: str
    sources: tuple[tuple[int, int], ...] = ()


@dataclass
class Picture:
    """pixels: (height, width, 3) uint8. labels: (rows, columns) per name in `LABELS`; `IGNORED` where it may vary."""

    kind: str
    pixels: npt.NDArray[np.uint8]
    questions: list[Question]
    labels: dict[str, npt.NDArray[np.int8]] = field(repr=False)


class Sheet(Canvas):
    """A canvas that keeps book of what each cell holds."""

    def begin_labels(self) -> None:
        self.labels = {name: np.zeros((self.rows, self.columns), np.int8) for name in LABELS}

    def mark(self, row: int, column: int, **values: int) -> None:
        for name, value in values.items():
            self.labels[name][row, column] = value

    def write(
        self, row: int, column: int, text: str, ink: tuple[int, int, int], field: str, **values: int
    ) -> tuple[tuple[int, int], ...]:
        """Prints a string, labels its cells and returns them."""
        self.text(row, column, text, ink)
        for index, character in enumerate(text):
            self.mark(
                row, column + index, character=1 + CHARACTERS.index(character), field=FIELDS.index(field),
                index=min(index, 7), **values,
            )  # fmt: skip
        return tuple((row, column + index) for index in range(len(text)))

    def picture(self, kind: str, questions: list[Question]) -> Picture:
        """The finished picture."""
        characters = self.labels["character"]
        printed = characters > 0
        self.labels["previous"][:, 1:] = characters[:, :-1]
        self.labels["next"][:, :-1] = characters[:, 1:]
        for column in range(3):
            self.labels[f"row {column + 1}"][:] = characters[:, column, None]
        for name in ("previous", "next", "row 1", "row 2", "row 3"):
            self.labels[name][~printed] = 0
        return Picture(kind, self.pixels, questions, self.labels)


def token_index(row: int, column: int) -> int:
    """Where a cell's token stands among the visual tokens of a picture one tile wide."""
    tile, inside = divmod(row, TILE_CELLS)
    return (tile * TILE_CELLS + inside) * TILE_CELLS + column
