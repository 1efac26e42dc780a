"""README.md and docs/ say what the results of the benchmarks say."""

import json
import shutil

import pytest

import render

BENCHMARKS = ("axial_attention", "info_nce", "block_mask", "dropout_add", "data", "train_step", "attn_layouts")

PAPER = {"parameters": 29.4e6, "paper_samples_per_s": 32.0, "paper_accuracy": None}


def row(impl, shape, which, ms, **more):
    return {
        "impl": impl,
        "shape": shape,
        "pass": which,
        "status": "ok",
        "ms": ms,
        "copy_share": 0.5,
        "peak_bytes": 2**20,
        **more,
    }


def axial_rows():
    speeds = {"ours": 1.0, "reference eager": 4.0, "reference compiled": 3.0, "sdpa flash": 2.5, "sdpa math": 2.0}
    for heads in ("N=8 D=64", "N=16 D=32"):
        for i, axis in enumerate("THW"):
            for which in ("forward", "forward+backward"):
                for impl, ms in speeds.items():
                    yield row(impl, f"5x16x16 {heads} axes={axis} B=8 dropout=0", which, ms + (impl == "reference eager") * i)
                yield row("sdpa cudnn", f"5x16x16 {heads} axes={axis} B=8 dropout=0", which, None, status="unavailable")


def data_rows():
    for cache, scale in (("warm", 1), ("cold", 10)):
        for impl, pairs in (("ours", 90000), ("np.load of a file a video", 9000), ("np.memmap", 45000)):
            yield row(impl, f"5x16x16 n=128 {cache}", "batch", 1.0, pairs_per_s=pairs / scale)
    yield row("ours", "5x16x16 n=128 warm", "batch+masks", 1.0, pairs_per_s=70000.0)


def train_rows(preset="small 5x128", speeds=(1200.0, 1500.0, 400.0, 1250.0), dtype="bfloat16"):
    for impl, speed in zip(render.IMPLS, speeds, strict=True):
        size = (8 if impl.startswith("ours") else 30) << 30
        yield {
            **{"impl": impl, "preset": preset, "dtype": dtype, "videos_per_s": speed},
            **{"matrix_peak_share": 0.5, "peak_bytes": size},
            **{"videos": 128, "syncs": 0, "data_wait_share": 0.004, "ms": 128e3 / speed},
        }


def both_dtypes(speeds=(1200.0, 1500.0, 400.0, 1250.0)):
    return [*train_rows(speeds=speeds, dtype="float32"), *train_rows(speeds=[2 * speed for speed in speeds])]


def made_rows(name):
    refs = ("ours", "reference eager", "reference compiled", "python loop")
    return {
        "axial_attention": lambda: axial_rows(),
        "info_nce": lambda: (row(x, f"n={n} d=256", "forward+backward", n / 10) for n in (1024, 4096) for x in refs),
        "block_mask": lambda: (
            row(x, f"{s} B=512 blocks={n}", "forward", n) for s, n in (("5x16x16", 5), ("10x32x32", 7)) for x in refs
        ),
        "data": lambda: data_rows(),
        "train_step": lambda: both_dtypes(),
        "dropout_add": lambda: (
            row(impl, "10x10", which, 1.0)
            for impl in ("ours", "ours:torch", "torch compiled", "reference eager", "reference compiled")
            for which in ("forward", "backward", "forward+backward")
        ),
        "attn_layouts": lambda: (
            row(impl, "", which, 1.0, layout=layout, norm="post", samples_per_s=5.0, **PAPER)
            for which in ("forward", "forward+backward", "step")
            for layout in ("T,H|W", "T,H,W", "T,HxW", "TxHxW")
            for impl in ("ours", "naive eager", "naive compiled")
        ),
    }[name]()


def write(root, folder, name, rows, **more):
    path = root / "benchmarks" / "results" / folder / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    result = {"device": folder, "processor": "a processor", "torch": "2.13.0", "threads": 2, "quick": False, "rows": list(rows)}
    path.write_text(json.dumps(result | more))
    return path


@pytest.fixture
def root(tmp_path):
    """The documents beside made-up results of a CPU."""
    shutil.copy(render.ROOT / "README.md", tmp_path)
    shutil.copytree(render.ROOT / "docs", tmp_path / "docs")
    for name in BENCHMARKS:
        write(tmp_path, render.CPU, name, made_rows(name))
    assert render.main([], tmp_path) == 0
    return tmp_path


def texts(root):
    return {path.name: path.read_text() for path in render.documents(root)}


def lines(root, table):
    return render.TABLES[table](render.Results(root / "benchmarks" / "results"))


