"""The words of messages: names on one line, lists that end, counted nouns."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Mapping

# Notes name so many files and count the others; errors, which are about these files, more of them.
NAMED = 10
LISTED = 100


def shown(text: str) -> str:
    """A name for a message of one line: control characters and bytes that are no UTF-8 are escaped."""
    return "".join(
        character.encode("unicode_escape").decode()
        if unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp")
        else character
        for character in text
    )


def counted(number: int, noun: str, plural: str | None = None) -> str:
    """``1 file``, ``2 files``."""
    return f"{number} {noun if number == 1 else plural or noun + 's'}"


def listed(names: Iterable[str], most: int = NAMED) -> str:
    """The first names, each with its reason if ``names`` maps it to one, and how many more there are."""
    reasons: Mapping[str, str] = names if isinstance(names, Mapping) else dict.fromkeys(names, "")
    named = [shown(name) + (f" ({reasons[name]})" if reasons[name] else "") for name in list(reasons)[:most]]
    more = len(reasons) - len(named)
    return ", ".join(named) + (f" and {more} more" if more else "")
