"""`vimpac features`, `probe` and `similar` as a user runs them; several processes; mistakes in one line, before any work."""

import json
import multiprocessing
import os
import re
import signal
import sys
from functools import partial

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from films import greys, noise, write_video
from refusals import tree
from runs import VOCABULARY, free_port, kill, on_call, tiny_model, write_store
from vimpac import weights
from vimpac.commands import main as cli
from vimpac.data.store import TokenStore
from vimpac.files.checked import load_json, unsealed
from vimpac.model import PretrainModel

DIGEST = "d" * 64
PRELOADED = [
    "vimpac.evaluation.search",
    "vimpac.training.device",
    "tyro",
    "sklearn.neighbors",
    "sklearn.linear_model",
    "torch._dynamo",
]


def save(path, digest=DIGEST, seed=0, **options):
    torch.manual_seed(seed)
    model = PretrainModel(tiny_model(**options))
    with torch.no_grad():
        for p in model.parameters():  # far from the usual start, where all videos have nearly the same [CLS]
            p.add_(0.2 * torch.randn_like(p))
    tokenizer = {"name": "patch-vq", "vocab_size": model.config.vocab_size, "stride": 8, "digest": digest}
    weights.save(model, path, tokenizer, fps=2.0)
    return path


@pytest.fixture
def here(tmp_path, monkeypatch, store_folder):
    """A folder with model.safetensors, store and labels.csv, in which the commands run."""
    monkeypatch.chdir(tmp_path)
    save(tmp_path / "model.safetensors")
    (tmp_path / "store").symlink_to(store_folder)
    names = TokenStore(store_folder).names
    rows = [f"{name},{'ab'[i % 2]},{'train' if i < 18 else 'test'}" for i, name in enumerate(names)]
    (tmp_path / "labels.csv").write_text("\n".join(["video,label,split", *rows]) + "\n")
    return tmp_path


def vimpac(capsys, *words):
    """What the command prints, a line each."""
    status = cli.main([str(word) for word in words])
    captured = capsys.readouterr()
    assert status == 0, captured.err
    return captured.out.splitlines()


def refused(capsys, folder, *words):
    """The command's one line of error; nothing has changed below the folder."""
    before = tree(folder)
    assert cli.main([str(word) for word in words]) == 1
    captured = capsys.readouterr()
    assert captured.err.startswith(f"vimpac {words[0]}: error: ") and captured.err.count("\n") == 1 and not captured.out
    assert tree(folder) == before
    return captured.err


