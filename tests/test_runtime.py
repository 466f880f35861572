"""The session: the device asked for is the device that runs, and what the processor can do is known."""

import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from medner import decode, runtime, testing
from medner.errors import DeviceError, MissingPackage, ModelError, UsageError
from medner.runtime import Session, resolve_device

GRAPH = testing.bundle() / "onnx" / "model.onnx"


class FakeOrt:
    """An onnxruntime built with CUDA. It records what it is asked, and answers with ``got`` providers."""

    def __init__(self, got: list[str]) -> None:
        self.got = got
        self.entries: dict[str, str] = {}
        self.asked: list[Any] = []
        self.options: Any = None
        self.stated: int | str = 3

    def get_available_providers(self) -> list[str]:
        """What it was built with."""
        return ["CUDAExecutionProvider", "CPUExecutionProvider"]

    def SessionOptions(self) -> Any:  # noqa: N802
        """Options that note the entries."""
        self.options = SimpleNamespace(add_session_config_entry=self.entries.__setitem__)
        return self.options

    def InferenceSession(self, path: str, options: Any, providers: list[Any]) -> Any:  # noqa: N802
        """A session with one input."""
        self.asked = [path, providers]
        assert options is self.options
        got = self.got
        return SimpleNamespace(
            get_providers=lambda: got,
            get_inputs=lambda: [SimpleNamespace(name="input_ids")],
            get_outputs=lambda: [SimpleNamespace(name="logits", shape=["batch", "length", self.stated])],
            run=lambda _, feeds: [np.zeros((*feeds["input_ids"].shape, 3), np.float32)],
        )


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Callable[[list[str]], FakeOrt]:
    """Put a :class:`FakeOrt` in the place of onnxruntime."""

    def put(got: list[str]) -> FakeOrt:
        made = FakeOrt(got)
        monkeypatch.setattr(runtime, "_onnxruntime", lambda: made)
        return made

    return put


# ---------------------------------------------------------------------------------------------------------------------
# Devices


def test_devices_of_a_build_without_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without CUDA auto is the CPU, and CUDA is refused with the way to get it; exit code 5."""
    monkeypatch.setattr(
        runtime, "_onnxruntime", lambda: SimpleNamespace(get_available_providers=lambda: ["CPUExecutionProvider"])
    )
    assert (resolve_device("auto"), resolve_device("cpu")) == ("cpu", "cpu")
    for device in ("cuda", "cuda:1"):
        with pytest.raises(DeviceError) as failure:
            resolve_device(device)
        assert str(failure.value) == (
            f"--device {device}: this onnxruntime has no CUDA provider; "
            'use --device cpu, or: pip uninstall onnxruntime && pip install ".[gpu]" in a checkout of medner'
        )
        assert failure.value.exit_code == 5


def test_devices_of_a_build_with_cuda(fake: Callable[..., FakeOrt]) -> None:
    """With CUDA auto is its first device."""
    fake([])
    devices = {device: resolve_device(device) for device in ("auto", "cpu", "cuda", "cuda:0", "cuda:12")}
    assert devices == {"auto": "cuda:0", "cpu": "cpu", "cuda": "cuda:0", "cuda:0": "cuda:0", "cuda:12": "cuda:12"}


@pytest.mark.parametrize("device", ["gpu", "CPU", "", "cuda:", "cuda:x", "cuda:-1", "cpu:0", "cuda:0\n"])
def test_a_device_of_another_form(device: str) -> None:
    """Anything else is a usage error."""
    with pytest.raises(UsageError) as failure:
        resolve_device(device)
    assert str(failure.value) == f"--device {device}: unknown; use auto, cpu, cuda or cuda:N"
    assert failure.value.exit_code == 2


def test_a_missing_onnxruntime(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where onnxruntime is not installed, the error names both extras."""
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    for call in (runtime.version, lambda: resolve_device("auto"), lambda: Session(GRAPH, "cpu")):
        with pytest.raises(MissingPackage) as failure:
            call()
        assert str(failure.value) == (
            'onnxruntime is not installed: pip install ".[cpu]" in a checkout of medner, '
            'or ".[gpu]" on a machine with CUDA'
        )


