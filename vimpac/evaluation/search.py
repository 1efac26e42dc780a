"""The videos of a store that are nearest to one of them, or to a video file."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from pathlib import Path

import numpy as np

from vimpac.config.probe import SimilarConfig
from vimpac.data.jobs import encode_views
from vimpac.data.store import TokenStore
from vimpac.data.test_clips import clip_starts
from vimpac.data.tokenizers import load_tokenizer
from vimpac.data.video import decode
from vimpac.distributed import World
from vimpac.errors import CorruptVideo, InputError
from vimpac.evaluation.feature_file import check_folder, read_features, write_features
from vimpac.evaluation.features import Look, all_vectors, chunk_vectors, vectors_of
from vimpac.evaluation.neighbors import most_similar
from vimpac.evaluation.normalise import fit_normaliser
from vimpac.evaluation.subject import Subject

SUGGESTIONS = 3


def find_query(store: TokenStore, video: str, view: int) -> int | np.ndarray:
    """The place of the video `video` in the store or, for a video file, its ids [frames, h, w] by the store's tokenizer.

    Raises InputError, with the most similar names of the store, if it is neither, and for a file that cannot be decoded.
    """
    if video in store.names:
        return store.names.index(video)
    if not Path(video).is_file():
        ends = [name for name in store.names if name.endswith(video)]
        close = ends or difflib.get_close_matches(video, store.names, SUGGESTIONS, 0.5) or store.names
        expected = ", ".join(close[:SUGGESTIONS])
        raise InputError(
            f"{video} is neither a video of {store.folder} nor a file: expected a name of the store, such as {expected}"
        )
    tokenizer = load_tokenizer(store.folder)
    try:
        chunks = decode(video, store.fps, store.frame_size, [store.views[view]])
        return np.concatenate([encode_views(tokenizer, chunk)[0] for chunk in chunks]).astype(np.int64)
    except CorruptVideo as error:
        raise InputError(f"{video} cannot be read: {error}; give another video") from None


def clips_of(ids: np.ndarray, clips: int, clip_frames: int, pad_id: int, every: int) -> np.ndarray:
    """Clips [1, clips, 1, T, h, w] of a video's ids [frames, h, w], as `TestClips` takes them from a store."""
    starts = clip_starts(len(ids), clips, clip_frames, every)
    out = np.full((1, clips, 1, clip_frames, *ids.shape[1:]), pad_id, np.int64)
    for clip, start in zip(out[0, :, 0], starts, strict=True):
        taken = ids[start::every][:clip_frames]
        clip[: len(taken)] = taken
    return out


class Search:
    """Compares one video with all of a store, by the cosines of one kind of vector."""

    def __init__(self, subject: Subject, config: SimilarConfig, look: Look, precision: str, world: World):
        """Raises InputError if the model has no such vector, or if config.features holds features of something else."""
        self.subject, self.config, self.look, self.world = subject, config, look, world
        self.model = subject.trained.model.to(world.device)
        self.settings = None
        if config.vector not in (known := vectors_of(self.model, config.layer)):
            raise InputError(f"this model has no vector {config.vector} at this layer, expected one of {', '.join(known)}")
        if config.features is not None:
            self.settings = subject.settings(config, "none", precision)
            check_folder(config.features, self.settings)

    def vectors(self, tick: Callable[[int], None] = lambda videos: None) -> np.ndarray:
        """Of all videos of the store [n, D], not normalised: read from config.features, or computed and kept there."""
        clips, names = self.subject.clips(clips=self.config.clips), self.subject.store.names
        if self.config.features is None or self.settings is None:
            return all_vectors(self.model, clips, names, self.look, self.world, tick=tick)[self.config.vector]
        write_features(self.config.features, self.settings, self.model, clips, names, self.look, self.world, tick)
        return read_features(self.config.features, self.settings)[0][self.config.vector]

    def nearest(self, vectors: np.ndarray, query: int | np.ndarray) -> list[tuple[str, float]]:
        """Names and cosines of the nearest videos to one of the store, itself left out, or to ids [frames, h, w]."""
        normalise = fit_normaliser(vectors, self.config.normalize)
        own = query if isinstance(query, int) else None
        vector = vectors[query : query + 1] if isinstance(query, int) else self._vector_of(query)
        found = most_similar(normalise(vectors), normalise(vector)[0], self.config.count, own)
        return [(self.subject.store.names[i], score) for i, score in found]

    def _vector_of(self, ids: np.ndarray) -> np.ndarray:
        model, subject = self.model.config, self.subject
        clips = clips_of(ids, self.config.clips, subject.clip_frames, model.pad_id, subject.every)
        look = Look(self.look.layer, self.look.batch, True, self.look.autocast)
        return chunk_vectors(self.model, clips, look)[self.config.vector].numpy()
