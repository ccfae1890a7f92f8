"""`python -m aiocomm` is the `aiocomm` command."""

import sys

from aiocomm.cli import main

if __name__ == "__main__":
    sys.exit(main())
