"""How a model is trained: what is the same for every model and every phase."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from gencore.config import Config, field

# What may differ when a run goes on: none of these changes the weights at a given step, the length only if the
# schedule is constant.
LENGTH = ("steps", "epochs")
RESUMABLE = (*LENGTH, "log_every", "checkpoint_every", "checkpoint_minutes", "keep", "tensorboard")


@dataclass(frozen=True)
class TrainConfig(Config):
    """Settings of the trainer. Optimisers and their learning rates belong to the model, phase by phase."""

    epochs: int = field(20, ge=1, doc="passes over the data set, unless steps is given")
    steps: int | None = field(None, ge=1, doc="training steps; overrides epochs")
    batch_size: int = field(128, ge=1, le=1 << 20, doc="images in a minibatch")
    seed: int = field(0, ge=0, lt=1 << 63, doc="governs the initial weights, the order of the data and all noise")
    precision: Literal["float32", "bfloat16"] = field("float32", doc="of the networks; weights stay in float32")
    clip: float | None = field(None, gt=0, doc="largest norm of a phase's gradient; none: not clipped")
    ema: float | None = field(None, gt=0, lt=1, doc="decay of the moving average of the weights; none: no average")
    schedule: Literal["constant", "cosine"] = field("constant", doc="of the learning rate, after the warm-up")
    warmup: int = field(0, ge=0, doc="steps over which the learning rate rises linearly from 0")
    log_every: int = field(50, ge=1, doc="steps between lines of metrics.jsonl")
    checkpoint_every: int = field(1000, ge=1, doc="steps between checkpoints")
    checkpoint_minutes: float | None = field(
        10.0, gt=0, doc="minutes between checkpoints at most; none: by steps alone"
    )
    keep: int = field(2, ge=1, doc="checkpoints kept, the newest ones")
    tensorboard: bool = field(False, doc="also write the metrics for TensorBoard")

    def total_steps(self, images: int, repeats: int) -> int:
        """``steps``, or as many as a phase of ``repeats`` minibatches a step needs for ``epochs`` epochs."""
        if self.steps is not None:
            return self.steps
        return math.ceil(self.epochs * images / (self.batch_size * repeats))

    def learning_rate_factor(self, step: int, total_steps: int) -> float:
        """What multiplies every learning rate in the step after ``step`` finished ones: a pure function of both.

        Linear warm-up to 1, then constant, or half a cosine down to 0 at the end (Loshchilov and Hutter 2017, eq. 5).
        """
        if step < self.warmup:
            return (step + 1) / self.warmup
        if self.schedule == "constant":
            return 1.0
        progress = (step - self.warmup) / max(1, total_steps - self.warmup)
        return 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))
