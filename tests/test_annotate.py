"""The annotator: nothing lost, exact offsets, and spans that depend on the note and the model alone."""

from __future__ import annotations

import functools
import hashlib
import json
import math
import multiprocessing
import pickle
import random
import shutil
import sys
import threading
import tracemalloc
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

from medner import Annotator, Options, Span, annotate, load, schema, testing, windows
from medner import bundle as bundles
from medner.errors import InputError, ModelError, UsageError

#: The tiny bundle's mention words in the order that decides their logits.
WORDS = ("asthma", "breast", "cancer", "diabetes", "fever", "heart", "failure", "mellitus", "type", "2")
COUNTS = ["n_chars", "n_tokens", "n_unknown", "n_windows", "n_spans"]

Row = list[dict[str, Any]] | None


def score(phrase: str) -> float:
    """The tiny bundle's score of a mention, from its logits: the first word's tag is B-, the others' I-."""
    numbers = [WORDS.index(word) for word in phrase.lower().split()]
    first = 1 / (1 + math.exp(-4 - 0.1 * numbers[0]) + math.exp(-2 - 0.1 * numbers[0]))
    rest = [1 / (1 + math.exp(-4) + math.exp(0.1 * number - 2)) for number in numbers[1:]]
    return sum([first, *rest]) / len(numbers)


def as_batch(notes: Sequence[str | None], kind: pa.DataType | None = None) -> pa.RecordBatch:
    """Notes as a batch of one column."""
    return pa.record_batch({"text": pa.array(notes, kind or pa.string())})


def rows(annotator: Annotator, batches: Sequence[pa.RecordBatch]) -> list[Row]:
    """The spans of each row of a stream; scores as Python floats, so that equal means equal bit for bit."""
    return [row for batch in annotator.stream(batches) for row in batch.column("spans").to_pylist()]


def mentions(annotator: Annotator, text: str) -> list[str]:
    """Text of each span, after checking that offsets hold."""
    found = annotator(text)
    check_offsets(text, found)
    return [span.text for span in found]


@functools.cache
def splitter() -> Tokenizer:
    """BERT's basic tokenizer in the tokenizers library."""
    made = Tokenizer(models.WordLevel({"?": 0}, unk_token="?"))
    made.normalizer = normalizers.BertNormalizer(lowercase=False, strip_accents=False)
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return made


def check_offsets(text: str, spans: Sequence[Span]) -> None:
    """Spans lie in the note, ascend, hold their text, begin and end at words, and never in white space."""
    offsets = splitter().encode(text, add_special_tokens=False).offsets
    starts, ends = {start for start, _ in offsets}, {end for _, end in offsets}
    before = 0
    for span in spans:
        assert before <= span.start < span.end <= len(text)
        assert text[span.start : span.end] == span.text == span.text.strip()
        assert span.start in starts
        assert span.end in ends
        before = span.end


def worker_threads() -> list[str]:
    """Names of the annotator's threads that run now."""
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("medner-")]


# ---------------------------------------------------------------------------------------------------------------------
# Rows in, rows out


def test_spans_and_counts_worked_by_hand(tiny: Annotator) -> None:
    """Every added column of four tiny notes.

    Tokens: type 2 diabetes , n ##o fever . (8, of them 1 window, 2 spans); b r ##a and the unknown word in two words
    (b is ##-continued by nothing, so ``b`` 1, ``ßx`` [UNK] 1); 41 tokens in two overlapping windows of 30.
    """
    notes = ["Type 2 diabetes, no fever.", "b ßx", "", None, "x " * 40 + "fever", " \n"]
    made = tiny(as_batch(notes))
    expected = {
        "n_chars": [26, 4, 0, 0, 85, 2],
        "n_tokens": [8, 2, 0, 0, 41, 0],
        "n_unknown": [0, 1, 0, 0, 0, 0],
        "n_windows": [1, 1, 0, 0, 2, 0],
        "n_spans": [2, 0, 0, 0, 1, 0],
    }
    assert {name: made.column(name).to_pylist() for name in COUNTS} == expected
    digests = [None if note is None else hashlib.sha256(note.encode()).hexdigest() for note in notes]
    assert made.column("text_sha256").to_pylist() == digests
    assert made.column("text").to_pylist() == notes
    spans = made.column("spans").to_pylist()
    fever = {"label": "Disease", "score": pytest.approx(score("fever"), abs=1e-6)}
    diabetes = {"start": 0, "end": 15, "label": "Disease", "score": pytest.approx(score("type 2 diabetes"), abs=1e-6)}
    assert spans == [
        [diabetes, {"start": 20, "end": 25, **fever}],
        [],
        [],
        None,
        [{"start": 80, "end": 85, **fever}],
        [],
    ]


def test_output_schema_is_known_before(tiny: Annotator) -> None:
    """What comes out has the schema that was announced, the input's columns and metadata included."""
    extra = pa.field("ward", pa.int16(), nullable=False, metadata={"k": "v"})
    given_schema = pa.schema([extra, pa.field("text", pa.large_string())], metadata={"origin": "ward 3"})
    batch = pa.RecordBatch.from_arrays([pa.array([3, 1], pa.int16()), pa.array(["fever", None])], schema=given_schema)
    made = tiny(batch)
    assert made.schema.equals(tiny.output_schema(given_schema), check_metadata=True)
    assert made.schema.names == ["ward", "text", *schema.ANNOTATION.names]
    assert made.column("ward").equals(batch.column("ward"))
    made.validate(full=True)


