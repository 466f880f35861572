"""How the default model is made: ReLU in the place of GELU, the mean of several trainings' weights, the whole build."""

import csv
import gzip
import itertools
import json
import os
import random
import re
import statistics
import subprocess
import sys
from collections.abc import Iterable, Iterator
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from medner import Annotator, bundle, datasets, testing
from medner.datasets import Document
from medner.errors import InputError
from medner.windows import WordTokenizer

ROOT = Path(__file__).parents[1]
if not (ROOT / "benchmarks").is_dir():
    pytest.skip("benchmarks are only in a checkout", allow_module_level=True)
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("optimum.exporters.onnx", reason="build_default exports")
load_file = pytest.importorskip("safetensors.torch").load_file
with pytest.MonkeyPatch.context() as patch:
    patch.setattr(sys, "path", [str(ROOT / "benchmarks"), *sys.path])
    abbreviations, build_default, errors, lexicon, pretrain, relu_base = map(
        import_module, ("abbreviations", "build_default", "errors", "lexicon", "pretrain", "relu_base")
    )


def checkpoint(path: Path, seed: int, positions: int = 32) -> Path:
    """An encoder of random weights with GELU and the tiny vocabulary."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = transformers.BertConfig(
            vocab_size=120,  # the mask, which the tiny tokenizer lacks, is added to its 117
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=64,
            max_position_embeddings=positions,
            initializer_range=0.2,
        )
        transformers.BertModel(config, add_pooling_layer=False).save_pretrained(path)
    transformers.BertTokenizerFast(tokenizer_file=str(testing.bundle() / "tokenizer.json")).save_pretrained(path)
    return path


@pytest.mark.parametrize("keep", [True, False])
def test_relu_in_the_place_of_gelu(
    keep: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The fit and distillation each lessen what ReLU alone is off by, and the checkpoint says what it is."""
    for name, value in {"LENGTH": 16, "BATCH": 8, "FITTED": 80, "HELD_OUT": 16, "WARMUP": 5, "LR": 2e-3}.items():
        monkeypatch.setattr(relu_base, name, value)
    base = checkpoint(tmp_path / "base", 3)
    given = [letters(tmp_path / "notes.jsonl", 1)]
    relu_base.make(str(base), tmp_path / "relu", given, steps=2, keep_specials=keep)
    with monkeypatch.context() as without_fit:
        without_fit.setattr(relu_base, "refit", lambda *_: None)
        relu_base.make(str(base), tmp_path / "distilled", given, steps=60, keep_specials=keep)
    said = [json.loads(found) for found in re.findall(r": (\[.*\])", capsys.readouterr().err)]
    swapped, fitted, _, _, _, distilled = said
    assert len(swapped) == 2
    assert all(b < 0.7 * a for a, b in zip(swapped, fitted, strict=True))
    assert all(b < 0.7 * a for a, b in zip(swapped, distilled, strict=True))

    config = transformers.AutoConfig.from_pretrained(tmp_path / "relu")
    assert config.hidden_act == "relu"
    made, original = (
        transformers.AutoModel.from_pretrained(path, add_pooling_layer=False).eval()
        for path in (tmp_path / "relu", base)
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "relu")
    whole = transformers.AutoTokenizer.from_pretrained(base)
    frame = (whole.cls_token_id,), (whole.sep_token_id,)
    ids = whole("a b c", add_special_tokens=False).input_ids
    assert tokenizer("a b c").input_ids == ([*frame[0], *ids, *frame[1]] if keep else ids)
    encoder = WordTokenizer((tmp_path / "relu" / "tokenizer.json").read_text(encoding="utf-8"))
    assert (encoder.prefix, encoder.suffix) == (frame if keep else ((), ()))
    teacher = relu_base.Encoder(original, *frame)
    student = relu_base.Encoder(made, *frame) if keep else relu_base.Encoder(made)
    assert relu_base.off(student, teacher, torch.arange(4, 84).reshape(5, 16))[-1] < 0.6
    # Behind [CLS] a token had the position that it has now.
    places = [model.embeddings.position_embeddings.weight for model in (made, original)]
    drift = (places[0][:8] - places[1][:8] if keep else places[0][:8] - places[1][1:9]).abs().max()
    assert drift < 0.05


