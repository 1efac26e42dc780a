"""`vimpac labels check`: its report, and mistakes in one line."""

from typing import get_args, get_type_hints

import pytest
from test_store_commands import SHOWN, STEERING, is_harmless

from label_examples import SSV2, UCF101, write
from runs import write_store
from vimpac.commands import main as cli
from vimpac.config.labels import LabelOptions
from vimpac.data.datasets import Kind
from vimpac.data.store import TokenStore, finish_store


def test_kinds_are_those_of_read_labels():
    kind, none = get_args(get_type_hints(LabelOptions)["labels_kind"])
    assert none is type(None) and set(get_args(kind)) - {"auto"} == set(get_args(Kind))


@pytest.fixture
def store(tmp_path):
    return write_store(tmp_path / "store")


def check(capsys, *words):
    status = cli.main(["labels", "check", *map(str, words)])
    captured = capsys.readouterr()
    assert status == 0 and not captured.err, captured.err
    return captured.out.splitlines()


def test_report(store, tmp_path, capsys):
    names = TokenStore(store).names
    finish_store(store, {"broken.mp4": "is an empty file"})
    lines = ["video,motion,split", *(f"{name},left,train" for name in names[1:]), f"{names[1]},left,train"]
    lines += ["videos/broken.avi,right,val", *(f"gone{i:02d}.mp4,up,val" for i in range(2))]
    (tmp_path / "l.csv").write_text("\n".join(lines) + "\n")
    there = len(names) - 1
    assert check(capsys, store, tmp_path / "l.csv", "--label-column", "motion") == [
        f"{tmp_path / 'l.csv'}: csv, {there + 3} videos, 3 classes",
        f"  train       {there} listed, {there} in the store",
        "  validation  3 listed, 0 in the store",
        f"  found       {there} by path, 0 by stem, 0 by id",
        "  missing     3 videos not in the store (1 could not be decoded, as `vimpac verify` lists):",
        *("    gone00.mp4", "    gone01.mp4", "    videos/broken.avi"),
        *("  unlabelled  1 video of the store without a label:", f"    {names[0]}"),
        *("  duplicates  1 video listed more than once, kept once:", f"    {names[1]}"),
        *("  empty       2 classes without a video in the store:", "    right", "    up"),
    ]


def test_two_splits(store, tmp_path, capsys):
    name = TokenStore(store).names[0]
    (tmp_path / "l.csv").write_text(f"video,label,split\n{name},a,train\n{name},a,val\n")
    assert cli.main(["labels", "check", str(store), str(tmp_path / "l.csv")]) == 1
    assert "--allow-two-splits" in capsys.readouterr().err
    out = check(capsys, store, tmp_path / "l.csv", "--allow-two-splits")
    assert out[1:3] == ["  train       1 listed, 1 in the store", "  validation  1 listed, 1 in the store"]


def test_long_lists_are_cut(store, tmp_path, capsys):
    names = TokenStore(store).names
    (tmp_path / "l.csv").write_text("video,label\n" + "".join(f"{x},a\n" for x in [*names, *(f"g{i:02d}" for i in range(12))]))
    out = check(capsys, store, tmp_path / "l.csv")
    assert (
        out[-2:] == ["    g09", "    … and 2 more"]
        and f"  all         {len(names) + 12} listed, {len(names)} in the store" in out
    )


def test_published_files(store, tmp_path, capsys):
    names = TokenStore(store).names
    entries = [{"id": name.rsplit(".", 1)[0], "template": "Holding [something]"} for name in names]
    train = {"something-something-v2-train.json": entries}
    out = check(capsys, store, write(tmp_path / "ssv2", SSV2 | train))
    assert out[0] == f"{tmp_path / 'ssv2'}: ssv2, {len(names) + 1} videos, 2 classes"
    assert f"  Table 5     train: {len(names)} listed, {len(names)} in the store; the paper has 168913" in out
    assert out[-1] == "  note        something-something-v2-test.json has no labels and was left out"
    lists = {"trainlist02.txt": "".join(f"Archery/{name} 1\n" for name in names)}
    out = check(capsys, store, write(tmp_path / "ucf", UCF101 | lists), "--split-number", "2", "--allow-empty-classes")
    assert out[0].startswith(f"{tmp_path / 'ucf'}: ucf101, split 2, ") and not any("Table 5" in line for line in out)
    (tmp_path / "ids.csv").write_text("video_id,task_id\n" + "".join(f"{entry['id']},1\n" for entry in entries))
    assert check(capsys, store, tmp_path / "ids.csv")[0].endswith(f": howto100m, {len(names)} videos, without labels")


@pytest.mark.parametrize(
    "words, said",
    [
        ("missing l.csv", "missing is not a folder"),
        ("store missing", "the labels missing do not exist; expected a CSV"),
        ("store l.csv", "2 of 2 labelled videos are not in the store, such as 'x.mp4', 'y.mp4'; "),
        (
            "store l.csv --label-column dance",
            "l.csv, line 1: has the columns 'video,label', expected video,dance; dance is missing",
        ),
        ("store l.csv --split-number x", "--split-number is 'x', expected {None}|INT"),
        ("store l.csv --split-number 1", "l.csv was read as csv, which takes no --split-number"),
        ("store store", "store holds no labels; expected a CSV"),
        ("store l.csv --classes store", "cannot read the label file store: it is a folder"),
    ],
)
def test_mistakes_are_one_line(store, tmp_path, monkeypatch, capsys, words, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "l.csv").write_text("video,label\nx.mp4,a\ny.mp4,b\n")
    assert cli.main(["labels", "check", *words.split()]) == 1
    captured = capsys.readouterr()
    assert captured.err.startswith("vimpac labels check: error: ") and captured.err.count("\n") == 1 and not captured.out
    assert said in captured.err


def test_names_that_steer_the_terminal(store, tmp_path, capsys):
    names = TokenStore(store).names
    (tmp_path / "l.csv").write_text("video,label\n" + "".join(f'"{name}",a\n' for name in [*names, f"{STEERING}.mp4"]))
    out = check(capsys, store, tmp_path / "l.csv")
    assert f"    {SHOWN}.mp4" in out and is_harmless("\n".join(out))
