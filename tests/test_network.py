"""Nothing phones home: no command asks for the network unless it was given the name of a model or data set on the hub.

Every command runs as a process whose sockets, and those of all its children, refuse to connect and note who asked;
where the system allows it, also in a network namespace that has no network.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from medner import bundle as bundles
from medner import cli, testing

TINY = str(testing.bundle())
DEFAULT = testing.bundle().parent / "default"

#: Run by every interpreter that starts with this folder on its path. Sockets within the machine stay as they are.
BLOCK = """
import os, socket, traceback

def _note(what):
    with open(os.environ["MEDNER_TEST_NETWORK"], "a") as file:
        file.write(what + "\\\\n" + "".join(traceback.format_stack(limit=12)) + "\\\\n")

def _refusing(name, call):
    def refuse(*given, **more):
        socket_of = given[0] if given and isinstance(given[0], socket.socket) else None
        if socket_of is not None and socket_of.family not in (socket.AF_INET, socket.AF_INET6):
            return call(*given, **more)
        _note(f"{name} {given[1:] if socket_of is not None else given}")
        raise OSError(101, "the network is blocked")
    return refuse

for _name in ("connect", "connect_ex", "sendto", "sendmsg"):
    setattr(socket.socket, _name, _refusing(_name, getattr(socket.socket, _name)))
for _name in ("getaddrinfo", "gethostbyname", "gethostbyname_ex", "gethostbyaddr", "create_connection"):
    setattr(socket, _name, _refusing(_name, getattr(socket, _name)))
""".replace("\\\\n", "\\n")


def _namespace() -> tuple[str, ...]:
    """What to put before a command to run it without a network; nothing where the system does not allow it."""
    unshare = ("unshare", "--map-root-user", "--net")
    if shutil.which("unshare") is None:
        return ()
    return unshare if subprocess.run([*unshare, "true"], capture_output=True, check=False).returncode == 0 else ()


NAMESPACE = _namespace()


@dataclass
class Offline:
    """Runs commands in a folder, without a network; ``attempts`` are the connections that were asked for."""

    folder: Path
    blocker: Path
    namespace: tuple[str, ...] = NAMESPACE
    variables: dict[str, str] = field(default_factory=dict)

    @property
    def log(self) -> Path:
        """Where attempts are noted."""
        return self.blocker / "attempts"

    @property
    def home(self) -> Path:
        """The home directory of the commands."""
        return self.folder / "home"

    @property
    def attempts(self) -> str:
        """What was asked for so far, and what onnxruntime keeps in order to report it: its sockets are not Python's."""
        kept = [str(path) for path in self.home.rglob("*") if "onnxruntime" in path.name]
        return (self.log.read_text() if self.log.exists() else "") + "\n".join(kept)

    def run(self, *command: object) -> subprocess.CompletedProcess[str]:
        """Run a command. No variable tells the libraries of Hugging Face that there is no network."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "TRANSFORMERS_"))}
        kept |= {
            "PYTHONPATH": os.pathsep.join([str(self.blocker), *filter(None, [os.environ.get("PYTHONPATH")])]),
            "MEDNER_TEST_NETWORK": str(self.log),
            "HF_HOME": str(self.folder / "hf"),
            "HOME": str(self.home),
        }
        for name in ("ORT_DISABLE_TELEMETRY", "CI", "GITHUB_ACTIONS"):  # with any of them onnxruntime reports nothing
            kept.pop(name, None)
        return subprocess.run(
            [*self.namespace, *map(str, command)], cwd=self.folder, env=kept | self.variables, capture_output=True,
            text=True, check=False,
        )  # fmt: skip

    def medner(self, *arguments: object) -> subprocess.CompletedProcess[str]:
        """Run a command of medner."""
        return self.run(sys.executable, "-P", "-m", "medner.cli", *arguments)


@pytest.fixture(scope="session")
def blocker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the module that every interpreter loads first."""
    path = tmp_path_factory.mktemp("blocker")
    (path / "sitecustomize.py").write_text(BLOCK)
    return path