def letters(path: Path, seed: int, count: int = 60) -> str:
    """A file of texts of single letters and digits in a field ``note``, most of them repeating the one before."""
    rng = random.Random(seed)
    texts = [" ".join(letter for letter in rng.choices("abcdefgh", k=30) for _ in range(2)) for _ in range(count)]
    path.write_text("".join(json.dumps({"note": text}) + "\n" for text in texts), encoding="utf-8")
    return f"{path}:note"


def test_mentions_are_abbreviated() -> None:
    """Of each sentence with mentions at least one becomes an abbreviation; every span still is its mention's."""
    sentences = [
        Document(
            "", text, tuple((m.start(), m.end(), "Disease") for m in re.finditer("asthma|chronic gout|gout", text))
        )
        for text in ("No fever.", " History of asthma and chronic gout in 2001.", " She smokes.", " Father: gout.")
    ]
    made = [document for seed in range(200) for document in abbreviations.abbreviated(sentences, seed)]
    short = {name.lower() for name in abbreviations.ABBREVIATIONS}
    patterns = (r" History of (.+) and (.+) in 2001\.", r" Father: (.+)\.")
    both = 0
    for number, document in enumerate(made):
        found = re.fullmatch(patterns[number % 2], document.text)
        assert found is not None, document.text
        mentions = [document.text[start:end] for start, end, _ in document.spans]
        assert mentions == list(found.groups())
        new = [mention for mention in mentions if mention not in ("asthma", "chronic gout", "gout")]
        assert new
        assert {mention.lower() for mention in new} <= short
        both += len(new) == 2
    assert len(made) == 400
    assert 60 < both < 180  # of 200
    names = [document.text[start:end] for document in made for start, end, _ in document.spans]
    small = [name for name in names if name.islower() and name not in ("asthma", "chronic gout", "gout")]
    assert 0.1 < len(small) / len([name for name in names if name.lower() in short]) < 0.3


def test_phrases_are_shortened() -> None:
    """Phrases outside mentions become shorthand, the longest first; spans still are their mentions'."""
    texts = ("Review of systems: history of gout with tophi, status post surgery.", "Historyless withal.", "With gout.")
    sentences = [
        Document("", text, tuple((m.start(), m.end(), "Disease") for m in re.finditer("gout with tophi|gout", text)))
        for text in texts
    ]
    forms: list[set[str]] = [set(), set(), set()]
    for seed in range(100):
        for number, document in enumerate(abbreviations.shortened(sentences, seed)):
            forms[number].add(document.text)
            mentions = [document.text[start:end] for start, end, _ in document.spans]
            assert mentions == [["gout with tophi"], [], ["gout"]][number]
    assert texts[0] in forms[0]
    assert "ROS: h/o gout with tophi, s/p surg." in forms[0]
    assert all(re.fullmatch(r"(ROS|Review of systems): (h/o|history of) gout with tophi, "
                            r"(s/p|status post) (surg|surgery)\.", text) for text in forms[0])  # fmt: skip
    assert forms[1] == {texts[1]}
    assert forms[2] == {texts[2], "w/ gout."}


def test_no_shorthand_is_a_disease() -> None:
    """What stands for no disease is none of the abbreviations that stand for one; phrases can be found."""
    diseases = {name.lower() for name in abbreviations.ABBREVIATIONS}
    assert not diseases & {short.lower() for short in abbreviations.SHORTHAND.values()}
    assert not diseases & {heading.lower() for heading in abbreviations.HEADINGS}
    assert all(phrase == phrase.lower() for phrase in abbreviations.SHORTHAND)
    assert len({heading.lower() for heading in abbreviations.HEADINGS}) == len(abbreviations.HEADINGS)
    assert "\u2022 ROS" in {heading.text for heading in abbreviations.headings()}


