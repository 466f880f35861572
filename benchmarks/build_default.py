"""Rebuilds the default bundle: trains, distils, exports, proves, scores, writes the card.

    python benchmarks/build_default.py --base CHECKPOINT [--ship]

CHECKPOINT is a directory with the weights of all-MiniLM-L6-v2. The checkpoints and the bundle with all its variants go
to ``models/default`` and ``models/training``, which git ignores; ``--ship`` also replaces ``medner/bundles/default`` by
the int8 variant. What is there already is not made again, so an interrupted build goes on. About three hours on two
cores with AMX, which compute in bf16, six on others. ``rebuilt.py`` compares the result with what ships.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import abbreviations
import common
import errors
import lexicon
import pretrain
import pyarrow as pa
import relu_base
import training
from safetensors.torch import save_file

from medner import bundle, datasets, evaluate, score, sources, train, windows
from medner import export as exporting
from medner.annotate import Annotator, Options
from medner.datasets import Document
from medner.pytorch import TorchModel, torch_annotator

WORK = common.ROOT / "models" / "default"
SHIPPED = common.ROOT / "medner" / "bundles" / "default"
SEEDS = (13, 14, 15, 16, 17)
#: Steps of the distillation that makes the base's activation ReLU.
RELU_STEPS = 500
#: Tokens that the encoder is pre-trained on.
PRETRAINED_TOKENS = 16_000_000
#: Epochs in which names of diseases are learnt.
NAMED_EPOCHS = 2
#: The ways of training whose checkpoints teach, all their seeds: what else is a mention beside names, and in the end.
FIRST_TEACHERS, TEACHERS = "pretrained", "named"
#: Characters of text that only the teachers say something about, and how many of one text at most.
UNLABELLED_CHARACTERS, LONGEST_TEXT = {"medquad": 400_000, "rct": 400_000, "mtsamples": 400_000}, 3_000
#: Characters of reports whose mentions are abbreviated.
ABBREVIATED_CHARACTERS = 1_000_000
LICENCE = "Apache-2.0"
WRAP = 75

CONLL, PUBTATOR = training.SENTENCES, training.DOCUMENTS
#: Unlabelled text: ``FILE`` or ``FILE:COLUMN``.
TEXTS = {
    "medquad": str(common.DATA / "biomedical-text" / "medquad.jsonl.gz"),
    "rct": str(common.DATA / "biomedical-text" / "rct-articles.jsonl.gz"),
    "mtsamples": f"{common.DATA / 'mtsamples' / 'mtsamples.csv'}:transcription",
}


def make_base(base: str) -> Path:
    """The encoder with ReLU and without special tokens, pre-trained further; unless it is there."""
    cheap, made = WORK / "base", WORK / "pretrained"
    texts = tuple(TEXTS.values())
    if not (cheap / "model.safetensors").is_file():
        relu_base.make(base, cheap, texts, RELU_STEPS)
    if not (made / "model.safetensors").is_file():
        pretrain.pretrain(pretrain.PretrainOptions(str(cheap), made, texts, PRETRAINED_TOKENS, resume=True))
    return made


def make_teachers(name: str, base: Path) -> list[Path]:
    """The checkpoints of a way of training; unless they are there."""
    (variant,) = (variant for variant in training.VARIANTS if variant.name == name)
    jobs = {training.WORK / f"{name}-{seed}": training.arguments(variant, base, seed) for seed in training.SEEDS}
    training.train_all(jobs)
    return list(jobs)


def make_named(base: Path, teachers: Sequence[Path]) -> Path:
    """A checkpoint that has learnt names of diseases beside the corpus; unless it is there."""
    made = WORK / "named"
    options = {**training.PLAIN, "epochs": NAMED_EPOCHS, "average": 1}
    job = training.flags(data=[CONLL], base=base, silver=write_named(teachers), seed=training.SEEDS[0], **options)
    training.train_all({made: job})
    return made


def write_named(teachers: Sequence[Path]) -> Path:
    """Sentences of MedQuAD with names, those of the corpus with names in place of mentions; unless they are there."""
    target = WORK / "named.jsonl"
    if not target.is_file():
        texts = relu_base.texts(TEXTS["medquad"], 10**10)
        known = lexicon.names(texts)
        sentences = lexicon.marked(texts, known.diseases, _sentences)
        made = [*lexicon.completed(sentences, found_by_most(teachers, sentences))]
        made += lexicon.replaced(datasets.load(str(CONLL), "train", {"*": lexicon.LABEL}), known)
        _write_lines(target, ({"id": str(i), "text": d.text, "spans": d.spans} for i, d in enumerate(made)))
    return target


def found_by_most(teachers: Sequence[Path], documents: Sequence[Document]) -> list[list[datasets.Span]]:
    """The spans that more than half of the teachers find in each document."""
    each = [evaluate.find(torch_annotator(teacher), documents) for teacher in teachers]
    counts = (Counter(chain.from_iterable(spans)) for spans in zip(*each, strict=True))
    return [sorted(span for span, count in found.items() if 2 * count > len(teachers)) for found in counts]


def average(checkpoints: Sequence[Path], target: Path) -> None:
    """Write the checkpoint whose weights are the mean of others that started from one; of one alone, its copy."""
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(checkpoints[-1], target, ignore=shutil.ignore_patterns("checkpoints", "*.png"))
    save_file(train.mean_weights(checkpoints), target / "model.safetensors", metadata={"format": "pt"})


def write_unlabelled() -> Path:
    """Text for the teachers: every other one as its segments, the others whole; unless it is there."""
    target = WORK / "unlabelled.jsonl"
    if not target.is_file():
        _write_lines(target, ({"text": text} for text in _unlabelled()))
    return target


def write_silver(teachers: Sequence[Path]) -> Path:
    """Sentences of reports in which all teachers find the same mentions, as records abbreviate them.

    Those with mentions, then as many in shorthand without any, and headings; unless they are there.
    """
    target = WORK / "silver.jsonl"
    if not target.is_file():
        texts = relu_base.texts(TEXTS["mtsamples"], ABBREVIATED_CHARACTERS)
        parts = dict.fromkeys(part for text in texts for part in _sentences(text))
        sentences = [Document(str(i), part, ()) for i, part in enumerate(parts)]
        first, *others = (evaluate.find(torch_annotator(teacher), sentences) for teacher in teachers)
        agreed = [
            replace(sentence, spans=tuple(spans))
            for sentence, spans, *rest in zip(sentences, first, *others, strict=True)
            if all(spans == other for other in rest)
        ]
        short = list(abbreviations.shortened(agreed))
        made = list(abbreviations.abbreviated(short))
        plain = [new for old, new in zip(agreed, short, strict=True) if not new.spans and new != old]
        made += common.every_kth(plain, min(len(plain), len(made))) if plain else []
        made += abbreviations.headings()
        _write_lines(target, ({"id": d.id, "text": d.text, "spans": d.spans} for d in made))
    return target


def silver_counts(silver: Path) -> dict[str, int]:
    """Sentences with an abbreviated mention, and those in shorthand without one; headings left out."""
    rows = [json.loads(line) for line in silver.read_text(encoding="utf-8").splitlines()]
    with_mentions = sum(bool(row["spans"]) for row in rows)
    headings = len(list(abbreviations.headings()))
    return {"abbreviated": with_mentions, "shortened": len(rows) - with_mentions - headings}


def _sentences(text: str) -> list[str]:
    parts = (text[low:high] for low, high in pairwise(windows.segments(text)))
    return [part for part in parts if part.strip()]


def _write_lines(target: Path, records: Iterable[dict[str, Any]]) -> None:
    draft = target.with_suffix(".tmp")
    draft.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    draft.replace(target)


def _unlabelled() -> Iterator[str]:
    for name, given in TEXTS.items():
        # Of texts that are cut, more are needed for as many characters.
        found = [text[:LONGEST_TEXT] for text in relu_base.texts(given, 10**10)]
        share = min(1.0, UNLABELLED_CHARACTERS[name] / sum(map(len, found)))
        for number, text in enumerate(common.every_kth(found, round(share * len(found)))):
            if number % 2:
                yield text
            else:
                yield from _sentences(text)


def best_start(teachers: Sequence[Path]) -> Path:
    """The teacher that is best on devel."""

    def devel(checkpoint: Path) -> float:
        metrics = json.loads((checkpoint / "metrics.json").read_text(encoding="utf-8"))
        return float(max(metrics["best"]["f1"], metrics["averaged"]["f1"]))

    return max(teachers, key=devel)


def make_students(start: Path, teachers: Sequence[Path], silver: Path, unlabelled: Path) -> dict[int, Path]:
    """A checkpoint for each seed, taught by the teachers; unless they are there."""
    students = {seed: WORK / f"seed{seed}" for seed in SEEDS}
    training.train_all(
        {
            path: training.flags(
                data=[CONLL, PUBTATOR], base=start, silver=silver, unlabelled=unlabelled,
                teacher=list(teachers), teacher_weight=0.7,
                epochs=training.TAUGHT_EPOCHS, lr=2e-4, batch_size=32, window=128, seed=seed,
            )
            for seed, path in students.items()
        }
    )  # fmt: skip
    return students


def scores_of(path: Path) -> dict[str, Any]:
    """Every score that the card states, by name. Test is scored here, once, after everything was chosen."""
    found: dict[str, Any] = {}
    for precision, least in (("int8", None), ("fp32", None), ("int8", 0.0), ("fp32", 0.0)):
        annotator = Annotator.load(path, Options(precision=precision, min_score=least))
        name = precision if least is None else f"{precision}, all spans"
        for split in ("devel", "test"):
            sentences, documents = datasets.load(str(CONLL), split), datasets.load(str(PUBTATOR), split)
            found[f"{name}, {split} sentences"] = evaluate.evaluate(annotator, sentences).as_dict()
            found[f"{name}, {split} documents"] = evaluate.evaluate(annotator, documents).as_dict()
            wrapped = evaluate.hard_wrapped(documents, WRAP)
            found[f"{name}, {split} documents wrapped at {WRAP}"] = evaluate.evaluate(annotator, wrapped).as_dict()
    return found


def notes() -> list[Document]:
    """The ACI-BENCH notes."""
    reader = sources.Reader(
        sources.discover([str(common.DATA / "aci-bench" / "notes.jsonl")]).files, sources.ReadOptions()
    )
    texts = pa.Table.from_batches(reader.batches()).column("text").to_pylist()
    return [Document(str(i), text, ()) for i, text in enumerate(texts)]


def agreement(path: Path, documents: list[Document], other: list[Document] | None = None) -> float:
    """Share of equal spans, of all scores: int8 against fp32 on the same documents, or int8 on two forms of them."""
    first = evaluate.find(Annotator.load(path, Options(precision="int8", min_score=0.0)), other or documents)
    second = evaluate.find(
        Annotator.load(path, Options(precision="int8" if other else "fp32", min_score=0.0)), documents
    )
    return score.agreement(keys(first), keys(second))


def masked_mentions(path: Path, documents: list[Document]) -> dict[str, Any]:
    """What changes when names after titles become ``___``: masks, mentions that hold one, share of equal mentions."""
    masked = [replace(d, text=re.sub(r"\b(Mr|Ms|Mrs|Dr)\. [A-Z][a-z]+", r"\1. ___", d.text)) for d in documents]
    annotator = Annotator.load(path, Options(precision="int8", min_score=0.0))
    before, after = (
        [(d.id, d.text[start:end]) for d, spans in zip(form, evaluate.find(annotator, form), strict=True)
         for start, end, _ in spans]
        for form in (documents, masked)
    )  # fmt: skip
    common = (Counter(before) & Counter(after)).total()
    return {
        "masks": sum(d.text.count("___") for d in masked),
        "holding": sum("_" in text for _, text in after),
        "equal": 2 * common / (len(before) + len(after)),
    }


def keys(found: evaluate.Found) -> list[tuple[int, int, int, str]]:
    """The spans of all documents, each with its document's number: what :func:`score.agreement` compares."""
    return [(number, *span) for number, spans in enumerate(found) for span in spans]


