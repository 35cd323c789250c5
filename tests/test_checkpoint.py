"""The library's face: an open checkpoint and its tensors."""

import gc
import mmap
from pathlib import Path

import numpy as np
import pytest

import ggcl_fast
from ggcl_fast import open_checkpoint
from ggcl_fast.readers.engine import Engine
from ggcl_fast.testing import Shape, checkpoint_bytes

from . import reference
from .engines import COMPILED_OR_NOT
from .reference import DATA, FIXTURES


@pytest.mark.parametrize("fixture", FIXTURES)
def test_tensors_are_those_of_the_reference_reader(fixture: str) -> None:
    keys, tensors = reference.read((DATA / fixture).read_bytes())
    with open_checkpoint(DATA / fixture) as checkpoint:
        assert list(checkpoint.tensors) == list(tensors)
        for name, (ne, values) in tensors.items():
            view = checkpoint.tensors[name]
            assert view.shape == ne[::-1]
            assert view.dtype == np.float32
            np.testing.assert_array_equal(view.ravel().view(np.uint32), values.view(np.uint32))
        assert checkpoint.parameters.n_ff == keys["llama.feed_forward_length"]
        assert checkpoint.training.iterations == keys["training.iteration_count"]
        assert checkpoint.optimizer is not None
        assert checkpoint.optimizer.name == keys["optimizer.type"]
        assert checkpoint.optimizer.n_parameters == keys["optimizer.parameter_count"]
        assert checkpoint.ranks["wq"] == keys["training.lora.rank.attn_q"]


def test_optimizer_state_of_a_real_lbfgs_file() -> None:
    with open_checkpoint(DATA / "lbfgs.ggcl") as checkpoint:
        optimizer = checkpoint.optimizer
        assert isinstance(optimizer, ggcl_fast.Lbfgs)
        assert (optimizer.m, optimizer.j, optimizer.k, optimizer.end, optimizer.step) == (6, 4, 5, 4, 0.5)


def test_views_share_the_buffer_and_cannot_be_written() -> None:
    data = bytearray((DATA / "adam.ggcl").read_bytes())
    with open_checkpoint(data) as checkpoint:
        view = checkpoint.tensors["output_norm.weight.lora_a"]
        assert np.shares_memory(view, np.frombuffer(data, np.uint8))
        with pytest.raises(ValueError, match="read-only"):
            view[0, 0] = 1


@pytest.mark.parametrize("shape", [Shape(), Shape(n_vocab=300_001)], ids=["in memory", "mapped"])
def test_views_outlive_the_checkpoint_and_new_ones_are_refused(shape: Shape, tmp_path: Path) -> None:
    path = tmp_path / "in.ggcl"
    path.write_bytes(checkpoint_bytes(shape))
    with open_checkpoint(path) as checkpoint:
        tensors = checkpoint.tensors
        view = tensors["output.weight.lora_b"]
        total = view.sum()
    with pytest.raises(ValueError, match="closed"):
        tensors["output.weight.lora_b"]
    del checkpoint, tensors
    gc.collect()
    assert view.sum() == total


def test_closing_before_any_look_at_tensors() -> None:
    checkpoint = open_checkpoint(DATA / "adam.ggcl")
    checkpoint.close()
    checkpoint.close()
    with pytest.raises(ValueError, match="closed"):
        checkpoint.tensors["output.weight.lora_a"]


def test_unknown_tensors_are_key_errors() -> None:
    with open_checkpoint(DATA / "adam.ggcl") as checkpoint, pytest.raises(KeyError):
        checkpoint.tensors["blk.2.attn_q.weight.lora_a"]


@pytest.mark.parametrize("engine", COMPILED_OR_NOT)
def test_every_kind_of_buffer(engine: Engine) -> None:
    data = (DATA / "adam.ggcl").read_bytes()
    expected = reference.read(data)[1]["output_norm.weight.lora_a"][1][0]
    with (DATA / "adam.ggcl").open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        odd = memoryview(b"x" + data)[1:]  # not aligned to words
        for buffer in (data, bytearray(data), memoryview(data), odd, np.frombuffer(data, np.uint8), mapped):
            with open_checkpoint(buffer, engine=engine) as checkpoint:
                found = float(checkpoint.tensors["output_norm.weight.lora_a"][0, 0])
                assert found == expected
            del checkpoint


def test_what_is_no_buffer_is_a_type_error() -> None:
    with pytest.raises(TypeError):
        open_checkpoint(7)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="contiguous"):
        open_checkpoint(np.zeros(64, np.uint8)[::2])


@pytest.mark.parametrize("fixture", ["adam.ggcl", "finetune-v1.gguf", "trained.ggla"])
def test_unknown_engines_are_value_errors(fixture: str) -> None:
    with pytest.raises(ValueError, match="engine must be one of auto, numba, python, not 'rust'"):
        open_checkpoint(DATA / fixture, engine="rust")  # type: ignore[arg-type]


def test_repr_tells_what_it_is() -> None:
    with open_checkpoint(DATA / "adam.ggcl") as checkpoint:
        assert "ggcl, 2 layers, n_embd 32, 44 tensors, adam, 4 iterations" in repr(checkpoint)
