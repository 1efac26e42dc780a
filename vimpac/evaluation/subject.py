"""What features, probes and searches begin with: a trained model and a store that fits it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vimpac import weights
from vimpac.config.probe import LookConfig, Normalisation
from vimpac.data.rates import frame_step
from vimpac.data.store import TokenStore
from vimpac.data.test_clips import TestClips
from vimpac.data.views import center_view
from vimpac.errors import InputError
from vimpac.evaluation.feature_file import FeatureSettings, model_digest, store_digest
from vimpac.evaluation.features import check_layer
from vimpac.weights import TrainedModel


@dataclass(frozen=True)
class Subject:
    """A model in evaluation mode, a store of its tokenizer, and which frames of it the model sees: every `every`-th."""

    trained: TrainedModel
    store: TokenStore
    view: int
    every: int
    trained_grid: tuple[int, int, int]
    """T, H, W of the model's positions before they were interpolated to the store's frames."""

    @property
    def clip_frames(self) -> int:
        return self.trained.model.config.grid[0]

    @property
    def fps(self) -> float:
        return self.store.fps / self.every

    def clips(self, videos: np.ndarray | None = None, clips: int = 1) -> TestClips:
        """`clips` clips of each of the videos (None: of all), seen in the centre view."""
        videos = np.arange(len(self.store)) if videos is None else videos
        pad_id = self.trained.model.config.pad_id
        return TestClips(self.store, videos, clips, [self.view], self.clip_frames, pad_id, self.every)

    def settings(self, config: LookConfig, normalize: Normalisation, precision: str) -> FeatureSettings:
        """What the features of the whole store depend on."""
        model = self.trained.model
        return FeatureSettings(
            model=model_digest(model),
            store=store_digest(self.store),
            layer=model.config.layers if config.layer is None else config.layer,
            clips=config.clips,
            clip_frames=self.clip_frames,
            fps=self.fps,
            view=self.view,
            precision=precision,
            normalize=normalize,
        )

    def notes(self) -> Sequence[str]:
        """What a user should know before it is used."""
        grid = self.trained.model.config.grid
        if grid == self.trained_grid:
            return ()
        was, now = (" × ".join(map(str, x)) for x in (self.trained_grid, grid))
        return (f"positions are interpolated from {was} (T × H × W) to {now} tokens",)


def open_subject(model: Path, store: Path, config: LookConfig) -> Subject:
    """Opens both and checks that they fit each other and the options.

    Raises InputError for a store of another tokenizer, a rate that does not divide the store's, a missing layer, clips longer
    than every video, or a store without a centre view.
    """
    tokens = TokenStore(store)
    trained = weights.load_trained(model, tokenizer_digest=tokens.tokenizer.digest)
    shape = trained.model.config
    if shape.vocab_size != tokens.tokenizer.vocab_size:
        raise InputError(
            f"{trained.file} knows {shape.vocab_size} codes, {store} was made with {tokens.tokenizer.vocab_size}: tokenize the "
            "videos with the model's tokenizer"
        )
    check_layer(shape, config.layer)
    grid = (config.frames or shape.grid[0], *tokens.grid)
    if grid != shape.grid:
        trained = weights.load_trained(model, grid, tokens.tokenizer.digest)
    every = frame_step(tokens, trained.training.fps if config.fps is None else config.fps)
    found = Subject(trained, tokens, center_view(tokens), every, shape.grid)
    found.clips()  # raises if clips are too long
    return found