def ranks(words, count, log, hook=None):
    """The command in `count` processes: their exit codes."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    port = free_port()
    arguments = [(list(map(str, words)), rank, count, port, f"{log}-{rank}", os.getcwd(), hook) for rank in range(count)]
    processes = [context.Process(target=_rank, args=x, daemon=True) for x in arguments]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    hanging = [process for process in processes if process.is_alive()]
    for process in hanging:
        process.kill()
    assert not hanging
    return [process.exitcode for process in processes]


def _rank(words, rank, count, port, log, folder, hook):
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
    os.chdir(folder)
    torch.set_num_threads(1)
    if count > 1:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    if hook:
        hook()
    sys.exit(cli.main(words))


def said(log):
    """The lines of a log without progress, which depends on time."""
    return [line for line in log.read_text().splitlines() if not re.search(r": \d+ of \d+ videos, ", line)]


def small_chunks():
    """A hook: seven chunks of the 25 videos, each a part."""
    from vimpac.evaluation import feature_file, features

    features.CHUNK_VIDEOS, feature_file.PART_SECONDS = 4, 0.0


def small_chunks_then(hook):
    """Peers count as lost after 5 seconds without a heartbeat, of which there is one every 2 seconds."""
    from vimpac.processes import meeting

    meeting.LOST_LOOKS = 25
    small_chunks()
    hook()


# --- features -------------------------------------------------------------------------------------------------------------


def test_features(here, capsys):
    assert vimpac(capsys, "features", "model.safetensors", "store", "out") == ["out: features of 25 videos"]
    found = load_file("out/features.safetensors")
    assert {name: x.shape for name, x in found.items()} == {"cls": (25, 16), "mean": (25, 16), "contrastive": (25, 8)}
    assert json.loads((here / "out" / "names.json").read_text())["names"] == TokenStore("store").names
    before = tree(here / "out")
    again = vimpac(capsys, "features", "model.safetensors", "store", "out")
    assert again == ["out: features of 25 videos, complete already"] and tree(here / "out") == before


def test_features_with_options(here, capsys):
    """Against the model itself: 2 clips of 4 frames at half the rate, the embedding, minus the mean."""
    words = ("--layer", 0, "--clips", 2, "--frames", 4, "--fps", 1, "--batch", 3, "--normalize", "center")
    said = vimpac(capsys, "features", "model.safetensors", "store", "out", *words)
    assert said[0] == "note: positions are interpolated from 3 × 4 × 4 (T × H × W) to 4 × 4 × 4 tokens"
    model, store, pad = weights.load("model.safetensors", grid=(4, 4, 4)), TokenStore("store"), VOCABULARY + 1
    rows = []
    for video in range(len(store)):
        last = max(0, int(store.frames[video]) - 7)
        clips = store.read_clips(np.array([video] * 2), np.array([0, last]), 4, fill=pad, every=2).astype(np.int64)
        with torch.no_grad():
            hidden = model.backbone(torch.from_numpy(clips), layers=0)[1].numpy()
        rows.append(np.mean([x[ids != pad].mean(0) for x, ids in zip(hidden, clips, strict=True)], 0))
    expected = np.array(rows) - np.mean(rows, 0)
    found = load_file("out/features.safetensors")
    assert found.keys() == {"cls", "mean", "cls.offset", "mean.offset"}
    assert json.loads((here / "out" / "features.json").read_text())["settings"]["layer"] == 0
    np.testing.assert_allclose(found["mean"], expected, atol=1e-5)  # float32, batches of other sizes


def test_three_processes_write_what_one_does(here):
    assert ranks(["features", "model.safetensors", "store", "one"], 1, here / "log", small_chunks) == [0]
    assert ranks(["features", "model.safetensors", "store", "three"], 3, here / "log", small_chunks) == [0] * 3
    assert tree(here / "three") == tree(here / "one") and len(tree(here / "one")) == 3
    assert said(here / "log-0") == ["three: features of 25 videos"]
    assert said(here / "log-1") == said(here / "log-2") == []


def test_killed_and_gone_on(here):
    """One of two processes is killed at its second part: the other ends with a message, and one process does the rest."""
    assert ranks(["features", "model.safetensors", "store", "one"], 1, here / "log", small_chunks) == [0]
    stop = partial(_kill_rank, 1, on_call("vimpac.evaluation.feature_file:_save", 2, kill.__name__))
    codes = ranks(["features", "model.safetensors", "store", "out"], 2, here / "log", partial(small_chunks_then, stop))
    assert codes == [1, -signal.SIGKILL], (here / "log-0").read_text()
    way_out = "run the same command again, which goes on with what is missing"
    assert said(here / "log-0") == [f"vimpac features: error: another process was lost, so this one ends: {way_out}"]
    parts = sorted(path.name for path in (here / "out").glob("part-*.safetensors"))
    assert "part-0000001.safetensors" in parts and "part-0000003.safetensors" not in parts
    assert ranks(["features", "model.safetensors", "store", "out"], 1, here / "log", small_chunks) == [0]
    assert tree(here / "out") == tree(here / "one")


def _kill_rank(rank, hook):
    if os.environ["RANK"] == str(rank):
        hook()


# --- probe ----------------------------------------------------------------------------------------------------------------


def test_probe(here, capsys):
    out = vimpac(capsys, "probe", "model.safetensors", "store", "--labels", "labels.csv", "--epochs", 2)
    assert out[-1] == "wrote probe.json"
    start = out.index("accuracy on the 7 videos of the split test, each 0.143 of it, fitted on 18 videos of 2 classes")
    table = out[start + 1 : -1]
    found = unsealed(*load_json(here / "probe.json"), set(json.loads((here / "probe.json").read_text())) - {"checksum"})
    rows = {(row["probe"], row["features"], row["backbone"]): row["top1"] for row in found["results"]}
    assert len(rows) == 16
    expected = [f"{'probe':<10} {'features':<15} {'model':>7} {'random backbone':>16}"]
    for probe, features in (*((p, f) for p in ("knn", "linear") for f in ("cls", "mean", "contrastive", "histogram")),):
        if features == "histogram":
            expected.append(f"{probe:<10} token histogram {rows[probe, features, 'none']:>7.3f}")
        else:
            model, random = (rows[probe, features, b] for b in ("model", "random"))
            expected.append(f"{probe:<10} {features:<15} {model:>7.3f} {random:>16.3f}")
    model, random = (rows["attentive", "tokens", b] for b in ("model", "random"))
    expected.append(f"{'attentive':<10} {'tokens':<15} {model:>7.3f} {random:>16.3f}")
    assert table == [
        *expected,
        f"{'chance':<26} {0.5:>7.3f}",
        f"{'most frequent class':<26} {found['most_frequent_class']:>7.3f}",
    ]
    settings = found["settings"]
    assert (settings["split"], settings["neighbors"], settings["fps"], settings["clip_frames"]) == ("test", 18, 2.0, 3)
    assert found["classes"] == ["a", "b"] and found["train_videos"] == 18 and found["test_videos"] == 7
    again = vimpac(capsys, "probe", "model.safetensors", "store", "--labels", "labels.csv", "--epochs", 2)
    assert again == out  # and probe.json is replaced


def test_probe_without_splits(here, capsys):
    lines = [line.rpartition(",")[0] for line in (here / "labels.csv").read_text().splitlines()]
    (here / "l.csv").write_text("\n".join(lines) + "\n")
    words = ("probe", "model.safetensors", "store", "--labels", "l.csv", "--probes", "knn", "--output", "new/p.json")
    out = vimpac(capsys, *words)
    assert "accuracy on the 5 videos of the split validation, each 0.200 of it, fitted on 20 videos of 2 classes" in out
    assert (here / "new" / "p.json").exists() and not any("linear" in line or "attentive" in line for line in out)


def test_probe_in_two_processes(here):
    words = ["probe", "model.safetensors", "store", "--labels", "labels.csv", "--epochs", "1", "--output"]
    assert ranks([*words, "one.json"], 1, here / "log", small_chunks) == [0]
    one = said(here / "log-0")
    assert ranks([*words, "two.json"], 2, here / "log", small_chunks) == [0, 0]
    assert said(here / "log-0") == [line.replace("one.json", "two.json") for line in one] and not said(here / "log-1")
    first, second = (json.loads((here / name).read_text())["results"] for name in ("one.json", "two.json"))
    assert first == second


# --- similar --------------------------------------------------------------------------------------------------------------


def test_similar(here, capsys):
    out = vimpac(capsys, "similar", "model.safetensors", "store", "video-003.mp4", "--count", 3)
    assert len(out) == 3 and all(line.split()[1] != "video-003.mp4" for line in out)
    scores = [float(line.split()[0]) for line in out]
    assert scores == sorted(scores, reverse=True) and -1 <= scores[-1] <= scores[0] <= 1
    kept = vimpac(capsys, "similar", "model.safetensors", "store", "video-003.mp4", "--count", 3, "--features", "kept")
    assert kept == out and (here / "kept" / "features.safetensors").exists()


def test_similar_to_a_file(tmp_path, monkeypatch, capsys):
    """A copy of a video of the store is nearest to that video."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "videos").mkdir()
    for i in range(4):
        write_video(tmp_path / "videos" / f"{i}.mp4", noise(50) if i == 3 else greys(50, step=1 + i), codec="mpeg4")
    vimpac(capsys, "tokenize", "videos", "store", "--frame-size", 32, "--codes", 16)
    store = TokenStore("store")
    save("model.safetensors", store.tokenizer.digest, vocab_size=store.tokenizer.vocab_size)
    (tmp_path / "copy.mp4").write_bytes((tmp_path / "videos" / "2.mp4").read_bytes())
    out = vimpac(capsys, "similar", "model.safetensors", "store", "copy.mp4", "--clips", 1)
    assert len(out) == 4 and out[0].split() == ["1.0000", "2.mp4"]
    write_video(tmp_path / "short.mp4", noise(5), codec="mpeg4")  # a frame, in clips of three
    assert len(vimpac(capsys, "similar", "model.safetensors", "store", "short.mp4")) == 4
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    assert "broken.mp4 " in refused(capsys, tmp_path, "similar", "model.safetensors", "store", "broken.mp4")


