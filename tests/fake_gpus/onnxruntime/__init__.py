"""Stands for onnxruntime in processes whose PYTHONPATH names this folder's parent: one with GPUs that are not there.

They compute on the CPU, by the real onnxruntime. The variable ``FAKE_GPUS`` holds JSON: gpus: how many; log: a file
that gets a line for each call, with the device's number; room: padded tokens of a call that fit, by device; ends: a
device and the call at which its process is killed; hangs: a device and the call that never returns; dead: devices that
do not start; slow: seconds of a call, by device.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

FOLDER, TESTS = Path(__file__).parents[1], Path(__file__).parents[2]

path = list(sys.path)
sys.path[:] = [str(TESTS), *(entry for entry in path if Path(entry) != FOLDER)]
del sys.modules["onnxruntime"]
import fake_cuda  # noqa: E402 - with the real onnxruntime

sys.path[:] = path
wanted: dict[str, Any] = json.loads(os.environ["FAKE_GPUS"])


class FakeGpus(fake_cuda.FakeCuda):
    """As the variable describes it."""

    gpus = wanted["gpus"]

    def session(self, path: str, options: Any, number: int) -> Any:
        """A session that logs its calls and fails as it should."""
        if number in wanted.get("dead", []):
            raise RuntimeError("CUDA failure 999: unknown error")
        return LoggedSession(self, path, options, number)


class LoggedSession(fake_cuda.FakeSession):
    """A session that logs its calls and fails as it should."""

    def run_with_iobinding(self, binding: Any) -> None:
        """Compute in the device's memory."""
        with open(wanted["log"], "a", encoding="ascii") as log:  # noqa: PTH123 - as few calls as can be
            log.write(f"{self.number}\n")
        self.device.room = wanted.get("room", {}).get(str(self.number), float("inf"))
        time.sleep(wanted.get("slow", {}).get(str(self.number), 0))
        call = len(self.device.calls)
        if [self.number, call] == wanted.get("ends"):
            os.kill(os.getpid(), signal.SIGKILL)
        if [self.number, call] == wanted.get("hangs"):
            time.sleep(3600)
        super().run_with_iobinding(binding)


sys.modules["onnxruntime"] = FakeGpus()  # type: ignore[assignment]
