"""The end-to-end benchmark: its arithmetic, its report, and that its pipelines see what medner sees."""

import json
import shutil
import sys
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from medner import bundle as bundles
from medner.annotate import Annotator, Options
from medner.datasets import Document

ROOT = Path(__file__).parents[1]
if not (ROOT / "benchmarks").is_dir():
    pytest.skip("benchmarks are only in a checkout", allow_module_level=True)
with pytest.MonkeyPatch.context() as patch:
    patch.setattr(sys, "path", [str(ROOT / "benchmarks"), *sys.path])
    annotate, common, contenders = map(import_module, ("annotate", "common", "contenders"))

NOTES = ROOT / "examples" / "notes.jsonl"
SIZES = {"1": 10, "4": 40}


def runs(*seconds: tuple[float, float]) -> dict[str, list[dict[str, float]]]:
    """Runs at sizes 1 and 4, a pair of seconds for each round."""
    return {
        size: [{"seconds": pair[i], "cpu_seconds": 2 * pair[i], "peak_mib": 100 * (i + 1)} for pair in seconds]
        for i, size in enumerate(SIZES)
    }


# Two rounds. medner: 30 notes in 3 and 2 s, start-up 1 s. The pipeline: 30 notes in 30 and 15 s, start-up 4 s.
RUNS = {
    "medner-int8": runs((2, 5), (1 + 2 / 3, 3 + 2 / 3)),
    "medner-int8-reuse": runs((1.5, 1.6), (1.5, 1.6)),
    "transformers-stock": runs((14, 44), (9, 24)),
}


# ---------------------------------------------------------------------------------------------------------------------
# Arithmetic


def test_every_kth() -> None:
    """So many of the items remain, evenly spread; more than there are is refused."""
    assert common.every_kth("abcdefg", 3) == ["a", "c", "e"]
    assert common.every_kth("abc", 3) == common.every_kth("abc", None) == ["a", "b", "c"]
    with pytest.raises(ValueError, match=r"^4 of 3 items$"):
        common.every_kth("abc", 4)


def test_copies_have_ids_of_their_own(tmp_path: Path) -> None:
    """A corpus once and again: the same texts in order, with ids that tell the copies apart, as JSONL and back."""
    notes = [contenders.Note("a", "fever\r\n"), contenders.Note("b", "β-blocker \u2028")]
    made = annotate.copies(notes, 2)
    assert [note.id for note in made] == ["a", "b", "a#1", "b#1"]
    assert [note.text for note in made] == [*(note.text for note in notes)] * 2
    assert contenders.read_notes(annotate.write_notes(tmp_path / "n.jsonl", made)) == made


def test_rates_leave_start_up_out() -> None:
    """A rate is the slope between two sizes, start-up what the slope leaves of the smaller one."""
    assert common.rates(RUNS["medner-int8"], SIZES) == pytest.approx([10, 15])
    assert annotate.startups(RUNS["medner-int8"], SIZES) == pytest.approx([1, 1])
    assert annotate.startups(RUNS["transformers-stock"], SIZES) == pytest.approx([4, 4])


def test_noise_is_no_rate() -> None:
    """Where more notes took no longer there is no slope to read a rate from."""
    with pytest.raises(
        ValueError, match=r"^edsnlp: more notes took no longer; take more of them, or a machine that is"
    ):
        annotate.summarize({"edsnlp": runs((2, 5), (3, 2))}, SIZES)


def test_reuse_is_not_flattered_by_copies() -> None:
    """Copies are nearly free, so its rate is that of the corpus once: 10 notes in 1.5 s less 1 s of start-up."""
    assert common.rates(RUNS["medner-int8-reuse"], SIZES) == pytest.approx([300, 300])
    assert annotate.reuse_rates(RUNS["medner-int8-reuse"], RUNS["medner-int8"], SIZES) == pytest.approx([20, 20])


def test_summary() -> None:
    """Medians over the rounds; peak memory is that of the largest corpus."""
    summary = annotate.summarize(RUNS, SIZES)
    assert {name: each["rate"] for name, each in summary.items()} == pytest.approx(
        {"medner-int8": 12.5, "medner-int8-reuse": 20, "transformers-stock": 1.5}
    )
    assert {each["peak_mib"] for each in summary.values()} == {200}
    assert annotate.summarize({"medner-int8-reuse": RUNS["medner-int8-reuse"]}, SIZES) == {}


def test_ratios_are_taken_round_by_round() -> None:
    """10 / 1 and 15 / 2: the median of the rounds' ratios, held against the target where there is one."""
    table = annotate.ratio_table(annotate.summarize(RUNS, SIZES), {("medner-int8", "transformers-stock"): 8.8})
    assert table == [
        pytest.approx(
            {
                "ours": "medner-int8", "theirs": "transformers-stock",
                "median": 8.75, "lowest": 7.5, "highest": 10, "target": 8.8, "met": False,
            }
        ),
        pytest.approx(
            {
                "ours": "medner-int8-reuse", "theirs": "transformers-stock",
                "median": 15, "lowest": 10, "highest": 20, "target": None, "met": None,
            }
        ),
    ]  # fmt: skip


