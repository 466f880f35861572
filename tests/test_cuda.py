"""The CUDA session without a GPU: a fake onnxruntime keeps the device's memory and refuses what the real one would."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pytest

from medner import bundle, runtime, testing
from medner.annotate import Annotator, Options
from medner.errors import DeviceError, ModelError
from medner.run import RunOptions, run
from medner.runtime import Session, row_class

onnxruntime = pytest.importorskip("onnxruntime")
with pytest.MonkeyPatch.context() as patch:
    patch.setattr(sys, "path", [str(Path(__file__).parent), *sys.path])
    fake_cuda = import_module("fake_cuda")
FakeCuda, CUDA, CPU = fake_cuda.FakeCuda, fake_cuda.CUDA, fake_cuda.CPU
REFUSED, ARENA = fake_cuda.REFUSED, fake_cuda.ARENA

GRAPH = testing.bundle() / "onnx" / "model.onnx"


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    """Put a :class:`FakeCuda` in the place of onnxruntime."""
    made = FakeCuda()
    monkeypatch.setattr(runtime, "_onnxruntime", lambda: made)
    return made


def batch(rows: int, width: int = 8) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Ids of the tiny vocabulary, padded, and their lengths."""
    random = np.random.default_rng(rows)
    lengths = random.integers(1, width + 1, rows)
    return np.where(np.arange(width) < lengths[:, None], random.integers(1, 100, (rows, width)), 0), lengths


def on_cpu(ids: npt.NDArray[np.int64], lengths: npt.NDArray[np.int64]) -> list[Any]:
    """The logits that the same graph gives on the CPU, as lists."""
    listed: list[Any] = runtime.logits(GRAPH.read_bytes(), ids, lengths).tolist()
    return listed


# ---------------------------------------------------------------------------------------------------------------------
# The provider that runs is the one asked for


def test_a_cuda_session(cuda: FakeCuda, capfd: pytest.CaptureFixture[str]) -> None:
    """CUDA is asked for alone, without a fallback in the graph or in Python, and without TF32; nothing is printed."""
    session = Session(GRAPH, "cuda")
    options = {"device_id": "0", "use_tf32": "0", "arena_extend_strategy": "kSameAsRequested"}
    assert cuda.opened == [([(CUDA, options)], {"session.disable_cpu_ep_fallback": "1"}, False, 0)]
    assert (session.device, session.provider, session.n_labels, cuda.logged) == ("cuda:0", CUDA, 3, 4)
    assert capfd.readouterr() == ("", "")


def test_cuda_that_does_not_start(cuda: FakeCuda) -> None:
    """Without a card or a library it is a device error that does not speak of the graph; exit code 5."""
    cuda.starts = False
    with pytest.raises(DeviceError) as failure:
        Session(GRAPH, "cuda")
    assert str(failure.value) == (
        "--device cuda:0: CUDA does not start (no GPU, its driver, or a CUDA library); "
        "medner doctor says which, or use --device cpu"
    )
    assert failure.value.exit_code == 5


def test_cuda_that_fails_to_load_a_graph(cuda: FakeCuda, tmp_path: Path) -> None:
    """Any other failure is a device error with the first line of onnxruntime's reason."""
    cuda.strict = RuntimeError("CUDA failure 101: invalid device ordinal\nmore")
    (tmp_path / "model.onnx").write_bytes(b"no graph")
    with pytest.raises(DeviceError) as failure:
        Session(tmp_path / "model.onnx", "cuda")
    assert str(failure.value) == (
        "--device cuda:0: onnxruntime cannot run model.onnx there (CUDA failure 101: invalid device ordinal); "
        "medner doctor examines the device, or use --device cpu"
    )


def node(operator: str, provider: str, **shapes: list[int]) -> dict[str, Any]:
    """A node in a profile, with the type and shape of its output."""
    facts = {"op_name": operator, "provider": provider, "output_type_shape": [shapes]}
    return {"cat": "Node", "name": f"{operator}_1_kernel_time", "args": facts}


def test_arithmetic_on_the_cpu_is_refused(cuda: FakeCuda) -> None:
    """Operators that would compute the model's values on the CPU are named, with the way to a graph without them."""
    cuda.strict = REFUSED
    cuda.events = [
        {"cat": "Session", "name": "model_run", "args": {}},
        node("Shape", CPU, int64=[2]),
        node("MatMul", CUDA, float=[1, 2, 3]),
        node("MatMulInteger", CPU, int32=[1, 2, 3]),
        node("DynamicQuantizeLinear", CPU, uint8=[1, 2, 3]),
        node("MatMulInteger", CPU, int32=[1, 2, 3]),
    ]
    with pytest.raises(DeviceError) as failure:
        Session(GRAPH, "cuda")
    assert str(failure.value) == (
        "--device cuda:0: CUDA does not run DynamicQuantizeLinear, MatMulInteger of model.onnx; export the model again "
        "with --precision fp16 or fp32, or use --device cpu"
    )


