"""README.md and docs/ say what the results of the benchmarks say."""

import json
import re
import shutil

import pytest

import render
from documents import END, fill

BENCHMARKS = ("axial_attention", "info_nce", "block_mask", "dropout_add", "data", "train_step", "attn_layouts", "demo")
BOTH = ("forward", "forward+backward")
REFERENCES = ("ours", "reference eager", "reference compiled", "python loop")
STEPS = {"ours": 1200.0, "ours compiled": 1500.0, "naive eager": 400.0, "naive compiled": 1250.0}


def row(impl, shape, which, ms, **more):
    values = {"status": "ok", "ms": ms, "copy_share": 0.5, "peak_bytes": 2**20, "dtype": "float32"}
    return {"impl": impl, "shape": shape, "pass": which, **values, **more}


def axial_rows():
    speeds = {"ours": 1.0, "ours:sdpa": 2.0, "reference eager": 4.0, "sdpa flash": 2.5, "sdpa math": 2.0}
    for axis in "TH":
        for which in BOTH:
            shape = f"5x16x16 N=8 D=64 axes={axis} B=8 dropout=0"
            yield from (row(impl, shape, which, ms) for impl, ms in speeds.items())
            yield row("sdpa cudnn", shape, which, None, status="unavailable")


def data_rows():
    yield row("ours:cuda", "5x16x16 n=128 warm", "batch+copy", None, status="unavailable", pairs_per_s=None)
    for impl, pairs in (("ours", 9000.0), ("np.load of a file a video", 900.0), ("np.memmap", 4500.0)):
        yield row(impl, "5x16x16 n=128 cold", "batch", 1.0, pairs_per_s=pairs)


def step_rows(preset="small 5x128", speeds=STEPS, dtype="bfloat16", **more):
    for impl, speed in speeds.items():
        size = (8 if impl.startswith("ours") else 30) << 30
        values = {"preset": preset, "videos_per_s": speed, "matrix_peak_share": 0.5, "paper_videos_per_s": 32.0}
        values |= {"peak_bytes": size, "syncs": 0, "data_wait_share": 0.004, "dtype": dtype}
        yield row(impl, f"{preset} videos=4", "step", 4e3 / speed if speed else None, **values | more)


def layout_rows():
    paper = {"parameters": 29.4e6, "paper_samples_per_s": 32.0, "paper_accuracy": None, "norm": "post"}
    for layout, speed in (("T,H|W", 5.0), ("TxHxW", 2.0)):
        for impl in ("ours", "naive eager"):
            yield row(impl, layout, "step", 1.0, layout=layout, samples_per_s=speed, **paper)
            yield row(impl, layout, "forward", 1.0, layout=layout, samples_per_s=None, **paper)


def demo_rows():
    for seed in (0, 1):
        values = {"mask_accuracy": 0.5 + seed / 5, "nearest_copy_accuracy": 0.1, "top1": 0.4, "from_scratch_top1": 0.1}
        yield {"seed": seed, "videos": 256, "chance": 0.1, "demo_seconds": 200.0, "finetune_demo_seconds": 99.6, **values}