# --- mistakes -------------------------------------------------------------------------------------------------------------

PROBE = "probe model.safetensors store --labels labels.csv"
MISTAKES = [
    ("features missing store out", "missing"),
    ("features model.safetensors missing out", "missing is not a folder"),
    ("features other-tokenizer.safetensors store out", "was trained on tokenizer eeeeeeeeeeee…"),
    ("features vocabulary.safetensors store out", "knows 9 codes, store was made with 11"),
    ("features model.safetensors store out --layer 2", "layer is 2, expected 1 to 1, the last, or 0 for the embedding"),
    ("features model.safetensors store out --clips 0", "clips must be at least 1, got 0"),
    ("features model.safetensors store out --batch 0", "batch must be at least 1, got 0"),
    ("features model.safetensors store out --frames 10", "a clip of 10 frames is longer than every video"),
    ("features model.safetensors store out --fps 1.5", "fps=1.5 does not divide the 2 frames a second"),
    ("features model.safetensors store labels.csv", "labels.csv is a file, expected a folder"),
    ("features model.safetensors store full", "full is not empty and holds no features"),
    (f"{PROBE} --neighbors 19", "neighbors is 19, expected 1 to 18, the number of training videos"),
    (f"{PROBE} --split validation", "the split 'validation' of labels.csv does not exist, expected one of train, test"),
    (f"{PROBE} --split train", "the split is train, on which probes are fitted"),
    (f"{PROBE} --output labels.csv", "labels.csv exists and is not a result of `vimpac probe`: give another --output"),
    (f"{PROBE} --output full", "full exists and is not a result"),
    (f"{PROBE} --label-column dance", "dance is missing"),
    ("probe model.safetensors store --labels one.csv", "training videos are of the class 'a', expected at least two classes"),
    ("probe model.safetensors store --labels strangers.csv", "2 of 2 labelled videos are not in the store, such as 'x.mp4'"),
    ("probe model.safetensors store --labels missing.csv", "the labels missing.csv do not exist"),
    (
        "similar model.safetensors store video-03.mp4",
        "expected a name of the store, such as video-023.mp4, video-013.mp4, video-003.mp4",
    ),
    ("similar model.safetensors store video-003.mp4 --layer 0 --vector contrastive", "no vector contrastive at this layer"),
    ("similar model.safetensors store video-003.mp4 --count 0", "count must be at least 1, got 0"),
    ("similar model.safetensors store video-003.mp4 --features full", "full is not empty and holds no features"),
    ("similar model.safetensors store video-003.mp4 --features other", "other holds other features: another model"),
    ("similar model.safetensors shorter video-003.mp4 --features own", "own holds other features: another store"),
]


