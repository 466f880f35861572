"""A model may come from anyone: whatever its files hold, nothing of it runs, nothing else is read, one line says no."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from medner import Annotator, bundle, cli, graphfile, testing
from medner.errors import ModelError

onnx = pytest.importorskip("onnx", reason="hostile graphs are made with onnx")
helper, numpy_helper, kinds = onnx.helper, onnx.numpy_helper, onnx.TensorProto

SECRET = "weights of somebody else"


@pytest.fixture(autouse=True)
def _no_hang() -> Iterator[None]:
    """A file that blocks, or never ends, fails the test instead of stopping it."""

    def stop(*_: object) -> None:
        raise AssertionError("it hangs")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(120)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


Write = Callable[..., Path]


@pytest.fixture
def model(tmp_path: Path, tiny_parts: dict[str, bytes]) -> Write:
    """Writes the tiny bundle, or with ``foreign`` the same without ``medner.json``, some of its files replaced.

    ``medner.json`` records whatever graph it is given.
    """

    def write(graph: Any = None, *, foreign: bool = False, **files: bytes) -> Path:
        path = tmp_path / "model"
        shutil.rmtree(path, ignore_errors=True)
        parts = {name.replace("_json", ".json"): content for name, content in files.items()}
        parts = tiny_parts | parts
        if graph is not None:
            parts["onnx/model.onnx"] = graph if isinstance(graph, bytes) else graph.SerializeToString()
        for name, content in parts.items():
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            (path / name).write_bytes(content)
        if foreign:
            (path / "medner.json").unlink()
        elif "medner.json" not in {name.replace("_json", ".json") for name in files}:
            describe(path)
        return path

    return write


def describe(path: Path) -> None:
    """Write ``medner.json`` for what lies there."""
    (path / "medner.json").unlink(missing_ok=True)
    bundle.write_manifest(path, name="tiny", labels=("O", "B-Disease", "I-Disease"), window=32, packed=True, card={})


Refused = Callable[[Path], str]


@pytest.fixture
def refused(tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Refused:
    """What ``medner annotate`` says to a model; asserts exit code 4, a single printable line, and no output."""
    notes = tmp_path / "notes.jsonl"
    notes.write_text('{"text": "No fever."}\n')

    def refuse(path: Path) -> str:
        with pytest.raises(SystemExit) as caught:
            cli.main(["annotate", str(notes), "-o", str(tmp_path / "out"), "--model", str(path), "--quiet"])
        out, err = capfd.readouterr()
        assert (caught.value.code, out) == (4, ""), err
        assert err.startswith("medner: ")
        assert err.endswith("\n")
        message = err.removeprefix("medner: ").removesuffix("\n")
        assert message.isprintable(), message
        assert len(message) < 1_000
        assert SECRET not in message
        assert not (tmp_path / "out").exists()
        return message

    return refuse


def spans(path: Path) -> list[str]:
    """What a model finds in a note."""
    return [span.text for span in Annotator.load(path)("Known breast cancer, no fever.")]


FOUND = ["breast cancer", "fever"]


# ---------------------------------------------------------------------------------------------------------------------
# Weights outside the graph


def outside(location: str, name: str = "now", shape: tuple[int, ...] = (117, 3)) -> Any:
    """A float tensor that the graph takes from another file."""
    tensor = kinds(name=name, data_type=kinds.FLOAT, dims=shape, data_location=kinds.EXTERNAL)
    for key, value in (("location", location), ("offset", "0"), ("length", str(4 * int(np.prod(shape))))):
        tensor.external_data.add(key=key, value=value)
    return tensor


def tiny_graph() -> Any:
    """The tiny model's graph."""
    return onnx.load(testing.bundle() / "onnx" / "model.onnx")


def weights() -> bytes:
    """Its larger tensor."""
    (tensor,) = (tensor for tensor in tiny_graph().graph.initializer if tensor.name == "now")
    return bytes(numpy_helper.to_array(tensor).tobytes())


def with_outside(location: str, where: str = "initializer") -> Any:
    """The tiny graph with its larger tensor taken from another file, stated in one of the places that ONNX has."""
    made = tiny_graph()
    graph = made.graph
    kept = [tensor for tensor in graph.initializer if tensor.name != "now"]
    del graph.initializer[:]
    graph.initializer.extend(kept)
    tensor = outside(location)
    if where == "initializer":
        graph.initializer.append(tensor)
    elif where == "attribute":
        graph.node.insert(0, helper.make_node("Constant", [], ["now"], value=tensor))
    elif where == "list of tensors":
        node = helper.make_node("Constant", [], ["now"])
        node.attribute.append(onnx.AttributeProto(name="value", type=onnx.AttributeProto.TENSORS, tensors=[tensor]))
        graph.node.insert(0, node)
    elif where in ("subgraph", "attribute of a subgraph"):
        graph.initializer.append(numpy_helper.from_array(np.array(True), "always"))

        def branch(name: str) -> Any:
            inner = outside(location, f"in {name}")
            made = [inner] if where == "subgraph" else []
            node = ("Identity", [inner.name]) if where == "subgraph" else ("Constant", [])
            more = {} if where == "subgraph" else {"value": inner}
            output = helper.make_tensor_value_info(f"out {name}", kinds.FLOAT, [117, 3])
            return helper.make_graph([helper.make_node(*node, [output.name], **more)], name, [], [output], made)

        branches = {"then_branch": branch("then"), "else_branch": branch("else")}
        graph.node.insert(0, helper.make_node("If", ["always"], ["now"], **branches))
    elif where == "function":
        node = helper.make_node("Constant", [], ["now"], value=tensor)
        imports = [helper.make_opsetid("", 18)]
        made.functions.append(helper.make_function("own", "Table", [], ["now"], [node], imports))
        made.opset_import.append(helper.make_opsetid("own", 1))
        graph.node.insert(0, helper.make_node("Table", [], ["now"], domain="own"))
    elif where == "sparse tensor":
        indices = numpy_helper.from_array(np.arange(351, dtype=np.int64), "")
        graph.sparse_initializer.append(
            onnx.SparseTensorProto(values=outside(location, shape=(351,)), indices=indices, dims=[117, 3])
        )
    return made


