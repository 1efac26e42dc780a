"""Both pre-training tasks on held-out videos, beside what needs no model (section H.2)."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from scipy.ndimage import distance_transform_edt
from torch import Tensor

from vimpac.data.clips import ClipPairs
from vimpac.training.step import PretrainStep

HELD_OUT_IDS = 1 << 62  # added to held-out sample ids, so that their masks are not those of training samples


@torch.inference_mode()
def evaluate(step: PretrainStep, pairs: ClipPairs, batches: int, videos: int, micro_batch: int, most_frequent: int) -> dict:
    """Accuracy on masked tokens and of finding a clip's partner, over `batches` batches of `videos` videos.

    micro_batch: videos a forward pass. most_frequent: the token that the first trivial predictor always answers.

    Returns mask_accuracy, most_frequent_accuracy, nearest_copy_accuracy (a copy of the nearest visible token): shares of
    masked tokens, None without the mask task; retrieval_accuracy: share of clips whose nearest neighbour among the batch's
    other clips (by cosine of the contrastive features, or of [CLS] without the contrastive task) is the other clip of the
    same video, histogram_retrieval_accuracy (by cosine of how often each token occurs in what the model sees) and
    retrieval_chance, None for one video, whose clips have no other candidate; masked_tokens and retrieval_clips that these
    are shares of. Every masked token is hidden, where training leaves some visible (section G.3), too.
    """
    device = next(step.parameters()).device
    training = step.training
    step.eval()
    hits = {"mask_accuracy": 0, "most_frequent_accuracy": 0, "nearest_copy_accuracy": 0}
    tokens_seen = retrieved = by_histogram = clips_seen = 0
    for i in range(batches):
        batch = pairs.batch(i * videos, videos)
        features, counts = [], []
        for tokens, ids in zip(
            *(torch.from_numpy(x).split(2 * micro_batch) for x in (batch.tokens, batch.sample_ids)), strict=True
        ):
            right, seen, z, histogram = _clips(step, tokens.to(device), (ids + HELD_OUT_IDS).to(device), most_frequent)
            hits = {name: hits[name] + count for name, count in zip(hits, right, strict=True)}
            tokens_seen += seen
            features.append(z)
            counts.append(histogram)
        retrieved += partners_found(torch.cat(features))
        by_histogram += partners_found(torch.cat(counts))
        clips_seen += 2 * videos
    step.train(training)
    shares = {name: count / max(tokens_seen, 1) if step.config.mask_task else None for name, count in hits.items()}
    found = (retrieved / clips_seen, by_histogram / clips_seen, 1 / (2 * videos - 1)) if videos > 1 else (None, None, None)
    return {
        **shares,
        **dict(zip(("retrieval_accuracy", "histogram_retrieval_accuracy", "retrieval_chance"), found, strict=True)),
        "masked_tokens": tokens_seen,
        "retrieval_clips": clips_seen,
    }


def _clips(step: PretrainStep, tokens: Tensor, ids: Tensor, most_frequent: int) -> tuple[list[int], int, Tensor, Tensor]:
    """Right answers of the model and of the two predictors, number of masked tokens, features and histograms of these clips."""
    model, config = step.model, step.config
    with torch.autocast(tokens.device.type, step.autocast, enabled=step.autocast is not None):
        masked = step.mask(tokens, ids, noisy=False)
        right, cls = [0, 0, 0], None
        if config.mask_task or config.contrastive_masked:
            cls, hidden = model.backbone(masked.tokens, step.padded)
        if config.mask_task:
            truth = tokens[masked.mask]
            guesses = [
                torch.cat([model.token_head(rows).argmax(-1) for rows in hidden[masked.mask].split(4096)]),
                torch.full_like(truth, most_frequent),
                nearest_visible(tokens, masked.mask, config.model.pad_id),
            ]
            right = [int((guess == truth).sum()) for guess in guesses]
        if not config.contrastive_masked:  # as in training
            cls, _ = model.backbone(tokens, step.padded)
        features = model.cls_head(cls) if config.alpha > 0 else cls
    shown = masked.tokens if config.contrastive_masked else tokens
    return right, int(masked.mask.sum()), features.float(), histograms(shown, config.model.vocab_size)


def nearest_visible(tokens: Tensor, mask: Tensor, pad_id: int) -> Tensor:
    """For each masked token (in the order of tokens[mask]), the nearest visible one of its clip, in time and space.

    tokens [B, T, H, W], mask [B, T, H, W] bool → [masked]. A clip without any visible token gives PAD.
    """
    hidden = (mask | (tokens == pad_id)).cpu().numpy()
    copies = []
    for clip, gone, asked in zip(tokens.cpu().numpy(), hidden, mask.cpu().numpy(), strict=True):
        if gone.all():
            copies.append(np.full(asked.sum(), pad_id))
            continue
        nearest = distance_transform_edt(gone, return_distances=False, return_indices=True)  # [3, T, H, W]
        copies.append(clip[tuple(nearest[:, asked])])
    return torch.from_numpy(np.concatenate(copies)).to(tokens.device)


def histograms(tokens: Tensor, vocab_size: int) -> Tensor:
    """How often each id below vocab_size occurs in each clip: [B, T, H, W] → [B, vocab_size] float32."""
    ids = tokens.flatten(1).long().clamp(max=vocab_size)  # special ids in a column of their own, which goes
    counts = torch.zeros(len(ids), vocab_size + 1, device=ids.device)
    return counts.scatter_add_(1, ids, torch.ones_like(ids, dtype=counts.dtype))[:, :vocab_size]


def partners_found(features: Tensor) -> int:
    """How many of 2n clips (first clips, then second clips) have their partner as nearest neighbour by cosine."""
    z = F.normalize(features, dim=-1)
    scores = (z @ z.T).fill_diagonal_(-torch.inf)
    partner = torch.arange(len(z), device=z.device).roll(len(z) // 2)
    return int((scores.argmax(-1) == partner).sum())


def most_frequent_token(pairs: ClipPairs, vocab_size: int, videos: int = 1024) -> int:
    """The commonest id in the clips of the first samples, at most `videos` of them."""
    tokens = pairs.batch(0, min(videos, pairs.epoch_samples)).tokens
    return int(np.bincount(tokens[tokens < vocab_size], minlength=vocab_size).argmax())
