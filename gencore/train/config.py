"""How a model is trained: what is the same for every model and every phase."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from gencore.config import Config, field

# What may differ when a run goes on: none of these changes the weights at a given step beyond rounding, the length only
# if the schedule is constant; accumulate changes those of a model with batch norm, as it does anyway.
LENGTH = ("steps", "epochs")
RESUMABLE = (
    *LENGTH, "log_every", "checkpoint_every", "checkpoint_minutes", "keep", "tensorboard", "accumulate", "workers",
    "compile", "sharding", "sample_every", "samples", "validate_every", "keep_best",
    "measure_every", "measured_samples",
)  # fmt: skip


@dataclass(frozen=True)
class AverageConfig(Config):
    """Settings of the exponential moving average of the weights."""

    decay: float = field(0.999, gt=0, lt=1, doc="share of the average that a step keeps; less in the first steps")
    begin: int = field(0, ge=0, doc="steps before it begins; until then it is the weights themselves")
    every: int = field(1, ge=1, doc="steps between two of its steps")


@dataclass(frozen=True)
class TrainConfig(Config):
    """Settings of the trainer. Optimisers and their learning rates belong to the model, phase by phase."""

    epochs: int = field(20, ge=1, doc="passes over the data set, unless steps is given")
    steps: int | None = field(None, ge=1, doc="training steps; overrides epochs")
    batch_size: int = field(128, ge=1, le=1 << 20, doc="images in a minibatch, of all processes together")
    accumulate: int = field(1, ge=1, doc="parts that a minibatch is computed in, one after the other, to save memory")
    seed: int = field(0, ge=0, lt=1 << 63, doc="governs the initial weights, the order of the data and all noise")
    precision: Literal["float32", "bfloat16", "float16"] = field(
        "float32", doc="of the networks; weights stay in float32. float16, with loss scaling, is for GPUs"
    )
    compile: bool = field(False, doc="compile the losses with torch.compile")
    sharding: Literal["none", "full"] = field(
        "none", doc="with several processes: full divides weights, gradients and optimisers among them (FSDP2)"
    )
    clip: float | None = field(None, gt=0, doc="largest norm of a phase's gradient; none: not clipped")
    average: AverageConfig | None = field(None, doc="moving average of the weights; none: no average")
    schedule: Literal["constant", "cosine"] = field("constant", doc="of the learning rate, after the warm-up")
    schedule_end: float = field(0.0, ge=0, le=1, doc="cosine: share of the learning rate at the end")
    warmup: int = field(0, ge=0, doc="steps over which the learning rate rises linearly from 0")
    workers: int | None = field(
        None,
        ge=0,
        le=256,
        doc="processes that read images which are not in memory; none: one for each core but one, at most 4",
    )
    log_every: int = field(50, ge=1, doc="steps between lines of metrics.jsonl")
    sample_every: int | None = field(None, ge=1, doc="steps between pictures of samples; none: no pictures")
    samples: int = field(64, ge=1, le=4096, doc="images of such a picture")
    validate_every: int | None = field(
        None, ge=1, doc="steps between measures of the losses on test images; none: not measured"
    )
    measure_every: int | None = field(
        None, ge=1, doc="steps between measures of samples against test images; none: not measured"
    )
    measured_samples: int = field(1000, ge=6, le=100_000, doc="samples that are measured then")
    keep_best: bool = field(False, doc="keep the checkpoint with the lowest validation loss too")
    checkpoint_every: int = field(1000, ge=1, doc="steps between checkpoints")
    checkpoint_minutes: float | None = field(
        10.0, gt=0, doc="minutes between checkpoints at most; none: by steps alone"
    )
    keep: int = field(2, ge=1, doc="checkpoints kept, the newest ones")
    tensorboard: bool = field(False, doc="also write the metrics for TensorBoard")

    def check(self) -> Iterable[str]:
        if self.accumulate > self.batch_size:
            yield f"accumulate: must be at most batch_size={self.batch_size}, was {self.accumulate}"
        if self.keep_best and self.validate_every is None:
            yield "keep_best: must be false without validate_every"

    def total_steps(self, images: int, minibatches: float) -> int:
        """``steps``, or as many as a phase of so many minibatches a step needs for ``epochs`` epochs."""
        if self.steps is not None:
            return self.steps
        return math.ceil(self.epochs * images / (self.batch_size * minibatches))

    def learning_rate_factor(self, step: int, total_steps: int) -> float:
        """What multiplies every learning rate in the step after ``step`` finished ones: a pure function of both.

        Linear warm-up to 1, then constant, or half a cosine down to ``schedule_end`` (Loshchilov and Hutter 2017,
        equation 5).
        """
        if step < self.warmup:
            return (step + 1) / self.warmup
        if self.schedule == "constant":
            return 1.0
        progress = (step - self.warmup) / max(1, total_steps - self.warmup)
        cosine = 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))
        return self.schedule_end + (1.0 - self.schedule_end) * cosine
