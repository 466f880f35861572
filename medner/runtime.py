"""The onnxruntime session: the provider asked for is the provider that runs. Arrays in, arrays out.

The only file that imports onnxruntime.
"""

from __future__ import annotations

import contextlib
import io
import os
import platform
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from medner.errors import DeviceError, MissingPackage, ModelError, UsageError

_DEVICE = re.compile(r"cpu|cuda(?::(\d+))?")
_CGROUPS = Path("/sys/fs/cgroup")
_OWN_CGROUP = Path("/proc/self/cgroup")
_CPUINFO = Path("/proc/cpuinfo")


class Session:
    """A token classifier on one device.

    Calls may come from several threads at once. On the CPU each call runs on the thread that makes it, so results do
    not depend on how many there are.

    device: ``cpu`` or ``cuda:N``; provider: the onnxruntime execution provider that runs; n_labels: the size of the
    last axis of its logits. What a graph states about its outputs need not be so: it is tried on two tokens, and every
    answer is checked.
    """

    def __init__(self, graph: Path, device: str) -> None:
        """Load a graph. ``device`` is ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.

        Raises :class:`DeviceError` where that device cannot run it, :class:`ModelError` where nothing can.
        """
        ort = _onnxruntime()
        self.device = resolve_device(device)
        cuda = self.device.startswith("cuda")
        options = ort.SessionOptions()
        options.log_severity_level = 4  # it would print a failure itself, with values that stood in a note
        options.intra_op_num_threads = 1
        options.inter_op_num_threads = 1
        providers: list[Any] = ["CPUExecutionProvider"]
        if cuda:
            # Without the CPU provider in the list, and with its fallback off, a node that CUDA cannot run is an error
            # instead of a silent detour.
            providers = [("CUDAExecutionProvider", {"device_id": int(self.device.partition(":")[2])})]
            options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
            with contextlib.redirect_stdout(sys.stderr):  # where it prints what it does not find
                ort.preload_dlls()
        elif not has_exact_int8():
            options.add_session_config_entry("session.x64quantprecision", "1")
        try:
            self._session = ort.InferenceSession(str(graph), options, providers=providers)
        except Exception as exc:  # onnxruntime raises RuntimeError and a family of private classes
            reason = _reason(exc)
            if cuda:
                raise DeviceError(
                    f"--device {self.device}: onnxruntime cannot run {graph.name} there ({reason}); "
                    "check the CUDA and cuDNN libraries, or use --device cpu"
                ) from exc
            raise ModelError(f"{graph}: onnxruntime cannot load it: {reason}") from exc
        self.provider: str = self._session.get_providers()[0]
        if cuda and self.provider != "CUDAExecutionProvider":
            raise DeviceError(
                f"--device {self.device}: onnxruntime fell back to {self.provider}; "
                "check the CUDA and cuDNN libraries, or use --device cpu"
            )
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
        self.n_labels = 0
        self._try(graph)

    def _try(self, graph: Path) -> None:
        """Run two tokens that stand in no note, whatever the vocabulary; raises :class:`ModelError`."""
        ids, lengths = np.zeros((1, 2), dtype=np.int64), np.array([2])
        try:
            (logits,) = self._session.run(["logits"], _feeds(self._inputs, ids, lengths))
        except Exception as exc:  # as above
            raise ModelError(f"{graph}: onnxruntime cannot run it: {_reason(exc)}") from exc
        self.n_labels = np.shape(logits)[-1] if np.ndim(logits) == 3 else 0
        try:
            self(ids, lengths)
            if self.gives_best:
                self.best(ids, lengths)
        except ModelError as exc:
            raise ModelError(f"{graph}: {exc}") from exc

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
        return np.asarray(tags, dtype=np.int16), np.asarray(probabilities, dtype=np.float32)

    def _run(self, outputs: list[str], ids: npt.NDArray[np.int64], lengths: npt.NDArray[np.int64]) -> list[Any]:
        try:
            return list(self._session.run(outputs, _feeds(self._inputs, ids, lengths)))
        except Exception as exc:  # as above; its message names values, and those stood in a note
            raise ModelError(f"onnxruntime failed on a batch of {ids.shape}: {_place(exc)}") from exc


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
        return "cuda:0" if _has_cuda() else "cpu"
    match = _DEVICE.fullmatch(device)
    if not match:
        raise UsageError(f"--device {device}: unknown; use auto, cpu, cuda or cuda:N")
    if device == "cpu":
        return device
    if not _has_cuda():
        raise DeviceError(
            f"--device {device}: this onnxruntime has no CUDA provider; "
            'use --device cpu, or: pip uninstall onnxruntime && pip install "medner[gpu]"'
        )
    return f"cuda:{match.group(1) or 0}"


def _has_cuda() -> bool:
    return "CUDAExecutionProvider" in _onnxruntime().get_available_providers()


def _onnxruntime() -> Any:
    try:
        import onnxruntime
    except ImportError as exc:
        raise MissingPackage(
            'onnxruntime is not installed: pip install "medner[cpu]", or "medner[gpu]" on a machine with CUDA'
        ) from exc
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
    has_cuda = _has_cuda()
    return Build(version(), has_cuda, int(major.group()) if has_cuda and major else None)


def preload_cuda() -> None:
    """Load the CUDA and cuDNN libraries as a session does; what cannot be loaded is passed over in silence."""
    with contextlib.redirect_stdout(io.StringIO()):
        _onnxruntime().preload_dlls()


def write_errors_alone() -> None:
    """Keep onnxruntime's warnings from standard error; why a provider does not load, it says nowhere else."""
    _onnxruntime().set_default_logger_severity(3)
