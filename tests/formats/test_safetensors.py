"""The head of a safetensors file, held against the safetensors library."""

import gguf
import numpy as np
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st

from ggcl_fast.formats.safetensors import StoredTensor, head

Type = gguf.GGMLQuantizationType
DTYPES = {Type.F32: np.float32, Type.F16: np.float16}


@settings(max_examples=100, deadline=None)
@given(
    st.dictionaries(
        st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12),
        st.tuples(st.lists(st.integers(0, 5), max_size=3), st.sampled_from(list(DTYPES))),
        max_size=6,
    )
)
def test_files_are_those_of_the_library(tensors: dict[str, tuple[list[int], Type]]) -> None:
    arrays = {
        name: np.random.default_rng(0).random(shape).astype(DTYPES[type]) for name, (shape, type) in tensors.items()
    }
    stored = sorted(
        (StoredTensor(name, tuple(shape), type) for name, (shape, type) in tensors.items()), key=lambda one: one.place
    )
    data = b"".join(arrays[one.name].tobytes() for one in stored)
    assert sum(one.nbytes for one in stored) == len(data)
    assert head(stored) + data == safetensors.numpy.save(arrays, {"format": "pt"})
