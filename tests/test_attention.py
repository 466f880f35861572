"""Attention rewritten: as many blocks as layers, the same logits, and no graph of another form touched."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("optimum.exporters.onnx")

from onnx import TensorProto, helper, numpy_helper  # noqa: E402

from medner import runtime  # noqa: E402
from medner.errors import ModelError  # noqa: E402
from medner.export import attention, convert, fusion, optimize  # noqa: E402

VOCABULARY, HIDDEN, HEADS, LAYERS = 60, 32, 4, 2
SIZES = {
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "intermediate_size": 64,
    "initializer_range": 0.3,
}
#: Batch and length, from one token to more tokens than a layer has channels.
SHAPES = ((1, 1), (1, 9), (4, 2), (3, 17), (5, 40))


def family(name: str) -> Any:
    """A small random token classifier of one family."""
    common = {"vocab_size": VOCABULARY, "max_position_embeddings": 64}
    if name == "bert":
        return transformers.BertForTokenClassification(transformers.BertConfig(**common, **SIZES))
    if name == "roberta":
        return transformers.RobertaForTokenClassification(transformers.RobertaConfig(**common, **SIZES))
    if name == "electra":
        config = transformers.ElectraConfig(**common, **SIZES, embedding_size=16)
        return transformers.ElectraForTokenClassification(config)
    if name == "albert":
        return transformers.AlbertForTokenClassification(
            transformers.AlbertConfig(**common, **SIZES, embedding_size=16)
        )
    if name == "deberta":
        config = transformers.DebertaV2Config(
            **common, **SIZES, relative_attention=True, pos_att_type=["c2p", "p2c"], position_buckets=8
        )
        return transformers.DebertaV2ForTokenClassification(config)
    config = transformers.DistilBertConfig(
        **common, dim=HIDDEN, n_layers=LAYERS, n_heads=HEADS, hidden_dim=64, initializer_range=0.3
    )
    return transformers.DistilBertForTokenClassification(config)


def exported(name: str, folder: Path) -> Any:
    """The graph of a small random model, as Optimum writes it."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        family(name).save_pretrained(folder / "checkpoint")
    convert.to_onnx(folder / "checkpoint", folder / "model.onnx")
    return onnx.load(folder / "model.onnx")


def logits(model: Any, ids: Any, lengths: Any) -> Any:
    """Logits of the tokens that are no padding, float32 [n_tokens, n_labels]."""
    inside = np.arange(ids.shape[1]) < lengths[:, None]
    return runtime.logits(model.SerializeToString(), ids, lengths)[inside]


def check_equal(before: Any, after: Any) -> None:
    """Both graphs give the same logits, up to rounding, for padded batches of several shapes."""
    rng = np.random.default_rng(0)
    for shape in SHAPES:
        ids = rng.integers(2, VOCABULARY, shape)
        lengths = rng.integers(1, shape[1] + 1, shape[0])
        lengths[0] = shape[1]
        expected = logits(before, ids, lengths)
        assert np.abs(logits(after, ids, lengths) - expected).max() <= 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize("name", ["bert", "roberta", "distilbert", "electra", "albert"])
