"""The onnxruntime session: the provider asked for is the provider that runs. Arrays in, arrays out.

The only file that imports onnxruntime.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import platform
import re
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from medner import graphfile
from medner.errors import DeviceError, MissingPackage, ModelError, UsageError, install

_DEVICE = re.compile(r"cpu|cuda(?::(\d+))?")
_DEVICES = re.compile(r"cuda:\d+(?:,\d+)+")

#: What onnxruntime's arena, CUDA, cuBLAS and cuDNN say where the device has no memory left.
_OUT_OF_MEMORY = re.compile(
    r"Failed to allocate memory|smaller than requested bytes|out of memory|CUDA failure 2\b"
    r"|(?:CUBLAS|CUDNN)_STATUS_ALLOC_FAILED|DEVICE_ALLOCATION_FAILED"
)

#: TF32 would round the products of an fp32 graph, whose spans are PyTorch's. The arena grows by what is asked for, not
#: by powers of two.
_CUDA_OPTIONS = {"use_tf32": "0", "arena_extend_strategy": "kSameAsRequested"}

#: Padded tokens of a call that :meth:`Session.probe` tries, and for how many seconds it goes on.
PROBED_TOKENS = (8_192, 16_384, 32_768, 65_536, 131_072)
_PROBE_SECONDS = 2.0
_CGROUPS = Path("/sys/fs/cgroup")
_OWN_CGROUP = Path("/proc/self/cgroup")
_CPUINFO = Path("/proc/cpuinfo")


class Session:
    """A token classifier on one device.

    Calls may come from several threads at once. On the CPU each call runs on the thread that makes it, so results do
    not depend on how many there are. On CUDA a batch is rounded up to one of a few shapes, and one that does not fit
    the device's memory is run in smaller parts.

    device: ``cpu`` or ``cuda:N``; provider: the onnxruntime execution provider that runs; n_labels: the size of the
    last axis of its logits; most_tokens: padded tokens of the largest call on CUDA, None for no limit; it falls where
    memory runs out. What a graph states about its outputs need not be so: it is tried on two tokens, and every answer
    is checked.
    """

    def __init__(self, graph: Path, device: str) -> None:
        """Load a graph. ``device`` is ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.

        Raises :class:`DeviceError` where that device cannot run it, :class:`ModelError` where nothing can.
        """
        ort = _onnxruntime()
        self.device = resolve_device(device)
        self.most_tokens: int | None = None
        self._on_cuda = self.device != "cpu"
        self._session = _open_on_cuda(ort, graph, self.device) if self._on_cuda else _open(ort, graph, [_CPU], _exact())
        self.provider: str = self._session.get_providers()[0]
        self._inputs = _input_names(self._session)
        unknown = self._inputs - {"input_ids", "attention_mask", "token_type_ids"}
        outputs = {node.name: node for node in self._session.get_outputs()}
        if unknown or "input_ids" not in self._inputs or "logits" not in outputs:
            raise ModelError(
                f"{graph}: not a token classifier: inputs {', '.join(sorted(self._inputs))}, "
                f"outputs {', '.join(outputs)}; expected input_ids, attention_mask and logits"
            )
        #: Whether the graph itself names each token's likeliest class, so that :meth:`best` may be called.
        self.gives_best = {"tag", "probability"} <= set(outputs)
        #: Whether what the graph makes of a window depends on the others of its call.
        self.scales_by_batch = graphfile.scales_by_batch(graph)
        self.n_labels = 0
        #: Element types of the outputs, known once they have been tried; from then on CUDA has buffers for them.
        self._kinds: dict[str, np.dtype[Any]] = {}
        self._idle: deque[_Buffers] = deque()
        self._try(graph)

    def _try(self, graph: Path) -> None:
        """Run two tokens that stand in no note, whatever the vocabulary.

        Raises :class:`ModelError`, and :class:`DeviceError` where CUDA fails.
        """
        ids, lengths = np.zeros((1, 2), dtype=np.int64), np.array([2])
        names = ["logits", "tag", "probability"] if self.gives_best else ["logits"]
        try:
            values = self._session.run(names, _feeds(self._inputs, ids, lengths))
        except Exception as exc:  # as above
            if self._on_cuda:
                raise _not_there(self.device, graph, _reason(exc)) from exc
            raise ModelError(f"{graph}: onnxruntime cannot run it: {_reason(exc)}") from exc
        self.n_labels = np.shape(values[0])[-1] if np.ndim(values[0]) == 3 else 0
        try:
            self._answer(ids, lengths)
            if self._on_cuda:
                self._kinds = {name: value.dtype for name, value in zip(names, values, strict=True)}
                self._answer(ids, lengths)
        except ModelError as exc:
            raise ModelError(f"{graph}: {exc}") from exc

    def _answer(self, ids: npt.NDArray[np.int64], lengths: npt.NDArray[np.int64]) -> None:
        """Ask for all that may be asked for."""
        self(ids, lengths)
        if self.gives_best:
            self.best(ids, lengths)

    def probe(self, window: int, clock: Callable[[], float] = time.perf_counter) -> int:
        """Padded tokens of a call at which CUDA is fastest, which becomes :attr:`most_tokens`.

        window: tokens of the windows that are tried. Each size of :data:`PROBED_TOKENS` is run on full windows, until
        one brings less than 5 % more tokens a second, memory runs out, or two seconds have passed.
        """
        ask = self.best if self.gives_best else self.__call__
        best, chosen, begin = 0.0, PROBED_TOKENS[0], clock()
        for tokens in PROBED_TOKENS:
            self.most_tokens = tokens
            ids = np.zeros((max(1, tokens // window), window), dtype=np.int64)
            lengths = np.full(len(ids), window)
            ask(ids, lengths)  # the first call of a shape plans its kernels
            start = clock()
            for _ in range(3):
                ask(ids, lengths)
            end = clock()
            if self.most_tokens < tokens:  # a call did not fit
                chosen = min(chosen, self.most_tokens)
                break
            rate = ids.size / max(end - start, 1e-9)
            if rate < 1.05 * best:
                break
            best, chosen = rate, tokens
            if end - begin > _PROBE_SECONDS:
                break
        self.most_tokens = chosen
        return chosen

    def __call__(self, ids: npt.NDArray[np.int64], lengths: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        """Logits of a batch.

        ids: int64 [n_windows, length], padded on the right; lengths: int64 [n_windows], tokens before the padding.
        Returns float32 [n_windows, length, n_labels]; what stands at padding is undefined.
        """
        (logits,) = self._run(["logits"], ids, lengths)
        _check("logits", logits, _LOGITS, (*ids.shape, self.n_labels))
        # An impossible class may have minus infinity; a maximum that is no number, or infinite, decides nothing.
        if not np.isfinite(logits[_mask(ids, lengths)].max(axis=-1)).all():
            raise ModelError(f"the graph's logits are no numbers in a batch of {ids.shape}; export the model again")
        return np.asarray(logits, dtype=np.float32)

    def best(
        self, ids: npt.NDArray[np.int64], lengths: npt.NDArray[np.int64]
    ) -> tuple[npt.NDArray[np.int16], npt.NDArray[np.float32]]:
        """The likeliest class of each token and its probability, computed in the graph; arguments as for a call.

        Returns int16 [n_windows, length] and float32 [n_windows, length]; what stands at padding is undefined.
        """
        tags, probabilities = self._run(["tag", "probability"], ids, lengths)
        _check("tag", tags, _TAGS, ids.shape)
        _check("probability", probabilities, _LOGITS, ids.shape)
        real = _mask(ids, lengths)
        known, likely = tags[real], probabilities[real]
        # A softmax may round up, in half precision by a thousandth; what is no number fails each comparison.
        if not ((known >= 0) & (known < self.n_labels) & (likely >= 0) & (likely <= 1.001)).all():
            raise ModelError(
                f"the graph's tags are not all of its {self.n_labels} classes, or its probabilities not between 0 and "
                f"1, in a batch of {ids.shape}; export the model again"
            )
        return np.asarray(tags, dtype=np.int16), np.minimum(probabilities, 1, dtype=np.float32)

    def _run(self, outputs: list[str], ids: npt.NDArray[np.int64], lengths: npt.NDArray[np.int64]) -> list[Any]:
        if self._kinds:
            return self._run_in_parts(outputs, ids, lengths)
        try:
            return list(self._session.run(outputs, _feeds(self._inputs, ids, lengths)))
        except Exception as exc:  # as above; its message names values, and those stood in a note
            raise ModelError(f"onnxruntime failed on a batch of {ids.shape}: {_place(exc)}") from exc

    def _run_in_parts(
        self, outputs: list[str], ids: npt.NDArray[np.int64], lengths: npt.NDArray[np.int64]
    ) -> list[Any]:
        """A batch on CUDA, in as many calls as the device's memory makes necessary."""
        width = ids.shape[1]
        parts: list[list[npt.NDArray[Any]]] = []
        start = 0
        while start < len(ids):
            full = len(ids) if self.most_tokens is None else max(1, self.most_tokens // width)
            rows = min(len(ids) - start, full)
            part = slice(start, start + rows)
            try:
                parts.append(self._run_buffered(outputs, ids[part], lengths[part], row_class(rows, full)))
            except Exception as exc:  # as above
                if not _OUT_OF_MEMORY.search(str(exc)):
                    raise DeviceError(
                        f"--device {self.device}: onnxruntime failed on a batch of {(rows, width)}: {_place(exc)}; "
                        "medner doctor examines the device"
                    ) from exc
                if rows == 1:
                    raise DeviceError(
                        f"--device {self.device}: its memory does not hold one window of {width} tokens; "
                        "end other programs that use the device, or use a smaller --window"
                    ) from exc
                smaller = max(1, rows // 2) * width
                # Of two threads that fail at once the second one halves nothing again.
                self.most_tokens = smaller if self.most_tokens is None else min(self.most_tokens, smaller)
                continue
            start += rows
        return [np.concatenate(values) if len(parts) > 1 else values[0] for values in zip(*parts, strict=True)]

    def _run_buffered(
        self, outputs: list[str], ids: npt.NDArray[np.int64], lengths: npt.NDArray[np.int64], rows: int
    ) -> list[npt.NDArray[Any]]:
        """One call of ``rows`` rows, the last one repeated, through buffers that no other call uses meanwhile."""
        n = len(ids)
        if rows > n:
            ids, lengths = (np.concatenate([a, np.repeat(a[-1:], rows - n, axis=0)]) for a in (ids, lengths))
        shapes = {name: (*ids.shape, self.n_labels) if name == "logits" else ids.shape for name in outputs}
        try:
            buffers = self._idle.pop()
        except IndexError:
            buffers = _Buffers(self._session, self.device)
        # Not in a finally: buffers of a call that failed are let go, with the memory that they hold.
        values = buffers.run(
            _feeds(self._inputs, ids, lengths), {name: (self._kinds[name], shapes[name]) for name in outputs}
        )
        self._idle.append(buffers)
        return [value[:n] for value in values]


class _Buffers:
    """Memory of a device for the inputs and outputs of one call at a time, made once for each power of two."""

    def __init__(self, session: Any, device: str) -> None:
        kind, _, number = device.partition(":")
        self._session = session
        self._device = (kind, int(number or 0))
        self._binding = session.io_binding()
        self._made: dict[tuple[str, int], tuple[Any, npt.NDArray[Any]]] = {}

    def run(
        self, feeds: Mapping[str, npt.NDArray[Any]], outputs: Mapping[str, tuple[np.dtype[Any], tuple[int, ...]]]
    ) -> list[npt.NDArray[Any]]:
        """Answers to ``feeds``, copied to the host; outputs: element type and shape of each that is wanted, by name."""
        binding = self._binding
        binding.clear_binding_outputs()  # what was bound for another call would be computed again
        for name, value in feeds.items():
            buffer, staged = self._buffer(name, value.dtype, value.size)
            staged[: value.size] = value.ravel()
            buffer.update_inplace(staged)  # takes no less than the whole
            binding.bind_input(name, *self._device, value.dtype.type, value.shape, buffer.data_ptr())
        bound = []
        for name, (kind, shape) in outputs.items():
            size = int(np.prod(shape))
            buffer, _ = self._buffer(name, kind, size)
            binding.bind_output(name, *self._device, kind.type, shape, buffer.data_ptr())
            bound.append((buffer, size, shape))
        binding.synchronize_inputs()
        self._session.run_with_iobinding(binding)
        binding.synchronize_outputs()
        # A copy, for a buffer on the CPU would give its own memory.
        return [buffer.numpy()[:size].reshape(shape).copy() for buffer, size, shape in bound]

    def _buffer(self, name: str, kind: np.dtype[Any], size: int) -> tuple[Any, npt.NDArray[Any]]:
        """The device's memory for at least ``size`` elements, and the host's that is copied to it."""
        capacity = 1 << (size - 1).bit_length()
        if (name, capacity) not in self._made:
            memory = _onnxruntime().OrtValue.ortvalue_from_shape_and_type([capacity], kind.type, *self._device)
            self._made[name, capacity] = memory, np.zeros(capacity, kind)
        return self._made[name, capacity]


def row_class(rows: int, full: int) -> int:
    """Rows that a call of ``rows`` rows is filled up to: a power of two, beyond an eighth of ``full`` eighths of it.

    cuDNN plans its kernels for each shape, which takes longer than a call, and keeps the plans.
    """
    step = -(-full // 8)
    if rows <= step:
        return min(1 << (rows - 1).bit_length(), step)
    return min(-(-rows // step) * step, full)


_CPU, _CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"


def _exact() -> dict[str, str]:
    """Session entries for the CPU: where 8-bit products would saturate, kernels that sum them exactly."""
    return {} if has_exact_int8() else {"session.x64quantprecision": "1"}


def _open(ort: Any, graph: Path, providers: list[Any], entries: Mapping[str, str]) -> Any:
    """Open a graph on the CPU; raises :class:`ModelError`."""
    options = _session_options(ort, entries)
    # For each shape onnxruntime would keep a plan of its memory, and windows in batches have thousands of shapes.
    options.enable_mem_pattern = False
    path = _path(graph)
    try:
        return ort.InferenceSession(path, options, providers=providers)
    except Exception as exc:  # onnxruntime raises RuntimeError and a family of private classes
        if entries and _opens(ort, graph, providers):
            raise ModelError(
                f"{graph}: onnxruntime cannot make its 8-bit products exact for a processor without VNNI; "
                "use another precision, or quantize the model again with weights of the type QUInt8"
            ) from exc
        raise ModelError(f"{graph}: onnxruntime cannot load it: {_reason(exc)}") from exc


def _path(graph: Path) -> str:
    """The path as onnxruntime takes it; raises :class:`ModelError` for one that it does not."""
    try:
        str(graph).encode()
    except UnicodeEncodeError:
        raise ModelError(f"{graph}: onnxruntime opens no path that is not valid UTF-8; rename it") from None
    return str(graph)


def _opens(ort: Any, graph: Path, providers: list[Any]) -> bool:
    """Whether a graph can be opened without entries, by which its 8-bit products may saturate."""
    try:
        _open(ort, graph, providers, {})
    except ModelError:
        return False
    return True


def _session_options(ort: Any, entries: Mapping[str, str]) -> Any:
    options = ort.SessionOptions()
    options.log_severity_level = 4  # it would print a failure itself, with values that stood in a note
    options.intra_op_num_threads = 1
    options.inter_op_num_threads = 1
    for name, value in entries.items():
        options.add_session_config_entry(name, value)
    return options


def _open_on_cuda(ort: Any, graph: Path, device: str) -> Any:
    """Open a graph on CUDA, of which nothing but the arithmetic of shapes runs on the CPU.

    Raises :class:`DeviceError`.
    """
    path = _path(graph)
    preload_cuda()
    ort.set_default_logger_severity(4)  # why CUDA does not start it says in many lines; medner doctor in one
    cuda = (_CUDA, {"device_id": device.partition(":")[2], **_CUDA_OPTIONS})

    def opened(providers: list[Any], entries: Mapping[str, str], profile: str = "") -> Any:
        options = _session_options(ort, entries)
        if profile:
            options.enable_profiling = True
            options.profile_file_prefix = profile
        # onnxruntime's Python would print that it falls back to the CPU, and do so, at load and at each call.
        return ort.InferenceSession(path, options, providers=providers, enable_fallback=0)

    try:
        # Without the CPU provider in the list, and with its fallback off, a node that CUDA cannot run is an error
        # instead of a silent detour.
        session = opened([cuda], {"session.disable_cpu_ep_fallback": "1"})
    except Exception as exc:  # as above
        # It also says so where CUDA does not start at all, and of graphs that compute no more than shapes on the CPU.
        try:
            with tempfile.TemporaryDirectory(prefix="medner-") as folder:
                session = opened([cuda, _CPU], {}, str(Path(folder) / "profile"))
                _check_started(session, device)
                session.run(["logits"], _feeds(_input_names(session), np.zeros((1, 2), np.int64), np.array([2])))
                strays = _off_cuda(json.loads(Path(session.end_profiling()).read_bytes()))
            if not strays:
                return opened([cuda, _CPU], {})
        except DeviceError:
            raise
        except Exception:
            raise _not_there(device, graph, _reason(exc)) from exc
        raise DeviceError(
            f"--device {device}: CUDA does not run {', '.join(strays)} of {graph.name}; export the model again "
            "with --precision fp16 or fp32, or use --device cpu"
        ) from exc
    _check_started(session, device)
    return session


def _check_started(session: Any, device: str) -> None:
    if session.get_providers()[0] != _CUDA:
        raise DeviceError(
            f"--device {device}: CUDA does not start (no GPU, its driver, or a CUDA library); "
            "medner doctor says which, or use --device cpu"
        )


def _not_there(device: str, graph: Path, reason: str) -> DeviceError:
    return DeviceError(
        f"--device {device}: onnxruntime cannot run {graph.name} there ({reason}); "
        "medner doctor examines the device, or use --device cpu"
    )


def _off_cuda(events: Sequence[Mapping[str, Any]]) -> list[str]:
    """Operators that a profile shows on the CPU with values of the model, not of shapes: floats, or 8-bit products."""
    strays = set()
    for event in events:
        facts = event.get("args", {})
        if event.get("cat") == "Node" and facts.get("provider") == _CPU:
            for value in facts.get("output_type_shape", ()):
                if any(kind not in ("int64", "bool") and np.prod(shape) > 1 for kind, shape in value.items()):
                    strays.add(str(facts.get("op_name")))
    return sorted(strays)


_LOGITS, _TAGS = (np.float16, np.float32), (np.int16, np.int32, np.int64)
_NODE = re.compile(r"\A\[ONNXRuntimeError\] : \d+ : [A-Z_]+ : Non-zero status code returned while running (\w+) node\.")


def _check(name: str, value: Any, kinds: tuple[type, ...], shape: tuple[int, ...]) -> None:
    """Raise :class:`ModelError` where an output has another type or shape than a token classifier's."""
    # By equality: onnxruntime's int64 may be another type of C than numpy's.
    if not isinstance(value, np.ndarray) or not any(value.dtype == kind for kind in kinds):
        kind = value.dtype if isinstance(value, np.ndarray) else type(value).__name__
        raise ModelError(f"the graph's {name} is {kind}, not {' or '.join(kind.__name__ for kind in kinds)}")
    if value.shape != shape or 0 in shape:
        expected = "[windows, tokens, labels]" if name == "logits" else "[windows, tokens]"
        raise ModelError(f"the graph's {name} has the shape {value.shape} for {shape[:2]} tokens, not {expected}")


def _reason(exc: Exception) -> str:
    """The first line of what onnxruntime says about a graph, without control characters that stand in its names."""
    line = next(iter(str(exc).splitlines()), type(exc).__name__)[:200]
    return "".join(character if character.isprintable() else "\ufffd" for character in line)


def _place(exc: Exception) -> str:
    """What kind of failure, in which operator."""
    match = _NODE.match(str(exc))
    return type(exc).__name__ + (f" in the operator {match.group(1)}" if match else "")


def _mask(ids: npt.NDArray[np.int64], lengths: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
    """Where tokens stand, not padding: bool, of the shape of ``ids``."""
    return np.arange(ids.shape[1]) < lengths[:, None]


def activations(
    graph: bytes, names: Sequence[str], samples: Sequence[npt.NDArray[np.int64]], padding: int = 0
) -> Iterator[list[npt.NDArray[np.float32]]]:
    """Inner values of a graph that has them as outputs, for one window at a time, on the CPU.

    samples: int64 [length] each; padding: how many of their last tokens count as padding. Yields for each sample the
    values of ``names``, float32 with all axes of the graph's.
    """
    session = _on_cpu(graph)
    for ids in samples:
        yield session.run(list(names), _feeds(_input_names(session), ids[None], np.array([len(ids) - padding])))


def logits(graph: bytes, ids: npt.NDArray[np.int64], lengths: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
    """Logits of one batch by a serialized graph, on the CPU; see :meth:`Session.__call__`. Raises ModelError."""
    _onnxruntime()
    try:
        session = _on_cpu(graph)
        (values,) = session.run(["logits"], _feeds(_input_names(session), ids, lengths))
    except Exception as exc:  # as above
        raise ModelError(f"onnxruntime cannot run the graph: {_reason(exc)}") from exc
    return np.asarray(values, dtype=np.float32)


def _on_cpu(graph: bytes) -> Any:
    ort = _onnxruntime()
    options = ort.SessionOptions()
    options.log_severity_level = 4  # as above
    return ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])


def _input_names(session: Any) -> set[str]:
    return {node.name for node in session.get_inputs()}


def _feeds(
    wanted: set[str], ids: npt.NDArray[np.int64], lengths: npt.NDArray[np.int64]
) -> dict[str, npt.NDArray[np.int64]]:
    feeds = {"input_ids": ids}
    if "attention_mask" in wanted:
        feeds["attention_mask"] = _mask(ids, lengths).astype(np.int64)
    if "token_type_ids" in wanted:
        feeds["token_type_ids"] = np.zeros_like(ids)
    return feeds


def resolve_device(device: str) -> str:
    """``cpu`` or ``cuda:N`` for a ``--device`` value; ``auto`` takes CUDA where onnxruntime was built with it.

    Raises :class:`UsageError` for a value of another form, :class:`DeviceError` where onnxruntime has no CUDA.
    """
    if device == "auto":
        return "cuda:0" if has_cuda() else "cpu"
    if _DEVICES.fullmatch(device):
        raise UsageError(f"--device {device}: several devices are for medner annotate into a run directory; name one")
    match = _DEVICE.fullmatch(device)
    if not match:
        raise UsageError(f"--device {device}: unknown; use auto, cpu, cuda or cuda:N")
    if device == "cpu":
        return device
    if not has_cuda():
        raise DeviceError(
            f"--device {device}: this onnxruntime has no CUDA provider; "
            f"use --device cpu, or: pip uninstall onnxruntime && {install('gpu')}"
        )
    return f"cuda:{int(match.group(1) or 0)}"


def devices(device: str) -> tuple[str, ...]:
    """Such as ``cuda:0`` and ``cuda:1`` of ``cuda:0,1``; any other value alone.

    Raises :class:`UsageError` for a device named twice.
    """
    if not _DEVICES.fullmatch(device):
        return (device,)
    found = tuple(f"cuda:{int(number)}" for number in device.partition(":")[2].split(","))
    if len(set(found)) < len(found):
        raise UsageError(f"--device {device}: names a device twice")
    return found


def has_cuda() -> bool:
    """Whether the installed onnxruntime was built with CUDA."""
    return "CUDAExecutionProvider" in _onnxruntime().get_available_providers()


def _onnxruntime() -> Any:
    try:
        import onnxruntime
    except ImportError as exc:
        if getattr(exc, "name", None) != "onnxruntime" or not isinstance(exc, ModuleNotFoundError):
            raise MissingPackage(
                f"onnxruntime is installed and cannot be imported ({_reason(exc)}); medner doctor examines it"
            ) from exc
        raise MissingPackage(
            f'onnxruntime is not installed: {install("cpu")}, or ".[gpu]" on a machine with CUDA'
        ) from exc
    # Where another package imported it before medner set the variable that keeps it silent (medner/__init__.py).
    with contextlib.suppress(AttributeError):  # what is left of a broken installation is judged elsewhere
        onnxruntime.disable_telemetry_events()
    return onnxruntime


def version() -> str:
    """Version of the installed onnxruntime."""
    return str(_onnxruntime().__version__)


def available_cpus() -> int:
    """CPUs that this process may use: its affinity, and the limits of its cgroup (version 2) and those above it."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        names = [line[4:] for line in _OWN_CGROUP.read_text().splitlines() if line.startswith("0::/")]
    except OSError:
        names = []
    group = _CGROUPS / "".join(names)
    for folder in (group, *group.parents):
        with contextlib.suppress(OSError, ValueError):  # no such file, or "max" for no limit
            quota, period = map(int, (folder / "cpu.max").read_text(encoding="ascii").split())
            cpus = min(cpus, -(-quota // period))
    return max(1, cpus)


def instruction_set() -> str:
    """The processor's features that decide which kernels onnxruntime takes, such as ``x86_64 avx512f avx512_vnni``."""
    machine = platform.machine().lower() or "unknown"
    flags = _cpu_flags()
    return " ".join([machine, *(flag for flag in _FEATURES if flag in flags)])


def has_exact_int8() -> bool:
    """Whether 8-bit products are summed without saturation: VNNI on x86, any other architecture.

    Older x86 kernels add pairs of products in 16 bits and saturate silently (onnxruntime issue 6004).
    """
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return True
    return bool(_cpu_flags() & {"avx512_vnni", "avx_vnni"})


_FEATURES = ("avx2", "avx512f", "avx_vnni", "avx512_vnni", "amx_int8", "asimddp", "i8mm")


def _cpu_flags() -> frozenset[str]:
    try:
        text = _CPUINFO.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return frozenset()
    match = re.search(r"^(?:flags|Features)\s*:(.*)$", text, re.MULTILINE)
    return frozenset(match.group(1).split()) if match else frozenset()


# ---------------------------------------------------------------------------------------------------------------------
# For medner doctor


@dataclass(frozen=True, slots=True)
class Build:
    """The onnxruntime that is installed.

    has_cuda: whether it was built with the CUDA provider; cuda: the major version of the CUDA that it was built for,
    None without CUDA and where the build does not say.
    """

    version: str
    has_cuda: bool
    cuda: int | None


def build() -> Build:
    """Describe the installed onnxruntime. Raises :class:`MissingPackage`; damaged files may raise anything."""
    ort = _onnxruntime()
    major = re.match(r"\d+", getattr(ort, "cuda_version", "") or "")
    cuda = has_cuda()
    return Build(version(), cuda, int(major.group()) if cuda and major else None)


def preload_cuda() -> None:
    """Load the CUDA and cuDNN libraries as a session does; what cannot be loaded is passed over in silence."""
    with contextlib.redirect_stdout(io.StringIO()):
        _onnxruntime().preload_dlls()


def write_errors_alone() -> None:
    """Keep onnxruntime's warnings from standard error; why a provider does not load, it says nowhere else."""
    _onnxruntime().set_default_logger_severity(3)
