"""`python -m qkernels.autotune`."""

from __future__ import annotations

import sys

from qkernels.autotune.command import main

if __name__ == "__main__":
    sys.exit(main())
