"""Frames ↔ token ids: one protocol, two tokenizers, one safetensors file each."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import json
import os
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from vimpac.data.format import MAX_VOCABULARY, TOKENIZER, TokenizerInfo
from vimpac.errors import InputError
from vimpac.files.atomic import replacing
from vimpac.files.checked import check_names, check_regular, typed
from vimpac.files.tensorfile import UNSEALED, read_tensors, seal
from vimpac.meta import without_memory

if TYPE_CHECKING:
    import torch

STRIDE = 8
MAX_CODES = 8192
_FORMAT = "vimpac-tokenizer"
_EPOCHS_TIMES_CODES = 10_240  # the cost of an epoch grows with codes: keeps a fit of 200,000 patches below a minute
_BLOCK = 2048  # patches a matrix product: 64 MiB of scores at 8192 codes


class Tokenizer(Protocol):
    """Turns frames into ids and back. The same frame gets the same ids whatever it is batched with."""

    name: str
    vocab_size: int
    stride: int
    digest: str
    """Hex SHA-256 of the name and the weights."""

    def encode(self, frames: np.ndarray) -> np.ndarray:
        """uint8 [T, 3, S, S] → uint16 [T, S / stride, S / stride]; S must be a multiple of the stride."""

    def decode(self, ids: np.ndarray) -> np.ndarray:
        """Integers [T, h, w] → uint8 [T, 3, h * stride, w * stride]; InputError for ids outside 0..vocab_size - 1."""

    def save(self, path: str | Path) -> None:
        """Writes a .safetensors file that `load_tokenizer` reads."""


def describe(tokenizer: Tokenizer) -> TokenizerInfo:
    """What a store records of its tokenizer."""
    return TokenizerInfo(tokenizer.name, tokenizer.vocab_size, tokenizer.stride, tokenizer.digest)


def load_tokenizer(path: str | Path) -> Tokenizer:
    """A tokenizer from its .safetensors file or from the store it wrote. Raises InputError if `path` is neither."""
    path = Path(path)
    if path.is_dir():
        path = path / TOKENIZER
    try:
        check_regular(path)
    except InputError as error:
        why = f"cannot be read: {error}" if os.path.lexists(path) else "does not exist"
        raise InputError(f"{path} {why}; expected a tokenizer's .safetensors file, or a token store") from None
    name, tensors, config = _read(path)
    return PatchVQ(tensors["codebook"], **config) if name == PatchVQ.name else _dalle(path, tensors, config)


def check_tokenizer_file(store: str | Path, expected: TokenizerInfo) -> None:
    """Compares the digest of the tokenizer file in the folder `store`; raises InputError if it is missing or not `expected`.

    Only reads: DALL-E's modules need not be there.
    """
    path = Path(store) / TOKENIZER
    if not path.is_file():
        raise InputError(f"{path} is missing, without it the ids cannot be decoded; copy the whole store again")
    name, tensors, config = _read(path)
    digest = _digest(name, tensors)
    if digest != expected.digest:
        raise InputError(
            f"{path} is damaged or another store's: its digest is {digest[:16]}, the ids were made with "
            f"{expected.digest[:16]}; copy the whole store again"
        )
    codes = len(tensors["codebook"]) if name == PatchVQ.name else config["encoder"]["vocab_size"]
    if (name, codes, STRIDE) != (expected.name, expected.vocab_size, expected.stride):
        raise InputError(
            f"{path} is a {name} tokenizer of {codes} codes, {STRIDE} pixels a token, but the store says {expected.name}, "
            f"{expected.vocab_size} and {expected.stride}: its JSON files are damaged; copy the whole store again"
        )


class PatchVQ:
    """Vector quantisation of 8×8 patches: an id is the index of the nearest of `codes` patches.

    Codes are whole pixel values, so that float32 computes 2·x·c - c·c exactly: the sums of 2·x·c are even and below
    2²⁵, c·c is below 2²⁴. Ids do not depend on the machine, the threads or the batch; ties go to the lower id.
    """

    name = "patch-vq"
    stride = STRIDE

    def __init__(self, codebook: np.ndarray, requested: int | None = None, seed: int | None = None):
        """codebook: uint8 [codes, 192], each a patch [3, 8, 8]. requested, seed: how it was fitted, if known."""
        _check_codebook(codebook)
        self.codebook = np.ascontiguousarray(codebook)
        self.vocab_size = len(self.codebook)
        self.requested, self.seed = requested, seed
        self.digest = _digest(self.name, {"codebook": self.codebook})
        pixels = self.codebook.astype(np.float32)
        self._weight = np.ascontiguousarray(2 * pixels.T)
        self._bias = np.square(pixels).sum(1)

    @classmethod
    def fit(cls, data: np.ndarray, codes: int = 512, seed: int = 0) -> PatchVQ:
        """k-means (mini-batches, k-means++ start) over frames uint8 [T, 3, S, S] or patches uint8 [n, 192].

        The vocabulary is smaller than `codes` where the data has fewer distinct patches.
        """
        from sklearn.cluster import MiniBatchKMeans, kmeans_plusplus
        from threadpoolctl import threadpool_limits

        if not 2 <= codes <= MAX_CODES:
            raise InputError(f"codes is {codes}, expected 2 to {MAX_CODES}")
        patches = to_patches(data) if data.ndim == 4 else data
        distinct = np.unique(patches, axis=0)
        if len(distinct) <= codes:
            return cls(distinct, codes, seed)
        random = np.random.RandomState(seed)
        start = patches[random.permutation(len(patches))[: max(4 * codes, 8192)]].astype(np.float32)
        start = np.unique(start, axis=0) if len(start) > codes else start
        epochs = max(2, _EPOCHS_TIMES_CODES // codes)
        # One trial a centre: the usual 2 + log(codes) make 8192 codes ten times slower and the fit no better.
        # One thread: sums are in one order, so that a seed gives one codebook.
        with threadpool_limits(1):
            centres, _ = kmeans_plusplus(start, min(codes, len(start)), random_state=random, n_local_trials=1)
            means = MiniBatchKMeans(
                len(centres), init=centres, n_init=1, batch_size=2048, max_iter=epochs, random_state=random
            ).fit(patches.astype(np.float32))
        codebook = np.clip(np.rint(means.cluster_centers_), 0, 255).astype(np.uint8)
        return cls(np.unique(codebook, axis=0), codes, seed)

    def encode(self, frames: np.ndarray) -> np.ndarray:
        _check_frames(frames)
        patches = to_patches(frames)
        ids = np.empty(len(patches), np.uint16)
        for begin in range(0, len(patches), _BLOCK):
            scores = patches[begin : begin + _BLOCK].astype(np.float32) @ self._weight
            scores -= self._bias
            ids[begin : begin + _BLOCK] = scores.argmax(1)
        side = frames.shape[-1] // STRIDE
        return ids.reshape(len(frames), side, side)

    def decode(self, ids: np.ndarray) -> np.ndarray:
        T, h, w = ids.shape
        _check_ids(ids, self)
        patches = self.codebook[ids].reshape(T, h, w, 3, STRIDE, STRIDE)
        return patches.transpose(0, 3, 1, 4, 2, 5).reshape(T, 3, h * STRIDE, w * STRIDE)

    def save(self, path: str | Path) -> None:
        _write(Path(path), self.name, {"codebook": self.codebook}, {"requested": self.requested, "seed": self.seed})


def to_patches(frames: np.ndarray) -> np.ndarray:
    """uint8 [T, 3, S, S] → [T * (S / 8)², 192], each row a patch [3, 8, 8]."""
    T, C, H, W = frames.shape
    grid = frames.reshape(T, C, H // STRIDE, STRIDE, W // STRIDE, STRIDE)
    return grid.transpose(0, 2, 4, 1, 3, 5).reshape(-1, C * STRIDE * STRIDE)


class DalleVAE:
    """OpenAI's discrete VAE, the paper's tokenizer: 8192 codes, 8 pixels a token. Needs the `dall-e` package's modules.

    Runs on a GPU if there is one. Frames go through in groups of a fixed size, so that ids do not depend on batching.
    """

    name = "dalle"
    stride = STRIDE

    def __init__(self, tensors: dict[str, np.ndarray], config: dict, device: str | torch.device | None = None):
        """tensors: `encoder.*` and `decoder.*` weights; config: arguments of the two modules' constructors."""
        import torch

        self._tensors, self._config = tensors, config
        self.vocab_size = config["encoder"]["vocab_size"]
        self.digest = _digest(self.name, tensors)
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self._encoder, self._decoder = (self._build(part) for part in ("encoder", "decoder"))

    @classmethod
    def load(cls, path: str | Path, device: str | torch.device | None = None) -> DalleVAE:
        """From the file that `convert` wrote. Raises InputError if it holds something else."""
        name, tensors, config = _read(Path(path))
        if name != cls.name:
            raise InputError(f"{path} holds a {name} tokenizer, expected {cls.name}; make one with `vimpac convert-dalle`")
        return _dalle(Path(path), tensors, config, device)

    @classmethod
    def convert(cls, encoder_pkl: str | Path, decoder_pkl: str | Path, out: str | Path) -> None:
        """Writes OpenAI's two pickled modules as one safetensors file, without running code that they could carry."""
        config, tensors = {}, {}
        for part, path in (("encoder", encoder_pkl), ("decoder", decoder_pkl)):
            module = _unpickle(path, part.capitalize())
            try:
                config[part], weights = _contents(module, part)
                _empty_module(part, config[part], weights)
            except InputError as error:
                raise InputError(f"{path} is not OpenAI's {part}.pkl ({error}); download it again") from None
            tensors |= {f"{part}.{key}": value for key, value in weights.items()}
        typed(_DalleConfig, config)
        _check_weights(tensors)
        _write(Path(out), cls.name, tensors, config)

    def encode(self, frames: np.ndarray) -> np.ndarray:
        _check_frames(frames)
        side = frames.shape[-1] // STRIDE
        return self._grouped(self._encode_group, frames, (side, side), np.uint16)

    def decode(self, ids: np.ndarray) -> np.ndarray:
        _, h, w = ids.shape
        _check_ids(ids, self)
        return self._grouped(self._decode_group, ids.astype(np.int64), (3, h * STRIDE, w * STRIDE), np.uint8)

    def save(self, path: str | Path) -> None:
        _write(Path(path), self.name, self._tensors, self._config)

    def _build(self, part: str) -> torch.nn.Module:
        import torch

        weights = {k.removeprefix(f"{part}."): v for k, v in self._tensors.items() if k.startswith(f"{part}.")}
        module = _empty_module(part, self._config[part], weights)
        module.load_state_dict({name: torch.from_numpy(x) for name, x in weights.items()}, assign=True)
        return module.to(self.device).eval()

    def _grouped(self, function, inputs: np.ndarray, shape: tuple[int, ...], dtype: type) -> np.ndarray:
        import torch

        size = 16 if self.device.type == "cuda" else 1
        out = np.empty((len(inputs), *shape), dtype)
        for begin in range(0, len(inputs), size):
            group = inputs[begin : begin + size]
            padded = np.concatenate([group, np.repeat(group[-1:], size - len(group), axis=0)])
            with torch.inference_mode():
                result = function(torch.from_numpy(padded).to(self.device))
            out[begin : begin + size] = result.cpu().numpy()[: len(group)]
        return out

    def _encode_group(self, frames: torch.Tensor) -> torch.Tensor:
        pixels = frames.float() / 255
        return self._encoder((1 - 2 * _EPS) * pixels + _EPS).argmax(1)

    def _decode_group(self, ids: torch.Tensor) -> torch.Tensor:
        import torch

        one_hot = torch.nn.functional.one_hot(ids, self.vocab_size).permute(0, 3, 1, 2).float()
        pixels = (self._decoder(one_hot).float()[:, :3].sigmoid() - _EPS) / (1 - 2 * _EPS)
        return pixels.clamp(0, 1).mul(255).round()


