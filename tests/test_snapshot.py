"""Snapshots of the released program: the model that their shapes describe, and files that are damaged or hostile."""

import dataclasses
import os
import pickle
import struct
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from snapshots import RunsCode, drawn, outputs, released
from vimpac.config import ModelConfig
from vimpac.errors import InputError
from vimpac.model import ClassificationModel, PretrainModel
from vimpac.released import from_authors
from vimpac.snapshot import LAYOUTS, find_snapshot, import_snapshot, infer_config, read_snapshot

CONFIG = ModelConfig(layers=2, width=128, heads=2, grid=(2, 3, 4), head_layers=2, head_width=24, head_out=8, vocab_size=20)
HALVED = dataclasses.replace(CONFIG, attention_width=64, mlp_width=256)
FINE_TUNED = partial(ClassificationModel, classes=5)
TOKENS = torch.randint(20, (2, 2, 3, 4), generator=torch.Generator().manual_seed(0))
FORMATS = {"zip": {}, "old": {"_use_new_zipfile_serialization": False}}
LAYER = "backbone.transformer.resblocks"
QUERY = f"{LAYER}.0.attention_blocks.0.attentions.0.attention.query.weight"


@pytest.fixture(params=FORMATS)
def write(request, tmp_path):
    """Writes a file in either format of torch.save, and returns its path."""

    def write(held, name="snapshot.pt"):
        torch.save(held, tmp_path / name, **FORMATS[request.param])
        return tmp_path / name

    return write


def refused(path, match, **options):
    with pytest.raises(InputError, match=match) as error:
        import_snapshot(path, **options)
    assert str(path) in str(error.value) and len(str(error.value)) < 1200
    return str(error.value)


@pytest.mark.parametrize("make", [PretrainModel, FINE_TUNED], ids=["pre-trained", "fine-tuned"])
@pytest.mark.parametrize("norm", ["post", "pre"])
@pytest.mark.parametrize("config", [CONFIG, HALVED], ids=["full", "halved"])
def test_computes_what_the_source_computes(write, make, norm, config):
    source = drawn(make(dataclasses.replace(config, norm=norm)))
    imported = import_snapshot(write(released(source))).model
    fields = set(dataclasses.asdict(config)) - ({"head_layers", "head_width", "head_out"} if make is FINE_TUNED else set())
    assert all(getattr(imported.config, name) == getattr(source.config, name) for name in fields)
    assert all(map(torch.equal, outputs(imported, TOKENS), outputs(source, TOKENS)))


@pytest.mark.parametrize("layout", [*LAYOUTS.values(), "H|W,T", "T|HxW", "H,W"])
def test_layouts(write, layout):
    """Those of Table 13 are found, others are asked for, or set with an option."""
    source = drawn(PretrainModel(dataclasses.replace(CONFIG, layout=layout)))
    path = write(released(source))
    known = layout in LAYOUTS.values()
    if layout in ("H|W,T", "T|HxW"):
        refused(path, r"blocks of 2(, 1)? axes, which no layout of Table 13 has .*give --layout")
    imported = import_snapshot(path, layout=None if known else layout).model
    assert imported.config.layout == layout
    assert all(map(torch.equal, outputs(imported, TOKENS), outputs(source, TOKENS)))


def test_a_layout_of_other_blocks(write):
    path = write(released(PretrainModel(CONFIG)))
    refused(path, r"--layout T,H,W has blocks of 1, 1, 1 axes, its layers have blocks of 1, 2 axes", layout="T,H,W")
    refused(path, "bad layout", layout="T,Q")
    refused(path, "cannot split 1 heads", heads=1)
    refused(path, "must be a multiple of the 6 heads", heads=6)
    refused(path, "heads must be at least 1", heads=0)


def test_heads(write):
    source = drawn(PretrainModel(dataclasses.replace(CONFIG, heads=4)))
    imported = import_snapshot(write(released(source)), heads=4).model
    assert all(map(torch.equal, outputs(imported, TOKENS), outputs(source, TOKENS)))
    assert infer_config(released(source)).heads == 2
    odd = write(released(PretrainModel(dataclasses.replace(CONFIG, attention_width=96))))
    refused(odd, "attention is 96 wide in a model 128 wide, .* give --heads")
    assert import_snapshot(odd, heads=4).model.config.key_width == 96


