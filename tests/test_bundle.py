"""A bundle is used only as it was written; what cannot be used is refused with the file and the next step."""

from __future__ import annotations

import hashlib
import json
import math
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from medner import Annotator, Options, bundle, testing
from medner.errors import ModelError

Build = Callable[..., Path]


@pytest.fixture
def own(tmp_path: Path, tiny_parts: dict[str, bytes]) -> Build:
    """Writes a copy of the tiny bundle with values of its ``medner.json`` replaced."""

    def build(**changes: Any) -> Path:
        path = tmp_path / "own"
        write(path, tiny_parts)
        card = json.loads(tiny_parts["medner.json"]) | changes
        (path / "medner.json").write_text(json.dumps(card), encoding="utf-8")
        return path

    return build


@pytest.fixture
def foreign(tmp_path: Path, tiny_parts: dict[str, bytes]) -> Build:
    """Writes a model without ``medner.json``, its graphs where asked, with values of ``config.json`` replaced."""

    def build(*graphs: str, **changes: Any) -> Path:
        path = tmp_path / "foreign"
        config = json.loads(tiny_parts["config.json"]) | changes
        parts = dict.fromkeys(graphs or ("model.onnx",), tiny_parts["onnx/model.onnx"])
        parts |= {"tokenizer.json": tiny_parts["tokenizer.json"], "config.json": json.dumps(config).encode()}
        write(path, parts)
        return path

    return build


def write(path: Path, parts: dict[str, bytes]) -> None:
    """Write files into a new directory."""
    for name, content in parts.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(content)


def sha(content: bytes) -> str:
    """SHA-256, hex."""
    return hashlib.sha256(content).hexdigest()


def refusal(model: str | Path, window: int | None = None) -> str:
    """The message with which loading and opening a model fails."""
    with pytest.raises(ModelError) as caught:
        Annotator.load(model, Options(window=window))
    assert caught.value.exit_code == 4
    return str(caught.value)


# ---------------------------------------------------------------------------------------------------------------------
# Bundles of medner


def test_the_shipped_tiny_bundle(tiny_parts: dict[str, bytes]) -> None:
    """A bundle is found by its directory and by its name; its record and its files' hashes are read."""
    by_path, by_name = bundle.load(testing.bundle()), bundle.load("tiny")
    assert by_path == by_name
    assert (by_name.name, by_name.window, by_name.packed, by_name.foreign) == ("tiny", 32, True, False)
    assert by_name.labels == ("O", "B-Disease", "I-Disease")
    graph = tiny_parts["onnx/model.onnx"]
    assert by_name.variants == {"fp32": bundle.Variant("onnx/model.onnx", sha(graph), len(graph))}
    used = ("config.json", "tokenizer.json", "medner.json")
    assert by_name.files == {name: sha(tiny_parts[name]) for name in used}
    assert by_name.card == {"format_version": 1, "name": "tiny", "licence": "Apache-2.0"}
    assert by_name.tokenizer_json() == tiny_parts["tokenizer.json"].decode()
    by_name.check()


def test_identity_names_all_that_decides_the_spans(tiny_parts: dict[str, bytes]) -> None:
    """The graph of the precision that runs, the tokenizer and the settings; sorted, with the graph last."""
    found = bundle.load("tiny").identity("fp32")
    names = ["config.json", "medner.json", "tokenizer.json", "onnx/model.onnx"]
    assert list(found.items()) == [(name, sha(tiny_parts[name])) for name in names]


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "onnx/model.onnx"])
@pytest.mark.parametrize("damage", ["altered", "cut short"])
def test_damaged_files(own: Build, name: str, damage: str) -> None:
    """A changed or truncated file is refused before it is used, with both hashes."""
    path = own()
    recorded = (path / name).read_bytes()
    content = recorded + b" " if damage == "altered" else recorded[: len(recorded) // 2]
    (path / name).write_bytes(content)
    message = (
        f"{path / name}: SHA-256 {sha(content)[:12]}... is not the recorded {sha(recorded)[:12]}...; "
        "the file was altered or cut short: copy or export the bundle again"
    )
    if name.endswith(".onnx") and damage == "altered":
        message = (
            f"{path / name}: {len(content):,} bytes are more than the recorded {len(recorded):,}; "
            "the file was altered: copy or export the bundle again"
        )
    assert refusal(path) == message
    with pytest.raises(ModelError) as caught:
        bundle.load(path).check()
    assert str(caught.value) == message


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "onnx/model.onnx"])
def test_missing_files(own: Build, name: str) -> None:
    """A file that ``medner.json`` lists must be there."""
    path = own()
    (path / name).unlink()
    assert refusal(path) == f"{path / name}: cannot be read (No such file or directory)"