PLACES = (
    "initializer", "attribute", "list of tensors", "subgraph", "attribute of a subgraph", "function", "sparse tensor",
)  # fmt: skip


def test_every_way_to_a_tensor_is_followed() -> None:
    """The fields that are followed are all those of ``onnx.proto`` through which a tensor can be reached."""
    tensor = kinds.DESCRIPTOR
    ways: dict[str, dict[int, Any]] = {}

    def explore(message: Any) -> None:
        if message.full_name not in ways:
            ways[message.full_name] = {f.number: f.message_type for f in message.fields if f.message_type}
            for below in ways[message.full_name].values():
                explore(below)

    explore(onnx.ModelProto.DESCRIPTOR)
    leads = {tensor.full_name}
    while more := {name for name, fields in ways.items() for b in fields.values() if b.full_name in leads} - leads:
        leads |= more
    short = {name: name.removeprefix("onnx.").removesuffix("Proto") for name in ways}
    expected = {
        short[name]: {
            number: short[below.full_name] for number, below in ways[name].items() if below.full_name in leads
        }
        for name in leads
    }
    (external,) = (field for field in tensor.fields if field.name == "external_data")
    expected["Tensor"] = {external.number: short[external.message_type.full_name]}
    assert expected == graphfile.MESSAGES
    assert [field.name for field in external.message_type.fields if field.number in (1, 2)] == ["key", "value"]


@pytest.mark.parametrize("where", PLACES)
def test_weights_outside_are_found(tmp_path: Path, where: str) -> None:
    """Wherever in a graph a tensor says that it lies elsewhere, its location is found; a plain graph has none."""
    (tmp_path / "model.onnx").write_bytes(with_outside("some/dir/weights.bin", where).SerializeToString())
    assert graphfile.external_data(tmp_path / "model.onnx") == {"some/dir/weights.bin"}
    assert graphfile.external_data(testing.bundle() / "onnx" / "model.onnx") == set()


@given(st.data())
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_damaged_graph_is_no_accident(tmp_path: Path, data: st.DataObject) -> None:
    """Of a graph whose bytes were changed or cut, locations or a ValueError come out, and nothing else."""
    content = bytearray(with_outside("weights.bin", "subgraph").SerializeToString())
    for _ in range(data.draw(st.integers(0, 8))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    (tmp_path / "model.onnx").write_bytes(content[: data.draw(st.integers(0, len(content)))])
    with contextlib.suppress(ValueError):
        assert all(isinstance(name, str) for name in graphfile.external_data(tmp_path / "model.onnx"))


@pytest.mark.parametrize("foreign", [True, False])
@pytest.mark.parametrize("where", PLACES)
@pytest.mark.parametrize("location", ["{tmp}/secret", "../../secret", "onnx/../../../secret", "*/_ORT_MEM_ADDR_/*", ""])
def test_weights_from_outside_the_model(
    tmp_path: Path, model: Write, refused: Refused, location: str, where: str, foreign: bool
) -> None:
    """A graph that names a file by an absolute path, or one that leads upwards, is refused before it is loaded."""
    (tmp_path / "secret").write_text(SECRET * 100)
    path = model(foreign=True)
    location = location.format(tmp=tmp_path)
    (path / "onnx" / "model.onnx").write_bytes(with_outside(location, where).SerializeToString())
    if not foreign:
        card = json.loads((testing.bundle() / "medner.json").read_text())
        file = path / "onnx" / "model.onnx"
        card["variants"]["fp32"] = {"sha256": bundle.sha256_of(file), "bytes": file.stat().st_size}
        (path / "medner.json").write_text(json.dumps(card))
    said = refused(path)
    if location.startswith("*"):  # a name that some releases of onnxruntime take for an address in memory
        expected = "cannot be read" if foreign else "takes weights from onnx/*/_ORT_MEM_ADDR_/*"
        assert expected in said
    else:
        assert said == (f"{path}/onnx/model.onnx: takes weights from {location}; a graph may only use files beside it")


@pytest.mark.parametrize("link", ["file", "folder", "chain"])
def test_links_out_of_the_model(tmp_path: Path, model: Write, refused: Refused, link: str) -> None:
    """A file beside the graph that is a link to elsewhere is not followed."""
    (tmp_path / "secret").write_bytes(weights())
    path = model(with_outside("sub/weights.bin" if link == "folder" else "weights.bin"), foreign=True)
    if link == "file":
        (path / "onnx" / "weights.bin").symlink_to(tmp_path / "secret")
    elif link == "chain":
        (path / "onnx" / "weights.bin").symlink_to("next")
        (path / "onnx" / "next").symlink_to("../../secret")
    else:
        (path / "onnx" / "sub").symlink_to("../..")
        (tmp_path / "weights.bin").write_bytes(weights())
    name = "sub/weights.bin" if link == "folder" else "weights.bin"
    assert refused(path) == (
        f"{path}/onnx/{name}: a link that leads out of the model directory; put the file itself there"
    )


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "medner.json", "onnx/model.onnx", "onnx"])
def test_every_file_may_be_such_a_link(tmp_path: Path, model: Write, refused: Refused, name: str) -> None:
    """No file of a bundle is read elsewhere, neither a file nor what lies in a linked folder."""
    path = model()
    (path / name).rename(tmp_path / "elsewhere")
    (path / name).symlink_to(tmp_path / "elsewhere")
    file = "onnx/model.onnx" if name == "onnx" else name
    assert refused(path) == (f"{path}/{file}: a link that leads out of the model directory; put the file itself there")