_EPS = 0.1  # pixels are mapped to 0.1..0.9, inside the support of the VAE's logit-Laplace likelihood
_MAX_DALLE = 4096  # OpenAI's widest number, of channels, is 256


# What the configuration of a tokenizer's file must hold.


@dataclass(frozen=True)
class _PatchVQConfig:
    requested: int | None = None
    seed: int | None = None


@dataclass(frozen=True)
class _EncoderConfig:
    n_hid: int
    n_blk_per_group: int
    input_channels: int
    vocab_size: int

    def __post_init__(self):
        _check_sizes(self, {"n_hid": 4, "input_channels": 3}, {"input_channels": 3})


@dataclass(frozen=True)
class _DecoderConfig:
    n_init: int
    n_hid: int
    n_blk_per_group: int
    output_channels: int
    vocab_size: int

    def __post_init__(self):
        _check_sizes(self, {"n_hid": 4}, {})


@dataclass(frozen=True)
class _DalleConfig:
    encoder: _EncoderConfig
    decoder: _DecoderConfig

    def __post_init__(self):
        if self.encoder.vocab_size != self.decoder.vocab_size:
            raise InputError(f"the encoder has {self.encoder.vocab_size} codes, the decoder {self.decoder.vocab_size}")


def _check_sizes(config: _EncoderConfig | _DecoderConfig, least: dict[str, int], most: dict[str, int]) -> None:
    for field in fields(config):
        value, name = getattr(config, field.name), field.name
        low, high = least.get(name, 1), most.get(name, MAX_VOCABULARY if name == "vocab_size" else _MAX_DALLE)
        if not low <= value <= high:
            raise InputError(f"{name} is {value}, expected {low} to {high}")