def test_other_format_version(own: Build) -> None:
    """A later format is not guessed at."""
    path = own(format_version=2)
    assert refusal(path) == (f"{path}/medner.json: format version 2 is not 1; use the medner release that wrote it")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"files": {"../config.json": "0"}}, "ValueError '../config.json' is no path inside the model"),
        ({"files": {"/etc/passwd": "0"}}, "ValueError '/etc/passwd' is no path inside the model"),
        ({"files": {"onnx/../../x": "0"}}, "ValueError 'onnx/../../x' is no path inside the model"),
        ({"files": {"config.json": "0"}}, "ValueError '0' is no SHA-256"),
        ({"files": []}, "AttributeError 'list' object has no attribute 'items'"),
        ({"variants": {"fp64": {"sha256": "0" * 64, "bytes": 1}}}, "KeyError 'fp64'"),
        ({"variants": {"fp32": {"sha256": "0" * 64}}}, "KeyError 'bytes'"),
        ({"variants": {"fp32": {"sha256": "0" * 64, "bytes": -1}}}, "ValueError -1 is no count"),
        ({"variants": {"fp32": None}}, "TypeError 'NoneType' object is not subscriptable"),
        ({"window": "wide"}, "ValueError 'wide' is no count"),
        ({"window": None}, "ValueError None is no count"),
        ({"min_score": True}, "ValueError True is no share of one"),
        ({"min_score": math.nan}, "ValueError nan is no share of one"),
        ({"min_score": 1.5}, "ValueError 1.5 is no share of one"),
        ({"name": "two\nlines"}, "ValueError 'two\\nlines' is no name"),
    ],
)
def test_malformed_description(own: Build, changes: dict[str, Any], reason: str) -> None:
    """A value of the wrong kind, an unknown precision, and a path that leads out of the bundle."""
    path = own(**changes)
    assert refusal(path) == f"{path}/medner.json: not a bundle description ({reason})"


def test_description_that_is_no_json(own: Build) -> None:
    """Half a file, another kind of value, and a file without the tokenizer."""
    path = own()
    (path / "medner.json").write_text('{"format_version": 1', encoding="utf-8")
    assert refusal(path) == f"{path}/medner.json: cannot be read (JSONDecodeError)"
    (path / "medner.json").write_text("[1]", encoding="utf-8")
    assert refusal(path) == f"{path}/medner.json: holds no JSON object"
    own(files={})
    assert refusal(path) == f"{path}/medner.json: lists no config.json or tokenizer.json"


@pytest.mark.parametrize("window", [7, 513, 0, -1])
def test_window_outside_the_limit(window: int) -> None:
    """A window must leave room for tokens and fit the position embeddings."""
    message = f"tiny: a window of {window} tokens lies outside 8 to 512, the model's limit"
    assert refusal("tiny", window) == message
    with pytest.raises(ModelError) as caught:
        bundle.resized(bundle.load("tiny"), window)
    assert str(caught.value) == message


def test_window_inside_the_limit(own: Build) -> None:
    """The recorded window is taken unless another is asked for; both ends of the range are allowed."""
    assert bundle.load(own(window=48)).window == 48
    assert [bundle.load("tiny", window).window for window in (8, 512)] == [8, 512]
    assert bundle.resized(bundle.load("tiny"), 64).window == 64


def test_unknown_model(tmp_path: Path) -> None:
    """The message names the bundles that there are; a file is no model."""
    shipped = ", ".join(sorted(path.name for path in testing.bundle().parent.iterdir()))
    for model in ("nosuch", "/no/such/model", "../tiny", str(tmp_path / "absent")):
        assert refusal(model) == f"{model}: no such model directory; shipped with medner: {shipped}"
    file = tmp_path / "model.onnx"
    file.touch()
    assert refusal(file) == f"{file}: a model is a directory with config.json, tokenizer.json and an ONNX graph"


