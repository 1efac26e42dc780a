"""Checkpoints: one file per saved step with everything needed to continue a run, written atomically.

A file holds {format, version, step, config, tokenizer, world_size, model, optimizer, scaler}: tensors and plain values, read
back with weights_only=True. It is torch.save's zip archive; the archive's comment is a CRC-32 of everything before it. Samplers
and random generators have no state of their own: samples, masks and dropout are functions of the run's seed and of the number
of the sample or micro-step. So a checkpoint fits any number of processes.
"""

from __future__ import annotations

import math
import os
import re
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

import torch
from torch import nn

from vimpac.config import ModelConfig
from vimpac.data.format import TokenizerInfo
from vimpac.data.store import TokenStore
from vimpac.errors import InputError
from vimpac.files.atomic import TEMPORARY, replacing
from vimpac.files.checked import check_regular, typed
from vimpac.model import PretrainModel
from vimpac.model.state import check_state, empty_model, misfit

FORMAT = "vimpac-checkpoint"
VERSION = 2
FOLDER = "checkpoints"
PARTS = {"step": int, "config": dict, "tokenizer": dict, "model": Mapping, "optimizer": dict, "scaler": dict}

_COMMENT = b"vimpac crc32 "
_DIGITS = 8


def save_checkpoint(run: Path, state: dict, keep: int) -> Path:
    """Write RUN/checkpoints/step-########.pt and remove all but the newest `keep`. Raises OSError, e.g. for a full disk."""
    folder = run / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"step-{state['step']:08d}.pt"
    with replacing(path) as temporary, temporary.open("w+b") as file:
        try:
            torch.save({"format": FORMAT, "version": VERSION, **state}, file)
        except RuntimeError as error:  # after a failed write torch closes its archive, and reports only that the close failed
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise
        _seal(file)
    for old in list_checkpoints(run)[:-keep]:
        old.unlink()
    for leftover in folder.glob("*" + TEMPORARY):  # of a run that was killed while writing
        leftover.unlink()
    return path


def list_checkpoints(run: Path) -> list[Path]:
    """Finished checkpoints of a run, oldest first."""
    return sorted(p for p in (run / FOLDER).glob("step-*.pt") if re.fullmatch(r"step-\d{8,}\.pt", p.name))


