"""Snapshots of the released program as files: reading them without trusting them, and the model that their shapes describe.

Nothing in a snapshot is run. Its tensors are read with weights_only=True, and a folder's `args.pickle` is not opened: sizes
are taken from the tensors' names and shapes, what no shape shows is an option.
"""

from __future__ import annotations

import mmap
import pickletools
import re
import zipfile
from collections import defaultdict, deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

import torch
from torch import Tensor

from vimpac.checkpoint import check_archive
from vimpac.config import SPECIAL_IDS, ModelConfig
from vimpac.errors import FIXABLE, InputError
from vimpac.files.checked import check_regular
from vimpac.layouts import parse_layout
from vimpac.model import ClassificationModel, PretrainModel
from vimpac.model.state import misfit
from vimpac.released import from_authors, without_prefix

SUFFIXES = (".pt", ".pth", ".bin", ".ckpt")
KEYS = ("model", "state_dict", "model_state_dict", "module")
"""Under which a file may hold its state dict."""
LAYOUTS = {(1, 2): "T,H|W", (1, 1, 1): "T,H,W", (1, 1): "T,HxW", (1,): "TxHxW"}
"""Table 13's layouts by the number of axes of each block, which is what a snapshot shows of them."""

_EMBEDDING = "backbone.embedding.weight"
_POSITIONS = "backbone.positional_embedding"
_LAYER = "backbone.transformer.resblocks"
_OF_IDS = (_EMBEDDING, "mlm_head.bias", "mlm_head.decoder.weight", "mlm_head.decoder.bias")  # a row for each id
_ZIP = b"PK\3\4"
_OLD = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # the number that torch.save began every file with before PyTorch 1.6
_PICKLE_BYTES = 16 << 20  # limit for names and shapes: those of Large-Half take 0.2 MB
_TOO_MUCH = f"its names and shapes take more than {_PICKLE_BYTES >> 20} MB"


@dataclass(frozen=True)
class Imported:
    """A snapshot as a model in evaluation mode, and how many codes its tables had before any were cut."""

    file: Path
    model: PretrainModel | ClassificationModel
    codes: int


def import_snapshot(path: Path, heads: int | None = None, layout: str | None = None, vocab_size: int | None = None) -> Imported:
    """Reads a snapshot, a folder or a file, as a model.

    heads, layout: None = as in the presets and in Table 13. vocab_size: keep the first codes and the special ids only.
    Raises InputError with the file, the tensor, what was expected and the way out.
    """
    file = find_snapshot(path)
    weights = read_snapshot(file)
    try:
        ids, _ = _matrix(weights, _EMBEDDING)
        weights = _cut(weights, ids, vocab_size)
        config = infer_config(weights, heads, layout)
        model = from_authors(weights, config)
    except InputError as error:
        raise InputError(
            f"{file} is no whole snapshot of the released program, or not of this shape: "
            f"{str(error).removesuffix(error.explanation).strip()}; copy it again, or check --heads and --layout",
            error.explanation,
        ) from None
    return Imported(file, model, ids - SPECIAL_IDS)


def find_snapshot(path: Path) -> Path:
    """The file itself; of a folder its only file with weights."""
    if not path.is_dir():
        return path
    found = sorted(x for x in path.iterdir() if x.suffix in SUFFIXES and not x.name.startswith("."))
    if len(found) != 1:
        names = f"{len(found)} of them: {', '.join(x.name for x in found[:5])}" if found else "none"
        raise InputError(
            f"{path} is a folder, expected one file that ends in {', '.join(SUFFIXES)}, it holds {names}; name the file "
            f"itself, such as {path / (found[0].name if found else 'classifier.pt')}"
        )
    return found[0]


def read_snapshot(file: Path) -> dict[str, Tensor]:
    """The state dict of a file of torch.save, of its zip format or the older one, without "module." before its names.

    Whether it has the names and shapes of a model is not checked here.
    """
    try:
        check_regular(file)
    except InputError as error:
        raise InputError(
            f"cannot read snapshot {file}: {error}; expected a file of torch.save, such as classifier.pt"
        ) from None
    try:
        return without_prefix(_state_dict(_load(file)))
    except InputError as error:
        raise InputError(f"cannot read snapshot {file}: {error}") from None


