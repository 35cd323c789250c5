"""The command: every option, exit status and message."""

import fcntl
import hashlib
import json
import os
import pty
import shutil
import struct
import subprocess
import sys
import termios
from pathlib import Path
from typing import Any

import pytest

import ggcl_fast
from ggcl_fast.commands import terminal
from ggcl_fast.commands.convert import main
from ggcl_fast.readers.engine import ENGINES
from ggcl_fast.testing import SHAPE_7B, Shape, write_checkpoint

from ..hostile import ODD
from ..reference import DATA

ADAM = str(DATA / "adam.ggcl")


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out.gguf"


def test_one_line_says_what_was_written(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([ADAM, str(out)]) == 0
    captured = capsys.readouterr()
    assert captured.out.startswith(f"{out}: written, 44 tensors, 96,960 bytes, optimizer adam, 0.0")
    assert captured.out.endswith(" s\n")
    assert captured.err == ""


@pytest.mark.parametrize(
    "argv",
    [
        ["-i", "IN", "-o", "OUT"],
        ["--input", "IN", "--output", "OUT", "--ff", "96"],
        ["--input=IN", "OUT"],
        ["IN", "-o", "OUT"],
    ],
)
def test_the_old_scripts_options_work(argv: list[str], out: Path) -> None:
    assert main([arg.replace("IN", ADAM).replace("OUT", str(out)) for arg in argv]) == 0
    assert out.exists()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "IN and OUT are needed"),
        (["IN"], "IN and OUT are needed"),
        (["-i", "IN"], "IN and OUT are needed"),
        (["IN", "OUT", "-i", "IN"], "given twice"),
        (["IN", "OUT", "--more"], "unrecognized arguments"),
        (["IN", "OUT", "--jobs", "0"], "not a number of 1 or more: '0'"),
        (["IN", "OUT", "--ff", "many"], "invalid int value"),
        (["IN", "OUT", "--engine", "rust"], "invalid choice"),
        (["IN", "OUT", "--to", "onnx"], "invalid choice"),
        (["IN", "OUT", "--outtype", "q4_0"], "invalid choice"),
        (["IN", "OUT", "--to", "merged"], "--to merged needs --base"),
        (["IN", "OUT", "--to", "checkpoint", "--base", "B"], "--base means nothing with --to checkpoint"),
        (["IN", "OUT", "--to", "checkpoint", "--name", "N"], "--name means nothing with --to checkpoint"),
        (["IN", "OUT", "--to", "checkpoint", "--base-model-id", "I"], "--base-model-id means nothing with --to "),
        (
            ["IN", "OUT", "--to", "peft", "--base-model-id", "https://huggingface.co/a/b"],
            "--base-model-id: expected an id",
        ),
        (["IN", "OUT", "--to", "adapter", "--base-out", "B"], "--base-out needs --base"),
        (["IN", "OUT", "--to", "peft", "--base", "B", "--base-out", "B"], "means nothing with --to peft"),
        (["IN", "OUT", "--to", "merged", "--base", "B", "--no-token-embd"], "means nothing with --to merged"),
        (["IN", "OUT", "--to", "peft", "--outtype", "bf16"], "expected f32 or f16, not bf16"),
    ],
)
def test_wrong_usage_exits_with_2(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(argv)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


TRAINED, BASE = str(DATA / "trained.ggcl"), str(DATA / "base.gguf")


def test_notes_say_what_was_left_out_unless_quiet(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--to", "adapter", TRAINED, str(out)]) == 0
    captured = capsys.readouterr()
    assert captured.out.startswith(f"{out}: written, 32 tensors, 54,752 bytes, adapter, 0.")
    assert captured.err.startswith(
        f"ggcl-fast: note: {TRAINED}: left out: 5 norm deltas (at most 2.05, RMS 0.658, beside"
    )
    assert main(["-q", "-f", "--to", "adapter", TRAINED, str(out)]) == 0
    assert capsys.readouterr() == ("", "")


def test_options_of_the_targets_reach_them(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    patched = out.with_name("patched.gguf")
    options = ["--to", "adapter", "--base", BASE, "--base-out", str(patched), "--outtype", "f16", "--no-token-embd"]
    assert main([*options, "--json", TRAINED, str(out)]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["to"], report["n_tensors"], report["outputs"]) == ("adapter", 30, [str(out), str(patched)])
    assert report["notes"][0] == "left out: the deltas of token_embd.weight"
    assert report["target_bytes"] == out.stat().st_size + patched.stat().st_size
    assert main(["--to", "merged", "--base", BASE, TRAINED, str(out), "--force"]) == 0
    assert main(["--to", "peft", "--base", BASE, TRAINED, str(out.with_name("peft"))]) == 0
    captured = capsys.readouterr()
    assert captured.out.count("\n") == 2
    assert captured.err == ""


@pytest.mark.parametrize("option", [["--base", BASE], ["--heads", "4"], ["--outtype", "f16"], ["--name", "N"]])
def test_options_are_for_what_a_file_becomes_by_default(
    option: list[str], out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*option, TRAINED, str(out)]) == 1
    assert "(a ggcl file becomes that unless --to says otherwise)" in capsys.readouterr().err
    assert not out.exists()
    assert main([*option, str(DATA / "trained.ggla"), str(out)]) == 0
    assert main([*option, str(DATA / "trained.ggla"), str(DATA / "adam.ggcl"), f"{out.parent}/more/"]) == 1
    assert (out.with_name("more") / "trained.gguf").exists()


def test_a_base_that_is_not_there_is_a_failure(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--to", "merged", "--base", "nowhere.gguf", TRAINED, str(out)]) == 1
    assert capsys.readouterr().err == "ggcl-fast: error: nowhere.gguf: No such file or directory\n"


def test_help_has_examples_and_version_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    for argv, expected in ((["--help"], "examples, "), (["--version"], f"ggcl_fast {ggcl_fast.__version__}")):
        with pytest.raises(SystemExit) as stop:
            main(argv)
        assert stop.value.code == 0
        assert expected in capsys.readouterr().out


def test_engines_are_those_of_the_sweep() -> None:
    assert terminal.ENGINES == ENGINES


def test_quiet_prints_nothing(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["-q", ADAM, str(out)]) == 0
    assert capsys.readouterr() == ("", "")


def test_verbose_tells_what_the_file_holds(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["-v", ADAM, str(out)]) == 0
    err = capsys.readouterr().err
    assert "n_layer 2, n_rot 16, n_ff 96" in err
    assert "wq 4" in err
    assert "best_loss 5.6" in err


def test_json_tells_the_same_of_every_result(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def told(*arguments: str, status: int = 0) -> dict[str, Any]:
        assert main(["--json", *arguments, str(out)]) == status
        (line,) = capsys.readouterr().out.splitlines()
        row: dict[str, Any] = json.loads(line)
        return row

    rows = [told("-n", ADAM), told(ADAM), told(ADAM, status=1), told("--skip-existing", ADAM)]
    assert [row["status"] for row in rows] == ["checked", "converted", "failed", "skipped"]
    assert len({tuple(row) for row in rows}) == 1
    assert rows[1].pop("seconds") > 0
    assert rows[1] == {
        "status": "converted", "source": ADAM, "target": str(out), "outputs": [str(out)], "to": "checkpoint",
        "n_tensors": 44, "source_bytes": 95308, "target_bytes": 96960, "optimizer": "adam", "n_ff": 96,
        "warnings": [], "notes": [], "error": None,
    }  # fmt: skip
    assert rows[2]["error"]["type"] == "FileExistsError"
    assert (rows[2]["error"]["path"], rows[2]["outputs"], rows[2]["n_tensors"]) == (str(out), [], None)
    bad = out.with_name("bad.ggcl")
    bad.write_bytes(Path(ADAM).read_bytes()[:1000])
    error = told("-f", str(bad), status=1)["error"]
    assert error["type"] == "TruncatedError"
    assert error["message"].startswith(str(bad))
    assert isinstance(error["offset"], int)


def test_dry_run_writes_nothing(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--dry-run", ADAM, str(out)]) == 0
    assert "would be written, 44 tensors, 96,960 bytes" in capsys.readouterr().out
    assert not out.exists()


def test_an_existing_output_needs_force(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out.write_bytes(b"precious")
    assert main([ADAM, str(out)]) == 1
    assert "--force" in capsys.readouterr().err
    assert out.read_bytes() == b"precious"
    assert main(["--force", "--fsync", ADAM, str(out)]) == 0
    assert out.stat().st_size == 96960


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("missing.ggcl", "missing.ggcl: No such file or directory"),
        ("/dev/null", "/dev/null: Not a regular file"),
        (str(DATA / "expected.json"), "this is neither"),
    ],
)
def test_a_failure_is_one_line_and_status_1(
    source: str, message: str, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([source, str(out)]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("ggcl-fast: error: ")
    assert captured.err.count("\n") == 1
    assert message in captured.err
    assert not out.exists()


def test_check_finite_names_the_tensors(tmp_path: Path, out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "in.ggcl"
    source.write_bytes(ODD)
    assert main(["--check-finite", str(source), str(out)]) == 1
    assert "output_norm.weight.lora_b (1), blk.1.ffn_up.weight.lora_a (3)" in capsys.readouterr().err
    assert not out.exists()
    assert main(["--check-finite", ADAM, str(out)]) == 0


def test_ff_names_both_numbers(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--ff", "11008", ADAM, str(out)]) == 1
    assert "expected 11008, found 96" in capsys.readouterr().err


def test_a_warning_goes_to_standard_error(tmp_path: Path, out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "in.ggcl"
    source.write_bytes((DATA / "adam.ggcl").read_bytes().replace(b"layers.1.ffn_norm", b"layers.1.\x1b[31morm"))
    assert main([str(source), str(out)]) == 0
    err = capsys.readouterr().err
    assert err.startswith("ggcl-fast: warning: ")
    assert "2 of 42 tensors have unexpected names" in err
    assert r"found 'layers.1.\x1b[31morm.weight.loraA'" in err


def test_control_codes_in_paths_are_not_echoed(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["\x1b[31mno\nsuch", str(out)]) == 1
    err = capsys.readouterr().err
    assert r"\x1b[31mno\nsuch" in err
    assert "\x1b" not in err


def test_the_console_script_is_the_same_command(out: Path) -> None:
    script = Path(sys.executable).with_name("ggcl-fast")
    subprocess.run([script, ADAM, out], check=True, capture_output=True)
    assert hashlib.sha256(out.read_bytes()).hexdigest().startswith("347f63ae")


def test_long_work_shows_progress_on_a_terminal_only(tmp_path: Path) -> None:
    source = tmp_path / "in.ggcl"
    with source.open("wb") as file:
        write_checkpoint(file, Shape(**{**vars(SHAPE_7B), "past": 1, "n_vocab": 400_000}))
    command = [
        sys.executable, "-c",
        "import sys, tqdm; kind = tqdm.tqdm\n"
        "tqdm.tqdm = lambda **options: kind(**{**options, 'delay': 0, 'mininterval': 0})\n"
        "from ggcl_fast.commands.convert import main; sys.exit(main())",
        str(source), str(tmp_path / "out.gguf"), "--force",
    ]  # fmt: skip
    assert subprocess.run(command, capture_output=True, check=True).stderr == b""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("4H", 24, 80, 0, 0))
    env = {name: value for name, value in os.environ.items() if not name.startswith("TQDM_")}
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=theirs, env=env) as process:
        os.close(theirs)
        shown = b""
        while True:
            try:
                piece = os.read(ours, 1 << 16)
            except OSError:
                break
            if not piece:
                break
            shown += piece
        assert process.wait() == 0
    os.close(ours)
    assert b"%|" in shown
    assert b"B/s" in shown


# --- streams --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", ">&- 2>&-", "<&- >&- 2>&-"])
@pytest.mark.parametrize("n_files", [1, 2])
def test_closed_streams_change_nothing_but_what_is_shown(closed: str, n_files: int, tmp_path: Path) -> None:
    for i in range(n_files):
        shutil.copy(ADAM, tmp_path / f"{i}.ggcl")
    sources = " ".join(str(tmp_path / f"{i}.ggcl") for i in range(n_files))
    (tmp_path / "out").mkdir()
    command = f"exec {sys.executable} -m ggcl_fast --jobs 1 {sources} {tmp_path / 'out'} {closed}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert (done.returncode, done.stderr.count("Traceback")) == (0, 0)
    expected = tmp_path / "expected.gguf"
    ggcl_fast.convert(ADAM, expected)
    for i in range(n_files):
        assert (tmp_path / "out" / f"{i}.gguf").read_bytes() == expected.read_bytes()


def test_notes_stay_out_of_json_when_standard_error_is_closed(tmp_path: Path) -> None:
    command = f"exec {sys.executable} -m ggcl_fast --json --to adapter {ADAM} {tmp_path / 'out'} 2>&-"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["to"] == "adapter"


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_names_that_a_terminal_cannot_show_are_escaped(encoding: str, tmp_path: Path) -> None:
    for i in range(3):
        shutil.copy(ADAM, tmp_path / f"\u4e2d{i}.ggcl")
    environment = {**os.environ, "PYTHONIOENCODING": encoding}
    for target in ("\u4e2d.gguf", "out"):
        sources = sorted(map(str, tmp_path.glob("*.ggcl")))[: 1 if target.endswith("gguf") else None]
        if len(sources) > 1:
            (tmp_path / target).mkdir()
        command = [sys.executable, "-m", "ggcl_fast", "--jobs", "1", *sources, str(tmp_path / target)]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
        assert done.stdout.count("\\u4e2d") >= len(sources)
    assert len(os.listdir(tmp_path / "out")) == 3


def test_options_may_stand_anywhere(out: Path) -> None:
    for argv in ([ADAM, "-q", str(out)], ["-f", ADAM, "-q", str(out)], [ADAM, str(out), "-f"]):
        assert main(argv) == 0


def test_progress_is_shown_where_it_is_asked_for(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--progress", "-q", ADAM, str(out)]) == 0
    assert capsys.readouterr().err == ""
    assert (
        main(["--progress", "-f", "-j", "1", str(DATA / "wild"), "--to", "adapter", "--rows", "gguf", f"{out}s"]) == 0
    )
    assert "%|" in capsys.readouterr().err


def test_a_model_made_here_is_told_as_that(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--to", "merged", "--base", BASE, TRAINED, str(out)]) == 0
    assert main(["-f", str(out), str(out.with_name("again.gguf"))]) == 1
    assert "a model that ggcl_fast made, with every delta of a training (it runs as it is)" in capsys.readouterr().err