def test_targets_name_contenders() -> None:
    """Every target stands for two contenders that the model really has."""
    for name, targets in annotate.TARGETS.items():
        rivals = annotate.contenders(annotate.MODELS[name], 2, Path("python"))
        assert len(targets) > 1
        assert {one for pair in targets for one in pair} <= set(rivals) <= set(annotate.TITLES)


def test_compare_counts_long_segments_apart() -> None:
    """Spans that one side alone has count as differences, except where a text cannot stand for a window."""
    ours = {("a", 0, 3, "X"): 0.5, ("a", 5, 9, "X"): 0.5, ("b", 15, 17, "X"): 0.1, ("b", 20, 25, "X"): 0.5}
    theirs = {("a", 0, 3, "X"): 0.75, ("a", 5, 8, "X"): 0.5, ("b", 15, 17, "X"): 0.9}
    assert annotate.compare(ours, theirs, {"b": [(10, 30)]}) == {
        "spans": 4, "equal": 2, "explained": 1, "differences": 2, "score": 0.25
    }  # fmt: skip


def test_exact_f1() -> None:
    """Two of three found spans are gold, of three gold ones."""
    documents = [Document("a", "x" * 9, ((0, 2, "X"), (3, 5, "X"))), Document("b", "x" * 9, ((0, 2, "X"),))]
    found = annotate.exact_f1(documents, [("a", 0, 2, "X"), ("b", 0, 2, "X"), ("b", 3, 5, "X")])
    assert found["f1"] == pytest.approx(2 / 3)
    assert 0 <= found["low"] <= found["f1"] <= found["high"] <= 1


# ---------------------------------------------------------------------------------------------------------------------
# Report


@pytest.fixture(scope="module")
def result() -> dict[str, Any]:
    """A made-up result, as it is read back from JSON."""
    summary = annotate.summarize(RUNS, SIZES)
    chosen = {"chosen": {"batch-size": 8}, "tried": [{"settings": {"batch-size": 8}, "seconds": 1.0}]}
    whole = {
        "machine": {"processor": "CPU", "cpus": 2, "versions": {"medner": "1.0"}},
        "model": {"name": "minilm", "title": "MiniLM", "random": False},
        "corpus": {"name": "ACI-BENCH", "notes": 10, "characters": 12345, "sizes": [1, 4]},
        "threads": 2,
        "rounds": 2,
        "sample": 10,
        "equality": {
            "notes": 10,
            "windows_of_long_segments": 3,
            "fp32": {
                name: {"spans": 9, "equal": 8, "explained": 2, "differences": 0, "score": 1e-6}
                for name in annotate.EQUAL
            },
            "int8_agreement": 0.99,
            "reuse_changes": 0,
        },
        "absent": {"edsnlp": "its environment was not there"},
        "tuning": {"transformers-stock": chosen, "medner-int8": {"chosen": {}, "tried": []}},
        "scores": {"medner-int8": {"f1": 0.84, "low": 0.8, "high": 0.9}},
        "agreement": {"medner-int8": 0.99},
        "runs": RUNS,
        "summary": summary,
        "ratios": annotate.ratio_table(summary, annotate.TARGETS["minilm"]),
    }
    return dict(json.loads(json.dumps(whole)))


def test_section(result: dict[str, Any]) -> None:
    """Equality stands before any time; each ratio beside its target, met or not."""
    assert (
        annotate.section(result)
        == """\
## End to end: MiniLM

10 notes of ACI-BENCH (12,345 characters), once and up to 4 times; file to Parquet, whole processes, 2 threads; \
medians of 2 rounds in turn. CPU, 2 CPUs, medner 1.0.

Equality first, on medner's windows of 10 notes. 3 windows are cut from segments longer than a window, where a text \
cannot stand for a window exactly; differences there are counted apart.

| against medner, fp32 | its spans | equal | differences | in long segments | greatest score difference |
|---|---|---|---|---|---|
| transformers, skilled, PyTorch fp32 | 9 | 8 | 0 | 2 | 1.0e-06 |
| optimum, skilled, onnxruntime fp32 | 9 | 8 | 0 | 2 | 1.0e-06 |

int8 agrees with fp32 on 99.00% of spans; reuse gives the same spans and scores.

| | notes/s (lowest - highest) | start-up, s | peak, MiB | F1, NCBI test documents | spans of medner fp32 |
|---|---|---|---|---|---|
| medner, int8 | 12.5 (10.0 - 15.0) | 1.0 | 200 | 84.00 | 99.00% |
| medner, int8, with reuse | 20.0 (20.0 - 20.0) | 1.0 | 200 | - | - |
| transformers, stock, PyTorch fp32 | 1.5 (1.0 - 2.0) | 4.0 | 200 | - | - |

How many times faster than each contender (lowest - highest of the rounds):

| | medner, int8 | medner, int8, with reuse |
|---|---|---|
| transformers, stock, PyTorch fp32 | 8.75 (7.50 - 10.00), target 8: met | 15.00 (10.00 - 20.00) |

Settings, the fastest of those tried on 10 notes: transformers, stock, PyTorch fp32: batch-size 8. With reuse the \
rate is that of the corpus once, since its copies would cost nothing.
EDS-NLP, PyTorch bf16 (speed alone) is absent: its environment was not there.
"""
    )


