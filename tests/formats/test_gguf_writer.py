"""The bulk writer against gguf's own: the same bytes."""

from pathlib import Path

import pytest

from bench.contenders import write_plainly
from ggcl_fast import open_checkpoint
from ggcl_fast.formats.gguf_writer import BulkGGUFWriter
from ggcl_fast.targets import checkpoint as finetune_gguf
from ggcl_fast.testing import Shape, checkpoint_bytes

from ..gguf_parts import Collected
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


def test_states_and_names_are_checked_as_in_the_plain_writer() -> None:
    with open_checkpoint((DATA / "adam.ggcl").read_bytes()) as checkpoint:
        writer = BulkGGUFWriter(Collected(), "llama")
        with pytest.raises(ValueError, match="Duplicated tensor name"):
            writer.add_tensors(("x",) * len(checkpoint.table), checkpoint.table, checkpoint.source)
        with pytest.raises(ValueError, match="to contain KV data"):
            writer.write_ti_data_to_file()
