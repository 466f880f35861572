"""The benchmark for machines with a GPU, rehearsed without one."""

from __future__ import annotations

import json
import sys
import time
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
if not (ROOT / "benchmarks").is_dir():
    pytest.skip("benchmarks are only in a checkout", allow_module_level=True)
pytest.importorskip("torch")
pytest.importorskip("optimum.exporters.onnx")
with pytest.MonkeyPatch.context() as patch:
    patch.setattr(sys, "path", [str(ROOT / "benchmarks"), *sys.path])
    gpu = import_module("gpu")

ENGINE = {"p50_ms": 2.0, "notes_per_second": 900.0, "tokens_per_second": 4e5, "peak_mib": 700.0, "passed": True}


def test_the_whole_rehearsal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every step runs on the CPU with a tiny model, and all that it found is in the folder (compare has own tests)."""
    asked: list[Any] = []

    def comparing(*arguments: Any) -> dict[str, Any]:
        asked.append(arguments)
        return {"onnx fp16": ENGINE}

    monkeypatch.setattr(gpu, "comparing", comparing)
    gpu.main(["-o", str(tmp_path), "--devices", "cpu", "--models", "tiny"])
    result = json.loads((tmp_path / "results.json").read_text())
    assert result["failed"] == {}
    one = result["models"]["tiny"]
    assert result["doctor"]["onnxruntime"] == "ok"
    assert one["training"]["16"]["f1"] > 0.3
    assert one["training"]["16"]["windows_per_second"] > 0
    assert one["spans"]["agreement"] >= 0.98
    assert one["spans"]["spans"] > 20
    assert [(cell["length"], cell["budget"]) for cell in one["alone"]] == [(16, 512), (32, 512)]
    assert all(min(cell["medner"], cell["pytorch"]) > 0 for cell in one["alone"])
    assert one["whole"]["device"] == "cpu"
    assert one["whole"]["notes_per_second"] > 0
    assert 60 < one["whole"]["window"] <= 128
    assert 0 <= one["whole"]["waited"] < 1
    assert asked[0][0] == "tiny"
    assert (tmp_path / "alone.png").read_bytes().startswith(b"\x89PNG")
    told = (tmp_path / "results.md").read_text()
    for part in ("windows/s", "fp16 finds", "| 32 | 512 |", "From file to Parquet on cpu", "| onnx fp16 | 2.0 |"):
        assert part in told


def test_notes() -> None:
    """Equal for equal seeds, else not; of about the size asked for, and hardly a note or a long line comes twice."""
    notes = gpu.generated(200_000, 1)
    assert notes == gpu.generated(200_000, 1)
    assert notes != gpu.generated(200_000, 2)
    assert 200_000 <= sum(map(len, notes)) < 210_000
    assert all(2_600 <= len(note) < 4_000 for note in notes)
    assert len(set(notes)) == len(notes)


def manifest(seconds: float, rows: int, inferring: float) -> dict[str, Any]:
    """Of a run on two devices, with ten windows of eight tokens a note."""
    return {
        "model": {"device": "cuda:0,1"},
        "options": {"batch_tokens": 4096},
        "counts": {"rows": rows, "tokens": 80 * rows, "windows": 10 * rows},
        "stages": {"tokenizing": 0.25 * seconds, "inferring": inferring},
        "seconds": seconds,
        "files": {"spans/part-000000.parquet": "ab"},
    }


def test_rates_between_two_runs() -> None:
    """Special tokens count; what both devices worked is held against twice the time."""
    found = gpu.slope(manifest(1.0, 100, 0.5), manifest(5.0, 900, 6.5), 2)
    assert found["notes_per_second"] == 200
    assert found["tokens_per_second"] == 200 * (80 + 20)
    assert found["window"] == 10
    assert found["waited"] == pytest.approx(1 - 6 / 4 / 2)
    assert found["stages"] == {"tokenizing": 0.25, "inferring": 1.5}
    other = manifest(5.0, 900, 6.5) | {"files": {"spans/part-000000.parquet": "ac"}}
    assert gpu.slope(other, manifest(9.0, 1700, 6.5), 2)["tables"] == found["tables"] != gpu.same_tables(other)


def test_operations_of_a_token() -> None:
    """BERT-base: twice the 85 million weights of its layers, and attention over the window."""
    assert gpu.flops("base", 0) == 2 * 12 * (4 * 768**2 + 2 * 768 * 3072)
    assert gpu.flops("base", 128) - gpu.flops("base", 0) == 12 * 4 * 128 * 768


def test_a_step_that_fails() -> None:
    """It is recorded with its reason, and the next one runs; beyond the time none begins. All is saved in between."""
    found: dict[str, Any] = {}
    saved: list[dict[str, Any]] = []
    steps = gpu.Steps(60, lambda: saved.append(dict(found)))

    def fails() -> None:
        raise ValueError("no such kernel")

    assert steps.run(found, "one", "first", fails) is None
    assert steps.run(found, "two", "second", lambda a, b: a + b, 1, 2) == 3
    assert saved == [{"one": None}, {"one": None, "two": 3}]
    assert steps.failed == {"first": "ValueError: no such kernel"}
    assert set(steps.seconds) == {"first", "second"}
    late = gpu.Steps(-1)
    assert late.run(found, "three", "third", time.sleep, 60) is None
    assert late.failed == {"third": "no time left"}


def test_a_command_that_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is stopped, and does not take the rest with it."""
    monkeypatch.setattr(gpu, "MEDNER", (sys.executable, "-c", "import time; time.sleep(60)"))
    monkeypatch.setattr(gpu, "COMMAND_SECONDS", 0.2)
    steps = gpu.Steps(60)
    assert steps.run({}, "one", "first", gpu.command, "train") is None
    assert steps.failed["first"].startswith("TimeoutExpired")


