"""The other benchmarks: their corpora, their arithmetic, their small runs, and the report."""

import json
import shutil
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from medner import bundle as bundles
from medner import testing
from medner.annotate import Options

ROOT = Path(__file__).parents[1]
if not (ROOT / "benchmarks").is_dir():
    pytest.skip("benchmarks are only in a checkout", allow_module_level=True)
onnx = pytest.importorskip("onnx", reason="the floor reads graphs with onnx")
onnxruntime = pytest.importorskip("onnxruntime")
with pytest.MonkeyPatch.context() as patch:
    patch.setattr(sys, "path", [str(ROOT / "benchmarks"), *sys.path])
    common, floor, patients, rebuilt, report, reuse, scaling, soak, startup, training = map(
        import_module,
        ("common", "floor", "patients", "rebuilt", "report", "reuse", "scaling", "soak", "startup", "training"),
    )

EXAMPLES = ROOT / "examples" / "notes.jsonl"
MACHINE = {
    "benchmark": "made-up",
    "date": "2024-05-06",
    "machine": {
        "processor": "Abacus",
        "cpus": 2,
        "instruction_set": "x86_64 avx2",
        "memory_gib": 7.6,
        "python": "3.11.0",
        "versions": {"onnxruntime": "1.2.3"},
    },
}
DESCRIBED = "Abacus, 2 CPUs (x86_64 avx2), 8 GiB, onnxruntime 1.2.3, Python 3.11.0, 2024-05-06"


def texts(n: int, sentences: int = 20) -> list[str]:
    """Texts of which every sentence stands once."""
    return [" ".join(f"Text {i} has sentence {j} of {sentences}." for j in range(sentences)) for i in range(n)]


# ---------------------------------------------------------------------------------------------------------------------
# Corpora


def test_patients_follow_from_the_seed(tmp_path: Path) -> None:
    """The same seed gives the same bytes, another one others; ids are distinct and tell patient and note."""

    def written(seed: int) -> bytes:
        notes = patients.generate(texts(12), patients=3, notes_each=4, seed=seed)
        path = patients.write_notes(tmp_path / "notes.jsonl", ((note.id, note.text) for note in notes))
        return bytes(path.read_bytes())

    assert written(1) == written(1)
    assert written(1) != written(2)
    ids = [json.loads(line)["note_id"] for line in written(1).splitlines()]
    assert ids == [f"p{patient:04d}-n{number}" for patient in range(3) for number in range(1, 5)]


def test_later_notes_repeat_about_half() -> None:
    """First notes are texts as they are; of later notes 45 to 55 % stand in earlier ones, and the rest is new."""
    given = texts(60)
    notes = patients.generate(given, patients=10, notes_each=6, seed=13)
    assert all((note.text in given) == (note.number == 1) for note in notes)
    assert 0.45 <= patients.repeated_share(notes) <= 0.55
    everything = [part for note in notes for part in patients.sentences(note.text)]
    known = {part for text in given for part in patients.sentences(text)}
    assert set(everything) <= known
    # A text serves one note alone, so no two patients share a sentence.
    owners: dict[str, set[int]] = {}
    for note in notes:
        for part in patients.sentences(note.text):
            owners.setdefault(part, set()).add(note.patient)
    assert {len(found) for found in owners.values()} == {1}


def test_a_note_copies_no_sentence_twice() -> None:
    """However short the earlier notes are, each sentence stands at most once in a note."""
    notes = patients.generate([*texts(3, 2), *texts(9, 30)[3:]], patients=1, notes_each=9, seed=3)
    for note in notes:
        parts = patients.sentences(note.text)
        assert len(parts) == len(set(parts)) > 0


def test_repeated_share_by_hand() -> None:
    """Patient 1's second note: 8 of 12 characters are old. Patient 2's: none. First notes count for nothing."""
    notes = [
        patients.Note(1, 1, "A cough. Flu."),
        patients.Note(2, 1, "A rash."),
        patients.Note(1, 2, "New.\nA cough."),
        patients.Note(2, 2, "Well now."),
    ]
    assert patients.repeated_share(notes[:3]) == 8 / 12
    assert patients.repeated_share(notes) == 8 / 21
    with pytest.raises(ValueError, match=r"^no patient has a later note$"):
        patients.repeated_share(notes[:2])


def test_too_few_texts_for_the_patients() -> None:
    """A text would have to serve twice: refused."""
    with pytest.raises(ValueError, match=r"^2 patients with 3 notes need 6 texts, not 5$"):
        patients.generate(texts(5), patients=2, notes_each=3)


def test_generated_from_mtsamples(data_dir: Path, tmp_path: Path) -> None:
    """From the real texts, too, later notes repeat 45 to 55 % of their text."""
    facts = patients.generate_file(tmp_path / "notes.jsonl", patients=12, notes_each=8, seed=13)
    assert 0.45 <= facts.pop("repeated_share") <= 0.55
    assert facts == {"patients": 12, "notes_each": 8, "seed": 13}
    assert len(patients.read_texts(tmp_path / "notes.jsonl")) == 96