def test_shapes_on_the_cpu_are_allowed(cuda: FakeCuda) -> None:
    """onnxruntime computes shapes on the CPU by design; such a graph is opened with both, and not profiled."""
    cuda.strict = REFUSED
    cuda.events = [node("Gather", CPU, int64=[3]), node("Sqrt", CPU, float=[]), node("MatMul", CUDA, float=[1, 2, 3])]
    assert Session(GRAPH, "cuda").provider == CUDA
    both = [(providers[-1], *rest) for providers, *rest in cuda.opened[1:]]
    assert both == [(CPU, {}, True, 0), (CPU, {}, False, 0)]


def test_a_profile_of_the_real_onnxruntime(tmp_path: Path) -> None:
    """In what it really writes, the operators of a graph on the CPU are found."""
    options = onnxruntime.SessionOptions()
    options.enable_profiling = True
    options.profile_file_prefix = str(tmp_path / "profile")
    session = onnxruntime.InferenceSession(str(GRAPH), options, providers=[CPU])
    session.run(["logits"], {"input_ids": np.zeros((1, 2), np.int64)})
    assert "Gather" in runtime._off_cuda(json.loads(Path(session.end_profiling()).read_bytes()))


# ---------------------------------------------------------------------------------------------------------------------
# Buffers, shapes and memory


def test_answers_through_buffers(cuda: FakeCuda) -> None:
    """Whatever was in the buffers before, the answers are those of the CPU."""
    session = Session(GRAPH, "cuda")
    session.most_tokens = 400
    for rows in (50, 3, 17, 1, 64, 50):
        ids, lengths = batch(rows)
        assert session(ids, lengths).tolist() == on_cpu(ids, lengths)


def test_a_graph_that_gives_the_best_class(cuda: FakeCuda) -> None:
    """Its tags and probabilities come through buffers of their types; logits are asked for without them, and back."""
    default = bundle.load("default").variant("int8", "cpu")[1]
    session, reference = Session(default, "cuda"), Session(default, "cpu")
    assert session.gives_best
    for rows in (5, 20):
        ids, lengths = batch(rows)
        for found, expected in zip(session.best(ids, lengths), reference.best(ids, lengths), strict=True):
            assert found.dtype == expected.dtype
            real = np.arange(ids.shape[1]) < lengths[:, None]
            assert found[real].tolist() == expected[real].tolist()
        assert session(ids, lengths).shape == (*ids.shape, session.n_labels)


def test_buffers_are_used_again(cuda: FakeCuda) -> None:
    """Once a size has been seen, calls allocate nothing; calls at the same time have buffers of their own."""
    session = Session(GRAPH, "cuda")
    for rows in (1, 64):
        session(*batch(rows))
    made = len(cuda.memory)
    for rows in [64, 1] * 20:
        session(*batch(rows))
    assert len(cuda.memory) == made
    taken = session._idle.pop()
    session(*batch(64))
    assert len(cuda.memory) > made
    session._idle.append(taken)
    assert len(session._idle) == 2


@pytest.mark.parametrize(
    ("rows", "full", "filled"),
    [
        (1, 128, 1), (3, 128, 4), (9, 128, 16), (16, 128, 16), (17, 128, 32), (127, 128, 128), (128, 128, 128),
        (1, 1, 1), (5, 7, 5), (130, 136, 136), (69, 136, 85), (17, 136, 17), (16, 136, 16), (120, 122, 122),
    ],
)  # fmt: skip
def test_row_classes(rows: int, full: int, filled: int) -> None:
    """Small calls are filled up to a power of two, others to an eighth of a full one, and a full one not at all."""
    assert row_class(rows, full) == filled


def test_few_shapes(cuda: FakeCuda) -> None:
    """Every number of rows up to a full batch makes no more than a dozen shapes, none beyond the budget."""
    session = Session(GRAPH, "cuda")
    session.most_tokens = 8 * 100
    cuda.calls.clear()
    for rows in range(1, 101):
        session(*batch(rows))
    assert sorted(set(cuda.calls)) == [(rows, 8) for rows in (1, 2, 4, 8, 13, 26, 39, 52, 65, 78, 91, 100)]


