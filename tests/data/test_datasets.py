"""Labels as data sets publish them, with the quirks of each format, and as users write them."""

from typing import get_args

import pytest

from label_examples import DIVING48, HMDB51, HOWTO100M, KINETICS, SSV2, UCF101, write
from vimpac.config import SynthesizeConfig
from vimpac.data.annotations import stem_of
from vimpac.data.datasets import READERS, TABLE_5, Kind, Labels, compare_with_paper, match_labels, read_labels, recognise
from vimpac.data.synthetic import synthesize
from vimpac.errors import InputError


def rows(labels):
    """(video, class, split) of each entry."""
    splits = labels.splits or [None] * len(labels.videos)
    names = [None] * len(labels.videos) if labels.labels is None else [labels.classes[i] for i in labels.labels]
    return list(zip(labels.videos, names, splits, strict=True))


BACK = ("Back 15som 05Twis FREE", "Back 15som 15Twis FREE")
PUBLISHED = {
    "ucf101": (
        UCF101,
        ("Archery", "HandstandPushups", "YoYo"),
        [
            ("HandstandPushups/v_HandStandPushups_g01_c01.avi", "HandstandPushups", "test"),
            ("Archery/v_Archery_g01_c01.avi", "Archery", "test"),
            ("YoYo/v_YoYo_g01_c01.avi", "YoYo", "test"),
            ("HandstandPushups/v_HandStandPushups_g08_c01.avi", "HandstandPushups", "train"),
            ("Archery/v_Archery_g08_c01.avi", "Archery", "train"),
            ("YoYo/v_YoYo_g08_c01.avi", "YoYo", "train"),
        ],
    ),
    "hmdb51": (
        HMDB51,
        ("brush_hair", "wave"),
        [
            ("brush_hair/April_09_brush_hair_u_nm_np1_ba_goo_0.avi", "brush_hair", "train"),
            ("brush_hair/#1 of 2_brush_hair_u_nm_np1.avi", "brush_hair", "test"),
            ("brush_hair/x_brush.avi", "brush_hair", "unused"),
            ("wave/a_wave_u.avi", "wave", "test"),
            ("wave/b_wave_u.avi", "wave", "train"),
        ],
    ),
    "kinetics400": (
        KINETICS,
        ("abseiling", "massaging person's head"),
        [
            ("abseiling/-3B32lodo2M_000059_000069", "abseiling", "train"),
            ("massaging person's head/0347ZoDXyP0_000005_000015", "massaging person's head", "train"),
            ("abseiling/0wR5jVB-WPk_000417_000427", "abseiling", "validation"),
        ],
    ),
    "ssv2": (
        SSV2,
        ("Holding something", "Putting something onto something"),
        [
            ("78687", "Holding something", "train"),
            ("3", "Putting something onto something", "train"),
            ("5", "Putting something onto something", "validation"),
        ],
    ),
    "diving48": (
        DIVING48,
        BACK,
        [
            ("f1Y9P4dLRqM_00001", BACK[0], "test"),
            ("-mYUzm2cJyk_00000", BACK[1], "train"),
            ("-mYUzm2cJyk_00001", BACK[0], "train"),
        ],
    ),
    "howto100m": (HOWTO100M, (), [("nVbIUDjzWY4", None, None), ("-abcdefghij", None, None)]),
}


@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("kind", PUBLISHED)
def test_published_files(tmp_path, kind, bom):
    files, classes, expected = PUBLISHED[kind]
    write(tmp_path, files)
    for path in tmp_path.iterdir():
        path.write_bytes(bom + path.read_bytes())
    labels = read_labels(tmp_path)
    assert (labels.kind, labels.classes, rows(labels)) == (kind, classes, expected)
    assert read_labels(tmp_path, kind) == labels


def test_kinds():
    assert set(get_args(Kind)) == set(READERS) and set(TABLE_5) == set(PUBLISHED) <= set(READERS)


