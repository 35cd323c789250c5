"""``python -m ggcl_fast``: see `ggcl_fast.cli`."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