def test_one_device_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch would train on all, with batches larger than asked for."""
    monkeypatch.setattr(gpu, "MEDNER", (sys.executable, "-c", "import os; print(os.environ['CUDA_VISIBLE_DEVICES'])"))
    assert gpu.command("train", device="cuda:3") == "3\n"


def test_failures_and_goals_are_told() -> None:
    """In the summary: what failed, what several devices wrote, and how far from the goals it is."""
    whole = gpu.slope(manifest(1.0, 100, 0.5), manifest(5.0, 900, 6.5), 2)
    one = {
        "documents": "NCBI Disease documents",
        "spans": {"documents": 100, "spans": 700, "agreement": 0.999, "f1": 0.84, "reference_f1": 0.845},
        "alone": [{"length": 16, "budget": 8192, "calls": 9, "medner": 40_000.0, "pytorch": 20_000.0}],
        "whole": whole,
        "whole_several": whole | {"tables": "other"},
    }
    machine = {"gpu": "NVIDIA X", "processor": "P", "cpus": 16, "versions": {"onnxruntime": "1.31.1"}}
    result = {
        "machine": machine, "date": "2026-11-26", "devices": "cuda:0,1", "seconds": {"a": 2.0, "b": 3.0},
        "ceiling_tflops": 1.0, "models": {"base": one}, "failed": {"base: compare": "RuntimeError: none"},
    }  # fmt: skip
    told = gpu.summary(result)
    assert "# medner on NVIDIA X" in told
    assert "5 s in all" in told
    assert "(within 0.002: no)" in told
    assert "2.00x" in told
    assert "The best is 40,000 tokens/s (2,200,000 asked of an H200)." in told
    assert "the device waited 25% of the time" in told
    assert "One device reaches 50% of the model alone at 16 tokens (80% asked)." in told
    assert "Several devices wrote **other bytes**." in told
    assert "- **base: compare: failed**: RuntimeError: none" in told
