"""Folder → store: the same store whatever interrupts it or shares it out, and bad files named."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from films import greys, noise, write_video
from vimpac.config import TokenizeConfig
from vimpac.data import build as tokenize_module
from vimpac.data.build import tokenize_videos
from vimpac.data.store import StoreWriter, TokenStore
from vimpac.data.tokenizers import PatchVQ, load_tokenizer
from vimpac.data.video import decode, view_set
from vimpac.errors import InputError, Stopped
from vimpac.files.atomic import LOCK, locked

CONFIG = TokenizeConfig(codes=32, frame_size=32, fps=5.0)


def run(videos, out, config=CONFIG, **options):
    return tokenize_videos(videos, out, config, progress=False, **({"workers": 1} | options))


def content(folder):
    store = TokenStore(folder)
    reads = [[store.read(n, view=v).tolist() for v in range(len(store.views))] for n in range(len(store))]
    return store.names, store.tokenizer, reads


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("videos")
    (folder / "sub").mkdir()
    for number, name in enumerate(["a.mp4", "b.avi", "c.mkv", "sub/d.mp4", "sub/e.mp4"]):
        pictures = noise(20 + 5 * number) if number % 2 else greys(30)
        write_video(folder / name, pictures, codec="mpeg4")
    return folder


@pytest.fixture(scope="module")
def whole(videos, tmp_path_factory):
    """The store of an uninterrupted run."""
    out = tmp_path_factory.mktemp("whole") / "store"
    run(videos, out)
    return out


def test_store_holds_the_encoded_frames(videos, whole):
    store = TokenStore(whole)
    assert store.names == ["a.mp4", "b.avi", "c.mkv", "sub/d.mp4", "sub/e.mp4"]
    assert store.frames.tolist() == [6, 5, 6, 7, 6]
    assert (store.fps, store.frame_size, store.grid, store.failed) == (5.0, 32, (4, 4), {})
    tokenizer = load_tokenizer(whole)
    assert store.tokenizer.digest == tokenizer.digest
    for number, name in enumerate(store.names):
        (frames,) = decode(videos / name, 5.0, 32)
        np.testing.assert_array_equal(store.read(number), tokenizer.encode(frames[0]))


def test_summary(videos, tmp_path):
    summary = run(videos, tmp_path / "store")
    assert (summary.videos, summary.frames, summary.tokens, summary.present) == (5, 30, 30 * 16, 0)
    assert summary.seconds > 0 and summary.failed == {}


def test_views_and_given_tokenizer(videos, whole, tmp_path):
    config = replace(CONFIG, views="train", flip=False, tokenizer_path=str(whole))
    run(videos, tmp_path / "store", config)
    store, tokenizer = TokenStore(tmp_path / "store"), load_tokenizer(whole)
    assert store.tokenizer.digest == tokenizer.digest and store.views == view_set("train", flip=False)
    (frames,) = decode(videos / "b.avi", 5.0, 32, store.views)
    for view in range(6):
        np.testing.assert_array_equal(store.read(1, view=view), tokenizer.encode(frames[view]))


def test_corrupt_among_good(videos, whole, tmp_path):
    mixed = tmp_path / "mixed"
    mixed.mkdir()
    for path in videos.rglob("*.*"):
        (mixed / path.relative_to(videos)).parent.mkdir(exist_ok=True)
        (mixed / path.relative_to(videos)).symlink_to(path)
    (mixed / "empty.mp4").touch()
    (mixed / "text.mp4").write_text("text")
    (mixed / "cut.avi").write_bytes((videos / "b.avi").read_bytes()[:-20_000])
    summary = run(mixed, tmp_path / "store", replace(CONFIG, tokenizer_path=str(whole)))
    assert content(tmp_path / "store") == content(whole)
    assert TokenStore(tmp_path / "store").failed == summary.failed
    assert set(summary.failed) == {"empty.mp4", "text.mp4", "cut.avi"}
    assert summary.failed["empty.mp4"] == "is an empty file" and "truncated" in summary.failed["cut.avi"]

    (mixed / "empty.mp4").unlink()
    (mixed / "empty.mp4").symlink_to(videos / "a.mp4")
    again = run(mixed, tmp_path / "store", replace(CONFIG, tokenizer_path=str(whole)))
    assert (again.videos, again.present, set(again.failed)) == (1, 5, {"text.mp4", "cut.avi"})
    assert "empty.mp4" in TokenStore(tmp_path / "store").names


def test_replaced_files_are_named(videos, whole, tmp_path):
    """A copy with other times is the same; a store that does not know its files' sizes says nothing."""
    copied, store = shutil.copytree(videos, tmp_path / "videos"), shutil.copytree(whole, tmp_path / "store")
    for path in copied.rglob("*.*"):
        os.utime(path, (0, 0))
    assert run(copied, store).changed == []
    for name in ("c.mkv", "sub/d.mp4"):
        (copied / name).write_bytes((copied / "a.mp4").read_bytes() + bytes(8))
    (copied / "a.mp4").unlink()
    (copied / "a.mp4").symlink_to("nowhere")
    summary = run(copied, store)
    assert (summary.changed, summary.present, summary.failed) == (["c.mkv", "sub/d.mp4"], 5, {})
    assert content(store) == content(whole)
    (sidecar,) = store.glob("shard*.json")
    sidecar.write_text(re.sub(r', "file_bytes": \d+|, "checksum": "\w+"', "", sidecar.read_text()))
    assert run(copied, store).changed == []


