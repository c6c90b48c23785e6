"""Draws `docs/images/house.svg` from the imports of the code itself: `python docs/house.py` after rooms have moved.

A room is a package of `platform/dermray`, or one of the shells `jobs`, `tune` and `serve`. An arrow says that something
in the upper room imports something of the lower one; arrows that follow from others are left out. Modules that import
no room are the ground that every room may stand on. `tests/unit/test_repository.py` checks that the picture is this.
"""

from __future__ import annotations

import ast
import itertools
import textwrap
from collections.abc import Iterator
from functools import cache
from html import escape
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LIBRARY = "dermray"
# The shells, with what those are for that are no package and so do not say it themselves.
SHELLS = {"jobs": "A script for each command.", "tune": "The script of sweeps.", "serve": ""}
# Other names of what is in a room, which are no rooms.
ALIASES = ("dermray.encoder", "dermray.__main__")
PICTURE = ROOT / "docs" / "images" / "house.svg"

BOX_WIDTH, BOX_HEIGHT, GAP_WIDTH, GAP_X, GAP_Y, MARGIN = 210, 86, 4, 22, 54, 24
LETTERS_A_LINE = 34
FONT = "font-family='DejaVu Sans, Arial, sans-serif'"


@cache
def modules() -> dict[str, Path]:
    """Every importable module of the library and the shells by name."""
    bases = [ROOT / "platform" / LIBRARY, *(ROOT / shell for shell in SHELLS)]
    found = {}
    for base in bases:
        for file in base.rglob("*.py"):
            parts = list(file.relative_to(base.parent).with_suffix("").parts)
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return found


@cache
def imports(module: str, *, lazy: bool = True) -> frozenset[str]:
    """Modules that a module of ours names in import statements.

    Args:
        module: a name of `modules`.
        lazy: also inside functions.
    """
    tree = ast.parse(modules()[module].read_text(encoding="utf-8"))
    found: set[str] = set()
    for node in ast.walk(tree) if lazy else at_import(tree.body):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} imports relatively; write the full name"
            name = node.module or ""
            for alias in node.names:
                inner = f"{name}.{alias.name}"
                found.add(inner if inner in modules() else name)
    return frozenset(found)