def test_copies_have_ids_of_their_own(tmp_path: Path) -> None:
    """Every copy of a corpus is whole, in order, and no id comes twice."""
    path = patients.write_copies(tmp_path / "copies.jsonl", ["Flu.", "Ärger."], 3)
    assert patients.read_texts(path) == ["Flu.", "Ärger."] * 3
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert [record["note_id"] for record in records] == ["0-0", "0-1", "1-0", "1-1", "2-0", "2-1"]


def test_other_digits_keep_every_position() -> None:
    """Only ASCII digits change, each into a digit, so that lengths and all other characters stay."""
    text = "BP 120/80 on 3/4, ½ tablet, ٣ days, no fever."
    changed = scaling.with_other_digits(text, scaling.random.Random(1))
    assert changed != text
    assert len(changed) == len(text)
    assert all(b.isdigit() and b.isascii() if a in "0123456789" else a == b for a, b in zip(text, changed, strict=True))
    assert scaling.with_other_digits(text, scaling.random.Random(1)) == changed


def test_corpus_of_any_size() -> None:
    """A smaller corpus begins a larger one; beyond the distinct texts they come again with other digits."""
    given = [f"Note {i}{i}: 1234567890." for i in range(4)]
    small, large = list(scaling.corpus(given, 3)), list(scaling.corpus(given, 10))
    assert large[:3] == small
    assert sorted(text for _, text in large[:4]) == given
    assert len({name for name, _ in large}) == len({text for _, text in large}) == 10
    assert {len(text) for _, text in large} == {len(given[0])}


# ---------------------------------------------------------------------------------------------------------------------
# The floor


def test_products_of_a_graph(small_bert: Path) -> None:
    """Two layers, each with four products [64, 64], one [64, 128] and one [128, 64]; and a classifier [64, 3]."""
    found = floor.matrices(bundles.load(small_bert))
    assert dict(found.int8) == {(64, 64): 8, (64, 128): 2, (128, 64): 2}
    assert dict(found.fp32) == {(64, 3): 1}
    assert (found.layers, found.hidden) == (2, 64)


def graph_of(op_type: str, weights: np.ndarray, **attributes: int) -> Any:
    """A graph of one node with a constant."""
    node = onnx.helper.make_node(op_type, ["x", "w"], ["y"], "the node", **attributes)
    return onnx.helper.make_graph([node], "g", [], [], [onnx.numpy_helper.from_array(weights, "w")])


def test_products_by_operator() -> None:
    """A transposed matrix counts as what it computes; a table that is looked up is none; the unknown is refused."""
    eight, four = np.zeros((5, 3), np.int8), np.zeros((5, 3), np.float32)
    assert floor._constant_products(graph_of("QGemm", eight, transB=1)) == ({(3, 5): 1}, {})
    assert floor._constant_products(graph_of("MatMulIntegerToFloat", eight)) == ({(5, 3): 1}, {})
    assert floor._constant_products(graph_of("MatMul", four)) == ({}, {(5, 3): 1})
    assert floor._constant_products(graph_of("Gather", eight)) == ({}, {})
    assert floor._constant_products(graph_of("Add", four)) == ({}, {})
    with pytest.raises(ValueError, match=r"^the node: is MatMulNBits, with 8-bit weights, a matrix product\?$"):
        floor._constant_products(graph_of("MatMulNBits", eight))


def test_work_by_hand() -> None:
    """Windows of 5, 3 and 8 tokens in two calls, padded to 8: 16 tokens, 24 with padding, 25 + 9 + 64 squares."""
    calls = [(np.zeros((2, 8), np.int64), np.array([5, 3])), (np.zeros((1, 8), np.int64), np.array([8]))]
    assert floor.work(calls) == floor.Work(windows=3, tokens=16, padded=24, squares=98)


def test_floor_by_hand() -> None:
    """10 tokens in windows of 4 and 6, so 52 squares; a layer of hidden size 3.

    Weights: two products of [3, 3] at 100 a second, 2 * 2 * 3 * 3 * 10 / 100 = 3.6 s, and one of [3, 5] at 200, 2 * 3 *
    5 * 10 / 200 = 1.5 s. At the best rate, 200: attention, 2 products of 2 * 52 * 3 each, 624 / 200 = 3.12 s; the
    classifier [3, 2], 2 * 3 * 2 * 10 / 200 = 0.6 s.
    """
    model = floor.Matrices({(3, 3): 2, (3, 5): 1}, {(3, 2): 1}, layers=1, hidden=3)
    todo = floor.Work(windows=2, tokens=10, padded=16, squares=52)
    seconds = floor.floor_seconds(todo, model, {(3, 3): 100.0, (3, 5): 200.0})
    assert seconds == pytest.approx({"weights": 5.1, "attention": 3.12, "classifier": 0.6})


def test_the_product_that_is_timed() -> None:
    """It computes what it should: rows less their zero point of 128, times the weights."""
    graph = floor.product_graph(6, 4)
    (weights,) = (
        onnx.numpy_helper.to_array(t) for t in onnx.load_from_string(graph).graph.initializer if t.name == "weights"
    )
    rows = np.arange(12, dtype=np.uint8).reshape(2, 6) * 20
    session = onnxruntime.InferenceSession(graph, floor._session_options(), providers=["CPUExecutionProvider"])
    (sums,) = session.run(None, {"rows": rows})
    np.testing.assert_array_equal(sums, (rows.astype(np.int32) - 128) @ weights.astype(np.int32))
    assert floor.product_rate(6, 4, 2, threads=2, seconds=0.001) > 0


