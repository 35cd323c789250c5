"""Which base model a checkpoint fits, by its shape.

The numbers are those of each model's own published configuration: hidden size, layers, intermediate size, vocabulary.
Models that were trained on from one of these have its shape, so a guess names a family and not a file.
"""

from __future__ import annotations

from typing import Final, NamedTuple

from ..checkpoint import ModelParameters

__all__ = ["MODELS", "Model", "guess"]


class Model(NamedTuple):
    """The shape of a model."""

    name: str
    n_embd: int
    """Embedding length."""
    n_layer: int
    """Layers."""
    n_ff: int
    """Feed-forward length."""
    n_vocab: int
    """Tokens in the vocabulary, as published."""


MODELS: Final = (
    Model("LLaMA or Llama 2 7B", 4096, 32, 11008, 32000),
    Model("Code Llama 7B", 4096, 32, 11008, 32016),
    Model("LLaMA or Llama 2 13B", 5120, 40, 13824, 32000),
    Model("Code Llama 13B", 5120, 40, 13824, 32016),
    Model("LLaMA 33B (30B)", 6656, 60, 17920, 32000),
    Model("Code Llama 34B", 8192, 48, 22016, 32000),
    Model("LLaMA 65B", 8192, 80, 22016, 32000),
    Model("Llama 2 70B", 8192, 80, 28672, 32000),
    Model("Llama 3 70B", 8192, 80, 28672, 128256),
    Model("Mistral 7B", 4096, 32, 14336, 32000),
    Model("Llama 3 8B", 4096, 32, 14336, 128256),
    Model("OpenLLaMA 3B", 3200, 26, 8640, 32000),
    Model("TinyLlama 1.1B", 2048, 22, 5632, 32000),
    Model("Sheared LLaMA 1.3B", 2048, 24, 5504, 32000),
    Model("Sheared LLaMA 2.7B", 2560, 32, 6912, 32000),
    Model("stories15M", 288, 6, 768, 32000),
    Model("stories42M", 512, 8, 1376, 32000),
    Model("stories110M", 768, 12, 2048, 32000),
)
"""What is known, the most likely first among those of one shape."""


def guess(parameters: ModelParameters) -> str:
    """Return the name of the model that `parameters` fit, "unknown" where they fit none.

    Numbers that the file does not tell, which are 0, fit any model; two at least must be told.  A model whose
    vocabulary alone is another one, as when tokens were added, is named together with its number of tokens.
    """

    def alike(*fields: str) -> list[Model]:
        told = [field for field in fields if getattr(parameters, field)]
        if len(told) < 2:
            return []
        return [one for one in MODELS if all(getattr(one, field) == getattr(parameters, field) for field in told)]

    exact = alike("n_embd", "n_layer", "n_ff", "n_vocab")
    if exact:
        return exact[0].name
    same = alike("n_embd", "n_layer", "n_ff")
    return f"{same[0].name}, with {parameters.n_vocab:,} tokens" if same else "unknown"