def prove_fp32(checkpoint: Path, path: Path) -> int:
    """PyTorch and fp32 ONNX find identical spans in all test sentences; the number of sentences."""
    sentences = datasets.load(str(CONLL), "test")
    exported = Annotator.load(path, Options(precision="fp32", min_score=0.0))
    reference = Annotator(exported.bundle, TorchModel(checkpoint), Options(min_score=0.0), precision="fp32")
    if evaluate.find(exported, sentences) != evaluate.find(reference, sentences):
        raise SystemExit("fp32 ONNX and PyTorch find different spans in the test sentences")
    return len(sentences)


def card(path: Path, facts: dict[str, Any]) -> str:
    """The model card: the template with this build's figures."""
    template = (Path(__file__).parent / "default_card.md").read_text(encoding="utf-8")
    rows = []
    for name, scores in facts["scores"].items():
        overall = scores["overall"]
        rows.append(
            f"| {name} | {100 * overall['precision']:.2f} | {100 * overall['recall']:.2f} | "
            f"**{100 * overall['f1']:.2f}** | {100 * overall['low']:.2f} - {100 * overall['high']:.2f} |"
        )
    loaded = bundle.load(path)
    values = {
        "scores": "\n".join(rows),
        "min_score": f"{loaded.min_score:g}",
        "window": f"{loaded.window} tokens, {'as many segments as fit' if loaded.packed else 'one segment each'}",
        "steps": str(RELU_STEPS),
        "pretrained": f"{PRETRAINED_TOKENS / 1e6:.0f} M",
        "epochs": str(training.TAUGHT_EPOCHS),
        "seeds": _seeds(facts),
        "chosen": facts["chosen"],
        "teachers": str(len(training.SEEDS)),
        "abbreviated": f"{facts['silver']['abbreviated']:,}",
        "shortened": f"{facts['silver']['shortened']:,}",
        "shorthand": str(len(abbreviations.SHORTHAND)),
        "headings": str(len(abbreviations.HEADINGS)),
        "named": f"{facts['named']:,}",
        "names": f"{facts['names']:,}",
        "named_epochs": str(NAMED_EPOCHS),
        "abbreviations": str(len(abbreviations.ABBREVIATIONS)),
        "unlabelled": f"{sum(UNLABELLED_CHARACTERS.values()):,}",
        "sentences": str(facts["fp32_identical_sentences"]),
        "agreement": f"{100 * facts['aci_agreement']:.2f}",
        "capitals": f"{100 * facts['capitals_agreement']:.2f}",
        "masks": str(facts["masks"]["masks"]),
        "holding": str(facts["masks"]["holding"]),
        "errors": facts["errors"],
        "equal": f"{100 * facts['masks']['equal']:.2f}",
        "megabytes": f"{loaded.variants['int8'].bytes / 1e6:.1f}",
    }
    for name, value in values.items():
        template = template.replace(f"{{{name}}}", value)
    return template


