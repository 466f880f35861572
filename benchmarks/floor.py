"""The matrix-product floor: the time that the model's matrix products alone need, and medner's share of it.

    python benchmarks/floor.py [--bundle DIR] [--notes FILE] [--limit N] [--rounds 5]

The floor counts the products of the int8 graph, each with its own shape, over the tokens of a real run: special tokens
count, padding does not. Each shape is worth its best rate of ``MatMulInteger`` on this machine, measured alone, at
several numbers of rows, on as many threads as medner uses; the products of attention and of the classifier, which run
in fp32, are worth the best of those rates. So the floor is less than onnxruntime could ever need for this model.

Every round measures the products before and after medner and takes the better rate, and shares are formed inside it.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import common
import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
import patients
import report
from onnx import TensorProto, helper, numpy_helper

from medner import bundle as bundles
from medner import decode, runtime, sinks, sources, windows
from medner.annotate import Annotator, Model, Options

#: Medner is to reach this share of the floor with the default bundle in int8, end to end.
TARGET = 0.65
#: Rows of the products that are tried; the best counts.
ROWS = (64, 128, 256, 512, 1024, 2048)
#: Seconds that each shape is measured at each number of rows.
SECONDS = 0.1
#: Copies of the corpus that medner annotates; the slope between them leaves start-up out.
SIZES = (1, 4)
#: Batches that onnxruntime's profile covers.
PROFILED = 300

Ints = npt.NDArray[np.int64]
#: One inference call: ids int64 [n_windows, length], and lengths int64 [n_windows].
Call = tuple[Ints, Ints]
#: Rows and columns of a constant matrix, [k, n].
Shape = tuple[int, int]

_EIGHT_BITS = (TensorProto.INT8, TensorProto.UINT8)
_INT8_PRODUCTS = frozenset(
    {"MatMulInteger", "MatMulIntegerToFloat", "DynamicQuantizeMatMul", "QLinearMatMul", "QGemm", "QAttention"}
)
_FLOAT_PRODUCTS = frozenset({"MatMul", "FusedMatMul", "TransposeMatMul", "Gemm", "FusedGemm"})


# ---------------------------------------------------------------------------------------------------------------------
# What there is to compute


@dataclass(frozen=True, slots=True)
class Matrices:
    """The products of a graph: how many there are of each shape [k, n], in int8 and in fp32, and its attention."""

    int8: Mapping[Shape, int]
    fp32: Mapping[Shape, int]
    layers: int
    hidden: int


@dataclass(frozen=True, slots=True)
class Work:
    """What a corpus asks of the model.

    tokens: of all windows, special ones included; padded: the same with padding; squares: the windows' tokens squared,
    summed, which attention costs.
    """

    windows: int
    tokens: int
    padded: int
    squares: int


def matrices(bundle: bundles.Bundle) -> Matrices:
    """Count the products of a bundle's int8 graph.

    Raises ValueError for 8-bit matrices in an operator that is neither a product nor a look-up, lest one be missed.
    """
    _, path = bundle.variant("int8", "cpu")
    config = json.loads((bundle.path / "config.json").read_text(encoding="utf-8"))
    graph = onnx.load(str(path)).graph
    int8, fp32 = _constant_products(graph)
    return Matrices(_own(int8, config), fp32, int(config["num_hidden_layers"]), int(config["hidden_size"]))


def _own(products: Counter[Shape], config: Mapping[str, Any]) -> Counter[Shape]:
    """The model's own shapes: without the columns that the int8 graph adds for outliers."""
    sizes = [config[name] for name in ("hidden_size", "intermediate_size") if name in config]
    own: Counter[Shape] = Counter()
    for shape, count in products.items():
        k, n = (max((size for size in sizes if size <= columns), default=columns) for columns in shape)
        own[k, n] += count
    return own