def load_checkpoint(path: Path) -> dict:
    """Read a checkpoint onto the CPU. Raises InputError for a file that is missing, truncated, damaged or not a checkpoint."""
    try:
        check_regular(path)
    except InputError as error:
        raise InputError(f"cannot read checkpoint {path}: {error}; expected RUN/{FOLDER}/step-########.pt") from None
    try:
        check_archive(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file makes zipfile and torch.load raise nearly anything
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise InputError(
            f"cannot read checkpoint {path} ({reason}): it is truncated, damaged or not a checkpoint; copy it again, or delete "
            "it to resume from the previous one"
        ) from None
    kind = (state.get("format"), state.get("version")) if isinstance(state, dict) else (None, None)
    if kind != (FORMAT, VERSION):
        raise InputError(
            f"{path} has format {str(kind[0])[:80]!r} version {str(kind[1])[:80]}, expected {FORMAT!r} version {VERSION}; "
            "use the program that wrote it"
        )
    if missing := sorted(PARTS.keys() - state.keys()):
        raise InputError(f"{path} lacks {', '.join(missing)}, so a run cannot resume from it: delete it, or start a new run")
    wrong = [name for name, kind in PARTS.items() if not isinstance(state[name], kind)]
    if wrong or not 0 <= state["step"] < 2**63:
        name = wrong[0] if wrong else "step"
        found = repr(state[name])[:60]
        raise InputError(f"{path} holds {found} as its {name}, so a run cannot resume from it: delete it, or start a new run")
    return state


def _seal(file: BinaryIO) -> None:
    """Appends the checksum of the archive that torch.save has just written to `file`, as the archive's comment."""
    size = file.tell()
    file.seek(size - 2)  # an archive ends with the length of its comment, 0
    file.write((len(_COMMENT) + _DIGITS).to_bytes(2, "little") + _COMMENT)
    file.seek(0)
    file.write(b"%08x" % _crc(file, size + len(_COMMENT)))
    file.flush()


def _crc(file: BinaryIO, size: int) -> int:
    """CRC-32 of the next `size` bytes of the file."""
    crc = 0
    while chunk := file.read(min(size, 1 << 22)):
        crc = zlib.crc32(chunk, crc)
        size -= len(chunk)
    return crc


def check_archive(path: Path) -> None:
    """Checks what torch.load does not. Raises BadZipFile.

    That is checksums, and entries marked as folders: torch.load would leave their tensors uninitialised.
    """
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        sealed = _is_sealed(file, size)
        with zipfile.ZipFile(file) as archive:
            for entry in archive.infolist():
                if entry.is_dir() or entry.external_attr & 0x10 or entry.compress_type != zipfile.ZIP_STORED:
                    raise zipfile.BadZipFile(f"{entry.filename} is not a plain file in the archive")
                if entry.file_size > size:
                    raise zipfile.BadZipFile(f"{entry.filename} claims {entry.file_size} bytes, the whole file has {size}")
            if not sealed and (bad := archive.testzip()):
                raise zipfile.BadZipFile(f"checksum of {bad} is wrong")


def _is_sealed(file: BinaryIO, size: int) -> bool:
    """Checks the file's checksum. Returns False for an archive without a comment, as earlier versions wrote."""
    file.seek(max(0, size - 64))
    end = file.read()
    if sealed := re.search(rb"%b([0-9a-f]{%d})\Z" % (_COMMENT, _DIGITS), end):
        file.seek(0)
        if _crc(file, size - _DIGITS) != int(sealed[1], 16):
            raise zipfile.BadZipFile("checksum of the file is wrong")
    elif end[-22:-18] != b"PK\5\6" or end[-2:] != b"\0\0":
        raise zipfile.BadZipFile("checksum of the file is missing")
    return sealed is not None


def check_tokenizer(saved: dict, store: TokenStore, where: Path) -> None:
    """Raises InputError unless a run was trained on ids of the store's tokenizer."""
    try:
        typed(TokenizerInfo, saved, "tokenizer")
    except InputError as error:
        raise InputError(f"{where} is damaged or was not written by this program: {error}; copy it again") from None
    if saved["digest"] != store.tokenizer.digest:
        raise InputError(
            f"{where} was trained on ids of tokenizer {saved['name']} {saved['digest'][:12]}…, store {store.folder} holds ids "
            f"of {store.tokenizer.name} {store.tokenizer.digest[:12]}…: tokenize the videos with the first store's tokenizer "
            "(`vimpac tokenize --tokenizer-path STORE`)"
        )


def check_weights(checkpoint: dict) -> nn.Module:
    """The model that a checkpoint describes, without its weights. Raises InputError with the reason if they do not fit it."""
    config = typed(ModelConfig, checkpoint["config"].get("model"), "model")
    model = empty_model(PretrainModel, config, len(checkpoint["model"]))
    check_state(checkpoint["model"], model.state_dict())
    return model


def check_moments(saved: dict, groups: list[list[str]], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raises InputError with the reason unless a saved optimizer state is AdamW's for these parameters.

    load_state_dict compares only the number of parameters; with other shapes an update would read past a tensor's end.
    groups: the parameters' names, group by group.
    """
    try:
        names = [list(group["param_names"]) for group in saved["param_groups"]]
        ids = [i for group in saved["param_groups"] for i in group["params"]]
        states = dict(saved["state"])
        if names != groups or len(ids) != sum(map(len, groups)) or not set(states) <= set(ids):
            raise InputError("its optimizer's moments are not of this model's parameters")
        name_of = dict(zip(ids, (name for group in groups for name in group), strict=True))
        reasons = {name_of[i]: _misfit(moments, shapes[name_of[i]]) for i, moments in states.items()}
        wrong = [f"{name} {reason}" for name, reason in reasons.items() if reason]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"its optimizer's state is not AdamW's ({type(error).__name__}: {error})") from None
    if wrong:
        raise InputError(f"its optimizer's state of {'; '.join(wrong[:5])} ({len(wrong)} in all)")


def _misfit(moments: dict, shape: tuple[int, ...]) -> str | None:
    if moments.keys() != {"step", "exp_avg", "exp_avg_sq"}:
        return f"holds {sorted(map(str, moments))[:5]}"
    sizes = {"step": (), "exp_avg": shape, "exp_avg_sq": shape}
    reasons = ((name, misfit(moments[name], torch.float32, size)) for name, size in sizes.items())
    return next((f"{name} {reason}" for name, reason in reasons if reason), None)


def check_scaler(saved: dict, own: dict) -> None:
    """Raises InputError with the reason unless a saved gradient scaler's state has the fields of `own`, as positive numbers."""
    numbers = all(type(x) in (int, float) and 0 <= x < math.inf for x in saved.values())
    if own and (saved.keys() != own.keys() or not numbers or saved["scale"] == 0):
        raise InputError(f"its gradient scaler's state is {str(saved)[:120]}")
