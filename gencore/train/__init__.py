"""Training: one trainer for every model, and checkpoints that survive ``kill -9``."""

from gencore.train.checkpoint import Checkpoint as Checkpoint
from gencore.train.checkpoint import CheckpointError as CheckpointError
from gencore.train.checkpoint import Run as Run
from gencore.train.config import AverageConfig as AverageConfig
from gencore.train.config import TrainConfig as TrainConfig
from gencore.train.errors import TrainingError as TrainingError
from gencore.train.memory import NotEnoughMemoryError as NotEnoughMemoryError
from gencore.train.runs import load as load
from gencore.train.runs import train as train
from gencore.train.trainer import Trainer as Trainer