def _load(file: Path) -> Any:
    with open(file, "rb") as opened:
        begin = opened.read(len(_OLD))
        if not begin.startswith(_ZIP) and begin != _OLD:
            raise InputError("it was not written by torch.save, or its start is damaged; name the file of weights, or copy it")
        try:
            if begin.startswith(_ZIP):
                check_archive(file)
                _check_pickle_size(file)
                return torch.load(file, map_location="cpu", weights_only=True, mmap=True)  # no size in it is allocated
            with mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as whole:
                stream = cast(IO[bytes], whole)  # as far as it is used here; it allocates no more than it has to read
                _check_claims(stream, len(whole))
                stream.seek(0)
                return torch.load(stream, map_location="cpu", weights_only=True)
        except Exception as error:  # a damaged file makes zipfile, pickletools and torch.load raise nearly anything
            if isinstance(error, OSError) and error.errno in FIXABLE:
                raise
            if found := re.search(r"GLOBAL ([\w.]+)", str(error)):
                raise InputError(
                    f"it holds {found[1][:80]}, which is neither a tensor nor a plain value; nothing of it was run. Save its "
                    "state dict alone"
                ) from None
            text = str(error).rpartition("WeightsUnpickler error: ")[2]  # what stands before it recommends to run the file
            kind = "" if isinstance(error, InputError) else f"{type(error).__name__}: "
            reason = " ".join(f"{kind}{text}".split())[:200]
            raise InputError(
                f"it was cut short, damaged or forged, or holds more than tensors ({reason}); copy it again, or save its state "
                "dict alone"
            ) from None


def _check_pickle_size(file: Path) -> None:
    with zipfile.ZipFile(file) as archive:
        size = max((entry.file_size for entry in archive.infolist() if entry.filename.endswith("data.pkl")), default=0)
    if size > _PICKLE_BYTES:
        raise InputError(_TOO_MUCH)


def _check_claims(stream: IO[bytes], size: int) -> None:
    """Compares what a file of the older format claims with its size: torch.load allocates by it before it reads.

    The format: five pickles (a number, a version, the system, the object, the keys of the storages in the file), the storages.
    A storage is ('storage', type, key, location, elements, None), and offset, sizes and strides of a tensor follow it. Raises
    InputError unless all of them are written as torch.save writes them, and lie in the file.
    """
    for _ in range(3):
        deque(_operations(stream), maxlen=0)
    claimed: dict[str, int] = {}
    before: deque[tuple[str, Any]] = deque(maxlen=5)
    operations = _operations(stream)
    for operation in operations:
        if operation[0] == "BINPERSID":
            (kind, key), (location, _), (number, elements), *end = before
            plain = kind == "BINUNICODE" and location in _TEXTS and number in _INTEGERS
            if not plain or [name for name, _ in end] != ["NONE", "TUPLE"] or claimed.setdefault(key, elements) != elements:
                raise InputError("it holds objects other than tensors, or a tensor that torch.save did not write")
            sizes = (_integer(*next(operations)), _integers(operations), _integers(operations))
            _check_extent(*sizes, elements)
        before.append(operation)
    stored = {x for name, x in _operations(stream) if name == "BINUNICODE"}
    if absent := claimed.keys() - stored:
        raise InputError(f"the values of storage {min(absent)[:40]} are missing")
    if min(claimed.values(), default=0) < 0 or sum(claimed.values()) > size:
        raise InputError(f"it claims {sum(claimed.values())} values and has {size} bytes")


_INTEGERS = ("BININT", "BININT1", "BININT2", "LONG1")
_TEXTS = ("BINUNICODE", "BINGET", "LONG_BINGET")


def _operations(stream: IO[bytes]) -> Iterator[tuple[str, Any]]:
    """The operations of a pickle and their arguments, without running them, and without those that only keep a value for later.

    That of a storage is left in: a tensor of another shape could be made of what was kept.
    """
    begin, last = stream.tell(), ""
    for operation, argument, _ in pickletools.genops(stream):
        if stream.tell() - begin > _PICKLE_BYTES:
            raise InputError(_TOO_MUCH)
        if not operation.name.endswith("BINPUT") or last == "BINPERSID":
            yield operation.name, argument
        last = operation.name


def _integer(name: str, value: Any) -> int:
    if name not in _INTEGERS:
        raise InputError(f"a size is not written as by torch.save, but with {name}")
    return value