def test_fit_passes_over_corrupt_videos(videos, tmp_path):
    (tmp_path / "videos").mkdir()
    (tmp_path / "videos" / "a.mp4").symlink_to(videos / "a.mp4")
    (tmp_path / "videos" / "b.mp4").touch()
    assert run(tmp_path / "videos", tmp_path / "store").failed == {"b.mp4": "is an empty file"}


@pytest.mark.parametrize("given_tokenizer", [False, True])
def test_all_corrupt(tmp_path, whole, given_tokenizer):
    (tmp_path / "videos").mkdir()
    for number in range(5):
        (tmp_path / "videos" / f"{number}.mp4").touch()
    config = replace(CONFIG, tokenizer_path=str(whole)) if given_tokenizer else CONFIG
    with pytest.raises(InputError, match=r"none of the 5 videos.*0\.mp4 is an empty file.*and 2 more"):
        run(tmp_path / "videos", tmp_path / "store", config)
    assert not (tmp_path / "store").exists()


def test_complete_store_is_left_alone(videos, whole, tmp_path):
    before = {path.name: path.read_bytes() for path in whole.iterdir()}
    summary = run(videos, whole)
    assert (summary.videos, summary.present) == (0, 5)
    assert {path.name: path.read_bytes() for path in whole.iterdir()} == before


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"fps": 4.0}, "fps 5.0, not 4.0"),
        ({"frame_size": 40}, "frame size 32, not 40"),
        ({"views": "test"}, "not ×1 center; ×1 top-left; ×1 bottom-right"),
        ({"codes": 33}, "codes 32 and seed 0, not codes 33 and seed 0"),
        ({"seed": 1}, "not codes 32 and seed 1"),
    ],
)
def test_other_settings_than_the_store(videos, whole, changes, message):
    with pytest.raises(InputError, match=message):
        run(videos, whole, replace(CONFIG, **changes))


def test_other_tokenizer_than_the_store(videos, whole, tmp_path):
    PatchVQ.fit(noise(4, 64, 64).transpose(0, 3, 1, 2), 32).save(tmp_path / "other.safetensors")
    with pytest.raises(InputError, match="tokenizer digest"):
        run(videos, whole, replace(CONFIG, tokenizer_path=str(tmp_path / "other.safetensors")))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"frame_size": 100}, "frame size is 100, expected a positive multiple of 8"),
        ({"frame_size": 0}, "frame size is 0"),
        ({"fps": 0.0}, r"fps is 0\.0, expected a positive number"),
        ({"fps": -1.0}, "fps is -1"),
        ({"fps": float("nan")}, "fps is nan"),
        ({"codes": 1}, "codes is 1, expected 2 to 8192"),
        ({"codes": 8193}, "codes is 8193"),
        ({"seed": -1}, "seed is -1, expected 0 to 4294967295"),
        ({"seed": 2**32}, "seed is 4294967296"),
        ({"tokenizer": "dalle"}, "dalle needs tokenizer-path"),
        ({"tokenizer_path": "missing.safetensors"}, "does not exist"),
    ],
)
def test_bad_options(videos, tmp_path, changes, message):
    with pytest.raises(InputError, match=message):
        run(videos, tmp_path / "store", replace(CONFIG, **changes))
    assert not (tmp_path / "store").exists()


