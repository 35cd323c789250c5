"""The second command: every option, exit status and message."""

import dataclasses
import json
import math
import os
import re
import signal
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import ggcl_fast
from ggcl_fast import open_checkpoint, summarise
from ggcl_fast.commands import info, tables
from ggcl_fast.commands.info import main
from ggcl_fast.commands.tables import plain
from ggcl_fast.inspection import plot

from ..engines import COMPILED_OR_NOT
from ..hostile import ADAM, ODD, put, with_header, with_values
from ..reference import DATA, FIXTURES

PATHS = [str(DATA / name) for name in FIXTURES]
TRAINED = str(DATA / "trained.ggcl")
LBFGS = str(DATA / "lbfgs.ggcl")
COMMAND = [sys.executable, "-m", "ggcl_fast.commands.info"]


def shown(capsys: pytest.CaptureFixture[str], *argv: str, status: int = 0) -> str:
    """Run the command, hold that it has `status` and says nothing on standard error if that is 0."""
    assert main(argv) == status
    captured = capsys.readouterr()
    assert bool(captured.err) == bool(status)
    return captured.out


def strict(line: str) -> Any:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    return json.loads(line, parse_constant=refuse)


@pytest.fixture
def run(tmp_path: Path) -> list[str]:
    """Checkpoints of one training: the second diverged, the third is the best, the last has no losses."""
    paths = []
    for i, (iterations, loss, nan) in enumerate(
        [(30, 3.0, False), (10, 1.0, True), (20, 2.0, False), (5, math.nan, 0)]
    ):
        data = put(with_header("train_its", iterations), len(ADAM) - 12, "<2f", loss, loss)
        paths.append(tmp_path / f"chk-{'cadb'[i]}.ggcl")
        paths[-1].write_bytes(with_values(3, [math.nan], data) if nan else data)
    return [str(path) for path in paths]


# --- one file -------------------------------------------------------------------------------------------------------


def test_one_file_is_shown_whole(capsys: pytest.CaptureFixture[str]) -> None:
    out = shown(capsys, TRAINED)
    assert out.startswith(f"{TRAINED}: a finetune checkpoint (ggcl), 163,468 bytes\n")
    for fact in (
        "verdict     healthy: every value is finite; all 21 deltas are trained",
        "model       unknown: n_vocab 288, n_embd 64, n_mult 32, n_head 4, n_layer 2, n_rot 16, n_ff 192\n",
        "ranks       4 for tok_embeddings, output, wq, wk, wv, wo, w1, w2, w3; 1 for norm,",
        "training    320 iterations, 1,280 samples, 40,960 tokens",
        "optimizer   Adam, iteration 320: best loss 0.7144, last 0.6566, 0 without improvement",
        "parameters  13,381 in 21 pairs",
        "deltas      norm 27.84 in all; norms changed by up to 146 %",
        "moments     first -0.03409 to 0.03594, second 0 to 0.004424",
    ):
        assert fact in out
    assert "L-BFGS, iteration 0: best loss 5.665, 0 without improvement" in shown(capsys, LBFGS)


def test_the_table_of_tensors_is_aligned_and_can_be_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    head, table = shown(capsys, TRAINED).split("\n\n")
    rows = table.splitlines()
    assert rows[0].split() == ["tensor", "shape", "min", "max", "zeros", "NaN", "inf", "|delta|", "RMS"]
    assert len(rows) == 1 + 44
    (row,) = (row for row in rows if row.startswith("blk.0.attn_q.weight.lora_b"))
    assert row.split() == ["blk.0.attn_q.weight.lora_b", "64", "x", "4", "-0.5701", "0.428", "4.691", "0.0733"]
    assert float(row.split()[-1]) == pytest.approx(4.691 / 64, rel=1e-3)
    assert len({row.index(" x ") for row in rows[1:7]}) == 3  # left-aligned: by the first number's digits
    assert {len(row) for row in rows if row.endswith(tuple("0123456789")) and "lora_b" in row} == {len(rows[0])}
    assert shown(capsys, TRAINED, "--no-tensors") == head + "\n"


@pytest.mark.parametrize("path", PATHS)
def test_nothing_is_wider_than_100_columns(path: str, capsys: pytest.CaptureFixture[str]) -> None:
    for lines in (shown(capsys, path).splitlines()[1:], shown(capsys, path, path).splitlines()):
        assert max(len(line.replace(str(DATA), "")) for line in lines) <= 100


