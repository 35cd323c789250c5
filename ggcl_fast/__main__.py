"""``python -m ggcl_fast``: see `ggcl_fast.commands.convert`."""

from .commands.convert import run

if __name__ == "__main__":
    run()