def test_tokenizer_of_another_kind(videos, whole, tmp_path):
    with pytest.raises(InputError, match="holds a patch-vq tokenizer, but dalle was asked for"):
        run(videos, tmp_path / "store", replace(CONFIG, tokenizer="dalle", tokenizer_path=str(whole)))


def test_bad_folders(videos, tmp_path):
    with pytest.raises(InputError, match="does not exist"):
        run(tmp_path / "missing", tmp_path / "store")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="holds no video file"):
        run(tmp_path / "empty", tmp_path / "store")
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="is a file, expected a folder for the store"):
        run(videos, tmp_path / "file")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").touch()
    with pytest.raises(InputError, match="not empty and not a token store"):
        run(videos, tmp_path / "full")
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["thesis.tex"]


def test_store_of_another_version(videos, whole, tmp_path):
    (tmp_path / "store.json").write_text('{"format": "vimpac-tokens", "version": 7}')
    with pytest.raises(InputError, match="version 7"):
        run(videos, tmp_path)


KILLED = """
import sys
from pathlib import Path
from vimpac.config import TokenizeConfig
from vimpac.data import store, tokenize

class Slow(tokenize.StoreWriter):
    def __init__(self, *arguments):
        super().__init__(*arguments, shard_seconds=0.0)  # every video a shard

    def add(self, *arguments):
        super().add(*arguments)
        if len(self.done) == 3:
            print("three", flush=True)
            import time
            time.sleep(60)

if __name__ == "__main__":
    tokenize.StoreWriter = Slow
    config = TokenizeConfig(codes=32, frame_size=32, fps=5.0)
    tokenize.tokenize_videos(sys.argv[1], sys.argv[2], config, workers=1, progress=False)
"""


