"""The command line: ``gencore train``, ``gencore sample`` and the rest, one module per command.

What the user can get wrong is said on stderr, one line per fault and no traceback, with exit code 2.
"""

from __future__ import annotations

import codecs
import io
import os
import sys
import unicodedata
from collections.abc import Sequence

_TRAIN_EXTRA = ("jinja2", "matplotlib", "PIL", "rich", "safetensors", "sklearn", "tqdm", "typer")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command in ``arguments`` (default: the process's) and returns its exit code.

    0: done; 2: a mistake of the user or a refusal of the system, said on stderr; 130: interrupted (143 by SIGTERM, 129
    by SIGHUP).
    """
    # A stream that was closed before is None.
    sys.stdout, sys.stderr = sys.stdout or open(os.devnull, "w"), sys.stderr or open(os.devnull, "w")  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        # Whatever a terminal can show, or a file name holds, a message is no reason to fail.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=_approximated.__name__)
    try:
        from gencore.cli.app import run

        return run(arguments)
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing not in _TRAIN_EXTRA:
            raise
        print(f"gencore: this needs {missing}, which is not installed: pip install 'gencore[train]'", file=sys.stderr)
        return 2


_SUBSTITUTES = {"µ": "u", "½": "1/2", "±": "+/-", "×": "x", "–": "-", "—": "-", "…": "...", "≥": ">=", "≤": "<="}


def _approximated(error: UnicodeError) -> tuple[str | bytes, int]:
    """What is written for a character that an encoding lacks: the bytes of a file name as they are, ``e`` for ``é``."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    character = error.object[error.start]
    if "\udc80" <= character <= "\udcff":  # a byte of a file name that is not UTF-8
        return character.encode("ascii", "surrogateescape"), error.start + 1
    # An accent is taken away, a character that stands for several is not spelled out.
    spelled = unicodedata.normalize("NFKD", character)
    base = spelled[0] if spelled[0].isascii() and all(map(unicodedata.combining, spelled[1:])) else "?"
    return _SUBSTITUTES.get(character, base), error.start + 1


codecs.register_error(_approximated.__name__, _approximated)