def test_windows_for_pretraining(tmp_path: Path) -> None:
    """A window from each file in turn; together a file's windows hold all its tokens in order, and it begins again."""
    given = [letters(tmp_path / "a.jsonl", 1, 3), letters(tmp_path / "b.jsonl", 2, 3)]
    tokenizer = Tokenizer.from_file(str(testing.bundle() / "tokenizer.json"))
    stream = iter(pretrain.Windows(tokenizer, given, 16))
    windows = [next(stream)["input_ids"] for _ in range(60)]
    first, last = tokenizer.encode("a").ids[0], tokenizer.encode("a").ids[-1]
    assert {(len(window), window[0], window[-1]) for window in windows} == {(16, first, last)}
    for number, name in enumerate(("a.jsonl", "b.jsonl")):
        lines = (tmp_path / name).read_text(encoding="utf-8").splitlines()
        ids = [i for line in lines for i in tokenizer.encode(json.loads(line)["note"], add_special_tokens=False).ids]
        seen = [i for window in windows[number::2] for i in window[1:-1]]
        assert seen == (ids * 3)[: len(seen)]
        assert len(seen) > len(ids)
    (tmp_path / "none.jsonl").write_text('{"note": ""}\n', encoding="utf-8")
    with pytest.raises(InputError, match="holds no text"):
        next(iter(pretrain.Windows(tokenizer, [f"{tmp_path / 'none.jsonl'}:note"], 16)))


@pytest.mark.filterwarnings("ignore:mtime may not be reliable on this filesystem:UserWarning")  # epochs of no time
def test_pretraining_learns_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The loss falls, and a training that was stopped half-way ends with the weights of one that was not."""
    base = checkpoint(tmp_path / "base", 4)
    options = pretrain.PretrainOptions(
        str(base),
        tmp_path / "whole",
        (letters(tmp_path / "a.jsonl", 5),),
        tokens=40_000,
        window=20,
        batch_size=20,
        lr=5e-3,
    )
    assert options.steps == 100
    losses = pretrain.pretrain(options)
    assert statistics.mean(losses[-10:]) < 0.8 * losses[0]
    weights = load_file(tmp_path / "whole" / "model.safetensors")
    assert any(not torch.equal(weights[name], value) for name, value in load_file(base / "model.safetensors").items())
    config = transformers.AutoConfig.from_pretrained(tmp_path / "whole")
    assert config.hidden_dropout_prob == 0.1  # what is fine-tuned drops out again

    stopped = replace(options, output=tmp_path / "stopped")
    with monkeypatch.context() as short:
        cut = pretrain.Windows.__iter__
        short.setattr(pretrain.Windows, "__iter__", lambda self: stop_after(55 * 20, cut(self)))
        with pytest.raises(KeyboardInterrupt):
            pretrain.pretrain(stopped)
    assert not (stopped.output / "model.safetensors").exists()
    pretrain.pretrain(replace(stopped, resume=True))
    again = load_file(stopped.output / "model.safetensors")
    assert again.keys() == weights.keys()
    assert all(torch.equal(again[name], value) for name, value in weights.items())


def test_pretraining_by_command_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the command line does not name is what :class:`PretrainOptions` says."""
    asked: list[pretrain.PretrainOptions] = []
    monkeypatch.setattr(pretrain, "pretrain", lambda options: asked.append(options) or [2.0, 1.0])
    for more in ([], ["--lr", "1e-3", "--batch-size", "8", "--resume"]):
        monkeypatch.setattr("sys.argv", ["pretrain.py", "base", "out", "--text", "a", "--text", "b:note", *more])
        pretrain.main()
    plain = pretrain.PretrainOptions("base", Path("out"), ("a", "b:note"))
    assert asked == [plain, replace(plain, lr=1e-3, batch_size=8, resume=True)]


