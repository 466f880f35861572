"""PyTorch against ONNX: parity before times, no speed-up without it, and results that say the same everywhere."""

import io
import json
import os
import re
import shutil
import signal
import statistics
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
onnx = pytest.importorskip("onnx")
pytest.importorskip("matplotlib")

from onnx import numpy_helper  # noqa: E402

from medner import bundle as bundles  # noqa: E402
from medner import cli, compare, comparison, engines, testing  # noqa: E402
from medner.compare import CompareOptions  # noqa: E402
from medner.engines import Engine, Process, Setting  # noqa: E402
from medner.errors import DeviceError, MednerError, MissingPackage, ModelError  # noqa: E402
from medner.parity import LogitParity, VariantParity  # noqa: E402

#: Stands in every note, and nowhere else.
SECRET = "Zyxwanda"
TEXTS = [
    f"The patient {SECRET} has asthma and no fever . No cancer of the breast .",
    f"Her mother had type 2 diabetes , and {SECRET} has heart failure .",
    f"Pain and fever . {SECRET} had no asthma at home .",
    f"No fever , {SECRET} .",
]

Medner = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def pair(small_bert: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The small BERT as a checkpoint and as a bundle."""
    folder = tmp_path_factory.mktemp("pair")
    checkpoint = shutil.copytree(small_bert.parent / "checkpoint", folder / "checkpoint")
    shutil.copyfile(small_bert / "tokenizer.json", checkpoint / "tokenizer.json")
    return checkpoint, shutil.copytree(small_bert, folder / "bundle")


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Few settings and short turns; PyTorch keeps its threads."""
    monkeypatch.setattr(compare, "BUDGETS", {"cpu": (64, 512)})
    monkeypatch.setattr(compare, "STREAM_SECONDS", 0.0)
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


class Inside(engines.Bench):
    """A stand-in for :class:`engines.Process` that saves the start of a process."""

    load_seconds = 0.5

    def __enter__(self) -> "Inside":
        return self

    def __exit__(self, *_: object) -> None:
        pass


@pytest.fixture
def inside(monkeypatch: pytest.MonkeyPatch) -> None:
    """Engines run in this process."""
    monkeypatch.setattr(engines, "Process", Inside)


@pytest.fixture
def call(capfd: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Medner:
    """Call ``medner compare`` in an empty directory; gives its exit code, standard output and standard error."""
    monkeypatch.chdir(tmp_path)

    def call(checkpoint: Path, bundle: Path, notes: str, *more: object) -> tuple[int, str, str]:
        given = ("--checkpoint", checkpoint, "--bundle", bundle, "--notes", notes, "-o", "out", "--threads", 2, *more)
        with pytest.raises(SystemExit) as caught:
            cli.main(["compare", *map(str, given)])
        sys.stdout.flush()
        return int(caught.value.code or 0), *capfd.readouterr()

    return call


@pytest.fixture
def notes(tmp_path: Path) -> str:
    """Plain notes."""
    (tmp_path / "notes.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return "notes.jsonl"


def with_bias(bundle: Path, copy: Path, precision: str, bias: list[float]) -> Path:
    """A copy of the bundle, its hashes in order, with another bias of its classes in one variant."""
    shutil.copytree(bundle, copy)
    graph = copy / bundles.VARIANT_FILES[precision]
    model = onnx.load(graph)
    (tensor,) = (tensor for tensor in model.graph.initializer if tensor.name == "classifier.bias")
    tensor.CopyFrom(numpy_helper.from_array(np.array(bias, np.float32), tensor.name))
    onnx.save(model, graph)
    described = bundles.load(bundle)
    bundles.write_manifest(
        copy, name="changed", labels=described.labels, window=described.window, packed=described.packed, card={}
    )
    return copy


def read(folder: str = "out") -> dict[str, Any]:
    """``compare.json``."""
    value: dict[str, Any] = json.loads(Path(folder, "compare.json").read_text())
    return value


def check_consistent(result: dict[str, Any], output: str, baselines: tuple[str, ...]) -> None:
    """The three files and the terminal say the same, and all figures follow from the rounds."""
    assert sorted(path.name for path in Path("out").iterdir()) == sorted(comparison.FILES)
    assert output == comparison.text(result) + "\n"
    assert Path("out/compare.md").read_text() == comparison.markdown(result)
    assert Path("out/compare.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    for name, engine in result["engines"].items():
        rounds = engine["rounds"]
        assert len(rounds) == result["rounds"]
        assert all(0 < r["p50_ms"] <= r["p95_ms"] <= r["p99_ms"] for r in rounds)
        for figure in comparison.FIGURES:
            assert engine[figure] == statistics.median(r[figure] for r in rounds) > 0
        fastest = max(engine["tried"], key=lambda trial: trial["notes_per_second"])
        quickest = min(engine["tried"], key=lambda trial: trial["latency_ms"])
        for kind, trial in (("throughput", fastest), ("latency", quickest)):
            assert engine["best"][kind].items() <= trial.items()
        if not engine["parity"]["passed"]:
            assert (engine["speedup"], bool(engine["failure"])) == (None, True)
            continue
        assert engine["failure"] is None
        assert set(engine["speedup"]) == set(baselines) - {name}
        for other, ratios in engine["speedup"].items():
            theirs = result["engines"][other]["rounds"]
            each = [b["p50_ms"] / a["p50_ms"] for a, b in zip(rounds, theirs, strict=True)]
            assert ratios["latency"] == {"median": statistics.median(each), "lowest": min(each), "highest": max(each)}
            each = [a["notes_per_second"] / b["notes_per_second"] for a, b in zip(rounds, theirs, strict=True)]
            assert ratios["throughput"] == {
                "median": statistics.median(each), "lowest": min(each), "highest": max(each)
            }  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# Whole comparisons


def test_compare(pair: tuple[Path, Path], notes: str, call: Medner, monkeypatch: pytest.MonkeyPatch) -> None:
    """In processes of their own: every step is announced, parity before times, and no note text gets out."""
    monkeypatch.setattr(compare, "TORCH_PRECISIONS", {"cpu": ("fp32",)})
    code, output, error = call(*pair, notes, "--rounds", 1)
    result = read()
    # Whether so random a model survives int8 is not the question here.
    assert code == (0 if passes(result, "onnx int8") else 1), error
    check_consistent(result, output, ("pytorch fp32",))
    names = ["pytorch fp32", "onnx fp32", "onnx int8"]
    assert list(result["engines"]) == names
    held = {name: engine["parity"] for name, engine in result["engines"].items()}
    assert held["onnx fp32"] == held["pytorch fp32"]
    assert held["pytorch fp32"]["spans"] > 5
    told = {
        name: f"{value['agreement']:.2%} of spans equal pytorch fp32's: {comparison.verdict(value['passed'])}"
        for name, value in held.items()
    }
    assert [line.removeprefix("medner: ") for line in error.splitlines()[:15]] == [
        "1 of 9: parity: onnx fp32", f"onnx fp32: {told['onnx fp32']}",
        "2 of 9: parity: pytorch fp32", f"pytorch fp32: {told['pytorch fp32']}",
        "3 of 9: parity: onnx int8", f"onnx int8: {told['onnx int8']}",
        "4 of 9: pytorch fp32: looking for its best batch",
        "5 of 9: onnx fp32: looking for its best batch",
        "6 of 9: onnx int8: looking for its best batch",
        "7 of 9: round 1 of 1: pytorch fp32", "8 of 9: round 1 of 1: onnx fp32", "9 of 9: round 1 of 1: onnx int8",
    ]  # fmt: skip
    titles = ["Parity with pytorch fp32", "Latency of one note, ms", "Throughput", "Start and size"]
    assert [line for line in output.splitlines() if line in titles] == titles
    assert result["notes"] == {
        "name": "notes.jsonl", "notes": 4, "characters": sum(map(len, TEXTS)), "labelled": False, "streamed": 4,
        "one_at_a_time": 4,
    }  # fmt: skip
    tokens = result["logits"]
    assert (tokens["ties"], tokens["differences"]) == (0, 0)
    assert tokens["tokens"] > 50
    assert (result["bundle"]["window"], result["bundle"]["packed"], result["threads"]) == (40, True, 2)
    for name, file in (
        ("onnx int8", pair[1] / "onnx/model_int8.onnx"),
        ("pytorch fp32", pair[0] / "model.safetensors"),
    ):
        assert result["engines"][name]["file_bytes"] == file.stat().st_size
    written = b"".join(path.read_bytes() for path in Path("out").iterdir())
    assert SECRET not in output + error
    assert SECRET.encode() not in written


@pytest.mark.usefixtures("inside")
def test_a_variant_that_fails_gets_no_speedup(
    pair: tuple[Path, Path], notes: str, call: Medner, tmp_path: Path
) -> None:
    """Its figures are there, its speed-up is not, in any output; the exit code is 1, and everything is written."""
    bundle = with_bias(pair[1], tmp_path / "changed", "int8", [1000, 0, 0])
    code, output, error = call(pair[0], bundle, notes, "--rounds", 2)
    result = read()
    check_consistent(result, output, tuple(n for n in ("pytorch fp32", "pytorch bf16") if passes(result, n)))
    failed = result["engines"]["onnx int8"]
    assert failed["parity"] == {
        "spans": 0,
        "agreement": 0.0,
        "f1": None,
        "reference_f1": None,
        "passed": False,
        "kept": None,
    }
    assert failed["failure"] == "0.00% of spans equal PyTorch's"
    assert code == 1
    assert error.splitlines()[-1] == (
        "medner: parity on notes.jsonl: onnx int8 failed: 0.00% of spans equal PyTorch's; "
        "its figures are given without a speed-up"
    )
    for table in comparison.tables(result):
        (row,) = (row for row in table.rows if row[0] == "onnx int8")
        columns = [cell for title, cell in zip(table.header, row, strict=True) if title.startswith("over ")]
        assert columns == ["fails parity"] * len(columns)
        assert bool(columns) == (table.title in ("Latency of one note, ms", "Throughput"))
    assert passes(result, "onnx fp32")
    assert "x (" in output


def passes(result: dict[str, Any], name: str) -> bool:
    """Whether an engine passed parity."""
    return bool(result["engines"][name]["parity"]["passed"])


@pytest.mark.usefixtures("inside")
def test_an_fp32_variant_that_fails(pair: tuple[Path, Path], notes: str, call: Medner, tmp_path: Path) -> None:
    """fp32 is held to the tag of every token; the message counts those that differ."""
    bundle = with_bias(pair[1], tmp_path / "changed", "fp32", [1000, 0, 0])
    code, _, error = call(pair[0], bundle, notes, "--rounds", 1)
    logits, found = read()["logits"], read()["engines"]["onnx fp32"]
    assert (code, found["speedup"]) == (1, None)
    assert logits["differences"] > 5
    said = f"{logits['differences']} of {logits['tokens']} tokens have another tag than PyTorch gives"
    assert found["failure"] == said
    assert f"onnx fp32 failed: {said}" in error.splitlines()[-1]


@pytest.mark.usefixtures("inside")
def test_labelled_notes(pair: tuple[Path, Path], call: Medner, tmp_path: Path) -> None:
    """Where spans are known, every engine's F1 is given beside PyTorch's; here PyTorch's own spans are the truth."""
    annotator = testing.annotator()
    lines = [
        json.dumps({"text": text, "spans": [[s.start, s.end, s.label] for s in annotator(text)]}) for text in TEXTS
    ]
    (tmp_path / "gold.jsonl").write_text("\n".join(lines) + "\n")
    _, output, _ = call(*pair, "gold.jsonl", "--rounds", 1)
    result = read()
    held = {name: engine["parity"] for name, engine in result["engines"].items()}
    assert result["notes"]["labelled"]
    assert {value["reference_f1"] for value in held.values()} == {held["pytorch fp32"]["f1"]}
    assert held["onnx fp32"]["f1"] == held["pytorch fp32"]["f1"] > 0
    table = comparison.tables(result)[0]
    assert table.header == ("engine", "spans", "equal", "F1", "result")
    assert table.rows[0] == (
        "pytorch fp32", str(held["pytorch fp32"]["spans"]), "100.00%", f"{held['pytorch fp32']['f1']:.4f}", "reference"
    )  # fmt: skip
    assert "gold.jsonl: 4 labelled notes" in output


@pytest.mark.usefixtures("inside")
def test_a_table_of_notes(pair: tuple[Path, Path], call: Medner, tmp_path: Path) -> None:
    """--text-column names the column of a table, and --limit takes notes evenly over it."""
    rows = [f"no fever {number}" for number in range(9)]
    (tmp_path / "notes.csv").write_text("transcription\n" + "".join(f"{row}\n" for row in rows))
    call(*pair, "notes.csv", "--text-column", "transcription", "--limit", 3, "--rounds", 1)
    assert read()["notes"] == {
        "name": "notes.csv", "notes": 3, "characters": 30, "labelled": False, "streamed": 3, "one_at_a_time": 3
    }  # fmt: skip


@pytest.mark.usefixtures("inside")
def test_a_bundle_without_fp32(pair: tuple[Path, Path], notes: str, call: Medner, tmp_path: Path) -> None:
    """Engines are the variants that are there; without fp32 no logits are compared."""
    bundle = shutil.copytree(pair[1], tmp_path / "small")
    (bundle / "onnx/model.onnx").unlink()
    bundles.write_manifest(
        bundle, name="small", labels=("O", "B-Disease", "I-Disease"), window=40, packed=True, card={}
    )
    _, output, _ = call(pair[0], bundle, notes, "--rounds", 1)
    result = read()
    assert list(result["engines"]) == ["pytorch fp32", "pytorch bf16", "onnx int8"]
    assert result["logits"] is None
    assert "logits" not in output


# ---------------------------------------------------------------------------------------------------------------------
# What is refused


def test_a_bundle_of_another_checkpoint(pair: tuple[Path, Path], notes: str, call: Medner, tmp_path: Path) -> None:
    """Other labels, another tokenizer, other weights: model errors, exit code 4; nothing is written."""
    checkpoint = shutil.copytree(pair[0], tmp_path / "other")
    config = json.loads((checkpoint / "config.json").read_text())
    config["id2label"] = {"0": "O", "1": "B-Drug", "2": "I-Drug"}
    (checkpoint / "config.json").write_text(json.dumps(config))
    assert call(checkpoint, pair[1], notes) == (
        4, "", f"medner: {pair[1]}: its labels (O, B-Disease, I-Disease) are not those of {checkpoint} "
        "(O, B-Drug, I-Drug); compare a bundle with the checkpoint that it was exported from\n",
    )  # fmt: skip
    checkpoint = shutil.copytree(pair[0], tmp_path / "another")
    tokenizer = json.loads((checkpoint / "tokenizer.json").read_text())
    # What transformers leaves in the file does not count.
    (checkpoint / "tokenizer.json").write_text(json.dumps(tokenizer | {"truncation": None, "padding": None}, indent=1))
    assert compare.check_pair(checkpoint, str(pair[1])).name == "small"
    (checkpoint / "tokenizer.json").write_text(json.dumps(tokenizer | {"normalizer": None}))
    assert call(checkpoint, pair[1], notes) == (
        4, "", f"medner: {pair[1]}: its tokenizer.json is not that of {checkpoint}; "
        "compare a bundle with the checkpoint that it was exported from\n",
    )  # fmt: skip
    bundle = shutil.copytree(pair[1], tmp_path / "bundle")
    card = json.loads((bundle / "medner.json").read_text()) | {"checkpoint": {"model.safetensors": "0" * 64}}
    (bundle / "medner.json").write_text(json.dumps(card))
    assert call(pair[0], bundle, notes) == (
        4, "", f"medner: {bundle}: was exported from other weights than those of {pair[0]}; "
        "compare a bundle with the checkpoint that it was exported from\n",
    )  # fmt: skip
    assert not Path("out").exists()


def test_notes_without_a_span(pair: tuple[Path, Path], call: Medner, tmp_path: Path) -> None:
    """Where PyTorch finds nothing, nothing is proven, and nothing is timed."""
    (tmp_path / "blank.jsonl").write_text('{"text": " \\n "}\n')
    code, output, error = call(*pair, "blank.jsonl")
    assert (code, output) == (4, "")
    assert error.splitlines() == [
        "medner: 1 of 28: parity: onnx fp32",
        "medner: blank.jsonl: PyTorch's model finds no span in it, so it proves nothing",
    ]
    assert list(Path("out").iterdir()) == []


def test_an_output_that_cannot_be_used(pair: tuple[Path, Path], notes: str, call: Medner, tmp_path: Path) -> None:
    """A file, somebody's directory, and an earlier comparison without --overwrite are refused with exit code 6."""
    path = tmp_path / "out"
    path.write_text("precious")
    assert call(*pair, notes) == (6, "", "medner: out: exists and is no directory; choose another -o\n")
    path.unlink()
    path.mkdir()
    (path / "diary.txt").write_text("precious")
    said = "medner: out: not empty, and no comparison of medner; choose another -o\n"
    assert call(*pair, notes, "--overwrite") == (6, "", said)
    (path / "compare.json").write_text("{}")
    said = "medner: out: holds a comparison; choose another -o, or pass --overwrite\n"
    assert call(*pair, notes) == (6, "", said)
    comparison.prepare(path, overwrite=True)
    assert (path / "diary.txt").read_text() == "precious"


def test_without_pytorch_or_matplotlib(
    pair: tuple[Path, Path], notes: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both are asked for before anything is timed."""
    monkeypatch.chdir(tmp_path)
    options = CompareOptions(pair[0], str(pair[1]), notes, tmp_path / "out", device="cpu")
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "torch", None)
        with pytest.raises(
            MissingPackage, match=r'^PyTorch checkpoints need the extra "train": pip install "\.\[train\]"'
        ):
            compare.compare(options)
    monkeypatch.setattr(compare.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(MissingPackage, match=r'^comparing needs the extra "train": pip install "\.\[train\]"'):
        compare.compare(options)


def test_a_bundle_that_has_nothing_for_the_device(pair: tuple[Path, Path]) -> None:
    """int8 is for the CPU; a bundle that has nothing else cannot be compared on a GPU."""
    bundle = bundles.load(pair[1])
    assert [e.name for e in compare.contenders_of(pair[0], bundle, "cuda:1")] == [
        "pytorch fp32", "pytorch fp16", "onnx fp32"
    ]  # fmt: skip
    only = bundles.Bundle(
        bundle.path, "small", bundle.labels, 40, True, {"int8": bundle.variants["int8"]}, bundle.files, False
    )
    with pytest.raises(DeviceError) as failure:
        compare.contenders_of(pair[0], only, "cuda:1")
    assert str(failure.value) == ("--device cuda:1: none of the variants of small (int8) is for it; use --device cpu")


# ---------------------------------------------------------------------------------------------------------------------
# The rules, by hand


def test_engines_load_the_bundle_that_was_named(
    pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not the one that ships under the name of its directory."""
    shutil.copytree(pair[1], tmp_path / "tiny")
    monkeypatch.chdir(tmp_path)
    for engine in compare.contenders_of(pair[0], bundles.load("./tiny"), "cpu"):
        assert bundles.load(engine.bundle).path == tmp_path / "tiny"


def test_spread() -> None:
    """Items are taken evenly, the first one always, and never twice."""
    assert compare.spread(range(10), 4) == [0, 2, 5, 7]
    assert compare.spread("abc", 9) == ["a", "b", "c"]
    assert compare.spread("abc", 1) == ["a"]


def test_settings() -> None:
    """onnxruntime runs a call on one thread; PyTorch may also give all its threads to one call."""
    assert engines.settings("onnx", 2, (64, 512)) == [Setting(64, 2, 1), Setting(512, 2, 1)]
    assert engines.settings("pytorch", 2, (64,)) == [Setting(64, 1, 2), Setting(64, 2, 1)]
    assert engines.settings("pytorch", 1, (64,)) == [Setting(64, 1, 1)]


def test_speedups() -> None:
    """Ratios are formed inside a round, where the machine was the same; who fails neither gets nor gives one."""
    # The machine is half as fast in the second round: the ratios stay.
    figures = {"pytorch fp32": (40.0, 10.0), "pytorch bf16": (20.0, 20.0), "onnx int8": (8.0, 50.0)}
    rounds = [
        {name: {"p50_ms": slow * ms, "notes_per_second": rate / slow} for name, (ms, rate) in figures.items()}
        for slow in (1.0, 2.0)
    ]
    passing = ["pytorch fp32", "onnx int8"]
    five = {"median": 5.0, "lowest": 5.0, "highest": 5.0}
    assert compare.speedups("onnx int8", passing, rounds) == {"pytorch fp32": {"latency": five, "throughput": five}}
    assert compare.speedups("pytorch fp32", passing, rounds) == {}
    assert compare.speedups("pytorch bf16", passing, rounds) is None
    rounds[1]["onnx int8"]["p50_ms"] = 8.0
    found = compare.speedups("onnx int8", list(figures), rounds)
    assert found is not None
    assert found["pytorch bf16"]["latency"] == {"median": 3.75, "lowest": 2.5, "highest": 5.0}


@pytest.mark.parametrize(
    ("precision", "held", "said"),
    [
        ("int8", VariantParity(9, 0.9, 0.81, 0.85), "90.00% of spans equal PyTorch's, F1 0.8100 against 0.8500"),
        ("fp32", VariantParity(9, 0.9), "3 of 70 tokens have another tag than PyTorch gives"),
        ("int8", VariantParity(9, 0.99, passed=True), None),
    ],
)
def test_failure(precision: str, held: VariantParity, said: str | None) -> None:
    """What keeps an engine from passing, in figures; None where it passes."""
    engine = Engine("onnx", precision, "c", "b", "cpu")
    assert compare.failure(engine, held, LogitParity(70, 2, 3, 0.1)) == said


def test_a_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps done, steps in all and what is under way stand in one line; what was found stays above it."""

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    shown = Terminal()
    monkeypatch.setattr(sys, "stderr", shown)
    progress = compare._Progress(3)
    progress.step("parity: onnx fp32")
    progress.say("onnx fp32: passes")
    progress.step("round 1 of 1: onnx fp32")
    progress.close()
    lines = [line.strip() for line in shown.getvalue().replace("\n", "\r").split("\r")]
    assert "medner: onnx fp32: passes" in lines
    assert any(re.fullmatch(r"0/3\|.*\| 00:00 parity: onnx fp32", line) for line in lines)
    assert any(re.fullmatch(r"1/3\|.*\| 00:00 round 1 of 1: onnx fp32", line) for line in lines)


# ---------------------------------------------------------------------------------------------------------------------
# A process of its own


def engine_of(pair: tuple[Path, Path], precision: str = "int8") -> Engine:
    """An ONNX engine."""
    return Engine("onnx", precision, str(pair[0]), str(pair[1]), "cpu")


def test_the_memory_is_the_engines_own(pair: tuple[Path, Path]) -> None:
    """What the calling process holds does not count, though the system's own peak would begin with it."""
    held = np.ones(75_000_000)  # 600 MB
    with Process(engine_of(pair)) as process:
        process.take(TEXTS, TEXTS)
        process.throughput(Setting(64, 1, 1), 0.0)
        peak = process.peak_bytes()
    assert 20e6 < peak < held.nbytes


def test_errors_of_a_process(pair: tuple[Path, Path], tmp_path: Path) -> None:
    """A model error comes across as itself; of any other only its type does, which holds no note text."""
    with pytest.raises(ModelError) as failure:
        Process(Engine("onnx", "int8", "none", str(tmp_path / "none"), "cpu"))
    assert str(failure.value).startswith(f"{tmp_path}/none: no such model directory; ")
    with Process(engine_of(pair)) as process:
        process.take([SECRET], [SECRET])
        with pytest.raises(MednerError) as broken:
            process.latencies(Setting(64, 1, 1), "all")  # type: ignore[arg-type]
        assert str(broken.value) == (
            "internal error of an engine: TypeError in latencies; MEDNER_DEBUG=1 shows the traceback"
        )
        assert len(process.latencies(Setting(64, 1, 1), 1)) == 1


def test_a_process_that_dies(pair: tuple[Path, Path]) -> None:
    """The message names the engine and how its process ended."""
    with Process(engine_of(pair, "fp32")) as process:
        os.kill(process._process.pid, signal.SIGKILL)
        with pytest.raises(MednerError) as failure:
            process.take(TEXTS, TEXTS)
    assert str(failure.value) == (
        "onnx fp32: its process ended with code -9; is there enough memory? MEDNER_DEBUG=1 shows what it said"
    )