def _integers(operations: Iterator[tuple[str, Any]]) -> list[int]:
    """The next tuple of integers."""
    values: list[int] = []
    name, value = next(operations)
    if name == "EMPTY_TUPLE":
        return values
    if marked := name == "MARK":
        name, value = next(operations)
    while not name.startswith("TUPLE"):
        values.append(_integer(name, value))
        name, value = next(operations)
    if name != ("TUPLE" if marked else f"TUPLE{len(values)}"):
        raise InputError(f"{len(values)} sizes are not written as by torch.save, but with {name}")
    return values


def _check_extent(offset: int, sizes: list[int], strides: list[int], elements: int) -> None:
    if min([offset, *sizes, *strides]) < 0:
        raise InputError(f"a tensor of sizes {sizes[:8]} and strides {strides[:8]} is impossible")
    last = offset + sum((size - 1) * stride for size, stride in zip(sizes, strides, strict=True))
    if 0 not in sizes and last >= elements:
        raise InputError(f"a tensor of sizes {sizes[:8]} and strides {strides[:8]} has more values than its {elements}")


def _state_dict(loaded: Any) -> Mapping[str, Tensor]:
    """The mapping that holds the embedding: what was loaded, or what it has under one of KEYS."""
    if not isinstance(loaded, Mapping):
        raise InputError(f"it holds a {type(loaded).__name__}, expected tensors by their names; save its state dict")
    places = {"": loaded} | {key: loaded[key] for key in KEYS if isinstance(loaded.get(key), Mapping)}
    found = {key: x for key, x in places.items() if _EMBEDDING in x or f"module.{_EMBEDDING}" in x}
    if len(found) != 1:
        names = f"in several: {', '.join(map(repr, found))}" if found else f"in none; it holds {_shown(loaded)}"
        raise InputError(
            f"expected {_EMBEDDING} among its tensors, or under one of the keys {', '.join(KEYS)}, found it {names}. Name a "
            "snapshot of the released program, or save the state dict alone"
        )
    return next(iter(found.values()))


def _shown(loaded: Mapping) -> str:
    return ", ".join(str(name)[:60] for name in list(loaded)[:5]) or "nothing"


def _cut(weights: dict[str, Tensor], ids: int, vocab_size: int | None) -> dict[str, Tensor]:
    """The tables of ids with the first `vocab_size` codes only, and the special ids, which are the last rows."""
    codes = ids - SPECIAL_IDS
    if codes < 1:
        raise InputError(f"{_EMBEDDING} has {ids} rows, expected one for each code and {SPECIAL_IDS} special ids")
    if vocab_size is None or vocab_size == codes:
        return weights
    if not 1 <= vocab_size < codes:
        raise InputError(f"{_EMBEDDING} has {codes} codes, --vocab-size is {vocab_size}, expected 1 to {codes}")
    tables = {name: weights[name] for name in _OF_IDS if name in weights}
    for name, x in tables.items():
        if reason := misfit(x, torch.float32, (ids, *x.shape[1:]) if isinstance(x, Tensor) else None):
            raise InputError(f"{name} {reason}")
    return weights | {name: torch.cat([x[:vocab_size], x[codes:]]) for name, x in tables.items()}


def infer_config(weights: Mapping[str, Tensor], heads: int | None = None, layout: str | None = None) -> ModelConfig:
    """The model whose tensors have these released names and shapes. Raises InputError where they contradict each other."""
    ids, width = _matrix(weights, _EMBEDDING)
    layers, axes = _layers(weights)
    first = f"{_LAYER}.0.attention_blocks.0.attentions"
    key_width = sum(_matrix(weights, f"{first}.{axis}.attention.query.weight", width)[0] for axis in range(axes[0]))
    hidden = _matrix(weights, f"{_LAYER}.0.mlp.c_fc.weight", width)[0]
    heads = _usual_heads(width, key_width) if heads is None else heads
    layout = _layout(axes, layout, heads)
    names = ("temporal", "height", "width")
    grid = tuple(_matrix(weights, f"{_POSITIONS}.{name}_pos_embedding", width)[0] for name in names)
    norms = [name for name in ("ln_pre", "ln_post") if f"backbone.{name}.weight" in weights]
    if len(norms) != 1:
        raise InputError(
            f"it holds {' and '.join(norms) or 'neither'} of backbone.ln_pre.weight (post-norm) and backbone.ln_post.weight "
            "(pre-norm), expected one"
        )
    head_layers, head_width, head_out = _head_sizes(weights)
    return ModelConfig(
        layers=layers,
        width=width,
        heads=heads,
        layout=layout,
        grid=(grid[0], grid[1], grid[2]),
        norm="post" if norms == ["ln_pre"] else "pre",
        attention_width=None if key_width == width else key_width,
        mlp_width=None if hidden == 4 * width else hidden,
        vocab_size=ids - SPECIAL_IDS,
        head_layers=head_layers,
        head_width=head_width,
        head_out=head_out,
    )