_CONFIGS = {"patch-vq": _PatchVQConfig, "dalle": _DalleConfig}
_PARTS = {"encoder": _EncoderConfig, "decoder": _DecoderConfig}


def _empty_module(part: str, config: dict[str, int], weights: dict[str, np.ndarray]) -> torch.nn.Module:
    """OpenAI's encoder or decoder without memory for its weights, after comparing their names and shapes with it.

    Built anew, not unpickled: an old pickle's Upsample lacks attributes that today's torch reads.
    """
    import torch

    if typed(_PARTS[part], config, part).n_blk_per_group > len(weights):
        raise InputError(f"{part} has {len(weights)} tensors, which is fewer than its blocks")
    with without_memory():
        module = getattr(_dalle_module(part), part.capitalize())(**config, device=torch.device("meta"))
    expected = {name: tuple(x.shape) for name, x in module.state_dict().items()}
    found = {name: x.shape for name, x in weights.items()}
    if wrong := sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name)):
        name = wrong[0]
        raise InputError(
            f"{part}.{name} has shape {found.get(name)}, expected {expected.get(name)} ({len(wrong)} differ in all)"
        )
    return module


def _check_weights(tensors: dict[str, np.ndarray]) -> None:
    for name, x in tensors.items():
        if not name.startswith(("encoder.", "decoder.")) or x.dtype != np.float32 or not np.isfinite(x).all():
            raise InputError(f"{name} is {x.dtype} {x.shape}, expected finite float32 weights of the encoder and the decoder")


