"""What on this machine keeps medner from running, or from running well: a line for each check, with its remedy.

:class:`Machine` looks, the ``check_`` functions judge what it saw, and the ``try_`` functions do what a run would do.
Nothing is downloaded, unless the model is named after one on the Hugging Face hub.
"""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import orjson

from medner import bundle as bundles
from medner import runtime, sinks
from medner.annotate import Annotator, Options
from medner.errors import CheckFailed, MednerError, MissingPackage, UsageError, install

#: Packages that all install the one module ``onnxruntime``.
WHEELS = ("onnxruntime", "onnxruntime-gpu", "onnxruntime-directml", "onnxruntime-openvino", "onnxruntime-training")

#: By CUDA's major version: the oldest driver on Linux, and the oldest compute capability that its libraries run on
#: (NVIDIA, CUDA Compatibility, "Minor Version Compatibility"; release notes of CUDA 12.0 and 13.0).
OLDEST = {12: (525, (5, 0)), 13: (580, (7, 5))}

#: The last onnxruntime-gpu that was built for CUDA 12.
_FOR_CUDA_12 = 'pip install "onnxruntime-gpu[cuda,cudnn]==1.26.*"'
_EITHER = f'{install("cpu")}, or ".[gpu]" on a machine with CUDA'

State = Literal["ok", "note", "problem"]


@dataclass(frozen=True, slots=True)
class Finding:
    """What one check found.

    state: ``ok``, ``note`` (it works, at a cost) or ``problem``. remedy: what to do, empty where all is well.
    """

    check: str
    state: State
    found: str
    remedy: str = ""


@dataclass(frozen=True, slots=True)
class Installed:
    """The onnxruntime of this environment.

    wheels: version by name of the packages that install it. build: what was imported; None, and ``failure`` the
    reason, where it could not be.
    """

    wheels: Mapping[str, str]
    build: runtime.Build | None
    failure: str = ""


@dataclass(frozen=True, slots=True)
class Gpu:
    """A GPU that CUDA shows to this process; capability: its compute capability."""

    name: str
    capability: tuple[int, int]


@dataclass(frozen=True, slots=True)
class Driver:
    """The NVIDIA driver, as far as this process can see it.

    files: GPUs that have a device file. version: of the kernel's part, such as ``580.65.06``; empty where there is
    none. cuda: the newest CUDA (major, minor) that the driver's library runs; None where that library cannot be loaded.
    gpus: what CUDA shows. error: the code of CUDA's refusal to start, 0 without.
    """

    files: int
    version: str
    cuda: tuple[int, int] | None
    gpus: tuple[Gpu, ...]
    error: int = 0


@dataclass(frozen=True, slots=True)
class Libraries:
    """The CUDA libraries beside the driver.

    missing: those that cannot be loaded. others: what is there of another major version of CUDA, packages by name and
    version. cudnn: packages of cuDNN for another CUDA, which bear the same library names and lie in the same folder.
    """

    missing: tuple[str, ...] = ()
    others: tuple[str, ...] = ()
    cudnn: tuple[str, ...] = ()


def examine(model: str = "default", output: Path = Path(), device: str = "auto") -> list[Finding]:
    """Make every check; :func:`judge` says what they come to.

    model: as for :func:`medner.bundle.load`; output: where a run would write; device: ``auto``, ``cpu``, ``cuda`` or
    ``cuda:N``. A check that fails itself is a problem with its exception's type. Raises :class:`UsageError` for a
    device of another form.
    """
    _check_form(device)
    machine = Machine()
    findings: list[Finding] = []
    checks: dict[str, Callable[[], Finding | None]] = {
        "onnxruntime": lambda: check_onnxruntime(machine.installed),
        "processor": lambda: check_processor(runtime.instruction_set(), exact=runtime.has_exact_int8()),
    }
    if device != "cpu":
        checks |= {
            "gpu": lambda: check_gpu(device, machine.installed.build, machine.driver),
            "driver": lambda: check_driver(machine.installed.build, machine.driver),
            "libraries": lambda: check_libraries(machine.installed.build, machine.libraries),
        }
    checks |= {
        "model": lambda: try_model(model),
        # Not after a problem: why it would fail is said already, and by onnxruntime in words that mislead.
        "session": lambda: None if _problems(findings) else try_session(model, device),
        "output": lambda: try_output(output),
    }
    for name, check in checks.items():
        if finding := _guarded(name, check):
            findings.append(finding)
    return findings