@pytest.mark.parametrize(
    "kind",
    [
        pa.string(),
        pa.large_string(),
        pa.string_view(),
        pa.dictionary(pa.int8(), pa.string()),
        pa.dictionary(pa.int32(), pa.large_string()),
        pa.dictionary(pa.int32(), pa.string_view()),
    ],
    ids=str,
)
def test_text_types_and_slices(tiny: Annotator, kind: pa.DataType) -> None:
    """Every string type gives the same spans, also in the middle of a larger batch; the column stays as it was."""
    notes = ["asthma", "no fever", None, "", "Zoë has breast cancer 🙂 fever", "asthma", "x"]
    plain = pa.array(notes, pa.string())
    if pa.types.is_dictionary(kind):
        encoded = plain.dictionary_encode()
        indices, values = encoded.indices.cast(kind.index_type), encoded.dictionary.cast(kind.value_type)
        column = pa.DictionaryArray.from_arrays(indices, values)
    else:
        column = plain.cast(kind)
    batch = pa.record_batch({"n": pa.array(range(7)), "text": column})
    expected = rows(tiny, [as_batch(notes)])
    assert [row if row is None else len(row) for row in expected] == [1, 1, None, 0, 2, 1, 0]
    assert rows(tiny, [batch]) == expected
    for start in range(7):
        for length in range(8 - start):
            part = tiny(batch.slice(start, length))
            assert part.column("spans").to_pylist() == expected[start : start + length]
            assert part.column("n").to_pylist() == list(range(start, start + length))
            assert part.schema.field("text").type == kind


@settings(max_examples=60, deadline=None)
@given(
    notes=st.lists(st.none() | st.sampled_from(["", "fever", "x " * 70, "no asthma\n\nfever"]), max_size=12),
    cuts=st.lists(st.integers(0, 12), max_size=6),
)
def test_rows_and_batches_come_back_in_order(notes: list[str | None], cuts: list[int]) -> None:
    """Any split into batches, empty ones included, comes back batch by batch with the rows that went in."""
    batch = as_batch(notes)
    bounds = [*sorted({min(cut, len(notes)) for cut in cuts} | {0, len(notes)}), len(notes)]
    batches = [batch.slice(low, high - low) for low, high in pairwise(bounds)]
    made = list(TINY.stream(batches))
    assert [part.num_rows for part in made] == [part.num_rows for part in batches]
    assert [text for part in made for text in part.column("text").to_pylist()] == notes
    for text, spans in zip(notes, (row for part in made for row in part.column("spans").to_pylist()), strict=True):
        assert spans == (None if text is None else as_dicts(TINY(text)))


def as_dicts(spans: Sequence[Span]) -> list[dict[str, Any]]:
    """Spans of the single-note call as they stand in a batch."""
    return [{"start": s.start, "end": s.end, "label": s.label, "score": s.score} for s in spans]


TINY = testing.annotator()


def test_nothing_to_annotate(tiny: Annotator) -> None:
    """An empty stream gives no batch; a batch without rows gives one without rows, with the full schema."""
    assert list(tiny.stream([])) == []
    made = tiny(as_batch([]))
    assert made.num_rows == 0
    assert made.schema == tiny.output_schema(as_batch([]).schema)


def test_single_note(tiny: Annotator) -> None:
    """A string gives a list of spans, whatever the text column is called."""
    (span,) = tiny("Known asthma.")
    assert span == Span(6, 12, "Disease", pytest.approx(score("asthma"), abs=1e-6), "asthma")  # type: ignore[arg-type]
    assert tiny("") == tiny(" ") == []
    assert testing.annotator(Options(text_column="body"))("Known asthma.") == [span]
    assert load("tiny")("Known asthma.") == [span]


def test_lone_surrogates_are_refused(tiny: Annotator) -> None:
    """Such a string is no text; the message does not hold it."""
    with pytest.raises(InputError) as caught:
        tiny("secret \ud800")
    assert str(caught.value) == "the note holds lone surrogates; it is not Unicode text"


def test_bytes_that_are_not_utf8_are_refused(tiny: Annotator) -> None:
    """An Arrow string column may hold anything; the message names the column and not the text."""
    column = pa.Array.from_buffers(
        pa.string(), 1, [None, pa.py_buffer(np.array([0, 3], np.int32)), pa.py_buffer(b"ab\xff")]
    )
    with pytest.raises(InputError) as caught:
        tiny(pa.record_batch({"text": column}))
    assert str(caught.value) == "column 'text' holds bytes that are not UTF-8"


def test_columns_that_cannot_be_annotated(tiny: Annotator) -> None:
    """No text column, one that is no text, and one of an added name; see test_schema for all messages."""
    cases = {
        "no column 'text' in the batch; it has note": pa.record_batch({"note": ["fever"]}),
        "column 'text' holds int64, not text; cast it to a string first": pa.record_batch({"text": [1]}),
        "the batch already has a column 'spans', which the annotation adds; rename it first": pa.record_batch(
            {"text": ["fever"], "spans": ["x"]}
        ),
    }
    for message, batch in cases.items():
        with pytest.raises(InputError) as caught:
            tiny(batch)
        assert str(caught.value) == message
        with pytest.raises(InputError, match=message):
            tiny.output_schema(batch.schema)
    assert worker_threads() == []


def test_min_score_leaves_spans_out() -> None:
    """Spans below the limit are neither listed nor counted; the others are unchanged."""
    note = "asthma, type 2 diabetes, fever"
    everything = testing.annotator()(note)
    assert [span.text for span in everything] == ["asthma", "type 2 diabetes", "fever"]
    limit = sorted(span.score for span in everything)[1]
    strict = testing.annotator(Options(min_score=limit))
    assert strict(note) == [span for span in everything if span.score >= limit]
    assert strict(as_batch([note])).column("n_spans").to_pylist() == [2]


@pytest.mark.parametrize(("asked", "left"), [(None, 2), (0.0, 3), (1.0, 0)])
def test_min_score_of_the_bundle(asked: float | None, left: int) -> None:
    """It counts where nobody asks for another; zero asks for all spans."""
    tiny = testing.annotator()
    note = "asthma, type 2 diabetes, fever"
    limit = sorted(span.score for span in tiny(note))[1]
    bundle = replace(tiny.bundle, min_score=limit)
    annotator = Annotator(bundle, tiny.session, Options(min_score=asked), precision="fp32")
    assert len(annotator(note)) == left


