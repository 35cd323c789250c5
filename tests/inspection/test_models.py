"""Which base model a shape is taken for."""

import pytest

from ggcl_fast.checkpoint import ModelParameters
from ggcl_fast.inspection import models
from ggcl_fast.testing import SHAPE_7B, SHAPE_13B


def parameters(n_embd: int, n_layer: int, n_ff: int, n_vocab: int) -> ModelParameters:
    return ModelParameters(n_vocab, n_embd, 256, 32, n_layer, 128, n_ff, 32)


@pytest.mark.parametrize("model", models.MODELS, ids=lambda model: model.name)
def test_every_model_is_known_by_its_shape(model: models.Model) -> None:
    assert models.guess(parameters(model.n_embd, model.n_layer, model.n_ff, model.n_vocab)) == model.name


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((4096, 32, 11008, 32001), "LLaMA or Llama 2 7B, with 32,001 tokens"),
        ((4096, 32, 11008, 0), "LLaMA or Llama 2 7B"),
        ((6656, 60, 0, 0), "LLaMA 33B (30B)"),
        ((4096, 0, 0, 0), "unknown"),
        ((4096, 31, 11008, 32000), "unknown"),
        ((0, 0, 0, 0), "unknown"),
    ],
)
def test_guesses(shape: tuple[int, int, int, int], expected: str) -> None:
    assert models.guess(parameters(*shape)) == expected


def test_the_shapes_of_this_package_are_known() -> None:
    for shape, name in ((SHAPE_7B, "LLaMA or Llama 2 7B"), (SHAPE_13B, "LLaMA or Llama 2 13B")):
        assert models.guess(parameters(shape.n_embd, shape.n_layer, shape.feed_forward_length, shape.n_vocab)) == name