def test_every_layer_is_rewritten(name: str, tmp_path: Path) -> None:
    """All blocks of a family are, the logits are the original's, and a layer keeps one of its four transpositions."""
    before = exported(name, tmp_path)
    after, blocks = attention.rewrite(before)
    assert len(blocks) == LAYERS
    check_equal(before, after)
    kinds = [node.op_type for node in after.graph.node]
    assert (kinds.count("FusedMatMul"), kinds.count("Softmax"), kinds.count("Transpose")) == (4, 2, LAYERS + 2)
    onnx.checker.check_model(after)
    # A token's logits depend on the others, so that equal logits say something.
    ids = np.arange(20)[None] + 2
    changed = ids.copy()
    changed[0, 15] = 50
    lengths = np.array([20])
    assert np.abs(logits(after, ids, lengths) - logits(after, changed, lengths))[3].max() > 1e-3


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_relative_positions_are_left_alone(tmp_path: Path) -> None:
    """DeBERTa's attention has terms of its own: its graph comes back as it is."""
    before = exported("deberta", tmp_path)
    serialized = before.SerializeToString()
    after, blocks = attention.rewrite(before)
    assert len(blocks) == 0
    assert after is before
    assert after.SerializeToString() == serialized


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("name", ["bert", "roberta", "distilbert", "electra", "albert", "deberta"])
def test_every_family_in_int8(name: str, tmp_path: Path) -> None:
    """With scales from sample text and without, a session loads the graph and finds nearly what fp32 finds.

    Where products of uint8 and int8 saturate, onnxruntime writes weights anew as it loads them.
    """
    exported(name, tmp_path)
    rng = np.random.default_rng(1)
    ids, lengths = rng.integers(2, VOCABULARY, (8, 30)), np.full(8, 30)
    expected = runtime.Session(tmp_path / "model.onnx", "cpu")(ids, lengths)
    for samples in [], [rng.integers(2, VOCABULARY, 40) for _ in range(20)]:
        optimize.to_int8(tmp_path / "model.onnx", tmp_path / "int8.onnx", samples)
        found = runtime.Session(tmp_path / "int8.onnx", "cpu")(ids, lengths)
        assert np.corrcoef(found.ravel(), expected.ravel())[0, 1] > 0.99


# ---------------------------------------------------------------------------------------------------------------------
# One layer by hand


