"""The folder of an evaluation: what is in it, which folder may be replaced, and that it appears whole or not at all.

evaluation.json   all numbers; a checksum of itself
confusion.csv     the confusion matrix: rows are the videos' classes, columns the predicted ones, in the order of the picture
confusion.png     the same drawn, where matplotlib is installed
scores.parquet    a row a video: video, label, prediction, score_CLASS…; scores.csv without pyarrow
mistakes.png      the most confident mistakes, decoded from tokens, where matplotlib and the tokenizer are at hand
"""

from __future__ import annotations

import csv
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

from vimpac.errors import InputError
from vimpac.files.atomic import LOCK, TEMPORARY, locked, replacing
from vimpac.files.checked import load_json, write_json

FORMAT = "vimpac-evaluation"
VERSION = 1
INDEX = "evaluation.json"
FILES = {INDEX, "confusion.csv", "confusion.png", "scores.parquet", "scores.csv", "mistakes.png"}
OLD = ".old"


def check_replaceable(folder: Path) -> None:
    """Raises InputError if something is in the folder's place that is not an evaluation, or holds more than one."""
    if not os.path.lexists(folder):
        return
    if not folder.is_dir():
        raise InputError(
            f"{folder} exists and is no folder, expected a new one or an earlier evaluation; choose another --output"
        )
    present = {entry.name for entry in folder.iterdir()}
    if others := sorted(present - FILES):
        raise InputError(
            f"{folder} holds {others[0]}, which no evaluation wrote, expected a new folder or an earlier evaluation; choose "
            "another --output"
        )
    if present and not _is_evaluation(folder / INDEX):
        raise InputError(
            f"{folder} holds no {INDEX} of an evaluation, expected a new folder or an earlier evaluation; choose another "
            "--output"
        )


def _is_evaluation(path: Path) -> bool:
    try:
        return load_json(path)[0].get("format") == FORMAT
    except InputError:
        return False


@contextmanager
def replacing_folder(folder: Path) -> Iterator[Path]:
    """Yields an empty folder beside `folder`, which takes its place if the body ends well.

    A folder that is replaced is there until the new one is complete. Raises InputError if it must not be replaced, or if
    another evaluation is writing it.
    """
    folder = folder.resolve()
    check_replaceable(folder)
    temporary, old = (folder.with_name(folder.name + end) for end in (TEMPORARY, OLD))
    with locked(temporary, f"{folder} is being written by another evaluation; wait for its end, or choose another --output"):
        if old.exists() and not folder.exists():  # a run was killed between the two renames below
            os.rename(old, folder)
        for leftover in temporary.iterdir():
            if leftover.name != LOCK:
                leftover.unlink()
        try:
            yield temporary
            check_replaceable(folder)
        except BaseException:
            for file in temporary.iterdir():
                if file.name != LOCK:
                    file.unlink()
            raise
        if folder.exists():
            os.rename(folder, old)
        (temporary / LOCK).unlink(missing_ok=True)
        os.rename(temporary, folder)
        _sync(folder.parent)
        shutil.rmtree(old, ignore_errors=True)


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_confusion(path: Path, confusion: np.ndarray, names: Sequence[str]) -> None:
    """A CSV with the names of the K classes in the first row and column, and videos [K, K]."""
    with replacing(path) as temporary, temporary.open("w", encoding="utf-8", errors="backslashreplace", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["class \\ predicted", *names])
        writer.writerows([name, *row.tolist()] for name, row in zip(names, confusion, strict=True))


def write_scores(
    folder: Path, videos: Sequence[str], labels: np.ndarray, scores: np.ndarray, classes: Sequence[str]
) -> tuple[str, str | None]:
    """scores.parquet, or scores.csv without pyarrow: a row a video with its name, class, prediction and K scores.

    scores: float32 [n, K], written as such; in a CSV in 9 digits, which tell every float32 apart.
    Returns the file's name and, if it is a CSV, why.
    """
    columns = ["video", "label", "prediction", *(f"score_{name}" for name in classes)]
    named = [_text(name) for name in classes]
    predictions = scores.argmax(1)
    texts = [_text(name) for name in videos], [named[i] for i in labels], [named[i] for i in predictions]
    with suppress(ImportError):
        _write_parquet(folder / "scores.parquet", [_text(name) for name in columns], texts, scores)
        return "scores.parquet", None
    path = folder / "scores.csv"
    with replacing(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([_text(name) for name in columns])
        for *row, values in zip(*texts, scores.tolist(), strict=True):
            writer.writerow([*row, *(f"{value:.9g}" for value in values)])
    return path.name, "pyarrow is missing (pip install pyarrow)"


def _write_parquet(path: Path, columns: list[str], texts: Sequence[list[str]], scores: np.ndarray) -> None:
    import pyarrow
    from pyarrow import parquet

    arrays = [pyarrow.array(text, pyarrow.string()) for text in texts]
    arrays += [pyarrow.array(np.ascontiguousarray(column)) for column in scores.T]
    with replacing(path) as temporary:
        parquet.write_table(pyarrow.Table.from_arrays(arrays, names=columns), temporary)


def _text(name: str) -> str:
    r"""The name as UTF-8 has it: bytes of a file name that are no text become \udc…"""
    return name.encode("utf-8", "backslashreplace").decode()


def write_pretraining(folder: Path, settings: Mapping[str, Any], found: Mapping[str, Any]) -> None:
    """evaluation.json of a pre-trained model. found: what `vimpac.evaluation.pretraining.evaluate` returns."""
    write_json(folder / INDEX, {"format": FORMAT, "version": VERSION, "kind": "pretraining", **settings, **found}, indent=1)
