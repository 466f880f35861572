"""What ``medner compare`` found, as text, as Markdown, as a plot, and as the directory that holds them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from medner import sinks
from medner.engines import Setting
from medner.errors import OutputError

#: What an output directory holds; the last one is the mark of a finished comparison.
FILES = ("compare.md", "compare.png", "compare.json")

#: Figures of an engine's turn, each the median of its rounds in ``compare.json``.
FIGURES = ("p50_ms", "p95_ms", "p99_ms", "notes_per_second", "tokens_per_second", "load_seconds", "peak_mib")

_FAILS = "fails parity"
_COLOURS = {"pytorch": "#d95f02", "onnx": "#1f77b4"}
_FAILED_COLOUR = "#c4c4c4"


@dataclass(frozen=True, slots=True)
class Table:
    """A table of strings; the first column is aligned to the left, the others to the right."""

    title: str
    header: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]


def text(result: Mapping[str, Any]) -> str:
    """The comparison for a terminal."""
    parts = ["\n".join(facts(result)), *map(_as_text, tables(result)), "\n".join(notes(result))]
    return "\n\n".join(part for part in parts if part)


def markdown(result: Mapping[str, Any]) -> str:
    """The comparison as a Markdown document."""
    bundle, checkpoint = result["bundle"]["name"], result["checkpoint"]["name"]
    parts = [
        f"# PyTorch `{checkpoint}` against ONNX `{bundle}`",
        "\n".join(f"- {line}" for line in facts(result)),
        *map(_as_markdown, tables(result)),
        "\n".join(f"- {line}" for line in notes(result)),
        "![latency and throughput by engine](compare.png)",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def facts(result: Mapping[str, Any]) -> list[str]:
    """What was compared, on what, and how, a line each."""
    data, bundle, machine = result["notes"], result["bundle"], result["machine"]
    memory = f"{machine['memory_gib']} GiB, {machine['instruction_set']}"
    return [
        f"checkpoint {result['checkpoint']['name']}, bundle {bundle['name']}, windows of up to {bundle['window']} "
        f"tokens, {'as many segments as fit' if bundle['packed'] else 'one segment each'}",
        f"{data['name']}: {data['notes']:,} {'labelled ' if data['labelled'] else ''}notes, "
        f"{data['characters']:,} characters; {data['streamed']:,} streamed, {data['one_at_a_time']:,} one at a time",
        f"{machine['gpu'] or machine['processor']}, {machine['cpus']} CPUs, {memory}; {result['device']}, "
        f"{result['threads']} threads, {result['rounds']} rounds, {result['date']}",
        ", ".join(f"{name} {number}" for name, number in {**machine["versions"], "Python": machine["python"]}.items()),
    ]


def notes(result: Mapping[str, Any]) -> list[str]:
    """How to read the tables, a line each."""
    lines = ["figures are medians of the rounds; speed-ups are medians of the rounds' own ratios (lowest to highest)"]
    if result["logits"] is not None:
        logits = result["logits"]
        lines.append(
            f"onnx fp32: logits differ from {result['reference']} by at most {logits['max_difference']:.1e}, "
            f"{logits['ties']} ties, {logits['differences']} differences in {logits['tokens']:,} tokens"
        )
    return lines


def tables(result: Mapping[str, Any]) -> list[Table]:
    """Parity first, then latency, throughput, and what an engine takes."""
    found: Mapping[str, Mapping[str, Any]] = result["engines"]
    baselines = [name for name in found if name.startswith("pytorch") and found[name]["parity"]["passed"]]
    over = tuple(f"over {name}" for name in baselines)

    def faster(name: str, kind: str) -> tuple[str, ...]:
        return tuple(_speedup(found[name], other, kind) if other != name else "-" for other in baselines)

    parity = [
        (name, f"{held['spans']:,}", f"{held['agreement']:.2%}")
        + ((f"{held['f1']:.4f}",) if result["notes"]["labelled"] else ())
        + ("reference" if name == result["reference"] else verdict(held["passed"]),)
        for name, held in ((name, engine["parity"]) for name, engine in found.items())
    ]
    latency = [
        (name, *(f"{engine[figure]:.1f}" for figure in ("p50_ms", "p95_ms", "p99_ms")), *faster(name, "latency"))
        for name, engine in found.items()
    ]
    throughput = [
        (name, f"{engine['notes_per_second']:,.1f}", f"{engine['tokens_per_second']:,.0f}", *faster(name, "throughput"))
        for name, engine in found.items()
    ]
    needs = [
        (name, f"{engine['load_seconds']:.2f}", f"{engine['peak_mib']:,.0f}", f"{engine['file_bytes'] / 1e6:.1f}")
        for name, engine in found.items()
    ]
    best = [
        (name, *(str(Setting(**engine["best"][kind])) for kind in ("throughput", "latency")))
        for name, engine in found.items()
    ]
    scored = ("F1",) if result["notes"]["labelled"] else ()
    return [
        Table(f"Parity with {result['reference']}", ("engine", "spans", "equal", *scored, "result"), parity),
        Table("Latency of one note, ms", ("engine", "p50", "p95", "p99", *over), latency),
        Table("Throughput", ("engine", "notes/s", "tokens/s", *over), throughput),
        Table("Start and size", ("engine", "load, s", "peak memory, MiB", "file, MB"), needs),
        Table(
            "Best batch: tokens of a call, calls at a time x threads of each", ("engine", "stream", "one note"), best
        ),
    ]


def verdict(passed: bool) -> str:
    """How an engine that was held against PyTorch is called."""
    return "passes" if passed else "FAILS"


def _speedup(engine: Mapping[str, Any], other: str, kind: str) -> str:
    if engine["speedup"] is None:
        return _FAILS
    ratio = engine["speedup"][other][kind]
    return f"{ratio['median']:.2f}x ({ratio['lowest']:.2f} to {ratio['highest']:.2f})"


def _as_text(table: Table) -> str:
    widths = [max(map(len, column)) for column in zip(table.header, *table.rows, strict=True)]
    lines = [
        "  ".join(cell.ljust(width) if not i else cell.rjust(width) for i, (cell, width) in enumerate(pairs))
        for pairs in (list(zip(row, widths, strict=True)) for row in (table.header, *table.rows))
    ]
    return "\n".join([table.title, *lines])


def _as_markdown(table: Table) -> str:
    rule = ("---", *("---:" for _ in table.header[1:]))
    lines = [f"| {' | '.join(row)} |" for row in (table.header, rule, *table.rows)]
    return "\n".join([f"## {table.title}", "", *lines])


# ---------------------------------------------------------------------------------------------------------------------
# The plot


def draw(result: Mapping[str, Any], file: IO[bytes]) -> None:
    """Latency (p50, with p95 and p99) and throughput by engine, as a PNG; what fails parity is grey and hatched."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    found: Mapping[str, Mapping[str, Any]] = result["engines"]
    figure = Figure(figsize=(11, 1.9 + 0.55 * len(found)), layout="constrained")
    FigureCanvasAgg(figure)
    latency, throughput = figure.subplots(1, 2, sharey=True)
    for row, (name, engine) in enumerate(found.items()):
        failed = not engine["parity"]["passed"]
        colour = _FAILED_COLOUR if failed else _COLOURS[name.split()[0]]
        look = {"color": colour, "height": 0.62, "hatch": "///" if failed else None, "edgecolor": "white"}
        latency.barh(row, engine["p50_ms"], **look)
        throughput.barh(row, engine["notes_per_second"], **look)
        latency.plot([engine["p50_ms"], engine["p99_ms"]], [row, row], color="black", linewidth=1)
        latency.plot(engine["p95_ms"], row, "|", color="black", markersize=11)
        latency.plot(engine["p99_ms"], row, "D", color="black", markersize=4)
        said = f"{engine['p50_ms']:.1f}{_remark(result, name, 'latency')}"
        latency.annotate(said, (engine["p99_ms"], row), (7, 0), **_BESIDE)
        said = f"{engine['notes_per_second']:,.1f}{_remark(result, name, 'throughput')}"
        throughput.annotate(said, (engine["notes_per_second"], row), (5, 0), **_BESIDE)
    latency.set(yticks=range(len(found)), yticklabels=list(found), xlabel="ms, less is better")
    latency.set_title("Latency of one note: p50 (bar, number), p95 (tick), p99 (diamond)", fontsize=10)
    throughput.set(xlabel="notes/s, more is better")
    throughput.set_title("Throughput", fontsize=10)
    latency.invert_yaxis()
    for axes in (latency, throughput):
        axes.set_xlim(0, axes.dataLim.x1 * 1.42)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="x", color="#e6e6e6")
        axes.set_axisbelow(True)
    legend = [Patch(color=_COLOURS["pytorch"], label="PyTorch"), Patch(color=_COLOURS["onnx"], label="ONNX")]
    if any(not engine["parity"]["passed"] for engine in found.values()):
        legend.append(Patch(facecolor=_FAILED_COLOUR, hatch="///", edgecolor="white", label=_FAILS))
    figure.legend(handles=legend, loc="outside lower center", ncols=len(legend), frameon=False)
    machine, data = result["machine"], result["notes"]
    figure.suptitle(
        f"{result['bundle']['name']} on {data['notes']:,} notes, {machine['gpu'] or machine['processor']}, "
        f"{result['threads']} {'threads' if result['threads'] > 1 else 'thread'}; "
        f"(x): speed-up over {result['reference']}",
        fontsize=11,
    )
    figure.savefig(file, format="png", dpi=130)


