"""The heart: a stream of record batches in, the same batches with spans out.

Local runs and any distributed engine call :class:`Annotator` and nothing else. What it does with a note depends on the
note and the model alone: windows are cut from the note, padded to a length of their own, and a batch only ever holds
windows of one padded length, computed on one thread.
"""

from __future__ import annotations

import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from hashlib import blake2b
from itertools import pairwise
from pathlib import Path
from time import perf_counter
from typing import overload

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from medner import bundle as bundles
from medner import decode, schema, windows
from medner.errors import DeviceError, InputError, ModelError, UsageError
from medner.runtime import Session, available_cpus, has_cuda, resolve_device

Ints = npt.NDArray[np.int64]

#: Arrays in, arrays out: ids int64 [n, length], lengths int64 [n] -> logits float32 [n, length, n_labels].
Model = Callable[[Ints, Ints], npt.NDArray[np.float32]]

#: Padded tokens of one inference call: what stays in a core's caches, and what fills a GPU.
BATCH_TOKENS = {"cpu": 512, "cuda": 16_384}

#: Padded lengths are multiples of this: one on a CPU, where padding is work for nothing; on a GPU, few shapes.
PAD_MULTIPLE = {"cpu": 1, "cuda": 8}

#: Memory for the results of windows that may come again: of 95,000 where four in ten hold a mention, as in notes.
#: Half of them stay for certain, enough for all that come again in MTSamples.
REUSE_BYTES = 14 * 2**20

#: What one of them takes beside its answer: its key, and its place in a dict that has just grown, as measured.
_ENTRY_BYTES = 100

#: A stream's first job is small, so that its first spans come soon; each is twice the one before, up to the last.
_FIRST_JOB_CHARS, _JOB_CHARS = 1 << 14, 1 << 17

_JOBS_AHEAD = 3

#: What a row counts towards a job beside its text, so that empty notes do not pile up.
_ROW_CHARS = 16


