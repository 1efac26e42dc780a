"""Video files → class probabilities: decode, crop, tokenize, classify."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

from vimpac.data.dalle import DalleVAE
from vimpac.data.format import TOKENIZER, View
from vimpac.data.jobs import decode_video, encode_video, encode_views
from vimpac.data.test_clips import clip_starts, cut_clips
from vimpac.data.tokenizer_file import Tokenizer
from vimpac.data.tokenizers import load_tokenizer
from vimpac.data.workers import run_jobs
from vimpac.errors import InputError
from vimpac.evaluation.classify import clip_scores
from vimpac.model import ClassificationModel
from vimpac.weights import TrainedModel


@dataclass(frozen=True)
class Predictor:
    """A fine-tuned model with the tokenizer that it was trained on.

    model: on its device, in evaluation mode. fps: of its clips. views: over which, and over `clips` clips, the softmax is
    averaged. batch: the most clips of a forward pass. autocast: dtype of mixed precision, None = float32.
    """

    model: ClassificationModel
    tokenizer: Tokenizer
    tokenizer_path: Path
    fps: float
    views: tuple[View, ...]
    clips: int
    batch: int
    autocast: torch.dtype | None = None

    def predict(self, videos: Sequence[str], workers: int, seconds: float) -> Iterator[tuple[str, np.ndarray | str]]:
        """Yields for each file its probabilities float32 [K], or the reason why it has none, in the order of `videos`.

        Files are decoded in `workers` processes, so that one that crashes the decoder fails alone. seconds: the longest that a
        file may take.
        """
        size = self.model.config.grid[1] * self.tokenizer.stride
        decoding = (Path(), self.fps, size, self.views)
        # Only one process should use the GPU, so then the workers only decode.
        on_gpu = isinstance(self.tokenizer, DalleVAE) and self.tokenizer.device.type != "cpu"
        job = partial(decode_video, *decoding) if on_gpu else partial(encode_video, self.tokenizer_path, *decoding)
        waiting, ended = list(dict.fromkeys(videos)), {}
        for name, result in run_jobs(job, waiting[:], workers, seconds):
            if not isinstance(result, str):
                result = self._classify(encode_views(self.tokenizer, result) if on_gpu else result)
            ended[name] = result
            while waiting and waiting[0] in ended:
                yield waiting[0], ended.pop(waiting.pop(0))

    @torch.inference_mode()
    def _classify(self, ids: np.ndarray) -> np.ndarray | str:
        """Probabilities [K] of a video's ids [views, frames, h, w]; or why there are none."""
        config, device = self.model.config, self.model.classifier.weight.device
        starts = clip_starts(ids.shape[1], self.clips, config.grid[0])
        tokens = torch.from_numpy(cut_clips(ids, starts, config.grid[0], config.pad_id))[None]
        with torch.autocast(device.type, self.autocast, enabled=self.autocast is not None):
            scores = clip_scores(self.model, tokens, self.batch, ids.shape[1] < config.grid[0])[0]
        found = scores.mean(0).cpu().numpy()
        return found if np.isfinite(found).all() else "has scores that are not finite numbers (NaN): is the model damaged?"


def tokenizer_of(trained: TrainedModel, path: Path | None) -> tuple[Tokenizer, Path]:
    """The tokenizer that a model was trained on, and its file: `path` (or a store), else what lies beside the model.

    Raises InputError if there is none, or if it is another one.
    """
    if path is None:
        path = (trained.run or trained.file.parent) / TOKENIZER
        if not path.is_file():
            raise InputError(
                f"{path} does not exist: give --tokenizer-path, the tokenizer or the store that {trained.file} was trained on"
            )
    tokenizer = load_tokenizer(path)
    known, codes = trained.training.tokenizer, trained.model.config.vocab_size
    if known is not None and known.digest != tokenizer.digest:
        raise InputError(
            f"{trained.file} was trained on tokenizer {known.name} {known.digest[:12]}…, {path} holds {tokenizer.name} "
            f"{tokenizer.digest[:12]}…: give --tokenizer-path, the tokenizer or the store that it was trained on"
        )
    if codes != tokenizer.vocab_size:
        raise InputError(
            f"{trained.file} has a vocabulary of {codes} codes, {path} holds a tokenizer of {tokenizer.vocab_size}: give "
            "--tokenizer-path, the tokenizer or the store that it was trained on"
        )
    return tokenizer, path
