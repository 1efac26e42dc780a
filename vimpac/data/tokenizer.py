"""Frames ↔ token ids: one protocol, two tokenizers, one safetensors file each."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import json
import sys
import types
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from vimpac.atomic import replacing
from vimpac.data.store import TOKENIZER, TokenizerInfo
from vimpac.errors import InputError

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
    if not path.is_file():
        raise InputError(f"{path} does not exist; expected a tokenizer's .safetensors file, or a token store")
    name, tensors, config = _read(path)
    return PatchVQ(tensors["codebook"], **config) if name == PatchVQ.name else DalleVAE(tensors, config)


def check_tokenizer_file(store: str | Path, expected: TokenizerInfo) -> None:
    """Compares the digest of the tokenizer file in the folder `store`; raises InputError if it is missing or not `expected`.

    Only reads: DALL-E's modules need not be there.
    """
    path = Path(store) / TOKENIZER
    if not path.is_file():
        raise InputError(f"{path} is missing, without it the ids cannot be decoded; copy the whole store again")
    name, tensors, _ = _read(path)
    digest = _digest(name, tensors)
    if digest != expected.digest:
        raise InputError(
            f"{path} is damaged or another store's: its digest is {digest[:16]}, the ids were made with "
            f"{expected.digest[:16]}; copy the whole store again"
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
        self.codebook = np.ascontiguousarray(codebook, np.uint8)
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
        return cls(tensors, config, device)

    @classmethod
    def convert(cls, encoder_pkl: str | Path, decoder_pkl: str | Path, out: str | Path) -> None:
        """Writes OpenAI's two pickled modules as one safetensors file, without running code that they could carry."""
        modules = {"encoder": _unpickle(encoder_pkl, "Encoder"), "decoder": _unpickle(decoder_pkl, "Decoder")}
        config = {part: {key: getattr(modules[part], key) for key in _ARGUMENTS[part]} for part in modules}
        tensors = {
            f"{part}.{key}": value.detach().float().numpy()
            for part, module in modules.items()
            for key, value in module.state_dict().items()
        }
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

        # Built anew, not unpickled: an old pickle's Upsample lacks attributes that today's torch reads.
        module = getattr(_dalle_module(part), part.capitalize())(**self._config[part])
        prefix = f"{part}."
        module.load_state_dict(
            {k.removeprefix(prefix): torch.from_numpy(v) for k, v in self._tensors.items() if k.startswith(prefix)}
        )
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
_ARGUMENTS = {
    "encoder": ("n_hid", "n_blk_per_group", "input_channels", "vocab_size"),
    "decoder": ("n_init", "n_hid", "n_blk_per_group", "output_channels", "vocab_size"),
}


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
    import pickle

    import torch

    if not Path(path).is_file():
        raise InputError(f"{path} does not exist, expected OpenAI's {kind.lower()}.pkl")
    encoder, decoder, layers = (_dalle_module(part) for part in ("encoder", "decoder", "utils"))
    own = [encoder.Encoder, encoder.EncoderBlock, decoder.Decoder, decoder.DecoderBlock, layers.Conv2d]
    nn = [getattr(torch.nn, name) for name in ("Sequential", "ReLU", "MaxPool2d", "Identity", "Upsample")]
    with torch.serialization.safe_globals([*own, *nn, torch.device, set]):
        try:
            module = torch.load(path, map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError, KeyError, AttributeError) as error:
            first_line = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise InputError(f"{path} is not OpenAI's {kind.lower()}.pkl ({first_line}); download it again") from error
    if type(module).__name__ != kind:
        raise InputError(f"{path} holds a {type(module).__name__}, expected OpenAI's {kind.lower()}.pkl")
    return module


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

    data = save(tensors, metadata={"format": _FORMAT, "version": "1", "name": name, "config": json.dumps(config)})
    with replacing(path) as temporary:
        temporary.write_bytes(data)


def _read(path: Path) -> tuple[str, dict[str, np.ndarray], dict]:
    """(name, tensors, config) of a tokenizer file."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118, not a dict
        config = json.loads(metadata.get("config", "{}"))
    except (SafetensorError, OSError, ValueError) as error:
        raise InputError(f"{path} is not a tokenizer: {error}; expected a .safetensors file or a token store") from error
    name = metadata.get("name")
    if metadata.get("format") != _FORMAT or metadata.get("version") != "1" or name not in (PatchVQ.name, DalleVAE.name):
        raise InputError(
            f"{path} is a safetensors file but not a tokenizer of this program (format {metadata.get('format')!r}, "
            f"version {metadata.get('version')!r}, name {name!r}); fit one with `vimpac tokenize`"
        )
    return name, tensors, config
