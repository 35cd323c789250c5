"""The benchmarks at tiny sizes, so that they cannot rot, and the contenders' results against each other."""

import json
from pathlib import Path
from typing import Any

import pytest

from bench import __main__ as report
from bench import contenders
from bench.comparisons import COMPARISONS, Comparison, Sizes
from bench.measure import measure
from ggcl_fast import convert, open_checkpoint
from ggcl_fast.inspection import survey

from .engines import needs_numba

pytestmark = needs_numba  # against which the others are compared

TINY = Sizes(large=5_000_000, small=100_000, n_files=2, n_tensors=200, rounds_large=1, rounds_small=1)


@pytest.mark.parametrize("comparison", COMPARISONS, ids=lambda comparison: comparison.name)
def test_comparison_runs(comparison: Comparison, tmp_path: Path, benchmark: Any) -> None:
    assert 0 < measure(comparison, tmp_path, TINY, benchmark) < 1000
    assert benchmark.extra_info["name"] == comparison.name


def test_names_are_unique() -> None:
    assert len({comparison.name for comparison in COMPARISONS}) == len(COMPARISONS)


def test_contenders_do_the_same_work(tmp_path: Path) -> None:
    source = contenders.checkpoint(tmp_path, contenders.SHAPES["7B"], 100_000)
    convert(source, tmp_path / "ours.gguf")
    contenders.plain_gguf_writer(source, tmp_path / "theirs.gguf")
    assert (tmp_path / "ours.gguf").read_bytes() == (tmp_path / "theirs.gguf").read_bytes()

    over = contenders.Pass.over(source)
    over.jitted()()
    assert len(over.table) == 582
    assert contenders.struct_reader(over.data, over.planned) == over.table.tolist()


def test_contenders_see_the_same_values(tmp_path: Path) -> None:
    path = contenders.checkpoint(tmp_path, contenders.SHAPES["7B"], 5_000_000)
    look = survey.compiled().survey
    for block in contenders.blocks(path, 3_000_000):
        found, theirs = look(block), contenders.numpy_passes(block)
        assert (found.n_nan, found.n_inf, found.lowest, found.highest) == theirs[:4]
        assert found.squares == pytest.approx(theirs[4], rel=1e-5)
    norms = [pair.norm for pair in contenders.summary(path).pairs]
    assert contenders.summary_by_numpy(path) == pytest.approx(norms, rel=1e-4)


@pytest.mark.parametrize("nbytes", [1_000_000, 2_000_000, 200_000_000])
@pytest.mark.parametrize("shape", ["7B", "13B"])
def test_sizes_come_out_as_asked(shape: str, nbytes: int) -> None:
    scaled = contenders.scaled(contenders.SHAPES[shape], nbytes)
    assert scaled.n_layer == contenders.SHAPES[shape].n_layer
    assert nbytes / 2 < contenders.size_of(scaled) < nbytes * 2


def test_the_report_prints_a_row_for_each_result(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib")
    infos = [{"name": one.name, "result": 0.5, "ours": 1, "theirs": 2} for one in COMPARISONS]
    saved = tmp_path / "results.json"
    saved.write_text(json.dumps({"benchmarks": [{"extra_info": info} for info in infos]}))
    argv = ["bench", "--from", str(saved), "--plot", str(tmp_path / "plot.png")]
    monkeypatch.setattr("sys.argv", argv)
    assert report.main() == 0
    out = capsys.readouterr().out
    assert out.count("\n| ") == len(COMPARISONS)
    assert out.count("| missed |") == sum(1 for one in COMPARISONS if one.target is not None and one.target < 0.5)
    assert (tmp_path / "plot.png").stat().st_size > 10_000
    monkeypatch.setattr("sys.argv", [*argv, "--check"])
    assert report.main() == 1


def test_the_fixture_opens(tmp_path: Path) -> None:
    with open_checkpoint(contenders.tiny(tmp_path)) as checkpoint:
        assert checkpoint.source.size == 95308
