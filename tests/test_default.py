"""The default bundle and the real notes: what the README promises about them."""

from __future__ import annotations

from pathlib import Path

import duckdb
import pandas as pd
import pyarrow as pa
import pytest

from medner import bundle, datasets, evaluate, run, sources
from medner.annotate import Annotator, Options


@pytest.fixture(scope="module")
def default() -> Annotator:
    """The default bundle on the CPU."""
    if not (Path(bundle.__file__).parent / "bundles" / "default").is_dir():
        pytest.skip("no default bundle in this checkout")
    return Annotator.load("default", Options(device="cpu"))


def test_what_ships(default: Annotator) -> None:
    """One int8 graph, all hashes right, at most 25 MB in all, a card, a licence, disease mentions."""
    default.bundle.check()
    assert (default.precision, list(default.bundle.variants), default.types) == ("int8", ["int8"], ("Disease",))
    files = [path for path in default.bundle.path.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 25_000_000
    assert default.bundle.card["licence"] == "Apache-2.0"
    card = (default.bundle.path / "README.md").read_text(encoding="utf-8")
    assert "Not a medical device" in card
    assert "___" in card
    assert "{" not in card


def test_scores_on_devel(default: Annotator, data_dir: Path) -> None:
    """Devel: F1 of at least 0.82 on sentences; documents, wrapped or not, lose next to nothing against them."""
    ncbi = data_dir / "ncbi-disease"
    documents = datasets.load(str(ncbi / "pubtator"), "devel")
    sentences = evaluate.evaluate(default, datasets.load(str(ncbi / "conll"), "devel"))
    whole = evaluate.evaluate(default, documents)
    wrapped = evaluate.evaluate(default, evaluate.hard_wrapped(documents, 75))
    assert (sentences.unit, whole.unit, wrapped.unit) == ("tokens", "offsets", "offsets")
    assert sentences.overall.f1 >= 0.82
    assert whole.overall.f1 >= sentences.overall.f1 - 0.005
    assert wrapped.overall.f1 >= whole.overall.f1 - 0.003
    # The card states what the bundle does; other processors may round a few words differently.
    stated = default.bundle.card["scores"]["int8, devel sentences"]["overall"]["f1"]
    assert sentences.overall.f1 == pytest.approx(stated, abs=0.003)


def texts_of(path: Path, column: str) -> list[str]:
    """The notes of a file as the reader gives them."""
    reader = sources.Reader(sources.discover([str(path)]).files, sources.ReadOptions(text_column=column))
    return list(pa.Table.from_batches(reader.batches()).column("text").to_pylist())


def check_run(output: Path, texts: list[str]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Every span is its note's text, every note is there, and pandas and DuckDB read the same tables."""
    spans, notes = pd.read_parquet(output / "spans"), pd.read_parquet(output / "notes")
    assert notes["row"].tolist() == list(range(len(texts)))
    assert (notes["status"] == "annotated").all()
    assert notes["n_chars"].tolist() == [len(text) for text in texts]
    assert notes["n_spans"].sum() == len(spans)
    columns = zip(spans["row"], spans["start"], spans["end"], spans["text"], strict=True)
    assert all(texts[row][start:end] == text and text.strip() == text != "" for row, start, end, text in columns)
    for name, frame in (("spans", spans), ("notes", notes)):
        with duckdb.connect() as database:
            counted = database.execute(f"SELECT count(*), max(row) FROM '{output}/{name}/*.parquet'").fetchone()
        assert counted == (len(frame), frame["row"].max())
    return spans, notes


def test_aci_bench(default: Annotator, data_dir: Path, tmp_path: Path) -> None:
    """All 207 visit notes are annotated with the default bundle."""
    path = data_dir / "aci-bench" / "notes.jsonl"
    run.run(run.RunOptions((str(path),), str(tmp_path / "out"), quiet=True))
    spans, notes = check_run(tmp_path / "out", texts_of(path, "text"))
    assert len(notes) == 207
    assert spans["text"].str.lower().value_counts()["hypertension"] > 20


def test_mtsamples(data_dir: Path, tmp_path: Path) -> None:
    """All 4,999 reports are there, the 33 empty ones annotated without a span."""
    path = data_dir / "mtsamples" / "mtsamples.csv"
    options = run.RunOptions(
        (str(path),), str(tmp_path / "out"), "tiny", read=sources.ReadOptions(text_column="transcription"), quiet=True
    )
    run.run(options)
    _, notes = check_run(tmp_path / "out", texts_of(path, "transcription"))
    assert len(notes) == 4999
    assert (notes["n_chars"] == 0).sum() == 33
    assert notes.loc[notes["n_chars"] == 0, ["n_tokens", "n_windows", "n_spans"]].to_numpy().sum() == 0