def test_what_is_no_batch(tiny: Annotator) -> None:
    """A table, or anything else, is refused by its name before any work; so are two columns of notes."""
    for other, name in ((pa.table({"text": ["fever"]}), "Table"), (["fever"], "list"), (None, "NoneType")):
        with pytest.raises(InputError) as caught:
            tiny(other)  # type: ignore[call-overload]
        assert str(caught.value) == (
            f"a text or a pyarrow.RecordBatch is needed, not {name}; a table's to_batches() gives batches"
        )
    with pytest.raises(InputError, match="RecordBatch is needed, not ChunkedArray"):
        list(tiny.stream(pa.table({"text": ["fever"]})))  # type: ignore[arg-type]
    twice = pa.record_batch([pa.array(["a"]), pa.array(["b"])], names=["text", "text"])
    with pytest.raises(InputError, match="the batch has more than one column 'text'; rename all but one"):
        tiny(twice)


def test_options_out_of_range() -> None:
    """Numbers that cannot be are refused before a model is loaded."""
    for changes, said in (
        ({"min_score": float("nan")}, "min_score is nan; it must lie between 0 and 1"),
        ({"min_score": 1.5}, "min_score is 1.5; it must lie between 0 and 1"),
        ({"threads": 0}, "threads is 0; it must be 1 or more"),
        ({"batch_tokens": -1}, "batch_tokens is -1; it must be 1 or more"),
    ):
        with pytest.raises(UsageError) as caught:
            Options(**changes)  # type: ignore[arg-type]
        assert str(caught.value) == said


# ---------------------------------------------------------------------------------------------------------------------
# Streams, threads and processes


def test_batches_without_a_row_are_not_hoarded(tiny: Annotator) -> None:
    """They come out again as they come in, however many there are."""
    read = 0

    def endless() -> Iterator[pa.RecordBatch]:
        nonlocal read
        while True:
            read += 1
            yield as_batch([])

    stream = tiny.stream(endless())
    assert [next(stream).num_rows for _ in range(10)] == [0] * 10
    assert read < 20_000
    stream.close()  # type: ignore[attr-defined]
    mixed = [as_batch([]), as_batch(["fever"]), as_batch([]), as_batch([])]
    assert [len(batch) for batch in tiny.stream(mixed)] == [0, 1, 0, 0]


def test_pickles_as_its_recipe(tiny: Annotator) -> None:
    """Path and options travel; the copy gives the same answers."""
    annotator = testing.annotator(Options(window=16, threads=1, min_score=0.5))
    copy = pickle.loads(pickle.dumps(annotator))
    assert (copy.bundle, copy.options, copy.precision) == (annotator.bundle, annotator.options, "fp32")
    assert copy("No fever.") == annotator("No fever.") == tiny("No fever.")
    assert len(pickle.dumps(annotator)) < 1000
    assert annotator.__reduce__()[1] == ("tiny", annotator.options)


def test_a_copy_finds_its_model_in_any_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker in another directory takes the model that was named, not one of that name elsewhere."""
    shutil.copytree(testing.bundle(), tmp_path / "models" / "mine")
    monkeypatch.chdir(tmp_path)
    recipe = pickle.dumps(Annotator.load("models/mine", Options(threads=1)))
    monkeypatch.chdir(tmp_path / "models")
    assert pickle.loads(recipe).bundle.path == tmp_path / "models" / "mine"


def test_a_copy_made_in_another_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The path is that of when the model was loaded, and what ships is meant by its name, whatever lies there."""
    shutil.copytree(testing.bundle(), tmp_path / "mine")
    monkeypatch.chdir(tmp_path)
    own, shipped = Annotator.load("mine"), Annotator.load("tiny")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    Path("mine").mkdir()
    Path("tiny").mkdir()
    assert pickle.loads(pickle.dumps(own)).bundle.path == tmp_path / "mine"
    assert pickle.loads(pickle.dumps(shipped)).bundle.path == shipped.bundle.path
    for directory in ("./tiny", Path("tiny")):
        with pytest.raises(ModelError, match=r"no config\.json"):
            Annotator.load(directory)


def test_works_in_a_spawned_process(tiny: Annotator) -> None:
    """An annotator is itself the function that a process pool calls."""
    batch = as_batch(["No fever.", None, ""])
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        there: Any = pool.submit(tiny, batch).result()
    assert there.equals(tiny(batch))


def test_other_models_cannot_be_pickled(tiny: Annotator) -> None:
    """There is no recipe for a model object that somebody passed in."""
    annotator = Annotator(tiny.bundle, zeros, Options(), precision="fp32")
    with pytest.raises(TypeError, match="an annotator of a model that is no bundle cannot be pickled"):
        pickle.dumps(annotator)


def zeros(ids: windows.Ints, lengths: windows.Ints) -> Any:
    """A model without an opinion."""
    return np.zeros((*ids.shape, 3), np.float32)


def test_a_stream_closed_early_leaves_no_threads() -> None:
    """Whoever stops reading gets rid of the threads, even in the middle of an endless input."""

    def endless() -> Iterator[pa.RecordBatch]:
        while True:
            yield as_batch(["x fever " * 1000] * 4)

    stream = testing.annotator(Options(threads=2)).stream(endless())
    assert next(stream).num_rows == 4
    assert worker_threads()
    stream.close()  # type: ignore[attr-defined]
    assert worker_threads() == []


@pytest.mark.parametrize("good", [0, 1, 40])
def test_an_error_of_the_input_propagates(good: int) -> None:
    """The reader's own exception comes out as it is, and no thread is left."""
    error = RuntimeError("the disk is gone")

    def failing() -> Iterator[pa.RecordBatch]:
        yield from [as_batch(["x fever " * 1000] * 4)] * good
        raise error

    with pytest.raises(RuntimeError) as caught:
        list(testing.annotator().stream(failing()))
    assert caught.value is error
    assert worker_threads() == []


def test_an_error_of_the_model_propagates(tiny: Annotator) -> None:
    """So does one that an inference thread raises."""

    def failing(ids: windows.Ints, lengths: windows.Ints) -> Any:
        raise ModelError("the device is gone")

    with pytest.raises(ModelError, match="the device is gone"):
        Annotator(tiny.bundle, failing, Options(threads=2), precision="fp32")("No fever.")
    assert worker_threads() == []