@pytest.mark.parametrize(("device", "code"), [("cpu", 4), ("cuda", 5)])
def test_absent_precision(device: str, code: int) -> None:
    """Asking for a variant that the bundle lacks names the command that makes it; on CUDA the device is at fault."""
    for precision in ("int8", "fp16"):
        with pytest.raises(Exception, match="variant") as caught:
            bundle.load("tiny").variant(precision, device)
        assert str(caught.value) == (
            f"tiny: no {precision} variant (it has fp32); make one with: "
            f"medner export CHECKPOINT -o BUNDLE --precision {precision} --parity-data FILE"
        )
        assert getattr(caught.value, "exit_code", None) == code


def test_preferred_precision(foreign: Build) -> None:
    """``auto`` takes int8 on a CPU and fp16 on a GPU where they are, and otherwise fp32."""
    path = foreign("onnx/model.onnx", "onnx/model_fp16.onnx", "onnx/model_int8.onnx")
    found = bundle.load(path)
    assert found.variant("auto", "cpu") == ("int8", path / "onnx/model_int8.onnx")
    assert found.variant("auto", "cuda") == ("fp16", path / "onnx/model_fp16.onnx")
    assert found.variant("fp32", "cuda") == ("fp32", path / "onnx/model.onnx")
    assert bundle.load("tiny").variant("auto", "cpu")[0] == bundle.load("tiny").variant("auto", "cuda")[0] == "fp32"


def test_written_description_is_read_back(tmp_path: Path, tiny_parts: dict[str, bytes]) -> None:
    """What ``write_manifest`` writes, ``load`` understands, with the extra values as the card."""
    write(tmp_path, {name: content for name, content in tiny_parts.items() if name != "medner.json"})
    (tmp_path / "tokenizer_config.json").write_text("{}", encoding="utf-8")
    labels = ("O", "B-X", "I-X")
    bundle.write_manifest(
        tmp_path, name="mine", labels=labels, window=24, packed=False, card={"licence": "MIT"}, min_score=0.75
    )
    found = bundle.load(tmp_path)
    assert (found.name, found.labels, found.window, found.packed) == ("mine", labels, 24, False)
    assert (found.min_score, bundle.load("tiny").min_score) == (0.75, 0.0)
    assert "\nscores    spans below 0.75 are left out (--min-score 0 gives them, too)\n" in bundle.describe(found)
    assert found.files["tokenizer_config.json"] == sha(b"{}")
    assert found.card["licence"] == "MIT"
    (tmp_path / "tokenizer_config.json").write_text('{"model_max_length": 16}', encoding="utf-8")
    assert "tokenizer_config.json: SHA-256" in refusal(tmp_path)


# ---------------------------------------------------------------------------------------------------------------------
# Foreign models


@pytest.mark.parametrize("graph", ["model.onnx", "onnx/model.onnx"])
def test_foreign_layouts(foreign: Build, graph: str) -> None:
    """Optimum's layout at the root and the hub's ``onnx/`` folder are annotated like a bundle."""
    path = foreign(graph)
    found = bundle.load(path)
    assert (found.foreign, found.name, found.window, dict(found.card)) == (True, "foreign", 128, {})
    assert {precision: variant.file for precision, variant in found.variants.items()} == {"fp32": graph}
    assert sorted(found.files) == ["config.json", "tokenizer.json"]
    assert sorted(found.identity("fp32")) == sorted(["config.json", graph, "tokenizer.json"])
    (span,) = Annotator.load(path)("Known breast cancer.")
    assert (span.text, span.label) == ("breast cancer", "Disease")


def test_foreign_file_names(foreign: Build) -> None:
    """``onnx/`` goes before the root; ``model_quantized.onnx`` is Optimum's name for int8."""
    found = bundle.load(foreign("model.onnx", "onnx/model.onnx", "onnx/model_quantized.onnx"))
    assert {precision: variant.file for precision, variant in found.variants.items()} == {
        "fp32": "onnx/model.onnx",
        "int8": "onnx/model_quantized.onnx",
    }