def made_rows(name):
    return {
        "axial_attention": axial_rows,
        "info_nce": lambda: (row(x, f"n={n} d=256", BOTH[1], n / 10) for n in (1024, 4096) for x in REFERENCES[:3]),
        "block_mask": lambda: (row(x, "5x16x16 B=512 blocks=5", "forward", 3.0) for x in REFERENCES),
        "data": data_rows,
        "train_step": lambda: [*step_rows(dtype="float32"), *step_rows(speeds={k: 2 * x for k, x in STEPS.items()})],
        "dropout_add": lambda: (row(x, "10x10", which, 1.0) for x in ("ours", "ours:torch") for which in (*BOTH, "backward")),
        "attn_layouts": layout_rows,
        "demo": demo_rows,
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


def cells(root, table, start):
    """Of the row that begins so."""
    (found,) = [x for x in lines(root, table) if x.startswith(f"| {start}")]
    return [x.strip() for x in found.replace(r"\|", "/").split("|")[1:-1]]


def test_documents_say_what_the_results_say(capsys):
    assert render.main(["--check"]) == 0, capsys.readouterr().out


def test_every_table_has_a_place():
    found = re.findall(r"<!-- table: (\S+) -->", "\n".join(texts(render.ROOT).values()))
    assert sorted(found) == sorted(render.TABLES)


def test_no_cell_is_a_promise():
    assert not [line for text in texts(render.ROOT).values() for line in text.splitlines() if "| not measured yet" in line]


def test_rendering_twice_changes_nothing(root):
    before = texts(root)
    assert render.main([], root) == 0 and texts(root) == before
    assert render.main(["--check"], root) == 0


def test_only_tables_change(root):
    def outside(text):
        return re.sub(rf"(<!-- table: \S+ -->\n).*?({END})", r"\1\2", text, flags=re.DOTALL)

    for path in render.documents():
        assert outside(texts(root)[path.name]) == outside(path.read_text())


@pytest.mark.parametrize(
    "name, tables",
    [
        ("axial_attention", ["README.md: table cpu", "docs/kernels.md: table kernels-cpu"]),
        ("data", ["README.md: table cpu", "docs/performance.md: table data-cpu"]),
        ("train_step", ["README.md: table cpu", "docs/performance.md: table step-cpu"]),
        ("dropout_add", ["docs/kernels.md: table kernels-cpu"]),
        ("attn_layouts", ["docs/performance.md: table layouts-cpu"]),
    ],
)
def test_a_changed_number_is_named(root, name, tables, capsys):
    path, before = root / "benchmarks" / "results" / render.CPU / f"{name}.json", texts(root)
    result = json.loads(path.read_text())
    for each in result["rows"]:
        if each["impl"] == "ours":
            each |= {x: 1.1 * each[x] for x in ("ms", "pairs_per_s", "videos_per_s", "samples_per_s") if each.get(x)}
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
    path.write_text(text.replace("| forward | 1.0 |", "| forward | 0.9 |", 1))
    assert path.read_text() != text and render.main(["--check"], root) == 1
    assert "table kernels-cpu" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["axial_attention", "info_nce", "block_mask", "data", "train_step"])
def test_what_was_not_measured_has_no_row(root, name):
    (root / "benchmarks" / "results" / render.CPU / f"{name}.json").unlink()
    titles = [title for title, benchmark, _, _ in render.LINES if benchmark != name]
    assert [x.split(" | ")[0].removeprefix("| ") for x in lines(root, "cpu")[2:-2]] == titles
    assert render.main([], root) == 0 and render.main(["--check"], root) == 0


def test_no_result_at_all(root):
    """One sentence in place of each table, which says how to measure."""
    shutil.rmtree(root / "benchmarks")
    for name in render.TABLES:
        (said,) = lines(root, name)
        assert "make gpu" in said if name.endswith("gpu") else "without a GPU" in said
    assert render.main([], root) == 0 and "`make gpu`" in (root / "README.md").read_text()


@pytest.mark.parametrize(
    "text, message",
    [
        ("<!-- table: nonsense -->\n<!-- end -->", "a.md: no table is called 'nonsense', expected one of one, two"),
        ("<!-- table: one -->\n", "a.md: table one has no <!-- end -->"),
        ("<!-- table: one -->\n<!-- table: two -->\n<!-- end -->", "a.md: table one has no <!-- end -->"),
    ],
)
def test_wrong_markers(text, message):
    with pytest.raises(ValueError, match=message):
        fill(text, "table", {"one": list, "two": list}, "a.md")


def test_results_of_tiny_shapes_are_refused(root):
    write(root, render.CPU, "info_nce", made_rows("info_nce"), quick=True)
    with pytest.raises(ValueError, match=r"info_nce\.json was made with --quick"):
        render.main([], root)


def test_seeds_are_averaged(root):
    assert cells(root, "demo", "masked tokens")[1:] == [
        "0.60 (0.50 to 0.70)",
        "a copy of the nearest visible token 0.10 (0.10 to 0.10)",
    ]
    assert cells(root, "demo", "motion of 256")[1:] == ["0.40 (0.40 to 0.40)", "from scratch 0.10 (0.10 to 0.10), chance 0.10"]
    assert lines(root, "demo")[-1].endswith(
        "; `demo` took 200 s, the two models of `finetune-demo` 100 s, the fastest of all seeds."
    )


def test_a_row_that_is_not_there(root):
    write(root, render.CPU, "info_nce", (x for x in made_rows("info_nce") if "4096" not in x["shape"]))
    with pytest.raises(ValueError, match=r"info_nce.json has no row with .*4096"):
        render.main(["--check"], root)


