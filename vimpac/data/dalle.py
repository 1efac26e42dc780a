"""OpenAI's discrete VAE (DALL-E), the paper's tokenizer, and the conversion of its pickles without running code from them."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import types
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from vimpac.data.format import MAX_VOCABULARY
from vimpac.data.tokenizer_file import STRIDE, Tensors, check_frames, check_ids, damage_named, digest_of, write_tokenizer
from vimpac.errors import InputError
from vimpac.files.checked import typed
from vimpac.meta import without_memory

if TYPE_CHECKING:
    import torch

_EPS = 0.1  # pixels are mapped to 0.1..0.9, inside the support of the VAE's logit-Laplace likelihood
_MAX_SIZE = 4096  # OpenAI's largest size, of channels, is 256


class DalleVAE:
    """OpenAI's discrete VAE, the paper's tokenizer: 8192 codes, 8 pixels per token. Needs the modules of the `dall-e` package.

    Runs on a GPU if there is one. Frames are processed in groups of a fixed size, so ids do not depend on batching.
    """

    name = "dalle"
    stride = STRIDE

    def __init__(self, tensors: Tensors, config: dict, device: str | torch.device | None = None):
        """tensors: `encoder.*` and `decoder.*` weights; config: arguments of the two modules' constructors."""
        import torch

        self._tensors, self._config = tensors, config
        self.vocab_size = config["encoder"]["vocab_size"]
        self.digest = digest_of(self.name, tensors)
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self._encoder, self._decoder = (self._build(part) for part in ("encoder", "decoder"))

    @classmethod
    def convert(cls, encoder_pkl: str | Path, decoder_pkl: str | Path, out: str | Path) -> None:
        """Writes OpenAI's two pickled modules as one safetensors file, without running code from the pickles."""
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
        write_tokenizer(Path(out), cls.name, tensors, config)

    def encode(self, frames: np.ndarray) -> np.ndarray:
        check_frames(frames)
        side = frames.shape[-1] // STRIDE
        return self._grouped(self._encode_group, frames, (side, side), np.uint16)

    def decode(self, ids: np.ndarray) -> np.ndarray:
        _, h, w = ids.shape
        check_ids(ids, self)
        return self._grouped(self._decode_group, ids.astype(np.int64), (3, h * STRIDE, w * STRIDE), np.uint8)

    def save(self, path: str | Path) -> None:
        write_tokenizer(Path(path), self.name, self._tensors, self._config)

    @classmethod
    def from_file(cls, path: Path, tensors: Tensors, config: dict) -> DalleVAE:
        """The tokenizer that the file at `path` holds. Raises InputError if its weights do not fit OpenAI's modules."""
        openai_module("encoder")  # raises first if it is not installed, which is not the file's fault
        with damage_named(path):
            return cls(tensors, config)

    @staticmethod
    def check(tensors: Tensors, config: dict) -> None:
        """Raises InputError unless they can be a DALL-E's. The shapes of the weights are compared by `from_file`."""
        typed(_DalleConfig, config)
        _check_weights(tensors)

    @staticmethod
    def codes_in(tensors: Tensors, config: dict) -> int:
        """The vocabulary size that a checked file gives."""
        return config["encoder"]["vocab_size"]

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


# The configuration in the file.


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
        low, high = least.get(name, 1), most.get(name, MAX_VOCABULARY if name == "vocab_size" else _MAX_SIZE)
        if not low <= value <= high:
            raise InputError(f"{name} is {value}, expected {low} to {high}")


_PARTS = {"encoder": _EncoderConfig, "decoder": _DecoderConfig}


def _empty_module(part: str, config: dict[str, int], weights: Tensors) -> torch.nn.Module:
    """OpenAI's encoder or decoder on the meta device. Raises InputError if the weights' names or shapes do not fit it.

    The module is constructed, not unpickled: an old pickle's Upsample lacks attributes that today's torch reads.
    """
    import torch

    if typed(_PARTS[part], config, part).n_blk_per_group > len(weights):
        raise InputError(f"{part} has {len(weights)} tensors, which is fewer than its blocks")
    with without_memory():
        module = getattr(openai_module(part), part.capitalize())(**config, device=torch.device("meta"))
    expected = {name: tuple(x.shape) for name, x in module.state_dict().items()}
    found = {name: x.shape for name, x in weights.items()}
    if wrong := sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name)):
        name = wrong[0]
        raise InputError(
            f"{part}.{name} has shape {found.get(name)}, expected {expected.get(name)} ({len(wrong)} differ in all)"
        )
    return module


def _check_weights(tensors: Tensors) -> None:
    for name, x in tensors.items():
        if not name.startswith(("encoder.", "decoder.")) or x.dtype != np.float32 or not np.isfinite(x).all():
            raise InputError(f"{name} is {x.dtype} {x.shape}, expected finite float32 weights of the encoder and the decoder")


def openai_module(part: str) -> types.ModuleType:
    """`dall_e.encoder`, `.decoder` or `.utils`, without running the package's __init__, which imports `requests`."""
    qualified = f"dall_e.{part}"
    if qualified in sys.modules:
        return sys.modules[qualified]
    spec = importlib.util.find_spec("dall_e")
    if spec is None or importlib.util.find_spec("attr") is None:
        raise InputError("the dalle tokenizer needs OpenAI's modules; run `pip install --no-deps dall-e attrs`")
    stand_in = "dall_e" not in sys.modules
    if stand_in:
        sys.modules["dall_e"] = importlib.util.module_from_spec(spec)
    try:
        return importlib.import_module(qualified)
    finally:
        if stand_in:
            del sys.modules["dall_e"]


def _unpickle(path: str | Path, kind: str) -> torch.nn.Module:
    import torch

    if not Path(path).is_file():
        raise InputError(f"{path} does not exist, expected OpenAI's {kind.lower()}.pkl")
    encoder, decoder, layers = (openai_module(part) for part in ("encoder", "decoder", "utils"))
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


def _contents(module: torch.nn.Module, part: str) -> tuple[dict[str, int], Tensors]:
    """Arguments and weights of an unpickled module."""
    try:
        config = {field.name: getattr(module, field.name) for field in fields(_PARTS[part])}
        weights = {key: x.detach() for key, x in module.state_dict().items()}
        # With a stride of 0, a few bytes in the file would become terabytes.
        if not all(x.is_contiguous() and x.is_floating_point() for x in weights.values()):
            raise InputError("its weights are not plain arrays of floating-point numbers")
        return config, {key: x.float().numpy() for key, x in weights.items()}
    except InputError:
        raise
    except Exception as error:  # the attributes of an unpickled module may be anything
        raise InputError(f"{type(error).__name__}: {error}") from None