def test_a_batch_comes_out_when_it_is_done() -> None:
    """The stream reads ahead, but not to the end of its input."""
    read = 0

    def counted() -> Iterator[pa.RecordBatch]:
        nonlocal read
        for _ in range(400):
            read += 1
            yield as_batch(["x fever " * 1000])

    stream = testing.annotator(Options(threads=1)).stream(counted())
    next(stream)
    assert read < 200
    assert len(list(stream)) == 399


def test_first_spans_come_early(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first job is small and each is twice the one before, up to a limit; so few notes are read before spans come.

    Four jobs are under way when the first one is waited for: 15 times the first job's characters.
    """
    note = "x fever y " * 100
    read = 0
    sizes: list[int] = []
    plan = Annotator._plan

    def counted() -> Iterator[pa.RecordBatch]:
        nonlocal read
        for _ in range(400):
            read += 1
            yield as_batch([note])

    def recorded(self: Annotator, job: Any, *rest: Any) -> Any:
        sizes.append(len(job))
        return plan(self, job, *rest)

    monkeypatch.setattr(Annotator, "_plan", recorded)
    monkeypatch.setattr(annotate, "_JOB_CHARS", 1 << 16)
    annotator = testing.annotator(Options(threads=1, batch_tokens=64))
    stream = annotator.stream(counted())
    assert next(stream).column("n_spans").to_pylist() == [100]
    # A row counts with 16 characters beside its 1,000.
    first = -(-annotate._FIRST_JOB_CHARS // 1016)
    assert first == 17
    assert read == 17 + 33 + 65 + 65
    assert len(list(stream)) == 399
    assert sizes[:5] == [17, 33, 65, 65, 65]
    assert sum(sizes) == 400


@pytest.fixture
def bare(tmp_path: Path, tiny_parts: dict[str, bytes]) -> bundles.Bundle:
    """The tiny bundle with a tokenizer that adds no special tokens."""
    tokenizer = json.loads(tiny_parts["tokenizer.json"]) | {"post_processor": None}
    for name, content in (tiny_parts | {"tokenizer.json": json.dumps(tokenizer).encode()}).items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    described = bundles.load("tiny")
    bundles.write_manifest(
        tmp_path, name="bare", labels=described.labels, window=described.window, packed=True, card=described.card
    )
    return bundles.load(tmp_path)


@pytest.mark.parametrize("multiple", [1, 8])
@pytest.mark.parametrize("framed", [True, False])
def test_the_model_sees_every_token_once(
    tiny: Annotator, bare: bundles.Bundle, monkeypatch: pytest.MonkeyPatch, framed: bool, multiple: int
) -> None:
    """Batches of one width, framed by [CLS] and [SEP] if the tokenizer adds them, in the budget; all of the notes.

    On a CPU no window is padded; where lengths are padded to multiples of 8, it is with [PAD].
    """
    bundle = tiny.bundle if framed else bare
    outer = 1 if framed else 0
    assert annotate.PAD_MULTIPLE == {"cpu": 1, "cuda": 8}
    monkeypatch.setitem(annotate.PAD_MULTIPLE, "cpu", multiple)
    fed: list[tuple[windows.Ints, windows.Ints]] = []
    lock = threading.Lock()

    def recording(ids: windows.Ints, lengths: windows.Ints) -> Any:
        with lock:
            fed.append((ids.copy(), lengths.copy()))
        return zeros(ids, lengths)

    rng = random.Random(0)
    notes = [" ".join(rng.choices(["x", "ab", "c.", "fever", "\n\n"], k=rng.randrange(90))) for _ in range(60)]
    annotator = Annotator(bundle, recording, Options(threads=2, batch_tokens=128, reuse=False), precision="fp32")
    made = annotator(as_batch(notes))
    seen: list[tuple[int, ...]] = []
    for ids, lengths in fed:
        assert ids.shape[1] <= 32
        assert ids.size <= 128 or len(ids) == 1
        for row, length in zip(ids.tolist(), lengths.tolist(), strict=True):
            assert len(row) == (length if multiple == 1 else min(32, -(-length // 8) * 8))
            assert set(row[length:]) <= {0}
            assert not framed or (row[0], row[length - 1]) == (2, 3)
            seen.append(tuple(row[outer : length - outer]))
    assert len(seen) == sum(made.column("n_windows").to_pylist()) == annotator.counts.inferred
    plain = Tokenizer.from_str(bundle.tokenizer_json())
    whole = [plain.encode(note, add_special_tokens=False).ids for note in notes]
    assert made.column("n_tokens").to_pylist() == [len(ids) for ids in whole]
    expected: list[tuple[int, ...]] = []
    for note in notes:
        tokens = windows.WordTokenizer(bundle.tokenizer_json()).tokenize(
            [note[low:high] for low, high in pairwise(windows.segments(note))]
        )
        packed = windows.pack(tokens.bounds, 0, len(tokens.bounds) - 1, 32 - 2 * outer)
        expected += [tuple(tokens.ids[window.start : window.end].tolist()) for window in packed]
    assert sorted(seen) == sorted(expected)


def test_a_bundle_may_give_each_segment_its_window(tmp_path: Path, tiny_parts: dict[str, bytes]) -> None:
    """With ``packed`` false no two segments share a window; the spans of the tiny bundle are the same."""
    for name, content in tiny_parts.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    card = json.loads(tiny_parts["medner.json"]) | {"packed": False}
    (tmp_path / "medner.json").write_text(json.dumps(card), encoding="utf-8")
    batch = as_batch(["No fever. Known asthma.\n- breast cancer", "x " * 40 + "\n\nfever"])
    apart, together = load(tmp_path)(batch), load("tiny")(batch)
    assert apart.column("n_windows").to_pylist() == [3, 3]
    assert together.column("n_windows").to_pylist() == [1, 3]
    assert apart.column("spans").equals(together.column("spans"))
    assert apart.column("n_spans").to_pylist() == [3, 1]


def test_equal_windows_are_inferred_once() -> None:
    """Reuse counts what it saves, and saves nothing where it is off."""
    notes = ["No fever.", "Known asthma.", "No fever.", "no FEVER ."]
    on, off = testing.annotator(), testing.annotator(Options(reuse=False))
    assert rows(on, [as_batch(notes)])[:3] == rows(off, [as_batch(notes)])[:3]
    assert (on.counts.inferred, on.counts.reused) == (2, 2)
    assert (off.counts.inferred, off.counts.reused) == (4, 0)


def small_jobs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make every piece of text a job of its own."""
    monkeypatch.setattr(annotate, "_FIRST_JOB_CHARS", 1)
    monkeypatch.setattr(annotate, "_JOB_CHARS", 1)


@pytest.fixture
def caches(monkeypatch: pytest.MonkeyPatch) -> list[annotate._Reuse]:
    """The memories of the streams that a test runs."""
    made: list[annotate._Reuse] = []

    class Seen(annotate._Reuse):
        def __init__(self, limit: int) -> None:
            super().__init__(limit)
            made.append(self)

    monkeypatch.setattr(annotate, "_Reuse", Seen)
    return made


def counting(tiny: Annotator, options: Options) -> tuple[Annotator, list[int]]:
    """An annotator of the tiny bundle, and the number of windows in each batch that its model gets."""
    fed: list[int] = []

    def model(ids: windows.Ints, lengths: windows.Ints) -> Any:
        fed.append(len(ids))
        assert tiny.session is not None
        return tiny.session(ids, lengths)

    return Annotator(tiny.bundle, model, options, precision="fp32"), fed


@pytest.mark.parametrize("one_job", [True, False])
def test_what_the_model_does_not_see_again(tiny: Annotator, monkeypatch: pytest.MonkeyPatch, one_job: bool) -> None:
    """Inside one job and over many, the model gets each different window once, and every note has its spans."""
    if not one_job:
        small_jobs(monkeypatch)
    annotator, fed = counting(tiny, Options(threads=2))
    notes = ["Known asthma.", "x y", "type 2 diabetes", "x y"] * 20
    assert rows(annotator, [as_batch(notes)]) == [row for note in notes for row in rows(tiny, [as_batch([note])])]
    assert (annotator.counts.inferred, annotator.counts.reused, sum(fed)) == (3, 77, 3)


def test_windows_without_mentions_keep_nothing(caches: list[annotate._Reuse]) -> None:
    """A window is remembered with the tags and probabilities of its mentions' tokens, and with nothing else."""
    annotator = testing.annotator()
    notes = ["asthma", "x y", "x fever b", "x y", "b d q x", "asthma"]
    assert [len(row or []) for row in rows(annotator, [as_batch(notes)])] == [1, 0, 1, 0, 0, 1]
    cache = caches[0]
    assert len(cache) == 4

    def kept(text: str) -> Any:
        result = cache.get(annotate._key(annotator._tokenizer.tokenize([text]).ids.astype(np.int32).tobytes()))
        assert result is not None
        return result.kept().tolist()

    assert kept("x y") == kept("b d q x") == []
    for text, mention, place in (("asthma", "asthma", 0), ("x fever b", "fever", 1)):
        ((at, tag, probability),) = kept(text)
        assert (at, tag) == (place, 1)
        assert probability == pytest.approx(score(mention), abs=1e-6)


def test_overlapping_windows_are_reused(tiny: Annotator) -> None:
    """A window that answers for a part of its tokens is reused where the same segment comes again."""
    long = "x heart failure y " * 40
    notes = [long, "fever", long, "fever", long]
    annotator, fed = counting(tiny, Options(threads=1))
    made = annotator(as_batch(notes))
    assert made.column("spans").to_pylist() == [row for note in notes for row in rows(tiny, [as_batch([note])])]
    assert made.column("n_spans").to_pylist() == [40, 1, 40, 1, 40]
    assert made.column("n_windows").to_pylist() == [7, 1, 7, 1, 7]
    assert (annotator.counts.inferred, annotator.counts.reused, sum(fed)) == (8, 15, 8)


#: What a window without a mention counts.
EMPTY = annotate._ENTRY_BYTES + sys.getsizeof(b"")


def test_reuse_forgets_the_oldest(monkeypatch: pytest.MonkeyPatch) -> None:
    """The memory is bounded; a window that was forgotten is inferred again with the same result."""
    small_jobs(monkeypatch)
    monkeypatch.setattr(annotate, "_JOBS_AHEAD", 0)
    monkeypatch.setattr(annotate, "REUSE_BYTES", 4 * EMPTY)
    annotator = testing.annotator()
    notes = ["x a", "x b", "x a", "x c", "x a", "x b", "x d", "x c", "x a", "x b", "fever"]
    assert [len(row or []) for row in rows(annotator, [as_batch(notes)])] == [0] * 10 + [1]
    # Two windows make a generation: a and b; then c and, since it is used again, a; then b and d. C is known still and
    # begins the next; with it goes the generation before, and a is inferred again.
    assert (annotator.counts.inferred, annotator.counts.reused) == (6, 5)


def remember(memory: annotate._Reuse, key: bytes, inside: bytes = b"") -> None:
    """Put a window into a memory, with the result that it has got by the time that its job is done."""
    result = memory.put(key)
    result.inside = inside
    memory.settle([result])


def test_generations() -> None:
    """Of windows used in turn as many as half of the limit stay known; what was not used for longer is forgotten."""
    memory = annotate._Reuse(8 * EMPTY)
    for key in (b"a", b"b", b"c", b"d", b"e", b"f", b"g"):
        remember(memory, key)
    assert memory.get(b"a") is not None
    assert len(memory) == 7
    for key in (b"h", b"i", b"j"):
        remember(memory, key)
    assert memory.get(b"a") is not None
    assert [memory.get(key) for key in (b"b", b"c", b"d")] == [None, None, None]
    assert all(memory.get(key) is not None for key in (b"h", b"i", b"j"))
    for number in range(100):
        remember(memory, bytes([number]))
        assert len(memory) <= 8


def test_results_under_way() -> None:
    """A window is known from when it is put; until its result is there, all that ask for it get the same object."""
    memory = annotate._Reuse(8 * EMPTY)
    result = memory.put(b"a")
    assert memory.get(b"a") is result
    result.keep(np.array([3, 5]), np.array([1, 2], np.int16), np.array([0.5, 0.25], np.float32))
    memory.settle([result])
    settled = memory.get(b"a")
    assert settled is not None
    assert settled.kept().tolist() == [(3, 1, 0.5), (5, 2, 0.25)]
    assert len(memory) == 1


def test_keys_tell_windows_apart() -> None:
    """Equal windows have one key, others have others, of 15 bytes however long the window is."""
    made = [np.arange(size, dtype=np.int32).tobytes() for size in range(1, 512)]
    keys = [annotate._key(window) for window in made]
    assert len(set(keys)) == len(keys)
    assert {len(key) for key in keys} == {15}
    assert keys == [annotate._key(bytes(window)) for window in made]


def test_reuse_lasts_from_one_stream_to_the_next(tiny: Annotator) -> None:
    """A run is one stream for each of its parts; what an earlier one has seen is not inferred again."""
    annotator, fed = counting(tiny, Options(threads=1))
    for _ in range(3):
        assert [len(row or []) for row in rows(annotator, [as_batch(["asthma", "x y"])])] == [1, 0]
    assert (annotator.counts.inferred, annotator.counts.reused, sum(fed)) == (2, 4, 2)


@pytest.mark.parametrize("how", ["model fails", "closed early"])
def test_reuse_forgets_what_was_never_inferred(tiny: Annotator, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    """After a stream that did not come to its end, no window counts as known whose result never came."""
    small_jobs(monkeypatch)
    fails = how == "model fails"

    def model(ids: Any, lengths: Any) -> Any:
        if fails:
            raise ModelError("broken")
        return tiny.session(ids, lengths)  # type: ignore[misc]

    annotator = Annotator(tiny.bundle, model, Options(threads=1), precision="fp32")
    batches = [as_batch([f"fever {letter}"]) for letter in "abcdefgh"]
    stream = annotator.stream(batches)
    if fails:
        with pytest.raises(ModelError, match="broken"):
            list(stream)
    else:
        next(stream)
        stream.close()
    fails = False
    assert [len(row or []) for row in rows(annotator, batches)] == [1] * 8


@pytest.mark.parametrize("seen", [9_000, 60_000])
@pytest.mark.parametrize(("of_ten", "tokens"), [(0, 0), (4, 3), (10, 3), (10, 126)])
def test_what_the_memory_takes(seen: int, of_ten: int, tokens: int) -> None:
    """However many windows hold a mention, and however long ones, they never take more than the limit.

    Not while the memory fills up, nor at any time after it began to forget.
    """
    limit = 2**21
    at, tags, probabilities = np.arange(tokens), np.ones(tokens, np.int16), np.ones(tokens, np.float32)
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        memory = annotate._Reuse(limit)
        for number in range(seen):
            result = memory.put(annotate._key(number.to_bytes(4)))
            if number % 10 < of_ten:
                result.keep(at, tags, probabilities)
            memory.settle([result])
        _, highest = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert 0.3 * limit < highest - before < limit


# ---------------------------------------------------------------------------------------------------------------------
# Offsets

ODD_PLACES = {
    "accents": ("Café zoë Fièvre naïve fever élan.", ["fever"]),
    "an accented mention": ("no FÉVER, no astḧma", ["FÉVER", "astḧma"]),
    "combining marks": ("nai\u0308ve fe\u0301ver\u0301 e\u0301", ["fe\u0301ver\u0301"]),
    "Chinese": ("病人有 fever病 和asthma", ["fever", "asthma"]),
    "emoji with joiners": ("👩\u200d⚕️🙂 fever 👨\u200d👩\u200d👧 asthma🙂", ["fever"]),
    "zero-width characters": (
        "x\u200bfever fe\u200bver \u200bcancer\u200b\u200b type\u00ad x",
        ["fe\u200bver \u200bcancer\u200b\u200b type"],
    ),
    "carriage returns": ("one\r\nfever\r\n\r\nasthma\rcancer\r", ["fever", "asthma\rcancer"]),
    "a wrapped mention": ("known breast\r\n  cancer today", ["breast\r\n  cancer"]),
    "tabs": ("\tfever\t\tx\tbreast\tcancer\t", ["fever", "breast\tcancer"]),
    "byte-order marks": ("\ufefffever x \ufeffasthma\ufeff x", ["fever", "asthma"]),
    "NUL and control characters": ("\x00fever x\x00x as\x07thma \x1b[0m cancer\x00", ["fever", "as\x07thma", "cancer"]),
    "white space beyond ASCII": (
        "breast\xa0cancer\u3000x\u2003fever\u2028asthma",
        ["breast\xa0cancer", "fever\u2028asthma"],
    ),
    "special tokens": ("[CLS] fever [SEP] asthma [PAD][UNK]", ["fever", "asthma"]),
    "a blank line between mentions": ("fever\n\nasthma", ["fever", "asthma"]),
    "a list": ("- fever\n- asthma\n2. cancer", ["fever", "asthma", "2", "cancer"]),
    "initials and white space": ("Hepatitis A\xa0. No fever.", ["fever"]),
    "nothing": ("", []),
    "spaces": ("   \t ", []),
    "line breaks": ("\n\r\n\n", []),
    "control characters alone": ("\x00\x01\u200b", []),
}


@pytest.mark.parametrize(("text", "expected"), ODD_PLACES.values(), ids=ODD_PLACES)
def test_offsets_in_odd_places(tiny: Annotator, text: str, expected: list[str]) -> None:
    """Offsets are code points of the note as it was read, whatever stands in it; dropped characters join a word."""
    assert mentions(tiny, text) == expected


def test_a_megabyte(tiny: Annotator) -> None:
    """A note of several pieces: every mention is found where it stands, and every character is counted."""
    unit = "Pt (42) has x type 2 diabetes;\nno fever today. "
    note = unit * 21_000
    batch = tiny(pa.record_batch({"text": [note]}))
    assert len(note) > 3 * windows.PIECE_CHARS
    assert batch.column("n_chars").to_pylist() == [len(note)]
    spans = batch.column("spans")[0].values
    places = [(start + low, start + low + size) for start in range(0, len(note), len(unit)) for low, size in MEGA]
    assert list(zip(spans.field("start").to_pylist(), spans.field("end").to_pylist(), strict=True)) == places
    tokens = len(Tokenizer.from_str(tiny.bundle.tokenizer_json()).encode(unit, add_special_tokens=False))
    assert batch.column("n_tokens").to_pylist() == [tokens * 21_000]


#: Start and length of the mentions in the unit of the test above: 2 of (42) is no word of its own.
MEGA = [(14, 15), (34, 5)]


def test_a_word_of_5000_characters(tiny: Annotator) -> None:
    """It is one unknown token; mentions on both sides are found."""
    note = f"fever {'a' * 5000} asthma"
    assert mentions(tiny, note) == ["fever", "asthma"]
    batch = tiny(as_batch([note]))
    assert [batch.column(name).to_pylist() for name in COUNTS] == [[5013], [3], [1], [1], [2]]


def test_a_long_text_without_punctuation(tiny: Annotator) -> None:
    """8,000 tokens in one segment: overlapping windows give one unbroken mention, or 2,000 separate ones."""
    joined = "heart failure type 2 " * 2000
    (span,) = tiny(joined)
    assert (span.start, span.end) == (0, len(joined) - 1)
    apart = "x heart failure y " * 2000
    assert [(span.start, span.text) for span in tiny(apart)] == [
        (start + 2, "heart failure") for start in range(0, len(apart), 18)
    ]


def has_no_mention(text: str) -> bool:
    """Every mention word holds an a, an e or a 2, and this text has none, accents aside."""
    folded = normalizers.BertNormalizer(lowercase=True).normalize_str(text)
    return not {"a", "e", "2"} & set(folded)


ODDITIES = [*" \n\t.:-,\r\u200b\ufeff\xa0\u0301病🙂", "\r\n", "\n\n", "\n- ", "B. ", "xyz", "HMM", " q\xa0. "]
CHARACTERS = st.characters(exclude_categories=["Cs"])
FILLER = st.lists(CHARACTERS | st.sampled_from(ODDITIES), max_size=12).map("".join).filter(has_no_mention)
PHRASES = st.sampled_from(["fever", "type 2 diabetes", "Breast Cancer", "heart\nfailure", "ASTHMA"])


@settings(max_examples=250, deadline=None)
@given(st.lists(st.tuples(FILLER, PHRASES), max_size=8), FILLER)
def test_planted_mentions_are_found_exactly(parts: list[tuple[str, str]], tail: str) -> None:
    """Mentions between spaces in any text: each is found with its exact offsets and score, and nothing else is."""
    text = ""
    expected = []
    for filler, phrase in parts:
        text += f"{filler} x "
        expected.append((len(text), len(text) + len(phrase), phrase))
        text += f"{phrase} x "
    text += tail
    found = TINY(text)
    check_offsets(text, found)
    assert [(span.start, span.end, span.text) for span in found] == expected
    assert [span.score for span in found] == pytest.approx([score(phrase) for *_, phrase in expected], abs=1e-6)


@settings(max_examples=150, deadline=None)
@given(
    st.lists(
        st.sampled_from([*WORDS, *" \n.-,\r\u200b\u0301\xa0\x00", "\n\n", "1. ", "é", "病", "x"])
        | st.characters(exclude_categories=["Cs"]),
        max_size=60,
    ).map("".join)
)
def test_offsets_hold_in_any_text(text: str) -> None:
    """Whatever is found begins and ends at words of the note, in order, without white space around it."""
    check_offsets(text, TINY(text))


# ---------------------------------------------------------------------------------------------------------------------
# Long notes


def test_pieces_change_nothing_but_windows(tiny: Annotator, monkeypatch: pytest.MonkeyPatch) -> None:
    """A note worked through in many pieces has the spans and tokens of one that was not cut."""
    note = "No fever was seen. Known breast cancer!\n\nAsthma since 1999, x heart failure y.\n" * 20
    whole = tiny(as_batch([note, "fever"]))
    monkeypatch.setattr(windows, "pieces", functools.partial(windows.pieces, limit=100))
    cut = testing.annotator()(as_batch([note, "fever"]))
    assert len(list(windows.pieces(note))) > 15
    for name in ("spans", "n_chars", "n_tokens", "n_unknown", "n_spans", "text_sha256"):
        if name == "spans":
            places = [[(s["start"], s["end"], s["label"]) for s in row] for row in cut.column(name).to_pylist()]
            assert places == [[(s["start"], s["end"], s["label"]) for s in r] for r in whole.column(name).to_pylist()]
        else:
            assert cut.column(name).equals(whole.column(name))
    # Windows are packed anew in every piece, or are the same where pieces end with segments.
    assert cut.column("n_windows").to_pylist()[0] >= whole.column("n_windows").to_pylist()[0]
    assert cut.column("n_windows").to_pylist()[1] == 1


# ---------------------------------------------------------------------------------------------------------------------
# Batch invariance

VOCABULARY = [*WORDS, "x", "no", "the", "patient", "has", "mg", "e.g.", ".", ",", "\n\n", "\n", "病", "naïve", "a" * 30]
NOTES = st.lists(
    st.none()
    | st.lists(st.sampled_from(VOCABULARY), max_size=70).map(" ".join)
    | st.text(st.characters(exclude_categories=["Cs"]), max_size=40),
    min_size=1,
    max_size=8,
)
SETTINGS = [
    Options(threads=1, batch_tokens=64),
    Options(threads=2, batch_tokens=64, reuse=False),
    Options(threads=1, batch_tokens=8192, reuse=False),
    Options(threads=3, batch_tokens=8192),
    Options(threads=2, batch_tokens=1, reuse=False),
]


def check_invariance(annotators: list[Annotator], notes: list[str | None], cuts: list[int]) -> None:
    """All annotators give each note the spans and scores that it has alone: together, reversed, split anyhow."""
    alone = [rows(annotators[0], [as_batch([note])])[0] for note in notes]
    bounds = [0, *sorted(cut % (len(notes) + 1) for cut in cuts), len(notes)]
    batch = as_batch(notes)
    split = [batch.slice(low, high - low) for low, high in pairwise(bounds)]
    for annotator in annotators:
        assert rows(annotator, [batch]) == alone
        assert rows(annotator, split) == alone
        assert rows(annotator, [as_batch(notes[::-1])]) == alone[::-1]


@settings(max_examples=40, deadline=None)
@given(NOTES, st.lists(st.integers(0, 8), max_size=4))
def test_tiny_spans_depend_on_the_note_alone(notes: list[str | None], cuts: list[int]) -> None:
    """The tiny bundle, bit for bit, at any batch size, thread count, order, split, with and without reuse."""
    check_invariance(TINY_SETTINGS, notes, cuts)


TINY_SETTINGS = [testing.annotator(options) for options in SETTINGS]


@pytest.fixture(scope="session", params=["fp32", "int8", "static int8"])
def berts(request: pytest.FixtureRequest, small_bert: Path, small_bert_static: Path) -> list[Annotator]:
    """Annotators of the small BERT in one precision, or one form of int8, under all settings."""
    path = small_bert_static if request.param == "static int8" else small_bert
    precision = request.param.removeprefix("static ")
    return [
        load(path, Options(precision, threads=o.threads, batch_tokens=o.batch_tokens, reuse=o.reuse)) for o in SETTINGS
    ]


@settings(max_examples=30, deadline=None)
@given(notes=NOTES, cuts=st.lists(st.integers(0, 8), max_size=4))
def test_attention_and_int8_do_not_see_the_batch(
    berts: list[Annotator], notes: list[str | None], cuts: list[int]
) -> None:
    """The same for a transformer with attention, and for int8 with a scale for each token or one scale for all."""
    check_invariance(berts, notes, cuts)


def test_the_small_bert_finds_something(berts: list[Annotator]) -> None:
    """Its tags change within notes, so that the invariance above says something."""
    found = berts[0]("The patient has type 2 diabetes, no fever, and known heart failure since 1999.")
    assert len(found) > 3
    assert len({span.score for span in found}) == len(found)
    assert {span.end - span.start for span in found} != {1}


def test_answers_of_the_graph_change_no_span(small_bert: Path, small_bert_static: Path) -> None:
    """Tags and probabilities that the int8 graph gives itself make the spans that its logits make."""
    rng = random.Random(0)
    notes = [" ".join(rng.choices(VOCABULARY, k=rng.randrange(80))) for _ in range(40)]
    for path in (small_bert, small_bert_static):
        own = load(path, Options("int8", threads=1))
        session = own.session
        assert session is not None
        assert session.gives_best
        decoded = Annotator(own.bundle, session.__call__, own.options, precision="int8")
        found, expected = rows(own, [as_batch(notes)]), rows(decoded, [as_batch(notes)])
        assert sum(len(row or []) for row in found) > 200
        assert [as_places(row) for row in found] == [as_places(row) for row in expected]
        scores = [[span["score"] for row in side for span in row or []] for side in (found, expected)]
        assert scores[0] == pytest.approx(scores[1], abs=1e-6)


def as_places(row: Row) -> list[tuple[int, int, str]]:
    """Spans of a row without their scores."""
    return [(span["start"], span["end"], span["label"]) for span in row or []]


# ---------------------------------------------------------------------------------------------------------------------
# The default bundle


@pytest.fixture(scope="session")
def defaults() -> list[Annotator]:
    """Annotators of the default bundle: small batches, large ones on one thread, and on two."""
    if not (testing.bundle().parent / "default").is_dir():
        pytest.skip("no default bundle in this checkout")
    made = [(1, 64), (1, 8192), (2, 8192)]
    return [load("default", Options(threads=threads, batch_tokens=tokens)) for threads, tokens in made]


@settings(max_examples=5, deadline=None)
@given(notes=NOTES, cuts=st.lists(st.integers(0, 8), max_size=2))
def test_default_bundle_on_random_texts(defaults: list[Annotator], notes: list[str | None], cuts: list[int]) -> None:
    """The model that ships does not see the batch either."""
    check_invariance(defaults, notes, cuts)


def test_default_bundle_on_clinical_notes(defaults: list[Annotator], data_dir: Path) -> None:
    """Forty visit notes: equal spans and scores for all settings and in reverse; offsets hold."""
    lines = (data_dir / "aci-bench" / "notes.jsonl").read_text(encoding="utf-8").splitlines()[:40]
    notes = [str(json.loads(line)["text"]) for line in lines]
    first = rows(defaults[0], [as_batch(notes)])
    assert sum(len(row or []) for row in first) > 100
    for annotator in defaults[1:]:
        assert rows(annotator, [as_batch(notes[::-1])]) == first[::-1]
    for note, row in zip(notes, first, strict=True):
        check_offsets(note, [Span(**span, text=note[span["start"] : span["end"]]) for span in row or []])


def test_empty_notes_do_not_pile_up(tiny: Annotator) -> None:
    """Batches without any text come out while the input still runs."""
    read = 0

    def source() -> Iterator[pa.RecordBatch]:
        nonlocal read
        for _ in range(100):
            read += 1
            yield pa.record_batch({"text": pa.array(["", None] * 500)})

    first = next(stream := tiny.stream(source()))
    assert first.column("spans").to_pylist() == [[], None] * 500
    assert read < 80
    stream.close()