def _matrix(weights: Mapping[str, Tensor], name: str, columns: int | None = None) -> tuple[int, int]:
    """Rows and columns of a matrix. Raises InputError where it is missing, or has another number of columns."""
    if name not in weights:
        raise InputError(f"{name} is missing")
    x = weights[name]
    if reason := misfit(x, torch.float32, None):
        raise InputError(f"{name} {reason}")
    if x.ndim != 2 or 0 in x.shape or (columns is not None and x.shape[1] != columns):
        raise InputError(f"{name} has the shape {tuple(x.shape)}, expected (rows, {columns or 'columns'})")
    return x.shape[0], x.shape[1]


def _layers(weights: Mapping[str, Tensor]) -> tuple[int, tuple[int, ...]]:
    """The number of layers, and that of the axes of each attention block in the first. `from_authors` compares the others."""
    pattern = re.compile(rf"{re.escape(_LAYER)}\.(\d{{1,4}})\.attention_blocks\.(\d{{1,4}})\.attentions\.(\d{{1,4}})\.")
    layers: set[int] = set()
    blocks: dict[int, set[int]] = defaultdict(set)
    for name in weights:
        if found := pattern.match(name):
            layer, block, axis = map(int, found.groups())
            layers.add(layer)
            if layer == 0:
                blocks[block].add(axis)
    axes = tuple(len(blocks.get(i, ())) for i in range(len(blocks))) or (0,)
    if 0 in axes:
        raise InputError(f"{_LAYER}.0.attention_blocks.{axes.index(0)}.attentions.0.attention.query.weight is missing")
    return len(layers), axes


def _counted(axes: tuple[int, ...]) -> str:
    return f"{', '.join(map(str, axes))} axes"


def _usual_heads(width: int, key_width: int) -> int:
    """Heads of the presets: 64 wide, 32 where attention has half the model's width."""
    head_width = {width: 64, width // 2: 32}.get(key_width)
    if head_width is None or key_width % head_width:
        raise InputError(
            f"attention is {key_width} wide in a model {width} wide, which no preset is, and no shape shows the number of "
            "heads: give --heads"
        )
    return key_width // head_width


def _layout(axes: tuple[int, ...], layout: str | None, heads: int) -> str:
    """The layout given, or that of Table 13 with as many axes in each block."""
    layout = layout or LAYOUTS.get(axes)
    if layout is None:
        raise InputError(
            f"its layers have attention blocks of {_counted(axes)}, which no layout of Table 13 has "
            f"({'  '.join(LAYOUTS.values())}), and no name shows which axes: give --layout"
        )
    if (given := tuple(map(len, parse_layout(layout, heads)))) != axes:
        raise InputError(f"--layout {layout[:80]} has blocks of {_counted(given)}, its layers have blocks of {_counted(axes)}")
    return layout


def _head_sizes(weights: Mapping[str, Tensor]) -> tuple[int, int, int]:
    """Layers, width and outputs of the contrastive head; the usual ones for a fine-tuned snapshot, which has no such head."""
    usual = ModelConfig.head_layers, ModelConfig.head_width, ModelConfig.head_out
    if "cls_fc.bias" in weights:
        return usual
    layers = sum(re.fullmatch(r"cls_head\.mlp\.linear_\d{1,4}\.weight", name) is not None for name in weights)
    if not layers:
        raise InputError("cls_head.mlp.linear_0.weight (pre-training) and cls_fc.bias (fine-tuning) are missing, expected one")
    out, hidden = _matrix(weights, f"cls_head.mlp.linear_{layers - 1}.weight")
    return layers, hidden if layers > 1 else usual[1], out
