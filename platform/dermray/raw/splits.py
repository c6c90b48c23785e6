"""What tables, folders and files call the splits that they hold, and the one name of each."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping

from dermray.raw.telling import most_frequent

_WORDS = {
    "train": ("train", "trains", "training", "trn"),
    "val": ("val", "vals", "valid", "validate", "validation", "validations", "dev", "develop", "development"),
    "test": ("test", "tests", "testing", "tst"),
}
SPLITS = {word: split for split, words in _WORDS.items() for word in words}
# `train set`, `test_split`, `validation-data`.
_TAIL = re.compile(r"(?<=[a-z])[\s_-]*(set|split|data|dataset)$")
_PART = re.compile(r"(?P<split>[a-z][a-z0-9_]*)-\d+-of-\d+\.")
# What parts of data sets without splits begin with.
_NO_SPLITS = frozenset({"data", "default", "file", "images", "part", "shard"})


def split_name(text: str) -> str:
    """A split as people write it (` TEST`, `Validation`, `dev`, `train set`) by its one name: train, val or test.

    Any other word is a split of its own, in lower case.
    """
    plain = text.strip().lower()
    return known_split(plain) or plain


def known_split(text: str) -> str | None:
    """Which of train, val and test a text means; None for any other."""
    plain = text.strip().lower()
    return SPLITS.get(plain) or SPLITS.get(_TAIL.sub("", plain))


def first_known(words: Iterable[str]) -> str | None:
    """The split that the first of some words means which means one."""
    return next((SPLITS[word] for word in words if word in SPLITS), None)


def split_of_file(path: str) -> str | None:
    """The split that the name of a data file begins with, or that a folder of it is called; None where none is named.

    `holdout-00000-of-00004.parquet` is a part of a split of that name, as `train-00000-of-00004.parquet` is.
    """
    *folders, name = path.lower().split("/")
    part = _PART.match(name)
    if part and part["split"] not in _NO_SPLITS:
        return split_name(part["split"])
    words = (re.split(r"[^a-z]", name)[0], *reversed(folders))
    return next(filter(None, map(known_split, words)), None)


def others(splits: Mapping[str, int], expected: Collection[str] = ()) -> Counter[str]:
    """Rows in splits that are none of train, val and test.

    Args:
        splits: split → how many rows are in it.
        expected: names that the user has given, of which nobody need be told.
    """
    return Counter({name: count for name, count in splits.items() if name not in {*_WORDS, *expected, ""}})


def told_of_others(found: Mapping[str, int]) -> Iterator[str]:
    """A line about what `others` found, if it did."""
    if found:
        num_rows, shown = sum(found.values()), most_frequent(found, "names")
        yield f"{num_rows:,} rows are in splits that are none of train, val and test, and stay so: {shown}"
