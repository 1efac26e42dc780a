"""A folder of features: written in parts by any number of processes, resumable, and read again.

features.json         the settings: model, store, layer, clips … Written first
part-CCCCCCC.safetensors  vectors of some chunks of videos, while the work goes on; the name is that of its first chunk
names.json            {"names": the videos in the order of the rows}, which is the store's
features.safetensors  the vectors [n, D] float32 by name, normalised; written last, and then the parts are removed
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from vimpac.config.probe import Normalisation
from vimpac.data.store import TokenStore
from vimpac.distributed import World, on_first_rank
from vimpac.errors import InputError
from vimpac.evaluation.features import Chunk, Clips, Look, check_finite, chunk_vectors, chunks_of, read_ahead
from vimpac.evaluation.normalise import Normaliser, fit_normaliser
from vimpac.files.atomic import LOCK, TEMPORARY, locked, replacing
from vimpac.files.checked import load_json, typed, unsealed, write_json
from vimpac.files.tensorfile import UNSEALED, read_tensors, seal
from vimpac.model import ClassificationModel, PretrainModel

FORMAT = "vimpac-features"
VERSION = 1
SETTINGS, NAMES, FEATURES = "features.json", "names.json", "features.safetensors"
PART_SECONDS = 60.0


@dataclass(frozen=True)
class FeatureSettings:
    """Everything that features depend on. A folder holds those of one such setting."""

    model: str
    """Digest of the weights: `model_digest`."""
    store: str
    """Digest of tokenizer, names and lengths: `store_digest`."""
    layer: int
    clips: int
    """Per video, over which vectors are averaged."""
    clip_frames: int
    fps: float
    view: int
    precision: str
    normalize: Normalisation

    def difference(self, other: FeatureSettings) -> str:
        """What differs in `other`, such as `another model (…), clips was 3, now 2`; self is what there was."""
        before, now = asdict(self), asdict(other)
        changed = [name for name in now if before[name] != now[name]]
        digests = [x for x in changed if x in ("model", "store")]
        said = [f"another {name} ({before[name][:12]}…, now {now[name][:12]}…)" for name in digests]
        return "; ".join(said + [f"{name} was {before[name]}, now {now[name]}" for name in changed if name not in digests])


def model_digest(model: torch.nn.Module) -> str:
    """SHA-256 of the names and values of a model's weights, whichever file they come from."""
    digest = hashlib.sha256()
    for name, x in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(x.shape)} {x.dtype};".encode())
        digest.update(x.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def store_digest(store: TokenStore) -> str:
    """SHA-256 of what tells a store from others without reading its ids: settings, names and lengths of the videos."""
    digest = hashlib.sha256(json.dumps(store.settings.to_json(), sort_keys=True).encode())
    digest.update(json.dumps(store.names).encode())
    digest.update(store.frames.astype("<i8").tobytes())
    return digest.hexdigest()


def write_features(
    out: Path,
    settings: FeatureSettings,
    model: PretrainModel | ClassificationModel,
    clips: Clips,
    names: list[str],
    look: Look,
    world: World,
    tick: Callable[[int], None] = lambda videos: None,
) -> bool:
    """Writes the features of all videos to the folder `out`. Goes on where a run with these settings was stopped.

    All ranks call it, and share the chunks that no part holds yet. A rank publishes a part every PART_SECONDS. tick: called
    with the number of videos after each chunk. Returns False if the folder was complete already.
    Raises InputError if `out` holds something else or is in use, and for vectors that are not finite.
    """
    with ExitStack() as held:
        on_first_rank(lambda: _open(out, settings, held), world)
        if (out / FEATURES).exists():
            return False
        done = {number for path in _parts(out) for number in _read_part(path, settings)[1]}
        _together(world)  # no rank publishes before all have looked
        mine = [chunk for chunk in chunks_of(len(clips)) if chunk.number not in done][world.rank :: world.size]
        with closing(_Writer(out, settings)) as writer:
            for chunk, tokens in read_ahead(clips, mine):
                vectors = chunk_vectors(model, tokens, look)
                check_finite(vectors, names[chunk.first : chunk.first + chunk.videos])
                writer.add(chunk, vectors)
                tick(chunk.videos)
        _together(world)
        on_first_rank(lambda: _finish(out, settings, names), world)
    return True


def read_features(out: Path, settings: FeatureSettings | None = None) -> tuple[dict[str, np.ndarray], FeatureSettings]:
    """The vectors of a finished folder by name, and its settings. With settings: raises InputError if they are others."""
    metadata, tensors = _read(out / FEATURES)
    found = _settings_in(metadata, out / FEATURES)
    if settings is not None:
        check_settings(out, found, settings)
    return tensors, found


def check_folder(out: Path, settings: FeatureSettings) -> None:
    """Raises InputError if the folder `out` holds something other than features of these settings, finished or not."""
    if out.is_symlink() and not out.exists():
        raise InputError(f"{out} is a link that leads nowhere: choose another folder")
    if out.exists() and not out.is_dir():
        raise InputError(f"{out} is a file, expected a folder for the features: choose another")
    if (out / SETTINGS).exists():
        check_settings(out, _read_settings(out / SETTINGS), settings)
    elif out.is_dir() and any(entry.name != LOCK and not entry.name.endswith(TEMPORARY) for entry in out.iterdir()):
        raise InputError(f"{out} is not empty and holds no features: choose a new folder, so that nothing is lost")


def check_settings(out: Path, found: FeatureSettings, wanted: FeatureSettings) -> None:
    """Raises InputError that names what differs."""
    if changed := found.difference(wanted):
        raise InputError(f"{out} holds other features: {changed}; use the same settings, or another folder")


def _together(world: World) -> None:
    """Every rank waits for the others, without a time-out."""
    if world.meeting:
        world.meeting.gather(None)


def _open(out: Path, settings: FeatureSettings, held: ExitStack) -> None:
    check_folder(out, settings)
    held.enter_context(locked(out, f"{out} is being written by another `vimpac features`: wait for its end"))
    if not (out / SETTINGS).exists():
        write_json(out / SETTINGS, {"format": FORMAT, "version": VERSION, "settings": asdict(settings)}, indent=1)


def _read_settings(path: Path) -> FeatureSettings:
    try:
        fields = unsealed(*load_json(path), {"format", "version", "settings"})
        if (fields["format"], fields["version"]) != (FORMAT, VERSION):
            raise InputError(f"format {fields['format']!r} version {fields['version']!r}, expected {FORMAT!r} {VERSION}")
        return typed(FeatureSettings, fields["settings"])
    except InputError as error:
        raise InputError(f"cannot read {path}: {error}; choose another folder") from None


def _settings_in(metadata: dict[str, str], path: Path) -> FeatureSettings:
    try:
        if (metadata.get("format"), metadata.get("version")) != (FORMAT, str(VERSION)):
            raise InputError(f"it is not a file of features of version {VERSION}")
        return typed(FeatureSettings, json.loads(metadata["settings"]))
    except (KeyError, ValueError, RecursionError) as error:  # an InputError among them
        raise InputError(f"cannot read {path}: {error}; remove it and write the features again") from None


def _read(path: Path) -> tuple[dict[str, str], dict[str, np.ndarray]]:
    try:
        return read_tensors(path, "numpy")
    except InputError as error:
        raise InputError(f"cannot read {path}: {error}; remove it and write the features again") from None


def _parts(out: Path) -> list[Path]:
    return sorted(out.glob("part-*.safetensors"))


def _read_part(path: Path, settings: FeatureSettings) -> tuple[dict[str, np.ndarray], list[int]]:
    """Vectors of a part, and the numbers of its chunks."""
    metadata, vectors = _read(path)
    check_settings(path, _settings_in(metadata, path), settings)
    chunks = vectors.pop("chunks").tolist()
    return vectors, chunks


def _save(path: Path, tensors: dict[str, np.ndarray], settings: FeatureSettings) -> None:
    from safetensors.numpy import save_file

    metadata = {"format": FORMAT, "version": str(VERSION), "settings": json.dumps(asdict(settings)), **UNSEALED}
    with replacing(path) as temporary:
        save_file({name: np.ascontiguousarray(x) for name, x in tensors.items()}, temporary, metadata)
        seal(temporary)


class _Writer:
    """Collects the chunks of a rank and publishes them in parts."""

    def __init__(self, out: Path, settings: FeatureSettings):
        self.out, self.settings = out, settings
        self.chunks: list[tuple[int, dict[str, Tensor]]] = []
        self.opened = time.monotonic()

    def add(self, chunk: Chunk, vectors: dict[str, Tensor]) -> None:
        self.chunks.append((chunk.number, vectors))
        if time.monotonic() - self.opened >= PART_SECONDS:
            self.close()

    def close(self) -> None:
        """Publishes what there is."""
        chunks, self.chunks, self.opened = self.chunks, [], time.monotonic()
        if chunks:
            tensors = {name: torch.cat([x[name] for _, x in chunks]).numpy() for name in chunks[0][1]}
            numbers = np.array([number for number, _ in chunks], np.int64)
            _save(self.out / f"part-{numbers[0]:07d}.safetensors", {**tensors, "chunks": numbers}, self.settings)


def _finish(out: Path, settings: FeatureSettings, names: Sequence[str]) -> None:
    """Puts the parts together, in the store's order."""
    whole: dict[str, np.ndarray] = {}
    chunks = chunks_of(len(names))
    missing = {chunk.number for chunk in chunks}
    for path in _parts(out):
        vectors, numbers = _read_part(path, settings)
        row = 0
        for number in numbers:
            chunk = chunks[number]
            missing.discard(number)
            for name, x in vectors.items():
                rows = whole.setdefault(name, np.empty((len(names), x.shape[1]), np.float32))
                rows[chunk.first : chunk.first + chunk.videos] = x[row : row + chunk.videos]
            row += chunk.videos
    assert not missing, f"no part has chunks {missing}"
    fitted = {name: fit_normaliser(x, settings.normalize) for name, x in whole.items()}
    tensors = {name: fitted[name](x) for name, x in whole.items()}
    write_json(out / NAMES, {"names": list(names)})
    _save(out / FEATURES, {**tensors, **_statistics(fitted)}, settings)
    for path in (*_parts(out), *out.glob(f"*{TEMPORARY}")):
        path.unlink()


def _statistics(fitted: dict[str, Normaliser]) -> dict[str, np.ndarray]:
    """NAME.offset [D] and NAME.matrix [D, D], with which (x - offset) @ matrix normalises further vectors."""
    parts = {f"{name}.{part}": getattr(x, part) for name, x in fitted.items() for part in ("offset", "matrix")}
    return {name: x for name, x in parts.items() if x is not None}