def test_shares_by_operator() -> None:
    """Kernels count, whatever else the profile holds; 3 of 4 microseconds are 75 %."""

    def event(name: str, operator: str, duration: int) -> dict[str, Any]:
        return {"cat": "Node", "name": name, "dur": duration, "args": {"op_name": operator}}

    events = [
        {"cat": "Session", "name": "model_run", "dur": 99},
        event("a_kernel_time", "Add", 1),
        event("b_kernel_time", "MatMul", 1),
        event("b_fence_before", "MatMul", 50),
        event("c_kernel_time", "MatMul", 2),
    ]
    assert list(floor.shares_by_operator(events).items()) == [("MatMul", 75.0), ("Add", 25.0)]


def floor_result() -> dict[str, Any]:
    """A result with round figures: half of the time is floor, a quarter more is graph."""
    one = {
        "gflops": {"3 x 3": 800.0},
        "floor": {"weights": 8.0, "attention": 1.5, "classifier": 0.5},
        "medner_cpu_seconds": 40.0,
    }
    return MACHINE | {
        "benchmark": "floor",
        "bundle": "abc",
        "notes": 207,
        "threads": 2,
        "work": {"windows": 2, "tokens": 10, "padded": 12, "squares": 52},
        "products": [{"k": 3, "n": 3, "count": 2, "gflops": 800.0}],
        "rounds": [one],
        "share": {"median": 0.5, "lowest": 0.4, "highest": 0.6},
        "session_share": {"median": 0.625, "lowest": 0.5, "highest": 0.75},
        "target": 0.65,
        "operators": {"MatMulIntegerToFloat": 70.0, "Softmax": 19.5, "FusedMatMul": 10.0, "Shape": 0.5},
        "stages": {"reading": 1.0, "the rest": 3.0},
    }


def test_where_the_time_goes() -> None:
    """The graph is 80 % of the time, its products 64 %: 50 at their best, 10 on padding, 4 slower; in all 100 %."""
    assert floor.breakdown(floor_result()) == pytest.approx(
        {
            "matrix products at their best rate": 50,
            "the same on padding": 10,
            "products slower than that": 4,
            "other operators": 16,
            "around the graph": 20,
        }
    )


def test_the_floor_in_words() -> None:
    """Share, target and verdict, products, parts, operators of at least 1 %, stages."""
    assert floor.section(floor_result()).splitlines() == [
        "## Matrix-product floor",
        "",
        "abc in int8, 207 notes without reuse: 2 windows, 10 tokens (20.0 % padding), 2 threads, 1 rounds; "
        f"{DESCRIBED}.",
        "",
        "Medner end to end: **50.0% (40.0% to 60.0%)** of the floor; target 65%: **not met**. The session alone, on "
        "medner's own batches: 62.5% (50.0% to 75.0%).",
        "",
        "| products | how many | GFLOP/s, best of the row counts |",
        "|---|---|---|",
        "| 3 x 3 | 2 | 800 |",
        "",
        "Of the floor weights 80.0 %, attention 15.0 %, classifier 5.0 %.",
        "",
        "| where medner's time goes | % |",
        "|---|---|",
        "| matrix products at their best rate | 50.0 |",
        "| the same on padding | 10.0 |",
        "| products slower than that | 4.0 |",
        "| other operators | 16.0 |",
        "| around the graph | 20.0 |",
        "",
        "| operator (onnxruntime's profile, one thread) | % of the graph |",
        "|---|---|",
        "| MatMulIntegerToFloat | 70.0 |",
        "| Softmax | 19.5 |",
        "| FusedMatMul | 10.0 |",
        "",
        "| around the graph | processor seconds | % of medner's |",
        "|---|---|---|",
        "| reading | 1.00 | 2.5 |",
        "| the rest | 3.00 | 7.5 |",
    ]


