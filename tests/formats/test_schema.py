"""The schema's cost, and that two sources of names agree."""

import gc
import tracemalloc
from pathlib import Path

from ggcl_fast.formats.schema import _schema, schemas
from ggcl_fast.targets.checkpoint import _tensors
from ggcl_fast.testing import RANKS, SHAPE_7B, SHAPE_13B, Shape, checkpoint_bytes

from ..engines import warm
from ..gguf_parts import converted


def test_names_are_those_of_the_writer_of_tests() -> None:
    for n_layer in (0, 1, 200):
        names = [name for piece in schemas(n_layer) for name in map(piece.source_name, range(len(piece.names)))]
        assert names == [name for name, _, _ in Shape(n_layer=n_layer).lora_tensors()]


def test_what_is_kept_for_the_next_file_is_small() -> None:
    """After files of thousands of layers, one of each number."""
    ranks = dict.fromkeys(RANKS, 1)
    files = [
        checkpoint_bytes(Shape(n_layer=n, n_embd=1, n_vocab=1, n_mult=1, n_ff=1, ranks=ranks))
        for n in range(1500, 1508)
    ]  # fmt: skip
    warm()  # which "auto" would do on the way
    converted(files[0])
    _schema.cache_clear()
    _tensors.cache_clear()
    tracemalloc.start()
    for data in files:
        converted(data)
    gc.collect()
    kept, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert kept < 6 << 20


def test_shapes_say_how_large_they_are() -> None:
    import ggcl_fast.testing as home

    source = Path(home.__file__).read_text()
    for shape, said in ((SHAPE_7B, "126.6 MB"), (SHAPE_13B, "196.3 MB")):
        nx = sum(ne0 * ne1 for _, ne0, ne1 in shape.lora_tensors())
        assert f"{12 * nx / 1e6:.1f} MB" == said
        assert said in source
