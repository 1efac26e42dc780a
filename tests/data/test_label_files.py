"""Label files with mistakes, or of something else: one clear error that names file, line, value and what was expected."""

import os

import pytest

from films import close_folder
from label_examples import DIVING48, HMDB51, HOWTO100M, KINETICS, SSV2, UCF101, write
from vimpac.data.datasets import read_labels
from vimpac.errors import InputError

HEADER = "label,youtube_id,time_start,time_end,split\n"
UCF, K, S, D = "trainlist01.txt", "train.csv", "something-something-v2-train.json", "Diving48_V2_train.json"
SL, H = "something-something-v2-labels.json", "wave_test_split1.txt"


def refused(path, *parts, **options):
    with pytest.raises(InputError) as error:
        read_labels(path, **options)
    message = str(error.value)
    assert "\n" not in message and len(message) < 700
    for part in parts:
        assert part in message
    return message


@pytest.mark.parametrize(
    "text, parts",
    [
        ("video,label\na.mp4\n", ("line 2", "has 1 cells, expected 2 (video,label)")),
        ("video,label\na.mp4,x\n\nb, c.mp4,y\n", ("line 4", "put a value that holds a comma in double quotes")),
        ("video,label\na.mp4,\n", ("line 2", "the column label is empty")),
        ("video,label\n,x\n", ("line 2", "the column video is empty")),
        ("video,label,split\na.mp4,x,trian\n", ("line 2", "the split is 'trian', expected train, validation or test")),
        ("video,label\na.mp4,x\na.mp4,y\n", ("line 3", "the label of 'a.mp4' is 'y', expected 'x' as in", "line 2")),
        ("name,label\na.mp4,x\n", ("line 1", "'name,label', expected video,label; video is missing")),
        ("video;label\na.mp4;x\n", ("line 1", "video is missing; it seems separated by ';', use commas")),
        ("video,split\na.mp4,train\n", ("line 1", "expected video,label; label is missing")),
        ("video,label,label\na,b,c\n", ("line 1", "has two columns of one name")),
        ('video,label\n"a.mp4,x\n', ("line 2", "is not CSV", "check its double quotes")),
        ("video,label\n" + "a" * 200_000 + ",x\n", ("line 2", "is not CSV", "field larger than field limit")),
        ("video,label\na.mp4,x\0\n", ("line 2", "null byte")),
        (b"video,label\na.mp4,x\ncaf\xe9.mp4,y\n", ("line 3", "the byte 0xe9 is not UTF-8", "iconv")),
        ("video,label\n".encode("utf-16"), ("line 1", "the byte 0xff is not UTF-8")),
        ("video,label\n", ("lists no video, expected at least one",)),
        ("", ("is empty", "expected a CSV with the columns video,label[,split]")),
        (b"caf\xe9 au lait\n", ("line 1", "the byte 0xe9 is not UTF-8")),
        ("once upon a time\n", ("begins with 'once upon a time'",)),
        ("x" * 100_000, ("characters)", "expected a CSV")),
        (b"\x00\x00\x00\x20ftypisom" + bytes(range(50)) + b"\xff", ("is not UTF-8",)),
    ],
)
def test_bad_csv(tmp_path, text, parts):
    path = write(tmp_path, {"l.csv": text}) / "l.csv"
    refused(path, str(path), *parts)


@pytest.mark.parametrize(
    "text, parts",
    [
        ("a.mp4 0\nb.mp4\n", ("line 2", "is 'b.mp4', expected a path, a space and the number of the class")),
        ("a.mp4 0\nb.mp4 -1\n", ("line 2", "'b.mp4 -1'")),
        ("a.mp4 0\nb.mp4 9999999\n", ("line 2", "from 0 to 999999")),
        ("frames/a 120 0\n", ("line 1", "two numbers, expected one", "lists of frames")),
        ("a.mp4 0\nb.mp4 2\n", ("the class '1' of the numbers in it has no video", "--allow-empty-classes")),
        ("a.mp4 0\n" + "b" * 70_000 + " 0\n", ("line 2", "has 70002 characters, expected at most 65536")),
        ("a.mp4 0\na" + " " * 60_000 + "b\n", ("line 2", "(60004 characters)")),
    ],
)
def test_bad_list(tmp_path, text, parts):
    path = write(tmp_path, {"train_list.txt": text}) / "train_list.txt"
    refused(path, str(path), *parts)