@pytest.fixture
def offline(tmp_path: Path, blocker: Path) -> Offline:
    """A fresh folder, and no attempt so far."""
    (blocker / "attempts").unlink(missing_ok=True)
    (tmp_path / "notes.jsonl").write_text('{"note_id": "a", "text": "Type 2 diabetes, no fever."}\n' * 3)
    (tmp_path / "splits").mkdir()
    for name in ("data.jsonl", "splits/train.jsonl", "splits/devel.jsonl"):
        (tmp_path / name).write_text('{"text": "no fever", "spans": [[3, 8, "Disease"]]}\n' * 3)
    return Offline(tmp_path, blocker)


# ---------------------------------------------------------------------------------------------------------------------
# The guard itself


ASK = {
    "urllib": "import urllib.request; urllib.request.urlopen('https://huggingface.co')",
    "socket": "import socket; socket.socket().connect(('93.184.216.34', 80))",
    "datagram": "import socket; socket.socket(type=socket.SOCK_DGRAM).sendto(b'x', ('93.184.216.34', 53))",
    "child": "import subprocess, sys; subprocess.run([sys.executable, '-P', '-c', "
    "'import socket; socket.create_connection((\"x.org\", 80))'], check=True)",
    "thread": "import threading, socket; t = threading.Thread(target=socket.getaddrinfo, args=('x.org', 80)); "
    "t.start(); t.join(); sys = __import__('sys'); sys.exit(1)",
}


@pytest.mark.parametrize("way", ASK)
def test_every_way_to_ask_is_noted(offline: Offline, way: str) -> None:
    """A library's request, a bare socket, a child process and a thread are all seen, and get no answer."""
    assert offline.run(sys.executable, "-P", "-c", ASK[way]).returncode != 0
    assert offline.attempts


FAIL = f"""
import numpy, onnxruntime
session = onnxruntime.InferenceSession({TINY + "/onnx/model.onnx"!r})
try:
    session.run(None, {{each.name: numpy.full((1, 3), 999999) for each in session.get_inputs()}})
except onnxruntime.capi.onnxruntime_pybind11_state.InvalidArgument:
    print("failed")
"""


@pytest.mark.parametrize("first", ["", "import onnxruntime, medner; medner.load('tiny')", "import medner"])
def test_onnxruntime_reports_nothing(offline: Offline, first: str) -> None:
    """It would keep, to be sent, what an error says of a batch; not with medner, nor if it was imported before that."""
    done = offline.run(sys.executable, "-P", "-c", f"{first}\n{FAIL}")
    assert (done.returncode, done.stdout) == (0, "failed\n"), done.stderr
    kept = b"".join(path.read_bytes() for path in offline.home.rglob("*") if path.is_file())
    if not first and b"999999" not in kept:
        pytest.skip("this build of onnxruntime reports nothing")
    assert (b"999999" in kept) == (not first)
    assert offline.attempts == "" or first != "import medner"


def test_talk_within_the_machine_is_none(offline: Offline) -> None:
    """Processes of one machine may talk to each other."""
    talk = "import socket; a, b = socket.socketpair(); a.sendall(b'x'); assert b.recv(1) == b'x'"
    assert offline.run(sys.executable, "-P", "-c", talk).returncode == 0
    assert offline.attempts == ""


@pytest.mark.skipif(not NAMESPACE, reason="this system allows no network namespace")
def test_the_namespace_has_no_network(offline: Offline) -> None:
    """Code that does not ask by way of Python finds no network either."""
    done = offline.run(sys.executable, "-S", "-P", "-c", "import os; print(os.listdir('/sys/class/net'))")
    inside = offline.run(sys.executable, "-I", "-c", "import socket; socket.create_connection(('127.0.0.1', 9))")
    assert done.returncode == 0
    assert "Network is unreachable" in inside.stderr


# ---------------------------------------------------------------------------------------------------------------------
# Local inputs


