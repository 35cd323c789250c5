"""``python -m bench``: run the suite, print the table of ratios beside their targets.

python -m bench                                   # six minutes on two cores, 16 GB of disk
python -m bench --large 4e9 --folder /mnt/bench   # larger, elsewhere
python -m bench --json results.json --plot results.png --check
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
from datetime import date
from pathlib import Path
from typing import Any

import pytest

from .comparisons import COMPARISONS, Comparison, Sizes


def main() -> int:
    """Run the command; exit status 1 where a benchmark failed, or with --check where a target was missed."""
    parser = argparse.ArgumentParser(prog="python -m bench", description="Run the benchmarks and print their ratios.")
    parser.add_argument(
        "--large", default=str(Sizes.large), help="bytes of the large checkpoint (default: %(default)s)"
    )
    parser.add_argument("--folder", help="folder for inputs and outputs, on the file system to measure")
    parser.add_argument("--json", type=Path, help="save pytest-benchmark's results")
    parser.add_argument("--plot", type=Path, help="draw the ratios (needs the bench extra)")
    parser.add_argument("--from", dest="saved", type=Path, help="show saved results instead of running")
    parser.add_argument("--check", action="store_true", help="exit with 1 when a target is missed")
    parser.add_argument("--tolerance", type=float, default=0.1, help="share by which --check lets a target be missed")
    args = parser.parse_args()

    with tempfile.TemporaryDirectory() as scratch:
        results = args.saved or args.json or Path(scratch, "results.json")
        if args.saved is None:
            options = [f"--benchmark-json={results}", f"--large={args.large}"]
            options += [f"--bench-folder={args.folder}"] if args.folder else []
            fixed = [str(Path(__file__).parent), "--quiet", "--benchmark-enable", "--benchmark-quiet"]
            status = pytest.main([*fixed, "-p", "no:cacheprovider", *options])
            if status:
                return 1
        saved = json.loads(results.read_text())
    found = {one["extra_info"]["name"]: one["extra_info"] for one in saved["benchmarks"]}
    print(table(found))
    print(f"\n{machine()}")
    if args.plot:
        from .plot import draw

        draw(found, args.plot)
    missed = [one for one in COMPARISONS if one.name in found and not met(one, found[one.name], args.tolerance)]
    if args.check and missed:
        print(f"missed: {', '.join(one.name for one in missed)}", file=sys.stderr)
        return 1
    return 0


def met(comparison: Comparison, found: dict[str, Any], tolerance: float = 0.0) -> bool:
    """Tell whether a result is within its target."""
    return comparison.target is None or bool(found["result"] <= comparison.target * (1 + tolerance))


def table(found: dict[str, dict[str, Any]]) -> str:
    """Return the results as a Markdown table."""
    rows = ["| group | what | against | ratio | quartiles | target | |", "|---|---|---|---|---|---|---|"]
    for one in COMPARISONS:
        if one.name not in found:
            continue
        result = found[one.name]
        target = "" if one.target is None else f"at most {one.target:.3g} {one.unit}"
        verdict = "" if one.target is None else "met" if met(one, result) else "missed"
        number = f"{result['result']:.1f}" if one.unit == "MB" else f"{result['result']:.3g}"
        spread = " to ".join(f"{quartile:.3g}" for quartile in result.get("quartiles", ()))
        rows.append(
            f"| {one.group} | {one.ours} | {one.theirs} | {number} {one.unit} | {spread} | {target} | {verdict} |"
        )
    return "\n".join(rows)


def machine() -> str:
    """Return a line on where and when this was measured."""
    system = f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores"
    return f"{system}, Python {platform.python_version()}, {date.today()}"


if __name__ == "__main__":
    sys.exit(main())