def stop_after(n: int, items: Iterator[Any]) -> Iterator[Any]:
    """As Ctrl-C would."""
    yield from itertools.islice(items, n)
    raise KeyboardInterrupt


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


def test_the_best_teacher_is_the_start(tmp_path: Path) -> None:
    """Devel decides, by what is kept: the best epoch, or the mean of the last ones where that is better."""
    for name, best, averaged in (("a", 0.81, 0.83), ("b", 0.84, 0.80), ("c", 0.82, 0.82)):
        (tmp_path / name).mkdir()
        metrics = {"best": {"f1": best}, "averaged": {"f1": averaged}}
        (tmp_path / name / "metrics.json").write_text(json.dumps(metrics), encoding="utf-8")
    assert build_default.best_start([tmp_path / name for name in "abc"]) == tmp_path / "b"
    assert build_default.best_start([tmp_path / name for name in "ac"]) == tmp_path / "a"


def patterns_find(monkeypatch: pytest.MonkeyPatch, patterns: dict[str, str]) -> None:
    """Teachers that are patterns."""
    monkeypatch.setattr(build_default, "torch_annotator", lambda teacher: patterns[str(teacher)])
    monkeypatch.setattr(
        build_default.evaluate,
        "find",
        lambda pattern, documents: [
            [(m.start(), m.end(), "Disease") for m in re.finditer(pattern, document.text)] for document in documents
        ],
    )