def test_links_inside_the_model(model: Write) -> None:
    """A link to another file of the model is followed, and so is a link to the whole model."""
    path = model()
    for name in ("config.json", "onnx/model.onnx"):
        (path / name).rename(path / "real")
        (path / name).symlink_to(path / "real")
        assert spans(path) == FOUND
        (path / "real").rename(path / "kept")
        (path / name).unlink()
        (path / "kept").rename(path / name)
    path.with_name("link").symlink_to(path)
    assert spans(path.with_name("link")) == FOUND


@pytest.mark.parametrize("foreign", [True, False])
def test_a_snapshot_of_the_hub_cache(tmp_path: Path, model: Write, refused: Refused, foreign: bool) -> None:
    """The hub's cache links each file to ``blobs``: that works, weights outside the graph included, but no further."""
    made = model(with_outside("model.onnx_data"), foreign=True)
    (made / "onnx" / "model.onnx_data").write_bytes(weights())
    if not foreign:
        describe(made)
    cache = tmp_path / "models--org--name"
    snapshot = cache / "snapshots" / "0123"
    (cache / "blobs").mkdir(parents=True)
    for number, file in enumerate(sorted(file for file in made.rglob("*") if file.is_file())):
        link = snapshot / file.relative_to(made)
        link.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, cache / "blobs" / f"blob{number}")
        link.symlink_to(os.path.relpath(cache / "blobs" / f"blob{number}", link.parent))
    assert spans(snapshot) == FOUND
    assert bundle.load(snapshot).foreign is foreign
    (snapshot / "config.json").unlink()
    shutil.copyfile(made / "config.json", tmp_path / "config.json")
    (snapshot / "config.json").symlink_to(tmp_path / "config.json")
    assert refused(snapshot) == (
        f"{snapshot}/config.json: a link that leads out of the model directory; put the file itself there"
    )


@pytest.mark.parametrize("name", ["model.onnx_data", "model.onnx.data", "parts/now.bin"])
@pytest.mark.parametrize("folder", ["", "onnx/"])
def test_weights_beside_a_foreign_graph(model: Write, folder: str, name: str) -> None:
    """Optimum writes ``model.onnx_data`` for large models: it is used, hashed, and a part of the model's identity."""
    path = model(foreign=True)
    (path / "onnx" / "model.onnx").unlink()
    graph, data = path / f"{folder}model.onnx", path / f"{folder}{name}"
    data.parent.mkdir(exist_ok=True)
    graph.write_bytes(with_outside(name).SerializeToString())
    data.write_bytes(weights())
    assert spans(path) == FOUND
    found = bundle.load(path)
    assert found.variants["fp32"] == bundle.Variant(
        f"{folder}model.onnx",
        bundle.sha256_of(graph),
        graph.stat().st_size + data.stat().st_size,
        {f"{folder}{name}": bundle.sha256_of(data)},
    )
    assert list(found.identity("fp32")) == ["config.json", "tokenizer.json", f"{folder}{name}", f"{folder}model.onnx"]
    data.write_bytes(weights()[:-4] + b"\0\0\0\1")
    assert bundle.load(path).identity("fp32") != found.identity("fp32")
    with pytest.raises(ModelError, match=rf"^{data}: SHA-256 .* is not the recorded"):
        found.variant("fp32", "cpu")


def test_weights_beside_a_graph_of_ours(model: Write, refused: Refused) -> None:
    """``medner.json`` lists such a file with its hash; altered, or not listed, it is refused."""
    path = model(with_outside("model.onnx_data"), foreign=True)
    data = path / "onnx" / "model.onnx_data"
    data.write_bytes(weights())
    describe(path)
    card = json.loads((path / "medner.json").read_text())
    assert card["variants"]["fp32"]["data"] == {"onnx/model.onnx_data": bundle.sha256_of(data)}
    assert spans(path) == FOUND
    recorded = bundle.sha256_of(data)[:12]
    data.write_bytes(weights()[:-4] + b"\0\0\0\1")
    assert refused(path) == (
        f"{data}: SHA-256 {bundle.sha256_of(data)[:12]}... is not the recorded {recorded}...; "
        "the file was altered or cut short: copy or export the bundle again"
    )
    del card["variants"]["fp32"]["data"]
    card["variants"]["fp32"]["bytes"] += 4 * 351
    (path / "medner.json").write_text(json.dumps(card))
    assert refused(path) == (
        f"{path}/onnx/model.onnx: takes weights from onnx/model.onnx_data, of which no hash is recorded; "
        "export the bundle again"
    )


# ---------------------------------------------------------------------------------------------------------------------
# Files of another kind or size


@pytest.mark.parametrize("kind", ["pipe", "folder", "loop"])
@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "medner.json", "onnx/model.onnx"])
def test_what_is_no_file(model: Write, refused: Refused, name: str, kind: str) -> None:
    """A named pipe would block for ever; a folder cannot be read; links may go round."""
    path = model()
    (path / name).unlink()
    if kind == "pipe":
        os.mkfifo(path / name)
    elif kind == "folder":
        (path / name).mkdir()
    else:
        (path / name).symlink_to(Path(name).name)
    said = refused(path)
    assert said.startswith(f"{path / name}: ")
    assert ("is no regular file; copy the model again" in said) == (kind != "loop")


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "onnx/model.onnx"])
def test_what_is_no_file_of_a_foreign_model(model: Write, refused: Refused, name: str) -> None:
    """A pipe in a model without ``medner.json`` does not block either."""
    path = model(foreign=True)
    (path / name).unlink()
    os.mkfifo(path / name)
    assert str(path) in refused(path)