@pytest.mark.parametrize(
    ("config", "tokenizer_config", "window", "limit"),
    [
        ({"max_position_embeddings": 512}, {}, 128, 512),
        ({"max_position_embeddings": 64}, {}, 64, 64),
        # RoBERTa numbers positions from pad_token_id + 1.
        ({"max_position_embeddings": 514, "model_type": "roberta", "pad_token_id": 1}, {}, 128, 512),
        ({"max_position_embeddings": 100, "model_type": "xlm-roberta", "pad_token_id": 1}, {}, 98, 98),
        ({"max_position_embeddings": 512}, {"model_max_length": 100}, 100, 100),
        ({"max_position_embeddings": 512}, {"model_max_length": 1e30}, 128, 512),
        ({"max_position_embeddings": 64}, {"model_max_length": 512}, 64, 64),
        ({"max_position_embeddings": None}, {}, 128, 512),
    ],
)
def test_foreign_window(
    foreign: Build, config: dict[str, Any], tokenizer_config: dict[str, Any], window: int, limit: int
) -> None:
    """min(128, the model's limit), which its positions and its tokenizer set; ``window`` overrides it up to there."""
    path = foreign(**config)
    (path / "tokenizer_config.json").write_text(json.dumps(tokenizer_config), encoding="utf-8")
    assert bundle.load(path).window == window
    assert bundle.load(path, limit).window == limit
    message = f"foreign: a window of {limit + 1} tokens lies outside 8 to {limit}, the model's limit"
    assert refusal(path, limit + 1) == message


def test_labels_without_names(foreign: Build) -> None:
    """``LABEL_0`` says nothing about what a model finds."""
    path = foreign(id2label={"0": "LABEL_0", "1": "LABEL_1", "2": "LABEL_2"})
    assert refusal(path) == (
        f"{path}/config.json: labels are named LABEL_0, LABEL_1, ...; write the real tags (O, B-Disease, ...) "
        "into id2label"
    )


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"id2label": None}, "no id2label; medner needs the names of the model's labels"),
        ({"id2label": {"1": "O", "2": "B-X"}}, "id2label does not number its labels from 0"),
    ],
)
def test_labels_that_cannot_be_used(foreign: Build, changes: dict[str, Any], reason: str) -> None:
    """Names are needed for outputs 0, 1, 2 and so on."""
    path = foreign(**changes)
    assert refusal(path) == f"{path}/config.json: {reason}"


def test_labels_and_outputs_must_agree(foreign: Build) -> None:
    """A graph with other classes than the configuration names would give wrong labels."""
    path = foreign(id2label={"0": "O", "1": "B-X"})
    assert refusal(path) == f"{path}/model.onnx: has 3 classes, but config.json names 2"


def test_incomplete_foreign_models(foreign: Build) -> None:
    """Each missing file is named, with the command that writes a graph."""
    path = foreign()
    (path / "model.onnx").unlink()
    assert refusal(path) == (
        f"{path}: no model.onnx, nor onnx/model.onnx; write one with: "
        f"medner export {path} -o BUNDLE --parity-data NOTES"
    )
    for name in ("tokenizer.json", "config.json"):
        (path / name).unlink()
        assert refusal(path) == (
            f"{path}: no {name}; a model directory holds config.json, tokenizer.json and the model"
        )