def test_values_that_are_not_finite_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "in.ggcl"
    path.write_bytes(ODD)
    out = shown(capsys, str(path))
    assert "verdict     diverged: 2 of 44 tensors have values that are not finite: output_norm.weight.lora_b" in out
    (row,) = (line for line in out.splitlines() if line.startswith("blk.1.ffn_up.weight.lora_a"))
    assert row.split()[-2:] == ["1", "2"]
    assert re.search(r"^output_norm\.weight\.lora_b +1 x 1 +- +- +1 +nan +nan$", out, re.MULTILINE)


def test_an_adapter_without_an_optimizer_is_shown() -> None:
    with open_checkpoint(ADAM) as checkpoint:
        summary = summarise(dataclasses.replace(checkpoint, optimizer=None, format="ggla", scale=0.5))
    assert summary.loss is None
    with open_checkpoint(ADAM) as checkpoint:
        assert (summary.delta_norm or 0) * 2 == pytest.approx(summarise(checkpoint).delta_norm)
    lines = "\n".join(tables.text([summary], tensors=True, alone=True))
    assert "an adapter (ggla)" in lines
    assert "optimizer   none" in lines
    assert "; scale 0.5" in lines
    for show in (tables.text, tables.markdown):
        assert any(" - " in line for line in show([summary, summary], tensors=True, alone=False))


# --- what is made of them -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with everything that is made of a checkpoint and its base model."""
    folder = tmp_path_factory.mktemp("made")
    for to in ("merged", "adapter", "peft"):
        ggcl_fast.convert(DATA / "trained.ggcl", folder / to, to=to, base=DATA / "base.gguf")
    return folder


@pytest.mark.parametrize("target", ["merged", "adapter", "base-adapter.gguf", "peft"])
@pytest.mark.parametrize("how", ["--json", "--markdown", None])
def test_everything_that_is_written_is_told(
    how: str | None, target: str, made: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*([how] if how else []), str(made / target)]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert (json.loads(out)["source"] == str(made / target)) if how == "--json" else (target in out)


def test_a_model_says_how_much_of_which_training_it_has(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = ("peft", "merged", "base-adapter.gguf", "adapter")
    assert main([*(str(made / name) for name in names), TRAINED]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r".*/peft: an adapter for Hugging Face's PEFT, rank 4, [\d,]+ bytes", lines[0])
    by = f"made by ggcl_fast {ggcl_fast.__version__}, called"
    merged = re.fullmatch(
        rf".*/merged: a model with every delta of training (\w{{8}}), {by} tiny \+ trained, upon tiny, 21 tensors, .*",
        lines[1],
    )
    norms = re.fullmatch(rf".*: a model with deltas of norms of training (\w{{8}}), {by} .* \(norms\), .*", lines[2])
    assert merged is not None
    assert norms is not None
    assert merged[1] == norms[1]
    assert [line.split()[0] for line in lines[3:6]] == ["verdict", "healthy", "healthy"]
    main(["--json", str(made / "merged")])
    told = json.loads(capsys.readouterr().out)
    assert (told["format"], told["holds"], told["base"], told["verdict"]) == ("model", "every delta", "tiny", None)


@pytest.mark.parametrize("config", [b"", b"[" * 100_000, b"[]", b'{"peft_type": "IA3"}', b"\xff"])
def test_a_folder_that_is_no_adapter_is_an_error(
    config: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "adapter_config.json").write_bytes(config)
    (tmp_path / "adapter_model.safetensors").write_bytes(b"")
    assert main([str(tmp_path), str(DATA / "base.gguf")]) == 1
    err = capsys.readouterr().err.splitlines()
    assert [line.startswith("ggcl-info: error: ") for line in err] == [True, True]
    assert err[0].endswith("Is a directory")
    assert "a base model" in err[1]


def test_a_folder_without_weights_is_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "adapter_config.json").write_bytes(b'{"peft_type": "LORA", "r": 4}')
    assert main([str(tmp_path)]) == 1
    os.mkfifo(tmp_path / "adapter_model.safetensors")  # and nobody waits
    assert main([str(tmp_path)]) == 1
    assert capsys.readouterr().err.count("Is a directory") == 2


@pytest.mark.parametrize("rank", ["true", "-1", "9" * 1000, "null", '"4"'])
def test_a_rank_that_is_none_is_left_out(rank: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "adapter_config.json").write_text(
        f'{{"peft_type": "LORA", "r": {rank}, "base_model_name_or_path": "\\u001b[2J"}}'
    )
    (tmp_path / "adapter_model.safetensors").write_bytes(bytes(10))
    (tmp_path / "more").mkdir()
    (tmp_path / "link").symlink_to("nowhere")
    assert main([str(tmp_path)]) == 0
    said = capsys.readouterr().out
    size = (tmp_path / "adapter_config.json").stat().st_size + 10
    assert said.endswith(f"PEFT, upon \\x1b[2J, {size:,} bytes\n")