def test_annotating_asks_for_nothing(offline: Offline, tiny_parts: dict[str, bytes]) -> None:
    """Neither with a bundle by name or path nor with a foreign model; nor do ``info``, ``evaluate`` and ``verify``."""
    foreign = offline.folder / "foreign" / "model"
    for name in ("config.json", "tokenizer.json", "onnx/model.onnx"):
        (foreign / name).parent.mkdir(parents=True, exist_ok=True)
        (foreign / name).write_bytes(tiny_parts[name])
    default = ["default"] if (DEFAULT / bundles.MANIFEST).is_file() else []
    for number, model in enumerate(("foreign/model", TINY, *default)):
        done = offline.medner("annotate", "notes.jsonl", "-o", f"out{number}", "--model", model)
        assert done.returncode == 0, done.stderr
        done = offline.medner("evaluate", "--model", model, "--data", "data.jsonl")
        assert done.returncode == 0, done.stderr
    for arguments in (
        ("annotate", "notes.jsonl", "-o", "out0", "--model", "foreign/model", "--resume"),
        ("annotate", "notes.jsonl", "-o", "one.parquet", "--model", "tiny"),
        ("annotate", "notes.jsonl", "-o", "-", "--model", "tiny"),
        ("info", "tiny"),
        *([("verify", "out0", "--notes", "notes.jsonl")] if "verify" in cli.cli.commands else []),
    ):
        done = offline.medner(*arguments)
        assert done.returncode == 0, done.stderr
    for arguments in (("--help",), ("doctor",), ("annotate", "none.jsonl", "-o", "x"), ("info", "nosuch")):
        offline.medner(*arguments)
    assert offline.attempts == ""


WORDS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "patient", "has", "no", "fever", "asthma", "pain", ".")
MARK = "zqxMARKzqx"


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small base model of random weights, ``base``, and tagged sentences that hold a mark, ``data``."""
    transformers = pytest.importorskip("transformers", reason="needs the extras train and export")
    pytest.importorskip("torch", reason="needs the extras train and export")
    path = tmp_path_factory.mktemp("whole")
    (path / "base").mkdir()
    (path / "base/vocab.txt").write_text("\n".join(WORDS))
    tokenizer = transformers.BertTokenizerFast(vocab_file=str(path / "base/vocab.txt"), model_max_length=64)
    tokenizer.save_pretrained(path / "base")
    config = transformers.BertConfig(
        vocab_size=len(WORDS), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=64,
    )  # fmt: skip
    transformers.set_seed(0)
    transformers.BertForTokenClassification(config).save_pretrained(path / "base")
    sentence = "the\tO\npatient\tO\n" + MARK + "\tO\nhas\tO\n{}\tB-Sign\n.\tO\n\n"
    (path / "data").mkdir()
    for split, copies in (("train", 24), ("devel", 4)):
        found = [sentence.format(word) for word in ("fever", "asthma", "pain")]
        (path / "data" / f"{split}.tsv").write_text("".join(found * copies))
    return path


def test_from_training_to_spans(base: Path, blocker: Path) -> None:
    """From a base model and tagged sentences to a bundle that annotates, on the command line and without a network.

    No step leaves the text of its data behind, in what it prints or in what it writes.
    """
    pytest.importorskip("optimum.exporters.onnx", reason="needs the extra export")
    pytest.importorskip("seqeval", reason="needs the extra train")
    (blocker / "attempts").unlink(missing_ok=True)
    offline = Offline(base, blocker)
    (base / "notes.jsonl").write_text(json.dumps({"text": f"the patient {MARK} has asthma ."}) + "\n")
    said = ""

    def medner(*arguments: str) -> str:
        nonlocal said
        done = offline.medner(*(word for argument in arguments for word in argument.split()))
        assert done.returncode == 0, done.stderr
        said += done.stdout + done.stderr
        return done.stdout

    assert medner(
        "train --data data --base base -o model --epochs 2 --lr 0.02 --batch-size 8 --window 16 --precision fp32",
        "--warmup-ratio 0 --label *=Problem",
    ).strip()
    assert json.loads((base / "model/metrics.json").read_text())["options"]["epochs"] == 2
    assert "B-Problem" in json.loads((base / "model/config.json").read_text())["label2id"]
    printed = medner(
        "export model -o bundle --parity-data data/devel.tsv --window 16 --precision fp32 --precision int8",
        "--name signs --licence CC0",
    )
    assert printed.startswith("parity on devel.tsv: 12 documents, windows of up to 16 tokens, packed; ")
    described = json.loads((base / "bundle/medner.json").read_text())
    assert (described["name"], described["licence"], described["window"]) == ("signs", "CC0", 16)
    assert set(described["variants"]) == {"fp32", "int8"}
    printed = medner("evaluate --model bundle --data data --split devel --precision fp32 --json scores.json")
    assert printed.splitlines()[0] == "signs fp32, window 16, on data (devel)"
    medner("evaluate --model model --data data --split devel")
    medner("info bundle")
    medner("compare --checkpoint model --bundle bundle --notes data/devel.tsv -o compared --rounds 1 --limit 2",
           "--threads 1")  # fmt: skip
    assert MARK not in said
    for file in base.rglob("*"):
        assert MARK not in file.name
        if file.is_file() and not file.is_relative_to(base / "data") and file.name != "notes.jsonl":
            assert MARK.encode() not in file.read_bytes(), file
    printed = medner("annotate notes.jsonl -o - --model bundle --precision fp32 --quiet")
    assert [(span["text"], span["label"]) for span in json.loads(printed)["spans"]] == [("asthma", "Problem")]
    assert offline.attempts == ""


@pytest.mark.filterwarnings("ignore")
def test_other_forms_of_local_models_and_data(base: Path, offline: Offline) -> None:
    """A checkpoint of pickled weights, one without a fast tokenizer's file, and a directory of Parquet files."""
    torch = pytest.importorskip("torch", reason="needs the extras train and export")
    pq = pytest.importorskip("pyarrow.parquet")
    pa = pytest.importorskip("pyarrow")
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("seqeval", reason="needs the extra train")
    pickled = shutil.copytree(base / "base", offline.folder / "pickled")
    weights = transformers.BertForTokenClassification.from_pretrained(pickled).state_dict()
    torch.save(weights, pickled / "pytorch_model.bin")
    (pickled / "model.safetensors").unlink()
    (pickled / "tokenizer.json").unlink()
    parquet = offline.folder / "parquet"
    parquet.mkdir()
    for split in ("train", "validation", "test"):
        table = pa.table({"tokens": [["no", "fever", "pain"]] * 8, "ner_tags": [["O", "B-Sign", "O"]] * 8})
        pq.write_table(table, parquet / f"{split}.parquet")
    done = offline.medner("train", "--data", "parquet", "--base", "pickled", "-o", "model", "--epochs", "1",
                          "--window", "16", "--precision", "fp32")  # fmt: skip
    assert done.returncode == 0, done.stderr
    done = offline.medner("evaluate", "--data", "parquet", "--model", "model")
    assert done.returncode == 0, done.stderr
    assert offline.attempts == ""