def one_layer(*, with_mask: bool = True, divisor: float = (HIDDEN // HEADS) ** 0.5, **changes: Any) -> Any:
    """``logits = attention(table[input_ids]) @ classifier``.

    divisor: of the scores. changes: nodes to replace or add, as operator, inputs and attributes, by their output.
    """
    rng = np.random.default_rng(1)
    constants = {name: rng.normal(size=(HIDDEN, HIDDEN)).astype(np.float32) / 3 for name in ("wq", "wk", "wv")}
    constants |= {
        "table": rng.normal(size=(VOCABULARY, HIDDEN)).astype(np.float32),
        "classifier": rng.normal(size=(HIDDEN, 3)).astype(np.float32),
        "positions": rng.normal(size=(64, HIDDEN)).astype(np.float32),
        "divisor": np.array(divisor, np.float32),
        "ones": np.ones(HIDDEN, np.float32),
        "half": np.array(0.5, np.float32),
        "split": np.array([0, 0, HEADS, HIDDEN // HEADS]),
        "open_split": np.array([0, 0, -1, HIDDEN // HEADS]),
        "join": np.array([0, 0, HIDDEN]),
        "other_keys": rng.normal(size=(1, 1, 1, HIDDEN // HEADS)).astype(np.float32),
        "rows": np.array([1, 2]),
        "one": np.array(1, np.float32),
        "lowest": np.array(-1e30, np.float32),
        **{f"int{i}": np.array(i) for i in range(2)},
    }
    makers: dict[str, Any] = {
        "x": ("Gather", ["table", "input_ids"]),
        "root": ("Mul", ["x", "ones"]),
        "q": ("MatMul", ["root", "wq"]),
        "k": ("MatMul", ["root", "wk"]),
        "v": ("MatMul", ["root", "wv"]),
        "q4": ("Reshape", ["q", "split"]),
        "k4": ("Reshape", ["k", "split"]),
        "v4": ("Reshape", ["v", "split"]),
        "qt": ("Transpose", ["q4"], {"perm": [0, 2, 1, 3]}),
        "kt": ("Transpose", ["k4"], {"perm": [0, 2, 3, 1]}),
        "vt": ("Transpose", ["v4"], {"perm": [0, 2, 1, 3]}),
        "scores": ("MatMul", ["qt", "kt"]),
        "scaled": ("Div", ["scores", "divisor"]),
        "weights": ("Softmax", ["masked" if with_mask else "scaled"], {"axis": -1}),
        "heads": ("MatMul", ["weights", "vt"]),
        "ht": ("Transpose", ["heads"], {"perm": [0, 2, 1, 3]}),
        "context": ("Reshape", ["ht", "join"]),
        "logits": ("MatMul", ["context", "classifier"]),
    }
    if with_mask:
        makers |= {
            "wide": ("Unsqueeze", ["attention_mask", "rows"]),
            "kept": ("Cast", ["wide"], {"to": TensorProto.FLOAT}),
            "left_out": ("Sub", ["one", "kept"]),
            "mask": ("Mul", ["left_out", "lowest"]),
            "masked": ("Add", ["scaled", "mask"]),
        }
    makers |= changes
    inputs = ["input_ids", "attention_mask"] if with_mask else ["input_ids"]
    return helper.make_model(
        helper.make_graph(
            [node(name, *makers[name]) for name in in_order(makers, {*constants, *inputs})],
            "one layer",
            [helper.make_tensor_value_info(name, TensorProto.INT64, ["b", "n"]) for name in inputs],
            [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["b", "n", 3])],
            [numpy_helper.from_array(value, name) for name, value in constants.items()],
        ),
        opset_imports=[helper.make_opsetid("", 18)],
        ir_version=8,
    )


def node(output: str, op_type: str, inputs: list[str], attributes: dict[str, Any] | None = None) -> Any:
    """A node with one output."""
    return helper.make_node(op_type, inputs, [output], **(attributes or {}))


def in_order(makers: dict[str, Any], known: set[str]) -> list[str]:
    """The outputs in an order in which every node stands behind those that it reads."""
    done: list[str] = []
    while len(done) < len(makers):
        done.append(next(n for n in makers if n not in done and known.union(done).issuperset(makers[n][1])))
    return done


@pytest.mark.parametrize("masked", [True, False])
def test_a_layer_by_hand(masked: bool) -> None:
    """A graph with heads of constant shape is rewritten, with a mask and without one."""
    before = one_layer(with_mask=masked)
    after, blocks = attention.rewrite(before)
    assert len(blocks) == 1
    rng = np.random.default_rng(0)
    ids, lengths = rng.integers(2, VOCABULARY, (3, 11)), np.array([11, 4, 1])
    expected = logits(before, ids, lengths)
    assert np.abs(logits(after, ids, lengths) - expected).max() <= 1e-5 * np.abs(expected).max()


FORMS: dict[str, dict[str, Any]] = {
    "scores that are scaled otherwise": {"divisor": 2.0},
    "scores that are masked before they are scaled": {
        "early": ("Add", ["scores", "mask"]),
        "scaled": ("Div", ["early", "divisor"]),
        "masked": ("Mul", ["scaled", "half"]),
    },
    "scores with a bend": {"masked": ("Tanh", ["scaled"])},
    "scores after more steps": {
        "first": ("Mul", ["scores", "one"]),
        "second": ("Mul", ["first", "one"]),
        "scaled": ("Div", ["second", "divisor"]),
    },
    "scores behind the mask": {"masked": ("Add", ["mask", "scaled"])},
    "scores behind a constant": {"masked": ("Add", ["lowest", "scaled"])},
    "queries after more steps": {
        "q5": ("Mul", ["q4", "one"]),
        "q6": ("Mul", ["q5", "one"]),
        "q7": ("Mul", ["q6", "one"]),
        "qt": ("Transpose", ["q7"], {"perm": [0, 2, 1, 3]}),
    },
    "keys that are a constant": {"kt": ("Transpose", ["other_keys"], {"perm": [0, 1, 3, 2]})},
    "weights that are used twice": {
        "again": ("ReduceSum", ["weights"], {"keepdims": 1}),
        "heads": ("MatMul", ["weights", "vt"]),
        "heavy": ("Mul", ["heads", "again"]),
        "ht": ("Transpose", ["heavy"], {"perm": [0, 2, 1, 3]}),
    },
    "values on the left": {"weights": ("Softmax", ["masked"], {"axis": -1}), "heads": ("MatMul", ["vt", "weights"])},
    "keys that are bent": {"bent": ("Tanh", ["k4"]), "kt": ("Transpose", ["bent"], {"perm": [0, 2, 3, 1]})},
    "heads of unknown number": {"q4": ("Reshape", ["q", "open_split"])},
    "heads of a computed number": {"made": ("Abs", ["split"]), "q4": ("Reshape", ["q", "made"])},
    "a softmax over logits": {
        "raw": ("MatMul", ["context", "classifier"]),
        "logits": ("Softmax", ["raw"], {"axis": -1}),
    },
    "positions between the layers": {
        "shape": ("Shape", ["input_ids"]),
        "length": ("Gather", ["shape", "int1"]),
        "places": ("Range", ["int0", "length", "int1"]),
        "here": ("Gather", ["positions", "places"]),
        "placed": ("Add", ["context", "here"]),
        "logits": ("MatMul", ["placed", "classifier"]),
    },
    "queries that two values make": {
        "other": ("MatMul", ["root", "wv"]),
        "both": ("Add", ["q", "other"]),
        "q4": ("Reshape", ["both", "split"]),
    },
    "queries without a weight": {"q4": ("Reshape", ["x", "split"])},
}


@pytest.mark.parametrize("changes", FORMS.values(), ids=FORMS)
def test_another_form_is_left_alone(changes: dict[str, Any]) -> None:
    """A graph whose attention has another form, or that uses positions after it, comes back as it is."""
    before = one_layer(**changes)
    serialized = before.SerializeToString()
    after, blocks = attention.rewrite(before)
    assert len(blocks) == 0
    assert after is before
    assert after.SerializeToString() == serialized


@pytest.mark.parametrize("masked", [True, False])
def test_a_layer_by_hand_becomes_one_operator(masked: bool) -> None:
    """For a GPU the layer is one MultiHeadAttention, with lengths or without a mask, and without a bias."""
    before = one_layer(with_mask=masked)
    after, fused = fusion.fuse(before)
    assert fused == fusion.Fused(attention=1)
    (block,) = (node for node in after.graph.node if node.op_type == "MultiHeadAttention")
    assert list(block.input) == ["q", "k", "v", "", "medner.lengths" if masked else ""]
    assert "Softmax" not in {node.op_type for node in after.graph.node}
    rng = np.random.default_rng(0)
    ids, lengths = rng.integers(2, VOCABULARY, (3, 11)), np.array([11, 4, 1])
    expected = logits(before, ids, lengths)
    assert np.abs(logits(after, ids, lengths) - expected).max() <= 1e-5 * np.abs(expected).max()


#: Forms that only the order of the axes forbids: one operator, which reads the batch first, takes them.
FUSED_FORMS = ("positions between the layers", "queries that two values make", "queries without a weight")


@pytest.mark.parametrize("form", FORMS)
def test_another_form_for_a_gpu(form: str) -> None:
    """A graph with another attention comes back as it is; where the attention is the same, so are the logits."""
    before = one_layer(**FORMS[form])
    after, fused = fusion.fuse(before)
    if form not in FUSED_FORMS:
        assert after is before
        assert fused.attention == 0
        return
    assert fused.attention == 1
    ids, lengths = np.arange(22).reshape(2, 11) + 2, np.array([11, 4])
    expected = logits(before, ids, lengths)
    assert np.abs(logits(after, ids, lengths) - expected).max() <= 1e-5 * np.abs(expected).max()


def test_a_graph_without_attention() -> None:
    """A graph without a softmax has no block."""
    before = one_layer(with_mask=False, heads=("MatMul", ["scaled", "vt"]))
    assert attention.rewrite(before) == (before, [])


def test_the_proof_alone_stops_a_wrong_scale() -> None:
    """Scores divided by 2 instead of the root of 8 look the same to the matcher: it is the logits that differ."""
    graph = attention.Graph(one_layer(divisor=2.0))
    (softmax,) = graph.nodes("Softmax")
    block = attention._Matcher(graph).block(softmax)
    assert block == attention.Block("q", "k", "v", "context", HEADS, HIDDEN // HEADS)
    assert attention._root(graph, [block]) == "root"


def test_a_graph_that_does_not_run_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where onnxruntime cannot run what was rewritten, the graph comes back as it is; its own failure is told."""
    model = one_layer()
    assert len(attention.rewrite(model)[1]) == 1
    monkeypatch.setattr(attention, "MICROSOFT", "no.such.domain")
    assert attention.rewrite(model) == (model, [])
    with pytest.raises(ModelError, match=r"^onnxruntime cannot run the graph: .+$"):
        runtime.logits(b"no graph", np.zeros((1, 3), np.int64), np.array([3]))