def test_class_list(tmp_path):
    files = {"l.txt": "a.mp4 0\nb.mp4 2\n", "l.csv": "video,label\na.mp4,run\n", "two": "x\ny\n", "three": "x\ny\nz\n"}
    write(tmp_path, files | {"twice": "x\nx\n", "order": "1 x\n3 y\n", "from2": "2 x\n3 y\n", "none": "\n"})
    refused(tmp_path / "l.txt", "l.txt, line 2: the label is 2, expected 0 to 1, as", "two has 2", classes=tmp_path / "two")
    refused(tmp_path / "l.txt", "the class 'y' of", "three has no video", classes=tmp_path / "three")
    labels = read_labels(tmp_path / "l.txt", classes=tmp_path / "three", allow_empty_classes=True)
    assert labels.classes == ("x", "y", "z") and labels.labels == (0, 2)
    refused(tmp_path / "l.csv", "line 2: the label is 'run', expected one of the 2 classes of", classes=tmp_path / "two")
    refused(tmp_path / "l.txt", "twice, line 2: names the class 'x' a second time", classes=tmp_path / "twice")
    refused(tmp_path / "l.txt", "order, line 2: the class has the number 3, expected 2", classes=tmp_path / "order")
    refused(tmp_path / "l.txt", "from2, line 1: the class has the number 2, expected 1", classes=tmp_path / "from2")
    refused(tmp_path / "l.txt", "none is empty", classes=tmp_path / "none")
    refused(tmp_path / "l.txt", "cannot read the label file", "No such file", classes=tmp_path / "missing")


@pytest.mark.parametrize(
    "files, name, text, parts",
    [
        (UCF101, UCF, "Archery/a.avi 2\n", ("line 1: the label is 2, expected 1, which Archery has in", "classInd.txt")),
        (UCF101, UCF, "Fishing/a.avi 2\n", ("line 1: the label is 'Fishing', expected one of the 3 classes of", "(Archery, ")),
        (UCF101, UCF, "a.avi 1\n", ("line 1: is 'a.avi 1', expected CLASS/VIDEO.avi and the number of the class",)),
        (UCF101, UCF, "\n", ("trainlist01.txt lists no video",)),
        (
            UCF101,
            UCF,
            "Archery/v_Archery_g01_c01.avi 1\n",
            ("the split of 'Archery/v_Archery_g01_c01.avi' is train", "two-splits"),
        ),
        (UCF101, UCF, None, ("has no trainlist01.txt",)),
        (UCF101, "classInd.txt", None, ("has no classInd.txt, expected one file classInd.txt", "UCF101 publishes")),
        (UCF101, "classInd.txt", UCF101["classInd.txt"] + "4 Fishing", ("the class 'Fishing' of", "has no video")),
        (HMDB51, H, "a.avi 3\n", ("line 1: is 'a.avi 3', expected a video and 0 (unused), 1 (train) or 2 (test)",)),
        (HMDB51, H, "", (f"{H} lists no video",)),
        (KINETICS, K, HEADER + "dance,abc,1,2,holdout\n", ("line 2: split is 'holdout', expected train, validation or test",)),
        (KINETICS, K, HEADER + "dance,,1,2,train\n", ("line 2: youtube_id is '', expected a value",)),
        (KINETICS, K, HEADER + "dance,abc,x,2,train\n", ("line 2: time_start is 'x', expected whole seconds",)),
        (KINETICS, K, HEADER, ("train.csv lists no video",)),
        (KINETICS, K, "label,youtube_id\nx,y\n", ("line 1: has the columns 'label,youtube_id'", "time_start is missing")),
        (SSV2, "old-labels.json", {}, ("has old-labels.json, something-something-v2-labels.json, expected one file",)),
        (SSV2, SL, None, ("has no *labels.json", "SSV2 publishes")),
        (SSV2, SL, ["a"], ('holds [\'a\'], expected an object {"template": "number"}',)),
        (SSV2, SL, {"Holding something": "0", "x": "2"}, ("the numbers of the 2 templates are not 0 to 1, each once",)),
        (
            SSV2,
            S,
            [{"id": "1", "template": "Eating [something]"}],
            ("entry 1: the label is 'Eating something', expected one of",),
        ),
        (SSV2, S, [{"template": "x"}], ("entry 1: is {'template': 'x'}, expected an object with the field 'id'",)),
        (SSV2, S, ["template"], ("entry 1: is 'template', expected an object with the field 'id'",)),
        (SSV2, S, '[{"template": "x",', (f"{S} is not JSON (JSONDecodeError", "expected a list of objects")),
        (SSV2, S, '["template", ' + "[" * 200_000, ("is not JSON (RecursionError",)),
        (SSV2, S, '["template", ' + "9" * 5000 + "]", ("is not JSON (ValueError",)),
        (DIVING48, D, [{"vid_name": "a", "label": 48}], ("entry 1: the label is 48, expected 0 to 1, a dive of",)),
        (DIVING48, D, [{"vid_name": "a", "label": True}], ("entry 1: the label is True",)),
        (DIVING48, "Diving48_vocab.json", None, ("has no *vocab*.json",)),
        (DIVING48, "Diving48_vocab.json", [["a"], ["a"]], ("lists the dive 'a' twice",)),
        (HOWTO100M, "HowTo100M_v1.csv", "video_id,task_id\n,3\n", ("line 2: video_id is empty",)),
    ],
)
def test_bad_published_files(tmp_path, files, name, text, parts):
    files = {key: value for key, value in files.items() if key != name} | ({} if text is None else {name: text})
    refused(write(tmp_path, files), str(tmp_path), *parts)


