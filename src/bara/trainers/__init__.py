"""How methods train: a `Trainer` for all of them, and one for each that differs."""

from bara.training.trainer import AdapterTrainer

__all__ = ["AdapterTrainer"]