def line(root, table, start):
    """Cells of the row whose title begins so."""
    (found,) = [x for x in lines(root, table) if x.startswith(f"| {start}")]
    return [x.strip() for x in found.replace(r"\|", "/").split("|")[1:-1]]


def test_documents_say_what_the_results_say(capsys):
    assert render.main(["--check"]) == 0, capsys.readouterr().out


def test_every_table_stands_somewhere():
    found = render.START.findall("\n".join(texts(render.ROOT).values()))
    assert sorted(found) == sorted(render.TABLES)


def test_rendering_twice_changes_nothing(root):
    before = texts(root)
    assert render.main([], root) == 0 and texts(root) == before
    assert render.main(["--check"], root) == 0


def test_only_tables_change(root):
    def outside(text):
        parts = [part.partition(render.END) for part in render.START.split(text)]
        return [parts[0][0], *(after for _, _, after in parts)]

    for name, text in texts(root).items():
        original = next(path for path in render.documents() if path.name == name).read_text()
        assert outside(text) == outside(original)


@pytest.mark.parametrize(
    "name, tables",
    [
        ("axial_attention", ["README.md: table cpu", "docs/kernels.md: table axial_attention-cpu"]),
        ("info_nce", ["README.md: table cpu", "docs/kernels.md: table small-ops-cpu"]),
        ("data", ["README.md: table cpu"]),
        ("train_step", ["README.md: table cpu", "docs/performance.md: table train_step-cpu"]),
        ("dropout_add", ["docs/kernels.md: table dropout_add-cpu"]),
    ],
)
def test_a_changed_number_is_named(root, name, tables, capsys):
    path, before = root / "benchmarks" / "results" / render.CPU / f"{name}.json", texts(root)
    result = json.loads(path.read_text())
    for each in result["rows"]:
        if each["impl"] == "ours":
            each |= {key: 1.1 * each[key] for key in ("ms", "pairs_per_s", "videos_per_s") if each.get(key)}
    path.write_text(json.dumps(result))
    capsys.readouterr()
    assert render.main(["--check"], root) == 1
    assert capsys.readouterr().out.splitlines() == [f"{table} is stale: python benchmarks/render.py" for table in tables]
    assert texts(root) == before  # --check writes nothing
    assert render.main([], root) == 0 and texts(root) != before
    assert render.main(["--check"], root) == 0


def test_a_number_changed_by_hand_is_named(root, capsys):
    path = root / "docs" / "kernels.md"
    text = path.read_text()
    path.write_text(text.replace("| 1.0, 1.0, 1.0 |", "| 0.9, 1.0, 1.0 |", 1))
    assert path.read_text() != text and render.main(["--check"], root) == 1
    assert "table axial_attention-cpu" in capsys.readouterr().out


TITLES = {
    "axial_attention": "`axial_attention`, forward,",
    "info_nce": "`info_nce`",
    "block_mask": "`block_mask`, 512 clips of 5",
    "data": "clip pairs of 5×16×16 on one core, warm",
    "train_step": "training step",
    "attn_layouts": "training step of a cut-down `T,H\\",
}


@pytest.mark.parametrize("name", TITLES)
def test_a_missing_file_is_not_measured_yet(root, name):
    before = lines(root, "cpu")
    assert render.NOT_YET not in "".join(before)
    (root / "benchmarks" / "results" / render.CPU / f"{name}.json").unlink()
    after = lines(root, "cpu")
    (found,) = [x for x in after if x.startswith(f"| {TITLES[name]}") and (name != "train_step" or "cut-down" not in x)]
    assert found.count(render.NOT_YET) == 3
    told = [x for x in after if render.NOT_YET in x]
    gone = len([x for x in before if x not in after and x.startswith("|")])
    assert gone - (name == "train_step") == len(told) < len(after) - 5  # it has a row for each dtype measured
    assert render.main([], root) == 0 and render.main(["--check"], root) == 0


def test_no_result_at_all(root):
    shutil.rmtree(root / "benchmarks")
    for name in render.TABLES:
        assert not [x for x in lines(root, name)[2:-2] if render.NOT_YET not in x and "block masks" not in x]


@pytest.mark.parametrize(
    "text, message",
    [
        ("<!-- table: nonsense -->\n<!-- end -->", "a.md: no table is called 'nonsense', expected one of cpu, gpu"),
        ("<!-- table: cpu -->\n", "a.md: table cpu has no <!-- end -->"),
        ("<!-- table: cpu -->\n<!-- table: gpu -->\n<!-- end -->", "a.md: table cpu has no <!-- end --> before"),
    ],
)
def test_wrong_markers(root, text, message):
    with pytest.raises(ValueError, match=message):
        render.render(text, render.Results(root), "a.md")


