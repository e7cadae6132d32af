"""Receipts, signs, small tables and bar charts: pictures that are read."""

import random

from .canvas import TILE_CELLS, Colour
from .picture import FIELDS, KEYS, Picture, Question, Sheet
from .vocabulary import (
    BARS,
    COLOURS,
    DAYS,
    FAREWELLS,
    HEADINGS,
    INKS,
    ITEMS,
    PAPERS,
    Split,
    belongs,
    draw_number,
    draw_word,
)  # fmt: skip

MAX_SHIFT = 4
# Pixels a cell is drawn with: mostly what a tile holds, else a larger picture that tiling scales down.
CELL_SIZES = (28, 28, 28, 28, 28, 28, 42, 56, 84)


def new_sheet(rng: random.Random, rows: int, paper: Colour | None = None, cell: int | None = None) -> Sheet:
    """An empty sheet one tile wide, slightly shifted."""
    sheet = Sheet(
        rows,
        TILE_CELLS,
        paper or rng.choice(PAPERS),
        cell=cell or rng.choice(CELL_SIZES),
        shift=(rng.randint(-MAX_SHIFT, MAX_SHIFT), rng.randint(-MAX_SHIFT, MAX_SHIFT)),
    )
    sheet.begin_labels()
    return sheet


def _centred(text: str) -> int:
    return (TILE_CELLS - len(text)) // 2


def _draw_prices(rng: random.Random, split: Split, count: int) -> tuple[dict[str, str], str]:
    """Different items with their prices in cents as printed, and their sum; all strings of the split."""
    items = rng.sample(ITEMS, count)
    while True:
        cents = [rng.randint(50, 999) for _ in items]
        total = sum(cents)
        if belongs(split, f"${total / 100:.2f}"):
            break
    for position, item in enumerate(items):  # change prices pairwise until each belongs: the sum stays
        tries = 0
        while not belongs(split, f"{item} {cents[position] / 100:.2f}"):
            tries += 1
            if position + 1 == count or tries > 1000:  # two prices at one end of the range cannot change together
                return _draw_prices(rng, split, count)
            step = rng.randint(-30, 30)
            if 50 <= cents[position] + step <= 999 and 50 <= cents[position + 1] - step <= 999:
                cents[position] += step
                cents[position + 1] -= step
    return {item: f"{price / 100:.2f}" for item, price in zip(items, cents, strict=True)}, f"${total / 100:.2f}"


def draw_receipt(rng: random.Random, split: Split, rows: int | None = None, cell: int | None = None) -> Picture:
    """A receipt on one tile (2 to 4 items) or on two, one above the other (3 to 8 items)."""
    rows = rows or rng.choice((8, 16, 16))
    prices, total = _draw_prices(rng, split, rng.randint(3, 8) if rows == 16 else rng.randint(2, 4))
    sheet = new_sheet(rng, rows, cell=cell)
    ink = rng.choice(INKS)
    questions: list[Question] = []
    spare = rows - len(prices) - 3  # rows beside shop, items, TOTAL and amount
    row = rng.randint(0, min(spare, 1))
    spare -= row
    shop = draw_word(rng, split, 3, 8)
    cells = sheet.write(row, _centred(shop), shop, ink if rng.random() < 0.5 else rng.choice(INKS), "shop")
    questions.append(Question("receipt shop", _ask(rng, SHOP), shop, cells))
    gap = rng.randint(0, min(spare, 1))
    spare -= gap
    if gap:
        sheet.box(0.3, row + 1.47, 7.7, row + 1.53, ink)
    row += 1 + gap
    for item, price in prices.items():
        key = KEYS.index(item)
        sheet.write(row, 0, item, ink, "item", key=key)
        cells = sheet.write(row, 4, price, ink, "price", key=key)
        for column, index in zip(range(4, 8), range(1, 5), strict=True):
            sheet.mark(row, column, index=index)  # counted as if the dollar sign stood before it
        name = item if rng.random() < 0.15 else item.lower()
        questions.append(Question("receipt price", _ask(rng, PRICE).format(name), f"${price}", ((-1, -1), *cells)))
        row += 1
    gap = rng.randint(0, min(spare, 2))
    spare -= gap
    if gap:
        sheet.box(0.3, row + gap / 2 - 0.03, 7.7, row + gap / 2 + 0.03, ink)
    row += gap
    emphasis = ink if rng.random() < 0.5 else rng.choice(INKS)
    sheet.write(row, rng.choice((0, 0, _centred("TOTAL"))), "TOTAL", emphasis, "total label")
    cells = sheet.write(row + 1, TILE_CELLS - len(total), total, emphasis, "total")
    questions.append(Question("receipt total", _ask(rng, TOTAL), total, cells))
    if spare >= 1 and rng.random() < 0.7:
        farewell = rng.choice(FAREWELLS)
        sheet.write(row + 2 + (spare >= 2), _centred(farewell), farewell, ink, "farewell")
    return sheet.picture("receipt", questions)