@pytest.mark.parametrize("preset", [ModelConfig.small(), ModelConfig.base(), ModelConfig.large_half()])
def test_presets_have_the_usual_heads(preset):
    """At a twelfth of the layers, and with a small vocabulary."""
    config = dataclasses.replace(preset, layers=1, vocab_size=9, head_width=4)
    assert infer_config(released(PretrainModel(config))) == config


@pytest.mark.parametrize("make", [PretrainModel, FINE_TUNED], ids=["pre-trained", "fine-tuned"])
def test_a_larger_vocabulary_is_cut(write, make):
    source = drawn(make(CONFIG))
    state = released(source) | ({} if make is FINE_TUNED else {"mlm_head.decoder.weight": source.backbone.embedding.weight})
    path = write(state)
    whole, cut = import_snapshot(path), import_snapshot(path, vocab_size=12)
    assert whole.model.config.vocab_size == whole.codes == cut.codes == 20
    assert cut.model.config == dataclasses.replace(whole.model.config, vocab_size=12)
    tokens = TOKENS % 12
    tokens[0, 0, 0, :2] = 20 + torch.tensor([1, 4])  # PAD, MASK
    expected = outputs(source, tokens)
    tokens[0, 0, 0, :2] = torch.tensor([cut.model.config.pad_id, cut.model.config.mask_id])
    found = outputs(cut.model, tokens)
    if make is PretrainModel:
        kept = torch.tensor([*range(12), *range(20, 25)])
        torch.testing.assert_close(found[2], expected[2][..., kept])  # a smaller matrix product adds in another order
        del found[2], expected[2]
    assert all(map(torch.equal, found, expected))
    for size in (21, 0, -1):
        refused(path, rf"embedding.weight has 20 codes, --vocab-size is {size}, expected 1 to 20", vocab_size=size)


@pytest.mark.parametrize("name, norm", [("default", "post"), ("prenorm", "pre"), ("finetune", "post")])
def test_weights_of_the_released_program(write, name, norm):
    golden = load_file(Path(__file__).parent / "golden" / f"{name}.safetensors")
    state = {key[2:]: x for key, x in golden.items() if key.startswith("w/")}
    config = import_snapshot(write(state), heads=4).model.config
    grid = (4, 4, 4) if name == "finetune" else (3, 4, 6)
    assert (config.layers, config.width, config.grid, config.norm, config.vocab_size) == (2, 32, grid, norm, 8192)
    assert from_authors(state, dataclasses.replace(config, dropout=0.0))


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: {f"module.{name}": x for name, x in state.items()},
        lambda state: {"model": state, "optimizer": {"state": {}}, "epoch": 3},
        lambda state: {"state_dict": {f"module.{name}": x for name, x in state.items()}},
        lambda state: {"module": state},
        lambda state: {name: torch.nn.Parameter(x) for name, x in state.items()},
        lambda state: {name: x.half() for name, x in state.items()},
    ],
)
def test_where_the_state_dict_may_be(write, wrap):
    source = drawn(PretrainModel(CONFIG))
    imported = import_snapshot(write(wrap(released(source)))).model
    for name, x in source.named_parameters():
        assert torch.equal(imported.state_dict()[name], x) or torch.equal(imported.state_dict()[name], x.half().float())


def test_a_state_dict_of_a_module(write):
    """An OrderedDict with the attribute _metadata, and tensors that share a storage."""
    state = torch.nn.Linear(2, 3).state_dict()
    table = torch.arange(20.0).view(4, 5)
    state |= {"backbone.embedding.weight": table, "view": table[1:, 2], "none": torch.zeros(0, 3)}
    read = read_snapshot(write(state))
    assert read.keys() == state.keys() and all(torch.equal(x, state[name]) for name, x in read.items())