def test_a_peer_without_a_time(root):
    """It has no column, or says why where others of its column have one."""
    rows = [x | {"status": "skipped", "ms": None} if "compiled" in x["impl"] else x for x in made_rows("info_nce")]
    write(root, render.CPU, "info_nce", rows)
    assert "compiled" not in cells(root, "cpu", "`info_nce`")[2]
    rows[2] |= {"ms": 204.8, "status": "ok"}
    write(root, render.CPU, "info_nce", rows)
    assert cells(root, "kernels-cpu", "n=1024")[3:6] == ["102", "102 (1.0×)", "205 (2.0×)"]
    assert cells(root, "kernels-cpu", "n=4096")[3:6] == ["410", "410 (1.0×)", "skipped"]


def test_cells_of_a_cpu(root):
    assert cells(root, "cpu", "`axial_attention`")[1:] == ["1.0", "reference eager 4.0 (4.0×); fastest sdpa 2.0 (2.0×)"]
    expected = ["9,000", "np.load of a file a video 900 (10.0×); np.memmap 4,500 (2.0×)"]
    assert cells(root, "cpu", "pairs of clips")[1:] == expected
    step = "ours compiled 1,500; naive eager 400 (3.8×); naive compiled 1,250 (1.2×)"
    assert cells(root, "cpu", "training step of Small, float32")[1:] == ["1,200", step]
    assert cells(root, "cpu", "training step of Small, bfloat16")[1] == "2,400"
    assert lines(root, "cpu")[-1] == "Measured on a processor, 2 threads, torch 2.13.0; medians."
    write(root, render.CPU, "data", data_rows(), threads=1)
    assert lines(root, "cpu")[-1].endswith("; a processor, 1 thread, torch 2.13.0 (`data`); medians.")
    (forward, _) = [x for x in lines(root, "kernels-cpu") if "axes=T" in x]
    assert forward.endswith("| forward | 1.0 | 2.0 (2.0×) | 4.0 (4.0×) | 2.0 (2.0×) | 50% | 1.0 |")
    assert "backward | 1.0" in "".join(lines(root, "kernels-cpu")) and "| backward |" not in "".join(lines(root, "kernels-cpu"))
    assert "batch+copy" not in "".join(lines(root, "data-cpu"))  # a line without any number
    assert cells(root, "layouts-cpu", "`T,H")[1:] == ["29.4", "5.0", "5.0 (1.0×)"]


def test_cells_of_the_step(root):
    rows = [x for x in lines(root, "step-cpu") if "float32 | naive eager" in x or "float32 | ours |" in x]
    assert rows == [
        "| small 5x128 | float32 | ours | 1,200 | – | 50% | 8,192 | 0 | 0.40% | 32.0 |",
        "| small 5x128 | float32 | naive eager | 400 | 3.8× | 50% | 30,720 | 0 | 0.40% | 32.0 |",
    ]


def test_a_gpu_that_was_measured(root):
    """Its tables replace the sentence, in every document; a preset that did not fit in the time has no row."""
    slow = step_rows("small 10x128", {"ours": None, "ours compiled": 450.0})
    write(root, render.H100, "train_step", [*step_rows(), *slow], device="NVIDIA H100 80GB HBM3", threads=None)
    write(root, "another", "block_mask", made_rows("block_mask"), device="Another", threads=None)
    (root / "benchmarks" / "results" / "broken").mkdir()
    assert render.main([], root) == 0 and render.main(["--check"], root) == 0
    assert [x.split("|")[1:5] for x in lines(root, "gpu")[2:7]] == [
        [" small 5x128 ", " bfloat16 ", " ours ", " 1,200 "],
        [" small 5x128 ", " bfloat16 ", " ours compiled ", " 1,500 "],
        [" small 5x128 ", " bfloat16 ", " naive eager ", " 400 "],
        [" small 5x128 ", " bfloat16 ", " naive compiled ", " 1,250 "],
        [" small 10x128 ", " bfloat16 ", " ours compiled ", " 450 "],
    ]
    assert lines(root, "gpu")[7:] == ["", "Measured on NVIDIA H100 80GB HBM3, torch 2.13.0; medians."]
    assert "1,500" in (root / "README.md").read_text() and "make gpu` on a machine" not in (root / "README.md").read_text()
    assert lines(root, "kernels-gpu")[-1] == "Measured on Another, torch 2.13.0; medians."
    assert "Another" in (root / "docs" / "kernels.md").read_text()
