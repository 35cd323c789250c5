"""Sizes and offsets of every fixed record, pinned: the format does not move."""

from collections.abc import Mapping

import numpy as np
import pytest

from ggcl_fast.formats import layout

HEADER = """magic version train_its train_samples train_tokens n_vocab n_embd n_mult n_head n_layer n_rot attention_norm
wq wk wv wo ffn_norm w1 w2 w3 tok_embeddings norm output"""


@pytest.mark.parametrize(
    ("dtype", "size", "offsets"),
    [
        (layout.HEADER, 92, {name: 4 * i for i, name in enumerate(HEADER.split())}),
        (layout.RECORD, 12, {"n_dims": 0, "name_len": 4, "dtype": 8}),
        (
            layout.OPTIMIZER,
            28,
            {"version": 0, "past": 4, "lbfgs_m": 8, "nx": 12, "iter": 20, "just_initialized": 24},
        ),
        (layout.ADAM_END, 12, {"fx_best": 0, "fx_prev": 4, "n_no_improvement": 8}),
        (layout.LBFGS_END, 24, {"fx_best": 0, "step": 4, "j": 8, "k": 12, "end": 16, "n_no_improvement": 20}),
        (layout.GGUF_TENSOR_INFO, 32, {"n_dims": 0, "ne": 4, "dtype": 20, "offset": 24}),
    ],
)
def test_records_are_laid_out_as_on_disk(dtype: np.dtype[np.void], size: int, offsets: Mapping[str, int]) -> None:
    assert dtype.itemsize == size
    assert dtype.fields is not None
    assert {name: field[1] for name, field in dtype.fields.items()} == offsets
    assert all(field[0].base.str[0] == "<" for field in dtype.fields.values())


def test_the_magic_starts_the_file_with_lcgg() -> None:
    assert layout.GGCL_MAGIC.to_bytes(4, "little") == b"lcgg"