def test_other_splits(tmp_path):
    write(tmp_path / "ucf", UCF101)
    second = read_labels(tmp_path / "ucf", split_number=2)
    assert second.split_number == 2 and rows(second)[2] == ("Archery/v_Archery_g01_c01.avi", "Archery", "train")
    assert read_labels(tmp_path / "ucf" / "trainlist02.txt").splits == ("train",) * 3
    write(tmp_path / "hmdb", HMDB51)
    assert rows(read_labels(tmp_path / "hmdb", split_number=2)) == [
        ("brush_hair/April_09_brush_hair_u_nm_np1_ba_goo_0.avi", "brush_hair", "test")
    ]
    with pytest.raises(InputError, match="has no list of split 3; it has those of split 1, 2"):
        read_labels(tmp_path / "hmdb", split_number=3)
    with pytest.raises(InputError, match=r"trainlist02.txt is a list of split 2, expected one of split 1; give its folder"):
        read_labels(tmp_path / "ucf" / "trainlist02.txt", split_number=1)


def test_one_file_of_a_data_set(tmp_path):
    write(tmp_path, SSV2 | DIVING48 | KINETICS)
    one = read_labels(tmp_path / "something-something-v2-train.json")
    assert (one.kind, one.splits) == ("ssv2", ("train", "train"))
    assert read_labels(tmp_path / "Diving48_V2_train.json").labels == (1, 0)
    assert read_labels(tmp_path / "validate.csv").classes == ("abseiling",)
    with pytest.raises(InputError, match="holds the files of diving48, kinetics400, ssv2; choose one with --labels-kind"):
        read_labels(tmp_path)
    assert read_labels(tmp_path, "diving48").videos == read_labels(write(tmp_path / "alone", DIVING48)).videos


def test_published_test_labels(tmp_path):
    test = "label,youtube_id,time_start,time_end,split,is_cc\nabseiling,--6bJUbfpnQ,17,27,test,0\n,abc,1,2,test,0\n"
    labels = read_labels(write(tmp_path, KINETICS | {"test.csv": test}))
    assert rows(labels)[0] == ("abseiling/--6bJUbfpnQ_000017_000027", "abseiling", "test") and labels.splits.count("test") == 1


def test_what_is_left_out_is_said(tmp_path):
    assert read_labels(write(tmp_path / "k", KINETICS)).notes == ("test.csv has no labels and was left out",)
    assert read_labels(write(tmp_path / "s", SSV2)).notes == (
        "something-something-v2-test.json has no labels and was left out",
    )
    assert "version 1 were left out" in read_labels(write(tmp_path / "d", DIVING48)).notes[0]
    assert read_labels(write(tmp_path / "h", HOWTO100M)).duplicates == ("nVbIUDjzWY4",)


def test_csv(tmp_path):
    text = 'video,label,split\n"b, c/1.mp4",10,train\n\n a.mp4 ,2,VAL\nc.mp4,2,test\n'
    labels = read_labels(write(tmp_path, {"labels.csv": text}))
    assert rows(labels) == [("b, c/1.mp4", "10", "train"), ("a.mp4", "2", "validation"), ("c.mp4", "2", "test")]
    assert labels.classes == ("2", "10")  # numbers by value
    other = write(tmp_path, {"other.csv": "video,dance\nx.mp4,waltz\ny.mp4,polka\n"}) / "other.csv"
    assert rows(read_labels(other)) == [("x.mp4", "waltz", None), ("y.mp4", "polka", None)]
    names = write(tmp_path, {"names.txt": "waltz\npolka\n"}) / "names.txt"
    assert read_labels(other, classes=names).classes == ("waltz", "polka")


def test_labels_of_synthesize(tmp_path):
    made = synthesize(tmp_path / "videos", SynthesizeConfig(videos=12, seconds=0.5, size=32))
    with pytest.raises(InputError, match="has no column label; choose one of motion, shape, texture with --label-column"):
        read_labels(tmp_path / "videos")
    labels = read_labels(tmp_path / "videos", column="motion")
    assert rows(labels) == [(label.video, label.motion, None) for label in made] and labels.kind == "csv"