def test_results_of_tiny_shapes_are_refused(root):
    write(root, render.CPU, "info_nce", made_rows("info_nce"), quick=True)
    with pytest.raises(ValueError, match=r"info_nce\.json was made with --quick"):
        render.main([], root)


def test_a_row_that_is_not_there(root):
    write(root, render.CPU, "info_nce", (x for x in made_rows("info_nce") if "4096" not in x["shape"]))
    with pytest.raises(ValueError, match=r"info_nce.json has no row with .*4096"):
        render.main(["--check"], root)


def test_a_row_without_a_time_says_why(root):
    rows = [x | {"status": "skipped", "ms": None} if "compiled" in x["impl"] else x for x in made_rows("info_nce")]
    write(root, render.CPU, "info_nce", rows)
    assert line(root, "cpu", "`info_nce`")[1:4] == ["410 ms", "eager: 410 ms (1.0×)", "compiled: skipped"]


def test_cells_of_a_cpu(root):
    sdpa = "scaled_dot_product_attention: 2.0, 2.0, 2.0 ms (2.0×)"  # the fastest of them
    assert line(root, "cpu", "`axial_attention`, forward,")[1:4] == ["1.0, 1.0, 1.0 ms", "eager: 4.0, 5.0, 6.0 ms (5.0×)", sdpa]
    assert line(root, "cpu", "clip pairs of 5×16×16 on one core, cold")[1:] == [
        "9,000/s",
        "`np.load`, a file a video: 900/s (10.0×)",
        "`np.memmap`: 4,500/s (2.0×)",
        "",
    ]
    assert line(root, "cpu", "the same, warm, with block masks")[1:] == ["70,000/s", "", "", "≥ 5,000/s"]
    assert line(root, "cpu", "training step, small 5x128, float32")[1:4] == [
        "1,200 videos/s, compiled 1,500",
        "eager: 400 videos/s (3.8×)",
        "compiled: 1,250 videos/s (1.2×)",
    ]
    assert line(root, "cpu", "training step, small 5x128, bfloat16")[1] == "2,400 videos/s, compiled 3,000"
    assert lines(root, "cpu")[-1] == "Measured on a processor, 2 threads, torch 2.13.0; medians."
    write(root, render.CPU, "data", data_rows(), threads=1)
    assert lines(root, "cpu")[-1].endswith("; a processor, 1 thread, torch 2.13.0 (`data`); medians.")


def test_cells_of_the_step_on_a_cpu(root):
    assert line(root, "train_step-cpu", "videos/s")[1:7] == ["1,200", "400", "", "2,400", "800", ""]
    assert line(root, "train_step-cpu", "ms a step")[3:] == ["3.00×", "53.3", "160", "3.00×", "≥ 1.3× as fast"]
    assert line(root, "train_step-cpu", "peak memory")[1:4] == ["8,192", "30,720", "3.75×"]
    assert line(root, "train_step-cpu", "waits")[1:] == ["0", "0", "", "0", "0", "", "0"]
    write(root, render.CPU, "train_step", both_dtypes(speeds=(480.0, 500.0, 400.0, 450.0)))
    assert line(root, "train_step-cpu", "ms a step")[3:7:3] == ["1.20×, missed", "1.20×"]  # the goal is one of float32
    write(root, render.CPU, "train_step", train_rows(dtype="float32"))
    assert line(root, "train_step-cpu", "videos/s")[4:6] == [render.NOT_YET] * 2


def test_goals_of_a_gpu(root):
    slow = train_rows("small 10x128", (400.0, 450.0, 300.0, 350.0))
    write(root, render.H100, "train_step", [*train_rows(), *slow], device="NVIDIA H100 80GB HBM3", threads=None)
    assert [x.split("|")[3].strip() for x in lines(root, "gpu")[2:13]] == [
        "1,500",
        "3.8×",
        "1.2×, missed",
        "50.0%",
        render.NOT_YET,  # large-half
        "450, missed",
        render.NOT_YET,
        render.NOT_YET,
        "0.27",
        "0",
        "0.4%",
    ]
    assert lines(root, "gpu")[-1] == "Measured on NVIDIA H100 80GB HBM3, torch 2.13.0; medians."
    made = [x | {"syncs": 2, "data_wait_share": 0.02, "peak_bytes": 12 << 30} for x in train_rows()]
    write(root, render.H100, "train_step", made)
    assert [x.split("|")[3].strip() for x in lines(root, "gpu")[10:13]] == ["1.00, missed", "2, missed", "2.0%, missed"]
