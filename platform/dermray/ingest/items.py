"""Items of several samples: pairs of a lesion, a patient's images, a series. Pure functions of arrays.

The samples of an item follow each other in one row group, so that no item costs another read; `keep_together=true` has
a preparation lay them so. An item is known by its first sample, which the plan draws:

    patients   a a a | b c c        row groups of 3
    lengths    2 0 0 | 0 2 0        pairs: one of a, whose third image begins none, and one of c
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from dermray.errors import PlanError


def of_neighbours(
    groups: Sequence[str | None], row_group_sizes: npt.NDArray[np.int64], *, most: int, least: int = 1
) -> npt.NDArray[np.int64]:
    """Items of samples that follow each other and are of one group, cut where a row group ends.

    Args:
        groups: of each sample, such as its patient; None: it has none, and is alone.
        row_group_sizes: samples of each row group, `[num_row_groups]`.
        most: samples of an item; a group of more gives several.
        least: groups, and rests of groups, of fewer begin no item.

    Returns:
        int64 `[num_samples]`: samples of the item that begins with each, 0 where none begins.

    Raises:
        PlanError: items of no sample are asked for, or the groups are not one a sample.
    """
    num_samples = len(groups)
    if most < 1 or num_samples != row_group_sizes.sum():
        raise PlanError(f"items of at most {most} of {row_group_sizes.sum()} samples with {num_samples} groups")
    if not num_samples:
        return np.zeros(0, dtype=np.int64)
    known: dict[str, int] = {}
    codes = np.array([-1 if group is None else known.setdefault(group, len(known)) for group in groups])
    begins = np.ones(num_samples, dtype=bool)
    begins[1:] = (codes[1:] != codes[:-1]) | (codes[1:] < 0)
    ends = np.cumsum(row_group_sizes)
    begins[ends[ends < num_samples]] = True
    # Runs [a a a] [b] begin at [0, 3], are [3, 1] long, and place their samples at [0, 1, 2, 0].
    firsts = np.flatnonzero(begins)
    sizes = np.diff(np.append(firsts, num_samples))
    places = np.arange(num_samples) - np.repeat(firsts, sizes)
    lengths = np.where(places % most == 0, np.minimum(most, np.repeat(sizes, sizes) - places), 0)
    return np.where(lengths >= least, lengths, 0).astype(np.int64)


def checked(lengths: npt.NDArray[np.int64], row_group_sizes: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Lengths of items, as int64 `[num_samples]`.

    Raises:
        PlanError: they are no array of so many integers from 0 on, or an item does not end in its row group.
    """
    num_samples = int(row_group_sizes.sum())
    if not isinstance(lengths, np.ndarray) or lengths.shape != (num_samples,) or lengths.dtype.kind not in "iu":
        raise PlanError(f"items must be an array of {num_samples} integers, the samples of the item that begins there")
    lengths, ends = lengths.astype(np.int64), np.repeat(np.cumsum(row_group_sizes), row_group_sizes)
    bad = np.flatnonzero((lengths < 0) | (np.arange(num_samples) + lengths > ends))
    if len(bad):
        raise PlanError(
            f"the item that begins with sample {bad[0]} is to have {lengths[bad[0]]} samples, and from there its row "
            f"group has {ends[bad[0]] - bad[0]}"
        )
    return lengths


def covered(drawn: npt.NDArray[np.bool_], lengths: npt.NDArray[np.int64] | None) -> npt.NDArray[np.bool_]:
    """Which samples are in an item whose first sample is drawn, `[num_samples]`; without lengths each is one."""
    if lengths is None:
        return drawn
    # First samples [0, 3] of items of [2, 1] samples: +1 where they begin and -1 after them add up to [1, 1, 0, 1].
    firsts = np.flatnonzero(drawn & (lengths > 0))
    changes = np.zeros(len(drawn) + 1, dtype=np.int64)
    np.add.at(changes, firsts, 1)
    np.add.at(changes, firsts + lengths[firsts], -1)
    return np.cumsum(changes)[:-1] > 0
