"""How methods train: a `Trainer` for all of them, and one for each that differs."""

from bara.trainers.base import AdapterTrainer

__all__ = ["AdapterTrainer"]