# ---------------------------------------------------------------------------------------------------------------------
# Names of the hub


HUB = "medner-tests/no-such-repository"
COMMANDS = {
    "annotate": ("notes.jsonl", "-o", "out", "--model", HUB),
    "info": (HUB,),
    "evaluate": ("--model", HUB, "--data", "data.jsonl"),
    "evaluate on": ("--model", TINY, "--data", HUB),
    "train on": ("--data", HUB, "--base", "nowhere", "-o", "model"),
    "train": ("--data", "splits", "--base", HUB, "-o", "model"),
}


@pytest.mark.parametrize(
    ("command", "forbidden"),
    [
        *((command, True) for command in COMMANDS),
        *((command, False) for command in ("annotate", "info", "evaluate on")),
    ],
)
def test_names_of_the_hub(offline: Offline, command: str, forbidden: bool) -> None:
    """Only such a name is looked up, and with HF_HUB_OFFLINE not even that; either way a line says so, exit code 4."""
    if command != "annotate" and command != "info":
        for package in ("datasets", "seqeval", "transformers", "torch"):
            pytest.importorskip(package, reason="needs the extra train")
    offline.variables = {"HF_HUB_OFFLINE": "1"} if forbidden else {}
    done = offline.medner(command.partition(" ")[0], *COMMANDS[command])
    assert (done.returncode, done.stdout) == (4, ""), done.stderr
    said = done.stderr.rpartition("medner: ")[2]
    assert said.startswith(f"{HUB}: ")
    assert said.count("\n") <= 2
    # Between its tries the library of Hugging Face says why they fail.
    assert not forbidden or done.stderr == f"medner: {said}"
    assert (offline.attempts == "") == forbidden
