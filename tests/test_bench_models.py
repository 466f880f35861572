"""How the default model is made: ReLU in the place of GELU, and the mean of several trainings' weights."""

import json
import random
import re
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from medner import testing
from medner.datasets import Document

ROOT = Path(__file__).parents[1]
if not (ROOT / "benchmarks").is_dir():
    pytest.skip("benchmarks are only in a checkout", allow_module_level=True)
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("onnx", reason="build_default exports")
with pytest.MonkeyPatch.context() as patch:
    patch.setattr(sys, "path", [str(ROOT / "benchmarks"), *sys.path])
    build_default, errors, relu_base = map(import_module, ("build_default", "errors", "relu_base"))


def checkpoint(path: Path, seed: int) -> Path:
    """An encoder of random weights with GELU and the tiny vocabulary."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = transformers.BertConfig(
            vocab_size=117,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=64,
            max_position_embeddings=32,
            initializer_range=0.2,
        )
        transformers.BertModel(config, add_pooling_layer=False).save_pretrained(path)
    transformers.BertTokenizerFast(tokenizer_file=str(testing.bundle() / "tokenizer.json")).save_pretrained(path)
    return path


def test_relu_in_the_place_of_gelu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The fit and distillation each halve what ReLU alone is off by, and the checkpoint says what it is."""
    for name, value in {"LENGTH": 16, "BATCH": 8, "FITTED": 80, "HELD_OUT": 16, "WARMUP": 5, "LR": 2e-3}.items():
        monkeypatch.setattr(relu_base, name, value)
    rng = random.Random(1)
    lines = [{"note": " ".join(rng.choices("abcdefghijklmnopqrstuvwxyz0123456789.,;:", k=60))} for _ in range(60)]
    notes = tmp_path / "notes.jsonl"
    notes.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    base = checkpoint(tmp_path / "base", 3)
    relu_base.make(str(base), tmp_path / "relu", [f"{notes}:note"], steps=2)
    with monkeypatch.context() as without_fit:
        without_fit.setattr(relu_base, "refit", lambda *_: None)
        relu_base.make(str(base), tmp_path / "distilled", [f"{notes}:note"], steps=60)
    said = [json.loads(found) for found in re.findall(r": (\[.*\])", capsys.readouterr().err)]
    swapped, fitted, _, _, _, distilled = said
    assert len(swapped) == 2
    assert all(b < 0.5 * a for a, b in zip(swapped, fitted, strict=True))
    assert all(b < 0.5 * a for a, b in zip(swapped, distilled, strict=True))

    config = transformers.AutoConfig.from_pretrained(tmp_path / "relu")
    assert config.hidden_act == "relu"
    made = transformers.AutoModel.from_pretrained(tmp_path / "relu", add_pooling_layer=False).eval()
    original = transformers.AutoModel.from_pretrained(base, add_pooling_layer=False).eval()
    ids = torch.arange(4, 84).reshape(5, 16)
    (off,) = relu_base.off(made, original, ids)[-1:]
    assert off < 0.5
    assert (tmp_path / "relu" / "tokenizer.json").is_file()


def test_texts_are_taken_evenly(tmp_path: Path) -> None:
    """Different texts alone, about as many characters as asked for, from the whole file."""
    path = tmp_path / "notes.jsonl"
    path.write_text("".join(json.dumps({"text": f"{i // 2:010d}"}) + "\n" for i in range(200)), encoding="utf-8")
    assert relu_base.texts(str(path), characters=50) == [f"{i:010d}" for i in range(0, 100, 20)]
    assert len(relu_base.texts(str(path))) == 100


def test_the_mean_of_weights(tmp_path: Path) -> None:
    """Each weight is the mean of the checkpoints', the rest is the last one's, and its training folder stays behind."""
    paths = [checkpoint(tmp_path / str(seed), seed) for seed in range(3)]
    (paths[-1] / "checkpoints").mkdir()
    target = tmp_path / "mean"
    for _ in range(2):  # over what is there already
        build_default.average(paths, target)

    def weights(path: Path) -> Any:
        return transformers.AutoModel.from_pretrained(path, add_pooling_layer=False).state_dict()

    mean, each = weights(target), [weights(path) for path in paths]
    for name, value in mean.items():
        torch.testing.assert_close(value, (each[0][name] + each[1][name] + each[2][name]) / 3)
    assert sorted(file.name for file in target.iterdir()) == sorted(
        file.name for file in paths[-1].iterdir() if file.name != "checkpoints"
    )


def test_kinds_of_errors() -> None:
    """Hand-worked: exact, shifted, missed of each kind, and invented; an overlap is no invention."""
    text = "T2DM, breast and ovarian cancer, gout attack, asthma, fever, CF"
    gold = [("T2DM", "SpecificDisease"), ("breast and ovarian cancer", "CompositeMention"), ("gout", "DiseaseClass"),
            ("asthma", "SpecificDisease"), ("CF", "Modifier")]  # fmt: skip
    spans = tuple((text.index(word), text.index(word) + len(word), label) for word, label in gold)
    document = Document("a", text, spans)
    found = [
        [
            (text.index(word), text.index(word) + len(word), "Disease")
            for word in ("ovarian cancer", "gout attack", "fever", "CF")
        ]
    ]
    expected = {"boundary": 1, "abbreviation": 1, "composite": 1, "other": 1, "invented": 1}
    assert errors.kinds([document], found) == expected
    assert set(errors.KINDS) == set(expected)


def test_unseen_mentions() -> None:
    """Known texts count neither as right nor as wrong."""
    document = Document("a", "Gout, asthma, measles.", ((0, 4, "D"), (6, 12, "D"), (14, 21, "D")))
    known = errors.mentions([Document("b", "gout", ((0, 4, "D"),))])
    scores = errors.unseen([document], [[(0, 4, "D"), (6, 12, "D"), (6, 10, "D")]], known).overall
    assert (scores.tp, scores.fp, scores.fn) == (1, 1, 1)


def test_the_records() -> None:
    """Thirty notes whose spans are what they say, in the forms that electronic records have."""
    rows = [json.loads(line) for line in errors.RECORDS.read_text(encoding="utf-8").splitlines()]
    assert len({row["id"] for row in rows}) == len(rows) == 30
    assert all(row["text"][s["start"] : s["end"]] == s["text"] for row in rows for s in row["spans"])
    spans = [s["text"] for row in rows for s in row["spans"]]
    assert len(spans) > 100
    assert any("\n" in text for text in spans)
    assert any(text.isupper() and " " in text for text in spans)
    assert sum("___" in row["text"] for row in rows) >= 3
    assert any(not row["spans"] for row in rows)
