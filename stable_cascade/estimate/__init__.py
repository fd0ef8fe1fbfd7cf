"""How many parameters a training has and how much memory it will take, known without loading a weight."""

from stable_cascade.estimate.report import Estimate, estimate

__all__ = ["Estimate", "estimate"]