@pytest.mark.parametrize(
    ("name", "limit", "foreign"),
    [
        ("medner.json", 16, False),
        *(("config.json", 64, foreign) for foreign in (True, False)),
        *(("tokenizer.json", 64, foreign) for foreign in (True, False)),
        *(("onnx/model.onnx", 2048, foreign) for foreign in (True, False)),
        ("tokenizer_config.json", 16, True),
        ("tokenizer_config.json", 64, False),  # which is listed, and so hashed before it is understood
    ],
)
def test_a_file_of_absurd_size(model: Write, refused: Refused, name: str, limit: int, foreign: bool) -> None:
    """A sparse file of 100 GB is refused by its size, not read for minutes."""
    path = model(foreign=foreign, tokenizer_config_json=b"{}")
    with (path / name).open("ab") as file:
        file.truncate(100 * 10**9)
    said = refused(path)
    assert said == f"{path / name}: larger than {limit * 2**20:,} bytes; this is no {Path(name).name}"


def test_weights_of_absurd_size(model: Write, refused: Refused) -> None:
    """Files of weights have no limit of their own, but ``medner.json`` records their size together with the graph's."""
    path = model(with_outside("model.onnx_data"), foreign=True)
    data = path / "onnx" / "model.onnx_data"
    data.write_bytes(weights())
    describe(path)
    size = (path / "onnx" / "model.onnx").stat().st_size
    with data.open("ab") as file:
        file.truncate(100 * 10**9)
    assert refused(path) == (
        f"{path}/onnx/model.onnx: {100 * 10**9 + size:,} bytes are more than the recorded {len(weights()) + size:,}; "
        "the file was altered: copy or export the bundle again"
    )


def test_unlisted_files_are_not_read(model: Write) -> None:
    """Of a bundle with ``medner.json`` only what it lists is opened: a pipe elsewhere blocks nothing."""
    path = model()
    for name in ("tokenizer_config.json", "special_tokens_map.json", "onnx/model_int8.onnx", "model.onnx", "x.py"):
        os.mkfifo(path / name)
    assert spans(path) == FOUND
    bundle.load(path).check()
    bundle.describe(bundle.load(path))


# ---------------------------------------------------------------------------------------------------------------------
# Settings


def recorded(path: Path, **changes: Any) -> Path:
    """The bundle with values of ``config.json`` or ``tokenizer.json`` replaced in earnest: their hashes are right."""
    for name, values in changes.items():
        file = path / f"{name}.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | values))
    describe(path)
    return path


def card(path: Path, **changes: Any) -> Path:
    """The bundle with values of ``medner.json`` replaced."""
    file = path / "medner.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    return path


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"window": 10**9}, "tiny: a window of 1000000000 tokens lies outside 8 to 512, the model's limit"),
        ({"window": 0}, "tiny: a window of 0 tokens lies outside 8 to 512, the model's limit"),
        ({"window": -(10**300)}, "{card}: not a bundle description (ValueError -1000"),
        ({"window": 32.5}, "{card}: not a bundle description (ValueError 32.5 is no count)"),
        ({"window": float("nan")}, "{card}: not a bundle description (ValueError nan is no count)"),
        ({"window": float("inf")}, "{card}: not a bundle description (ValueError inf is no count)"),
        ({"window": True}, "{card}: not a bundle description (ValueError True is no count)"),
        ({"packed": []}, "{card}: not a bundle description (TypeError unhashable type: 'list')"),
        ({"labels": ["O"] * 1_000_000}, "{card}: a model has a list of 1 to 10,000 labels"),
        ({"labels": []}, "{card}: a model has a list of 1 to 10,000 labels"),
        ({"labels": {"O": 1}}, "{card}: a model has a list of 1 to 10,000 labels"),
        ({"labels": ["O", "B-" + "x" * 2**20]}, "{card}: label 1 is no printable text of 1 to 200 characters"),
        ({"labels": ["O", "B-\x1b[2J"]}, "{card}: label 1 is no printable text of 1 to 200 characters"),
        ({"labels": ["O", "B-a\nmedner: all is well"]}, "{card}: label 1 is no printable text of 1 to 200 characters"),
        ({"labels": ["O", "\ud83d"]}, "{card}: label 1 is no printable text of 1 to 200 characters"),
        ({"labels": ["O", ""]}, "{card}: label 1 is no printable text of 1 to 200 characters"),
        ({"labels": ["O", 7]}, "{card}: label 1 is no printable text of 1 to 200 characters"),
        ({"labels": ["O", "B-X"]}, "{model}/onnx/model.onnx: has 3 classes, but config.json names 2"),
        ({"labels": ["A", "B-X", "I-X"]}, "no label O among A, B-X, I-X; this is not a tagging model"),
        ({"name": "\x1b]0;title\x07"}, "{card}: not a bundle description (ValueError '\\x1b]0;title\\x07' is no name)"),
        ({"name": "x" * 2**20}, "{card}: not a bundle description (ValueError 'xxx"),
        ({"format_version": "\x1b[31m" * 9**5}, "{card}: format version \ufffd[31m"),
        ({"files": {"config.json\x00": "0" * 64}}, "{card}: not a bundle description (ValueError 'config.json\\x00'"),
        ({"variants": {"fp32": {"sha256": "0" * 64, "bytes": 10**400}}}, "{card}: not a bundle description"),
        ({"variants": {"fp32": {"sha256": "0" * 64, "bytes": 1, "data": {"../x": "0" * 64}}}},
         "{card}: not a bundle description (ValueError '../x' is no path inside the model)"),
        ({"variants": {}}, "tiny: no auto variant (it has ); make one with: medner export"),
    ],
    ids=lambda value: repr(value)[:40],
)  # fmt: skip
def test_absurd_values_of_the_description(model: Write, refused: Refused, changes: dict[str, Any], said: str) -> None:
    """Sizes, types and characters that no bundle has; the message shows the start of the value, harmlessly."""
    path = card(model(), **changes)
    assert refused(path).startswith(said.format(model=path, card=path / "medner.json"))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"max_position_embeddings": -5}, "lies outside 8 to -5, the model's limit"),
        ({"max_position_embeddings": "\x1b[31m"}, "positions that are no numbers (invalid literal for int() with"),
        ({"max_position_embeddings": float("inf")}, "positions that are no numbers (cannot convert float infinity"),
        ({"max_position_embeddings": float("nan")}, "positions that are no numbers (cannot convert float NaN"),
        ({"max_position_embeddings": {"a": 1}}, "positions that are no numbers (int() argument must be"),
        ({"id2label": {str(i): "O" for i in range(10_001)}}, "a model has a list of 1 to 10,000 labels"),
        ({"id2label": {"0": "O", "1": "B-X\r\n", "2": "I-X"}}, "label 1 is no printable text of 1 to 200 characters"),
        ({"id2label": {"0": "O", "1": None, "2": "I-X"}}, "label 1 is no printable text of 1 to 200 characters"),
        ({"id2label": ["O", "B-X", "I-X"]}, "no id2label; medner needs the names of the model's labels"),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_absurd_values_of_the_configuration(model: Write, refused: Refused, changes: dict[str, Any], said: str) -> None:
    """The same of ``config.json``, by which a model without ``medner.json`` is understood."""
    path = model(foreign=True)
    (path / "config.json").write_text(json.dumps(json.loads((path / "config.json").read_text()) | changes))
    assert said in refused(path)


