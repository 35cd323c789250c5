"""``python -m ggcl_fast``: see `ggcl_fast.cli`."""

from .cli import run

if __name__ == "__main__":
    run()
