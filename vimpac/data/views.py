"""Which of a store's views serve pre-training, fine-tuning and evaluation (Table 4)."""

from __future__ import annotations

from collections.abc import Sequence

from vimpac.data.format import View
from vimpac.data.store import TokenStore
from vimpac.errors import InputError


def center_view(store: TokenStore) -> int:
    """The index of the centre crop that is not flipped, at the smallest resize. Raises InputError without one."""
    found = [i for i in _smallest(store.views, _upright(store.views)) if store.views[i].crop == "center"]
    if not found:
        raise InputError(
            f"{store.folder} has no centre view, it has {described(store.views)}: tokenize the videos with --views center, "
            "train or test, or use all its views with --all-views"
        )
    return found[0]


def test_views(store: TokenStore) -> list[int]:
    """The indices of the crops over which an evaluation averages: not flipped, at the smallest resize.

    Three for a store made with `--views test` or `train`, one with `--views center`. Raises InputError if there is none.
    """
    found = _smallest(store.views, _upright(store.views))
    if not found:
        raise InputError(
            f"{store.folder} has no view to evaluate on, all of {described(store.views)} are flipped: tokenize the videos with "
            "--views test"
        )
    return found


def training_views(store: TokenStore, flip: bool = True) -> list[int]:
    """The indices of the views that fine-tuning draws from: all of them, or with flip=False those not flipped.

    Raises InputError if there is none.
    """
    found = list(range(len(store.views))) if flip else _upright(store.views)
    if not found:
        raise InputError(
            f"{store.folder} has flipped views only, {described(store.views)}: tokenize the videos with "
            "--views train --no-flip, or allow flips"
        )
    return found


def described(views: Sequence[View]) -> str:
    """Such as `center, center flipped, top-left ×1.25`."""
    names = [f"{v.crop}{f' ×{v.resize:g}' * (v.resize != 1)}{' flipped' * v.flip}" for v in views]
    return ", ".join(names[:6]) + f" and {len(names) - 6} more" * (len(names) > 6)


def _upright(views: Sequence[View]) -> list[int]:
    return [i for i, view in enumerate(views) if not view.flip]


def _smallest(views: Sequence[View], among: list[int]) -> list[int]:
    smallest = min((views[i].resize for i in among), default=0)
    return [i for i in among if views[i].resize == smallest]
