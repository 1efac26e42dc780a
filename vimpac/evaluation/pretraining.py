"""Evaluates both pre-training tasks on held-out videos, next to predictors without a model (section H.2)."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from scipy.ndimage import distance_transform_edt
from torch import Tensor

from vimpac.data.clips import ClipPairs
from vimpac.model import PretrainModel
from vimpac.model.losses import Objective
from vimpac.model.masking import Masking
from vimpac.ops import BlockMask, info_nce

HELD_OUT_IDS = 1 << 62  # added to held-out sample ids, so that their masks differ from those of training samples


@torch.inference_mode()
def evaluate(
    model: PretrainModel,
    objective: Objective,
    masking: Masking,
    pairs: ClipPairs,
    batches: int,
    videos: int,
    micro_batch: int,
    most_frequent: int,
    padded: bool = True,
    autocast: torch.dtype | None = None,
) -> dict:
    """Accuracy on masked tokens and of finding a clip's partner, over `batches` batches of `videos` videos.

    objective, masking: those of training, except that noisy masks (section G.3) hide every masked token here.
    micro_batch: videos per forward pass. most_frequent: the token that the first trivial predictor always answers.
    padded: whether clips may hold PAD. autocast: dtype of mixed precision, None = float32.
    Returns, with masked_tokens and retrieval_clips as the denominators:
        mask_accuracy, most_frequent_accuracy, nearest_copy_accuracy: shares of right answers on masked tokens, by the model, by
            the most frequent token and by a copy of the nearest visible token. None without the mask task.
        cl_loss: γ · L_cl (Eq. 5) of a batch's videos, the paper's CL-Loss. None without the contrastive task.
        retrieval_accuracy: share of clips whose nearest neighbour among the batch's other clips, by cosine of the contrastive
            features (of [CLS] without the contrastive task), is the other clip of the same video.
        histogram_retrieval_accuracy, retrieval_chance: the same by cosine of the histograms of the visible tokens; by chance.
            These, retrieval_accuracy and cl_loss are None for one video, whose clips have no other candidate.
    """
    device = next(model.parameters()).device
    training = model.training
    model.eval()
    masking = replace(masking, noisy=False)
    hits = {"mask_accuracy": 0, "most_frequent_accuracy": 0, "nearest_copy_accuracy": 0}
    tokens_seen = retrieved = by_histogram = 0
    losses = []
    for i in range(batches):
        batch = pairs.batch(i * videos, videos)
        states, counts = [], []
        parts = (torch.from_numpy(x).split(2 * micro_batch) for x in (batch.tokens, batch.sample_ids))
        for tokens, ids in zip(*parts, strict=True):
            clips, ids = tokens.to(device), (ids + HELD_OUT_IDS).to(device)
            with torch.autocast(device.type, autocast, enabled=autocast is not None):
                seen = _look(model, objective, masking.draw(clips, ids), clips, padded, most_frequent)
            hits = {name: hits[name] + count for name, count in zip(hits, seen.right, strict=True)}
            tokens_seen += seen.masked
            states, counts = [*states, seen.features], [*counts, seen.histogram]
        features = torch.cat(states)
        retrieved += partners_found(features)
        by_histogram += partners_found(torch.cat(counts))
        if objective.contrasts:
            losses.append(scaled_contrastive_loss(features, objective.temperature))
    model.train(training)
    shares = {name: count / max(tokens_seen, 1) if objective.mask_task else None for name, count in hits.items()}
    clips_seen = 2 * videos * batches
    found = (retrieved / clips_seen, by_histogram / clips_seen, 1 / (2 * videos - 1)) if videos > 1 else (None, None, None)
    return {
        **shares,
        "cl_loss": float(torch.stack(losses).mean()) if losses and videos > 1 else None,
        **dict(zip(("retrieval_accuracy", "histogram_retrieval_accuracy", "retrieval_chance"), found, strict=True)),
        "masked_tokens": tokens_seen,
        "retrieval_clips": clips_seen,
    }


def scaled_contrastive_loss(features: Tensor, temperature: float) -> Tensor:
    """γ · L_cl (Eq. 5) of features [2n, head_out]: first clips, then second clips."""
    first, second = features.chunk(2)
    return temperature * info_nce(first, second, temperature)


class _Seen(NamedTuple):
    """Results of a forward pass over some clips."""

    right: list[int]  # right answers of the model and of the two trivial predictors
    masked: int  # tokens
    features: Tensor  # [B, head_out] float32, or [CLS] [B, C] without the contrastive task
    histogram: Tensor  # [B, V]


def _look(
    model: PretrainModel, objective: Objective, masked: BlockMask, tokens: Tensor, padded: bool, most_frequent: int
) -> _Seen:
    right = [0, 0, 0]
    seen = masked.tokens if objective.reads_masked_clips else tokens
    cls, hidden = model.backbone(seen, padded)
    if objective.mask_task:
        truth = tokens[masked.mask]
        guesses = [
            torch.cat([model.token_head(rows).argmax(-1) for rows in hidden[masked.mask].split(4096)]),
            torch.full_like(truth, most_frequent),
            nearest_visible(tokens, masked.mask, model.config.pad_id),
        ]
        right = [int((guess == truth).sum()) for guess in guesses]
    contrasted = masked.tokens if objective.contrastive_masked else tokens
    if contrasted is not seen:  # as in training, intact clips need a separate forward pass
        cls, _ = model.backbone(contrasted, padded)
    features = model.cls_head(cls) if objective.contrasts else cls
    return _Seen(right, int(masked.mask.sum()), features.float(), histograms(contrasted, model.config.vocab_size))


def nearest_visible(tokens: Tensor, mask: Tensor, pad_id: int) -> Tensor:
    """For each masked token, in the order of tokens[mask], the nearest visible token of its clip in time and space.

    tokens [B, T, H, W], mask [B, T, H, W] bool → [masked]. PAD in a clip without visible tokens.
    """
    hidden = (mask | (tokens == pad_id)).cpu().numpy()
    copies = []
    for clip, clip_hidden, clip_mask in zip(tokens.cpu().numpy(), hidden, mask.cpu().numpy(), strict=True):
        if clip_hidden.all():
            copies.append(np.full(clip_mask.sum(), pad_id))
            continue
        nearest = distance_transform_edt(clip_hidden, return_distances=False, return_indices=True)
        assert isinstance(nearest, np.ndarray)  # [3, T, H, W]
        copies.append(clip[tuple(nearest[:, clip_mask])])
    return torch.from_numpy(np.concatenate(copies)).to(tokens.device)


def histograms(tokens: Tensor, vocab_size: int) -> Tensor:
    """How often each id below vocab_size occurs in each clip: [B, T, H, W] → [B, vocab_size] float32."""
    ids = tokens.flatten(1).long().clamp(max=vocab_size)  # special ids share an extra column, which is dropped
    counts = torch.zeros(len(ids), vocab_size + 1, device=ids.device)
    return counts.scatter_add_(1, ids, torch.ones_like(ids, dtype=counts.dtype))[:, :vocab_size]


def partners_found(features: Tensor) -> int:
    """How many of 2n clips (first clips, then second clips) have their partner as their nearest neighbour by cosine."""
    z = F.normalize(features, dim=-1)
    scores = (z @ z.T).fill_diagonal_(-torch.inf)
    partner = torch.arange(len(z), device=z.device).roll(len(z) // 2)
    return int((scores.argmax(-1) == partner).sum())


def most_frequent_token(pairs: ClipPairs, vocab_size: int, videos: int = 1024) -> int:
    """The most frequent id in the clips of the first samples, of at most `videos` videos."""
    tokens = pairs.batch(0, min(videos, pairs.epoch_samples)).tokens
    return int(np.bincount(tokens[tokens < vocab_size], minlength=vocab_size).argmax())