def at_import(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Statements that run when a module is imported, type-checking blocks left out."""
    for node in body:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            continue
        yield node
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            for name in ("body", "orelse", "finalbody"):
                yield from at_import([n for n in getattr(node, name, []) if isinstance(n, ast.stmt)])


def room_of(module: str) -> str:
    """`dermray.train.loop` → `train`, `jobs.prepare` → `jobs`."""
    first, _, rest = module.partition(".")
    return (rest.partition(".")[0] or LIBRARY) if first == LIBRARY else first


@cache
def neighbours() -> dict[str, frozenset[str]]:
    """Every room and lone module → those that it imports."""
    housed = modules().keys() - set(ALIASES)
    found: dict[str, set[str]] = {room_of(module): set() for module in housed}
    for module in housed:
        found[room_of(module)] |= {room_of(name) for name in imports(module) if name in modules()}
    return {room: frozenset(names - {room}) for room, names in found.items()}


@cache
def ground() -> frozenset[str]:
    """Lone modules that import no room, by whatever road."""
    lone = {name for name in neighbours() if (ROOT / "platform" / LIBRARY / f"{name}.py").exists()} | {LIBRARY}
    found: set[str] = set()
    while more := {name for name in lone - found if neighbours()[name] <= found}:
        found |= more
    return frozenset(found)


@cache
def below(room: str) -> frozenset[str]:
    """All rooms that a room reaches."""
    direct = neighbours()[room] - ground()
    return direct.union(*(below(name) for name in direct))


def arrows(room: str) -> list[str]:
    """The rooms right below: what it imports and does not reach through another."""
    direct = neighbours()[room] - ground()
    return sorted(name for name in direct if not any(name in below(other) for other in direct - {name}))


@cache
def floor(room: str) -> int:
    """How many arrows lie between a room and the ground at most."""
    return 1 + max((floor(name) for name in arrows(room)), default=-1)


def purpose(room: str) -> str:
    """What the room's own first line says of it."""
    name = room if room in SHELLS else f"{LIBRARY}.{room}"
    if name not in modules():
        return SHELLS[room]
    said = ast.get_docstring(ast.parse(modules()[name].read_text(encoding="utf-8"))) or ""
    return said.partition("\n")[0].partition(". ")[0].rstrip(".:")


def roads() -> list[list[str]]:
    """Every arrow as what it goes through, floor by floor: a room, gaps where it passes a floor, a room."""
    found = []
    for room in sorted(set(neighbours()) - ground()):
        for other in arrows(room):
            between = range(floor(room) - 1, floor(other), -1)
            found.append([room, *(f"{room}>{other}:{level}" for level in between), other])
    return found


def floors() -> list[list[str]]:
    """Rooms, and gaps of the roads that pass, by floor from the top down; each near those that lead to it."""
    above: dict[str, list[str]] = {room: [] for room in sorted(set(neighbours()) - ground())}
    for road in roads():
        for first, second in itertools.pairwise(road):
            above.setdefault(second, []).append(first)
    level_of = {name: int(name.rpartition(":")[2]) if ":" in name else floor(name) for name in above}
    found: list[list[str]] = []
    for level in range(max(level_of.values()), -1, -1):
        here = [name for name in above if level_of[name] == level]
        middles = _middles(found[-1]) if found else {}
        wanted = {name: [middles[other] for other in above[name] if other in middles] for name in here}
        found.append(sorted(here, key=lambda name: (sum(wanted[name]) / max(1, len(wanted[name])), name)))
    return found


def _middles(names: list[str]) -> dict[str, float]:
    """Horizontal middle of each room and gap of a floor; 0 is the middle of the picture."""
    widths = [GAP_WIDTH if ":" in name else BOX_WIDTH for name in names]
    left = -(sum(widths) + GAP_X * (len(names) - 1)) / 2
    found = {}
    for name, width in zip(names, widths, strict=True):
        found[name] = left + width / 2
        left += width + GAP_X
    return found


def drawing() -> str:
    """The picture as SVG."""
    storeys = floors()
    placed = {name: (x, row) for row, names in enumerate(storeys) for name, x in _middles(names).items()}
    half = max(abs(x) for x, _ in placed.values()) + BOX_WIDTH / 2 + MARGIN
    # The middle of each upper edge, in the picture.
    spots = {name: (x + half, MARGIN + row * (BOX_HEIGHT + GAP_Y)) for name, (x, row) in placed.items()}
    width, top = 2 * half, MARGIN + len(storeys) * (BOX_HEIGHT + GAP_Y)
    names = textwrap.wrap(", ".join(sorted(ground() - {LIBRARY})), int(width / 6.4))
    height = top + 44 + 16 * len(names) + MARGIN
    lines = [
        f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {width:g} {height:g}' width='{width:g}' "
        f"height='{height:g}'>",
        "<title>The rooms of DermRay and who imports whom</title>",
        "<style>text{fill:#1d2733}.name{font-size:15px;font-weight:bold}.said{font-size:10.5px}</style>",
        f"<rect width='{width:g}' height='{height:g}' fill='#ffffff'/>",
        *(_road([spots[name] for name in road]) for road in roads()),
        *(_box(name, spot) for name, spot in spots.items() if ":" not in name),
        f"<rect x='{MARGIN}' y='{top}' width='{width - 2 * MARGIN:g}' height='{height - top - MARGIN}' rx='6' "
        "fill='#eceff3' stroke='#8894a3'/>",
        _text(MARGIN + 12, top + 22, "name", "the ground: every room may stand on these modules"),
        *(_text(MARGIN + 12, top + 42 + 16 * row, "said", line) for row, line in enumerate(names)),
        "</svg>",
    ]
    return "\n".join(lines) + "\n"


def _box(room: str, spot: tuple[float, float]) -> str:
    x, y = spot[0] - BOX_WIDTH / 2, spot[1]
    fill = "#fdf1dd" if room in SHELLS else "#e3f0ea"
    said = textwrap.wrap(purpose(room), LETTERS_A_LINE, max_lines=4, placeholder=" …")
    return "".join(
        [
            f"<rect x='{x:g}' y='{y:g}' width='{BOX_WIDTH}' height='{BOX_HEIGHT}' rx='6' "
            f"fill='{fill}' stroke='#5b6b7c'/>",
            _text(x + 10, y + 20, "name", f"{room}/" if room in SHELLS else room),
            *(_text(x + 10, y + 37 + 13 * row, "said", line) for row, line in enumerate(said)),
        ]
    )


def _road(spots: list[tuple[float, float]]) -> str:
    """From the lower edge of a room down through gaps to the upper edge of another, with a head."""
    path = ""
    for (x, y), (to_x, to_y) in itertools.pairwise(spots):
        path += f"L{x:g} {y + BOX_HEIGHT:g}" if path else f"M{x:g} {y + BOX_HEIGHT:g}"
        middle = y + BOX_HEIGHT + GAP_Y / 2
        path += f"C{x:g} {middle:g} {to_x:g} {middle:g} {to_x:g} {to_y:g}"
    path += f"M{to_x - 4:g} {to_y - 7:g}L{to_x:g} {to_y:g}L{to_x + 4:g} {to_y - 7:g}"
    return f"<path d='{path}' fill='none' stroke='#5b6b7c' stroke-width='1.3'/>"


def _text(x: float, y: float, kind: str, text: str) -> str:
    return f"<text x='{x:g}' y='{y:g}' class='{kind}' {FONT}>{escape(text)}</text>"


if __name__ == "__main__":
    PICTURE.write_text(drawing(), encoding="utf-8")
    print(f"{PICTURE.relative_to(ROOT)}: {len(set(neighbours()) - ground())} rooms on {len(floors())} floors")