def test_section_says_what_was_not_shown(result: dict[str, Any]) -> None:
    """A target that was missed, equality that was not checked, and random weights are all named."""
    ratios = [dict(each, met=False) if each["target"] else each for each in result["ratios"]]
    assert "| 8.75 (7.50 - 10.00), target 8: **not met** |" in annotate.section({**result, "ratios": ratios})
    assert "Equality of the spans was **not checked** in this run.\n" in annotate.section({**result, "equality": None})
    random = {**result, "equality": None, "model": {**result["model"], "random": True}}
    assert "The weights are random, so the spans mean nothing: this is speed alone.\n" in annotate.section(random)


def test_plot(result: dict[str, Any], tmp_path: Path) -> None:
    """The rates as a PNG."""
    pytest.importorskip("matplotlib")
    annotate.plot(result, tmp_path / "p.png")
    assert (tmp_path / "p.png").read_bytes()[:4] == b"\x89PNG"


# ---------------------------------------------------------------------------------------------------------------------
# Contenders


@pytest.fixture(scope="module")
def bundle(small_bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small BERT with one segment a window, as the default bundle has it."""
    path = Path(shutil.copytree(small_bert, tmp_path_factory.mktemp("bench") / "bundle"))
    loaded = bundles.load(path)
    bundles.write_manifest(path, name="small", labels=loaded.labels, window=40, packed=False, card={})
    return path


def test_slices_are_the_windows(bundle: Path) -> None:
    """Slices stand where medner's windows do: as many of them, in order, their own parts apart from one another."""
    cut = contenders.cutter(bundle)
    counted = Annotator.load(bundle, Options(device="cpu"))
    whole = 0
    for note in contenders.read_notes(NOTES):
        slices = cut(note.text)
        batch = pa.record_batch({"text": [note.text]})
        assert len(slices) == counted(batch).column("n_windows")[0].as_py()
        assert all(0 <= a.own_start < a.own_end <= b.own_start for a, b in pairwise(slices))
        assert all(s.start <= s.own_start < s.own_end <= s.end for s in slices)
        whole += sum(s.whole for s in slices)
    assert whole > 30
    long = cut("fever " * 200)
    assert len(long) > 3
    assert not any(s.whole for s in long)


@pytest.mark.parametrize("engine", ["transformers", "optimum"])
def test_skilled_pipelines_find_medners_spans(bundle: Path, small_bert: Path, tmp_path: Path, engine: str) -> None:
    """On medner's windows both engines find medner's fp32 spans, as the benchmark compares them."""
    output = tmp_path / "spans.parquet"
    _run(engine, "skilled", bundle, small_bert, output)
    annotator = Annotator.load(bundle, Options(precision="fp32", device="cpu"))
    notes = contenders.read_notes(NOTES)
    ours = {(note.id, s.start, s.end, s.label): s.score for note in notes for s in annotator(note.text)}
    found = annotate.compare(
        ours, annotate.read_spans(output), annotate.long_segments(notes, contenders.cutter(bundle))
    )
    assert found["differences"] == 0
    assert found["equal"] > 100
    assert found["score"] < 1e-4


@pytest.mark.parametrize("engine", ["transformers", "optimum"])
def test_stock_pipelines_read_whole_notes(bundle: Path, small_bert: Path, tmp_path: Path, engine: str) -> None:
    """A note longer than the model's limit is read to its end, and spans are offsets into the note."""
    output = tmp_path / "spans.parquet"
    _run(engine, "stock", bundle, small_bert, output)
    notes = {note.id: note.text for note in contenders.read_notes(NOTES)}
    rows = annotate.pq.read_table(output, schema=contenders.SPANS).to_pylist()
    assert all(row["text"] == notes[row["note_id"]][row["start"] : row["end"]] != "" for row in rows)
    longest = max(notes, key=lambda name: len(notes[name]))
    last = max(row["end"] for row in rows if row["note_id"] == longest)
    assert last > 0.9 * len(notes[longest])


def _run(engine: str, form: str, bundle: Path, small_bert: Path, output: Path) -> None:
    torch = pytest.importorskip("torch")
    threads = torch.get_num_threads()
    arguments = [NOTES, "-o", output, "--engine", engine, "--form", form, "--bundle", bundle]
    arguments += ["--checkpoint", small_bert.parent / "checkpoint", "--batch-size", 4, "--threads", 1]
    contenders.main([str(argument) for argument in arguments])
    torch.set_num_threads(threads)
