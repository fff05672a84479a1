"""Training: one trainer for every model, and checkpoints that survive ``kill -9``."""

from gencore.train.checkpoint import Checkpoint as Checkpoint
from gencore.train.checkpoint import CheckpointError as CheckpointError
from gencore.train.checkpoint import Run as Run
from gencore.train.checkpoint import load_model as load_model
from gencore.train.config import TrainConfig as TrainConfig
from gencore.train.memory import NotEnoughMemoryError as NotEnoughMemoryError
from gencore.train.trainer import Trainer as Trainer
from gencore.train.trainer import TrainingError as TrainingError