@pytest.mark.parametrize("held", [7, [torch.zeros(2)], {}, {"model": 3}, {"a": torch.zeros(2)}, torch.zeros(3), {7: {}}])
def test_files_of_something_else(write, held):
    refused(write(held), r"snapshot\.pt: (it holds a \w+, expected|expected backbone\.embedding\.weight among)")


def test_two_state_dicts(write):
    state = released(PretrainModel(CONFIG))
    refused(write({"model": state, "module": state}), "found it in several: 'model', 'module'")


def without(state, *parts):
    return {name: x for name, x in state.items() if not any(part in name for part in parts)}


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda s: without(s, "temporal"), "temporal_pos_embedding is missing"),
        (lambda s: without(s, QUERY), "query.weight is missing"),
        (lambda s: without(s, "attentions.0.attention.key.bias"), r"missing \['backbone.*key.bias"),
        (lambda s: without(s, f"{LAYER}.0"), r"0\.attention_blocks\.0\.attentions\.0\.attention\.query\.weight is missing"),
        (lambda s: without(s, f"{LAYER}.0.attention_blocks.0"), r"0\.attention_blocks\.0\.attentions\.0.* is missing"),
        (lambda s: without(s, f"{LAYER}.1.attention_blocks.1.attentions.0"), r"missing \['.*1\.attention_blocks\.1"),
        (lambda s: without(s, f"{LAYER}.1.attention_blocks.0"), r"missing \['.*1\.attention_blocks\.0"),
        (lambda s: without(s, LAYER), "query.weight is missing"),
        (lambda s: without(s, f"{LAYER}.0.mlp.c_fc.weight"), r"0\.mlp\.c_fc\.weight is missing"),
        (lambda s: without(s, "cls_head"), r"cls_head\.mlp\.linear_0\.weight .* are missing, expected one"),
        (lambda s: without(s, "cls_head.mlp.linear_0"), r"cls_head\.mlp\.linear_0\.weight is missing"),
        (lambda s: without(s, "mlm_head"), r"missing \['mlm_head"),
        (lambda s: without(s, "ln_pre"), "holds neither of backbone.ln_pre.weight"),
        (lambda s: s | {"backbone.ln_post.weight": torch.ones(128)}, r"ln_pre and ln_post of .* expected one"),
        (lambda s: s | {"backbone.embedding.weight": torch.zeros(5, 128)}, "embedding.weight has 5 rows, expected"),
        (lambda s: s | {"backbone.embedding.weight": torch.zeros(25)}, r"embedding.weight has the shape \(25,\), expected"),
        (lambda s: s | {"backbone.embedding.weight": torch.zeros(26, 128)}, r"mlm_head.bias has a size mismatch: \(25,\) inst"),
        (lambda s: s | {"backbone.embedding.weight": torch.zeros(1).expand(2**40, 128)}, "fewer values than its shape says"),
        (lambda s: s | {"backbone.embedding.weight": "text"}, "embedding.weight is a str, expected a tensor"),
        (lambda s: s | {QUERY: torch.zeros(64, 128)}, r"does not fit .*attention_blocks|query.bias has a size mismatch"),
        (lambda s: s | {QUERY: torch.zeros(128, 64)}, r"query\.weight has the shape \(128, 64\), expected \(rows, 128\)"),
        (lambda s: s | {f"{LAYER}.1.mlp.c_fc.bias": torch.zeros(7)}, r"1\.mlp\.c_fc\.bias has a size mismatch: \(7,\) instead"),
        (lambda s: s | {"cls_fc.bias": torch.zeros(3)}, "cls_fc is a NoneType"),
        (lambda s: s | {"surprise": torch.zeros(3)}, r"unexpected \['surprise'\]"),
        (lambda s: s | {QUERY: torch.full((128, 128), float("nan"))}, "query.weight holds values that are not finite"),
        (lambda s: s | {f"{LAYER}.9999.attention_blocks.0.attentions.0.x": torch.ones(1)}, r"missing \['.*resblocks\.2"),
        (lambda s: s | {f"module.{QUERY}": torch.ones(1)}, "holds the same name twice"),
        (lambda s: s | {7: torch.ones(1)}, "must map names to tensors"),
    ],
)
def test_tensors_that_are_missing_or_contradict_each_other(write, change, said):
    path = write(change(released(PretrainModel(CONFIG))))
    assert "copy it again" in refused(path, said) or "twice" in said or "map names" in said