def test_a_window_has_an_end(model: Write, refused: Refused) -> None:
    """Whatever a model says that it can see at once, no window is longer than 65,536 tokens."""
    path = card(recorded(model(), config={"max_position_embeddings": 1e12}), window=10**9)
    assert refused(path) == "tiny: a window of 1000000000 tokens lies outside 8 to 65536, the model's limit"


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "medner.json"])
@pytest.mark.parametrize("content", [b"[" * 10**6, b'{"a":' * 10**6, b"\xff\xfe", b"", b"null", b"{}"])
def test_what_is_no_json(model: Write, refused: Refused, name: str, content: bytes) -> None:
    """Deep nesting, undecodable bytes, and values of another kind."""
    path = model(foreign=name != "medner.json")
    (path / name).write_bytes(content)
    assert str(path / name) in refused(path)


def test_of_a_repeated_key_the_last_counts(model: Write) -> None:
    """As in transformers and in any other reader that Python has."""
    path = model(foreign=True)
    config = (path / "config.json").read_text()
    (path / "config.json").write_text('{"id2label": {"0": "\\u001b"}, ' + config.lstrip().removeprefix("{"))
    assert spans(path) == FOUND


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from(
        [10**9, 10**400, -1, 1e308, "O", "0" * 64, "../x", "/dev/zero", "\x1b[2J", "\0", "fp32", "config.json"]
    ),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4) | st.just("fp32"), inner, max_size=3)
    ),
    max_leaves=6,
)  # fmt: skip
FIELDS = {
    "medner.json": ["format_version", "name", "labels", "window", "packed", "variants", "files", "licence", "scores",
                    "parity", "variants.fp32", "variants.fp32.sha256", "variants.fp32.bytes", "variants.fp32.data",
                    "files.config.json"],
    "config.json": ["max_position_embeddings", "model_type", "pad_token_id", "id2label", "id2label.1"],
    "tokenizer_config.json": ["model_max_length"],
}  # fmt: skip


def put(value: Any, field: str, new: Any) -> None:
    """Replace one value of a JSON object; a field's name is its path."""
    first, dot, rest = field.partition(".")
    if dot and first in ("variants", "fp32", "files", "id2label"):
        put(value[first], rest, new)
    else:
        value[field] = new


@given(st.sampled_from([(name, field) for name, fields in FIELDS.items() for field in fields]), JSON)
@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_value_in_any_field(model: Write, place: tuple[str, str], value: Any) -> None:
    """Whatever stands in a field, the model works or a ModelError says why not, in one printable line."""
    name, field = place
    path = model(foreign=name != "medner.json", tokenizer_config_json=b"{}")
    settings = json.loads((path / name).read_text())
    put(settings, field, value)
    (path / name).write_text(json.dumps(settings))
    try:
        found = bundle.load(path)
        said = bundle.describe(found)
        found.check()
        Annotator.load(path)("no fever")
    except ModelError as exc:
        said = str(exc)
        assert said.isprintable()
    assert all(line.isprintable() for line in said.splitlines())
    assert len(said) < 2_000


def test_info_moves_no_cursor(model: Write, capfd: pytest.CaptureFixture[str]) -> None:
    """What a card says is shown on its line and cut; a card of another form is refused."""
    score = {"overall": {"f1": 0.5, "low": 0.4, "high": 0.6}}
    path = card(model(), licence="MIT\n\x1b[2J" + "x" * 10**6, scores={"a\nlicence   none": score})
    with pytest.raises(SystemExit) as caught:
        cli.main(["info", str(path)])
    out, err = capfd.readouterr()
    assert (caught.value.code, err) == (0, "")
    *_, licence, scored = out.splitlines()
    assert licence == "licence   MIT\ufffd\ufffd[2J" + "x" * (200 - 10 - 3 - 5) + "..."
    assert scored == "score     a\ufffdlicence   none: F1 0.5000 (95 % interval 0.4000 to 0.6000)"
    for wrong in (
        {"scores": {"test": 1}},
        {"scores": [1]},
        {"parity": {"variants": {"int8": {}}}},
        {"parity": 3},
        {"parity": {"data": "x", "variants": {"int8": {"agreement": 10**400}}}},
    ):
        card(path, **({"scores": {}, "parity": {}} | wrong))
        with pytest.raises(SystemExit) as caught:
            cli.main(["info", str(path)])
        assert caught.value.code == 4
        assert capfd.readouterr().err.startswith(
            f"medner: {path}/medner.json: its scores or its parity are not as medner writes them ("
        )


# ---------------------------------------------------------------------------------------------------------------------
# Tokenizers