def _check_codebook(codebook: np.ndarray) -> None:
    expected = f"uint8 [codes, {3 * STRIDE * STRIDE}], 1 to {MAX_VOCABULARY} codes"
    if codebook.dtype != np.uint8 or codebook.ndim != 2 or codebook.shape[1] != 3 * STRIDE * STRIDE:
        raise InputError(f"the codebook is {codebook.dtype} {codebook.shape}, expected {expected}")
    if not 1 <= len(codebook) <= MAX_VOCABULARY:
        raise InputError(f"the codebook has {len(codebook)} codes, expected {expected}")


def _dalle_module(part: str) -> types.ModuleType:
    """`dall_e.encoder`, `.decoder` or `.utils`, past the package's __init__, which needs `requests` to download."""
    qualified = f"dall_e.{part}"
    if qualified in sys.modules:
        return sys.modules[qualified]
    spec = importlib.util.find_spec("dall_e")
    if spec is None or importlib.util.find_spec("attr") is None:
        raise InputError("the dalle tokenizer needs OpenAI's modules; run `pip install --no-deps dall-e attrs`")
    stand_in = "dall_e" not in sys.modules
    if stand_in:
        package = sys.modules["dall_e"] = types.ModuleType("dall_e")
        package.__path__ = spec.submodule_search_locations
    try:
        return importlib.import_module(qualified)
    finally:
        if stand_in:
            del sys.modules["dall_e"]


def _unpickle(path: str | Path, kind: str) -> torch.nn.Module:
    import torch

    if not Path(path).is_file():
        raise InputError(f"{path} does not exist, expected OpenAI's {kind.lower()}.pkl")
    encoder, decoder, layers = (_dalle_module(part) for part in ("encoder", "decoder", "utils"))
    own = [encoder.Encoder, encoder.EncoderBlock, decoder.Decoder, decoder.DecoderBlock, layers.Conv2d]
    nn = [getattr(torch.nn, name) for name in ("Sequential", "ReLU", "MaxPool2d", "Identity", "Upsample")]
    with torch.serialization.safe_globals([*own, *nn, torch.device, set]):
        try:
            module = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # a damaged or hostile pickle makes torch.load raise nearly anything
            first_line = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise InputError(f"{path} is not OpenAI's {kind.lower()}.pkl ({first_line}); download it again") from error
    if type(module).__name__ != kind:
        raise InputError(f"{path} holds a {type(module).__name__}, expected OpenAI's {kind.lower()}.pkl")
    return module