def test_folder_of_classes(tmp_path):
    write(tmp_path / "a", {"walk/1.mp4": "", "walk/deep/2.avi": "", "10/x.mp4": "", "9/x.mkv": "", "notes.md": "read me"})
    labels = read_labels(tmp_path / "a")
    assert (labels.kind, labels.classes, labels.splits) == ("folder", ("9", "10", "walk"), None)
    assert rows(labels)[-1] == ("walk/deep/2.avi", "walk", None)
    write(tmp_path / "trains", {"train/1.mp4": "", "bus/2.mp4": ""})
    assert read_labels(tmp_path / "trains").classes == ("bus", "train")
    write(tmp_path / "b", {"train/walk/1.mp4": "", "val/walk/2.mp4": "", "val/run/3.mp4": ""})
    labels = read_labels(tmp_path / "b")
    assert rows(labels)[0] == ("train/walk/1.mp4", "walk", "train") and labels.classes == ("run", "walk")


def test_lists_of_numbers(tmp_path):
    text = "some folder/b.mp4 1\n/data/a.mp4\t0\n/data/c,d.mp4 1\n"
    write(tmp_path, {"k400_train_list_videos.txt": text, "vjepa_val.csv": '"/data/e.mp4" 0\n', "names.txt": "dive\nwalk\n"})
    labels = read_labels(tmp_path / "k400_train_list_videos.txt")
    expected = [("some folder/b.mp4", "1", "train"), ("/data/a.mp4", "0", "train"), ("/data/c,d.mp4", "1", "train")]
    assert read_labels(write(tmp_path, {"train_val.lst": text}) / "train_val.lst").splits is None
    assert labels.kind == "list" and rows(labels) == expected and labels.labels == (1, 0, 1)
    both = read_labels(tmp_path, classes=tmp_path / "names.txt")
    assert both.classes == ("dive", "walk") and rows(both)[-1] == ("/data/e.mp4", "dive", "validation")
    numbered = {f"ucf101_{part}_split_{i}_videos.txt": f"A/{part}{i}.avi 0\n" for part in ("train", "val") for i in (1, 2)}
    labels = read_labels(write(tmp_path / "mm", numbered), split_number=2)
    assert rows(labels) == [("A/train2.avi", "0", "train"), ("A/val2.avi", "0", "validation")]


def test_two_splits(tmp_path):
    path = write(tmp_path, {"l.csv": "video,label,split\na.mp4,x,train\na.mp4,x,train\na.mp4,x,test\n"}) / "l.csv"
    with pytest.raises(InputError, match=r"l.csv, line 4: the split of 'a.mp4' is test, expected train as in .*l.csv, line 2;"):
        read_labels(path)
    labels = read_labels(path, allow_two_splits=True)
    assert rows(labels) == [("a.mp4", "x", "train"), ("a.mp4", "x", "test")] and labels.duplicates == ("a.mp4",)
    match = match_labels(labels, ["b.mp4", "a.mp4"])
    assert match.store_index == (1, 1) and match.found_by["path"] == 1


def labelled(*videos, kind="csv"):
    return Labels(kind, ("x",), videos, (0,) * len(videos), None)


@pytest.mark.parametrize(
    "videos, store, index, by",
    [
        (["A/x.avi", "B/x.avi"], ["B/x.avi", "A/x.avi"], [1, 0], "path"),
        (["A/x.avi", "B/x.avi"], ["v/B/x.mp4", "v/A/x.mp4"], [1, 0], "path"),  # encoded again, one folder above
        (["/data/UCF/A/x.avi", "/data/UCF/B/x.avi"], ["UCF-101/A/x.avi", "UCF-101/B/x.avi"], [0, 1], "path"),
        (["train/A/x", "val/A/x"], ["A/x.mp4", "val/A/x.mp4"], [-1, 1], "path"),  # A/x fits both, so it fits none
        (["A/x.y.avi"], ["x.y.MKV"], [0], "stem"),
        (["A/x.avi"], ["B/x.avi", "B/x.mp4"], [0], "stem"),
        (["78687"], ["20bn/78687.webm"], [0], "stem"),
        (["some class/x.mp4"], ["some_class/x.mp4"], [0], "stem"),
        (["x.avi", "z.avi"], ["x.avi", "x.mp4", "z.mp4"], [0, 2], None),
        (["a/0wR5jVB-WPk_000417_000427"], ["v/0wR5jVB-WPk_000417_000427.mp4"], [0], "stem"),
        (["a/0wR5jVB-WPk_000417_000427"], ["v/0wR5jVB-WPk.mp4"], [0], "id"),
        (["0wR5jVB-WPk"], ["0wR5jVB-WPk_000417_000427.mp4"], [0], "id"),
        (["A/x.avi", "q.avi"], ["B/x.avi", "C/x.avi", "q.avi"], [-1, 2], None),
        (["A/x.avi", "B/x.avi"], ["A/x.avi", "C/x.avi"], [0, -1], "path"),  # C/x.avi may be neither
    ],
)
def test_matching(videos, store, index, by):
    match = match_labels(labelled(*videos), store)
    assert list(match.store_index) == index
    assert match.missing == tuple(sorted(v for v, i in zip(videos, index, strict=True) if i < 0))
    assert match.unlabelled == tuple(sorted(name for i, name in enumerate(store) if i not in index))
    if by:
        assert match.found_by == dict.fromkeys(("path", "stem", "id"), 0) | {by: sum(i >= 0 for i in index)}
    assert match.ambiguous == match.missing  # in these cases


