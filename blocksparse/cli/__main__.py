"""`python -m blocksparse.cli` is the command `blocksparse`."""

from __future__ import annotations

import sys

from blocksparse.cli import main

if __name__ == "__main__":
    sys.exit(main())