def test_killed_and_resumed(videos, whole, tmp_path):
    (tmp_path / "run.py").write_text(KILLED)
    command = [sys.executable, tmp_path / "run.py", videos, tmp_path / "store"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "three\n"
    children = child_processes(process.pid)
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    with pytest.raises(InputError, match="unfinished store"):
        TokenStore(tmp_path / "store")
    summary = run(videos, tmp_path / "store")
    assert (summary.videos, summary.present) == (2, 3)
    assert content(tmp_path / "store") == content(whole)
    assert children and wait_until(lambda: not any(os.path.exists(f"/proc/{child}") for child in children))


def test_two_at_once(videos, whole, tmp_path):
    """The second is refused before it touches anything; what the first wrote so far stays and is finished."""
    (tmp_path / "run.py").write_text(KILLED)
    command = [sys.executable, tmp_path / "run.py", videos, tmp_path / "store"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "three\n"
    before = {path.name: path.read_bytes() for path in (tmp_path / "store").iterdir()}
    for config in (CONFIG, replace(CONFIG, codes=16)):
        with pytest.raises(InputError, match=f"^{tmp_path}/store is being written by another"):
            run(videos, tmp_path / "store", config)
    assert {path.name: path.read_bytes() for path in (tmp_path / "store").iterdir()} == before
    process.kill()
    process.wait()
    process.stdout.close()
    run(videos, tmp_path / "store")
    assert content(tmp_path / "store") == content(whole)


def test_two_at_once_while_the_tokenizer_is_fitted(videos, tmp_path):
    with locked(tmp_path / "store", "taken"), pytest.raises(InputError, match="is being written by another"):
        run(videos, tmp_path / "store")
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / LOCK).touch()  # of a killed run
    assert run(videos, tmp_path / "store").videos == 5
    assert {path.suffix for path in (tmp_path / "store").iterdir()} == {".json", ".bin", ".safetensors"}


def child_processes(parent):
    with open(f"/proc/{parent}/task/{parent}/children") as file:
        return file.read().split()


@pytest.fixture
def hears_ctrl_c():
    """What is started hears Ctrl-C even where the tests do not: a shell has its background jobs ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_ctrl_c_while_the_workers_start(videos, tmp_path, hears_ctrl_c):
    command = [sys.executable, "-m", "vimpac", "tokenize", videos, tmp_path / "store", "--codes=32", "--frame-size=32"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)

    def workers():
        return [child for child in child_processes(process.pid) if "_work(" in process_file(child, "cmdline")]

    assert wait_until(workers, 60)
    for worker in workers():
        (blocked,) = re.findall(r"SigBlk:\s(\w+)", process_file(worker, "status"))
        assert int(blocked, 16) & 1 << signal.SIGINT - 1, "it hears Ctrl-C from its start"
    time.sleep(0.1)  # they import
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    output, error = process.communicate(timeout=60)
    assert (process.returncode, output, error) == (130, "", "vimpac tokenize: interrupted\n")
    assert not (tmp_path / "store").exists()


def process_file(process, name):
    with open(f"/proc/{process}/{name}") as file:
        return file.read()


def wait_until(condition, seconds=10):
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.05)
    return condition()


def test_a_data_set_cannot_bring_code(videos, whole, tmp_path):
    """`vimpac tokenize . OUT` in a folder with a file for each module that is loaded here, or that Python has."""
    data = shutil.copytree(videos, tmp_path / "data")
    modules = {name.partition(".")[0] for name in [*sys.modules, *sys.stdlib_module_names]} - {"__main__", "__mp_main__"}
    for name in modules:
        (data / f"{name}.py").write_text(f"open({str(tmp_path / 'executed')!r}, 'a').write({name!r} + ' ')\n")
    (tmp_path / "bin").mkdir()
    root = Path(tokenize_module.__file__).parents[2]
    command = tmp_path / "bin" / "vimpac"  # as an installation writes it
    command.write_text(f"import sys; sys.path.append({str(root)!r}); from vimpac.commands.main import main; sys.exit(main())\n")
    words = ["tokenize", ".", tmp_path / "store", "--codes=32", "--frame-size=32", "--fps=5"]
    ended = subprocess.run([sys.executable, command, *words], cwd=data, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stderr
    assert content(tmp_path / "store") == content(whole)
    assert not (tmp_path / "executed").exists(), (tmp_path / "executed").read_text()


def test_two_ranks_make_the_same_store(videos, whole, tmp_path):
    torchrun = [sys.executable, "-m", "torch.distributed.run"]  # the command of that name may not be on PATH
    command = [*torchrun, "--standalone", "--nproc-per-node=2", "--no-python", sys.executable, "-m", "vimpac.commands.main"]
    command += ["tokenize", videos, tmp_path / "store", "--codes=32", "--frame-size=32", "--fps=5"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert "5 videos, 30 frames, 480 tokens" in result.stdout
    assert content(tmp_path / "store") == content(whole)
    assert {path.name[:11] for path in (tmp_path / "store").glob("*.bin")} == {"shard-00000", "shard-00001"}


def test_ranks_without_torchrun(videos, tmp_path, monkeypatch):
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(InputError, match="start the ranks with torchrun"):
        run(videos, tmp_path / "store", rank=0, world=2)


def waiting_after(count, event):
    """A `run_jobs` whose next result never comes after `count` of them: it calls event(n) at its n-th tick, from 0."""

    def run_jobs(job, names, workers, seconds, tick):
        for done, result in enumerate(RUN_JOBS(job, names, workers, seconds)):
            if done == count:
                break
            yield result
        for number in range(100):
            event(number)
            tick()
        raise AssertionError("it went on")

    return run_jobs


RUN_JOBS = tokenize_module.run_jobs


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_ends_a_run_between_writes_and_keeps_what_is_finished(videos, whole, tmp_path, monkeypatch, number):
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    handlers = {each: signal.signal(each, signal.default_int_handler) for each in numbers}
    config = replace(CONFIG, tokenizer_path=str(whole))
    monkeypatch.setattr(tokenize_module, "run_jobs", waiting_after(2, lambda n: os.kill(os.getpid(), number)))
    with pytest.raises(Stopped, match="the same command goes on from there") as stopped:
        run(videos, tmp_path / "store", config)
    for each, handler in handlers.items():
        assert signal.signal(each, handler) is signal.default_int_handler, "a handler was not put back"
    assert stopped.value.signal == number
    monkeypatch.undo()
    summary = run(videos, tmp_path / "store", config)
    assert (summary.present, summary.videos) == (2, 3)
    assert content(tmp_path / "store") == content(whole)


def test_shards_close_by_time_while_a_long_video_is_decoded(videos, whole, tmp_path, monkeypatch):
    class Enough(Exception):
        pass

    def event(number):
        published = len(list((tmp_path / "store").glob("shard-*.json")))
        if number == 0:
            assert not published
            time.sleep(0.3)
        else:
            assert published == 1
            raise Enough

    init = StoreWriter.__init__
    monkeypatch.setattr(StoreWriter, "__init__", lambda self, *a: init(self, *a, shard_seconds=0.3))
    monkeypatch.setattr(tokenize_module, "run_jobs", waiting_after(1, event))
    with pytest.raises(Enough):
        run(videos, tmp_path / "store", replace(CONFIG, tokenizer_path=str(whole)))


def test_deleted_videos_are_named(videos, whole, tmp_path):
    copied, store = shutil.copytree(videos, tmp_path / "videos"), shutil.copytree(whole, tmp_path / "store")
    assert run(copied, store).deleted == []
    for name in ("b.avi", "sub/d.mp4"):
        (copied / name).unlink()
    assert run(copied, store).deleted == ["b.avi", "sub/d.mp4"]
    assert content(store) == content(whole)


def test_full_disk_leaves_no_store(videos, tmp_path, monkeypatch):
    def full(self, *arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(StoreWriter, "add", full)
    with pytest.raises(OSError, match="No space left"):
        run(videos, tmp_path / "store")
    assert not (tmp_path / "store" / "store.json").exists()


def test_plain_progress_lines(videos, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tokenize_module, "REPORT_SECONDS", 0.0)
    tokenize_videos(videos, tmp_path / "store", CONFIG, workers=1)
    lines = capsys.readouterr().err.splitlines()
    for title, unit in (("fitting the tokenizer", "videos"), ("tokenizing", "frames")):
        (line,) = (line for line in lines if line.startswith(f"{title}: 5 of 5 videos"))
        rate = re.fullmatch(rf".* videos, (\d+\.\d) {unit}/s", line)
        assert rate and float(rate[1]) > 0, line


def test_rate_is_of_what_is_counted(monkeypatch, capsys):
    now = [100.0]
    monkeypatch.setattr(tokenize_module.time, "monotonic", lambda: now[0])
    report = tokenize_module._reporter(2, True, "fitting the tokenizer", "videos")
    now[0] += 20.0
    report(1)
    assert capsys.readouterr().err == "fitting the tokenizer: 1 of 2 videos, 0.1 videos/s\n"


def test_fewer_codes_are_explained(tmp_path, capsys):
    """Once, when the tokenizer is fitted, and with the true number."""
    (tmp_path / "videos").mkdir()
    write_video(tmp_path / "videos" / "a.mp4", greys(30), codec="mpeg4")
    for _ in range(2):
        tokenize_videos(tmp_path / "videos", tmp_path / "store", CONFIG, workers=1)
    codes = load_tokenizer(tmp_path / "store").vocab_size
    (line,) = (line for line in capsys.readouterr().err.splitlines() if "codes" in line)
    assert codes < 32 and line.startswith(f"the tokenizer has {codes} codes, not codes=32: only {codes} of the ")


def test_codes_that_coincide_are_explained():
    patches = np.arange(192 * 4, dtype=np.uint8).reshape(4, 192)
    for requested, reason in ((4, "only 4 of the 4 patches"), (3, "patches are so alike that codes coincide")):
        said = tokenize_module._why_fewer_codes(2, requested, patches)
        assert said.startswith(f"the tokenizer has 2 codes, not codes={requested}: {reason}")