_BESIDE: Mapping[str, Any] = {"textcoords": "offset points", "va": "center", "fontsize": 9}


def _remark(result: Mapping[str, Any], name: str, kind: str) -> str:
    """What stands behind an engine's figure: its speed-up over the reference, or that it fails parity."""
    speedup = result["engines"][name]["speedup"]
    if speedup is None:
        return f"  ({_FAILS})"
    reference = speedup.get(result["reference"])
    return f"  ({reference[kind]['median']:.2f}x)" if reference else ""


# ---------------------------------------------------------------------------------------------------------------------
# The directory


def prepare(path: Path, *, overwrite: bool) -> None:
    """Make the output directory, or refuse it with an :class:`OutputError`."""
    try:
        if path.exists() and not path.is_dir():
            raise OutputError(f"{path}: exists and is no directory; choose another -o")
        if path.is_dir() and any(path.iterdir()):
            if not (path / FILES[-1]).is_file():
                raise OutputError(f"{path}: not empty, and no comparison of medner; choose another -o")
            if not overwrite:
                raise OutputError(f"{path}: holds a comparison; choose another -o, or pass --overwrite")
        path.mkdir(parents=True, exist_ok=True)
    except OSError as exc:
        raise OutputError(f"{path}: cannot be written: {exc.strerror or type(exc).__name__}") from exc


def write(path: Path, result: Mapping[str, Any]) -> None:
    """Write :data:`FILES`, each atomically; raises :class:`OutputError`."""
    document, picture, values = (path / name for name in FILES)
    with sinks.atomic(document) as file:
        file.write(markdown(result).encode())
    with sinks.atomic(picture) as file:
        draw(result, file)
    sinks.write_json(values, result)