@pytest.mark.parametrize(
    "failure",
    [
        ARENA,
        "CUDA failure 2: out of memory ; GPU=0",
        "Available memory of 12 is smaller than requested bytes of 1024",
        "CUBLAS failure 3: CUBLAS_STATUS_ALLOC_FAILED",
        "CUDNN failure 4003: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED",
    ],
)
def test_a_batch_that_does_not_fit(cuda: FakeCuda, failure: str) -> None:
    """It is halved until it fits, with the same answers, and later batches begin with what fitted."""
    session = Session(GRAPH, "cuda")
    cuda.room, cuda.failure = 8 * 30, failure
    ids, lengths = batch(100)
    cuda.calls.clear()
    assert session(ids, lengths).tolist() == on_cpu(ids, lengths)
    assert cuda.calls == [(100, 8), (50, 8), (25, 8), (25, 8), (25, 8), (25, 8)]
    assert session.most_tokens == 25 * 8
    cuda.calls.clear()
    assert session(ids, lengths).tolist() == on_cpu(ids, lengths)
    assert cuda.calls == [(25, 8)] * 4


def test_a_window_that_does_not_fit(cuda: FakeCuda) -> None:
    """Where one window alone is too much, it is a device error with the ways out."""
    session = Session(GRAPH, "cuda")
    cuda.room = 4
    with pytest.raises(DeviceError) as failure:
        session(*batch(3))
    assert str(failure.value) == (
        "--device cuda:0: its memory does not hold one window of 8 tokens; "
        "end other programs that use the device, or use a smaller --window"
    )


def test_a_batch_that_fails(cuda: FakeCuda) -> None:
    """Another failure ends the run at once, names the operator, and nothing that may have stood in a note."""
    session = Session(GRAPH, "cuda")
    cuda.room = 0
    cuda.failure = "[ONNXRuntimeError] : 1 : FAIL : Non-zero status code returned while running Gelu node. SECRET"
    cuda.calls.clear()
    with pytest.raises(DeviceError) as failure:
        session(*batch(3))
    assert str(failure.value) == (
        "--device cuda:0: onnxruntime failed on a batch of (3, 8): RuntimeError in the operator Gelu; "
        "medner doctor examines the device"
    )
    assert len(cuda.calls) == 1


def test_buffers_of_the_real_onnxruntime() -> None:
    """The calls that the fake stands for are those of the real one: on the CPU they give the answers of a plain run."""
    session = onnxruntime.InferenceSession(str(GRAPH), providers=[CPU])
    buffers = runtime._Buffers(session, "cpu")
    for rows in (5, 2, 5):
        ids, lengths = batch(rows)
        (logits,) = buffers.run({"input_ids": ids}, {"logits": (np.dtype(np.float32), (*ids.shape, 3))})
        assert logits.tolist() == on_cpu(ids, lengths)


# ---------------------------------------------------------------------------------------------------------------------
# The budget


def clock(seconds: list[float]) -> Callable[[], float]:
    """A clock for :meth:`Session.probe`: how long the three calls of each size take; all else takes no time."""

    def times() -> Iterator[float]:
        now = 0.0
        yield now
        for took in seconds:
            yield now
            now += took
            yield now

    return times().__next__


@pytest.mark.parametrize(
    ("seconds", "chosen", "tried"),
    [
        ([0.1, 0.15, 0.2, 0.3, 0.5], 131_072, 5),  # ever more tokens a second
        ([0.1, 0.15, 0.29], 16_384, 3),  # 3 % more
        ([0.1, 0.4], 8_192, 2),  # fewer
        ([0.1, 0.15, 2.0 - 1e-9], 16_384, 3),
        ([2.5], 8_192, 1),  # no time left
    ],
)
def test_the_probe(cuda: FakeCuda, seconds: list[float], chosen: int, tried: int) -> None:
    """The largest budget that was worth it is taken and kept."""
    session = Session(GRAPH, "cuda")
    cuda.calls.clear()
    assert session.probe(64, clock(seconds)) == chosen
    assert session.most_tokens == chosen
    sizes = [8_192, 16_384, 32_768, 65_536, 131_072][:tried]
    assert [rows * width for rows, width in cuda.calls] == [size for size in sizes for _ in range(4)]