def judge(findings: Sequence[Finding]) -> None:
    """Raise :class:`CheckFailed` where there is a problem."""
    if problems := _problems(findings):
        raise CheckFailed(
            f"{len(problems)} {'problem' if len(problems) == 1 else 'problems'}: {', '.join(problems)}; "
            "the report names each one's remedy"
        )


def text(findings: Sequence[Finding]) -> str:
    """A line for each finding, for a person."""
    return "\n".join(map(_line, findings))


def _line(finding: Finding) -> str:
    line = f"{finding.state:<8} {finding.check:<12} {finding.found}" + (f"; {finding.remedy}" if finding.remedy else "")
    return " ".join(line.splitlines())  # a path may hold anything


def as_json(findings: Sequence[Finding]) -> str:
    """The findings as JSON, with medner's version."""
    # A path in it may be no valid Unicode.
    plain = [
        {name: value.encode("utf-8", "backslashreplace").decode() for name, value in asdict(finding).items()}
        for finding in findings
    ]
    value = {"medner": metadata.version("medner"), "findings": plain}
    return orjson.dumps(value, option=orjson.OPT_INDENT_2).decode()


def _problems(findings: Sequence[Finding]) -> list[str]:
    return [finding.check for finding in findings if finding.state == "problem"]


def _check_form(device: str) -> None:
    try:
        runtime.resolve_device(device)
    except UsageError:
        raise
    except Exception:  # that it cannot be had is a finding of its own
        return


def _guarded(name: str, check: Callable[[], Finding | None]) -> Finding | None:
    try:
        return check()
    except Exception as exc:  # one check's defect shall not hide what the others find
        return Finding(name, "problem", f"this check failed itself ({type(exc).__name__})", "report it as a defect")


# ---------------------------------------------------------------------------------------------------------------------
# Looking


class Machine:
    """What the checks are about, each looked at once, and only if a check asks."""

    @cached_property
    def installed(self) -> Installed:
        """The installed wheels, and what importing them gives."""
        wheels = {name: version for name in WHEELS if (version := _version(name))}
        try:
            build = runtime.build()
            runtime.write_errors_alone()
        except MissingPackage as exc:
            return Installed(wheels, None, _first_line(exc.__cause__ or exc))
        except Exception as exc:  # what is left of two wheels, or of a broken one, fails in many ways
            return Installed(wheels, None, _first_line(exc))
        return Installed(wheels, build)

    @cached_property
    def driver(self) -> Driver:
        """The NVIDIA driver and its GPUs."""
        return look_at_driver()

    @cached_property
    def libraries(self) -> Libraries:
        """The libraries that the installed onnxruntime needs for CUDA; those that a session loads count as there."""
        build = self.installed.build
        if build is None or build.cuda is None:
            return Libraries()
        runtime.preload_cuda()
        return look_for_libraries(build.cuda)