@pytest.mark.parametrize(
    "changes",
    [
        {"model": {"type": "Nonesuch"}},
        {"model": {"type": "WordPiece", "vocab": {}, "unk_token": "[UNK]"}},
        {"model": {"type": "WordLevel", "vocab": {"\x1b[2J": -1}, "unk_token": "x"}},
        {"normalizer": {"type": "\x1b[2J\n" * 10**5}},
        {"normalizer": {"type": "Replace", "pattern": {"Regex": "(("}, "content": ""}},
        {"pre_tokenizer": {"type": "Split", "pattern": {"Regex": "["}, "behavior": "Isolated", "invert": False}},
        {"padding": {"strategy": "BatchLongest", "pad_id": "a"}},
        {"added_tokens": [{"id": "x"}]},
        {"version": "9.9"},
    ],
    ids=lambda value: repr(value)[:40],
)
def test_tokenizers_that_are_none(model: Write, refused: Refused, changes: dict[str, Any]) -> None:
    """A tokenizer of unknown parts or of wrong values is refused with what the library says, in one line."""
    path = recorded(model(), tokenizer=changes)
    assert refused(path).startswith(f"{path}/tokenizer.json: cannot be read (")


def test_a_tokenizer_that_panics(model: Write) -> None:
    """The library's code in Rust panics on a template without its token, which is no Exception to Python."""
    path = model()
    settings = json.loads((path / "tokenizer.json").read_text())
    settings["post_processor"]["special_tokens"] = {}
    with pytest.raises(ModelError) as caught:
        Annotator.load(recorded(path, tokenizer=settings))
    assert str(caught.value) == (f"{path}/tokenizer.json: cannot be read (PanicException: no entry found for key)")


