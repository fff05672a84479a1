"""The command line: ``gencore train``, ``gencore sample`` and the rest, one module per command.

What the user can get wrong is said on stderr, one line per fault and no traceback, with exit code 2.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

_TRAIN_EXTRA = ("accelerate", "jinja2", "matplotlib", "PIL", "rich", "safetensors", "sklearn", "tqdm", "typer")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command in ``arguments`` (default: the process's) and returns its exit code.

    0: done; 2: a mistake of the user or a refusal of the system, said on stderr; 130: interrupted.
    """
    try:
        from gencore.cli.app import run

        return run(arguments)
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing not in _TRAIN_EXTRA:
            raise
        print(f"gencore: this needs {missing}, which is not installed: pip install 'gencore[train]'", file=sys.stderr)
        return 2