def _constant_products(graph: onnx.GraphProto) -> tuple[Counter[Shape], Counter[Shape]]:
    constants = {tensor.name: tensor for tensor in graph.initializer if len(tensor.dims) == 2}
    int8: Counter[Shape] = Counter()
    fp32: Counter[Shape] = Counter()
    for node in graph.node:
        for tensor in (constants[name] for name in node.input if name in constants):
            k, n = tensor.dims
            shape = (n, k) if any(a.name == "transB" and a.i for a in node.attribute) else (k, n)
            if tensor.data_type in _EIGHT_BITS and node.op_type in _INT8_PRODUCTS:
                int8[shape] += 1
            elif tensor.data_type == TensorProto.FLOAT and node.op_type in _FLOAT_PRODUCTS:
                fp32[shape] += 1
            elif tensor.data_type in _EIGHT_BITS and node.op_type != "Gather":
                raise ValueError(f"{node.name}: is {node.op_type}, with 8-bit weights, a matrix product?")
    return int8, fp32


def work(calls: Sequence[Call]) -> Work:
    """Sum up the inference calls of a run."""
    lengths = np.concatenate([lengths for _, lengths in calls])
    padded = sum(ids.size for ids, _ in calls)
    return Work(len(lengths), int(lengths.sum()), padded, int((lengths**2).sum()))


def floor_seconds(todo: Work, model: Matrices, rates: Mapping[Shape, float]) -> dict[str, float]:
    """Seconds that the products need: those with int8 weights, those of attention, and the classifier.

    rates: floating-point operations a second at each int8 shape; a product of [m, k] and [k, n] takes 2 m k n. A layer
    multiplies queries by keys and probabilities by values, 2 L L hidden operations each for a window of L tokens.
    """
    best = max(rates.values())
    attention = model.layers * 2 * 2 * todo.squares * model.hidden
    return {
        "weights": sum(count * 2 * k * n * todo.tokens / rates[k, n] for (k, n), count in model.int8.items()),
        "attention": attention / best,
        "classifier": sum(count * 2 * k * n * todo.tokens for (k, n), count in model.fp32.items()) / best,
    }


# ---------------------------------------------------------------------------------------------------------------------
# How fast the machine multiplies


