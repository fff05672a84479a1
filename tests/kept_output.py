"""Runs a compiler and keeps what it says in a file beside the object it writes: kept_output.py COMPILER ARGUMENT..."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

command = sys.argv[1:]
done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
sys.stdout.write(done.stdout)
if "-o" in command:
    Path(command[command.index("-o") + 1] + ".log").write_text(done.stdout)
sys.exit(done.returncode)
