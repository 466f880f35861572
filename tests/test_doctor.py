"""The doctor: each fault gives its line, its remedy and its exit code, in real environments and for given facts."""

import ctypes
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

import medner
from medner import cli, doctor, runtime, testing
from medner.annotate import Annotator, Options
from medner.doctor import Driver, Finding, Gpu, Installed, Libraries
from medner.errors import CheckFailed, DeviceError, UsageError
from medner.runtime import Build

CPU, GPU = Build("1.31.1", False, None), Build("1.31.1", True, 13)
H200 = Gpu("NVIDIA H200", (9, 0))
NO_DRIVER = Driver(0, "", None, ())
ALL_THERE = Libraries()
GOOD_DRIVER = Driver(1, "580.65.06", (13, 0), (H200,))

EITHER = 'pip install ".[cpu]" in a checkout of medner, or ".[gpu]" on a machine with CUDA'


# ---------------------------------------------------------------------------------------------------------------------
# Real environments


Environment = Callable[..., list[str]]


@pytest.fixture
def environment(tmp_path: Path) -> Environment:
    """Make an environment of this one's packages without onnxruntime, and with others; gives ``medner`` in it."""

    def make(*wheels: str, packages: Sequence[Path] = ()) -> list[str]:
        folder = tmp_path / "site-packages"
        folder.mkdir()
        for place in {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}:
            for entry in Path(place).iterdir():
                if not entry.name.startswith("onnxruntime") and not (folder / entry.name).is_symlink():
                    (folder / entry.name).symlink_to(entry)
        if not (folder / "medner").exists():  # installed in place
            (folder / "medner").symlink_to(Path(medner.__file__).parent)
        for package in packages:
            (folder / package.name).symlink_to(package)
        for wheel in wheels:
            name, version = wheel.split("==")
            info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
            info.mkdir()
            (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        code = f"import sys; sys.path.append({str(folder)!r}); from medner.cli import main; main(sys.argv[1:])"
        return [sys.executable, "-I", "-S", "-c", code]

    return make


def examined(command: list[str], *arguments: object) -> tuple[int, dict[str, dict[str, str]], str]:
    """Call ``medner doctor --json``; its exit code, the findings by check, and standard error."""
    done = subprocess.run(
        [*command, "doctor", "--json", *map(str, arguments)], capture_output=True, text=True, check=False
    )
    findings = {finding.pop("check"): finding for finding in json.loads(done.stdout)["findings"]}
    return done.returncode, findings, done.stderr


def test_an_environment_without_onnxruntime(environment: Environment, tmp_path: Path) -> None:
    """Neither wheel is a problem that names both extras; the model is checked all the same, and no session tried."""
    code, found, error = examined(environment(), "--model", testing.bundle(), "-o", tmp_path)
    assert found["onnxruntime"] == {"state": "problem", "found": "not installed", "remedy": EITHER}
    assert found["model"]["state"] == found["output"]["state"] == "ok"
    assert "session" not in found
    assert code == 1
    assert re.fullmatch(r"medner: \d problems?: onnxruntime.*; the report names each one's remedy\n", error)


def test_an_environment_with_both_wheels(environment: Environment, tmp_path: Path) -> None:
    """Both wheels are a problem, though the module can be imported."""
    module = pytest.importorskip("onnxruntime")
    command = environment(
        "onnxruntime==1.31.1", "onnxruntime-gpu==1.30.0", packages=[Path(module.__file__ or "").parent]
    )
    code, found, _ = examined(command, "--model", testing.bundle(), "-o", tmp_path, "--device", "cpu")
    assert code == 1
    assert {check: finding["state"] for check, finding in found.items()} == {
        "onnxruntime": "problem",
        "processor": found["processor"]["state"],
        "model": "ok",
        "output": "ok",
    }
    assert found["onnxruntime"] == {
        "state": "problem",
        "found": "onnxruntime 1.31.1 and onnxruntime-gpu 1.30.0 are installed and overwrite each other's files",
        "remedy": f"pip uninstall -y onnxruntime onnxruntime-gpu, then {EITHER}",
    }


def test_an_environment_with_what_one_wheel_left_of_the_other(environment: Environment, tmp_path: Path) -> None:
    """After one of two wheels is removed, the other's files are gone: installed, but not to be imported."""
    left = tmp_path / "onnxruntime"
    left.mkdir()
    code, found, _ = examined(environment("onnxruntime-gpu==1.31.1", packages=[left]), "--device", "cpu")
    assert code == 1
    assert found["onnxruntime"] == {
        "state": "problem",
        "found": "onnxruntime-gpu 1.31.1 is installed and cannot be imported "
        "(AttributeError: module 'onnxruntime' has no attribute 'get_available_providers')",
        "remedy": "pip install --force-reinstall --no-deps onnxruntime-gpu==1.31.1",
    }


# ---------------------------------------------------------------------------------------------------------------------
# The command


Medner = Callable[..., tuple[int, str, str]]


@pytest.fixture
def call(capfd: pytest.CaptureFixture[str]) -> Medner:
    """Call ``medner doctor``; gives its exit code, standard output and standard error."""

    def call(*arguments: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as caught:
            cli.main(["doctor", *map(str, arguments)])
        sys.stdout.flush()
        return int(caught.value.code or 0), *capfd.readouterr()

    return call


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Put a machine in the place of this one: an AVX-512 VNNI processor, one wheel, and what is given."""
    pytest.importorskip("onnxruntime")

    def put(build: Build = CPU, driver: Driver = NO_DRIVER, libraries: Libraries = ALL_THERE) -> None:
        wheel = "onnxruntime-gpu" if build.has_cuda else "onnxruntime"
        monkeypatch.setattr(doctor, "_version", {wheel: build.version}.get)
        monkeypatch.setattr(runtime, "build", lambda: build)
        monkeypatch.setattr(runtime, "preload_cuda", lambda: None)
        monkeypatch.setattr(doctor, "look_at_driver", lambda: driver)
        monkeypatch.setattr(doctor, "look_for_libraries", lambda _: libraries)
        monkeypatch.setattr(runtime, "instruction_set", lambda: "x86_64 avx2 avx512f avx512_vnni")
        monkeypatch.setattr(runtime, "has_exact_int8", lambda: True)

    return put


def test_a_machine_where_all_is_well(call: Medner, machine: Callable[..., None], tmp_path: Path) -> None:
    """A line for each check, exit code 0, nothing on standard error, nothing left in the output directory."""
    machine()
    code, output, error = call("--model", testing.bundle(), "-o", tmp_path)
    assert (code, error) == (0, "")
    assert re.sub(r"[0-9.,]+ GB", "N GB", output) == (
        "ok       onnxruntime  onnxruntime 1.31.1\n"
        "ok       processor    x86_64 avx2 avx512f avx512_vnni\n"
        "ok       gpu          none, so notes are annotated on the CPU\n"
        "ok       model        tiny with fp32: every file has its recorded hash\n"
        "ok       session      fp32 on cpu by CPUExecutionProvider\n"
        f"ok       output       {tmp_path} can be written, N GB free\n"
    )
    assert list(tmp_path.iterdir()) == []


def test_problems_with_their_remedies(call: Medner, machine: Callable[..., None], tmp_path: Path) -> None:
    """Exit code 1; every line that is not ok ends with what to do, and the last line says how many there are."""
    machine(driver=GOOD_DRIVER)
    bundle = shutil.copytree(testing.bundle(), tmp_path / "bundle")
    graph = bundle / "onnx" / "model.onnx"
    content = bytearray(graph.read_bytes())
    content[100] ^= 1
    graph.write_bytes(content)
    (tmp_path / "file").touch()
    code, output, error = call("--model", bundle, "-o", tmp_path / "file" / "run")
    digest = re.compile(r"[0-9a-f]{12}\.\.\.")
    assert (code, error) == (
        1,
        "medner: 3 problems: gpu, model, output; the report names each one's remedy\n",
    )
    assert digest.sub("HASH", output) == (
        "ok       onnxruntime  onnxruntime 1.31.1\n"
        "ok       processor    x86_64 avx2 avx512f avx512_vnni\n"
        "problem  gpu          NVIDIA H200, which this onnxruntime cannot use: it is built without CUDA; "
        'pip uninstall -y onnxruntime && pip install ".[gpu]" in a checkout of medner, or pass --device cpu\n'
        "ok       driver       580.65.06 with CUDA up to 13.0\n"
        f"problem  model        {graph}: SHA-256 HASH is not the recorded HASH; "
        "the file was altered or cut short: copy or export the bundle again\n"
        f"problem  output       {tmp_path}/file: cannot be written: Not a directory; name another with --output\n"
    )


def test_json(call: Medner, machine: Callable[..., None], tmp_path: Path) -> None:
    """``--json`` prints the same findings as one JSON object, and the exit code is the same."""
    machine()
    code, output, error = call("--json", "--model", tmp_path / "none", "-o", tmp_path)
    printed = json.loads(output)
    assert (code, printed["medner"]) == (1, medner.__version__)
    assert error == "medner: 1 problem: model; the report names each one's remedy\n"
    assert [finding["check"] for finding in printed["findings"]] == [
        "onnxruntime",
        "processor",
        "gpu",
        "model",
        "output",
    ]
    assert printed["findings"][3] == {
        "check": "model",
        "state": "problem",
        "found": f"{tmp_path}/none: no such model directory",
        "remedy": "shipped with medner: default, tiny",
    }


def test_json_of_a_path_that_is_no_unicode(call: Medner, machine: Callable[..., None], tmp_path: Path) -> None:
    """It is told as it can be printed."""
    machine()
    _, output, _ = call("--json", "--model", tmp_path / os.fsdecode(b"a\xff"), "-o", tmp_path)
    assert json.loads(output)["findings"][3]["found"] == f"{tmp_path}/a\\udcff: no such model directory"


def test_a_device_of_another_form(call: Medner) -> None:
    """It is a usage error, before anything is looked at."""
    error = "medner: --device gpu: unknown; use auto, cpu, cuda or cuda:N\n"
    assert call("--device", "gpu") == (2, "", error)


def test_a_check_that_fails_itself(
    machine: Callable[..., None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """It is a problem with its exception's type, and the other checks are made."""
    machine()

    def broken() -> Driver:
        raise ValueError("secret")

    monkeypatch.setattr(doctor, "look_at_driver", broken)
    findings = doctor.examine(str(testing.bundle()), tmp_path)
    assert [(finding.check, finding.state) for finding in findings] == [
        ("onnxruntime", "ok"),
        ("processor", "ok"),
        ("gpu", "problem"),
        ("driver", "problem"),
        ("model", "ok"),
        ("output", "ok"),
    ]
    assert findings[2] == Finding("gpu", "problem", "this check failed itself (ValueError)", "report it as a defect")


def test_the_cpu_asked_for(machine: Callable[..., None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """With ``--device cpu`` GPUs are not looked at, and a wheel with CUDA is fine."""
    machine(GPU)

    def look(*_: object) -> None:
        raise AssertionError

    for name in ("look_at_driver", "look_for_libraries"):
        monkeypatch.setattr(doctor, name, look)
    findings = doctor.examine(str(testing.bundle()), tmp_path, "cpu")
    assert [(finding.check, finding.state) for finding in findings] == [
        (check, "ok") for check in ("onnxruntime", "processor", "model", "session", "output")
    ]


def test_no_session_is_tried_after_a_problem(machine: Callable[..., None], tmp_path: Path) -> None:
    """Why it would fail is said already; with all else well it is tried, and its failure is a problem of its own."""
    machine(GPU, GOOD_DRIVER, Libraries(missing=("libcudnn.so.9",)))
    checks = [finding.check for finding in doctor.examine(str(testing.bundle()), tmp_path)]
    assert checks == ["onnxruntime", "processor", "gpu", "driver", "libraries", "model", "output"]


def test_a_gpu_that_the_session_does_not_use(
    machine: Callable[..., None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """All seems well, and yet the session does not run there: a problem with the session's own next step."""
    machine(GPU, GOOD_DRIVER)

    def fall_back(*_: object) -> None:
        raise DeviceError("--device cuda:0: onnxruntime fell back to CPUExecutionProvider; check the libraries")

    monkeypatch.setattr(doctor.Annotator, "load", fall_back)
    findings = {finding.check: finding for finding in doctor.examine(str(testing.bundle()), tmp_path)}
    assert findings["session"] == Finding(
        "session",
        "problem",
        "--device cuda:0: onnxruntime fell back to CPUExecutionProvider",
        "check the libraries",
    )
    assert [check for check, finding in findings.items() if finding.state != "ok"] == ["session"]


def test_a_gpu_that_auto_does_not_take(monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as by a model that is int8 alone: it works, at a cost, and the reason is told."""
    annotator = Annotator.load(testing.bundle(), Options(device="cpu"))
    annotator.notice = "--device auto takes the CPU, for it could not take CUDA"
    monkeypatch.setattr(doctor.Annotator, "load", lambda *_: annotator)
    ok = Finding("session", "ok", "fp32 on cpu by CPUExecutionProvider")
    assert doctor.try_session("any", "auto") == ok
    monkeypatch.setattr(doctor.runtime, "has_cuda", lambda: True)
    assert doctor.try_session("any", "cpu") == ok
    assert doctor.try_session("any", "auto") == Finding(
        "session",
        "note",
        f"{ok.found}; {annotator.notice}",
        "for a GPU export a model with --precision fp16, or mend what is said",
    )


def test_judgement() -> None:
    """Notes are no problems."""
    fine = [Finding("processor", "note", "slow", "buy another"), Finding("gpu", "ok", "none")]
    doctor.judge(fine)
    with pytest.raises(CheckFailed, match=r"^1 problem: model; the report names each one's remedy$"):
        doctor.judge([*fine, Finding("model", "problem", "gone")])


# ---------------------------------------------------------------------------------------------------------------------
# Facts and what they come to


def test_onnxruntime_that_came_otherwise() -> None:
    """A module that no wheel stands for, such as one built from source, is fine where it can be imported."""
    assert doctor.check_onnxruntime(Installed({}, Build("1.30.0", True, None))) == Finding(
        "onnxruntime", "ok", "onnxruntime 1.30.0, built with CUDA"
    )
    assert doctor.check_onnxruntime(Installed({"onnxruntime-gpu": "1.31.1"}, GPU)) == Finding(
        "onnxruntime", "ok", "onnxruntime-gpu 1.31.1, built for CUDA 13"
    )


def test_a_processor_without_vnni() -> None:
    """It is a note that says what it costs, not a problem."""
    assert doctor.check_processor("x86_64 avx2", exact=False) == Finding(
        "processor",
        "note",
        "x86_64 avx2: no VNNI, so int8 takes exact kernels, which are slower",
        "spans are right here, too; a processor with VNNI is faster",
    )


HIDDEN = Driver(2, "580.65.06", (13, 0), ())
BROKEN = Driver(2, "580.65.06", (13, 0), (), 803)
V100 = Driver(1, "580.65.06", (13, 0), (Gpu("Tesla V100", (7, 0)),))
LOOK = "look at CUDA_VISIBLE_DEVICES, and at what the job or container was given"


@pytest.mark.parametrize(
    ("device", "build", "driver", "state", "found", "remedy"),
    [
        ("auto", GPU, GOOD_DRIVER, "ok", "NVIDIA H200", ""),
        ("cuda:0", GPU, GOOD_DRIVER, "ok", "NVIDIA H200", ""),
        ("auto", None, GOOD_DRIVER, "ok", "NVIDIA H200", ""),
        ("auto", CPU, NO_DRIVER, "ok", "none, so notes are annotated on the CPU", ""),
        (
            "cuda:1",
            GPU,
            GOOD_DRIVER,
            "problem",
            "--device cuda:1: CUDA counts from 0 and shows NVIDIA H200",
            "use a number below 1, or change CUDA_VISIBLE_DEVICES",
        ),
        (
            "auto",
            GPU,
            V100,
            "problem",
            "Tesla V100 has compute capability 7.0, and CUDA 13 needs 7.5",
            'pip install "onnxruntime-gpu[cuda,cudnn]==1.26.*", or pass --device cpu',
        ),
        ("auto", Build("1.26.0", True, 12), V100, "ok", "Tesla V100", ""),
        (
            "cuda",
            CPU,
            NO_DRIVER,
            "problem",
            "--device cuda: no GPU",
            "run it on a machine with one, or pass --device cpu",
        ),
        (
            "auto",
            GPU,
            NO_DRIVER,
            "problem",
            "no GPU, though this onnxruntime is built for CUDA; notes would be annotated on the CPU",
            "run it on a machine with one, or pass --device cpu, or: "
            'pip uninstall -y onnxruntime-gpu && pip install ".[cpu]" in a checkout of medner',
        ),
        (
            "auto",
            CPU,
            HIDDEN,
            "note",
            "2 in /dev, of which this process gets none, so notes are annotated on the CPU",
            LOOK,
        ),
        (
            "cuda",
            GPU,
            HIDDEN,
            "problem",
            "--device cuda: 2 in /dev, of which this process gets none",
            f"{LOOK}, or pass --device cpu",
        ),
        (
            "cuda",
            GPU,
            BROKEN,
            "problem",
            "--device cuda: CUDA does not start (error 803)",
            "restart the machine, or install the driver again, or pass --device cpu",
        ),
    ],
)
def test_gpus(device: str, build: Build | None, driver: Driver, state: Any, found: str, remedy: str) -> None:
    """A GPU that is there is used, and one that is asked for is there."""
    assert doctor.check_gpu(device, build, driver) == Finding("gpu", state, found, remedy)


@pytest.mark.parametrize(
    ("build", "driver", "state", "found", "remedy"),
    [
        (GPU, GOOD_DRIVER, "ok", "580.65.06 with CUDA up to 13.0", ""),
        (CPU, Driver(1, "", (12, 4), (H200,)), "ok", "unknown version with CUDA up to 12.4", ""),
        # A newer library beside an older kernel part, as NVIDIA's compatibility package brings.
        (GPU, Driver(1, "535.104.05", (13, 1), (H200,)), "ok", "535.104.05 with CUDA up to 13.1", ""),
        (
            GPU,
            Driver(1, "550.54.15", (12, 4), (H200,)),
            "problem",
            "550.54.15 with CUDA up to 12.4 is too old for this onnxruntime, which is built for CUDA 13",
            'install driver 580 or newer, or: pip install "onnxruntime-gpu[cuda,cudnn]==1.26.*", or pass --device cpu',
        ),
        (
            GPU,
            Driver(1, "470.82.01", (11, 4), (H200,)),
            "problem",
            "470.82.01 with CUDA up to 11.4 is too old for this onnxruntime, which is built for CUDA 13",
            "install driver 580 or newer, or pass --device cpu",
        ),
        (
            Build("2.0.0", True, 14),
            GOOD_DRIVER,
            "problem",
            "580.65.06 with CUDA up to 13.0 is too old for this onnxruntime, which is built for CUDA 14",
            "install a driver for CUDA 14, or pass --device cpu",
        ),
        (
            GPU,
            Driver(1, "580.65.06", None, ()),
            "problem",
            "580.65.06: its library libcuda.so.1 cannot be loaded",
            "install the driver's libraries; start a container with --gpus all",
        ),
    ],
)
def test_drivers(build: Build, driver: Driver, state: Any, found: str, remedy: str) -> None:
    """What the driver's library runs counts, and it must reach the CUDA that onnxruntime was built for."""
    assert doctor.check_driver(build, driver) == Finding("driver", state, found, remedy)


def test_no_driver_is_no_finding() -> None:
    """Without a GPU and without a driver there is nothing to say, not even where the kernel of a host has one."""
    assert doctor.check_driver(GPU, NO_DRIVER) is None
    assert doctor.check_driver(GPU, Driver(0, "580.65.06", None, ())) is None


INSTALL = 'pip install "onnxruntime-gpu[cuda,cudnn]==1.31.1"'


@pytest.mark.parametrize(
    ("libraries", "state", "found", "remedy"),
    [
        (Libraries(), "ok", "CUDA 13 and cuDNN can be loaded", ""),
        (
            Libraries(missing=("libcublas.so.13", "libcudnn.so.9")),
            "problem",
            "cannot be loaded: libcublas.so.13, libcudnn.so.9",
            INSTALL,
        ),
        (
            Libraries(missing=("libcudnn.so.9",), others=("libcudnn.so.8", "nvidia-cublas-cu12 12.8.4.1")),
            "problem",
            "cannot be loaded: libcudnn.so.9; of another major version: libcudnn.so.8, nvidia-cublas-cu12 12.8.4.1",
            INSTALL,
        ),
        (
            Libraries(others=("nvidia-cudnn-cu12 9.20.0.48",), cudnn=("nvidia-cudnn-cu12",)),
            "problem",
            "nvidia-cudnn-cu12 has the place of cuDNN for CUDA 13",
            f"pip uninstall -y nvidia-cudnn-cu12 nvidia-cudnn-cu13, then {INSTALL}",
        ),
        # Those of torch, say: they lie in folders of their own.
        (Libraries(others=("nvidia-cublas-cu12 12.8.4.1",)), "ok", "CUDA 13 and cuDNN can be loaded", ""),
    ],
)
def test_libraries(libraries: Libraries, state: Any, found: str, remedy: str) -> None:
    """All that onnxruntime loads for CUDA is there, in the major versions that it was built for."""
    assert doctor.check_libraries(GPU, libraries) == Finding("libraries", state, found, remedy)


def test_no_libraries_are_needed_without_cuda() -> None:
    """Nor are they looked for."""
    assert doctor.check_libraries(CPU, Libraries()) is None
    assert doctor.check_libraries(None, Libraries()) is None


# ---------------------------------------------------------------------------------------------------------------------
# Looking


class FakeCuda:
    """CUDA's driver library, with GPUs of the given compute capabilities; ``refusal``: what ``cuInit`` answers."""

    def __init__(self, version: int, *capabilities: tuple[int, int], refusal: int = 0) -> None:
        self.version, self.capabilities, self.refusal = version, capabilities, refusal

    def cuInit(self, flags: int) -> int:  # noqa: N802
        """Start."""
        assert flags == 0
        return self.refusal

    def cuDriverGetVersion(self, to: Any) -> int:  # noqa: N802
        """Needs no start."""
        to._obj.value = self.version
        return 0

    def cuDeviceGetCount(self, to: Any) -> int:  # noqa: N802
        """How many."""
        assert not self.refusal
        to._obj.value = len(self.capabilities)
        return 0

    def cuDeviceGet(self, to: Any, index: int) -> int:  # noqa: N802
        """Devices are numbered from 10 here, as a handle is not an index."""
        to._obj.value = index + 10
        return 0

    def cuDeviceGetName(self, to: Any, size: int, device: ctypes.c_int) -> int:  # noqa: N802
        """A name for each."""
        name = f"NVIDIA {device.value - 10}".encode()
        assert len(name) < size
        to.value = name
        return 0

    def cuDeviceGetAttribute(self, to: Any, attribute: int, device: ctypes.c_int) -> int:  # noqa: N802
        """The two attributes of the compute capability."""
        to._obj.value = self.capabilities[device.value - 10][{75: 0, 76: 1}[attribute]]
        return 0


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """The files of a machine with two GPUs."""
    (tmp_path / "dev").mkdir()
    for name in ("nvidia0", "nvidia1", "nvidiactl", "nvidia-uvm", "null"):
        (tmp_path / "dev" / name).touch()
    (tmp_path / "proc/driver/nvidia").mkdir(parents=True)
    (tmp_path / "proc/driver/nvidia/version").write_text(
        "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build  (root@host)\n"
        "GCC version:  gcc version 12.3.0 (Ubuntu 12.3.0-1ubuntu1~22.04)\n"
    )
    return tmp_path


def absent(name: str) -> Any:
    """No shared library can be loaded."""
    raise OSError(f"{name}: cannot open shared object file")


def test_looking_at_a_driver(root: Path) -> None:
    """Device files, the kernel's part of the driver, its library's CUDA, and what CUDA shows of the GPUs."""
    cuda = FakeCuda(13010, (9, 0), (7, 5))
    asked = []

    def load(name: str) -> FakeCuda:
        asked.append(name)
        return cuda

    assert doctor.look_at_driver(load, root) == Driver(
        2, "580.65.06", (13, 1), (Gpu("NVIDIA 0", (9, 0)), Gpu("NVIDIA 1", (7, 5)))
    )
    assert asked == ["libcuda.so.1"]
    assert doctor.look_at_driver(absent, root) == Driver(2, "580.65.06", None, ())


def test_looking_where_cuda_refuses(root: Path) -> None:
    """No GPU for this process is an answer; any other refusal is an error, whose code is kept."""
    assert doctor.look_at_driver(lambda _: FakeCuda(13000, refusal=100), root) == HIDDEN
    assert doctor.look_at_driver(lambda _: FakeCuda(13000, refusal=803), root) == BROKEN


def test_looking_where_there_is_nothing(tmp_path: Path) -> None:
    """No driver is no error."""
    assert doctor.look_at_driver(absent, tmp_path) == NO_DRIVER


def test_looking_for_libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is missing is named, and what is there instead, by library and by package."""
    packages = [("nvidia-cublas-cu12", "12.8.4.1", 12), ("nvidia-cudnn-cu12", "9.20.0.48", 12)]
    monkeypatch.setattr(doctor, "_cuda_wheels", lambda: packages)
    there = {f"lib{name}.so.13" for name in ("cudart", "cublasLt", "nvrtc")}
    there |= {"libcufft.so.12", "libcurand.so.10", "libcudnn.so.8", "libcublas.so.12"}

    def load(name: str) -> None:
        if name not in there:
            absent(name)

    assert doctor.look_for_libraries(13, load) == Libraries(
        missing=("libcublas.so.13", "libcudnn.so.9"),
        others=("libcublas.so.12", "libcudnn.so.8", "nvidia-cublas-cu12 12.8.4.1", "nvidia-cudnn-cu12 9.20.0.48"),
        cudnn=("nvidia-cudnn-cu12",),
    )
    assert doctor.look_for_libraries(12, lambda _: None) == Libraries()


def test_packages_of_cuda(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Packages that state a CUDA version are found by their metadata; others say nothing about it."""
    for name in ("nvidia_cudnn_cu12-9.20.0.48", "nvidia_cublas-13.1.1.3", "nvidia_nccl_cu12-2.29.7"):
        info = tmp_path / f"{name}.dist-info"
        info.mkdir()
        title, _, version = name.partition("-")
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {title.replace('_', '-')}\nVersion: {version}\n")
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    assert doctor._cuda_wheels() == [("nvidia-cudnn-cu12", "9.20.0.48", 12)]


def test_what_onnxruntime_says_of_itself(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    """The build's CUDA is read from the module; loading its libraries prints nothing, errors alone may."""

    class Ort:
        __version__ = "1.31.1"
        cuda_version = "13.0"
        severity = 2

        def __init__(self, *providers: str) -> None:
            self.providers = providers

        def get_available_providers(self) -> tuple[str, ...]:
            return self.providers

        def preload_dlls(self) -> None:
            print("a library is missing")

        def set_default_logger_severity(self, level: int) -> None:
            self.severity = level

    with_cuda, without = Ort("CUDAExecutionProvider", "CPUExecutionProvider"), Ort("CPUExecutionProvider")
    monkeypatch.setattr(runtime, "_onnxruntime", lambda: with_cuda)
    assert runtime.build() == GPU
    runtime.preload_cuda()
    assert capfd.readouterr() == ("", "")
    runtime.write_errors_alone()
    assert with_cuda.severity == 3
    monkeypatch.setattr(runtime, "_onnxruntime", lambda: without)
    assert runtime.build() == CPU
    with_cuda.cuda_version = ""
    monkeypatch.setattr(runtime, "_onnxruntime", lambda: with_cuda)
    assert runtime.build() == Build("1.31.1", True, None)


# ---------------------------------------------------------------------------------------------------------------------
# Model and output


def test_a_foreign_model(tmp_path: Path) -> None:
    """A model without ``medner.json`` has no hashes to compare with, and the line says so."""
    model = shutil.copytree(testing.bundle(), tmp_path / "other")
    (model / "medner.json").unlink()
    assert doctor.try_model(str(model)) == Finding("model", "ok", "other with fp32: no hashes are recorded")


def test_an_error_without_a_next_step(tmp_path: Path) -> None:
    """Where an error of the model names none, the finding does, and its line is one."""
    model = shutil.copytree(testing.bundle(), tmp_path / "a\nb")
    (model / "medner.json").write_text("[]")
    finding = doctor.try_model(str(model))
    step = "copy or export the model again, or name another with --model"
    assert finding == Finding("model", "problem", f"{model}/medner.json: holds no JSON object", step)
    line = f"problem  model        {tmp_path}/a b/medner.json: holds no JSON object; {step}"
    assert doctor.text([finding, finding]) == f"{line}\n{line}"


def test_outputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The directory that a run would write to, or make, is written to; a full or read-only disk is a problem."""
    for output in (tmp_path, tmp_path / "run", tmp_path / "a" / "b" / "run", tmp_path / "spans.parquet"):
        finding = doctor.try_output(output)
        assert (finding.state, finding.found.partition(" can be written, ")[0]) == ("ok", str(tmp_path))
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "spans.jsonl").touch()
    assert doctor.try_output(tmp_path / "spans.jsonl").state == "ok"
    missing = f"{tmp_path / 'no'}: cannot be written: No such file or directory"
    assert doctor.try_output(tmp_path / "no" / "spans.jsonl").found == missing  # as a run says
    monkeypatch.chdir(tmp_path)
    assert doctor.try_output(Path()).found.startswith(f"{tmp_path} can be written, ")

    def full(_: int) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(os, "fsync", full)
    assert doctor.try_output(tmp_path / "run") == Finding(
        "output", "problem", f"{tmp_path}: cannot be written: No space left on device", "name another with --output"
    )


def test_an_output_without_the_right_to_write() -> None:
    """A directory that others own is a problem, and so is what would lie in it."""
    user = os.geteuid()
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o555)
        if user == 0:  # who may write anywhere
            os.seteuid(65534)
        try:
            finding = doctor.try_output(Path(folder) / "run")
        finally:
            os.seteuid(user)
    assert finding == Finding(
        "output", "problem", f"{folder}: cannot be written: Permission denied", "name another with --output"
    )


def test_usage_errors_are_raised() -> None:
    """They are the caller's, not the machine's."""
    with pytest.raises(UsageError, match=r"^--device cuda:x: unknown; use auto, cpu, cuda or cuda:N$"):
        doctor.examine(device="cuda:x")