def _seeds(facts: dict[str, Any]) -> str:
    """Rows of a table: each seed, the means of weights, and the mean of the seeds' scores."""
    columns = [(split, name) for split in ("devel", "test") for name in training.SCORED]
    scores = {name: [100 * facts[split][name][scored] for split, scored in columns] for name in facts["devel"]}
    seeds = [values for name, values in scores.items() if name not in training.MEANS]
    scores["**mean of the seeds' scores**"] = [sum(values) / len(values) for values in zip(*seeds, strict=True)]
    return "\n".join(f"| {name} | {' | '.join(f'{value:.2f}' for value in row)} |" for name, row in scores.items())


def main() -> None:
    """Build, and ship if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", required=True, help="directory with the weights of all-MiniLM-L6-v2")
    parser.add_argument("--ship", action="store_true", help="replace the bundle inside the package")
    given = parser.parse_args()

    base = make_base(given.base)
    first = make_teachers(FIRST_TEACHERS, base)
    teachers = make_teachers(TEACHERS, make_named(base, first))
    start = best_start(teachers)
    silver = write_silver(teachers)
    students = make_students(start, teachers, silver, write_unlabelled())
    candidates = {f"seed {seed}": path for seed, path in students.items()}
    for (name, folder), others in zip(training.MEANS.items(), ([], teachers), strict=True):
        candidates[name] = WORK / folder
        average([*others, *students.values()], candidates[name])
    devel = {name: training.score(candidate) for name, candidate in candidates.items()}
    chosen = max(devel, key=lambda name: devel[name]["sentences"] + devel[name]["documents"])
    checkpoint, path = WORK / "checkpoint", WORK / "bundle"
    average([candidates[chosen]], checkpoint)
    print(
        exporting.export(
            exporting.ExportOptions(
                checkpoint,
                path,
                str(PUBTATOR / "NCBIdevelopset_corpus.txt"),
                name="default",
                licence=LICENCE,
                min_score=None,
                overwrite=True,
            )
        )
    )
    documents = notes()
    facts = {
        "chosen": chosen,
        "silver": silver_counts(silver),
        "named": len((WORK / "named.jsonl").read_text(encoding="utf-8").splitlines()),
        "names": len(lexicon.names(relu_base.texts(TEXTS["medquad"], 10**10)).diseases),
        "devel": devel,
        # Looked at once, when all was chosen: each seed, and what ships.
        "test": {name: training.score(candidate, "test") for name, candidate in candidates.items()},
        "fp32_identical_sentences": prove_fp32(checkpoint, path),
        "aci_agreement": agreement(path, documents),
        "capitals_agreement": agreement(path, documents, [replace(d, text=_upper(d.text)) for d in documents]),
        "masks": masked_mentions(path, documents),
        "errors": errors.section(Annotator.load(path, Options(precision="int8"))),
        "scores": scores_of(path),
    }
    manifest = json.loads((path / bundle.MANIFEST).read_text(encoding="utf-8"))
    written = {key: manifest[key] for key in ("licence", "checkpoint", "parity", "training", "versions")}
    _strip_paths(written["training"])
    if chosen in training.MEANS:  # a mean has no training of its own: what is there is the last seed's
        written["training"]["mean_of_seeds"] = list(SEEDS)
        written["training"]["mean_of"] = chosen
    written |= {name: facts[name] for name in ("scores", "chosen", "devel", "test")}
    loaded = bundle.load(path)
    (path / "README.md").write_text(card(path, facts), encoding="utf-8")
    bundle.write_manifest(
        path, name="default", labels=loaded.labels, window=loaded.window, packed=loaded.packed, card=written,
        min_score=loaded.min_score,
    )  # fmt: skip
    if given.ship:
        ship(path, written)
    print((path / "README.md").read_text(encoding="utf-8"))


def ship(path: Path, written: dict[str, Any]) -> None:
    """Copy the int8 variant into the package."""
    loaded = bundle.load(path)
    shutil.rmtree(SHIPPED, ignore_errors=True)
    (SHIPPED / "onnx").mkdir(parents=True)
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "README.md"):
        shutil.copyfile(path / name, SHIPPED / name)
    graph = bundle.VARIANT_FILES["int8"]
    shutil.copyfile(path / graph, SHIPPED / graph)
    bundle.write_manifest(
        SHIPPED, name="default", labels=loaded.labels, window=loaded.window, packed=loaded.packed, card=written,
        min_score=loaded.min_score,
    )  # fmt: skip
    size = sum(file.stat().st_size for file in SHIPPED.rglob("*") if file.is_file())
    print(f"shipped {size / 1e6:.2f} MB to {SHIPPED.relative_to(common.ROOT)}")
    if size > 25_000_000:
        raise SystemExit("the default bundle is larger than 25 MB")


def _upper(text: str) -> str:
    """In capitals, character by character, where that keeps the length."""
    return "".join(c.upper() if len(c.upper()) == 1 else c for c in text)


def _strip_paths(training: dict[str, Any]) -> None:
    """Keep the builder's directories out of what ships."""
    options = training["options"]
    options["data"] = ["NCBI Disease, tagged sentences", "NCBI Disease, documents"]
    options["base"] = "all-MiniLM-L6-v2 with ReLU and without special tokens, fine-tuned as a teacher"
    options["silver"] = ["MTSamples, sentences as records abbreviate them; headings of records"]
    options["unlabelled"] = ["MedQuAD, trial reports, MTSamples"]
    options["teachers"] = [Path(teacher).name for teacher in options["teachers"]]
    options.pop("output", None)


if __name__ == "__main__":
    main()