def _contents(module: torch.nn.Module, part: str) -> tuple[dict[str, int], dict[str, np.ndarray]]:
    """Arguments and weights of an unpickled module."""
    try:
        config = {field.name: getattr(module, field.name) for field in fields(_PARTS[part])}
        weights = {key: x.detach() for key, x in module.state_dict().items()}
        # With a stride of 0 a few bytes are terabytes.
        if not all(x.is_contiguous() and x.is_floating_point() for x in weights.values()):
            raise InputError("its weights are no plain arrays of floating-point numbers")
        return config, {key: x.float().numpy() for key, x in weights.items()}
    except InputError:
        raise
    except Exception as error:  # what a pickle calls a module may have anything for its parts
        raise InputError(f"{type(error).__name__}: {error}") from None


def _check_frames(frames: np.ndarray) -> None:
    _, C, H, W = frames.shape
    if frames.dtype != np.uint8 or C != 3 or H != W or H % STRIDE:
        raise ValueError(f"frames are {frames.dtype} {frames.shape}, expected uint8 [T, 3, S, S], S a multiple of {STRIDE}")


def _check_ids(ids: np.ndarray, tokenizer: Tokenizer) -> None:
    outside = ids[(ids < 0) | (ids >= tokenizer.vocab_size)]
    if len(outside):
        raise InputError(
            f"id {outside[0]} is outside the vocabulary of this {tokenizer.name} tokenizer, expected "
            f"0..{tokenizer.vocab_size - 1}; decode ids with the tokenizer of their store, without padding"
        )


def _digest(name: str, tensors: dict[str, np.ndarray]) -> str:
    sha = hashlib.sha256(name.encode())
    for key, value in sorted(tensors.items()):
        sha.update(f"{key} {value.dtype} {value.shape}".encode())
        sha.update(np.ascontiguousarray(value))
    return sha.hexdigest()


def _write(path: Path, name: str, tensors: dict[str, np.ndarray], config: dict) -> None:
    from safetensors.numpy import save

    metadata = {"format": _FORMAT, "version": "1", "name": name, "config": json.dumps(config)}
    data = save(tensors, metadata=metadata | UNSEALED)
    with replacing(path) as temporary:
        temporary.write_bytes(data)
        seal(temporary)


def _read(path: Path) -> tuple[str, dict[str, np.ndarray], dict]:
    """(name, tensors, config) of a tokenizer file, checked, but for DALL-E's shapes, which its modules know."""
    try:
        metadata, tensors = read_tensors(path, "numpy")
    except InputError as error:
        raise InputError(f"{path} is not a tokenizer: {error}; expected a .safetensors file or a token store") from None
    name = metadata.get("name")
    if metadata.get("format") != _FORMAT or metadata.get("version") != "1" or name not in _CONFIGS:
        raise InputError(
            f"{path} is a safetensors file but not a tokenizer of this program (format {metadata.get('format')!r}, "
            f"version {metadata.get('version')!r}, name {name!r}); fit one with `vimpac tokenize`"
        )
    with _whole(path):
        check_names(metadata, {"format", "version", "name", "config"})
        config = _parsed(metadata["config"])
        typed(_CONFIGS[name], config)
        if name == DalleVAE.name:
            _check_weights(tensors)
        else:
            check_names(tensors, {"codebook"})
            _check_codebook(tensors["codebook"])
    return name, tensors, config


def _parsed(config: str) -> dict:
    try:
        return json.loads(config)
    except (ValueError, RecursionError) as error:
        raise InputError(f"its configuration is not JSON ({error})") from None


def _dalle(path: Path, tensors: dict[str, np.ndarray], config: dict, device: str | torch.device | None = None) -> DalleVAE:
    _dalle_module("encoder")  # that it is missing is not the file's fault
    with _whole(path):
        return DalleVAE(tensors, config, device)


@contextmanager
def _whole(path: Path) -> Iterator[None]:
    """Gives an InputError of the body, a reason, the name of the file and the way out."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{path} is damaged or was not written by this program: {error}; copy it again") from None