@dataclass(frozen=True, slots=True)
class Options:
    """How to annotate. None of these but ``precision``, ``window`` and ``min_score`` changes a span.

    precision: auto, fp32, fp16 or int8. device: auto, cpu, cuda or cuda:N. window: tokens, special ones included; None
    takes the bundle's. threads: inference threads; None takes the CPUs this process may use, on CUDA two. batch_tokens:
    padded tokens of one inference call; None takes :data:`BATCH_TOKENS`, on CUDA what :meth:`Session.probe` finds.
    min_score: spans below it are left out; None takes the bundle's. reuse: infer equal windows once, on CUDA once in
    each stream. text_column: the column that holds the notes. Raises :class:`UsageError` for numbers out of range.
    """

    precision: str = "auto"
    device: str = "auto"
    window: int | None = None
    threads: int | None = None
    batch_tokens: int | None = None
    min_score: float | None = None
    reuse: bool = True
    text_column: str = "text"

    def __post_init__(self) -> None:
        """Check the numbers."""
        for name in ("threads", "batch_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"{name} is {value}; it must be 1 or more")
        if self.min_score is not None and not 0 <= self.min_score <= 1:  # NaN is not either
            raise UsageError(f"min_score is {self.min_score}; it must lie between 0 and 1")


@dataclass(slots=True)
class Counts:
    """What an annotator has done so far: windows that went through the model, and windows whose result was reused.

    tokenizing, inferring, decoding: seconds of work; inferring: those in which at least one inference call ran.
    """

    inferred: int = 0
    reused: int = 0
    tokenizing: float = 0.0
    inferring: float = 0.0
    decoding: float = 0.0


class Annotator:
    """Finds spans in notes.

    One annotator serves one stream at a time. It pickles as its recipe (model path and options), since an onnxruntime
    session cannot be pickled.
    """

    def __init__(
        self, bundle: bundles.Bundle, model: Model, options: Options, *, precision: str, pad_multiple: int | None = None
    ) -> None:
        """Use :meth:`load`; this is for a model that was opened already, an onnxruntime session or any other.

        precision: the variant that ``model`` computes, for the record. pad_multiple: of padded lengths; None takes the
        device's of :data:`PAD_MULTIPLE`. The attribute ``types`` names the entity types that the model knows;
        ``notice`` is a line about the device for a person, empty where there is nothing to say.
        """
        session = model if isinstance(model, Session) else None
        self.bundle = bundle
        self.options = options
        self.min_score = bundle.min_score if options.min_score is None else options.min_score
        self.precision = precision
        self.session = session
        self.notice = ""
        self.counts = Counts()
        # Now, for the current directory may be another when this is pickled.
        self._reference = bundles.reference(bundle.path)
        self._tags = decode.tag_set(bundle.labels)
        self._outside = int(np.flatnonzero(self._tags.type_of < 0)[0])
        self._best = session.best if session is not None and session.gives_best else _best_of(model)
        try:
            self._tokenizer = windows.WordTokenizer(bundle.tokenizer_json())
        except Exception as exc:  # tokenizers raises nothing more special
            raise ModelError(f"{bundle.path / 'tokenizer.json'}: cannot be read ({exc})") from exc
        self.types = self._tags.types
        self._capacity = bundle.window - len(self._tokenizer.prefix) - len(self._tokenizer.suffix)
        device = "cuda" if session is not None and session.device.startswith("cuda") else "cpu"
        # On a GPU the host prepares one batch while the device computes another.
        self.threads = options.threads or (2 if device == "cuda" else available_cpus())
        self._on_cuda = device == "cuda"
        # A window is computed alone where its neighbours would change its result.
        self._alone = session is not None and session.scales_by_batch
        tokens = options.batch_tokens or BATCH_TOKENS[device]
        if session is not None and self._on_cuda and options.batch_tokens is None and not self._alone:
            tokens = session.probe(bundle.window)
        self.use_budget(tokens)
        self._pad_multiple = pad_multiple or PAD_MULTIPLE[device]
        self._busy = _Busy()
        self._reuse = _Reuse(REUSE_BYTES) if options.reuse else None

    def use_budget(self, batch_tokens: int) -> None:
        """Fill batches up to another number of padded tokens, from the next stream on."""
        self.batch_tokens = 1 if self._alone else batch_tokens
        if self.session is not None and self._on_cuda and not self._alone:
            self.session.most_tokens = batch_tokens
        # Enough for every thread to have several batches, with windows of each length to fill them; a GPU has few
        # lengths, and waits for none of its threads.
        self._job_chars = max(_JOB_CHARS, (192 if self._on_cuda else 24 * self.threads) * self.batch_tokens)

    @classmethod
    def load(cls, model: str | Path = "default", options: Options | None = None) -> Annotator:
        """Load a bundle or a foreign model and open it on a device.

        model: as in :func:`medner.bundle.load`. Raises :class:`ModelError`, :class:`DeviceError` (the device asked for
        is not to be had) or :class:`MissingPackage` (no onnxruntime).
        """
        options = options or Options()
        bundle = bundles.load(model, options.window)
        if options.device != "auto" or not has_cuda():
            return cls._open(bundle, options, resolve_device(options.device))
        try:
            annotator = cls._open(bundle, options, "cuda:0")
        except DeviceError as exc:
            annotator = cls._open(bundle, options, "cpu")
            taken = f"--device auto takes the CPU, for it could not take CUDA: {exc}"
        else:
            taken = "--device auto takes cuda:0"
        annotator.notice = "; ".join(filter(None, [taken, annotator.notice]))
        return annotator

    @classmethod
    def _open(cls, bundle: bundles.Bundle, options: Options, device: str) -> Annotator:
        precision, graph = bundle.variant(options.precision, device.partition(":")[0])
        session = Session(graph, device)
        if session.n_labels not in (None, len(bundle.labels)):
            raise ModelError(f"{graph}: has {session.n_labels} classes, but config.json names {len(bundle.labels)}")
        annotator = cls(bundle, session, options, precision=precision)
        if device != "cpu" and precision == "int8":
            annotator.notice = "int8 is slower than fp16 on CUDA"
        if session.scales_by_batch:
            annotator.notice = (
                f"{graph.name} scales activations by all that is computed together, so each window is computed alone; "
                "medner export makes an int8 that is faster"
            )
        return annotator

    def __reduce__(self) -> tuple[object, ...]:
        """Pickle as the recipe."""
        if self.session is None:
            raise TypeError("an annotator of a model that is no bundle cannot be pickled")
        return Annotator.load, (self._reference, self.options)

    def output_schema(self, input_schema: pa.Schema) -> pa.Schema:
        """Schema of the annotated batches, known before the first one."""
        return schema.annotated_schema(input_schema, self.options.text_column)

    @overload
    def __call__(self, notes: str) -> list[schema.Span]: ...
    @overload
    def __call__(self, notes: pa.RecordBatch) -> pa.RecordBatch: ...
    def __call__(self, notes: str | pa.RecordBatch) -> list[schema.Span] | pa.RecordBatch:
        """Annotate one note (a list of spans) or one batch (N rows in, N rows out, in order)."""
        if isinstance(notes, str):
            return self._spans_of(notes)
        (annotated,) = self.stream([notes])
        return annotated

    def _spans_of(self, text: str) -> list[schema.Span]:
        try:
            column = pa.array([text], pa.large_string())
        except UnicodeEncodeError as exc:
            raise InputError("the note holds lone surrogates; it is not Unicode text") from exc
        batch = pa.record_batch({self.options.text_column: column})
        (found,) = self(batch).column("spans").to_pylist()
        return [schema.Span(**span, text=text[span["start"] : span["end"]]) for span in found]

    def stream(self, batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        """Annotate a stream of batches: each comes out in order, with the columns of :data:`schema.ANNOTATION` added.

        Tokenizing, inference and decoding overlap; a few hundred thousand tokens are under way at any time, whatever
        the sizes of notes and batches. Null text gives a null list of spans, empty text an empty one. Windows that
        an earlier stream of this annotator has seen are reused, too, but not on CUDA: there a window's score may move
        by a rounding with its batch, and so a stream's batches have to depend on that stream alone.

        Raises :class:`InputError` for what is no batch, or has no column of notes. What was read before, and has not
        come out yet, is lost with an error, of ``batches`` too.
        """
        # Out of reach until all is done: after a failure it holds windows without their results.
        cache, self._reuse = self._reuse, _Reuse(REUSE_BYTES) if self.options.reuse else None
        infer = ThreadPoolExecutor(self.threads, thread_name_prefix="medner-infer")
        plan = ThreadPoolExecutor(1, thread_name_prefix="medner-plan")
        under_way: deque[Future[_Plan]] = deque()
        waiting: deque[_Rows] = deque()
        settled: list[_Result] = []
        try:
            for job in self._jobs(batches, waiting):
                # One planning thread, so that which window is inferred and which reused follows from the input alone.
                under_way.append(plan.submit(self._plan, job, infer, cache, settled))
                settled = self._finish(under_way.popleft().result()) if len(under_way) > _JOBS_AHEAD else []
                while waiting and waiting[0].is_done():
                    yield waiting.popleft().batch()
            while under_way:
                settled += self._finish(under_way.popleft().result())
                while waiting and waiting[0].is_done():
                    yield waiting.popleft().batch()
            while waiting:
                yield waiting.popleft().batch()
            if cache is not None and not self._on_cuda:
                cache.settle(settled)
                self._reuse = cache
        finally:
            plan.shutdown(cancel_futures=True)
            infer.shutdown(cancel_futures=True)

    def _jobs(self, batches: Iterable[pa.RecordBatch], waiting: deque[_Rows]) -> Iterator[list[_Piece]]:
        """Group the pieces of the notes into jobs of about equal work; ``waiting`` gets each batch as it is read."""
        limit = _FIRST_JOB_CHARS
        job: list[_Piece] = []
        size = 0
        for batch in batches:
            if not isinstance(batch, pa.RecordBatch):
                name = type(batch).__name__
                raise InputError(
                    f"a text or a pyarrow.RecordBatch is needed, not {name}; a table's to_batches() gives batches"
                )
            rows = _Rows(batch, self.output_schema(batch.schema), self._tags.types)
            waiting.append(rows)
            for row, text in enumerate(_texts(batch, self.options.text_column)):
                rows.read(row, text)
                size += _ROW_CHARS
                for start, end in windows.pieces(text or ""):
                    job.append(_Piece(rows, row, start, (text or "")[start:end]))
                    rows.open_pieces += 1
                    size += end - start
                    if size >= limit:
                        yield job
                        job, size, limit = [], 0, min(2 * limit, self._job_chars)
            rows.is_read = True
            if batch.num_rows == 0:  # or else such batches would all be read before the first comes out
                size += _ROW_CHARS
            if size >= limit:
                yield job
                job, size, limit = [], 0, min(2 * limit, self._job_chars)
        if job:
            yield job

    def _plan(
        self, job: list[_Piece], infer: ThreadPoolExecutor, cache: _Reuse | None, settled: list[_Result]
    ) -> _Plan:
        """Tokenize a job, cut windows, and hand those not seen before to the inference threads.

        settled: results of jobs that were done when this one was handed in.
        """
        begin = perf_counter()
        texts: list[str] = []
        starts: list[int] = []
        piece_bounds = [0]
        for piece in job:
            for start, end in pairwise(windows.segments(piece.text)):
                texts.append(piece.text[start:end])
                starts.append(piece.start + start)
            piece_bounds.append(len(texts))
        tokens = self._tokenizer.tokenize(texts)
        packed: list[windows.Window] = []
        counts: list[int] = []
        for first, last in pairwise(piece_bounds):
            found = windows.pack(tokens.bounds, first, last, self._capacity, packed=self.bundle.packed)
            packed.extend(found)
            counts.append(len(found))
        bounds = np.array([(w.start, w.end, w.own_start, w.own_end) for w in packed], dtype=np.int64).reshape(-1, 4)

        known: list[tuple[int, _Result]] = []
        kept: list[tuple[int, _Result]] = []
        new: Sequence[int] = range(len(packed))
        if cache is not None:
            cache.settle(settled)
            new, known, kept = _sort_out(tokens.ids, packed, cache)
        self.counts.inferred += len(new)
        self.counts.reused += len(packed) - len(new)
        answers = _Answers.of(len(tokens.ids), self._outside)
        lengths = (bounds[:, 1] - bounds[:, 0])[new]
        frame = len(self._tokenizer.prefix) + len(self._tokenizer.suffix)
        futures = [
            infer.submit(self._infer, tokens.ids, bounds[np.asarray(new)[batch]], answers)
            for batch in windows.batches((lengths + frame).tolist(), self.batch_tokens, self._pad_multiple)
        ]
        self.counts.tokenizing += perf_counter() - begin
        return _Plan(
            job, tokens, np.array(starts, dtype=np.int64), piece_bounds, bounds, counts, answers, known, kept, futures
        )

    def _infer(self, ids: Ints, bounds: Ints, answers: _Answers) -> None:
        """Run one batch and store what each window answers for. bounds: int64 [n, 4], as in :class:`windows.Window`."""
        prefix, suffix = self._tokenizer.prefix, self._tokenizer.suffix
        sizes = bounds[:, 1] - bounds[:, 0]
        lengths = sizes + len(prefix) + len(suffix)
        width = min(windows.padded_length(int(lengths.max()), self._pad_multiple), self.bundle.window)
        feed = np.full((len(bounds), width), self._tokenizer.pad_id, dtype=np.int64)
        feed[:, : len(prefix)] = prefix
        inner = np.arange(width - len(prefix) - len(suffix))
        position = bounds[:, :1] + inner
        is_token = inner < sizes[:, None]
        feed[:, len(prefix) : len(prefix) + len(inner)][is_token] = ids[position[is_token]]
        for i, token in enumerate(suffix):
            feed[np.arange(len(bounds)), len(prefix) + sizes + i] = token
        with self._busy:
            tags, probabilities = self._best(feed, lengths)
        own = (position >= bounds[:, 2:3]) & (position < bounds[:, 3:4])
        answers.tags[position[own]] = tags[:, len(prefix) : len(prefix) + len(inner)][own]
        answers.probabilities[position[own]] = probabilities[:, len(prefix) : len(prefix) + len(inner)][own]
        answers.add(int((bounds[:, 3] - bounds[:, 2]).sum()))

    def _finish(self, plan: _Plan) -> list[_Result]:
        """Wait for a job's results and decode them into the rows that they belong to; gives those to be remembered."""
        for future in plan.futures:
            future.result()
        begin = perf_counter()
        tokens, answers = plan.tokens, plan.answers
        inside = np.flatnonzero(self._tags.type_of[answers.tags] >= 0)
        edges = np.searchsorted(inside, plan.bounds[:, 2:])
        for number, result in plan.kept:
            low, high = edges[number]
            if high > low:
                at = inside[low:high]
                result.keep(at - plan.bounds[number, 2], answers.tags[at], answers.probabilities[at])
        for number, result in plan.known:
            start, end = plan.bounds[number, 2:]
            answers.add(int(end - start))
            if result.inside:
                kept = result.kept()
                at = start + kept["at"]
                answers.tags[at], answers.probabilities[at] = kept["tag"], kept["probability"]
        if answers.count != len(tokens.ids):
            raise AssertionError("windows do not cover the tokens")  # pragma: no cover
        found = self._decode(plan, answers.tags, answers.probabilities)
        unknown = np.concatenate([[0], np.cumsum(tokens.ids == self._tokenizer.unknown_id)])
        token_edges = tokens.bounds[plan.piece_bounds]
        span_edges = np.searchsorted(found.segment, plan.piece_bounds)
        for i, piece in enumerate(plan.job):
            low, high = int(token_edges[i]), int(token_edges[i + 1])
            piece.rows.add(
                piece.row,
                found.part(int(span_edges[i]), int(span_edges[i + 1])),
                n_tokens=high - low,
                n_unknown=int(unknown[high] - unknown[low]),
                n_windows=plan.window_counts[i],
            )
        self.counts.inferring = self._busy.seconds
        self.counts.decoding += perf_counter() - begin
        return [result for _, result in plan.kept]

    def _decode(self, plan: _Plan, tags: npt.NDArray[np.int16], probabilities: npt.NDArray[np.float32]) -> _FoundSpans:
        tokens = plan.tokens
        breaks = np.zeros(len(tokens.word_token) + 1, dtype=np.bool_)
        # A mention never crosses a blank line, a list item or the end of a sentence.
        breaks[tokens.word_bounds] = True
        words = decode.spans(tags[tokens.word_token], probabilities[tokens.word_token], breaks[:-1], self._tags)
        sure = words.score >= self.min_score
        first, last = words.first[sure], words.last[sure]
        segment = np.searchsorted(tokens.word_bounds, first, side="right") - 1
        chars = {number: tokens.chars(number) for number in set(segment.tolist())}
        begins = tokens.word_bounds[segment]
        start = [chars[number][word, 0] for number, word in zip(segment, first - begins, strict=True)]
        end = [chars[number][word, 1] for number, word in zip(segment, last - begins, strict=True)]
        offset = plan.segment_starts[segment]
        return _FoundSpans(
            segment,
            offset + np.array(start, dtype=np.int64),
            offset + np.array(end, dtype=np.int64),
            words.type[sure],
            words.score[sure],
        )


# ---------------------------------------------------------------------------------------------------------------------
# What passes between the stages


@dataclass(slots=True)
class _Answers:
    """The model's answers for a job's tokens: tags int16 [n], probabilities float32 [n]; count: tokens answered for."""

    tags: npt.NDArray[np.int16]
    probabilities: npt.NDArray[np.float32]
    count: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @classmethod
    def of(cls, n: int, outside: int) -> _Answers:
        return cls(np.full(n, outside, np.int16), np.zeros(n, np.float32))

    def add(self, count: int) -> None:
        with self._lock:
            self.count += count


#: A token inside a mention: its place among those that its window answers for, its tag and its probability.
_INSIDE = np.dtype([("at", "<i4"), ("tag", "<i2"), ("probability", "<f4")])


class _Busy:
    """A block that several threads may be in; seconds: those in which at least one was."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._inside = 0
        self._since = 0.0
        self._lock = threading.Lock()

    def __enter__(self) -> None:
        with self._lock:
            if not self._inside:
                self._since = perf_counter()
            self._inside += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            if not self._inside:
                self.seconds += perf_counter() - self._since


class _Result:
    """A window's answer, to be used again: its tokens inside mentions. Most windows have none."""

    __slots__ = ("inside", "key")

    def __init__(self, key: bytes, inside: bytes = b"") -> None:
        self.key = key
        self.inside = inside

    def keep(self, at: Ints, tags: npt.NDArray[np.int16], probabilities: npt.NDArray[np.float32]) -> None:
        inside = np.empty(len(at), _INSIDE)
        inside["at"], inside["tag"], inside["probability"] = at, tags, probabilities
        self.inside = inside.tobytes()

    def kept(self) -> npt.NDArray[np.void]:
        """As :data:`_INSIDE`, [n]."""
        return np.frombuffer(self.inside, _INSIDE)


class _Reuse:
    """Results by the key of their window, in two generations: when the young one is full, the old one is forgotten.

    So what was used last stays, half of the limit or more. An ordered dict takes twice the memory once it forgets.
    Results are kept as bytes, without an object for each; those under way are objects. For the planning thread alone.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit // 2
        self._size = 0
        self._young: dict[bytes, bytes] = {}
        self._old: dict[bytes, bytes] = {}
        self._under_way: dict[bytes, _Result] = {}

    def __len__(self) -> int:
        return len(self._young) + len(self._old) + len(self._under_way)

    def get(self, key: bytes) -> _Result | None:
        inside = self._young.get(key)
        if inside is None and (inside := self._old.pop(key, None)) is not None:
            self._hold(key, inside)
        return self._under_way.get(key) if inside is None else _Result(key, inside)

    def put(self, key: bytes) -> _Result:
        """Expect a window's result, which is filled in when the job that infers it is done, and then settled."""
        result = self._under_way[key] = _Result(key)
        return result

    def settle(self, results: Iterable[_Result]) -> None:
        """Remember results that are filled in."""
        for result in results:
            del self._under_way[result.key]
            self._hold(result.key, result.inside)

    def _hold(self, key: bytes, inside: bytes) -> None:
        size = _ENTRY_BYTES + sys.getsizeof(inside)
        if self._size + size > self._limit:
            self._young, self._old, self._size = {}, self._young, 0
        self._young[key] = inside
        self._size += size


def _key(window: bytes) -> bytes:
    """What stands for a window in memory: of any window 15 bytes, and none of the note.

    Of a thousand million windows two have one key with a chance of 1 in 10**18, far less than that of a memory error.
    One byte more, and Python would need 16 more for it.
    """
    return blake2b(window, digest_size=15).digest()


def _sort_out(
    ids: Ints, packed: Sequence[windows.Window], cache: _Reuse
) -> tuple[list[int], list[tuple[int, _Result]], list[tuple[int, _Result]]]:
    """Windows to infer, windows whose result is known, and of the first those that others will use; by number."""
    raw = ids.astype(np.int32).tobytes()
    new: list[int] = []
    known: list[tuple[int, _Result]] = []
    kept: list[tuple[int, _Result]] = []
    for number, window in enumerate(packed):
        asked = raw[4 * window.start : 4 * window.end]
        own = (window.own_start - window.start, window.own_end - window.start)
        if own != (0, window.end - window.start):
            # Of a segment too long for one window, each answers for a part. No id is -1.
            asked += np.array([-1, *own], dtype=np.int32).tobytes()
        key = _key(asked)
        result = cache.get(key)
        if result is None:
            new.append(number)
            kept.append((number, cache.put(key)))
        else:
            known.append((number, result))
    return new, known, kept


@dataclass(frozen=True, slots=True)
class _Piece:
    """A stretch of one note: the code point at which it starts, and its text."""

    rows: _Rows
    row: int
    start: int
    text: str


@dataclass(frozen=True, slots=True)
class _Plan:
    """A job under way.

    segment_starts: code point in its note, int64 [n_segments]; bounds: of the windows, int64 [n_windows, 4], as in
    :class:`windows.Window`; known: windows whose answer is another's; kept: windows whose answer others may need.
    """

    job: list[_Piece]
    tokens: windows.Tokens
    segment_starts: Ints
    piece_bounds: list[int]
    bounds: Ints
    window_counts: list[int]
    answers: _Answers
    known: list[tuple[int, _Result]]
    kept: list[tuple[int, _Result]]
    futures: list[Future[None]]


@dataclass(frozen=True, slots=True)
class _FoundSpans:
    """Spans of a job in order: int64 [n] each, score float32 [n]; segment is the one that holds the span."""

    segment: Ints
    start: Ints
    end: Ints
    type: Ints
    score: npt.NDArray[np.float32]

    def part(self, low: int, high: int) -> _FoundSpans:
        cut = slice(low, high)
        return _FoundSpans(self.segment[cut], self.start[cut], self.end[cut], self.type[cut], self.score[cut])


class _Rows:
    """An input batch whose notes are being annotated."""

    def __init__(self, batch: pa.RecordBatch, output: pa.Schema, types: tuple[str, ...]) -> None:
        self.open_pieces = 0
        self.is_read = False
        self._batch = batch
        self._output = output
        self._types = types
        n = batch.num_rows
        self._is_null = np.zeros(n, dtype=np.bool_)
        self._counts = {name: np.zeros(n, dtype=np.int32) for name in _COUNTS}
        self._digests: list[str | None] = [None] * n
        self._found: list[_FoundSpans] = []

    def is_done(self) -> bool:
        return self.is_read and self.open_pieces == 0

    def read(self, row: int, text: str | None) -> None:
        if text is None:
            self._is_null[row] = True
            return
        self._counts["n_chars"][row] = len(text)
        self._digests[row] = schema.text_sha256(text)

    def add(self, row: int, found: _FoundSpans, **counts: int) -> None:
        """Take in what was found in one piece; a note's pieces come in order."""
        for name, value in counts.items():
            self._counts[name][row] += value
        self._counts["n_spans"][row] += len(found.start)
        if len(found.start):
            self._found.append(found)
        self.open_pieces -= 1

    def batch(self) -> pa.RecordBatch:
        added = {"spans": self._spans(), "text_sha256": pa.array(self._digests, pa.string())}
        added |= {name: pa.array(values) for name, values in self._counts.items()}
        columns = [*self._batch.columns, *(added[name] for name in schema.ANNOTATION.names)]
        return pa.RecordBatch.from_arrays(columns, schema=self._output)

    def _spans(self) -> pa.ListArray:
        found = self._found
        type_ids = np.concatenate([f.type for f in found]) if found else np.zeros(0, np.int64)
        labels = pa.DictionaryArray.from_arrays(pa.array(type_ids, pa.int32()), pa.array(self._types, pa.string()))
        fields = {
            "start": pa.array(np.concatenate([f.start for f in found]) if found else [], pa.int32()),
            "end": pa.array(np.concatenate([f.end for f in found]) if found else [], pa.int32()),
            "label": labels.dictionary_decode(),
            "score": pa.array(np.concatenate([f.score for f in found]) if found else [], pa.float32()),
        }
        structs = pa.StructArray.from_arrays([fields[f.name] for f in schema.SPAN], fields=list(schema.SPAN))
        bounds = np.concatenate([[0], np.cumsum(self._counts["n_spans"])])
        return pa.ListArray.from_arrays(
            pa.array(bounds, pa.int32()), structs, type=schema.SPANS, mask=pa.array(self._is_null)
        )


def _best_of(model: Model) -> Callable[[Ints, Ints], tuple[npt.NDArray[np.int16], npt.NDArray[np.float32]]]:
    return lambda ids, lengths: decode.best(model(ids, lengths))


_COUNTS = [name for name in schema.ANNOTATION.names if name.startswith("n_")]


def _texts(batch: pa.RecordBatch, name: str) -> Iterator[str | None]:
    """The notes of a batch one after another, whatever string type holds them."""
    column = batch.column(name)
    if pa.types.is_dictionary(column.type):  # pyarrow does not decode those of views
        column = pa.DictionaryArray.from_arrays(column.indices, column.dictionary.cast(pa.large_string()))
        column = column.dictionary_decode()
    for value in column:
        try:
            yield value.as_py()
        except UnicodeDecodeError as exc:
            raise InputError(f"column {name!r} holds bytes that are not UTF-8") from exc