def test_missing_is_not_ambiguous():
    match = match_labels(labelled("a.mp4", "b.mp4", "A/c.mp4", "d.mp4"), ["a.mp4", "d.mp4", "B/c.mp4", "C/c.mp4"])
    assert match.missing == ("A/c.mp4", "b.mp4") and match.ambiguous == ("A/c.mp4",)


def test_labels_of_other_videos():
    """A store of a few of many labelled videos is fine, labels of a few of many videos as well."""
    videos = [f"v{i}.mp4" for i in range(10)]
    assert match_labels(labelled(*videos), videos[:2]).store_index == (0, 1, *[-1] * 8)
    assert match_labels(labelled(*videos[:2]), videos).store_index == (0, 1)
    said = (
        r"8 of 10 labelled videos are not in the store, such as 'v2.mp4', 'v3.mp4', 'v4.mp4'; 3 of its 5 videos have no label, "
    )
    with pytest.raises(InputError, match=said + "such as 'w0.mp4', 'w1.mp4', 'w2.mp4'; expected names that agree"):
        match_labels(labelled(*videos), [*videos[:2], "w0.mp4", "w1.mp4", "w2.mp4"])
    for store in (["w.mp4"], []):
        with pytest.raises(InputError, match="10 of 10 labelled videos are not in the store"):
            match_labels(labelled(*videos), store)


def test_table_5():
    def ucf101(train, test, classes, number=1):
        splits = ("train",) * train + ("test",) * test
        videos = tuple(f"v{i}.avi" for i in range(train + test))
        return Labels("ucf101", tuple(map(str, range(classes))), videos, (0,) * len(videos), splits, number)

    right = ucf101(9537, 3783, 101)
    assert compare_with_paper(right) == [] == compare_with_paper(ucf101(9586, 3734, 101, number=2))
    assert compare_with_paper(ucf101(9536, 3784, 100)) == [
        "train: 9536 listed; the paper has 9537",
        "test: 3784 listed; the paper has 3783",
        "100 classes; the paper has 101",
    ]
    match = match_labels(right, right.videos[1:])
    assert compare_with_paper(right, match) == ["train: 9537 listed, 9536 in the store; the paper has 9537"]
    assert compare_with_paper(labelled("a.mp4")) == []
    unlabelled = Labels("howto100m", (), ("a",), None, None)
    assert compare_with_paper(unlabelled) == ["all: 1 listed; the paper has 1238791"]


def test_stem():
    assert [stem_of(name) for name in ("a/b.MP4", "a/b.c", ".mp4", "b.tar.avi", "x/")] == ["b", "b.c", ".mp4", "b.tar", ""]


def test_recognise_by_content(tmp_path):
    files = {
        "a.txt": KINETICS["train.csv"],
        "b": HOWTO100M["HowTo100M_v1.csv"],
        "c.dat": "\n\nx.mp4 3\n",
        "d": "label,video\na,b\n",
    }
    write(tmp_path, files)
    assert [recognise(tmp_path / name) for name in files] == ["kinetics400", "howto100m", "list", "csv"]