def test_folders(tmp_path, write):
    refused(tmp_path, r"it holds none; name the file itself, such as .*classifier\.pt")
    (tmp_path / "args.pickle").write_bytes(pickle.dumps(RunsCode(tmp_path / "proof")))
    (tmp_path / ".hidden.pt").touch()
    path = write(released(PretrainModel(CONFIG)), "classifier.pt")
    assert find_snapshot(tmp_path) == find_snapshot(path) == path
    assert import_snapshot(tmp_path).file == path and not (tmp_path / "proof").exists()
    (tmp_path / "optimizer.pth").touch()
    refused(tmp_path, r"it holds 2 of them: classifier\.pt, optimizer\.pth; name the file itself, such as .*classifier\.pt")


def test_paths_that_are_no_file(tmp_path):
    refused(tmp_path / "missing.pt", "No such file")
    os.mkfifo(tmp_path / "pipe.pt")
    refused(tmp_path / "pipe.pt", "it is a pipe")
    (tmp_path / "pipe.pt").unlink()
    (tmp_path / "inner" / "x.pt").mkdir(parents=True)
    with pytest.raises(InputError, match=r"x\.pt: it is a folder"):
        import_snapshot(tmp_path / "inner")


@pytest.mark.parametrize("content", [b"", b"PK\3\4", b"PK\3\4" + bytes(100), b"text", bytes(1000), pickle.dumps({"a": 1})])
def test_foreign_files(tmp_path, content):
    (tmp_path / "x.pt").write_bytes(content)
    refused(tmp_path / "x.pt", r"not written by torch\.save|cut short, damaged or forged")


def test_nothing_in_a_file_is_run(tmp_path, write):
    proof = tmp_path / "proof"
    pickle.loads(pickle.dumps(RunsCode(proof))).close()
    assert proof.exists()  # so would it have been run
    proof.unlink()
    state = released(PretrainModel(CONFIG))
    for held in (RunsCode(proof), state | {"more": RunsCode(proof)}, {"model": state, "args": RunsCode(proof)}):
        refused(write(held), r"it holds \w+\.open, which is neither a tensor nor a plain value; nothing of it was run")
    (tmp_path / "args.pickle").write_bytes(pickle.dumps(RunsCode(proof)))
    refused(tmp_path / "args.pickle", r"not written by torch\.save")
    assert not proof.exists()


@pytest.mark.parametrize("place", range(1, 5))
def test_code_in_any_pickle_of_the_older_format(tmp_path, place):
    """The first three are not the state dict, and the fifth follows it."""
    path, proof = tmp_path / "x.pt", tmp_path / "proof"
    torch.save(released(PretrainModel(CONFIG)), path, **FORMATS["old"])
    whole, begin = path.read_bytes(), 0
    for _ in range(place):
        begin = end_of_pickle(whole, begin)
    end = end_of_pickle(whole, begin)
    path.write_bytes(whole[:begin] + pickle.dumps(RunsCode(proof), protocol=2) + whole[end:])
    refused(path, r"x\.pt")
    assert not proof.exists()


def end_of_pickle(data, begin):
    import io
    import pickletools

    stream = io.BytesIO(data)
    stream.seek(begin)
    for _ in pickletools.genops(stream):
        pass
    return stream.tell()


def test_files_cut_short(tmp_path, write):
    path = write(released(PretrainModel(dataclasses.replace(CONFIG, layers=1))))
    whole = path.read_bytes()
    rng = torch.Generator().manual_seed(0)
    ends = [*range(0, 200, 7), *torch.randint(len(whole), (60,), generator=rng).tolist(), len(whole) - 1]
    for end in ends:
        path.write_bytes(whole[:end])
        refused(path, r"not written by torch\.save|cut short, damaged or forged")


