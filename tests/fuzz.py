"""Fuzzing, guided by coverage: ``python -m tests.fuzz FOLDER [libFuzzer's options]``, with the fuzz extra.

FOLDER keeps the corpus; an empty one is filled with the real files of every kind, the sound ones and the hostile ones
of the tests, checkpoints and base models.  Half of the executions open a file as a checkpoint, half convert it by a
route of `routes`, as a checkpoint or as a base model.
``-max_total_time=600`` ends after ten minutes, ``-runs=1000000`` after a million executions.  Whatever breaks a promise
ends the run and is written to ``crash-*``.
"""

import random
import sys
import zlib
from pathlib import Path

import atheris

# The pass itself is instrumented only after numba has compiled it: instrumented code cannot be compiled.
with atheris.instrument_imports(include=["ggcl_fast"], exclude=["ggcl_fast.readers.sweep"]):
    # At their first use it would be too late.
    from ggcl_fast.readers import engine, ggla, gguf, sweep  # noqa: F401
    from ggcl_fast.targets import adapter, merged, peft  # noqa: F401

    from .hostile import HOSTILE
    from .hostile_gguf import HOSTILE_GGLA, HOSTILE_GGUF
    from .mutations import BASES, examine, mutate, spoil
    from .reference import DATA, FIXTURES, LATER_FIXTURES
    from .routes import CHECKPOINTS, MODELS, hold_any

_LONGEST_FILE = 1 << 20
_TRACED = 64  # of so many executions one is watched for its memory, which takes ten times as long
_ROUTED = 2  # of so many executions one converts


def _try(data: bytes) -> None:
    rng = random.Random(zlib.crc32(data))  # the same for a file in every process, so that a crash comes again
    traced = rng.randrange(_TRACED) == 0
    if rng.randrange(_ROUTED) == 0:
        hold_any(data, rng, traced=traced)
    else:
        examine(data, traced=traced)


def _mutate(data: bytes, longest: int, seed: int) -> bytes:
    rng = random.Random(seed)
    if rng.randrange(4) == 0:
        return bytes(atheris.Mutate(data, longest))
    for _ in range(rng.randrange(1, 4)):
        data = rng.choice((mutate, mutate, spoil))(data, rng)
    return data[:longest]


def main() -> None:
    """Run the fuzzer; it ends the process."""
    if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
        sys.exit(__doc__)
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    if not any(folder.iterdir()):
        files = [(DATA / name).read_bytes() for name in (*FIXTURES, *LATER_FIXTURES)]
        hostile = [one.data() for table in (HOSTILE, HOSTILE_GGUF, HOSTILE_GGLA) for one in table.values()]
        for i, data in enumerate([*files, *BASES, *CHECKPOINTS, *MODELS, *hostile]):
            (folder / f"seed-{i}").write_bytes(data)
    engine.compiled()
    atheris.instrument_func(sweep.sweep)
    atheris.instrument_func(engine.walk)
    atheris.Setup([*sys.argv, f"-max_len={_LONGEST_FILE}"], _try, custom_mutator=_mutate)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