def test_ids_beyond_the_vocabulary(model: Write, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """A token that the graph does not know ends in one line, which does not show it."""
    path = model()
    settings = json.loads((path / "tokenizer.json").read_text())
    settings["model"]["vocab"]["fever"] = 123_456_789
    recorded(path, tokenizer=settings)
    notes = tmp_path / "notes.jsonl"
    notes.write_text('{"text": "fever"}\n')
    with pytest.raises(SystemExit) as caught:
        cli.main(["annotate", str(notes), "-o", "-", "--model", str(path), "--quiet"])
    assert caught.value.code == 4
    said = "onnxruntime failed on a batch of (1, 3): InvalidArgument in the operator Gather"
    assert capfd.readouterr() == ("", f"medner: {said}\n")


# ---------------------------------------------------------------------------------------------------------------------
# Graphs


def graph(*nodes: Any, constants: dict[str, Any] | None = None, **outputs: tuple[int, list[Any] | None]) -> Any:
    """A graph of ``input_ids``; outputs: element type and stated shape by name."""
    values = {"axis": np.array([-1]), **(constants or {})}
    return helper.make_model(
        helper.make_graph(
            list(nodes),
            "hostile",
            [helper.make_tensor_value_info("input_ids", kinds.INT64, ["b", "n"])],
            [helper.make_tensor_value_info(name, kind, shape) for name, (kind, shape) in outputs.items()],
            [numpy_helper.from_array(value, name) for name, value in values.items()],
        ),
        opset_imports=[helper.make_opsetid("", 18), helper.make_opsetid("evil", 1)],
        ir_version=8,
    )


def node(kind: str, inputs: str, output: str, **more: Any) -> Any:
    """A node; its inputs parted by white space."""
    return helper.make_node(kind, inputs.split(), [output], **more)


#: Three logits for each token: 1 for the first class.
WIDE = [node("Unsqueeze", "input_ids axis", "wide"), node("Cast", "wide", "float", to=kinds.FLOAT),
        node("Mul", "float nothing", "zero"), node("Add", "zero row", "sum")]  # fmt: skip
ROW = {"nothing": np.zeros(3, np.float32), "row": np.array([1, 0, 0], np.float32)}
STATED = (kinds.FLOAT, ["b", "n", 3])
UNSTATED = (kinds.FLOAT, None)
TAGS = (kinds.INT64, None)
TOP = node("ReduceMax", "logits axis", "probability", keepdims=0)
LOGITS = [*WIDE, node("Identity", "sum", "logits")]
EXPECTED = "[windows, tokens, labels]"
CELL = [node("Shape", "input_ids", "cells")]

HOSTILE = {
    "rank 2": (
        graph(node("Cast", "input_ids", "logits", to=kinds.FLOAT), logits=UNSTATED),
        f"the graph's logits has the shape (1, 2) for (1, 2) tokens, not {EXPECTED}",
    ),
    "rank 2 that is said to be 3": (
        graph(node("Cast", "input_ids", "logits", to=kinds.FLOAT), logits=STATED),
        f"the graph's logits has the shape (1, 2) for (1, 2) tokens, not {EXPECTED}",
    ),
    "a scalar": (
        graph(node("Identity", "one", "logits"), constants={"one": np.float32(1)}, logits=UNSTATED),
        f"the graph's logits has the shape () for (1, 2) tokens, not {EXPECTED}",
    ),
    "no class": (
        graph(node("Expand", "empty cells3", "logits"),
              constants={"empty": np.zeros((1, 2, 0), np.float32), "cells3": np.array([1, 2, 0])}, logits=UNSTATED),
        f"the graph's logits has the shape (1, 2, 0) for (1, 2) tokens, not {EXPECTED}",
    ),
    "five classes that are said to be 3": (
        graph(*WIDE[:2], node("Concat", "float float float float float", "logits", axis=-1),
              logits=(kinds.FLOAT, ["b", "n", "c"])),
        "has 5 classes, but config.json names 3",
    ),
    "of another length": (
        graph(*WIDE, node("Concat", "sum sum", "logits", axis=1), constants=ROW, logits=UNSTATED),
        f"the graph's logits has the shape (1, 4, 3) for (1, 2) tokens, not {EXPECTED}",
    ),
    "float64": (
        graph(*WIDE, node("Cast", "sum", "logits", to=kinds.DOUBLE), constants=ROW,
              logits=(kinds.DOUBLE, ["b", "n", 3])),
        "the graph's logits is float64, not float16 or float32",
    ),
    "integers": (
        graph(*WIDE, node("Cast", "sum", "logits", to=kinds.INT64), constants=ROW, logits=(kinds.INT64, ["b", "n", 3])),
        "the graph's logits is int64, not float16 or float32",
    ),
    "strings": (
        graph(*WIDE, node("Cast", "sum", "logits", to=kinds.STRING), constants=ROW,
              logits=(kinds.STRING, ["b", "n", 3])),
        "the graph's logits is object, not float16 or float32",
    ),
    "no number": (
        graph(*WIDE, node("Log", "minus", "bad"), node("Add", "sum bad", "logits"),
              constants=ROW | {"minus": np.array([1, -1, 1], np.float32)}, logits=STATED),
        "the graph's logits are no numbers in a batch of (1, 2); export the model again",
    ),
    "infinite": (
        graph(*WIDE, node("Add", "sum bad", "logits"),
              constants=ROW | {"bad": np.array([np.inf, 0, 0], np.float32)}, logits=STATED),
        "the graph's logits are no numbers in a batch of (1, 2); export the model again",
    ),
    "terabytes": (
        graph(node("ConstantOfShape", "size", "much"), node("ReduceSum", "much", "logits", keepdims=0),
              constants={"size": np.array([10**12])}, logits=UNSTATED),
        "onnxruntime cannot run it: [ONNXRuntimeError]",
    ),
    "operators of its own": (
        graph(node("Evil", "input_ids", "logits", domain="evil"), logits=STATED),
        "onnxruntime cannot load it: [ONNXRuntimeError]",
    ),
    "names of control characters": (
        graph(node("Evil\x1b[2J\x07", "input_ids", "logits", domain="evil"), logits=STATED),
        "onnxruntime cannot load it: [ONNXRuntimeError]",
    ),
    "tags of floats": (
        graph(*LOGITS, node("ReduceMax", "logits axis", "tag", keepdims=0), node("Identity", "tag", "probability"),
              constants=ROW, logits=STATED, tag=(kinds.FLOAT, None), probability=(kinds.FLOAT, None)),
        "the graph's tag is float32, not int16 or int32 or int64",
    ),
    "tags beyond the classes": (
        graph(*LOGITS, node("Add", "input_ids seven", "tag"), TOP,
              constants=ROW | {"seven": np.array(7)}, logits=STATED, tag=TAGS, probability=UNSTATED),
        "the graph's tags are not all of its 3 classes, or its probabilities not between 0 and 1, in a batch of (1, 2)",
    ),
    "tags that wrap around": (
        graph(*LOGITS, node("Add", "input_ids many", "tag"), TOP,
              constants=ROW | {"many": np.array(2**16)}, logits=STATED, tag=TAGS, probability=UNSTATED),
        "the graph's tags are not all of its 3 classes, or its probabilities not between 0 and 1, in a batch of (1, 2)",
    ),
    "a probability of 2": (
        graph(*LOGITS, node("Identity", "input_ids", "tag"), node("ReduceMax", "logits axis", "top", keepdims=0),
              node("Add", "top top", "probability"), constants=ROW, logits=STATED, tag=TAGS,
              probability=UNSTATED),
        "the graph's tags are not all of its 3 classes, or its probabilities not between 0 and 1, in a batch of (1, 2)",
    ),
    "a probability that is none": (
        graph(*LOGITS, node("Identity", "input_ids", "tag"), node("ReduceMax", "logits axis", "top", keepdims=0),
              node("Log", "minus", "bad"), node("Mul", "top bad", "probability"),
              constants=ROW | {"minus": np.float32(-1)}, logits=STATED, tag=TAGS, probability=UNSTATED),
        "the graph's tags are not all of its 3 classes, or its probabilities not between 0 and 1, in a batch of (1, 2)",
    ),
    "a probability for each class": (
        graph(*LOGITS, node("Identity", "input_ids", "tag"), node("Identity", "logits", "probability"),
              constants=ROW, logits=STATED, tag=TAGS, probability=UNSTATED),
        "the graph's probability has the shape (1, 2, 3) for (1, 2) tokens, not [windows, tokens]",
    ),
}  # fmt: skip


@pytest.mark.parametrize("foreign", [True, False])
@pytest.mark.parametrize("name", HOSTILE)
def test_graphs_that_are_no_token_classifier(model: Write, refused: Refused, name: str, foreign: bool) -> None:
    """Answers of another type, shape or range are refused when the model is opened, before any note is read."""
    made, said = HOSTILE[name]
    path = model(made, foreign=foreign)
    assert refused(path).startswith(f"{path}/onnx/model.onnx: {said}")


def test_answers_that_turn_bad_later(model: Write, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """What is well for two tokens and not for a note ends the run in one line: no wrong label is written."""
    # Of the ids of a note, which are above 0, each logarithm of their negative is no number.
    half = {"half": np.float32(0.5)}
    made = graph(*WIDE, node("Neg", "float", "minus"), node("Add", "minus half", "sign"), node("Log", "sign", "bad"),
                 node("Add", "sum bad", "logits"), constants=ROW | half, logits=STATED)  # fmt: skip
    path = model(made)
    notes = tmp_path / "notes.jsonl"
    notes.write_text('{"text": "fever"}\n')
    with pytest.raises(SystemExit) as caught:
        cli.main(["annotate", str(notes), "-o", "-", "--model", str(path), "--quiet"])
    assert caught.value.code == 4
    said = "the graph's logits are no numbers in a batch of (1, 3); export the model again"
    assert capfd.readouterr() == ("", f"medner: {said}\n")


def test_an_impossible_class_may_have_no_weight(model: Write) -> None:
    """Minus infinity for a class is a way to rule it out."""
    row = np.array([-np.inf, 0, -np.inf], np.float32)
    assert spans(model(graph(*LOGITS, constants=ROW | {"row": row}, logits=STATED)))[0] == "Known"


# ---------------------------------------------------------------------------------------------------------------------
# Code


class Payload:
    """What a pickle can hold: a call that is made when it is read."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        """Make the file."""
        return Path.touch, (self.mark,)


CODE = "import pathlib\npathlib.Path({mark!r}).touch()\nclass Evil: pass\n"
CLASSES = ("AutoConfig", "AutoTokenizer", "AutoModel", "AutoModelForTokenClassification")


def booby_trap(path: Path, mark: Path) -> Path:
    """Add to a model code and pickles of every name by which libraries look for them; each would make ``mark``."""
    for name in ("evil.py", "modeling_bert.py", "configuration_bert.py", "tokenization_bert.py", "conftest.py",
                 "sitecustomize.py", "transformers.py", "onnx/evil.py"):  # fmt: skip
        (path / name).parent.mkdir(exist_ok=True)
        (path / name).write_text(CODE.format(mark=str(mark)))
    for name in ("pytorch_model.bin", "training_args.bin", "optimizer.pt", "model.pkl", "model.ckpt.index"):
        (path / name).write_bytes(pickle.dumps(Payload(mark)))
    for name in ("config.json", "tokenizer_config.json"):
        values = json.loads((path / name).read_text()) if (path / name).is_file() else {}
        values["auto_map"] = dict.fromkeys(CLASSES, "evil.Evil") | {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}
        (path / name).write_text(json.dumps(values))
    return path


def test_the_traps_work(tmp_path: Path) -> None:
    """The payloads do what they are meant to where somebody lets them."""
    path = tmp_path / "model"
    path.mkdir()
    booby_trap(path, tmp_path / "mark")
    pickle.loads((path / "pytorch_model.bin").read_bytes())
    (tmp_path / "mark").unlink()
    exec((path / "evil.py").read_text())
    assert (tmp_path / "mark").exists()


def run(*arguments: object) -> int:
    """Call ``medner`` in this process; its exit code."""
    with pytest.raises(SystemExit) as caught:
        cli.main([str(argument) for argument in arguments])
    return int(caught.value.code or 0)


@pytest.mark.parametrize("foreign", [True, False])
def test_no_code_of_a_bundle_runs(tmp_path: Path, model: Write, monkeypatch: pytest.MonkeyPatch, foreign: bool) -> None:
    """Annotating, describing and scoring take a model's graph, settings and tokenizer, and leave the rest alone."""
    path = booby_trap(model(foreign=foreign), tmp_path / "mark")
    if not foreign:
        describe(path)
    monkeypatch.chdir(path)  # where `python -m` would find modules first
    notes = tmp_path / "notes.jsonl"
    notes.write_text('{"text": "fever", "spans": [[0, 5, "Disease"]]}\n')
    before = list(sys.path)
    assert run("annotate", notes, "-o", tmp_path / "out", "--model", path) == 0
    assert run("info", path) == 0
    assert run("evaluate", "--model", path, "--data", notes) == 0
    assert not (tmp_path / "mark").exists()
    assert sys.path == before


@pytest.mark.filterwarnings("ignore")  # of torch and transformers, which are not under test here
@pytest.mark.parametrize("weights", ["safetensors", "pickle"])
@pytest.mark.parametrize("kind", ["bert", "evil"])
def test_no_code_of_a_checkpoint_runs(
    tmp_path: Path,
    small_bert: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    weights: str,
    kind: str,
) -> None:
    """PyTorch checkpoints of a known and of an unknown kind that hold code and pickles: nothing of it runs."""
    transformers = pytest.importorskip("transformers", reason="needs the extras train and export")
    pytest.importorskip("seqeval", reason="needs the extra train")
    from medner import compare as comparing

    mark = tmp_path / "mark"
    path = shutil.copytree(small_bert.parent / "checkpoint", tmp_path / "checkpoint")
    transformers.BertTokenizerFast(
        tokenizer_file=str(testing.bundle() / "tokenizer.json"), mask_token=None, model_max_length=64
    ).save_pretrained(path)
    booby_trap(path, mark)
    if weights == "pickle":
        (path / "model.safetensors").unlink()
    if kind == "evil":
        config = json.loads((path / "config.json").read_text()) | {"model_type": "evil", "architectures": ["Evil"]}
        (path / "config.json").write_text(json.dumps(config))
    data = tmp_path / "data.jsonl"
    data.write_text('{"text": "no fever", "spans": [[3, 8, "Disease"]]}\n' * 4)
    for split in ("train", "devel"):
        (tmp_path / "splits").mkdir(exist_ok=True)
        shutil.copyfile(data, tmp_path / "splits" / f"{split}.jsonl")
    # If transformers asked whether to run the code, the answer would be yes.
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    for name, value in (("BUDGETS", {"cpu": (64,)}), ("STREAM_SECONDS", 0.0), ("TORCH_PRECISIONS", {"cpu": ("fp32",)})):
        monkeypatch.setattr(comparing, name, value)
    usable = (weights, kind) == ("safetensors", "bert")
    code = 0 if usable else 4
    assert run("evaluate", "--model", path, "--data", data) == code, capfd.readouterr().err
    exported = run("export", path, "-o", tmp_path / "exported", "--parity-data", data, "--precision", "fp32",
                   "--window", 32)  # fmt: skip
    assert exported == code, capfd.readouterr().err
    assert run("compare", "--checkpoint", path, "--bundle", small_bert, "--notes", data, "-o", tmp_path / "compared",
               "--rounds", 1, "--limit", 2, "--threads", 1) != 2  # fmt: skip
    splits = tmp_path / "splits"
    trained = run("train", "--data", splits, "--base", path, "-o", tmp_path / "trained", "--epochs", 1, "--window", 32,
                  "--precision", "fp32")  # fmt: skip
    assert trained == code, capfd.readouterr().err
    assert not mark.exists()
