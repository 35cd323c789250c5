"""The environments that are promised: ``nox`` runs them all, ``nox --session 'tests-3.13'`` one; see also .ci/run."""

import nox

PYTHONS = ["3.10", "3.11", "3.12", "3.13"]
OLDEST = ["numpy==1.26.*", "gguf==0.17.*", "numba==0.61.*", "tqdm==4.60.*"]

nox.options.default_venv_backend = "venv"


@nox.session(python=PYTHONS)
def tests(session: nox.Session) -> None:
    """Run all tests with the newest of everything."""
    session.install("-e", ".[test]")
    session.run("pip", "check")
    session.run("pytest", "--quiet", *session.posargs)


@nox.session(python=PYTHONS[0])
def oldest(session: nox.Session) -> None:
    """Run the tests with the oldest versions that are allowed, and without llama.cpp."""
    session.install("-e", ".", *OLDEST, "pytest", "pytest-benchmark", "pytest-timeout", "hypothesis", "safetensors")
    session.run("pytest", "--quiet", *session.posargs)


@nox.session(python=PYTHONS[-1])
def without_numba(session: nox.Session) -> None:
    """Run all tests where numba is missing; those of what is compiled are skipped."""
    session.install("-e", ".[test]")
    session.run("pip", "uninstall", "--yes", "--quiet", "numba", "llvmlite")
    session.run("pytest", "--quiet", *session.posargs)


@nox.session(python=PYTHONS[1])
def everything(session: nox.Session) -> None:
    """Run all tests with all extras, then the linters."""
    session.install("-e", ".[dev,fuzz]")
    session.install("-e", ".[clients]", "torch==2.13.0")
    session.run("pytest", "--quiet", *session.posargs)
    for command in (["ruff", "check", "."], ["ruff", "format", "--check", "."], ["mypy"]):
        session.run(*command)


@nox.session
def man(session: nox.Session) -> None:
    """Write man pages of both commands, made of what they say with --help, into the folder man."""
    session.install("-e", ".[docs]")
    commands = {
        "ggcl-fast": ("convert", "convert LoRA checkpoints and adapters of llama.cpp"),
        "ggcl-info": ("info", "show what is inside LoRA checkpoints of llama.cpp"),
    }
    for name, (module, description) in commands.items():
        session.run(
            "argparse-manpage", "--module", f"ggcl_fast.commands.{module}", "--function", "argument_parser",
            "--project-name", "ggcl_fast", "--manual-title", name, "--description", description,
            "--output", f"man/{name}.1",
        )  # fmt: skip
