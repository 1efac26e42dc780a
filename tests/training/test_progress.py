import io

import pytest

from vimpac.training.progress import LINE_SECONDS, Progress


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch):
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE", "NO_COLOR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "150")


def metrics(step: int, **values) -> dict:
    line = {"step": step, "loss": 5.25, "mask_loss": 4.5, "contrastive_loss": 3.75, "mask_accuracy": 0.125}
    return line | {"learning_rate": 1e-3, "grad_norm": 2.0, "videos_per_second": 61.44} | values


def run(stream: io.StringIO, clock: Clock, steps: range, total: int, seconds_a_step: float, **options) -> None:
    with Progress(total, steps.start - 1, stream=stream, clock=clock, **options) as progress:
        for step in steps:
            clock.now += seconds_a_step
            progress.update(metrics(step))


def test_line_shows_every_value():
    stream = io.StringIO()
    run(stream, Clock(), range(1, 2), 300, 2.0)
    assert stream.getvalue() == (
        "step   1/300  loss  5.250  mask  4.500  contrastive  3.750  mask accuracy 0.125  videos/s    61.4"
        "  elapsed 0:00:02  left 0:09:58\n"
    )


def test_long_updates_say_how_far_they_are():
    stream, clock = io.StringIO(), Clock()
    with Progress(10, stream=stream, clock=clock) as progress:
        for done in range(1, 9):
            clock.now += LINE_SECONDS / 3
            progress.within(1, done, 8)
    assert stream.getvalue() == "step 1/10: 3 of 8 micro-steps\nstep 1/10: 6 of 8 micro-steps\n"


def test_missing_values_are_left_out():
    stream = io.StringIO()
    with Progress(10, stream=stream, clock=Clock()) as progress:
        progress.update({"step": 10, "loss": 1.0, "mask_loss": None})
    assert stream.getvalue() == "step 10/10  loss  1.000  elapsed 0:00:00  left 0:00:00\n"


def test_time_left_of_a_resumed_run_counts_its_own_steps():
    stream = io.StringIO()
    run(stream, Clock(), range(201, 203), 300, 3.0)
    assert "elapsed 0:00:03  left 0:04:57" in stream.getvalue().splitlines()[0]  # 99 steps of 3 s


@pytest.mark.parametrize("seconds_a_step, expected", [(0.01, [1, 50, 100, 150]), (LINE_SECONDS / 24, [1, 25, 49, 50])])
def test_lines_come_at_a_bounded_rate(seconds_a_step, expected):
    """One a twentieth of the run, or one in LINE_SECONDS where that is sooner."""
    stream = io.StringIO()
    run(stream, Clock(), range(1, 1001), 1000, seconds_a_step)
    steps = [int(line.split("/")[0].removeprefix("step")) for line in stream.getvalue().splitlines()]
    assert steps[:4] == expected and steps[-1] == 1000 and len(steps) <= 1 + 20 + 1000 // 24


def test_all_lines_align():
    stream = io.StringIO()
    run(stream, Clock(), range(1, 101), 100, 1.0)
    lines = stream.getvalue().splitlines()
    assert len({len(line) for line in lines}) == 1 and len({line.index("videos/s") for line in lines}) == 1


def test_interrupted_run_shows_its_last_step():
    stream = io.StringIO()
    with pytest.raises(KeyboardInterrupt), Progress(1000, stream=stream, clock=Clock()) as progress:
        progress.update(metrics(1))
        progress.update(metrics(2))
        raise KeyboardInterrupt
    assert [line[:11] for line in stream.getvalue().splitlines()] == ["step    1/1", "step    2/1"]


def test_notes_and_summary_are_plain_text():
    stream = io.StringIO()
    with Progress(10, stream=stream, clock=Clock()) as progress:
        progress.note("saved [bold]x[/bold] " + 200 * "y")
        progress.summary({"final": True, "step": 300, "mask_accuracy": 0.447123, "mask_loss": None})
    assert stream.getvalue().splitlines() == [
        "saved [bold]x[/bold] " + 200 * "y",
        "step           300",
        "mask accuracy  0.4471",
    ]


def test_disabled_prints_nothing():
    stream = Terminal()
    with Progress(10, enabled=False, stream=stream) as progress:
        progress.update(metrics(1))
        progress.note("hidden")
        progress.summary({"loss": 1.0})
    assert stream.getvalue() == ""


def test_dumb_terminal_gets_plain_lines(monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    dumb, file = Terminal(), io.StringIO()
    for stream in (dumb, file):
        run(stream, Clock(), range(1, 21), 20, 1.0)
    assert dumb.getvalue() == file.getvalue() and dumb.getvalue().count("\n") == 20


def test_terminal_redraws_one_line():
    stream, clock = Terminal(), Clock()
    with Progress(300, 100, stream=stream, clock=clock) as progress:
        clock.now += 1
        progress.update(metrics(101))
        clock.now += 0.01
        progress.update(metrics(102, loss=7.777))  # too soon after the last: not drawn
        clock.now += 1
        progress.update(metrics(103, contrastive_loss=None))
        progress.note("[note]")
        progress.summary({"mask_accuracy": 0.5, "final": True})
    text = stream.getvalue()
    assert "101/300  0:00:01 < 0:03:19  loss  5.250  mask  4.500  contrastive  3.750" in text
    assert "103/300  0:00:02 < 0:02:12  loss  5.250  mask  4.500  mask accuracy 0.125  videos/s    61.4" in text
    assert "7.777" not in text and "━" in text and "\x1b[2K" in text  # a bar, and lines erased
    assert text.index("103/300") < text.index("[note]") < text.rindex("mask accuracy ")
    assert text.split()[-1] == "0.5" and "\x1b[?25h" in text  # the cursor is back


def test_narrow_terminal_keeps_step_and_time_left(monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    stream, clock = Terminal(), Clock()
    with Progress(300, stream=stream, clock=clock) as progress:
        clock.now += 1
        progress.update(metrics(1))
    assert "  1/300  0:00:01 < 0:04:59  loss  5.250" in stream.getvalue() and "━" not in stream.getvalue()


@pytest.mark.parametrize(
    "columns, shown, left_out",
    [
        (119, ["loss  5.250", "mask  4.500", "contrastive  3.750", "mask accuracy 0.125", "videos/s    61.4"], []),
        (107, ["loss  5.250", "mask  4.500", "contr.  3.750", " accuracy 0.125", "videos/s 61.4"], ["mask accuracy"]),
        (80, ["loss  5.250", " accuracy 0.125", "videos/s 61.4"], ["contr", "mask"]),
        (70, ["loss  5.250", " accuracy 0.125"], ["videos/s"]),
        (50, ["loss  5.250"], ["accuracy"]),
    ],
)
def test_narrow_terminals_keep_accuracy_and_speed(monkeypatch, columns, shown, left_out):
    """80 columns cut both off, and showed three losses."""
    monkeypatch.setenv("COLUMNS", str(columns))
    stream, clock = Terminal(), Clock()
    with Progress(100000, stream=stream, clock=clock) as progress:
        clock.now += 3600 * 5
        progress.update(metrics(10000))
        (line,) = [part for part in stream.getvalue().splitlines() if " 10000/100000  5:00:00 < 45:00:00" in part]
    assert all(text in line for text in shown) and not any(text in line for text in left_out) and "…" not in line


def test_notes_cannot_steer_the_terminal():
    stream = Terminal()
    with Progress(10, stream=stream, clock=Clock()) as progress:
        progress.note("run\x1b]0;title\x07\nsecond")
    assert "run\\x1b]0;title\\x07\\nsecond\n" in stream.getvalue()