def product_graph(k: int, n: int) -> bytes:
    """A graph of one ``MatMulInteger``: uint8 [m, k], int8 weights [k, n] -> int32 [m, n]."""
    weights = np.random.default_rng(0).integers(-127, 128, (k, n), dtype=np.int8)
    graph = helper.make_graph(
        [helper.make_node("MatMulInteger", ["rows", "weights", "zero_point"], ["sums"])],
        "product",
        [helper.make_tensor_value_info("rows", TensorProto.UINT8, ["m", k])],
        [helper.make_tensor_value_info("sums", TensorProto.INT32, ["m", n])],
        [numpy_helper.from_array(weights, "weights"), numpy_helper.from_array(np.array(128, np.uint8), "zero_point")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    return bytes(model.SerializeToString())


def product_rate(k: int, n: int, m: int, threads: int, seconds: float = SECONDS) -> float:
    """Operations a second of one shape, summed over threads that each multiply in a session of their own."""
    graph = product_graph(k, n)
    barrier = threading.Barrier(threads)

    def multiply(_: int) -> float:
        session = onnxruntime.InferenceSession(graph, _session_options(), providers=["CPUExecutionProvider"])
        rows = np.random.default_rng(1).integers(0, 256, (m, k), dtype=np.uint8)
        sums = np.empty((m, n), np.int32)
        # Bound once, so that no call allocates or copies.
        bound = session.io_binding()
        bound.bind_cpu_input("rows", rows)
        bound.bind_output("sums", "cpu", 0, np.int32, sums.shape, sums.ctypes.data)
        session.run_with_iobinding(bound)
        barrier.wait()
        done, start = 0, time.perf_counter()
        while (spent := time.perf_counter() - start) < seconds:
            session.run_with_iobinding(bound)
            done += 1
        return done * 2 * m * k * n / spent

    with ThreadPoolExecutor(threads) as pool:
        return sum(pool.map(multiply, range(threads)))


def best_rates(shapes: Sequence[Shape], threads: int) -> dict[Shape, float]:
    """Operations a second of each shape, at the number of rows that suits it best."""
    return {(k, n): max(product_rate(k, n, m, threads) for m in ROWS) for k, n in shapes}


def _session_options() -> Any:
    """One thread, and exact sums, as :class:`medner.runtime.Session` has them."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    if not runtime.has_exact_int8():
        options.add_session_config_entry("session.x64quantprecision", "1")
    return options


# ---------------------------------------------------------------------------------------------------------------------
# What medner makes of it


class Remembering:
    """A model that notes its calls and their answers, so that they can be given again."""

    def __init__(self, model: Model) -> None:
        self.calls: list[Call] = []
        self._model = model
        self._answers: dict[bytes, npt.NDArray[np.float32]] = {}

    def __call__(self, ids: Ints, lengths: Ints) -> npt.NDArray[np.float32]:
        """Ask the model and note what it says."""
        answer = self._model(ids, lengths)
        self.calls.append((ids.copy(), lengths.copy()))
        self._answers[self._key(ids, lengths)] = answer
        return answer

    def again(self, ids: Ints, lengths: Ints) -> npt.NDArray[np.float32]:
        """Answer from memory: what a model would cost that takes no time."""
        return self._answers[self._key(ids, lengths)]

    @staticmethod
    def _key(ids: Ints, lengths: Ints) -> bytes:
        return lengths.tobytes() + ids.tobytes()


def session_seconds(session: Model, calls: Sequence[Call], threads: int) -> float:
    """Wall-clock seconds of the calls alone, on as many threads as medner uses."""
    with ThreadPoolExecutor(threads) as pool:
        start = time.perf_counter()
        for _ in pool.map(lambda call: session(*call), calls):
            pass
        return time.perf_counter() - start


def operators(graph: Path, calls: Sequence[Call]) -> dict[str, float]:
    """Percent of the graph's time by operator type, largest first, from onnxruntime's profile on one thread."""
    with tempfile.TemporaryDirectory() as folder:
        options = _session_options()
        options.enable_profiling = True
        options.profile_file_prefix = str(Path(folder) / "profile")
        session = onnxruntime.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])
        inputs = {node.name for node in session.get_inputs()}
        for ids, lengths in calls:
            mask = (np.arange(ids.shape[1]) < lengths[:, None]).astype(np.int64)
            feeds = {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}
            session.run(["logits"], {name: value for name, value in feeds.items() if name in inputs})
        events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    return shares_by_operator(events)


def shares_by_operator(events: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Percent of the kernels' time by operator type, largest first, from the events of onnxruntime's profile."""
    spent: Counter[str] = Counter()
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            spent[event["args"]["op_name"]] += event["dur"]
    return {name: 100 * value / spent.total() for name, value in spent.most_common()}


# ---------------------------------------------------------------------------------------------------------------------
# The work around the model

#: The functions whose time makes up a stage; :func:`stage_seconds` fails where one of them is never called.
STAGES: tuple[tuple[str, Any, str], ...] = (
    ("segmenting", windows, "segments"),
    ("tokenizing", windows.WordTokenizer, "tokenize"),
    ("planning", windows, "pack"),
    ("planning", windows, "batches"),
    ("decoding", decode, "best"),
    ("decoding", decode, "spans"),
)


@dataclass(slots=True)
class Clock:
    """Processor seconds by stage; each stage runs on one thread."""

    seconds: Counter[str] = field(default_factory=Counter)
    calls: Counter[str] = field(default_factory=Counter)

    def around(self, stage: str, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, timed; what it yields is made at once, so that the time is its own."""

        def timed(*given: Any, **named: Any) -> Any:
            start = time.thread_time()
            made = function(*given, **named)
            made = iter(list(made)) if isinstance(made, Iterator) else made
            self.seconds[stage] += time.thread_time() - start
            self.calls[name] += 1
            return made

        return timed


@contextmanager
def _clocked() -> Iterator[Clock]:
    """Put clocks around the functions of :data:`STAGES`."""
    clock = Clock()
    before = [(owner, name, getattr(owner, name)) for _, owner, name in STAGES]
    parallel = os.environ.get("TOKENIZERS_PARALLELISM")
    # Else the tokenizer works on threads of its own, which no clock of ours sees.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    try:
        for (stage, owner, name), (_, _, function) in zip(STAGES, before, strict=True):
            setattr(owner, name, clock.around(stage, name, function))
        yield clock
    finally:
        for owner, name, function in before:
            setattr(owner, name, function)
        if parallel is None:
            del os.environ["TOKENIZERS_PARALLELISM"]
        else:
            os.environ["TOKENIZERS_PARALLELISM"] = parallel


def stage_seconds(notes: Path, bundle: bundles.Bundle, model: Model, options: Options) -> dict[str, float]:
    """Processor seconds of one run by stage, with a model that takes no time.

    ``the rest`` is what the annotator does beside the stages: feeding, gathering, tables. Raises RuntimeError where a
    function of :data:`STAGES` is not called any more.
    """
    start = time.process_time()
    batches = list(sources.Reader(sources.discover([str(notes)]).files, sources.ReadOptions()).batches())
    reading = time.process_time() - start
    with _clocked() as clock:
        annotator = Annotator(bundle, model, options, precision="int8")
        start = time.process_time()
        annotated = list(annotator.stream(batches))
        annotating = time.process_time() - start
    if missing := [name for _, _, name in STAGES if not clock.calls[name]]:
        raise RuntimeError(f"never called: {', '.join(missing)}; bring STAGES up to date")
    with tempfile.TemporaryDirectory() as folder:
        start = time.process_time()
        with contextlib.closing(sinks.DirectorySink(Path(folder) / "run", "parquet", sinks.TableOptions())) as sink:
            sink.start({})
            sink.write(0, annotated)
        writing = time.process_time() - start
    return {
        "reading": reading,
        **clock.seconds,
        "the rest": annotating - clock.seconds.total(),
        "writing": writing,
    }


# ---------------------------------------------------------------------------------------------------------------------
# The run


def measure(bundle: str, texts: Sequence[str], rounds: int, sizes: Sequence[int], threads: int) -> dict[str, Any]:
    """Everything that ``results/floor.json`` holds, except the machine."""
    options = Options(precision="int8", device="cpu", reuse=False, threads=threads)
    annotator = Annotator.load(bundle, options)
    session = annotator.session
    assert session is not None
    remembering = Remembering(session)
    model = matrices(annotator.bundle)
    with tempfile.TemporaryDirectory() as folder:
        files = {size: patients.write_copies(Path(folder) / f"{size}x.jsonl", texts, size) for size in {1, *sizes}}
        counted = Annotator(annotator.bundle, remembering, options, precision="int8")
        batches = list(sources.Reader(sources.discover([str(files[1])]).files, sources.ReadOptions()).batches())
        spans = sum(int(batch.column("n_spans").to_numpy().sum()) for batch in counted.stream(batches))
        todo = work(remembering.calls)
        common.say(f"{len(texts)} notes, {todo.windows} windows, {todo.tokens} tokens, {spans} spans")

        measured = []
        for number in range(rounds):
            first = best_rates(list(model.int8), threads)
            alone = session_seconds(session, remembering.calls, threads)
            runs = common.interleaved({"medner": _medner(bundle, files, threads, Path(folder))}, sizes, 1)["medner"]
            second = best_rates(list(model.int8), threads)
            rates = {shape: max(first[shape], second[shape]) for shape in first}
            measured.append(_round(todo, model, rates, alone, runs, len(texts)))
            common.say(f"round {number + 1} of {rounds}: {measured[-1]['share']:.1%} of the floor")
        _, graph = annotator.bundle.variant("int8", "cpu")
        profile = operators(graph, remembering.calls[:: math.ceil(len(remembering.calls) / PROFILED)])
        stages = stage_seconds(files[1], annotator.bundle, remembering.again, options)
    return {
        "bundle": annotator.bundle.name,
        "notes": len(texts),
        "threads": threads,
        "sizes": list(sizes),
        "work": asdict(todo),
        "products": _listed(model, measured),
        "rounds": measured,
        "share": _spread([one["share"] for one in measured]),
        "session_share": _spread([one["session_share"] for one in measured]),
        "target": TARGET,
        "operators": profile,
        "stages": stages,
    }


def _medner(bundle: str, files: Mapping[int, Path], threads: int, folder: Path) -> Callable[[int], common.Run]:
    """Runs the command over so many copies of the corpus."""

    def run(size: int) -> common.Run:
        command = [Path(sys.executable).with_name("medner"), "annotate", files[size], "-o", folder / "run"]
        given = ["--model", bundle, "--precision", "int8", "--device", "cpu", "--threads", str(threads)]
        return common.timed([*command, *given, "--no-reuse", "--overwrite", "--quiet"])

    return run


def _round(
    todo: Work, model: Matrices, rates: Mapping[Shape, float], alone: float, runs: Mapping[str, Any], notes: int
) -> dict[str, Any]:
    """One round's figures, for one copy of the corpus; seconds are of wall clock."""
    (rate,) = common.rates(runs, {size: int(size) * notes for size in runs})
    small, large = min(runs, key=int), max(runs, key=int)
    cpu = (runs[large][0]["cpu_seconds"] - runs[small][0]["cpu_seconds"]) / (int(large) - int(small))
    parts = floor_seconds(todo, model, rates)
    total = sum(parts.values())
    return {
        "gflops": {f"{k} x {n}": value / 1e9 for (k, n), value in rates.items()},
        "floor": parts,
        "session_seconds": alone,
        "medner_seconds": notes / rate,
        "medner_cpu_seconds": cpu,
        "share": total / (notes / rate),
        "session_share": total / alone,
    }


def _listed(model: Matrices, rounds: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    return [
        {"k": k, "n": n, "count": count, "gflops": statistics.median(one["gflops"][f"{k} x {n}"] for one in rounds)}
        for (k, n), count in model.int8.items()
    ]


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "lowest": min(values), "highest": max(values)}


# ---------------------------------------------------------------------------------------------------------------------
# What it says


def breakdown(result: Mapping[str, Any]) -> dict[str, float]:
    """Percent of medner's time, from medians; with the noise of a shared machine a part may come out below zero.

    How much of the graph its products take is onnxruntime's word; all of it beyond the floor is padding, and products
    that run slower than alone at their best number of rows.
    """
    share, todo = result["share"]["median"], result["work"]
    graph = share / result["session_share"]["median"]
    products = graph * sum(result["operators"].get(name, 0) for name in _INT8_PRODUCTS | _FLOAT_PRODUCTS) / 100
    padding = share * (todo["padded"] / todo["tokens"] - 1)
    parts = {
        "matrix products at their best rate": share,
        "the same on padding": padding,
        "products slower than that": products - share - padding,
        "other operators": graph - products,
        "around the graph": 1 - graph,
    }
    return {name: 100 * value for name, value in parts.items()}


def section(result: Mapping[str, Any]) -> str:
    """The result in Markdown."""
    share, alone, todo = result["share"], result["session_share"], result["work"]
    cpu = statistics.median(one["medner_cpu_seconds"] for one in result["rounds"])
    variant = result["benchmark"].partition("-")[2]
    lines = [
        "## Matrix-product floor" + (f", {variant}" if variant else ""),
        "",
        f"{result['bundle']} in int8, {result['notes']} notes without reuse: {todo['windows']:,} windows, "
        f"{todo['tokens']:,} tokens ({100 * todo['padded'] / todo['tokens'] - 100:.1f} % padding), "
        f"{result['threads']} threads, {len(result['rounds'])} rounds; {report.described(result)}.",
        "",
        f"Medner end to end: **{_percent(share)}** of the floor; target {result['target']:.0%}: "
        f"{report.verdict(share['median'] >= result['target'])}. The session alone, on medner's own batches: "
        f"{_percent(alone)}.",
        "",
        "| products | how many | GFLOP/s, best of the row counts |",
        "|---|---|---|",
        *(f"| {p['k']} x {p['n']} | {p['count']} | {p['gflops']:,.0f} |" for p in result["products"]),
        "",
        "Of the floor " + ", ".join(_floor_parts(result)) + ".",
        "",
        "| where medner's time goes | % |",
        "|---|---|",
        *(f"| {name} | {value:.1f} |" for name, value in breakdown(result).items()),
        "",
        "| operator (onnxruntime's profile, one thread) | % of the graph |",
        "|---|---|",
        *(f"| {name} | {value:.1f} |" for name, value in result["operators"].items() if value >= 1),
        "",
        "| around the graph | processor seconds | % of medner's |",
        "|---|---|---|",
        *(f"| {name} | {value:.2f} | {100 * value / cpu:.1f} |" for name, value in result["stages"].items()),
    ]
    return "\n".join(lines) + "\n"


def _floor_parts(result: Mapping[str, Any]) -> Iterator[str]:
    for name in ("weights", "attention", "classifier"):
        percent = statistics.median(100 * one["floor"][name] / sum(one["floor"].values()) for one in result["rounds"])
        yield f"{name} {percent:.1f} %"


def _percent(spread: Mapping[str, float]) -> str:
    return f"{spread['median']:.1%} ({spread['lowest']:.1%} to {spread['highest']:.1%})"


def plot(result: Mapping[str, Any], path: Path) -> None:
    """Where medner's time goes, and the graph's by operator."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    whole, graph = figure.subplots(2, 1, height_ratios=[1, 3])
    colours = ("#1b6ca8", "#5f9bd0", "#8fb8de", "#c5d9ec", "#c9c9c9")
    left = 0.0
    for (name, value), colour in zip(breakdown(result).items(), colours, strict=True):
        whole.barh([0], [value], left=left, color=colour, label=f"{name}: {value:.0f} %")
        left += value
    whole.axvline(100 * result["target"], color="black", linestyle="--", linewidth=1)
    whole.set(title="medner's time, % (dashed: target for the products)", yticks=[], xlim=(0, 100))
    whole.legend(loc="upper center", bbox_to_anchor=(0.5, -0.35), ncols=3, frameon=False, fontsize=8)
    shown = {name: value for name, value in result["operators"].items() if value >= 1}
    graph.barh(list(shown), list(shown.values()), color="#8fb8de")
    graph.invert_yaxis()
    graph.set(title="the graph's time by operator, %")
    graph.tick_params(axis="y", labelsize=8)
    figure.savefig(path, dpi=120)


def main() -> None:
    """Measure, write ``results/floor.json``, or that of another machine beside it, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", default="default", help="directory or name of a bundle with an int8 variant")
    parser.add_argument("--notes", type=Path, default=patients.ACI_BENCH, help="notes with a field text")
    parser.add_argument("--limit", type=int, help="take so many of the notes, evenly spread")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--sizes", type=int, nargs=2, default=SIZES, help="copies of the corpus")
    parser.add_argument("--threads", type=int, default=runtime.available_cpus())
    parser.add_argument("--on", default="", help="kind of machine, where it has a result of its own, such as avx2")
    given = parser.parse_args()
    texts = common.every_kth(patients.read_texts(given.notes), given.limit)
    name = f"floor-{given.on}" if given.on else "floor"
    path = common.write(name, measure(given.bundle, texts, given.rounds, given.sizes, given.threads))
    print(section(json.loads(path.read_text(encoding="utf-8"))))


if __name__ == "__main__":
    main()
