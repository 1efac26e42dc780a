"""--probe-every: features of held-out labelled videos between updates."""

import pytest

from labelled import write_labelled
from runs import arguments, metrics, model_bytes, run, undrawn

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def labelled(tmp_path_factory):
    return write_labelled(tmp_path_factory.mktemp("labelled"))


def words(labelled, output, **options):
    return arguments(labelled / "tokens", output, labels=labelled / "labels.csv", **options)


@pytest.mark.parametrize("ranks", [1, 2])
def test_it_changes_nothing_but_the_metrics(labelled, tmp_path, ranks):
    plain, watched = tmp_path / "plain", tmp_path / "watched"
    run(arguments(labelled / "tokens", plain, steps=4, held_out=0.5), tmp_path / "log", ranks, undrawn)
    run(words(labelled, watched, steps=4, held_out=0.5, probe_every=2), tmp_path / "log", ranks, undrawn)
    lines = metrics(watched)
    assert [line["step"] for line in lines if "knn_accuracy" in line] == [2, 4]
    for line in lines:
        accuracy, rank = line.pop("knn_accuracy", 0.0), line.pop("effective_rank", 1.0)
        assert 0 <= accuracy <= 1 and 1 <= rank <= 12.01  # of 12 videos
    assert lines == metrics(plain) and model_bytes(watched) == model_bytes(plain)


def test_bad_labels(labelled, main, output, tmp_path):
    status, said = main(arguments(labelled / "tokens", output, probe_every=2))
    assert status == 1 and "probe_every must be left out without labels, or given with --labels FILE, got 2" in said
    few = tmp_path / "few.csv"
    (first, *lines) = (labelled / "labels.csv").read_text().splitlines()
    few.write_text("\n".join([first, *(line for line in lines if line.startswith("run/"))]))
    status, said = main(
        [*words(labelled, output, probe_every=2, held_out=0.5)[:-2], "--probe-every", "2", "--labels", str(few)]
    )
    assert status == 1 and "labelled videos of 1 class show nothing, expected at least two classes" in said
    assert not output.exists()