HUGE = b"J" + struct.pack("<i", 2**31 - 1)
CLAIMS = {  # of a table of 25 × 128 values, in pickle operations: elements, sizes, strides, offset
    "elements": (b"M\x80\x0cNt", HUGE + b"Nt"),
    "many elements": (b"M\x80\x0cNt", b"\x8a\x08" + b"\xff" * 7 + b"\x0fNt"),
    "negative elements": (b"M\x80\x0cNt", b"J" + struct.pack("<i", -1) + b"Nt"),
    "sizes": (b"K\x19K\x80\x86", HUGE + b"K\x80\x86"),
    "negative sizes": (b"K\x19K\x80\x86", b"J" + struct.pack("<i", -25) + b"K\x80\x86"),
    "strides": (b"K\x80K\x01\x86", HUGE + b"K\x01\x86"),
    "fewer strides": (b"K\x80K\x01\x86", b"K\x01\x85"),
    "offset": (b"QK\x00", b"Q" + HUGE),
    "kept storage": (b"QK\x00", b"Qq\xffK\x00"),
    "sizes of another operation": (b"K\x19K\x80\x86", b"K\x19K\x80\x87"),
    "float": (b"QK\x00", b"QG" + bytes(8)),
}


@pytest.mark.parametrize("claim", CLAIMS)
def test_claims_of_the_older_format_are_compared_before_loading(tmp_path, monkeypatch, claim):
    path = tmp_path / "x.pt"
    torch.save(released(PretrainModel(CONFIG)), path, **FORMATS["old"])
    whole = path.read_bytes()
    old, new = CLAIMS[claim]
    assert old in whole
    path.write_bytes(whole.replace(old, new, 1))
    monkeypatch.setattr(torch, "load", lambda *a, **k: pytest.fail("was loaded"))
    refused(path, "cut short, damaged or forged")


def test_storages_without_values(tmp_path, monkeypatch):
    """They would be left as uninitialised memory."""
    path = tmp_path / "x.pt"
    torch.save({"backbone.embedding.weight": torch.ones(2, 3)}, path, **FORMATS["old"])
    whole = path.read_bytes()
    place = whole.rindex(b"\x80\x02]")
    path.write_bytes(whole[:place] + b"\x80\x02].")
    monkeypatch.setattr(torch, "load", lambda *a, **k: pytest.fail("was loaded"))
    refused(path, "the values of storage .* are missing")


@pytest.mark.parametrize("claim", ["elements", "sizes", "strides", "offset"])
def test_claims_of_the_zip_format(tmp_path, claim):
    """Storages are parts of the mapped file, which cannot grow."""
    import zipfile

    path, other = tmp_path / "x.pt", tmp_path / "y.pt"
    torch.save(released(PretrainModel(CONFIG)), path)
    old, new = (part.replace(b"Nt", b"t") for part in CLAIMS[claim])
    with zipfile.ZipFile(path) as archive, zipfile.ZipFile(other, "w") as written:
        for entry in archive.namelist():
            data = archive.read(entry)
            if entry.endswith("data.pkl"):
                old = old if claim != "elements" else old[:-1] + data[data.index(old[:-1]) + 3 :][:1]
                new = new if claim != "elements" else new[:-1] + old[-1:]
                assert old in data
                data = data.replace(old, new, 1)
            written.writestr(entry, data)
    if claim == "elements":  # more than the file holds, of which the tensor takes the part that is there
        assert import_snapshot(other).model.config == import_snapshot(path).model.config
    else:
        refused(other, "cut short, damaged or forged")


def test_a_changed_value_of_the_zip_format(tmp_path):
    """It has checksums, which torch.load does not compare; the older format has none."""
    path = tmp_path / "x.pt"
    torch.save(released(drawn(PretrainModel(CONFIG))), path)
    whole = bytearray(path.read_bytes())
    whole[len(whole) // 2] ^= 1
    path.write_bytes(whole)
    refused(path, "BadZipFile: checksum of .*; copy it again")


def test_names_beyond_any_models(write):
    refused(
        write({"backbone.embedding.weight": torch.zeros(2), "x": "y" * (17 << 20)}), "names and shapes take more than 16 MB"
    )
