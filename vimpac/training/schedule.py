"""How many updates a run makes."""

from __future__ import annotations

from dataclasses import dataclass

from vimpac.config import TrainConfig


@dataclass(frozen=True)
class Schedule:
    steps: int  # updates at which the run ends
    decay_steps: int  # updates at which the learning rate reaches 0


def plan_steps(config: TrainConfig, videos: int) -> Schedule:
    """Updates of the run and of its learning-rate schedule, which stages of one schedule share."""
    schedule_epochs = config.schedule_epochs or config.epochs
    if config.steps is not None:
        return Schedule(config.steps, round(schedule_epochs / config.epochs * config.steps))
    steps, decay_steps = (max(1, round(n * videos / config.batch_size)) for n in (config.epochs, schedule_epochs))
    return Schedule(steps, decay_steps)