def test_remembered_answers() -> None:
    """What was asked is answered again without the model, by ids and lengths; what was not is an error."""
    asked = []

    def model(ids: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        asked.append(lengths.tolist())
        return np.full((*ids.shape, 3), len(asked), np.float32)

    remembering = floor.Remembering(model)
    ids = np.zeros((1, 8), np.int64)
    first, second = remembering(ids, np.array([4])), remembering(ids, np.array([5]))
    assert remembering.again(ids, np.array([4])) is first
    assert remembering.again(ids, np.array([5])) is second
    assert asked == [[4], [5]]
    assert [lengths.tolist() for _, lengths in remembering.calls] == asked
    with pytest.raises(KeyError):
        remembering.again(ids, np.array([6]))


def test_a_stage_that_is_never_called(monkeypatch: pytest.MonkeyPatch, small_bert: Path) -> None:
    """A stage whose function medner does not use any more is an error, not a zero; no function stays wrapped."""
    owner = SimpleNamespace(gone=lambda: None)
    before = [getattr(where, name) for _, where, name in floor.STAGES]
    monkeypatch.setattr(floor, "STAGES", (*floor.STAGES, ("segmenting", owner, "gone")))

    def silent(ids: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        return np.zeros((*ids.shape, 3), np.float32)

    with pytest.raises(RuntimeError, match=r"^never called: gone; bring STAGES up to date$"):
        floor.stage_seconds(EXAMPLES, bundles.load(small_bert), silent, Options(threads=1))
    assert [getattr(where, name) for _, where, name in floor.STAGES[:-1]] == before


def test_a_small_run_of_the_floor(monkeypatch: pytest.MonkeyPatch, small_bert: Path, tmp_path: Path) -> None:
    """One round on the example notes gives every figure, which makes a section and a picture."""
    monkeypatch.setattr(floor, "ROWS", (16,))
    notes = patients.read_texts(EXAMPLES)
    result = floor.measure(str(small_bert), notes, rounds=1, sizes=(1, 20), threads=1)
    assert {(p["k"], p["n"], p["count"]) for p in result["products"]} == {(64, 64, 8), (64, 128, 2), (128, 64, 2)}
    (one,) = result["rounds"]
    assert one["share"] == pytest.approx(sum(one["floor"].values()) / one["medner_seconds"])
    assert one["session_share"] == pytest.approx(sum(one["floor"].values()) / one["session_seconds"])
    assert sum(result["operators"].values()) == pytest.approx(100)
    assert result["operators"].keys() & floor._INT8_PRODUCTS
    assert list(result["stages"]) == [
        *("reading", "segmenting", "tokenizing", "planning", "decoding", "the rest", "writing")
    ]
    # On a CPU windows are not padded.
    assert result["work"]["tokens"] == result["work"]["padded"] > 0
    assert floor.section(MACHINE | result | {"benchmark": "floor"}).startswith("## Matrix-product floor\n")
    assert floor.section(MACHINE | result | {"benchmark": "floor-avx2"}).startswith("## Matrix-product floor, avx2\n")
    floor.plot(result, tmp_path / "floor.png")
    assert (tmp_path / "floor.png").stat().st_size > 0


# ---------------------------------------------------------------------------------------------------------------------
# Reuse, scaling, start-up


def test_reuse_proves_equality_before_it_times(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Runs that write other bytes are refused, with no time taken."""
    commands: list[Sequence[Any]] = []

    def timed(command: Sequence[Any]) -> Any:
        commands.append(command)
        output = Path(command[command.index("-o") + 1])
        (output / "spans").mkdir(parents=True)
        (output / "spans" / "part-000000.parquet").write_bytes(bytes([len(commands)]))
        return common.Run(1.0, 1.0, 1.0)

    monkeypatch.setattr(common, "timed", timed)
    corpus = reuse.Corpus(tmp_path / "notes.jsonl", "text", {})
    with pytest.raises(SystemExit, match=r"^notes.jsonl: reuse changes the tables$"):
        reuse.measure_corpus("tiny", corpus, rounds=1, limit=None, folder=tmp_path)
    assert ["--no-reuse" in command for command in commands] == [False, True]


def test_digest_of_tables(tmp_path: Path) -> None:
    """It covers spans and notes, by name and bytes, and nothing that differs between equal runs; none is an error."""
    for run, data in (("a", b"1"), ("b", b"1"), ("c", b"2")):
        for folder in ("spans", "notes"):
            (tmp_path / run / folder).mkdir(parents=True)
            (tmp_path / run / folder / "part-000000.parquet").write_bytes(data if folder == "notes" else b"same")
        (tmp_path / run / "manifest.json").write_text(run, encoding="utf-8")
    first, second, third = (reuse.tables_digest(tmp_path / run) for run in "abc")
    assert first == second != third
    with pytest.raises(FileNotFoundError, match="no tables"):
        reuse.tables_digest(tmp_path)


def test_a_small_run_of_reuse(tmp_path: Path) -> None:
    """The example notes twice over, with the tiny model: half of all windows or more are reused, the tables equal."""
    notes = patients.write_copies(tmp_path / "notes.jsonl", patients.read_texts(EXAMPLES), 2)
    corpus = reuse.Corpus(notes, "text", {"seed": 1})
    found = reuse.measure_corpus(str(testing.bundle()), corpus, rounds=1, limit=None, folder=tmp_path)
    assert (found["seed"], found["rows"], found["identical"]) == (1, 2 * len(patients.read_texts(EXAMPLES)), True)
    assert found["windows_reused"] * 2 >= found["windows"] > 0
    ((without,), (reusing,)) = found["seconds"]["no reuse"], found["seconds"]["reuse"]
    assert found["speedup"]["median"] == without / reusing


def reuse_result(speedup: float) -> dict[str, Any]:
    """A result of one corpus."""
    spread = {"median": speedup, "lowest": 1.0, "highest": 3.0}
    one = {
        "patients": 3,
        "notes_each": 2,
        "seed": 13,
        "repeated_share": 0.512,
        "rows": 1000,
        "windows": 400,
        "windows_reused": 100,
        "seconds": {"reuse": [10.0], "no reuse": [17.0]},
        "speedup": {**spread, "median": 1.4},
        "speedup_of_slopes": spread,
        "target": 1.6,
    }
    return MACHINE | {"bundle": "abc", "rounds": 1, "limit": None, "corpora": {"patients": one}}


def test_reuse_in_words(tmp_path: Path) -> None:
    """Times, ratio, target and verdict of each corpus; a run on a part says so."""
    assert reuse.section(reuse_result(1.7)).splitlines() == [
        "## Reuse",
        "",
        f"abc bundle, whole runs in turn; {DESCRIBED}. With and without reuse the tables of spans and of notes are "
        "the same, byte for byte.",
        "",
        "| corpus | rows | windows reused | rounds | times faster | target | seconds without | with | "
        "times, with start-up |",
        "|---|---|---|---|---|---|---|---|---|",
        "| patients | 1,000 | 25.0 % | 1 | **1.70** (1.00 to 3.00) | 1.6: met | 17.0 | 10.0 | 1.40 |",
        "",
        "The patients are generated (`patients.py`, seed 13): 3 with 2 notes each. Later notes repeat 51.2% of their "
        "text from the same patient's earlier ones.",
    ]
    assert "| 1.6: **not met** |" in reuse.section(reuse_result(1.5))
    assert "abc bundle, **the first 24 rows only**, whole" in reuse.section(reuse_result(1.7) | {"limit": 24})
    reuse.plot(reuse_result(1.7), tmp_path / "reuse.png")
    assert (tmp_path / "reuse.png").stat().st_size > 0


def test_scaling_small_and_in_words(tmp_path: Path) -> None:
    """Real runs of 3 and 6 notes count all of them and give a picture."""
    result = scaling.measure(str(testing.bundle()), patients.read_texts(EXAMPLES)[:4], 3, (1, 2), 1)
    assert [(one["size"], one["notes"], len(one["runs"])) for one in result["sizes"]] == [(1, 3, 1), (2, 6, 1)]
    assert all(one["peak_mib"] > 0 for one in result["sizes"])
    assert scaling.growth(result) == result["sizes"][1]["peak_mib"] / result["sizes"][0]["peak_mib"]
    scaling.plot(result, tmp_path / "scaling.png")
    assert (tmp_path / "scaling.png").stat().st_size > 0


def scaling_result(*peaks: float) -> dict[str, Any]:
    """A result of sizes 1, 10 and so on."""
    sizes = [
        {"size": 10**i, "notes": 207 * 10**i, "notes_per_second": 40.0, "peak_mib": peak, "reused_share": 0.25}
        for i, peak in enumerate(peaks)
    ]
    return MACHINE | {"bundle": "abc", "targets": {"growth": 1.1, "mib": 1024}, "sizes": sizes}


def test_scaling_in_words() -> None:
    """Memory is judged at every size against the limit, and at the largest size against the one before."""
    assert scaling.section(scaling_result(300, 400, 432)).splitlines() == [
        "## Scaling",
        "",
        f"abc bundle with reuse, whole runs with start-up; {DESCRIBED}.",
        "",
        "| size | notes | notes/s | windows reused | peak memory, MiB |",
        "|---|---|---|---|---|",
        "| 1x | 207 | 40.0 | 25 % | 300 |",
        "| 10x | 2,070 | 40.0 | 25 % | 400 |",
        "| 100x | 20,700 | 40.0 | 25 % | 432 |",
        "",
        "- Peak memory under 1,024 MiB: met.",
        "- Peak memory at 100x is 1.08 times that at 10x; target at most 1.10: met.",
    ]
    assert scaling.section(scaling_result(300, 1200)).splitlines()[-2:] == [
        "- Peak memory under 1,024 MiB: **not met**.",
        "- Peak memory at 10x is 4.00 times that at 1x; target at most 1.10: **not met**.",
    ]
    assert scaling.growth(scaling_result(300)) is None


def test_other_words_change_some() -> None:
    """Of every forty words about one changes, by the seed alone; no word comes that the text does not have."""
    text = " ".join(f"word{chr(97 + i % 26)}{chr(97 + i // 26)}" for i in range(400))
    changed = soak.with_other_words(text, soak.random.Random(1))
    assert changed == soak.with_other_words(text, soak.random.Random(1)) != text
    assert set(changed.split()) < set(text.split())
    before, after = text.split(" "), changed.split(" ")
    kept = len(set(before) & set(after))
    assert 380 <= kept < 400
    assert len(changed) != len(text)


def test_a_corpus_of_changed_notes() -> None:
    """The first pass is the texts themselves; afterwards they come with other lengths, each time others."""
    given = [" ".join([f"text{i}", *["fever"] * 60, "12 mg"]) for i in range(3)]
    made = [text for _, text in scaling.corpus(given, 9, change=soak.with_other_words)]
    assert sorted(made[:3]) == given
    assert len(set(made)) == 9


def test_quarters_by_hand() -> None:
    """Eight seconds in four quarters, of two each; the last look belongs to the last one. Medians, not means."""
    samples = [(0.0, 1.0), (1.0, 9.0), (1.5, 2.0), (2.0, 4.0), (4.0, 5.0), (5.0, 7.0), (7.0, 8.0), (8.0, 10.0)]
    assert soak.quarters(samples) == [2.0, 4.0, 6.0, 9.0]
    with pytest.raises(ValueError, match=r"^3 samples do not fill four quarters; take more notes$"):
        soak.quarters([(0.0, 1.0), (1.0, 1.0), (8.0, 1.0)])
    with pytest.raises(ValueError, match=r"^0 samples do not fill four quarters; take more notes$"):
        soak.quarters([])


def test_a_thinned_curve_keeps_its_peaks() -> None:
    """Ten looks make five points, the higher of every two, in order."""
    samples = [(float(i), mib) for i, mib in enumerate((1.0, 5.0, 2.0, 2.0, 9.0, 3.0, 4.0, 4.5, 1.0, 0.5, 0.2))]
    assert soak.thinned(samples, 5) == [(1.0, 5.0), (2.0, 2.0), (4.0, 9.0), (7.0, 4.5), (8.0, 1.0)]
    assert soak.thinned(samples, 100) == samples
    assert soak.thinned([(0.0, 1.0), (0.0, 2.0)], 5) == [(0.0, 2.0)]


def test_a_process_is_watched_to_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """While a process runs, its memory is looked at; what it held shows, and so does its failure."""
    monkeypatch.setattr(common, "WATCH_SECONDS", 0.01)
    seen: list[float] = []
    program = "import sys; held = bytearray(100 * 2**20); sys.stdin.read(); import time; time.sleep(0.3)"
    run = common.timed([sys.executable, "-c", program], watch=lambda pid: seen.append(soak.resident_mib(pid)))
    assert 100 < max(seen) <= run.peak_mib
    with pytest.raises(RuntimeError, match=r"gave exit code 3: $"):
        common.timed([sys.executable, "-c", "import sys; sys.exit(3)"], watch=lambda _: None)


def test_a_small_run_of_soak(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Runs of both bundles that are asked for count all of their notes, and a bundle with none is left out."""
    monkeypatch.setattr(common, "WATCH_SECONDS", 0.005)
    result = soak.measure(patients.read_texts(EXAMPLES), {"tiny": 60, "default": 0})
    (one,) = result["runs"]
    assert (one["bundle"], one["notes"], one["parts"]) == ("tiny", 60, 1)
    assert one["ratio"] == one["quarters_mib"][3] / one["quarters_mib"][1]
    assert 0 < max(mib for _, mib in one["curve"]) <= one["peak_mib"] + 0.1
    assert 4 <= len(one["curve"]) <= min(one["samples"], soak.POINTS)
    soak.plot(result, tmp_path / "soak.png")
    assert (tmp_path / "soak.png").stat().st_size > 0


def test_soak_in_words() -> None:
    """Each run has its peak, its quarters and its verdict."""
    one = {"bundle": "abc", "notes": 150000, "reused_share": 0.25, "seconds": 1200.4, "peak_mib": 250.0}
    one |= {"quarters_mib": [150.0, 200.0, 205.0, 210.0], "ratio": 1.05}
    grown = one | {"bundle": "xyz", "quarters_mib": [150.0, 200.0, 205.0, 212.0], "ratio": 1.06}
    result = MACHINE | {"target": 1.05, "every_seconds": 0.25, "runs": [one, grown]}
    assert soak.section(result).splitlines() == [
        "## Soak",
        "",
        "Resident memory of whole runs with reuse, in MiB, looked at every 0.25 s: the peak, and the median of each "
        f"quarter of the time; {DESCRIBED}.",
        "",
        "| bundle | notes | windows reused | seconds | peak | 1st quarter | 2nd | 3rd | 4th | 4th / 2nd, target at "
        "most 1.05 |",
        "|---|---|---|---|---|---|---|---|---|---|",
        "| abc | 150,000 | 25 % | 1,200 | 250 | 150 | 200 | 205 | 210 | 1.050: met |",
        "| xyz | 150,000 | 25 % | 1,200 | 250 | 150 | 200 | 205 | 212 | 1.060: **not met** |",
    ]


def test_first_span() -> None:
    """The clock stops at the first record with a span; a program that ends without one is an error."""

    def prints(*records: dict[str, Any]) -> list[str]:
        lines = "\n".join(json.dumps(record) for record in records)
        return [sys.executable, "-c", f"print({lines!r})"]

    assert startup.first_span_seconds(prints({"spans": []}, {"spans": [{"start": 0}]})) > 0
    with pytest.raises(RuntimeError) as caught:
        startup.first_span_seconds(prints({"spans": []}))
    assert str(caught.value) == f"{sys.executable} gave exit code 0 and no span"


def test_startup_in_words() -> None:
    """Each case has its median, its range and its verdict; --help has no target."""
    seconds = {"ten": [1.0, 1.2, 1.1], "many": [1.5, 1.6, 1.7], "--help": [0.1, 0.1, 0.2]}
    result = MACHINE | {"bundle": "abc", "rounds": 3, "target": 1.5, "seconds": seconds}
    result |= {"first_span": {"ten": 1.1, "many": 1.6}, "help": 0.1}
    assert startup.section(result).splitlines() == [
        "## Start-up",
        "",
        f"From process start to the first span on standard output, abc bundle, median of 3 runs; {DESCRIBED}.",
        "",
        "| what | seconds | lowest to highest | target |",
        "|---|---|---|---|",
        "| ten, first span | 1.10 | 1.00 to 1.20 | under 1.5 s: met |",
        "| many, first span | 1.60 | 1.50 to 1.70 | under 1.5 s: **not met** |",
        "| `medner --help` | 0.10 | 0.10 to 0.20 |  |",
    ]


# ---------------------------------------------------------------------------------------------------------------------
# The report


@pytest.fixture
def results(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A folder with three made-up results: two of a module that draws, one of a module that does not."""

    def draw(result: dict[str, Any], path: Path) -> None:
        path.write_bytes(b"a picture")

    def say(result: dict[str, Any]) -> str:
        return f"## {result['benchmark']}\n\n{result['value']}\n"

    monkeypatch.setitem(sys.modules, "drawn", SimpleNamespace(section=say, plot=draw))
    monkeypatch.setitem(sys.modules, "startup", SimpleNamespace(section=say))
    folder = tmp_path / "results"
    folder.mkdir()
    for name, value in (("drawn-b", 2), ("drawn-a", 1), ("startup", 3)):
        text = json.dumps({"benchmark": name, "value": value})
        (folder / f"{name}.json").write_text(text, encoding="utf-8")
    return folder


def run_report(monkeypatch: pytest.MonkeyPatch, folder: Path, *arguments: str) -> None:
    """Run the command line."""
    monkeypatch.setattr(sys, "argv", ["report.py", "--results", str(folder), *arguments])
    report.main()


def test_report_stitches_what_the_results_give(monkeypatch: pytest.MonkeyPatch, results: Path) -> None:
    """Known results come in the report's order, others by name; each has its section and, where drawn, its picture."""
    run_report(monkeypatch, results)
    written = (results.parent / "RESULTS.md").read_text(encoding="utf-8")
    assert written == report.HEAD + (
        "\n## startup\n\n3\n"
        "\n## drawn-a\n\n1\n\n![drawn-a](results/drawn-a.png)\n"
        "\n## drawn-b\n\n2\n\n![drawn-b](results/drawn-b.png)\n"
    )
    assert sorted(path.name for path in results.glob("*.png")) == ["drawn-a.png", "drawn-b.png"]
    run_report(monkeypatch, results, "--check")


def test_report_check_finds_drift(monkeypatch: pytest.MonkeyPatch, results: Path) -> None:
    """A result that changed alone fails the check, and so do a missing report and a missing picture."""
    stale = r"^RESULTS\.md is not what the results give: python benchmarks/report\.py$"
    with pytest.raises(SystemExit, match=stale):
        run_report(monkeypatch, results, "--check")
    assert not (results.parent / "RESULTS.md").exists()
    run_report(monkeypatch, results)
    (results / "drawn-a.png").unlink()
    with pytest.raises(SystemExit, match=r"^no picture drawn-a\.png: python benchmarks/report\.py$"):
        run_report(monkeypatch, results, "--check")
    run_report(monkeypatch, results)
    (results / "startup.json").write_text(json.dumps({"benchmark": "startup", "value": 4}), encoding="utf-8")
    with pytest.raises(SystemExit, match=stale):
        run_report(monkeypatch, results, "--check")


# ---------------------------------------------------------------------------------------------------------------------
# Ways of training


def test_ways_of_training_are_commands() -> None:
    """Each differs from the plain one by what it says, in words that ``medner train`` takes."""
    from medner.cli import cli

    known = {name for option in cli.commands["train"].params for name in option.opts}
    variants = {variant.name: variant for variant in training.VARIANTS}
    plain = training.arguments(variants["plain"], Path("base"), 7)
    assert plain == [
        "--label", "*=Disease", f"--data={training.SENTENCES}", "--base=base", "--seed=7", "--epochs=6", "--lr=0.0002",
        "--batch-size=16", "--window=128", "--average=3",
    ]  # fmt: skip
    for name, changed in {
        "packed": {f"--data={training.DOCUMENTS}", "--epochs=3"},
        "layer-decay": {"--layer-decay=0.9"},
        "smoothing": {"--label-smoothing=0.1"},
        "class-weights": {"--class-weights"},
        "longer": {"--epochs=12"},
        "pretrained": set(),
    }.items():
        given = training.arguments(variants[name], Path("base"), 7)
        assert set(given) - set(plain) == changed
        assert {word.partition("=")[0] for word in given if word.startswith("--")} <= known


def test_trainings_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is finished is left alone, what was cut off goes on, and they share the threads."""
    ran, threads = {}, {}

    def timed(command: list[str | Path], env: dict[str, str]) -> None:
        words = [str(word) for word in command]
        name = Path(words[words.index("-o") + 1]).name
        ran[name], threads[name] = words, env["OMP_NUM_THREADS"]

    monkeypatch.setattr(training.common, "timed", timed)
    for name in ("done", "cut"):
        (tmp_path / name).mkdir()
    (tmp_path / "done" / "metrics.json").write_text("{}", encoding="utf-8")
    training.train_all({tmp_path / name: [f"--seed={name}"] for name in ("done", "cut", "new")}, workers=2)
    assert {name: words[1:] for name, words in ran.items()} == {
        "new": ["train", "--seed=new", "-o", str(tmp_path / "new")],
        "cut": ["train", "--seed=cut", "-o", str(tmp_path / "cut"), "--resume"],
    }
    assert threads == {"new": "1", "cut": "1"}
    training.train_all({tmp_path / name: [] for name in "abc"}, workers=2)
    assert [threads[name] for name in "abc"] == ["1", "1", "2"]


def test_ways_of_training_report() -> None:
    """Means over each row's own seeds with the lowest and the highest, and what averaging alone gave where it was."""
    seeds = {
        str(seed): {"sentences": 0.8 + off, "documents": 0.81, "packed": 0.79, "best_epoch": 0.8, "averaged": 0.8 + off}
        for seed, off in ((1, 0.0), (2, 0.01), (3, 0.05))
    }
    taught = {"7": {"sentences": 0.9, "documents": 0.9, "packed": 0.9, "best_epoch": 0.9, "averaged": None}}
    rows = {"plain": {"what": "plain", "seeds": seeds}, "taught": {"what": "taught", "seeds": taught}}
    assert training.section({**MACHINE, "variants": rows}) == (
        "## Ways of training\n\n"
        "F1 on the devel split of NCBI Disease, percent: the mean over seeds, with the lowest and the highest. All by "
        "`medner train` from MiniLM with ReLU, without special tokens where nothing else is said; "
        f"{DESCRIBED}.\n\n"
        "| | seeds | sentences | documents, one segment a window | documents, packed into 128 tokens |\n"
        "|---|---|---|---|---|\n"
        "| plain | 3 | **82.00** (80.00 - 85.00) | **81.00** (81.00 - 81.00) | **79.00** (79.00 - 79.00) |\n"
        "| taught | 1 | **90.00** (90.00 - 90.00) | **90.00** (90.00 - 90.00) | **90.00** (90.00 - 90.00) |\n\n"
        "The mean of the last three epochs' weights, alone: +2.00 against the best epoch (3 trainings, in the "
        "precision of training).\n"
    )
    assert "alone" not in training.section({**MACHINE, "variants": {"taught": rows["taught"]}})


def test_ways_of_training_that_were_measured_before() -> None:
    """Their rows stay, in the order of the table; rows with other options do not stand beside them."""
    same = {"options": {"epochs": 6}, "split": "devel"}
    earlier = {**same, "variants": {"taught": "old", "smoothing": "old", "plain": "old"}}
    result = training.kept({**same, "date": "now", "variants": {"smoothing": "new", "longer": "new"}}, earlier)
    assert result["date"] == "now"
    assert list(result["variants"].items()) == [
        ("plain", "old"), ("longer", "new"), ("smoothing", "new"), ("taught", "old"),
    ]  # fmt: skip
    assert training.kept({**same, "variants": {"plain": "new"}}, {})["variants"] == {"plain": "new"}
    with pytest.raises(SystemExit, match="other options"):
        training.kept({**same, "options": {}, "variants": {}}, earlier)


# ---------------------------------------------------------------------------------------------------------------------
# The default model, built again


def test_a_build_is_compared_with_what_ships(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own lowest score changes what it finds; all spans of one model are the same, on the same documents."""
    ships, again = rebuilt.build.SHIPPED, tmp_path / "again"
    shutil.copytree(ships, again)
    manifest = json.loads((again / "medner.json").read_text(encoding="utf-8"))
    manifest |= {"min_score": 0.95, "training": {"precision": "fp64"}}
    (again / "medner.json").write_text(json.dumps(manifest), encoding="utf-8")
    records = rebuilt.datasets.load(str(rebuilt.errors.RECORDS), "test")
    monkeypatch.setattr(rebuilt, "labelled", lambda: {"records": records})
    monkeypatch.setattr(rebuilt.build, "notes", lambda: records[:3])
    averaged: list[list[str]] = []
    monkeypatch.setattr(rebuilt.build, "average", lambda paths, _: averaged.append([path.name for path in paths]))
    monkeypatch.setattr(training, "score", lambda _: dict.fromkeys(training.SCORED, len(averaged) / 20))
    result = json.loads(json.dumps(rebuilt.measure(ships, again)))
    own, everything = result["scores"]
    assert (own["what"], everything["what"]) == ("own settings", "all spans")
    assert own["f1"][0] > own["f1"][1] > 0
    assert own["difference"][0] == pytest.approx(own["f1"][1] - own["f1"][0])
    assert own["difference"][2] < 0  # so many spans less are no chance
    assert everything["f1"][0] == everything["f1"][1]
    assert everything["difference"] == [0.0, 0.0, 0.0]
    assert (result["notes"], result["agreement"]) == (3, 1.0)

    text = rebuilt.section({**MACHINE, **result})
    assert f"trained in {result['bundles'][0]['trained_in']}, this one in fp64" in text
    change, low, high = (100 * value for value in own["difference"])
    assert f"| {change:+.2f} ({low:+.2f} to {high:+.2f}) | **no** |" in text
    assert "| +0.00 (+0.00 to +0.00) | yes |" in text
    named = ["named-13", "named-14", "named-15"]
    assert averaged[:4] == [["named-13"], ["named-14"], ["named-15"], named]
    assert averaged[4:] == [[f"seed{n}"] for n in range(13, 18)] + [[f"seed{n}", *named] for n in range(13, 18)]
    spread = "**60.00** (50.00 - 70.00)"
    assert f"| each student with the teachers (`--average-with`) | 5 | {spread} | {spread} | {spread} |\n" in text
    seeds = [100 * scores["packed"] for name, scores in manifest["test"].items() if name.startswith("seed")]
    spread = f"**{sum(seeds) / 5:.2f}** ({min(seeds):.2f} - {max(seeds):.2f})"
    assert f"| test packed | {spread} | {spread} |" in text