@pytest.mark.parametrize(("room", "chosen"), [(40_000, 32_768), (8_192, 8_192), (5_000, 4_096)])
def test_the_probe_within_memory(cuda: FakeCuda, room: int, chosen: int) -> None:
    """A budget that does not fit ends the search; where the first one does not, the part that fitted is taken."""
    session = Session(GRAPH, "cuda")
    cuda.room = room
    assert session.probe(64, clock([1e-3, 1e-3, 1e-3, 1e-3])) == chosen
    assert session.most_tokens == chosen


# ---------------------------------------------------------------------------------------------------------------------
# From note to span

NOTES = [
    "Patient with type 2 diabetes and chronic kidney disease. No fever.",
    "",
    None,
    "Asthma.\n\nHypertension; diabetes mellitus. " * 40,
    *(f"Seen {day} days after pneumonia, with fever." for day in range(60)),
]


def annotated(device: str, **options: Any) -> pa.RecordBatch:
    """The notes with their spans."""
    annotator = Annotator.load(testing.bundle(), Options(device=device, **options))
    return annotator(pa.record_batch({"text": pa.array(NOTES, pa.string())}))


@pytest.mark.parametrize("room", [float("inf"), 300])
def test_spans_on_cuda(cuda: FakeCuda, room: float) -> None:
    """The spans and counts are those of the CPU, also where memory is short."""
    cuda.room = room
    expected = annotated("cpu")
    assert annotated("cuda", batch_tokens=2_048).equals(expected)
    assert sum(map(len, expected.column("spans").drop_null().to_pylist())) > 10


def test_the_settings_on_cuda(cuda: FakeCuda) -> None:
    """Two threads, the budget that the probe finds or the one asked for, and jobs that fill it."""
    annotator = Annotator.load(testing.bundle(), Options(device="cuda"))
    assert annotator.session is not None
    assert annotator.threads == 2
    assert annotator.batch_tokens == annotator.session.most_tokens
    assert annotator.batch_tokens in runtime.PROBED_TOKENS
    asked = Annotator.load(testing.bundle(), Options(device="cuda", batch_tokens=500, threads=1))
    assert asked.session is not None
    assert (asked.batch_tokens, asked.session.most_tokens, asked.threads) == (500, 500, 1)


def test_auto_says_what_it_took(cuda: FakeCuda) -> None:
    """Where there is a choice, auto takes CUDA if it runs, else the CPU, and says which and why."""
    taken = Annotator.load(testing.bundle(), Options(batch_tokens=500))
    assert taken.session is not None
    assert (taken.session.device, taken.notice) == ("cuda:0", "--device auto takes cuda:0")
    cuda.starts = False
    fallen = Annotator.load(testing.bundle(), Options(batch_tokens=500))
    assert fallen.session is not None
    assert (fallen.session.device, fallen.notice) == (
        "cpu",
        "--device auto takes the CPU, for it could not take CUDA: --device cuda:0: CUDA does not start (no GPU, its "
        "driver, or a CUDA library); medner doctor says which, or use --device cpu",
    )
    for device in ("cpu", "cuda"):
        cuda.starts = True
        assert Annotator.load(testing.bundle(), Options(device=device, batch_tokens=500)).notice == ""


def test_auto_does_not_hide_a_damaged_model(cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    """That a model cannot be used is no reason to try it elsewhere."""

    def spoilt(*_: object) -> None:
        raise ModelError("no good")

    monkeypatch.setattr(Session, "_try", spoilt)
    with pytest.raises(ModelError, match=r"^no good$"):
        Annotator.load(testing.bundle(), Options())


def test_the_record_of_a_run(cuda: FakeCuda, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The manifest holds the device, the provider and the budget that really ran; auto's line is on standard error."""
    (tmp_path / "notes.jsonl").write_text('{"note_id": "a", "text": "Patient with type 2 diabetes."}\n')
    options = RunOptions((str(tmp_path / "notes.jsonl"),), str(tmp_path / "out"), model=str(testing.bundle()))
    manifest = run(options)
    assert [manifest["model"][name] for name in ("device", "provider", "precision")] == ["cuda:0", CUDA, "fp32"]
    assert manifest["options"]["threads"] == 2
    assert manifest["options"]["batch_tokens"] in runtime.PROBED_TOKENS
    assert "medner: --device auto takes cuda:0\n" in capfd.readouterr().err
    for starts, said in ((True, False), (False, True)):  # with --quiet only that a GPU is not used
        cuda.starts = starts
        run(replace(options, overwrite=True, quiet=True))
        assert ("medner: --device auto takes the CPU, for it" in capfd.readouterr().err) == said
