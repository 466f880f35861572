"""The onnxruntime session: the provider asked for is the provider that runs. Arrays in, arrays out.

The only file that imports onnxruntime.
"""

from __future__ import annotations

import contextlib
import os
import platform
import re
import sys
from collections.abc import Iterator, Sequence
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
    output's last axis where the graph states it.
    """

    def __init__(self, graph: Path, device: str) -> None:
        """Load a graph. ``device`` is ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.

        Raises :class:`DeviceError` where that device cannot run it, :class:`ModelError` where nothing can.
        """
        ort = _onnxruntime()
        self.device = resolve_device(device)
        cuda = self.device.startswith("cuda")
        options = ort.SessionOptions()
        options.log_severity_level = 3
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
        last = outputs["logits"].shape[-1]
        self.n_labels: int | None = last if isinstance(last, int) else None

    def __call__(self, ids: npt.NDArray[np.int64], lengths: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        """Logits of a batch.

        ids: int64 [n_windows, length], padded on the right; lengths: int64 [n_windows], tokens before the padding.
        Returns float32 [n_windows, length, n_labels]; what stands at padding is undefined.
        """
        (logits,) = self._run(["logits"], ids, lengths)
        return np.asarray(logits, dtype=np.float32)

    def best(
        self, ids: npt.NDArray[np.int64], lengths: npt.NDArray[np.int64]
    ) -> tuple[npt.NDArray[np.int16], npt.NDArray[np.float32]]:
        """The likeliest class of each token and its probability, computed in the graph; arguments as for a call.

        Returns int16 [n_windows, length] and float32 [n_windows, length]; what stands at padding is undefined.
        """
        tags, probabilities = self._run(["tag", "probability"], ids, lengths)
        return np.asarray(tags, dtype=np.int16), np.asarray(probabilities, dtype=np.float32)

    def _run(self, outputs: list[str], ids: npt.NDArray[np.int64], lengths: npt.NDArray[np.int64]) -> list[Any]:
        try:
            return list(self._session.run(outputs, _feeds(self._inputs, ids, lengths)))
        except Exception as exc:  # as above
            raise ModelError(f"onnxruntime failed on a batch of {ids.shape}: {_reason(exc)}") from exc


def _reason(exc: Exception) -> str:
    return next(iter(str(exc).splitlines()), type(exc).__name__)[:200]


def activations(
    graph: bytes, names: Sequence[str], samples: Sequence[npt.NDArray[np.int64]]
) -> Iterator[list[npt.NDArray[np.float32]]]:
    """Inner values of a graph that has them as outputs, for one window at a time, on the CPU.

    samples: int64 [length] each. Yields for each sample the values of ``names``, float32 with all axes of the graph's.
    """
    session = _onnxruntime().InferenceSession(graph, providers=["CPUExecutionProvider"])
    for ids in samples:
        yield session.run(list(names), _feeds(_input_names(session), ids[None], np.array([len(ids)])))


def logits(graph: bytes, ids: npt.NDArray[np.int64], lengths: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
    """Logits of one batch by a serialized graph, on the CPU; see :meth:`Session.__call__`. Raises ModelError."""
    ort = _onnxruntime()
    try:
        session = ort.InferenceSession(graph, providers=["CPUExecutionProvider"])
        (values,) = session.run(["logits"], _feeds(_input_names(session), ids, lengths))
    except Exception as exc:  # as above
        raise ModelError(f"onnxruntime cannot run the graph: {_reason(exc)}") from exc
    return np.asarray(values, dtype=np.float32)


def _input_names(session: Any) -> set[str]:
    return {node.name for node in session.get_inputs()}


def _feeds(
    wanted: set[str], ids: npt.NDArray[np.int64], lengths: npt.NDArray[np.int64]
) -> dict[str, npt.NDArray[np.int64]]:
    feeds = {"input_ids": ids}
    if "attention_mask" in wanted:
        feeds["attention_mask"] = (np.arange(ids.shape[1]) < lengths[:, None]).astype(np.int64)
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