def test_files_and_models_come_in_the_order_that_is_asked_for(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = [TRAINED, str(made / "merged"), LBFGS]

    def order(*options: str) -> list[int]:
        assert main(["--json", *options, *paths]) == 0
        return [paths.index(json.loads(line)["source"]) for line in capsys.readouterr().out.splitlines()]

    assert order() == [0, 1, 2]
    assert order("--sort", "loss") == [0, 2, 1]
    assert order("--sort", "iterations") == [2, 0, 1]
    assert order("--sort", "name") == sorted(range(3), key=lambda i: paths[i])


def test_a_picture_of_nothing_is_an_error(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib", reason="needs the extra plot")
    assert main(["--plot", str(tmp_path / "x.png"), str(made / "merged")]) == 1
    assert "not drawn" in capsys.readouterr().err
    assert os.listdir(tmp_path) == []


# --- several files --------------------------------------------------------------------------------------------------


def test_several_files_are_a_row_each(run: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    out = shown(capsys, *run).splitlines()
    assert out[0].split() == ["verdict", "iterations", "loss", "best", "stalled", "|delta|", "norms", "MB", "file"]
    assert [line.split()[-1] for line in out[1:5]] == run
    assert out[1].split()[:5] == ["healthy", "30", "3", "3", "0"]
    assert out[2].split()[:6] == ["diverged", "10", "1", "1", "0", "nan"]
    assert out[5] == "model: unknown"
    assert out[6].startswith(f"diverged: {run[1]}: 1 of 44 tensors have values that are not finite: output_norm")
    assert out[7] == f"diverged: {run[3]}: the last loss is nan; the best loss is nan"
    assert out[8] == f"lowest loss of the healthy ones: 2, {run[2]}"
    assert len(out) == 9


@pytest.mark.parametrize(("key", "order"), [("name", "1302"), ("loss", "1203"), ("iterations", "3120")])
def test_rows_are_sorted(key: str, order: str, run: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    lines = shown(capsys, "--sort", key, *run).splitlines()
    expected = [run[int(i)] for i in order]
    if key == "name":
        expected = sorted(run)
    assert [line.split()[-1] for line in lines[1:5]] == expected


def test_a_bad_file_is_reported_and_the_others_are_shown(capsys: pytest.CaptureFixture[str]) -> None:
    bad = str(DATA / "expected.json")
    assert main([TRAINED, bad, "missing.ggcl", LBFGS]) == 1
    captured = capsys.readouterr()
    assert [line.split()[-1] for line in captured.out.splitlines()[1:3]] == [TRAINED, LBFGS]
    errors = captured.err.splitlines()
    assert len(errors) == 2
    assert errors[0].startswith(f"ggcl-info: error: {bad}: this is neither a finetune checkpoint nor")
    assert errors[1] == "ggcl-info: error: missing.ggcl: No such file or directory"


@pytest.mark.parametrize("option", [[], ["--markdown"], ["--json"]])
def test_a_single_bad_file_shows_nothing(option: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert shown(capsys, *option, "missing.ggcl", status=1) == ""


# --- for programs ---------------------------------------------------------------------------------------------------


def test_json_is_the_summary(capsys: pytest.CaptureFixture[str]) -> None:
    found = strict(shown(capsys, "--json", TRAINED))
    with ggcl_fast.open_checkpoint(TRAINED) as checkpoint:
        summary = summarise(checkpoint)
    assert found.pop("loss") == summary.loss
    assert list(found) == list(summary._fields)
    assert found["optimizer"]["name"] == "adam"
    assert found["tensors"][1]["shape"] == [288, 4]
    assert found["pairs"][3] == plain(summary.pairs[3])
    assert found["parameters"] == summary.parameters._asdict()
    assert "tensors" not in strict(shown(capsys, "--json", "--no-tensors", TRAINED))


def test_json_is_strict_whatever_the_values(run: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    found = [strict(line) for line in shown(capsys, "--json", *run).splitlines()]
    assert [one["source"] for one in found] == run
    assert found[1]["verdict"] == "diverged"
    assert found[1]["delta_norm"] is None
    assert found[1]["tensors"][3]["n_nan"] == 1
    assert found[3]["loss"] is None
    assert plain({"a": (math.inf, [-math.inf, 1.5]), "b": None}) == {"a": [None, [None, 1.5]], "b": None}


def markdown_tables(lines: list[str]) -> list[list[list[str]]]:
    """Parse the tables of some Markdown: of each its rows of cells, the heading first."""
    found: list[list[list[str]]] = []
    for before, line in zip(["", *lines], lines):
        if line.startswith("|"):
            assert line.endswith("|")
            if not before.startswith("|"):
                found.append([])
            found[-1].append([cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]])
    return found


@pytest.mark.parametrize("paths", [[TRAINED], PATHS], ids=["one", "several"])
def test_markdown_tables_are_well_formed(paths: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    found = markdown_tables(shown(capsys, "--markdown", *paths).splitlines())
    assert len(found) == (2 if len(paths) == 1 else 1)
    for heading, rule, *rows in found:
        assert all(re.fullmatch("---:?", cell) for cell in rule)
        assert {len(row) for row in (rule, *rows)} == {len(heading)}
    assert len(found[-1]) == 2 + (44 if len(paths) == 1 else len(paths))
    assert len(markdown_tables(shown(capsys, "--markdown", "--no-tensors", TRAINED).splitlines())) == 1


@pytest.mark.parametrize("n_files", [1, 300], ids=["at the end", "on the way"])
def test_whoever_reads_only_the_first_lines_sees_no_error(n_files: int) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "wb") as nobody:
        done = subprocess.run(
            [*COMMAND, "--no-tensors", *[TRAINED] * n_files], stdout=nobody, stderr=subprocess.PIPE, check=False
        )
    assert (done.returncode, done.stderr) == (141, b"")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no device that is always full")
@pytest.mark.parametrize("n_files", [1, 300], ids=["at the end", "on the way"])
def test_lines_that_find_no_room_are_an_error(n_files: int) -> None:
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            [*COMMAND, "--no-tensors", *[TRAINED] * n_files], stdout=full, stderr=subprocess.PIPE, check=False
        )
    assert (done.returncode, done.stderr) == (1, b"ggcl-info: error: No space left on device\n")


# --- names that are up to something -----------------------------------------------------------------------------------


@pytest.mark.parametrize("option", [[], ["--markdown"], ["--json"]])
def test_control_codes_and_pipes_in_paths_are_harmless(
    option: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "\x1b[31m|a`b*\n.ggcl"
    path.write_bytes(ADAM)
    for argv in ([str(path)], [str(path), TRAINED]):
        out = shown(capsys, *option, *argv)
        assert "\x1b" not in out
        assert r"\x1b" in out or r"\u001b" in out
        if "--markdown" in option:
            for table in markdown_tables(out.splitlines()):
                assert len({len(row) for row in table}) == 1
    assert main(["\x1b[31mno\nsuch"]) == 1
    assert r"\x1b[31mno\nsuch" in capsys.readouterr().err


def test_paths_that_are_no_text_are_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = os.fsdecode(os.fsencode(tmp_path) + b"/\xff.ggcl")
    Path(path).write_bytes(ADAM)
    assert r"\udcff.ggcl" in shown(capsys, path)
    assert strict(shown(capsys, "--json", path))["source"] == path


def test_a_warning_goes_to_standard_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "in.ggcl"
    path.write_bytes(ADAM.replace(b"layers.1.ffn_norm", b"layers.1.\x1b[31morm"))
    assert main([str(path)]) == 0
    captured = capsys.readouterr()
    assert captured.err.startswith(f"ggcl-info: warning: {path}: 2 of 42 tensors have unexpected names")
    assert "\x1b" not in captured.err


# --- the command itself ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "FILE"),
        (["a", "--sort", "colour"], "invalid choice"),
        (["a", "--json", "--markdown"], "not allowed with"),
        (["a", "--engine", "rust"], "invalid choice"),
        (["--plot", "a.ggcl", "b.ggcl"], "expected a name that ends in .png, .svg, .pdf"),
    ],
)
def test_wrong_usage_exits_with_2(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(argv)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_help_has_examples_and_version_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    for argv, expected in ((["--help"], "examples, "), (["--version"], f"ggcl_fast {ggcl_fast.__version__}")):
        with pytest.raises(SystemExit) as stop:
            main(argv)
        assert stop.value.code == 0
        assert expected in capsys.readouterr().out


@pytest.mark.parametrize("engine", COMPILED_OR_NOT)
def test_engines_say_the_same(engine: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert shown(capsys, "--engine", engine, TRAINED) == shown(capsys, TRAINED)


def test_long_work_shows_progress_on_a_terminal_only(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(info, "LONG_WORK", 0)
    shown(capsys, TRAINED)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert main([TRAINED]) == 0
    assert "%|" in capsys.readouterr().err


def test_interruption_has_its_status(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(*_: object) -> None:
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(info, "_read", interrupted)
    assert main([TRAINED]) == 130
    assert capsys.readouterr().err == "ggcl-info: error: interrupted by SIGINT\n"


@pytest.mark.parametrize(
    "command", [["ggcl-info"], ["python", "-m", "ggcl_fast.commands.info"]], ids=["script", "module"]
)
def test_both_commands_are_this_one(command: list[str]) -> None:
    first = Path(sys.executable).with_name(command[0])
    done = subprocess.run([first, *command[1:], "--no-tensors", TRAINED], check=True, capture_output=True, text=True)
    assert done.stdout.startswith(f"{TRAINED}: a finetune checkpoint")
    assert done.stderr == ""


def test_a_small_file_waits_neither_for_numba_nor_for_matplotlib() -> None:
    code = (
        "import sys; from ggcl_fast.commands.info import main; main(sys.argv[1:]); "
        "sys.exit(sorted({'numba', 'matplotlib', 'tqdm.std'} & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code, TRAINED], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


# --- pictures -------------------------------------------------------------------------------------------------------


def png_size(path: Path) -> tuple[int, int]:
    data = path.read_bytes()
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    width, height = struct.unpack(">2I", data[16:24])
    return width, height


@pytest.mark.parametrize("paths", [[TRAINED], PATHS], ids=["one", "several"])
def test_a_picture_is_drawn(paths: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    out = tmp_path / "out.png"
    out.write_bytes(b"an old one")
    assert main(["--plot", str(out), *paths]) == 1
    assert capsys.readouterr() == ("", f"ggcl-info: error: {out}: The target exists; use --force to replace it\n")
    assert out.read_bytes() == b"an old one"
    assert main(["--force", "--plot", str(out), *paths]) == 0
    assert capsys.readouterr().err == f"ggcl-info: {out}: drawn\n"
    assert min(png_size(out)) > 400
    assert os.listdir(tmp_path) == ["out.png"]


def test_other_formats(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    for ending, start in ((".svg", b"<?xml"), (".PDF", b"%PDF")):
        assert main(["--plot", str(tmp_path / f"out{ending}"), TRAINED]) == 0
        assert (tmp_path / f"out{ending}").read_bytes().startswith(start)


def test_a_picture_that_cannot_be_written_is_a_failure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    assert main(["--plot", str(tmp_path / "no" / "out.png"), TRAINED]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""  # nothing was read for it
    assert "no/out.png: The target's folder is not there" in captured.err


def test_a_bad_file_does_not_prevent_the_picture_of_the_others(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    shown(capsys, "--plot", str(tmp_path / "out.png"), TRAINED, "missing", status=1)
    png_size(tmp_path / "out.png")
    shown(capsys, "--plot", str(tmp_path / "none.png"), "missing", status=1)
    assert not (tmp_path / "none.png").exists()


def test_without_matplotlib_it_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["--plot", str(tmp_path / "out.png"), TRAINED]) == 1
    captured = capsys.readouterr()
    assert captured.err == "ggcl-info: error: pictures need matplotlib: pip install matplotlib\n"
    assert captured.out == ""
    with pytest.raises(ImportError, match="pip install matplotlib"):
        plot.check(tmp_path / "out.png")


def test_a_script_can_ask_for_a_verdict(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = Path(TRAINED).read_bytes()
    (tmp_path / "cut.ggcl").write_bytes(data[:-4000] + bytes(4000))
    cut = str(tmp_path / "cut.ggcl")
    assert main(["--fail-on", "diverged,incomplete,untrained", TRAINED]) == 0
    assert main([TRAINED, cut]) == 0
    assert main(["--fail-on", "diverged", TRAINED, cut]) == 0
    assert main(["--fail-on", "incomplete,untrained", TRAINED, cut]) == 3
    assert main(["--fail-on", "incomplete", cut, "missing.ggcl"]) == 1  # not even that is known of all
    with pytest.raises(SystemExit):
        main(["--fail-on", "healthy", TRAINED])
    assert "expected some of diverged, untrained, incomplete, not 'healthy'" in capsys.readouterr().err


@pytest.mark.parametrize("columns", [20, 40, 100, 200, 500])
def test_facts_have_the_width_of_the_terminal(
    columns: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    lines = shown(capsys, "--no-tensors", str(DATA / "wild" / "peft-all-f16.ggla")).splitlines()[1:]
    longest = max(map(len, lines))
    assert longest <= min(max(columns, 40), 200)
    assert longest > 30
