"""What ``ggcl-info`` shows of summaries: lines for a terminal, Markdown, JSON."""

from __future__ import annotations

import json
import math
import shutil
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final

from ..errors import printable
from ..inspection.made import Made
from ..inspection.summary import Summary
from .terminal import shown

__all__ = ["SORTED", "json_lines", "markdown", "plain", "text"]

_COLUMNS: Final = 40, 100, 200  # of a terminal: at least, where there is none, and at most
_SHORT: Final = 8  # characters of a fingerprint
_FORMATS: Final = {
    "ggcl": "a finetune checkpoint (ggcl)",
    "gguf": "a finetune checkpoint in GGUF form",
    "ggla": "an adapter (ggla)",
    "lora": "an adapter in GGUF form",
}


def _known(value: float | None) -> float:
    """Return `value` for sorting: what is not known, or no number, comes last."""
    return math.inf if value is None or math.isnan(value) else value


SORTED: Final[Mapping[str, Callable[[Any], Any]]] = {
    "name": lambda one: one.source,
    "loss": lambda one: (isinstance(one, Made) or one.verdict == "incomplete", _known(getattr(one, "loss", None))),
    "iterations": lambda one: math.inf if isinstance(one, Made) else one.training.iterations,
}


def plain(value: Any) -> Any:
    """Return `value`, a `Summary` or a part of one, as strict JSON has it: numbers that are not finite become null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if hasattr(value, "_asdict"):
        value = value._asdict()
    if isinstance(value, Mapping):
        return {key: plain(each) for key, each in value.items()}
    if isinstance(value, tuple | list):
        return [plain(each) for each in value]
    return value


def json_lines(known: Sequence[Summary | Made], *, tensors: bool, alone: bool) -> Iterator[str]:  # noqa: ARG001
    """Yield a JSON object for each."""
    for one in known:
        if isinstance(one, Made):
            yield json.dumps({**one._asdict(), "verdict": None})
            continue
        row = {**plain(one), "loss": plain(one.loss)}
        if not tensors:
            del row["tensors"], row["pairs"]
        yield json.dumps(row, allow_nan=False)


def _apart(known: Sequence[Summary | Made]) -> tuple[list[Made], list[Summary]]:
    return [one for one in known if isinstance(one, Made)], [one for one in known if not isinstance(one, Made)]


def text(known: Sequence[Summary | Made], *, tensors: bool, alone: bool) -> Iterator[str]:
    """Yield the lines for a terminal: all of one file where it is `alone`, otherwise a row for each."""
    made, summaries = _apart(known)
    yield from map(_made, made)
    if not alone:
        yield from _aligned(_rows(summaries), right=_ROWS_RIGHT) if summaries else ()
        yield from _remarks(summaries)
        return
    for one in summaries:
        yield f"{shown(one.source)}: {_FORMATS.get(one.format, one.format)}, {one.nbytes:,} bytes"
        facts = _facts(one)
        columns = min(max(_COLUMNS[0], shutil.get_terminal_size((_COLUMNS[1], 24)).columns), _COLUMNS[2])
        width = max(len(subject) for subject, _ in facts)
        for subject, fact in facts:
            head = f"{subject:<{width}}  "
            yield from textwrap.wrap(
                fact, columns, initial_indent=head, subsequent_indent=" " * len(head), break_long_words=False
            )
        if tensors:
            yield ""
            yield from _aligned(_tensor_rows(one), right=_TENSORS_RIGHT)


def markdown(known: Sequence[Summary | Made], *, tensors: bool, alone: bool) -> Iterator[str]:
    """Yield the same as Markdown."""
    made, summaries = _apart(known)
    yield from (f"{_escaped(_made(one))}\n" for one in made)
    if not alone:
        yield from _table(_rows(summaries), right=_ROWS_RIGHT) if summaries else ()
        remarks = list(_remarks(summaries))
        yield from (f"{'' if i else chr(10)}- {_escaped(line)}" for i, line in enumerate(remarks))
        return
    for one in summaries:
        yield f"# {_escaped(shown(one.source))}\n"
        yield f"{_FORMATS.get(one.format, _escaped(one.format)).capitalize()}, {one.nbytes:,} bytes.\n"
        yield from _table([("subject", "what the file says"), *_facts(one)], right=())
        if tensors:
            yield "\n## Tensors\n"
            yield from _table(_tensor_rows(one), right=_TENSORS_RIGHT)


def _made(one: Made) -> str:
    """Say in a line what a model or folder is that has a training in it."""
    if one.format == "peft":
        facts = ["an adapter for Hugging Face's PEFT"]
        facts += [f"rank {one.rank}"] if one.rank is not None else []
    else:
        training = printable((one.training or "unknown")[:_SHORT])
        facts = [f"a model with {printable(one.holds or 'something')} of training {training}"]
        facts += [f"made by ggcl_fast {printable(one.version or 'unknown')}"]
    facts += [f"called {printable(one.name)}"] if one.name else []
    facts += [f"upon {printable(one.base)}"] if one.base else []
    facts += [f"{one.n_tensors:,} tensors"] if one.n_tensors is not None else []
    return f"{shown(one.source)}: {', '.join([*facts, f'{one.nbytes:,} bytes'])}"


_TITLES: Final = {"adam": "Adam", "lbfgs": "L-BFGS"}


def _facts(one: Summary) -> list[tuple[str, str]]:
    """Return what is told of a single file, subject by subject."""
    p, t = one.parameters, one.training
    told = p._asdict() if p.n_head_kv != p.n_head else p._replace(n_head_kv=0)._asdict()
    shape = ", ".join(f"{name} {value}" for name, value in told.items() if value)
    by_rank: dict[int, list[str]] = {}
    for name, rank in one.ranks.items():
        if rank or one.optimizer is not None:
            by_rank.setdefault(rank, []).append(name)
    ranks = "; ".join(f"{rank} for {', '.join(names)}" for rank, names in sorted(by_rank.items(), reverse=True))
    facts = [
        ("verdict", f"{one.verdict}: {'; '.join(one.reasons)}"),
        ("model", f"{one.model}: {shape}"),
        ("ranks", ranks if len(by_rank) != 1 else f"{next(iter(by_rank))} for all"),
        ("training", f"{t.iterations:,} iterations, {t.samples:,} samples, {t.tokens:,} tokens"),
        ("optimizer", _optimizer(one)),
        ("parameters", f"{one.n_parameters:,} in {len(one.pairs)} pairs"),
    ]
    deltas = f"norm {_number(one.delta_norm)} in all"
    if one.norm_change is not None:
        deltas += f"; norms changed by up to {_per_cent(one.norm_change)}"
    facts.append(("deltas", deltas if one.scale == 1 else f"{deltas}; scale {_scale(one)}"))
    if one.moments is not None:
        m = one.moments
        first, second = (
            f"{_number(low)} to {_number(high)}"
            for low, high in ((m.first_minimum, m.first_maximum), (m.second_minimum, m.second_maximum))
        )
        facts.append(("moments", f"first {first}, second {second}"))
    return facts


def _scale(one: Summary) -> str:
    return f"{one.scale:g}" if one.scale is not None else "by rank"


def _optimizer(one: Summary) -> str:
    state = one.optimizer
    if state is None:
        return "none"
    last = "" if state.name == "lbfgs" else f", last {_number(one.loss)}"
    return (
        f"{_TITLES[state.name]}, iteration {state.iteration:,}: best loss {_number(state.best_loss)}{last}, "
        f"{state.no_improvement_count:,} without improvement"
    )


_Row = Sequence[str]
_ROWS_RIGHT: Final = range(1, 8)
_TENSORS_RIGHT: Final = range(2, 9)


def _rows(summaries: Sequence[Summary]) -> list[_Row]:
    """Return the table of several files, the heading first; the name, which has no bounds, is last."""
    rows: list[_Row] = [("verdict", "iterations", "loss", "best", "stalled", "|delta|", "norms", "MB", "file")]
    for one in summaries:
        state = one.optimizer
        rows.append((
            one.verdict,
            f"{one.training.iterations:,}",
            _number(one.loss),
            _number(state.best_loss) if state else "-",
            f"{state.no_improvement_count:,}" if state else "-",
            _number(one.delta_norm),
            _per_cent(one.norm_change),
            f"{one.nbytes / 1e6:,.1f}",
            shown(one.source),
        ))  # fmt: skip
    return rows


def _remarks(summaries: Sequence[Summary]) -> Iterator[str]:
    """Yield what the table of several files does not say: the models, why some are not healthy, and the best."""
    names = sorted({one.model for one in summaries})
    if names:
        yield f"model: {', '.join(names)}"
    for one in summaries:
        if one.verdict != "healthy":
            yield f"{one.verdict}: {shown(one.source)}: {'; '.join(one.reasons)}"
    sound = [one for one in summaries if one.verdict == "healthy" and math.isfinite(_known(one.loss))]
    if sound:
        best = min(sound, key=SORTED["loss"])
        yield f"lowest loss of the healthy ones: {_number(best.loss)}, {shown(best.source)}"


def _tensor_rows(one: Summary) -> list[_Row]:
    """Return the table of tensors; a pair's delta stands beside its lora_b."""
    deltas = {f"{pair.weight}.lora_b": pair.norm if pair.trained else 0.0 for pair in one.pairs}
    sizes = {f"{pair.weight}.lora_b": math.sqrt(pair.n_in * pair.n_out) for pair in one.pairs}
    rows: list[_Row] = [("tensor", "shape", "min", "max", "zeros", "NaN", "inf", "|delta|", "RMS")]
    rows += [
        (
            printable(each.name),
            " x ".join(map(str, each.shape)),
            _number(each.minimum),
            _number(each.maximum),
            f"{each.n_zero:,}" if each.n_zero else "",
            f"{each.n_nan:,}" if each.n_nan else "",
            f"{each.n_inf:,}" if each.n_inf else "",
            _number(deltas[each.name]) if each.name in deltas else "",
            _number(_divided(deltas[each.name], sizes[each.name])) if each.name in deltas else "",
        )
        for each in one.tensors
    ]
    return rows


def _divided(norm: float | None, size: float) -> float | None:
    """Return a norm by the size of its matrix: what a value of it has, as a root mean square."""
    return norm / size if norm is not None else None


def _aligned(rows: Sequence[_Row], *, right: Sequence[int]) -> Iterator[str]:
    """Yield `rows` with their columns below each other; those of `right` are flush right."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    for row in rows:
        cells = (cell.rjust(w) if i in right else cell.ljust(w) for i, (cell, w) in enumerate(zip(row, widths)))
        yield "  ".join(cells).rstrip()


def _table(rows: Sequence[_Row], *, right: Sequence[int]) -> Iterator[str]:
    """Yield `rows`, the heading first, as a Markdown table."""
    heading, *rest = rows
    yield f"| {' | '.join(heading)} |".replace("|delta|", "\\|delta\\|")
    yield f"|{'|'.join('---:' if i in right else '---' for i in range(len(heading)))}|"
    for row in rest:
        yield f"| {' | '.join(map(_escaped, row))} |"


def _escaped(cell: str) -> str:
    """Return `cell` with what Markdown would take for its own escaped."""
    return "".join(f"\\{c}" if c in "\\`*_{}[]<>#|" else c for c in cell)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _per_cent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.3g} %"
