"""``python -m gencore``: the command line."""

import sys

from gencore.cli import main

if __name__ == "__main__":
    sys.exit(main())