@pytest.fixture
def mistaken(here, capsys):
    save(here / "other-tokenizer.safetensors", "e" * 64)
    weights.save(PretrainModel(tiny_model(vocab_size=9)), here / "vocabulary.safetensors")
    save(here / "other.safetensors", seed=1)
    for name in ("other", "model"):
        vimpac(capsys, "features", f"{name}.safetensors", "store", {"model": "own"}.get(name, name))
    write_store(here / "shorter", frames=(3, 4, 5, 6, 8) * 5)
    (here / "full").mkdir()
    (here / "full" / "thesis.tex").write_text("x")
    names = TokenStore("store").names
    (here / "one.csv").write_text(
        "video,label,split\n" + "".join(f"{x},a,{'train' if x < 'video-01' else 'test'}\n" for x in names)
    )
    (here / "strangers.csv").write_text("video,label\nx.mp4,a\ny.mp4,b\n")
    return here


def test_mistakes_are_one_line_before_any_work(mistaken, capsys, monkeypatch):
    monkeypatch.setattr("vimpac.evaluation.features.clip_vectors", lambda *_: pytest.fail("work has begun"))
    monkeypatch.setattr("vimpac.evaluation.attentive.States.batch", lambda *_: pytest.fail("work has begun"))
    for words, said in MISTAKES:
        error = refused(capsys, mistaken, *words.split())
        assert said in error, f"{words}: {error}"


def test_similar_in_several_processes(here):
    words = ["similar", "model.safetensors", "store", "video-003.mp4"]
    assert ranks(words, 2, here / "log") == [1, 1]
    assert "`vimpac similar` is one process, 2 were started: leave out torchrun" in (here / "log-0").read_text()


@pytest.mark.parametrize("command", ["features", "probe", "similar"])
def test_help_needs_no_torch(command):
    import subprocess

    code = (
        f"import sys; from vimpac.commands.main import main\ntry: main(['{command}', '--help'])\n"
        "except SystemExit: print('torch' in sys.modules or 'numpy' in sys.modules)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.splitlines()[-1] == "False"
