"""Which labels a run reads, and how."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from vimpac.config.checks import require
from vimpac.config.run import RunConfig

LabelKind = Literal["csv", "folder", "list", "ucf101", "hmdb51", "kinetics400", "ssv2", "diving48", "howto100m"]


@dataclass(frozen=True, kw_only=True)
class LabelOptions:
    """How labels are read."""

    labels_kind: LabelKind | None = None
    """Format of the labels; None = recognised from the content."""
    label_column: str | None = None
    """The label column of a CSV; None = `label`."""
    split_number: int | None = None
    """Split of UCF101 or HMDB51: 1, 2 or 3; None = 1."""
    classes: str | None = None
    """File with the name of a class on each line, for a CSV or a list of numbers."""
    allow_two_splits: bool = False
    """Accept a video that is in two splits."""
    allow_empty_classes: bool = False
    """Accept a class without videos; in training, without a training video."""


@dataclass(frozen=True, kw_only=True)
class LabelledRunConfig(LabelOptions, RunConfig):
    """The options of runs that read labels."""

    labels: str | None = None
    """Label file, or the folder of a data set's files: `vimpac labels check STORE LABELS` shows what is read."""

    def __post_init__(self):
        super().__post_init__()
        for name in ("labels", "classes"):
            self.require_path(name)
        require(self.split_number in (None, 1, 2, 3), "split_number", self.split_number, "1, 2 or 3")