def test_splits_that_are_not_known(tmp_path):
    write(tmp_path, {**SSV2, "more.json": [{"id": "8", "template": "Holding [something]"}]})
    refused(
        tmp_path, "more.json, entry 1: the split of '8' is not known", "expected train, validation or test in the file's name"
    )
    assert read_labels(tmp_path / "more.json", allow_empty_classes=True).splits is None


@pytest.mark.parametrize(
    "files, parts",
    [
        ({"walk/1.mp4": "", "run/notes.txt": ""}, ("the class 'run' of", "has no video")),
        ({"walk/1.mp4": "", "2.mp4": ""}, ("the video '2.mp4' lies outside the folders of the classes; expected CLASS/VIDEO",)),
        ({"train/walk/1.mp4": "", "val/2.mp4": ""}, ("the video 'val/2.mp4' lies outside", "expected SPLIT/CLASS/VIDEO")),
        ({"train/walk/1.mp4": "", "val/walk/x.txt": ""}, ("val holds no video, expected examples of this split",)),
        ({"walk/1.txt": ""}, ("holds 1 .txt, but no video file",)),
        ({"1.mp4": ""}, ("holds no labels; expected a CSV",)),
        ({}, ("holds no labels; expected a CSV",)),
    ],
)
def test_bad_folder(tmp_path, files, parts):
    refused(write(tmp_path, files), *parts)


def test_folder_that_cannot_be_listed(tmp_path, monkeypatch):
    write(tmp_path, {"walk/1.mp4": "", "walk/private/2.mp4": ""})
    close_folder(monkeypatch, tmp_path / "walk" / "private")
    refused(tmp_path, "private cannot be listed: Permission denied; allow it, or labels would be missing")


def test_test_list_without_labels(tmp_path):
    refused(write(tmp_path, KINETICS) / "test.csv", "test.csv, line 1: has the columns", "label is missing")


def test_options_that_do_not_fit(tmp_path):
    path = write(tmp_path, {"l.csv": "video,label\na.mp4,x\n"}) / "l.csv"
    refused(path, "was read as csv, which takes no --split-number; it is for ucf101, hmdb51, list", split_number=1)
    refused(path, "the split number is 4, expected 1, 2 or 3", split_number=4)
    refused(path, "has the columns 'video,label', expected video,motion; motion is missing", column="motion")
    refused(path, "the kind of labels is 'hmdb', expected one of csv, folder", kind="hmdb")
    refused(path, "has no classInd.txt", kind="ucf101")
    refused(path, "is not a list of a split by its name, expected a name such as brush_hair", kind="hmdb51")
    refused(path, "youtube_id is missing", kind="kinetics400")
    refused(path, "video_id is missing", kind="howto100m")
    refused(path, "has no *labels.json", kind="ssv2")
    refused(path, "is a file, expected a folder of videos", kind="folder")
    refused(path, "line 1: is 'video,label', expected a path", kind="list")
    refused(tmp_path, "has no list of split 1; expected train, val or test in the names", kind="list")
    refused(tmp_path, "has no .csv file of this data set; it has l.csv", kind="kinetics400")
    refused(tmp_path, "labels.csv: No such file or directory", kind="csv")
    refused(tmp_path / "missing", "do not exist; expected a CSV")
    os.mkfifo(tmp_path / "pipe")
    refused(tmp_path / "pipe", "it is a pipe, a socket or a device")