def test_truncated_foreign_graph(foreign: Build) -> None:
    """Without a recorded hash onnxruntime is the one to refuse it."""
    path = foreign()
    graph = (path / "model.onnx").read_bytes()
    (path / "model.onnx").write_bytes(graph[: len(graph) // 2])
    assert refusal(path).startswith(f"{path}/model.onnx: onnxruntime cannot load it: ")


@pytest.mark.parametrize("content", [b"{", b"{}", b"[]", b"\xff", b'{"version": "1.0"}'])
def test_foreign_tokenizer_that_cannot_be_read(foreign: Build, content: bytes) -> None:
    """A broken ``tokenizer.json`` is a model error that names the file, not a traceback."""
    path = foreign()
    (path / "tokenizer.json").write_bytes(content)
    assert "tokenizer.json" in refusal(path)


@pytest.mark.parametrize(
    "changes", [{"max_position_embeddings": "many"}, {"model_type": "roberta", "pad_token_id": None}]
)
def test_foreign_positions_that_are_no_numbers(foreign: Build, changes: dict[str, Any]) -> None:
    """A limit that is no number is a model error that names ``config.json``, not a traceback."""
    assert "config.json" in refusal(foreign(**changes))


@pytest.mark.parametrize("content", ["[]", "{", "\ud800"])
def test_config_that_cannot_be_read(foreign: Build, content: str) -> None:
    """Another kind of value, half a file, and bytes that are no text."""
    path = foreign()
    (path / "config.json").write_bytes(content.encode(errors="surrogatepass"))
    assert refusal(path).startswith(f"{path}/config.json: ")


def test_checkpoints(foreign: Build, tmp_path: Path) -> None:
    """A checkpoint is a model without variants; its window is the one that training recorded."""
    path = foreign()
    found = bundle.load_checkpoint(path)
    assert (found.window, dict(found.variants), found.foreign) == (128, {}, True)
    (path / "metrics.json").write_text('{"options": {"window": 96}}', encoding="utf-8")
    assert bundle.load_checkpoint(path).window == 96
    assert bundle.load_checkpoint(path, 40).window == 40
    for other in ("no JSON", "[1]", '{"options": 3}'):  # of another program
        (path / "metrics.json").write_text(other, encoding="utf-8")
        assert bundle.load_checkpoint(path).window == 128
    assert bundle.recorded_training(path) == {"options": 3}
    with pytest.raises(ModelError) as caught:
        bundle.load_checkpoint(tmp_path / "absent")
    assert str(caught.value) == f"{tmp_path / 'absent'}: no such checkpoint directory"


def test_paths_that_cannot_be_read(tiny_parts: dict[str, bytes]) -> None:
    """What the system refuses is the model's error, with the path; so is a name that no file can have."""
    with pytest.raises(ModelError, match=r"^n{300}: cannot be read \(File name too long\)$"):
        bundle.load("n" * 300)
    user = os.geteuid()
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        (locked := Path(folder) / "locked").mkdir()
        (foreign := Path(folder) / "foreign").mkdir()
        write(locked / "model", tiny_parts)
        write(foreign, {name: content for name, content in tiny_parts.items() if name != "medner.json"})
        (foreign / "tokenizer.json").chmod(0)
        locked.chmod(0)
        if user == 0:  # who may read anywhere
            os.seteuid(65534)
        try:
            for model in (locked / "model", foreign):
                with pytest.raises(ModelError, match=rf"^{model}\S*: cannot be read \(Permission denied\)$"):
                    bundle.load(model)
        finally:
            os.seteuid(user)
            locked.chmod(0o700)


# ---------------------------------------------------------------------------------------------------------------------
# Hub and description


def test_hub_models(foreign: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    """``organization/name`` is fetched from the hub; where it cannot be, the message says what to do offline."""
    hub = pytest.importorskip("huggingface_hub")
    path = foreign()
    asked: list[str] = []

    def fetch(name: str, **_: object) -> str:
        asked.append(name)
        return str(path)

    monkeypatch.setattr(hub, "snapshot_download", fetch)
    assert bundle.load("ward/model").name == "ward/model"
    assert asked == ["ward/model"]

    def offline(name: str, **_: object) -> str:
        raise hub.errors.LocalEntryNotFoundError("no network")

    monkeypatch.setattr(hub, "snapshot_download", offline)
    assert refusal("ward/model") == (
        "ward/model: no such directory, and not found on the Hugging Face hub (LocalEntryNotFoundError); "
        "download it where there is a network and pass its directory"
    )


def test_a_path_below_a_directory_is_no_hub_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mistyped bundle in a directory that is here is not asked for elsewhere."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    assert refusal("runs/bundel").startswith("runs/bundel: no such model directory; shipped with medner: ")


def test_description_for_a_person(tiny_parts: dict[str, bytes]) -> None:
    """Name, labels, window, variants with size and hash, and licence."""
    graph = tiny_parts["onnx/model.onnx"]
    assert bundle.describe(bundle.load("tiny")) == "\n".join(
        [
            f"tiny ({testing.bundle()})",
            "labels    O, B-Disease, I-Disease",
            "window    32 tokens, as many segments as fit",
            f"fp32      onnx/model.onnx, {len(graph) / 1e6:.1f} MB, SHA-256 {sha(graph)[:16]}...",
            "licence   Apache-2.0",
        ]
    )


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"max_position_embeddings": 130}, 130),
        ({"max_position_embeddings": 130, "model_type": "roberta"}, 128),
        ({"max_position_embeddings": 130, "model_type": "camembert", "pad_token_id": 0}, 129),
        ({"max_position_embeddings": 514, "model_type": "mpnet", "pad_token_id": 1}, 512),
        ({"max_position_embeddings": None, "model_type": "roberta"}, None),
        ({}, None),
    ],
)
def test_positions(config: dict[str, object], expected: int | None) -> None:
    """RoBERTa and its kin number them from the one behind the padding's."""
    assert bundle.positions(config) == expected
