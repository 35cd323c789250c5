"""What there is to know of a checkpoint: the numbers of its tensors and deltas, and what they come to."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, NamedTuple

from ..checkpoint import Adam, Format, ModelParameters, Optimizer, Training

__all__ = ["Moments", "PairSummary", "Summary", "TensorSummary", "Verdict"]

Verdict = Literal["healthy", "diverged", "untrained", "incomplete"]
"""What `verdict.judge` says of a checkpoint."""


class TensorSummary(NamedTuple):
    """The values of one tensor."""

    name: str
    """GGUF name."""
    shape: tuple[int, ...]
    """As numpy has it, outermost dim first."""
    nbytes: int
    """Bytes of data."""
    n_nan: int
    """Values that are not a number."""
    n_inf: int
    """Values that are infinite, of either sign."""
    n_zero: int
    """Values that are zero."""
    minimum: float | None
    """Smallest finite value; None where there is none."""
    maximum: float | None
    """Largest finite value; None where there is none."""
    norm: float
    """Square root of the sum of squares of all finite values."""


class PairSummary(NamedTuple):
    """One adapted weight: what its lora_a and lora_b add to it."""

    weight: str
    """GGUF name of the weight, such as ``blk.0.attn_q.weight``."""
    layer: int | None
    """0-based number of its layer; None for a weight of the model itself."""
    module: str
    """Which weight of the layer or model, such as ``attn_q``."""
    rank: int
    n_in: int
    n_out: int
    norm: float | None
    """Frobenius norm of ``scale * B @ A.T``; NaN where values are not finite, None above `values.LARGEST_RANK`."""
    trained: bool
    """False where the delta is zero: B is all zero, as at the start of a training, or A is."""
    change: float | None
    """Of a norm, whose weights are about one: the delta's root mean square, its relative size.  None for others."""


class Moments(NamedTuple):
    """Range of Adam's moments; None where no value is finite."""

    first_minimum: float | None
    first_maximum: float | None
    second_minimum: float | None
    """Never below 0 in a sound file."""
    second_maximum: float | None


class Summary(NamedTuple):
    """Everything that can be told about a checkpoint by itself; made by `summarise`."""

    source: str
    """Name of the file."""
    format: Format
    """What it was read from, as `Checkpoint.format` has it."""
    nbytes: int
    """Size of the file."""
    verdict: Verdict
    reasons: tuple[str, ...]
    """Why the verdict is what it is; what is remarkable about a healthy one."""
    model: str
    """The base model that it fits, see `models.guess`; "unknown" where it fits none that is known."""
    parameters: ModelParameters
    ranks: Mapping[str, int]
    """LoRA ranks, as `Checkpoint.ranks` has them."""
    scale: float | None
    """What ``B @ A.T`` is multiplied by: 1 for all that finetune wrote; None where it differs from pair to pair."""
    training: Training
    optimizer: Optimizer | None
    """None where the file has no optimizer state."""
    n_parameters: int
    """LoRA elements."""
    delta_norm: float | None
    """Root of the sum of squares of the norms of all deltas; NaN or None where one of them is."""
    norm_change: float | None
    """Largest `PairSummary.change`; None where there is no norm."""
    moments: Moments | None
    """None without an Adam state."""
    tensors: tuple[TensorSummary, ...]
    """All tensors, in the order of the file."""
    pairs: tuple[PairSummary, ...]
    """All adapted weights, in the order of the file."""
    warnings: tuple[str, ...]
    """What is unusual about the file, as `Checkpoint.warnings` has it."""

    @property
    def loss(self) -> float | None:
        """The last loss that the file tells: Adam's previous loss, L-BFGS's best one, None without an optimizer."""
        if self.optimizer is None:
            return None
        return self.optimizer.previous_loss if isinstance(self.optimizer, Adam) else self.optimizer.best_loss
