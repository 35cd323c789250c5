"""Timing a comparison: both sides in turn, so that a drift of the machine's speed hits both alike."""

from __future__ import annotations

import gc
import os
import statistics
import time
from pathlib import Path
from typing import Any

from . import contenders as c
from .comparisons import Comparison, Sizes


def measure(comparison: Comparison, folder: Path, sizes: Sizes, benchmark: Any) -> float:
    """Time `comparison` with the `benchmark` fixture and return its result, which goes into ``extra_info`` too.

    Their side runs before ours in one round and after it in the next.  The result is the median of the rounds'
    ratios, whose quartiles are told too; for memory it is the difference in MB.
    """
    made = comparison.make(folder, sizes)
    if isinstance(made, tuple):
        ours, theirs = made
        result = (ours - theirs) / 1e6
        benchmark.extra_info.update(ours=ours / 1e6, theirs=theirs / 1e6)
        benchmark.pedantic(lambda: None)  # a benchmark that times nothing would be an error
    else:
        seconds: list[float] = []

        def clean() -> None:
            c.discard(*made.outputs)
            if made.outputs and not quick:
                os.sync()  # or the other side's removed output would still keep the file system busy

        def their_turn() -> None:
            begin = time.perf_counter()
            made.theirs()
            seconds.append((time.perf_counter() - begin) / made.work[1])
            clean()

        own: list[float] = []

        def our_turn() -> None:
            begin = time.perf_counter()
            made.ours()
            own.append((time.perf_counter() - begin) / made.work[0])

        quick = False
        for _ in range(2):  # rounds not counted: caches warm, modules imported, the pass compiled, memory touched
            clean()
            their_turn()
            our_turn()
        clean()
        quick = max(seconds[1] * made.work[1], own[1] * made.work[0]) < 0.05
        seconds.clear()
        own.clear()
        gc.collect()
        rounds = sizes.rounds_small if quick else sizes.rounds_large

        def before() -> None:
            if len(own) % 2 == 0:
                their_turn()

        def after() -> None:
            clean()
            if len(own) % 2 == 0:  # the round that has just ended was an odd one
                their_turn()

        benchmark.pedantic(our_turn, setup=before, teardown=after, rounds=rounds)
        made.close()
        ratios = [mine / yours for mine, yours in zip(own, seconds)]
        result = statistics.median(ratios)
        quartiles = statistics.quantiles(ratios, n=4, method="inclusive")[::2] if len(ratios) > 1 else ratios * 2
        benchmark.extra_info.update(ours=statistics.median(own), theirs=statistics.median(seconds), quartiles=quartiles)
    benchmark.extra_info.update(name=comparison.name, result=result)
    return result