def draw_sign(rng: random.Random, split: Split, cell: int | None = None) -> Picture:
    """A framed board with a word, a number, or both."""
    sheet = new_sheet(rng, TILE_CELLS, cell=cell)
    ink = rng.choice(INKS)
    what = rng.choice(("word", "number", "both"))
    lines = {}
    if what != "number":
        lines["word"] = draw_word(rng, split, 3, 8)
    if what != "word":
        lines["number"] = draw_number(rng, split, 8)
    height = 2 * len(lines) + 1
    top = rng.randint(0, TILE_CELLS - height)
    board = rng.choice(PAPERS)
    frame = rng.choice((*INKS, *COLOURS.values()))
    if rng.random() < 0.8:
        sheet.box(-1, top - 0.1, 9, top + height + 0.1, frame)
        sheet.box(-1, top + 0.15, 9, top + height - 0.15, board)
    questions = []
    order = list(lines)
    rng.shuffle(order)
    for position, kind in enumerate(order):
        text = lines[kind]
        left = rng.choice((_centred(text), rng.randint(0, TILE_CELLS - len(text))))
        cells = sheet.write(top + 1 + 2 * position, left, text, ink, f"sign {kind}")
        questions.append(Question(f"sign {kind}", _ask(rng, WORD if kind == "word" else NUMBER), text, cells))
    return sheet.picture("sign", questions)


def draw_table(rng: random.Random, split: Split, cell: int | None = None) -> Picture:
    """A table of days by two headings, numbers of one or two digits in its cells."""
    sheet = new_sheet(rng, TILE_CELLS, cell=cell)
    ink = rng.choice(INKS)
    days = rng.sample(list(DAYS), rng.randint(2, 6))
    if rng.random() < 0.5:
        days.sort(key=list(DAYS).index)
    headings = rng.sample(HEADINGS, 2)
    top = rng.randint(0, TILE_CELLS - 1 - len(days))
    questions = []
    for place, heading in enumerate(headings):
        sheet.write(top, 3 + 3 * place, heading, ink, "heading", heading=1 + HEADINGS.index(heading))
    sheet.box(0, top + 0.98, 8, top + 1.02, ink)
    for row, day in enumerate(days, start=top + 1):
        key = KEYS.index(day)
        sheet.write(row, 0, day, ink, "row", key=key)
        for place, heading in enumerate(headings):
            while True:
                number = str(rng.randint(1, 99))
                if belongs(split, f"{day} {heading} {number}"):
                    break
            cells = sheet.write(
                row, 5 + 3 * place - len(number), number, ink, "cell", key=key, heading=1 + HEADINGS.index(heading)
            )
            text = _ask(rng, CELL).format(heading.lower(), DAYS[day])
            questions.append(Question("table cell", text, number, cells))
    return sheet.picture("table", questions)


def draw_chart(rng: random.Random, split: Split, cell: int | None = None) -> Picture:
    """A bar chart: two to four lettered bars, whole heights up to 6 that the axis numbers name."""
    while True:
        count = rng.randint(2, 4)
        names = rng.sample(BARS, count)
        values = [rng.randint(1, 6) for _ in names]
        if values.count(max(values)) == 1 and belongs(split, f"{names}{values}"):
            break
    sheet = new_sheet(rng, TILE_CELLS, cell=cell)
    ink = rng.choice(INKS)
    same = rng.choice(list(COLOURS.values())) if rng.random() < 0.5 else None
    for step in range(1, 7):
        sheet.write(7 - step, 0, str(step), ink, "axis")
        sheet.box(1, 7 - step - 0.02, 8, 7 - step + 0.02, (190, 190, 190))
    questions = []
    for place, (name, value) in enumerate(zip(names, values, strict=True)):
        column = 1 + 2 * place
        key = KEYS.index(name)
        highest = int(value == max(values))
        sheet.box(column + 0.1, 7 - value, column + 0.9, 7, same or rng.choice(list(COLOURS.values())))
        for row in range(7 - value, 7):
            sheet.mark(row, column, field=FIELDS.index("bar"), key=key, value=value, highest=highest)
        cells = sheet.write(7, column, name, ink, "bar label", key=key, value=value, highest=highest)
        questions.append(Question("bar value", _ask(rng, BAR).format(name), str(value), cells))
        if highest:
            questions.append(Question("highest bar", _ask(rng, HIGHEST), name, cells))
    sheet.box(1, 6.96, 8, 7.04, ink)
    return sheet.picture("chart", questions)


SHOP = ("What is the name of the shop?", "What is the shop called?", "Which shop is this?")
PRICE = ("How much is the {}?", "What does the {} cost?", "What is the price of the {}?")
TOTAL = ("What is the total?", "How much is the total?", "What is the total amount?")
WORD = ("What does the sign say?", "What word is on the sign?", "Read the word.")
NUMBER = ("What number is on the sign?", "What is the number?", "Read the number.")
CELL = ("What is the {} number on {}?", "What does the table say for {} on {}?")
BAR = ("What is the value of bar {}?", "How high is bar {}?")
HIGHEST = ("Which bar is the highest?", "Which bar has the highest value?")


def _ask(rng: random.Random, wordings: tuple[str, ...]) -> str:
    return rng.choice(wordings)
