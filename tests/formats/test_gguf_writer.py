"""What is written at once, against gguf's own writer: the same bytes."""

from pathlib import Path

import pytest

from bench.contenders import write_plainly
from ggcl_fast import open_checkpoint
from ggcl_fast.targets import checkpoint as finetune_gguf
from ggcl_fast.testing import Shape, checkpoint_bytes

from ..gguf_parts import Collected, converted
from ..reference import DATA, FIXTURES


@pytest.mark.parametrize(
    "data",
    [
        *((DATA / name).read_bytes() for name in FIXTURES),
        checkpoint_bytes(Shape(n_layer=30, n_embd=7, past=3, optimizer="lbfgs")),
        checkpoint_bytes(Shape(n_layer=600, n_embd=3, n_vocab=5)),  # more pieces than one gathering write takes
    ],
    ids=[*FIXTURES, "odd", "many"],
)
def test_bytes_equal_those_of_the_plain_writer(data: bytes, tmp_path: Path) -> None:
    with open_checkpoint(data) as checkpoint:
        out = Collected()
        finetune_gguf.write(checkpoint, out)
        write_plainly(checkpoint, tmp_path / "plain.gguf")
        assert bytes(out) == (tmp_path / "plain.gguf").read_bytes()


def test_what_one_file_fills_in_is_not_in_the_next() -> None:
    files = [(DATA / name).read_bytes() for name in FIXTURES]
    alone = []
    for data in files:
        finetune_gguf._template.cache_clear()
        alone.append(converted(data))
    assert [converted(data) for data in files] == alone
