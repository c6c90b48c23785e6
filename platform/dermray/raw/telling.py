"""How a message names texts of a table: the most frequent ones with their number, and how many others there are."""

from __future__ import annotations

from collections.abc import Mapping

NUM_TOLD = 5
MAX_SHOWN_CHARS = 40


def most_frequent(counts: Mapping[str, int], others: str = "texts", *, max_chars: int = MAX_SHOWN_CHARS) -> str:
    """`'w' (5), '0' (4) and 2 other texts`: of equal counts by the alphabet, so that nothing hangs on the order.

    Args:
        counts: texts, and how often each stands.
        others: what they are.
        max_chars: of a text that are shown.
    """
    ranked = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    shown = ", ".join(f"{text[:max_chars]!r} ({count:,})" for text, count in ranked[:NUM_TOLD])
    return shown + (f" and {len(ranked) - NUM_TOLD:,} other {others}" if len(ranked) > NUM_TOLD else "")


def not_understood(field: str, texts: Mapping[str, int], becomes: str) -> str:
    """One line about the texts of a field that no reading fits; `becomes`: what is done with them."""
    return f"{sum(texts.values()):,} rows have no {field} that is understood; {becomes}: {most_frequent(texts)}"