def test_an_onnxruntime_that_is_broken(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """One that is there is not called missing; the error gives its own reason."""
    (tmp_path / "onnxruntime.py").write_text("raise ImportError('libcudart.so.13: cannot open shared object file')\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "onnxruntime", raising=False)
    with pytest.raises(MissingPackage) as failure:
        runtime.version()
    assert str(failure.value) == (
        "onnxruntime is installed and cannot be imported (libcudart.so.13: cannot open shared object file); "
        "medner doctor examines it"
    )


def test_a_graph_whose_products_cannot_be_made_exact(
    fake: Callable[..., FakeOrt], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where only the exact kernels are in the way, the message says so; what does not load at all is another matter."""
    monkeypatch.setattr(runtime, "has_exact_int8", lambda: False)
    ort = fake(["CPUExecutionProvider"])
    load, hopeless = ort.InferenceSession, False

    def refuse(*given: Any, **named: Any) -> Any:
        if ort.entries or hopeless:
            ort.entries = {}
            raise RuntimeError("Attempt to replace the existing tensor")
        return load(*given, **named)

    monkeypatch.setattr(ort, "InferenceSession", refuse)
    with pytest.raises(ModelError) as failure:
        Session(GRAPH, "cpu")
    assert str(failure.value) == (
        f"{GRAPH}: onnxruntime cannot make its 8-bit products exact for a processor without VNNI; "
        "use another precision, or quantize the model again with weights of the type QUInt8"
    )
    hopeless = True
    with pytest.raises(ModelError, match="onnxruntime cannot load it: Attempt to replace"):
        Session(GRAPH, "cpu")


def test_several_devices_for_one_session() -> None:
    """A session has one device."""
    for call in (resolve_device, lambda device: Session(GRAPH, device)):
        with pytest.raises(UsageError) as failure:
            call("cuda:0,1")
        assert (
            str(failure.value)
            == "--device cuda:0,1: several devices are for medner annotate into a run directory; name one"
        )


@pytest.mark.parametrize(("exact", "entries"), [(True, {}), (False, {"session.x64quantprecision": "1"})])
def test_a_cpu_session(
    fake: Callable[..., FakeOrt], monkeypatch: pytest.MonkeyPatch, exact: bool, entries: dict[str, str]
) -> None:
    """On the CPU each call has one thread, and no shape's memory is planned and kept, for batches have thousands.

    A processor whose 8-bit products saturate gets the precise kernels.
    """
    monkeypatch.setattr(runtime, "has_exact_int8", lambda: exact)
    ort = fake(["CPUExecutionProvider"])
    session = Session(GRAPH, "cpu")
    assert ort.asked == [str(GRAPH), ["CPUExecutionProvider"]]
    assert ort.entries == entries
    assert (ort.options.intra_op_num_threads, ort.options.inter_op_num_threads) == (1, 1)
    assert ort.options.enable_mem_pattern is False
    assert (session.device, session.provider) == ("cpu", "CPUExecutionProvider")


# ---------------------------------------------------------------------------------------------------------------------
# Graphs


def test_a_file_that_is_no_graph(tmp_path: Path) -> None:
    """What onnxruntime cannot load is a model error with its reason."""
    pytest.importorskip("onnxruntime")
    (tmp_path / "model.onnx").write_bytes(b"no graph")
    with pytest.raises(ModelError, match=rf"^{tmp_path}/model\.onnx: onnxruntime cannot load it: .*INVALID_PROTOBUF"):
        Session(tmp_path / "model.onnx", "cpu")


def graph(path: Path, inputs: tuple[str, ...], output: str = "logits", labels: int = 3) -> Path:
    """A graph that stacks its inputs on the last axis, as floats."""
    onnx = pytest.importorskip("onnx")
    helper, kinds = onnx.helper, onnx.TensorProto
    nodes = []
    for name in inputs:
        nodes.append(helper.make_node("Unsqueeze", [name, "axis"], [f"{name}.wide"]))
        nodes.append(helper.make_node("Cast", [f"{name}.wide"], [f"{name}.float"], to=kinds.FLOAT))
    nodes.append(helper.make_node("Concat", [f"{name}.float" for name in inputs], [output], axis=-1))
    model = helper.make_model(
        helper.make_graph(
            nodes,
            "stack",
            [helper.make_tensor_value_info(name, kinds.INT64, ["b", "n"]) for name in inputs],
            [helper.make_tensor_value_info(output, kinds.FLOAT, ["b", "n", labels])],
            [onnx.numpy_helper.from_array(np.array([-1], np.int64), "axis")],
        ),
        opset_imports=[helper.make_opsetid("", 18)],
        ir_version=8,
    )
    onnx.save(model, path)
    return path


def test_inputs_that_a_graph_has(tmp_path: Path) -> None:
    """A graph gets the mask of its lengths and zero token types where it asks for them, and nothing else."""
    ids, lengths = np.array([[5, 6, 7], [8, 9, 0]]), np.array([3, 2])
    mask = np.array([[1, 1, 1], [1, 1, 0]])
    inputs = {"input_ids": ids, "attention_mask": mask, "token_type_ids": 0 * ids}
    for names in (
        ("input_ids",),
        ("input_ids", "attention_mask"),
        ("attention_mask", "token_type_ids", "input_ids"),
        ("token_type_ids", "input_ids"),
    ):
        session = Session(graph(tmp_path / "model.onnx", names, labels=len(names)), "cpu")
        logits = session(ids, lengths)
        assert logits.dtype == np.float32
        assert session.n_labels == len(names)
        np.testing.assert_array_equal(logits, np.stack([inputs[name] for name in names], axis=-1))


def answering_graph(path: Path, answers: tuple[str, ...]) -> Path:
    """The graph of three stacked inputs, with outputs beside its logits that answer for them."""
    onnx = pytest.importorskip("onnx")
    helper, kinds = onnx.helper, onnx.TensorProto
    model = onnx.load(graph(path, ("input_ids", "attention_mask", "token_type_ids")))
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.array([-1], np.int64), "last"))
    makers = {
        "tag": [
            helper.make_node("ArgMax", ["logits"], ["class"], axis=-1, keepdims=0),
            helper.make_node("Cast", ["class"], ["tag"], to=kinds.INT16),
        ],
        "probability": [
            helper.make_node("Softmax", ["logits"], ["probabilities"], axis=-1),
            helper.make_node("ReduceMax", ["probabilities", "last"], ["probability"], keepdims=0),
        ],
    }
    for name in answers:
        model.graph.node.extend(makers[name])
        kind = kinds.INT16 if name == "tag" else kinds.FLOAT
        model.graph.output.append(helper.make_tensor_value_info(name, kind, ["b", "n"]))
    onnx.save(model, path)
    return path


def test_a_graph_that_gives_the_best_class(tmp_path: Path) -> None:
    """A graph with both outputs answers by itself, as its logits would; of equal logits the first class counts."""
    session = Session(answering_graph(tmp_path / "model.onnx", ("tag", "probability")), "cpu")
    assert session.gives_best
    ids, lengths = np.array([[5, 0, 1], [0, 2, 9]]), np.array([3, 2])
    tags, probabilities = session.best(ids, lengths)
    assert (tags.dtype, probabilities.dtype) == (np.int16, np.float32)
    assert tags.tolist() == [[0, 1, 0], [1, 0, 0]]
    expected_tags, expected = decode.best(session(ids, lengths))
    assert tags.tolist() == expected_tags.tolist()
    np.testing.assert_allclose(probabilities, expected, atol=1e-6)
    assert probabilities[0, 2] == pytest.approx(np.e / (2 * np.e + 1))


def test_a_probability_that_was_rounded_up(tmp_path: Path) -> None:
    """As a softmax in half precision may: a score is 1 at most, as ``medner verify`` asks."""
    onnx = pytest.importorskip("onnx")
    path = answering_graph(tmp_path / "model.onnx", ("tag", "probability"))
    model = onnx.load(path)
    (top,) = (node for node in model.graph.node if node.output[0] == "probability")
    top.output[0] = "below"
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.array(1.0005, np.float32), "least"))
    model.graph.node.append(onnx.helper.make_node("Max", ["below", "least"], ["probability"]))
    onnx.save(model, path)
    _, probabilities = Session(path, "cpu").best(np.array([[5, 0]]), np.array([2]))
    assert (probabilities.dtype, probabilities.tolist()) == (np.float32, [[1.0, 1.0]])


@pytest.mark.parametrize("answers", [(), ("tag",), ("probability",)])
def test_a_graph_that_does_not_give_the_best_class(tmp_path: Path, answers: tuple[str, ...]) -> None:
    """One of the outputs alone is not enough."""
    session = Session(answering_graph(tmp_path / "model.onnx", answers), "cpu")
    assert not session.gives_best
    assert session(np.array([[4, 5]]), np.array([2])).tolist() == [[[4, 1, 0], [5, 1, 0]]]


def test_logits_and_inner_values_of_a_serialized_graph(tmp_path: Path) -> None:
    """A graph in memory gives its logits for a padded batch, and named values for single windows of any length."""
    serialized = graph(tmp_path / "model.onnx", ("input_ids", "attention_mask")).read_bytes()
    ids, lengths = np.array([[5, 6, 7], [8, 9, 0]]), np.array([3, 2])
    logits = runtime.logits(serialized, ids, lengths)
    assert logits.dtype == np.float32
    assert logits.tolist() == [[[5, 1], [6, 1], [7, 1]], [[8, 1], [9, 1], [0, 0]]]
    samples = [np.array([5, 6, 7]), np.array([8])]
    found = [[value.tolist() for value in values] for values in runtime.activations(serialized, ["logits"], samples)]
    assert found == [[[[[5, 1], [6, 1], [7, 1]]]], [[[[8, 1]]]]]


@pytest.mark.parametrize("stated", ["labels", 5])
def test_the_number_of_labels_is_counted(fake: Callable[..., FakeOrt], stated: int | str) -> None:
    """The number of labels is that of the logits of a first trial, whatever the graph states about them."""
    fake(["CPUExecutionProvider"]).stated = stated
    assert Session(GRAPH, "cpu").n_labels == 3


@pytest.mark.parametrize(
    ("inputs", "output", "said"),
    [
        (("pixel_values",), "logits", "inputs pixel_values, outputs logits"),
        (("input_ids", "position_ids"), "logits", "inputs input_ids, position_ids, outputs logits"),
        (("attention_mask",), "logits", "inputs attention_mask, outputs logits"),
        (("input_ids",), "last_hidden_state", "inputs input_ids, outputs last_hidden_state"),
    ],
)
def test_a_graph_that_is_no_token_classifier(tmp_path: Path, inputs: tuple[str, ...], output: str, said: str) -> None:
    """Other inputs or outputs are a model error that names them; exit code 4."""
    path = graph(tmp_path / "model.onnx", inputs, output)
    with pytest.raises(ModelError) as failure:
        Session(path, "cpu")
    assert str(failure.value) == (
        f"{path}: not a token classifier: {said}; expected input_ids, attention_mask and logits"
    )
    assert failure.value.exit_code == 4


def test_a_batch_that_fails(capfd: pytest.CaptureFixture[str]) -> None:
    """An id beyond the vocabulary is a model error that names the operator; neither it nor onnxruntime shows the id."""
    session = Session(GRAPH, "cpu")
    with pytest.raises(ModelError) as failure:
        session(np.full((2, 8), 10_000), np.array([8, 8]))
    assert str(failure.value) == ("onnxruntime failed on a batch of (2, 8): InvalidArgument in the operator Gather")
    assert capfd.readouterr() == ("", "")


# ---------------------------------------------------------------------------------------------------------------------
# The processor


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., None]:
    """Pretend an architecture and a /proc/cpuinfo; None for a system without one."""

    def pretend(name: str, cpuinfo: str | None) -> None:
        file = tmp_path / "cpuinfo"
        file.unlink(missing_ok=True)
        if cpuinfo is not None:
            file.write_text(cpuinfo)
        monkeypatch.setattr(runtime.platform, "machine", lambda: name)
        monkeypatch.setattr(runtime, "_CPUINFO", file)

    return pretend


@pytest.mark.parametrize(
    ("name", "cpuinfo", "features", "exact"),
    [
        (
            "x86_64",
            "processor\t: 0\nflags\t\t: fpu sse2 avx2 avx512f avx512_vnni amx_int8\nbugs\t\t: spectre\n" * 2,
            "x86_64 avx2 avx512f avx512_vnni amx_int8",
            True,
        ),
        ("AMD64", "flags\t\t: avx2 avx_vnni\n", "amd64 avx2 avx_vnni", True),
        ("x86_64", "model name\t: avx512_vnni\nflags\t\t: fpu avx2 avx512f\n", "x86_64 avx2 avx512f", False),
        ("aarch64", "processor\t: 0\nFeatures\t: fp asimd asimddp i8mm\n", "aarch64 asimddp i8mm", True),
        ("x86_64", None, "x86_64", False),
        ("arm64", None, "arm64", True),
        ("", "", "unknown", True),
    ],
)
def test_instruction_sets(
    machine: Callable[..., None], name: str, cpuinfo: str | None, features: str, exact: bool
) -> None:
    """Features are those that choose kernels; only x86 without VNNI, or of unknown features, may saturate."""
    machine(name, cpuinfo)
    assert runtime.instruction_set() == features
    assert runtime.has_exact_int8() is exact


@pytest.fixture
def cgroups(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty tree of control groups; this process is in job/step of it."""
    monkeypatch.setattr(runtime, "_CGROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(runtime, "_OWN_CGROUP", tmp_path / "own")
    monkeypatch.setattr(runtime.os, "sched_getaffinity", lambda _: set(range(6)), raising=False)
    (tmp_path / "cgroup" / "job" / "step").mkdir(parents=True)
    (tmp_path / "own").write_text("0::/job/step\n")
    return tmp_path / "cgroup"


@pytest.mark.parametrize(
    ("limit", "cpus"),
    [
        ("max 100000", 6),
        ("400000 100000", 4),
        ("250000 100000", 3),
        ("1000 100000", 1),
        ("6400000 100000", 6),
        ("nonsense", 6),
        (None, 6),
    ],
)
def test_cpus_of_a_cgroup(cgroups: Path, limit: str | None, cpus: int) -> None:
    """The CPUs are those of the affinity, or fewer by the quota, rounded up; never none."""
    if limit:
        (cgroups / "cpu.max").write_text(limit + "\n")
    assert runtime.available_cpus() == cpus


def test_cpus_of_nested_cgroups(cgroups: Path) -> None:
    """The smallest quota from the process's own group up to the root counts, others' do not."""
    (cgroups / "job" / "step" / "cpu.max").write_text("max 100000\n")
    (cgroups / "job" / "cpu.max").write_text("300000 100000\n")
    (cgroups / "cpu.max").write_text("500000 100000\n")
    (cgroups / "other").mkdir()
    (cgroups / "other" / "cpu.max").write_text("100000 100000\n")
    assert runtime.available_cpus() == 3


def test_cpus_without_affinity_or_cgroups(cgroups: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Systems that know neither give all CPUs, at least one."""
    runtime._OWN_CGROUP.unlink()
    monkeypatch.delattr(runtime.os, "sched_getaffinity")
    monkeypatch.setattr(runtime.os, "cpu_count", lambda: 5)
    assert runtime.available_cpus() == 5
    monkeypatch.setattr(runtime.os, "cpu_count", lambda: None)
    assert runtime.available_cpus() == 1


def test_version() -> None:
    """The version is that of the onnxruntime that runs."""
    assert runtime.version() == pytest.importorskip("onnxruntime").__version__