def test_silver_is_what_teachers_agree_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sentences with equal mentions alone, abbreviated; as many in shorthand; headings; what is there stays."""
    reports = tmp_path / "reports.csv"
    reports.write_text(
        "transcription\nNo gout. No asthma. No asthma.\nHistory of fever.\n"
        "Patient is well. She smokes. Patient is ill.\n",
        encoding="utf-8",
    )
    monkeypatch.setattr(build_default, "WORK", tmp_path)
    monkeypatch.setattr(abbreviations, "SHORTENED", 1.0)
    monkeypatch.setitem(build_default.TEXTS, "mtsamples", f"{reports}:transcription")
    patterns_find(monkeypatch, {"a": "asthma|gout", "b": "asthma|fever"})
    made = build_default.write_silver([Path("a"), Path("b")])
    row, plain, *headings = (json.loads(line) for line in made.read_text(encoding="utf-8").splitlines())
    ((start, end, label),) = row["spans"]
    assert (row["text"][:start].strip(), row["text"][end:].strip(), label) == ("No", ".", "Disease")
    assert row["text"][start:end].lower() in {name.lower() for name in abbreviations.ABBREVIATIONS}
    assert (plain["text"].strip(), plain["spans"]) == ("pt is well.", [])
    assert [(row["text"], row["spans"]) for row in headings] == [(d.text, []) for d in abbreviations.headings()]
    assert build_default.silver_counts(made) == {"abbreviated": 1, "shortened": 1}
    made.write_text("kept", encoding="utf-8")
    assert build_default.write_silver([]).read_text(encoding="utf-8") == "kept"


ANSWERS = (
    "Bluefoot syndrome (BFS) is a rare disorder of the toes. Nobody knows where it comes from. "
    "BFS and gout differ in it.",
    "The Ontology provides the following list of signs and symptoms for Greenear disease type 2. If the information is "
    "wrong, tell us. In Greenear disease type 2 the lobes are green. No BFS was seen in them.",
    "What causes Redneemia? Having a sister is a rare condition. What is gene therapy? "
    "Most people with severe redneemia, Greenear  Disease or bluefoot syndromes were well.",
    "These resources address the diagnosis or management of t-cell lymphoma: none. A pacemaker is a type of clock.",
)


def known_in(text: str) -> list[str]:
    """What the names of the answers mark in a text."""
    finder = lexicon.Finder(lexicon.names(ANSWERS).diseases)
    return [text[start:end] for start, end in finder(text)]


def test_names_are_what_answers_are_about() -> None:
    """Taken from set phrases where they read like a disease; found as whole words, the longest, in any case."""
    found = lexicon.names(ANSWERS)
    assert found.diseases == ("bluefoot syndrome", "greenear disease type 2", "redneemia", "t-cell lymphoma")
    assert found.abbreviations == ("BFS",)
    assert known_in("BLUEFOOT syndrome, Redneemia-like bluefoot syndromes") == ["BLUEFOOT syndrome", "Redneemia"]
    assert lexicon.Finder(["a b", "a b c", "b c d"])("a b d a b c d") == [(0, 3), (6, 11)]


def test_sentences_are_marked_by_names(monkeypatch: pytest.MonkeyPatch) -> None:
    """A name in some sentences, an abbreviation in the text that defines it; some sentences have neither."""
    cut = [lambda text: re.split(r"(?<=[.?]) ", text)]

    def marked() -> dict[str, list[str]]:
        found = lexicon.marked(ANSWERS, lexicon.names(ANSWERS).diseases, cut[0])
        assert len({d.text for d in found}) == len(found)
        return {d.text: [d.text[start:end] for start, end, label in d.spans if label == "Disease"] for d in found}

    found = marked()
    assert found["BFS and gout differ in it."] == ["BFS"]
    assert found[ANSWERS[0].partition(". ")[0] + "."] == ["Bluefoot syndrome", "BFS"]
    assert found["In Greenear disease type 2 the lobes are green."] == ["Greenear disease type 2"]
    assert "No BFS was seen in them." not in {text for text, spans in found.items() if spans}
    spans = [len(spans) for spans in found.values()]
    assert spans.count(0) == round(lexicon.WITHOUT * (len(spans) - spans.count(0))) > 0
    monkeypatch.setattr(lexicon, "OF_ONE_NAME", 1)
    fewer = [name.lower() for names in marked().values() for name in names]
    assert sorted(set(fewer)) == ["bfs", "bluefoot syndrome", "greenear disease type 2", "redneemia", "t-cell lymphoma"]
    assert fewer.count("greenear disease type 2") == 1


def test_marked_sentences_are_completed() -> None:
    """What was found stays beside a name and around it; what a name overlaps otherwise gives way."""
    text = "Late bluefoot syndrome type 2, redneemia and gout"
    sentence = Document("", text, ((5, 22, "Disease"), (31, 40, "Disease")))
    for found, expected in (
        ([], ["bluefoot syndrome", "redneemia"]),
        ([(0, 22), (45, 49)], ["Late bluefoot syndrome", "redneemia", "gout"]),
        ([(14, 29)], ["bluefoot syndrome", "redneemia"]),
        ([(0, 40)], ["Late bluefoot syndrome type 2, redneemia"]),
    ):
        (done,) = lexicon.completed([sentence], [[(*span, "Disease") for span in found]])
        assert [text[start:end] for start, end, _ in done.spans] == expected


def test_names_take_the_places_of_mentions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of one word, of several, or short, as the mention was; sentences without mentions are left out."""
    monkeypatch.setattr(lexicon, "REPLACED", 1.0)
    given = [Document("1", "No DMD here", ((3, 6, "A"),)), Document("2", "None", ()),
             Document("3", "All big gout, gout", ((4, 12, "A"), (14, 18, "A")))]  # fmt: skip
    first, second = lexicon.replaced(given, lexicon.Names(("long name", "name"), ("NM",)))
    assert (first.text, first.spans) == ("No NM here", ((3, 5, "A"),))
    assert second.text in ("All long name, name", "All long name, long name")
    assert [second.text[start:end] for start, end, _ in second.spans] == second.text.removeprefix("All ").split(", ")
    monkeypatch.setattr(lexicon, "REPLACED", 0.0)
    assert list(lexicon.replaced(given, lexicon.Names((), ()))) == [given[0], given[2]]


