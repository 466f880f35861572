"""An onnxruntime with GPUs that are not there: it keeps their memory and refuses what the real one would."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime

CUDA, CPU = "CUDAExecutionProvider", "CPUExecutionProvider"
REFUSED = RuntimeError(
    "This session contains graph nodes that are assigned to the default CPU EP, but fallback to CPU EP has been "
    "explicitly disabled by the user."
)
ARENA = "Non-zero status code returned while running MatMul node. BFCArena: Failed to allocate memory for 99"


class FakeCuda:
    """An onnxruntime with GPUs, which computes with the real one on the CPU.

    gpus: how many; starts: whether the provider loads; strict: what opening a session without the CPU raises; events:
    of a profile; room: padded tokens of a call that fit its memory; failure: what a call beyond ``room`` raises;
    calls: shapes of the calls.
    """

    gpus = 1

    def __init__(self) -> None:
        self.starts = True
        self.strict: Exception | None = None
        self.events: list[dict[str, Any]] = []
        self.room: float = float("inf")
        self.failure = ARENA
        self.memory: dict[int, npt.NDArray[Any]] = {}
        self.place: dict[int, int] = {}
        self.calls: list[tuple[int, ...]] = []
        self.opened: list[tuple[list[Any], dict[str, str], bool, int]] = []
        self.logged = 2
        self.OrtValue = SimpleNamespace(ortvalue_from_shape_and_type=self.allocate)
        self.__version__ = onnxruntime.__version__

    def get_available_providers(self) -> list[str]:
        """What it was built with."""
        return [CUDA, CPU]

    def preload_dlls(self) -> None:
        """Complain as the real one does."""
        print("a library is missing")

    def set_default_logger_severity(self, severity: int) -> None:
        """Note it."""
        self.logged = severity

    def SessionOptions(self) -> Any:  # noqa: N802
        """Options that note the entries."""
        entries: dict[str, str] = {}
        return SimpleNamespace(entries=entries, add_session_config_entry=entries.__setitem__, enable_profiling=False)

    def InferenceSession(  # noqa: N802
        self, path: str, options: Any, providers: list[Any], enable_fallback: int = 1
    ) -> FakeSession:
        """A session on the device, or on the CPU where only that is asked for."""
        self.opened.append((providers, options.entries, options.enable_profiling, enable_fallback))
        if providers == [CPU]:
            return onnxruntime.InferenceSession(path, providers=providers)  # type: ignore[no-any-return]
        if CPU not in providers and not self.starts:
            raise REFUSED
        if CPU not in providers and self.strict:
            raise self.strict
        number = int(providers[0][1]["device_id"])
        if number >= self.gpus:
            raise RuntimeError("CUDA failure 101: invalid device ordinal")
        return self.session(path, options, number)

    def session(self, path: str, options: Any, number: int) -> FakeSession:
        """A session on one of the GPUs."""
        return FakeSession(self, path, options, number)

    def allocate(self, shape: list[int], kind: type, device: str, number: int) -> FakeValue:
        """Memory of the device, filled with what no answer may hold."""
        assert device == "cuda"
        assert 0 <= number < self.gpus
        pointer = 4096 * (len(self.memory) + 1)
        self.memory[pointer] = np.full(shape, -7, kind)
        self.place[pointer] = number
        return FakeValue(self, pointer)


class FakeValue:
    """An ``OrtValue`` in the device's memory."""

    def __init__(self, device: FakeCuda, pointer: int) -> None:
        self.device = device
        self.pointer = pointer

    def data_ptr(self) -> int:
        """Where it lies."""
        return self.pointer

    def update_inplace(self, data: npt.NDArray[Any]) -> None:
        """Copy to the device; like the real one it takes the whole and nothing less."""
        there = self.device.memory[self.pointer]
        if data.nbytes != there.nbytes:
            raise RuntimeError("The input size of numpy arrays does not match the size of the OrtValue.")
        assert data.dtype == there.dtype
        there[:] = data

    def numpy(self) -> npt.NDArray[Any]:
        """Copy from the device."""
        return self.device.memory[self.pointer].copy()


class FakeBinding:
    """Inputs and outputs by name, as views of the device's memory."""

    def __init__(self, device: FakeCuda, number: int) -> None:
        self.device = device
        self.number = number
        self.inputs: dict[str, npt.NDArray[Any]] = {}
        self.outputs: dict[str, npt.NDArray[Any]] = {}

    def view(self, device: str, number: int, kind: type, shape: tuple[int, ...], pointer: int) -> npt.NDArray[Any]:
        """What stands at a pointer, which has to be there, large enough and of the type."""
        assert (device, number) == ("cuda", self.number)
        assert self.device.place[pointer] == number
        there = self.device.memory[pointer]
        assert there.dtype == kind
        assert np.prod(shape) <= there.size
        return there[: int(np.prod(shape))].reshape(shape)

    def bind_input(self, name: str, *where: Any) -> None:
        """As the real one."""
        self.inputs[name] = self.view(*where)

    def bind_output(self, name: str, *where: Any) -> None:
        """As the real one with memory given."""
        self.outputs[name] = self.view(*where)

    def clear_binding_outputs(self) -> None:
        """As the real one."""
        self.outputs.clear()

    def synchronize_inputs(self) -> None:
        """Nothing is asynchronous here."""

    def synchronize_outputs(self) -> None:
        """Nothing is asynchronous here."""


class FakeSession:
    """A session on the device."""

    def __init__(self, device: FakeCuda, path: str, options: Any, number: int) -> None:
        self.device = device
        self.number = number
        self.options = options
        self.real = onnxruntime.InferenceSession(path, providers=[CPU])
        self.get_inputs, self.get_outputs = self.real.get_inputs, self.real.get_outputs

    def get_providers(self) -> list[str]:
        """The CPU comes last always, and alone where the other did not load."""
        return [CUDA, CPU] if self.device.starts else [CPU]

    def run(self, outputs: list[str], feeds: dict[str, npt.NDArray[Any]]) -> Any:
        """Run on arrays of the host."""
        return self.real.run(outputs, feeds)

    def io_binding(self) -> FakeBinding:
        """An empty binding."""
        return FakeBinding(self.device, self.number)

    def run_with_iobinding(self, binding: FakeBinding) -> None:
        """Compute in the device's memory; beyond its room it fails."""
        shape = binding.inputs["input_ids"].shape
        self.device.calls.append(shape)
        if np.prod(shape) > self.device.room:
            raise RuntimeError(self.device.failure)
        values = self.real.run(list(binding.outputs), binding.inputs)
        for there, value in zip(binding.outputs.values(), values, strict=True):
            assert (there.dtype, there.shape) == (value.dtype, value.shape)
            there[:] = value

    def end_profiling(self) -> str:
        """Write the profile to where the options say."""
        path = Path(self.options.profile_file_prefix + ".json")
        path.write_text(json.dumps(self.device.events))
        return str(path)
