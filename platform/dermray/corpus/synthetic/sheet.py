"""The contact sheet: every condition on light, medium and dark skin, labelled."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from dermray.corpus.synthetic.condition import Condition
from dermray.corpus.synthetic.conditions import CONDITIONS
from dermray.corpus.synthetic.drawing import draw

COLUMNS = 4
PHOTOGRAPHS_PER_CELL = 3
PHOTOGRAPH_PX = 96
GAP_PX, CELL_GAP_PX, ROW_GAP_PX, LABEL_PX, MARGIN_PX, TITLE_PX = 2, 16, 9, 20, 20, 34
PAPER, INK, FAINT = (250, 249, 247), (34, 38, 44), (128, 134, 142)
CELL_WIDTH = PHOTOGRAPHS_PER_CELL * (PHOTOGRAPH_PX + GAP_PX) - GAP_PX
CELL_HEIGHT = LABEL_PX + PHOTOGRAPH_PX


def contact_sheet(path: str | Path, seed: int = 0) -> Path:
    """Writes the sheet as a JPEG at a local path (its folder must exist) and returns the path."""
    rows = -(-len(CONDITIONS) // COLUMNS)
    width = 2 * MARGIN_PX + COLUMNS * (CELL_WIDTH + CELL_GAP_PX) - CELL_GAP_PX
    height = 2 * MARGIN_PX + TITLE_PX + rows * (CELL_HEIGHT + ROW_GAP_PX) - ROW_GAP_PX
    sheet = Image.new("RGB", (width, height), PAPER)
    title = (
        f"The synthetic corpus: {len(CONDITIONS)} conditions from lighter to darker skin. Drawings, not photographs."
    )
    ImageDraw.Draw(sheet).text((MARGIN_PX, MARGIN_PX - 4), title, INK, ImageFont.load_default(16))
    for index, condition in enumerate(CONDITIONS):
        row, column = divmod(index, COLUMNS)
        left = MARGIN_PX + column * (CELL_WIDTH + CELL_GAP_PX)
        top = MARGIN_PX + TITLE_PX + row * (CELL_HEIGHT + ROW_GAP_PX)
        _draw_cell(sheet, (left, top), condition, [seed, index])
    sheet.save(path, "JPEG", quality=82, optimize=True)
    return Path(path)


def _draw_cell(sheet: Image.Image, corner: tuple[int, int], condition: Condition, seed: list[int]) -> None:
    """One condition: its name, the branch of the tree it is on, and its photographs."""
    left, top = corner
    pen = ImageDraw.Draw(sheet)
    name_font, branch_font = ImageFont.load_default(13), ImageFont.load_default(11)
    pen.text((left, top), condition.name, INK, name_font)
    branch = condition.path[-2]
    pen.text((left + CELL_WIDTH - pen.textlength(branch, branch_font), top + 2), branch, FAINT, branch_font)
    for position, skin_type in enumerate(_skin_types(condition)):
        rng = np.random.default_rng([*seed, position])
        # Drawn at twice the size: the sheet is seen larger than a training image.
        photograph, _ = draw(condition, rng, size=(2 * PHOTOGRAPH_PX, 2 * PHOTOGRAPH_PX), skin_type=skin_type)
        small = Image.fromarray(photograph).resize((PHOTOGRAPH_PX, PHOTOGRAPH_PX), Image.Resampling.LANCZOS)
        sheet.paste(small, (left + position * (PHOTOGRAPH_PX + GAP_PX), top + LABEL_PX))


def _skin_types(condition: Condition) -> tuple[int, ...]:
    """Lightest, middle and darkest of the types that the condition is drawn on."""
    types = condition.skin_types
    return types[0], types[len(types) // 2], types[-1]