def test_named_is_what_most_teachers_find(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """MedQuAD's sentences with names and what two of three find, then the corpus's; what is there stays."""
    (tmp_path / "answers.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in ANSWERS))
    (tmp_path / "train.tsv").write_text("Asthma\tB-Sign\n.\tO\n", encoding="utf-8")
    monkeypatch.setattr(build_default, "WORK", tmp_path)
    monkeypatch.setattr(build_default, "CONLL", tmp_path)
    monkeypatch.setitem(build_default.TEXTS, "medquad", str(tmp_path / "answers.jsonl"))
    patterns_find(monkeypatch, {"a": "gout|toes", "b": "gout|lobes", "c": "lobes|sister"})
    rows = [
        json.loads(line)
        for line in build_default.write_named([Path(name) for name in "abc"]).read_text(encoding="utf-8").splitlines()
    ]
    found = {row["text"]: [row["text"][start:end] for start, end, _ in row["spans"]] for row in rows}
    assert found["BFS and gout differ in it."] == ["BFS", "gout"]
    assert found["In Greenear disease type 2 the lobes are green."] == ["Greenear disease type 2", "lobes"]
    assert found["Bluefoot syndrome (BFS) is a rare disorder of the toes."] == ["Bluefoot syndrome", "BFS"]
    assert {label for row in rows for *_, label in row["spans"]} == {"Disease"}
    assert rows[-1]["text"].endswith(" .")
    (tmp_path / "named.jsonl").write_text("kept", encoding="utf-8")
    assert build_default.write_named([]).read_text(encoding="utf-8") == "kept"


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


# ---------------------------------------------------------------------------------------------------------------------
# The whole build

NAMES = ("breast cancer", "heart failure", "asthma", "type 2 diabetes mellitus")
FRAMES = ("a {} b c.", "d e {} f.", "no {} or {}.", "g h i.", "{} in {}.")

#: Small and short, and with the learning rate that so small a model needs; then as from the command line.
BUILD = """
import sys
from pathlib import Path
data, base, out = map(Path, sys.argv[1:])
import build_default as build, common, pretrain, relu_base, training
common.ROOT, build.WORK, training.WORK, build.SHIPPED = out, out / "default", out / "training", out / "shipped"
build.RELU_STEPS, build.PRETRAINED_TOKENS, build.SEEDS, training.SEEDS = 2, 5_000, (13,), (13,)
build.NAMED_EPOCHS, build.UNLABELLED_CHARACTERS = 1, dict.fromkeys(build.UNLABELLED_CHARACTERS, 500)
relu_base.LENGTH, relu_base.BATCH, relu_base.FITTED, relu_base.HELD_OUT = 16, 4, 60, 8
flags = training.flags
training.flags = lambda **options: flags(**options | {"epochs": 3, "lr": 3e-3})
sys.argv = ["build_default", "--base", str(base), "--ship"]
build.main()
"""


def sentences(seed: int, count: int) -> list[Document]:
    """Labelled sentences of the tiny vocabulary's words."""
    draw = random.Random(seed)
    made = []
    for number in range(count):
        text, spans = "", []
        for part in draw.choice(FRAMES).replace("{}", "\0{}\0").split("\0"):
            name = draw.choice(NAMES) if part == "{}" else part
            if part == "{}":
                spans.append((len(text), len(text) + len(name), "Disease"))
            text += name
        made.append(Document(str(number), text, tuple(spans)))
    return made


def write_conll(path: Path, documents: Iterable[Document]) -> None:
    """A line for each word."""
    lines = []
    for document in documents:
        place = 0
        for word in document.text.replace(".", " .").split():
            start = document.text.index(word, place)
            place = start + len(word)
            tags = ["B-Disease" if start == a else "I-Disease" for a, b, _ in document.spans if a <= start < b]
            lines.append(f"{word}\t{(tags or ['O'])[0]}")
        lines.append("")
    path.write_text("\n".join(lines) + "\n")


def write_pubtator(path: Path, documents: list[Document]) -> None:
    """Documents of three sentences, the first of which is the title."""
    lines = []
    for number in range(0, len(documents) - 2, 3):
        text, spans = "", []
        for document in documents[number : number + 3]:
            text += " " if text else ""
            spans += [(a + len(text), b + len(text), label) for a, b, label in document.spans]
            text += document.text
        title = len(documents[number].text)
        lines += [f"{number}|t|{text[:title]}", f"{number}|a|{text[title + 1 :]}"]
        lines += [f"{number}\t{a}\t{b}\t{text[a:b]}\tSpecificDisease\tD0" for a, b, _ in spans]
        lines.append("")
    path.write_text("\n".join(lines) + "\n")


def write_data(folder: Path) -> None:
    """Files where the real ones lie, of our own text."""
    for name in ("ncbi-disease/conll", "ncbi-disease/pubtator", "biomedical-text", "mtsamples", "aci-bench"):
        (folder / name).mkdir(parents=True)
    ncbi = folder / "ncbi-disease"
    for seed, (split, name, count) in enumerate(
        [("train", "trainset", 300), ("devel", "developset", 60), ("test", "testset", 60)]
    ):
        write_conll(ncbi / "conll" / f"{split}.tsv", sentences(seed, count))
        write_pubtator(ncbi / "pubtator" / f"NCBI{name}_corpus.txt", sentences(seed, count))
    texts = [" ".join(document.text for document in sentences(9 + seed, 12)) for seed in range(60)]
    answers = [f"What causes {name}? The {name} is a rare disease. A b c {name} d e f g h i." for name in NAMES]
    for name, rows in (("medquad", texts + answers), ("rct-articles", texts)):
        with gzip.open(folder / "biomedical-text" / f"{name}.jsonl.gz", "wt") as file:
            file.writelines(json.dumps({"id": str(number), "text": text}) + "\n" for number, text in enumerate(rows))
    with (folder / "mtsamples" / "mtsamples.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["transcription"], *([text] for text in texts)])
    notes = (json.dumps({"note_id": str(number), "text": text}) + "\n" for number, text in enumerate(texts[:5]))
    (folder / "aci-bench" / "notes.jsonl").write_text("".join(notes))


def test_the_whole_build(tmp_path: Path) -> None:
    """Every stage runs on what the one before made, and what ships loads, states its scores and finds mentions."""
    data, base, out = (tmp_path / name for name in ("data", "base", "out"))
    write_data(data)
    assert len(datasets.load(str(data / "ncbi-disease" / "pubtator"), "train")) == 100
    checkpoint(base, 3, positions=160)
    path = os.pathsep.join(filter(None, [str(ROOT / "benchmarks"), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, "-c", BUILD, data, base, out],
        env=os.environ | {"MEDNER_DATA": str(data), "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    stages = [line.removeprefix("training ") for line in done.stderr.splitlines() if line.startswith("training ")]
    assert stages == ["pretrained-13", "named", "named-13", "seed13"]
    assert len((out / "default" / "silver.jsonl").read_text().splitlines()) > 0
    assert len((out / "default" / "unlabelled.jsonl").read_text().splitlines()) > 0

    loaded = bundle.load(out / "shipped")
    loaded.check()
    assert list(loaded.variants) == ["int8"]
    card = loaded.card
    assert card["chosen"] in card["devel"]
    assert card["scores"]["int8, test sentences"]["overall"]["f1"] > 0.8
    assert card["training"]["options"]["teachers"] == ["named-13"]
    told = (out / "shipped" / "README.md").read_text()
    assert f"{100 * card['scores']['int8, test documents']['overall']['f1']:.2f}" in told
    assert not re.search(r"\{[a-z_]+\}", told)
    files = [file for file in (out / "shipped").rglob("*") if file.is_file()]
    assert not [file for file in files if str(tmp_path).encode() in file.read_bytes()]
    found = Annotator.load(out / "shipped")("no asthma or heart failure.")
    assert [(span.start, span.end) for span in found] == [(3, 9), (13, 26)]
