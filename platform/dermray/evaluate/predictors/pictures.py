"""Predictions from images themselves: Ray Data over a pool of workers, one row group or some image files a piece."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from dermray import images, pieces
from dermray.errors import EvaluationError, ImageError
from dermray.evaluate.predictors.contract import UNREADABLE, Predicted, Seen
from dermray.evaluate.settings import EvaluateConfig
from dermray.progress import Progress, Say, print_line
from dermray.vectors.embedding.units import Images

# From images, uint8 `[H, W, 3]` of sizes of their own, upright and in sRGB, to a row of numbers for each: `[n, …]`.
Look = Callable[[list[np.ndarray]], np.ndarray]


@dataclass(frozen=True)
class _Piece:
    """Images of one unit that are asked for: its rows, and where their answers go."""

    unit: Images
    rows: tuple[int, ...]
    places: tuple[int, ...]


@dataclass(frozen=True)
class Looker:
    """Reads, decodes and looks at some images at a time; it travels to the workers, with what `look` has not loaded."""

    look: Look
    batch_size: int

    def __call__(self, piece: _Piece) -> tuple[np.ndarray, np.ndarray]:
        """Numbers of the images that can be decoded `[n, …]`, and why others cannot, object `[N]`: else empty.

        Raises:
            CorpusError: a shard cannot be read.
            EvaluationError: `look` gives another number of rows than it is given images.
        """
        encoded = piece.unit.read()
        found, reasons = [], []
        for start in range(0, len(piece.rows), self.batch_size):
            decoded = [_decoded(encoded[row]) for row in piece.rows[start : start + self.batch_size]]
            readable = [one for one in decoded if one is not None]
            reasons += ["" if one is not None else UNREADABLE for one in decoded]
            if readable:
                said = np.asarray(self.look(readable))
                if said.ndim == 0 or len(said) != len(readable):
                    raise EvaluationError(f"the predictor gives {list(said.shape)} for {len(readable)} images")
                found.append(said)
        return np.concatenate(found) if found else np.zeros(0), np.array(reasons, dtype=object)


def look_at(seen: Seen, look: Look, config: EvaluateConfig, *, say: Say = print_line) -> Predicted:
    """Have the images of some samples looked at, on the connected Ray cluster.

    Args:
        seen: the samples.
        look: picklable; what is dear to load it loads when it is first called. A worker keeps one copy.
        config: of the run: `batch_size` images at a time, `num_actors` workers (empty: one per GPU, else one per two
            logical CPUs).
        say: takes lines of progress.

    Raises:
        EvaluationError: no image can be decoded, or `look` gives what is no row an image or no finite number.
        DermRayError: a shard cannot be read, or a worker is lost again and again.
        Exception: what `look` raises, as it is.
    """
    wanted = {f"images from number {one.unit.position} on": one for one in _pieces(seen)}
    pool = pieces.Pool.of_models(
        "predictor",
        config.num_actors,
        noun="piece",
        operator="LookAtImages",
        kept="predictions are not kept: run the same command again",
    )
    answers: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    with Progress("predict", len(seen.rows), "images", waits_for=pool.waits_for(), say=say) as progress:
        for name, answer in pieces.run(wanted, Looker(look, config.batch_size), pool, say=say):
            answers[name] = answer
            progress.advance(len(wanted[name].rows))
    return _together(len(seen.rows), [(piece, *answers[name]) for name, piece in wanted.items()])


def _pieces(seen: Seen) -> list[_Piece]:
    """The units that hold rows which are asked for."""
    found = []
    for unit in seen.samples.images:
        places = np.flatnonzero((seen.rows >= unit.position) & (seen.rows < unit.position + unit.num_rows))
        if len(places):
            found.append(_Piece(unit, tuple((seen.rows[places] - unit.position).tolist()), tuple(places.tolist())))
    return found


def _together(num_rows: int, answers: Sequence[tuple[_Piece, np.ndarray, np.ndarray]]) -> Predicted:
    """The answers of all pieces in the order of the samples.

    Raises:
        EvaluationError: there is none, they have several shapes, or some number is not finite.
    """
    reasons = np.full(num_rows, UNREADABLE, dtype=object)
    shapes = {said.shape[1:] for _, said, _ in answers if len(said)}
    if len(shapes) != 1:
        many = f"answers of several shapes, {sorted(map(list, shapes))}"
        raise EvaluationError(f"the predictor gives {many}" if shapes else f"none of the {num_rows} images is readable")
    values = np.zeros((num_rows, *shapes.pop()), np.result_type(*(said.dtype for _, said, _ in answers if len(said))))
    for piece, said, why in answers:
        places = np.array(piece.places)
        reasons[places] = why
        values[places[why == ""]] = said
    if not np.isfinite(values).all():
        raise EvaluationError("the predictor gives numbers that are not finite; its weights are damaged or diverged")
    return Predicted(values, reasons)


def _decoded(data: bytes | None) -> np.ndarray | None:
    try:
        return None if data is None else images.decode(data)
    except ImageError:
        return None