def look_at_driver(load: Callable[[str], Any] = ctypes.CDLL, root: Path = Path("/")) -> Driver:
    """Ask the kernel and CUDA's driver library, without any package.

    load: opens a shared library, raising :class:`OSError`; root: of the file system.
    """
    files = sum(1 for file in (root / "dev").glob("nvidia*") if re.fullmatch(r"nvidia\d+", file.name))
    try:
        stated = (root / "proc/driver/nvidia/version").read_text(encoding="utf-8", errors="replace")
    except OSError:
        stated = ""
    found = re.search(r"\b\d{3,}\.\d+(\.\d+)?\b", stated)
    version = found.group() if found else ""
    try:
        cuda = load("libcuda.so.1")
    except OSError:
        return Driver(files, version, None, ())
    number, count = ctypes.c_int(), ctypes.c_int()
    cuda.cuDriverGetVersion(ctypes.byref(number))
    newest = (number.value // 1000, number.value % 1000 // 10)
    error = int(cuda.cuInit(0)) or int(cuda.cuDeviceGetCount(ctypes.byref(count)))
    gpus = tuple(_gpu(cuda, index) for index in range(count.value))
    return Driver(files, version, newest, gpus, 0 if error == _NO_DEVICE else error)


#: CUDA_ERROR_NO_DEVICE: no GPU, or CUDA_VISIBLE_DEVICES hides all.
_NO_DEVICE = 100


def _gpu(cuda: Any, index: int) -> Gpu:
    device, name = ctypes.c_int(), ctypes.create_string_buffer(100)
    cuda.cuDeviceGet(ctypes.byref(device), index)
    cuda.cuDeviceGetName(name, len(name), device)
    capability = []
    for attribute in (75, 76):  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR
        value = ctypes.c_int()
        cuda.cuDeviceGetAttribute(ctypes.byref(value), attribute, device)
        capability.append(value.value)
    return Gpu(name.value.decode("utf-8", "replace"), (capability[0], capability[1]))


def look_for_libraries(cuda: int, load: Callable[[str], Any] = ctypes.CDLL) -> Libraries:
    """Which of the libraries that onnxruntime loads for a major version of CUDA are there; ``load`` as above."""

    def loads(name: str) -> bool:
        try:
            load(name)
        except OSError:
            return False
        return True

    missing = [(stem, major) for stem, major in _libraries(cuda) if not loads(f"{stem}.{major}")]
    near = [f"{stem}.{other}" for stem, major in missing for other in (major - 1, major + 1)]
    wheels = {name: version for name, version, major in _cuda_wheels() if major != cuda}
    return Libraries(
        tuple(f"{stem}.{major}" for stem, major in missing),
        (*filter(loads, near), *(f"{name} {version}" for name, version in sorted(wheels.items()))),
        tuple(sorted(name for name in wheels if name.startswith("nvidia-cudnn-"))),
    )


def _libraries(cuda: int) -> list[tuple[str, int]]:
    """Name and version of the libraries that ``onnxruntime.preload_dlls`` loads, and a session's kernels use."""
    of_cuda = [(f"lib{name}.so", cuda) for name in ("cudart", "cublasLt", "cublas", "nvrtc")]
    return [*of_cuda, ("libcufft.so", cuda - 1), ("libcurand.so", 10), ("libcudnn.so", 9)]


def _cuda_wheels() -> list[tuple[str, str, int]]:
    """Name, version and CUDA's major version of the installed packages that hold such libraries and state one."""
    found = []
    for package in metadata.distributions():
        name = package.metadata["Name"] or ""
        match = re.fullmatch(r"nvidia-(?:cuda-runtime|cublas|cuda-nvrtc|cufft|curand|cudnn)-cu(\d+)", name)
        if match:
            found.append((name, package.version, int(match.group(1))))
    return found


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _first_line(exc: BaseException) -> str:
    line = next(iter(str(exc).splitlines()), "")[:200]
    return f"{type(exc).__name__}: {line}" if line else type(exc).__name__


# ---------------------------------------------------------------------------------------------------------------------
# Judging


def check_onnxruntime(installed: Installed) -> Finding:
    """One wheel of onnxruntime, no more, and it can be imported."""
    found = " and ".join(f"{name} {version}" for name, version in installed.wheels.items())
    if len(installed.wheels) > 1:
        return Finding(
            "onnxruntime",
            "problem",
            f"{found} are installed and overwrite each other's files",
            f"pip uninstall -y {' '.join(installed.wheels)}, then {_EITHER}",
        )
    if installed.build is not None:
        found = found or f"onnxruntime {installed.build.version}"
        return Finding("onnxruntime", "ok", found + _built(installed.build))
    if not installed.wheels:
        return Finding("onnxruntime", "problem", "not installed", _EITHER)
    (wheel,) = (f"{name}=={version}" for name, version in installed.wheels.items())
    return Finding(
        "onnxruntime",
        "problem",
        f"{found} is installed and cannot be imported ({installed.failure})",
        f"pip install --force-reinstall --no-deps {wheel}",
    )


def _built(build: runtime.Build) -> str:
    if not build.has_cuda:
        return ""
    return ", built with CUDA" if build.cuda is None else f", built for CUDA {build.cuda}"


def check_processor(features: str, *, exact: bool) -> Finding:
    """Whether int8 runs at full speed; ``features`` as by :func:`medner.runtime.instruction_set`."""
    if exact:
        return Finding("processor", "ok", features)
    return Finding(
        "processor",
        "note",
        f"{features}: no VNNI, so int8 takes exact kernels, which are slower",
        "spans are right here, too; a processor with VNNI is faster",
    )


def check_gpu(device: str, build: runtime.Build | None, driver: Driver) -> Finding:
    """A GPU that is there is used, and one that is asked for is there; ``device`` is not ``cpu``."""
    if not driver.gpus:
        return _no_gpu(device, build, driver)
    names = ", ".join(gpu.name for gpu in driver.gpus)
    number = int(device.partition(":")[2] or 0)
    if number >= len(driver.gpus):
        return Finding(
            "gpu",
            "problem",
            f"--device {device}: CUDA counts from 0 and shows {names}",
            f"use a number below {len(driver.gpus)}, or change CUDA_VISIBLE_DEVICES",
        )
    if build is not None and not build.has_cuda:
        return Finding(
            "gpu",
            "problem",
            f"{names}, which this onnxruntime cannot use: it is built without CUDA",
            f"pip uninstall -y onnxruntime && {install('gpu')}, or pass --device cpu",
        )
    gpu, cuda = driver.gpus[number], build.cuda if build is not None else None
    if cuda is not None and cuda in OLDEST and gpu.capability < (oldest := OLDEST[cuda][1]):
        return Finding(
            "gpu",
            "problem",
            f"{gpu.name} has compute capability {_dotted(gpu.capability)}, and CUDA {cuda} needs {_dotted(oldest)}",
            f"{_FOR_CUDA_12}, or pass --device cpu",
        )
    return Finding("gpu", "ok", names)


def _no_gpu(device: str, build: runtime.Build | None, driver: Driver) -> Finding:
    """CUDA shows no GPU: a problem where a run would take one."""
    found, step = "no GPU", "run it on a machine with one"
    if driver.error:
        found, step = f"CUDA does not start (error {driver.error})", "restart the machine, or install the driver again"
    elif driver.files:
        found = f"{driver.files} in /dev, of which this process gets none"
        step = "look at CUDA_VISIBLE_DEVICES, and at what the job or container was given"
    if device != "auto":
        return Finding("gpu", "problem", f"--device {device}: {found}", f"{step}, or pass --device cpu")
    if build is not None and build.has_cuda:
        return Finding(
            "gpu",
            "problem",
            f"{found}, though this onnxruntime is built for CUDA; notes would be annotated on the CPU",
            f"{step}, or pass --device cpu, or: pip uninstall -y onnxruntime-gpu && {install('cpu')}",
        )
    if driver.error or driver.files:
        return Finding("gpu", "note", f"{found}, so notes are annotated on the CPU", step)
    return Finding("gpu", "ok", "none, so notes are annotated on the CPU")


def check_driver(build: runtime.Build | None, driver: Driver) -> Finding | None:
    """The driver is new enough for the CUDA of onnxruntime; None where this process is given no driver."""
    if driver.cuda is None and not driver.files:
        return None
    if driver.cuda is None:
        return Finding(
            "driver",
            "problem",
            f"{driver.version or 'unknown version'}: its library libcuda.so.1 cannot be loaded",
            "install the driver's libraries; start a container with --gpus all",
        )
    found = f"{driver.version or 'unknown version'} with CUDA up to {_dotted(driver.cuda)}"
    cuda = build.cuda if build is not None else None
    if cuda is None or driver.cuda[0] >= cuda:
        return Finding("driver", "ok", found)
    newer = f"install driver {OLDEST[cuda][0]} or newer" if cuda in OLDEST else f"install a driver for CUDA {cuda}"
    return Finding(
        "driver",
        "problem",
        f"{found} is too old for this onnxruntime, which is built for CUDA {cuda}",
        newer + (f", or: {_FOR_CUDA_12}" if driver.cuda[0] == 12 else "") + ", or pass --device cpu",
    )


def check_libraries(build: runtime.Build | None, libraries: Libraries) -> Finding | None:
    """CUDA and cuDNN can be loaded, in the major versions that onnxruntime was built for; None where it uses none."""
    if build is None or build.cuda is None:
        return None
    install = f'pip install "onnxruntime-gpu[cuda,cudnn]=={build.version}"'
    if libraries.missing:
        others = f"; of another major version: {', '.join(libraries.others)}" if libraries.others else ""
        return Finding("libraries", "problem", f"cannot be loaded: {', '.join(libraries.missing)}{others}", install)
    if libraries.cudnn:
        return Finding(
            "libraries",
            "problem",
            f"{' and '.join(libraries.cudnn)} has the place of cuDNN for CUDA {build.cuda}",
            f"pip uninstall -y {' '.join(libraries.cudnn)} nvidia-cudnn-cu{build.cuda}, then {install}",
        )
    return Finding("libraries", "ok", f"CUDA {build.cuda} and cuDNN can be loaded")


def _dotted(version: tuple[int, int]) -> str:
    return f"{version[0]}.{version[1]}"


# ---------------------------------------------------------------------------------------------------------------------
# Trying


def try_model(model: str) -> Finding:
    """The model can be read, and each of its files has the recorded hash."""
    try:
        bundle = bundles.load(model)
        bundle.check()
    except MednerError as exc:
        return _failed("model", exc, "copy or export the model again, or name another with --model")
    hashes = "no hashes are recorded" if bundle.foreign else "every file has its recorded hash"
    return Finding("model", "ok", f"{bundle.name} with {', '.join(bundle.variants)}: {hashes}")


def try_session(model: str, device: str) -> Finding:
    """The model opens as for a run, on the device asked for."""
    try:
        annotator = Annotator.load(model, Options(device=device))
    except MednerError as exc:
        return _failed("session", exc, "mend what the other lines name, or pass --device cpu")
    session = annotator.session
    assert session is not None
    found = f"{annotator.precision} on {session.device} by {session.provider}"
    if device == "auto" and runtime.has_cuda() and session.device == "cpu":
        remedy = "for a GPU export a model with --precision fp16, or mend what is said"
        return Finding("session", "note", f"{found}; {annotator.notice}", remedy)
    return Finding("session", "ok", found)


def try_output(output: Path) -> Finding:
    """A file can be written where a run would write; a run directory that is not there yet is looked for further up."""
    is_file = sinks.file_format(output) is not None
    folder = output.parent if is_file else output
    try:
        while not is_file and not folder.exists() and folder != folder.parent:
            folder = folder.parent
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"\0" * 4096)
            file.flush()
            os.fsync(file.fileno())
        free = shutil.disk_usage(folder).free
    except OSError as exc:
        reason = exc.strerror or type(exc).__name__
        return Finding("output", "problem", f"{folder}: cannot be written: {reason}", "name another with --output")
    return Finding("output", "ok", f"{folder.resolve()} can be written, {free / 1e9:,.1f} GB free")


def _failed(check: str, exc: MednerError, otherwise: str) -> Finding:
    """An error of medner, which names the place and, after a semicolon, the next step."""
    found, _, step = str(exc).rpartition("; ")
    return Finding(check, "problem", found, step) if found else Finding(check, "problem", step, otherwise)
