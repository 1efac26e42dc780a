"""The label files that data sets publish, and those of other programs. One reader a format: file or folder → Annotations."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from vimpac.data.label_files import (
    Example,
    columns_of,
    entries_of,
    head_of,
    json_of,
    lines_of,
    natural,
    place,
    read_class_list,
    rows_of,
    shown,
    split_named,
    split_of_file,
)
from vimpac.data.video import EXTENSIONS, find_videos, name_of
from vimpac.errors import InputError

UCF101_LIST = re.compile(r"(train|test)list0?([1-3])\.txt")
HMDB51_LIST = re.compile(r"(.+)_test_split([1-3])\.txt")
HMDB51_SPLITS = {"0": "unused", "1": "train", "2": "test"}
NUMBERED = re.compile(r"split_?0?([1-3])(?![0-9])")
SPLIT_NAMES = "train, validation or test"


class Options(NamedTuple):
    """What the reader of a format may need. None: as the format has it."""

    column: str | None = None
    split_number: int | None = None
    classes: Path | None = None


@dataclass
class Annotations:
    """What a reader found. classes: in the published order, None if the files have no list of classes."""

    examples: list[Example] = field(default_factory=list)
    classes: tuple[str, ...] | None = None
    class_file: Path | None = None
    split_number: int | None = None
    notes: list[str] = field(default_factory=list)


def read_csv(path: Path, options: Options) -> Annotations:
    """`video,label[,split]`, with any other columns: labels.csv of `vimpac synthesize` has motion, shape and texture."""
    file = path / "labels.csv" if path.is_dir() else path
    column = options.column or _only_label_column(file)
    found = Annotations(class_file=options.classes, classes=options.classes and read_class_list(options.classes))
    for line, row in rows_of(file, ("video", column)):
        split = split_named(row["split"]) if "split" in row else None
        if "split" in row and not split:
            raise InputError(f"{place(file, line)}: the split is {shown(row['split'])}, expected {SPLIT_NAMES}")
        if not row["video"] or not row[column]:
            empty = "video" if not row["video"] else column
            raise InputError(
                f"{place(file, line)}: the column {empty} is empty, expected a value; fill it in or remove the line"
            )
        if found.classes is not None and row[column] not in found.classes:
            raise _outside(place(file, line), row[column], found)
        found.examples.append(Example(row["video"], row[column], split, file, line))
    return found


def _only_label_column(file: Path) -> str:
    columns = columns_of(file)
    if "label" in columns or "video" not in columns:
        return "label"
    others = [name for name in columns if name not in ("video", "split")]
    if len(others) > 1:
        raise InputError(f"{file}, line 1: has no column label; choose one of {', '.join(others)} with --label-column")
    return others[0] if others else "label"


def read_folder(path: Path, options: Options) -> Annotations:
    """A folder of videos whose subfolders are the classes: CLASS/x.mp4, or SPLIT/CLASS/x.mp4."""
    found = Annotations(class_file=path)
    contents = find_videos(path)
    if contents.unlisted:
        name, reason = next(iter(contents.unlisted.items()))
        raise InputError(f"{path / name} cannot be listed: {reason}; allow it, or labels would be missing")
    folders = sorted(name_of(entry, path) for entry in path.iterdir() if entry.is_dir())
    by_split = bool(folders) and all(map(split_named, folders))
    if by_split:
        empty = [folder for folder in folders if not any(name.startswith(f"{folder}/") for name in contents.names)]
        if empty:
            raise InputError(
                f"{path / empty[0]} holds no video, expected examples of this split; add them or remove the folder"
            )
        folders = sorted(
            {name_of(entry, path / folder) for folder in folders for entry in (path / folder).iterdir() if entry.is_dir()}
        )
    found.classes = tuple(sorted(folders, key=natural))
    for name in contents.names:
        parts = name.split("/")
        if len(parts) < 2 + by_split:
            expected = "SPLIT/CLASS/VIDEO" if by_split else "CLASS/VIDEO"
            raise InputError(f"{path}: the video {shown(name)} lies outside the folders of the classes; expected {expected}")
        split = split_named(parts[0]) if by_split else None
        found.examples.append(Example(name, parts[int(by_split)], split, path / name, 1))
    return found


def read_list(path: Path, options: Options) -> Annotations:
    """`path label` on each line, the label a number from 0: lists of mmaction2, CSV of V-JEPA."""
    found = Annotations(class_file=options.classes, classes=options.classes and read_class_list(options.classes))
    files = [path]
    if path.is_dir():
        files = [file for file in sorted(path.iterdir()) if file.is_file() and split_of_file(file) and is_list(file)]
        numbers = {file: int(match[1]) for file in files if (match := NUMBERED.search(file.name))}
        if numbers:
            found.split_number = options.split_number or 1
            files = [file for file in files if numbers.get(file) == found.split_number]
        if not files:
            has = (
                f"it has those of split {_listed(numbers.values())}" if numbers else "expected train, val or test in the names"
            )
            raise InputError(f"{path} has no list of split {options.split_number or 1}; {has}")
    for file in files:
        before = len(found.examples)
        for line, text in lines_of(file):
            video, label = _path_and_number(file, line, text)
            if found.classes is not None and label >= len(found.classes):
                expected = f"expected 0 to {len(found.classes) - 1}, as {found.class_file} has {len(found.classes)} classes"
                raise InputError(f"{place(file, line)}: the label is {label}, {expected}")
            name = str(label) if found.classes is None else found.classes[label]
            found.examples.append(Example(video, name, split_of_file(file), file, line))
        _check_any(file, found, before)
    return found


def is_list(file: Path) -> bool:
    first = head_of(file).lstrip().partition("\n")[0].strip()
    return bool(re.fullmatch(r"\S.*[ \t]\d+", first))


def _path_and_number(file: Path, line: int, text: str) -> tuple[str, int]:
    video, number = _without_number(text)
    if number is None:
        raise InputError(
            f"{place(file, line)}: is {shown(text)}, expected a path, a space and the number of the class, from 0 to 999999"
        )
    if _without_number(video)[1] is not None:
        raise InputError(
            f"{place(file, line)}: is {shown(text)}, with two numbers, expected one; lists of frames or of several labels a "
            "video are not read"
        )
    return video.strip('"'), number


def _without_number(text: str) -> tuple[str, int | None]:
    """`a/b.avi 12` → `a/b.avi`, 12. None if the line does not end in a space and a number below a million."""
    words = text.rsplit(maxsplit=1)
    return (words[0], int(words[1])) if len(words) == 2 and re.fullmatch("[0-9]{1,6}", words[1]) else (text, None)


def read_ucf101(path: Path, options: Options) -> Annotations:
    """classInd.txt, trainlist0N.txt (`Class/v_Class_g08_c01.avi 1`, numbers from 1) and testlist0N.txt (without numbers)."""
    folder = path if path.is_dir() else path.parent
    found = Annotations(class_file=folder / "classInd.txt", classes=read_class_list(_need(folder, "classInd.txt", "UCF101")))
    assert found.classes is not None
    files, found.split_number = _files_of_split(path, UCF101_LIST, options, "trainlist01.txt and testlist01.txt")
    wanted = {"train", "test"} - {match[1] for file in files if (match := UCF101_LIST.fullmatch(file.name))}
    if path.is_dir() and wanted:
        raise InputError(f"{path} has no {wanted.pop()}list{found.split_number:02d}.txt; copy it there, as UCF101 publishes it")
    for file in files:
        before, split = len(found.examples), "train" if file.name.startswith("train") else "test"
        for line, text in lines_of(file):
            video, number = _without_number(text)
            name, _, rest = video.partition("/")
            if not name or not rest:
                raise InputError(f"{place(file, line)}: is {shown(text)}, expected CLASS/VIDEO.avi and the number of the class")
            if name not in found.classes:
                raise _outside(place(file, line), name, found)
            expected = found.classes.index(name) + 1
            if number not in (None, expected):
                raise InputError(
                    f"{place(file, line)}: the label is {number}, expected {expected}, which {name} has in {found.class_file}"
                )
            found.examples.append(Example(video, name, split, file, line))
        _check_any(file, found, before)
    return found


def read_hmdb51(path: Path, options: Options) -> Annotations:
    """CLASS_test_splitN.txt, one a class: `video.avi 1` to train with, 2 to test with, 0 for neither."""
    files, number = _files_of_split(path, HMDB51_LIST, options, "brush_hair_test_split1.txt")
    found = Annotations(split_number=number)
    for file in files:
        before, match = len(found.examples), HMDB51_LIST.fullmatch(file.name)
        assert match
        for line, text in lines_of(file):
            video, _, flag = text.rpartition(" ")
            if flag not in HMDB51_SPLITS or not video.strip():
                raise InputError(
                    f"{place(file, line)}: is {shown(text)}, expected a video and 0 (unused), 1 (train) or 2 (test)"
                )
            found.examples.append(Example(f"{match[1]}/{video.strip()}", match[1], HMDB51_SPLITS[flag], file, line))
        _check_any(file, found, before)
    return found


def _files_of_split(path: Path, pattern: re.Pattern, options: Options, example: str) -> tuple[list[Path], int]:
    """The files of one of three splits, and its number: the one asked for, else that of the file, else 1."""
    if not path.is_dir():
        match = pattern.fullmatch(path.name)
        if not match:
            raise InputError(f"{path} is not a list of a split by its name, expected a name such as {example}")
        number = int(match[2])
        if options.split_number not in (None, number):
            raise InputError(
                f"{path} is a list of split {number}, expected one of split {options.split_number}; give its folder"
            )
        return [path], number
    number = options.split_number or 1
    found = {file: int(match[2]) for file in sorted(path.iterdir()) if (match := pattern.fullmatch(file.name))}
    files = [file for file, n in found.items() if n == number]
    if not files:
        has = f"it has those of split {_listed(found.values())}" if found else f"expected {example}"
        raise InputError(f"{path} has no list of split {number}; {has}")
    return files, number


def read_kinetics400(path: Path, options: Options) -> Annotations:
    """CSV `label,youtube_id,time_start,time_end,split`. Videos are named label/ID_000012_000022, as the downloads are."""
    found, columns = Annotations(), ("label", "youtube_id", "time_start", "time_end")
    for file in _files(path, ".csv", lambda file: "youtube_id" in columns_of(file)):
        if path.is_dir() and "label" not in columns_of(file):
            found.notes.append(f"{file.name} has no labels and was left out")
            continue
        before = len(found.examples)
        for line, row in rows_of(file, columns):
            if not row["label"] and split_named(row.get("split", "")) == "test":
                continue  # test labels were published later
            split = split_named(row["split"]) if "split" in row else split_of_file(file)
            if not row["label"] or not row["youtube_id"] or ("split" in row and not split):
                bad = next(name for name in ("label", "youtube_id", "split") if not row[name] or name == "split")
                expected = SPLIT_NAMES if bad == "split" else "a value"
                raise InputError(f"{place(file, line)}: {bad} is {shown(row[bad])}, expected {expected}")
            start, end = (_seconds(file, line, name, row[name]) for name in ("time_start", "time_end"))
            name = f"{row['label']}/{row['youtube_id']}_{start:06d}_{end:06d}"
            found.examples.append(Example(name, row["label"], split, file, line))
        _check_any(file, found, before)
    return found


def _seconds(file: Path, line: int, name: str, text: str) -> int:
    if not re.fullmatch(r"\d{1,6}(\.0*)?", text):
        raise InputError(f"{place(file, line)}: {name} is {shown(text)}, expected whole seconds, such as 12")
    return int(float(text))


def read_ssv2(path: Path, options: Options) -> Annotations:
    """JSON lists of {"id", "template"} and labels.json {"Holding something": "30"}. Templates may have [brackets]."""
    folder = path if path.is_dir() else path.parent
    class_file = _need(folder, "*labels.json", "SSV2")
    table = json_of(class_file, dict, 'an object {"template": "number"}')
    numbers = {_plain(name): str(number) for name, number in table.items()}
    if sorted(numbers.values(), key=lambda x: (len(x), x)) != [str(i) for i in range(len(table))]:
        raise InputError(f"{class_file}: the numbers of the {len(table)} templates are not 0 to {len(table) - 1}, each once")
    found = Annotations(class_file=class_file, classes=tuple(sorted(numbers, key=lambda name: int(numbers[name]))))
    for file in _files(path, ".json", lambda file: '"template"' in head_of(file)):
        before = len(found.examples)
        for entry, fields in entries_of(file, ("id", "template")):
            label = _plain(str(fields["template"]))
            if label not in numbers:
                raise _outside(place(file, entry), label, found)
            found.examples.append(Example(str(fields["id"]), label, split_of_file(file), file, entry))
        _check_any(file, found, before)
    if path.is_dir():
        unlabelled = [file.name for file in sorted(path.glob("*test*.json")) if '"template"' not in head_of(file)]
        found.notes += [f"{name} has no labels and was left out" for name in unlabelled]
    return found


def _plain(template: str) -> str:
    """Putting [something] onto [something] → Putting something onto something."""
    return " ".join(template.replace("[", "").replace("]", "").split())


def read_diving48(path: Path, options: Options) -> Annotations:
    """JSON lists of {"vid_name", "label"} and the vocabulary: a list of [position, somersaults, twists, flight]."""
    folder = path if path.is_dir() else path.parent
    class_file = _need(folder, "*vocab*.json", "Diving48")
    words = json_of(class_file, list, "a list of dives, each a list of words")
    dives = tuple(" ".join(map(str, dive)) if isinstance(dive, list) else str(dive) for dive in words)
    if len(set(dives)) < len(dives):
        raise InputError(f"{class_file}: lists the dive {shown(next(x for x in dives if dives.count(x) > 1))} twice")
    found = Annotations(class_file=class_file, classes=dives)
    files = _files(path, ".json", lambda file: '"vid_name"' in head_of(file))
    second = [file for file in files if "v2" in file.name.lower()]
    if second and len(second) < len(files):
        found.notes.append("lists of version 1 were left out, since those of version 2 are there")
    for file in second or files:
        before = len(found.examples)
        for entry, fields in entries_of(file, ("vid_name", "label")):
            label = fields["label"]
            if type(label) is not int or not 0 <= label < len(dives):
                raise InputError(
                    f"{place(file, entry)}: the label is {shown(label)}, expected 0 to {len(dives) - 1}, a dive of {class_file}"
                )
            found.examples.append(Example(str(fields["vid_name"]), dives[label], split_of_file(file), file, entry))
        _check_any(file, found, before)
    return found


def read_howto100m(path: Path, options: Options) -> Annotations:
    """HowTo100M_v1.csv: `video_id,category_1,category_2,rank,task_id`. The ids, without labels."""
    found = Annotations()
    for file in _files(path, ".csv", lambda file: {"video_id", "task_id"} <= set(columns_of(file))):
        for line, row in rows_of(file, ("video_id",)):
            if not row["video_id"]:
                raise InputError(f"{place(file, line)}: video_id is empty, expected the id of a video; remove the line")
            found.examples.append(Example(row["video_id"], None, None, file, line))
        _check_any(file, found, 0)
    return found


def _files(path: Path, extension: str, belongs) -> list[Path]:
    """The file, or the files of a folder that belong to the data set and end in the extension."""
    if not path.is_dir():
        return [path]
    files = [file for file in sorted(path.iterdir()) if file.suffix == extension and file.is_file()]
    found = [file for file in files if head_of(file).strip() and belongs(file)]
    if not found:
        raise InputError(f"{path} has no {extension} file of this data set; it has {_listed(file.name for file in files[:3])}")
    return found


def _need(folder: Path, pattern: str, dataset: str) -> Path:
    """The only file of the folder with such a name."""
    files = sorted(file for file in folder.glob(pattern) if file.is_file())
    if len(files) != 1:
        has = f"has {_listed(file.name for file in files)}" if files else f"has no {pattern}"
        raise InputError(f"{folder} {has}, expected one file {pattern} with the classes, as {dataset} publishes it")
    return files[0]


def _listed(names) -> str:
    found: Iterator[str] = (str(name) for name in sorted(set(names)))
    return ", ".join(found) or "none"


def _check_any(file: Path, found: Annotations, before: int) -> None:
    if len(found.examples) == before:
        raise InputError(f"{file} lists no video, expected at least one of the split; copy the file again or remove it")


def _outside(where: str, label: str, found: Annotations) -> InputError:
    known = ", ".join((found.classes or ())[:3])
    return InputError(
        f"{where}: the label is {shown(label)}, expected one of the {len(found.classes or ())} classes of {found.class_file} "
        f"({known}, …); correct it, or use the class list of the same data set"
    )


def stem_of(name: str) -> str:
    """The file's name without folders and without a video's extension."""
    last = name.rpartition("/")[2]
    head, dot, extension = last.rpartition(".")
    return head if head and dot + extension.lower() in EXTENSIONS else last
