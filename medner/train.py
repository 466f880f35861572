"""Fine-tuning a token-classification model with the Hugging Face Trainer.

Text becomes words and windows by :mod:`medner.windows`, exactly as in inference, so the model is trained on what it
will see: a word's label stands on its first sub-token, and no window is longer than the one recorded with the model.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import re
import sys
import time
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from importlib.metadata import version
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from medner import bundle, datasets, evaluate, sources, windows
from medner.datasets import Document, Span
from medner.errors import InputError, MednerError, MissingPackage, ModelError, OutputError, UsageError, install
from medner.score import tags_of

try:
    import torch
    import transformers
    from safetensors import SafetensorError, safe_open
    from safetensors.torch import load_file
    from seqeval.metrics.v1 import precision_recall_fscore_support
    from seqeval.scheme import IOB2
    from torch.utils.data import DataLoader
    from transformers import AutoConfig, AutoModelForTokenClassification, AutoTokenizer, Trainer, TrainingArguments
    from transformers.models.auto.tokenization_auto import get_tokenizer_config
    from transformers.trainer_callback import ProgressCallback, TrainerCallback
except ImportError as error:
    raise MissingPackage(
        f'training needs the package "{error.name}", of the extra "train": {install("train")}'
    ) from None

Ints = npt.NDArray[np.int64]

#: Tokens of a batch that a teacher reads.
_TAUGHT_TOKENS = 4_096

#: Class index of tokens that carry no label: special tokens, and all but a word's first sub-token.
IGNORED = -100

#: Sentences of our own; what the model finds in them is printed before and after training.
SAMPLES = (
    "Patient with type 2 diabetes mellitus and chronic kidney disease, no history of stroke.",
    "Mutations of BRCA1 predispose to hereditary breast and ovarian cancer.",
    "The father had Huntington's disease; the daughter presents with migraine and mild asthma.",
)


@dataclass(frozen=True, slots=True)
class TrainOptions:
    """What is trained on what, and how.

    data: one or more data sets as for :func:`medner.datasets.load`, learnt together; their devel splits choose the
    epoch. base: a checkpoint directory or hub name. output: directory of the new checkpoint. labels: renaming of the
    data's labels. window: tokens, specials included. precision: auto, fp32, bf16 or fp16. max_documents: use only so
    many documents of each split of each data set. silver: data sets that are learnt from and never scored on, such as
    another model's spans. unlabelled: files of text, ``FILE`` or ``FILE:COLUMN``, that only teachers say something
    about. resume: go on from the last epoch that was saved.

    layer_decay: a layer's learning rate as a share of that of the layer above it (Howard and Ruder 2018).
    label_smoothing: share of a label's probability that goes to all classes alike (Szegedy et al. 2016). average: also
    try the mean of the weights of so many last epochs (Izmailov et al. 2018), and keep it if devel says so. teachers:
    checkpoints with the same tokenizer and labels, from whose mean probabilities is learnt, too (Hinton et al. 2015):
    teacher_weight of the loss on labelled data, nothing on silver data, and all on unlabelled text. average_with: in
    the end also try the mean of the weights and those of these checkpoints, which came from the same encoder, such as
    trainings with other seeds or the teachers (Wortsman et al. 2022), and keep it if devel says so.
    """

    data: tuple[str, ...]
    base: str
    output: Path
    epochs: int = 8
    lr: float = 1e-4
    batch_size: int = 16
    seed: int = 13
    window: int = 128
    weight_decay: float = 0.01
    warmup_ratio: float = 0.1
    class_weights: bool = False
    precision: str = "auto"
    max_documents: int | None = None
    labels: Mapping[str, str] = field(default_factory=dict)
    silver: tuple[str, ...] = ()
    unlabelled: tuple[str, ...] = ()
    layer_decay: float = 1.0
    label_smoothing: float = 0.0
    average: int = 1
    teachers: tuple[str, ...] = ()
    teacher_weight: float = 0.5
    average_with: tuple[str, ...] = ()
    resume: bool = False

    def __post_init__(self) -> None:
        """Take paths of any kind; raise :class:`UsageError` where a value lies outside its range."""
        object.__setattr__(self, "base", str(self.base))
        object.__setattr__(self, "output", Path(self.output))
        for name in ("epochs", "batch_size", "max_documents", "average"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"{name} {value}: at least 1 is needed")
        if not 0 < self.lr < math.inf:
            raise UsageError(f"lr {self.lr}: a positive number is needed")
        if not 0 <= self.seed < 2**32:
            raise UsageError(f"seed {self.seed}: at least 0, below 2**32, is needed")
        if not (0 <= self.warmup_ratio < 1 and 0 <= self.weight_decay < math.inf):
            raise UsageError("warmup_ratio lies in [0, 1), weight_decay is not negative")
        if not (0 < self.layer_decay <= 1 and 0 <= self.label_smoothing < 1 and 0 <= self.teacher_weight <= 1):
            raise UsageError("layer_decay lies in (0, 1], label_smoothing in [0, 1), teacher_weight in [0, 1]")
        if self.unlabelled and not self.teachers:
            raise UsageError(f"unlabelled {self.unlabelled[0]}: text without labels needs a teacher")
        if self.precision not in ("auto", "fp32", "bf16", "fp16"):
            raise UsageError(f"precision {self.precision!r}: one of auto, fp32, bf16, fp16 is needed")


@dataclass(frozen=True, slots=True)
class Epoch:
    """Figures of one epoch: mean training loss, and strict entity scores on devel as shares of one."""

    epoch: int
    training_loss: float
    devel_loss: float
    precision: float
    recall: float
    f1: float


@dataclass(frozen=True, slots=True)
class TrainResult:
    """Where the checkpoint lies and how training went; ``best`` is the best epoch.

    averaged: scores of the mean of the last epochs' weights, where it was tried; those weights were kept if its F1 is
    above that of the best epoch. averaged_with: those of the mean with other checkpoints, where there are some; kept if
    its F1 is above both. seconds: of the whole call; windows_per_second: of training alone, with each
    epoch's scoring and saving.
    """

    output: Path
    epochs: tuple[Epoch, ...]
    best: Epoch
    averaged: Mapping[str, float] | None
    averaged_with: Mapping[str, float] | None
    untrained: Mapping[str, float]
    samples: tuple[tuple[str, tuple[str, ...], tuple[str, ...]], ...]
    seconds: float
    windows_per_second: float

    def __str__(self) -> str:
        """The summary that the command prints."""
        lines = [f"spans before -> after training in {len(self.samples)} sample sentences:"]
        lines += [f"  {text}\n    {_listed(before)} -> {_listed(after)}" for text, before, after in self.samples]
        lines += [
            f"untrained: devel F1 {self.untrained['f1']:.4f}",
            f"best epoch {self.best.epoch} of {len(self.epochs)}: devel precision {self.best.precision:.4f}, "
            f"recall {self.best.recall:.4f}, F1 {self.best.f1:.4f}",
            *([f"mean of the last epochs' weights: devel F1 {self.averaged['f1']:.4f}"] if self.averaged else []),
            *(
                [f"mean with other checkpoints' weights: devel F1 {self.averaged_with['f1']:.4f}"]
                if self.averaged_with
                else []
            ),
            f"{self.output}: checkpoint, metrics.json, learning_curve.png ({self.seconds:.0f} s)",
        ]
        return "\n".join(lines)


def train(options: TrainOptions) -> TrainResult:
    """Fine-tune a model, keep the epoch with the best strict F1 on devel, and save it with its figures.

    Writes into ``options.output`` a checkpoint that ``AutoModelForTokenClassification`` loads, its tokenizer,
    ``metrics.json``, ``learning_curve.png`` and the folder ``checkpoints`` for resuming.

    Raises :class:`InputError` for the data, :class:`ModelError` for the base model, :class:`OutputError` where the
    output holds another training, and :class:`UsageError` for options that do not fit the model or the machine.
    """
    started = time.monotonic()
    precision = resolve_precision(options.precision)
    data, shares, tags, tokenizer, encoder = _prepare(options)
    transformers.set_seed(options.seed)
    model = _load_model(options.base, tags, tokenizer)
    _check_window(options.window, model.config, tokenizer)
    for teacher in options.teachers:
        _check_other(teacher, options, tags, tokenizer)
    for other in options.average_with:
        _check_other(other, options, tags, tokenizer)
        _parameters_of(other, model, tags, tokenizer)  # what does not fit is told now, not when all is trained
    encoded = {split: encode(documents, encoder, tags, options.window) for split, documents in data.items()}
    if not encoded["devel"].inputs:
        raise InputError(f"{', '.join(options.data)}: the devel split holds no word")
    last = _claim(options, precision, data, tokenizer)
    samples = encode([Document("sample", text, ()) for text in SAMPLES], encoder, tags, options.window)
    weights = class_weights(encoded["train"], len(tags), shares) if options.class_weights else None
    if options.teachers:
        _teach(options, encoded["train"], shares, encoder, tags, precision)

    trainer = _trainer(options, precision, model, encoded, encoder.pad_id, tags, weights)
    untrained = _scores_of(trainer.evaluate())
    before = _find(trainer, samples, tags)
    with _output_errors(options.output):
        trained = trainer.train(resume_from_checkpoint=str(last) if last else None)
    if not all(bool(parameter.isfinite().all()) for parameter in trainer.model.parameters()):
        raise UsageError(
            f"lr {options.lr}: the training diverged, its weights are no numbers; use a lower learning rate"
        )
    # Of a training that goes on, the Trainer counts the windows before, too, but not their time.
    share = 1 - (int(last.name.rpartition("-")[2]) / trainer.state.max_steps if last else 0)
    epochs = _epochs(trainer.state.log_history)
    best = max(epochs, key=lambda epoch: epoch.f1)
    averaged = _try_average(trainer, options, best) if options.average > 1 else None
    kept = max(best.f1, averaged["f1"]) if averaged else best.f1
    averaged_with = _try_average_with(trainer, options, tags, tokenizer, kept) if options.average_with else None
    after = _find(trainer, samples, tags)

    result = TrainResult(
        output=options.output,
        epochs=epochs,
        best=best,
        averaged=averaged,
        averaged_with=averaged_with,
        untrained=untrained,
        samples=tuple(zip(SAMPLES, before, after, strict=True)),
        seconds=time.monotonic() - started,
        windows_per_second=share * trained.metrics["train_samples_per_second"],
    )
    metrics = options.output / "metrics.json"
    with _output_errors(options.output):
        trainer.model.save_pretrained(options.output)
        tokenizer.save_pretrained(options.output)
        _draw(result, options.output / "learning_curve.png")
        if share or not metrics.exists():  # or else the times of what was trained stand there
            _write_json(metrics, _metrics(options, precision, tags, data, encoded, weights, result))
    return result


# ---------------------------------------------------------------------------------------------------------------------
# Examples


@dataclass(frozen=True, slots=True)
class Encoded:
    """Documents as the model sees them.

    inputs: for each window its token ids, and its class indices (``IGNORED`` where there is none), specials included;
    with teachers, also their probabilities, float16 [tokens, classes], and ``hard``, the labels' share of the loss.
    owner: for each window the index of its document; the labelled tokens of a document's windows, in order, are its
    words. words: for each document the code-point offsets of its words, [n_words, 2]. segments: for each document the
    words at which its segments begin, and the number of its words: [n_segments + 1].
    """

    documents: Sequence[Document]
    inputs: list[dict[str, Any]]
    owner: list[int]
    words: list[Ints]
    segments: list[Ints]


def encode(
    documents: Sequence[Document],
    encoder: windows.WordTokenizer,
    tags: Sequence[str],
    window: int,
    *,
    packed: bool = True,
) -> Encoded:
    """Cut documents into windows of at most ``window`` tokens with a label on each word's first sub-token.

    Of tokens that two windows share, each is labelled in the window that answers for it. packed: as for
    :func:`medner.windows.pack`.
    """
    capacity = window - len(encoder.prefix) - len(encoder.suffix)
    index = {tag: i for i, tag in enumerate(tags)}
    bounds = [windows.all_segments(document.text) for document in documents]
    pairs = [(d, low, high) for d, edges in enumerate(bounds) for low, high in pairwise(edges)]
    tokens = encoder.tokenize([documents[d].text[low:high] for d, low, high in pairs])
    encoded = Encoded(documents, [], [], [], [])
    first = 0
    for number, document in enumerate(documents):
        last = first + len(bounds[number]) - 1
        words = _words(tokens, first, last, bounds[number])
        begin, first_word = tokens.bounds[first], tokens.word_bounds[first]
        segments = tokens.word_bounds[first : last + 1] - first_word
        encoded.words.append(words)
        encoded.segments.append(segments)
        labels = np.full(tokens.bounds[last] - begin, IGNORED)
        word_token = tokens.word_token[first_word : first_word + len(words)]
        labels[word_token - begin] = [index[tag] for tag in _word_tags(words, document.spans, segments)]
        for part in windows.pack(tokens.bounds, first, last, capacity, packed=packed):
            inside = np.full(part.end - part.start, IGNORED)
            inside[part.own_start - part.start : part.own_end - part.start] = labels[
                part.own_start - begin : part.own_end - begin
            ]
            ids = [*encoder.prefix, *tokens.ids[part.start : part.end].tolist(), *encoder.suffix]
            marks = [*[IGNORED] * len(encoder.prefix), *inside.tolist(), *[IGNORED] * len(encoder.suffix)]
            encoded.inputs.append({"input_ids": ids, "labels": marks})
            encoded.owner.append(number)
        first = last
    return encoded


def _words(tokens: windows.Tokens, first: int, last: int, bounds: Sequence[int]) -> Ints:
    """Words of the segments ``first:last``: offsets in the document, [n_words, 2]."""
    chars = [tokens.chars(segment) + start for segment, start in zip(range(first, last), bounds, strict=False)]
    return np.concatenate([np.zeros((0, 2), dtype=np.int64), *chars])


def _word_tags(words: Ints, spans: Iterable[Span], segments: Ints) -> list[str]:
    """IOB2 tags of words: each word that overlaps a span belongs to it; earlier spans win.

    The first word is ``B-``, and so is one with which a segment begins, since no mention that is found crosses a
    segment's end.
    """
    tags = ["O"] * len(words)
    begins = set(segments.tolist())
    free = 0
    for start, end, label in spans:
        first = max(free, int(np.searchsorted(words[:, 1], start, side="right")))
        free = max(first, int(np.searchsorted(words[:, 0], end, side="left")))
        tags[first:free] = [f"{'B' if word == first or word in begins else 'I'}-{label}" for word in range(first, free)]
    return tags


def class_weights(encoded: Encoded, n_tags: int, shares: Sequence[float] | None = None) -> npt.NDArray[np.float64]:
    """Weight of each class, [n_tags]: words / (classes * words of the class), 0 for a class that never occurs.

    The ``balanced`` heuristic of scikit-learn, after King and Zeng (2001), over words instead of samples. shares: what
    each document's labels count for; text without labels is left out, unless no labels count.
    """
    counted = (
        item["labels"]
        for item, owner in zip(encoded.inputs, encoded.owner, strict=True)
        if shares is None or shares[owner] or not any(shares)
    )
    marks = np.fromiter(chain.from_iterable(counted), dtype=np.int64)
    counts = np.bincount(marks[marks != IGNORED], minlength=n_tags)
    return np.where(counts > 0, counts.sum() / (n_tags * np.maximum(counts, 1)), 0.0)


@dataclass(frozen=True, slots=True)
class Labelled:
    """One token of a training example; ``word``, ``tag`` and ``label_id`` only where a word begins."""

    token: str
    word: str | None
    tag: str | None
    label_id: int


@dataclass(frozen=True, slots=True)
class Inspection:
    """Training examples as the model gets them, and the balanced weight of each tag."""

    examples: tuple[tuple[Labelled, ...], ...]
    class_weights: Mapping[str, float]

    def __str__(self) -> str:
        """A table for each example: token, word, tag, label id."""
        lines = []
        for number, example in enumerate(self.examples):
            lines.append(f"example {number}: {len(example)} tokens")
            width = max(len(row.token) for row in example)
            lines += [
                f"  {row.token:<{width}}  {row.label_id:>4}  {row.tag or '':<16}  {row.word or ''}".rstrip()
                for row in example
            ]
        lines += ["class weights (balanced):", *(f"  {tag:<16}  {w:.4f}" for tag, w in self.class_weights.items())]
        return "\n".join(lines)


def inspect(options: TrainOptions, n: int = 3) -> Inspection:
    """Show how the first ``n`` training documents are tokenized and labelled, without training or loading weights.

    Raises as :func:`train` does for data and tokenizer.
    """
    data, shares, tags, tokenizer, encoder = _prepare(options)
    encoded = encode(data["train"], encoder, tags, options.window)
    words = {
        number: iter(_texts(encoded.documents[number].text, encoded.words[number]))
        for number in range(min(n, len(encoded.documents)))
    }
    shown = []
    for owner, item in zip(encoded.owner, encoded.inputs, strict=True):
        if owner not in words:
            break
        names = tokenizer.convert_ids_to_tokens(item["input_ids"])
        rows = []
        for name, mark in zip(names, item["labels"], strict=True):
            labelled = mark != IGNORED
            rows.append(
                Labelled(name, next(words[owner]) if labelled else None, tags[mark] if labelled else None, mark)
            )
        shown.append(tuple(rows))
    weights = class_weights(encoded, len(tags), shares)
    return Inspection(tuple(shown), dict(zip(tags, weights.tolist(), strict=True)))


def _texts(text: str, offsets: Ints) -> list[str]:
    return [text[start:end] for start, end in offsets.tolist()]


# ---------------------------------------------------------------------------------------------------------------------
# What goes in


def resolve_precision(precision: str) -> str:
    """The number format of training: ``auto`` is bf16 where the device is faster in it, else fp16 on CUDA, else fp32.

    Intel's processors are faster by AMX alone: with AVX512-BF16 and without AMX, as in some virtual machines, a step
    of a BERT takes 1.5 to 1.7 times as long in bf16 as in fp32 (two cores of an Emerald Rapids).

    Raises :class:`UsageError` for fp16 on a CPU, where it is slower than fp32.
    """
    cuda = torch.cuda.is_available()
    if precision == "fp16" and not cuda:
        raise UsageError("precision fp16 needs a CUDA device; use bf16 or fp32")
    if precision != "auto":
        return precision
    if cuda:
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    able = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    by_avx = able.get("avx512_bf16") and not str(able.get("cpu_name")).startswith("Intel")
    return "bf16" if by_avx or able.get("amx_bf16") or able.get("bf16") else "fp32"


def _prepare(
    options: TrainOptions,
) -> tuple[dict[str, list[Document]], list[float], list[str], Any, windows.WordTokenizer]:
    """Documents by split, the share of the loss that the labels of each of train have beside teachers, tags by class
    index, transformers' tokenizer and ours.
    """
    for name in options.data:
        if _expanded(name).is_file():
            raise InputError(
                f"{name}: one file would be learnt from and scored on alike; name a directory with a file for each\n"
                "split, such as train.jsonl and devel.jsonl, or pass it as --silver beside one"
            )
    data = {
        split: [
            document
            for name in options.data
            for document in datasets.load(name, split, options.labels)[: options.max_documents]
        ]
        for split in ("train", "devel")
    }
    shares = [1 - options.teacher_weight if options.teachers else 1.0] * len(data["train"])
    for share, documents in (
        (1.0, [document for name in options.silver for document in datasets.load(name, "train", options.labels)]),
        (0.0, [Document(given, text, ()) for given in options.unlabelled for text in sources.texts(given)]),
    ):
        data["train"] += documents
        shares += [share] * len(documents)
    labels = datasets.labels_of(data["train"])
    if not labels:
        raise InputError(f"{', '.join(options.data)}: the train split has no labelled span")
    if options.max_documents is None and not datasets.labels_of(data["devel"]):
        raise InputError(f"{', '.join(options.data)}: the devel split has no labelled span, so it can choose no epoch")
    unseen = sorted(set(datasets.labels_of(data["devel"])) - set(labels))
    if unseen and options.max_documents is None:
        raise InputError(f"{', '.join(options.data)}: devel has the label {unseen[0]}, which train has not; rename it")
    tags = ["O", *(f"{prefix}-{label}" for label in labels for prefix in "BI")]
    # Of a slice, devel may hold labels that the model does not know; they cannot be scored.
    data["devel"] = [replace(d, spans=tuple(s for s in d.spans if s[2] in labels)) for d in data["devel"]]
    tokenizer = load_tokenizer(options.base)
    encoder = windows.WordTokenizer(tokenizer.backend_tokenizer.to_str())
    return data, shares, tags, tokenizer, encoder


def _expanded(name: str) -> Path:
    """The path with its user's home directory; without it where there is no such user."""
    return Path(os.path.expanduser(name))  # noqa: PTH111 - Path.expanduser raises


@contextmanager
def _base_errors(base: str) -> Any:
    """Silence the loader's advice about the new head, and turn its errors into one line."""
    if _expanded(base).exists() and not (_expanded(base) / "config.json").is_file():
        raise ModelError(f"{base}: no config.json in it; name the directory of a checkpoint")
    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        yield
    except MednerError:
        raise
    except Exception as error:  # transformers, tokenizers, torch and safetensors raise what they like
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise ModelError(
            f"{base}: cannot be loaded as a base model ({reason[:200].rstrip('.')});\n"
            "name a checkpoint directory, or a hub model where the network allows it"
        ) from error
    finally:
        transformers.logging.set_verbosity(level)


def load_tokenizer(base: str) -> Any:
    """The fast tokenizer of a checkpoint directory or hub name, with the case that its vocabulary has.

    transformers puts all text into small letters for a BERT whose ``tokenizer_config.json`` is missing or does not say
    ``do_lower_case``. Bio_ClinicalBERT, BioBERT and SciBERT are such, though they were pre-trained on cased text
    (github.com/EmilyAlsentzer/clinicalBERT/issues/26); there the case is kept, and standard error says so. Raises
    :class:`ModelError`.
    """
    path = str(_expanded(base))
    load = partial(AutoTokenizer.from_pretrained, path, use_fast=True, trust_remote_code=False)
    with _base_errors(base):
        tokenizer = load()
        if not tokenizer.is_fast:
            raise ModelError(f"{base}: has no fast tokenizer; a tokenizer.json is needed")
        if _loses_capitals(tokenizer) and "do_lower_case" not in get_tokenizer_config(path):
            cased = load(do_lower_case=False)
            if not _loses_capitals(cased):
                tqdm.write(
                    f"{base}: capitals are kept; its vocabulary has them, and no setting says otherwise",
                    file=sys.stderr,
                )
                return cased
    return tokenizer


def _loses_capitals(tokenizer: Any) -> bool:
    """Whether one in a hundred or more of its words can never be found, for they have capitals, which text loses."""
    normalizer = tokenizer.backend_tokenizer.normalizer
    if normalizer is None or normalizer.normalize_str("A") != "a":
        return False
    vocabulary: set[str] = tokenizer.get_vocab().keys() - set(tokenizer.all_special_tokens)
    return 100 * sum(word != word.lower() for word in vocabulary) >= len(vocabulary) > 0


def _load_model(base: str, tags: Sequence[str], tokenizer: Any) -> Any:
    """The base with a head for the tags: its own where it was trained for the same tags in their order, else a new one.

    Raises :class:`ModelError`, also for a base whose weights do not fill its encoder, or not all of its tokenizer's
    tokens.
    """
    path = str(_expanded(base))
    with _base_errors(base):
        own = AutoConfig.from_pretrained(path, trust_remote_code=False).id2label
        config = AutoConfig.from_pretrained(
            path,
            output_hidden_states=False,  # a base may ask for them; the Trainer takes each output for logits
            output_attentions=False,
            num_labels=len(tags),
            id2label=dict(enumerate(tags)),
            label2id={tag: i for i, tag in enumerate(tags)},
            trust_remote_code=False,
        )
        model, loading = AutoModelForTokenClassification.from_pretrained(
            path,
            config=config,
            dtype=torch.float32,
            # On a CPU the plain attention trains faster than the fused one.
            attn_implementation=None if torch.cuda.is_available() else "eager",
            ignore_mismatched_sizes=True,  # a head for another number of labels
            trust_remote_code=False,
            output_loading_info=True,
        )
    # transformers fills what it does not find with random numbers and goes on.
    new = {*loading["missing_keys"], *loading["mismatched_keys"]}
    encoder = f"{model.base_model_prefix}."
    if lost := sorted(name for name in new if name.startswith(encoder)):
        others = f" and {len(lost) - 1} more" if len(lost) > 1 else ""
        raise ModelError(
            f"{base}: its weights do not fit its config.json: no {lost[0]}{others}, or of another shape;\n"
            "name a checkpoint that transformers wrote"
        )
    n_tokens = len(model.get_input_embeddings().weight)
    if (last := max(tokenizer.get_vocab().values())) >= n_tokens:
        raise ModelError(
            f"{base}: its tokenizer has a token {last}, and its model {n_tokens} tokens; they do not belong together"
        )
    if not new and [own.get(number) for number in range(len(own))] != list(tags):
        for name, part in model.named_modules():  # as transformers fills a head that is not there
            if isinstance(part, torch.nn.Linear) and part.out_features == len(tags) and not name.startswith(encoder):
                torch.nn.init.normal_(part.weight, std=getattr(config, "initializer_range", 0.02))
                torch.nn.init.zeros_(part.bias)
    return model


def _check_window(window: int, config: Any, tokenizer: Any) -> None:
    limit = min(bundle.positions(config.to_dict()) or sys.maxsize, tokenizer.model_max_length)
    least = bundle.LEAST_WINDOW
    if not least <= window <= limit:
        raise UsageError(f"window {window}: this model takes {least} to {limit} tokens")


def _claim(
    options: TrainOptions, precision: str, data: Mapping[str, Sequence[Document]], tokenizer: Any
) -> Path | None:
    """Make the output directory or check that it holds this training; its last whole checkpoint if there is one."""
    wanted = {
        **{name: value for name, value in _plain_options(options).items() if name != "output"},
        "precision": precision,
        "versions": _versions(),
        **{f"sha256 of {split}": _digest(documents) for split, documents in data.items()},
        "sha256 of the base": _digest_of_files(_expanded(options.base)),
        "sha256 of the tokenizer": hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest(),
        **{
            f"sha256 of {other}": _digest_of_files(_expanded(other))
            for other in (*options.teachers, *options.average_with)
        },
    }
    note = options.output / "checkpoints" / "options.json"
    try:
        if not options.output.exists() or not any(options.output.iterdir()):
            note.parent.mkdir(parents=True, exist_ok=True)
            _write_json(note, wanted)
            return None
        if not options.resume:
            raise OutputError(f"{options.output}: is not empty; resume the training in it or name a new directory")
        if not note.is_file():
            raise OutputError(f"{options.output}: holds no training to resume; name a new directory")
        found = json.loads(note.read_text(encoding="utf-8"))
        changed = next((name for name in wanted if found.get(name) != wanted[name]), None)
        if changed:
            raise OutputError(
                f"{options.output}: {changed} was {found.get(changed)} and is now {wanted[changed]}; "
                "resume with what it began with, or name a new directory"
            )
    except OSError as error:
        raise OutputError(f"{options.output}: cannot be written ({error.strerror})") from error
    whole = filter(_is_whole, note.parent.glob("checkpoint-*"))
    return max(whole, key=lambda path: int(path.name.rpartition("-")[2]), default=None)


def _is_whole(checkpoint: Path) -> bool:
    """Whether the Trainer's checkpoint was neither cut off nor damaged since, as far as its files' own ends tell."""
    try:
        json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
        with safe_open(checkpoint / "model.safetensors", "pt"):
            pass
    except (OSError, ValueError, SafetensorError):
        return False
    states = [*checkpoint.glob("*.pt"), *checkpoint.glob("*.pth")]
    there = {path.name for path in states}
    return {"optimizer.pt", "scheduler.pt"} <= there and all(map(zipfile.is_zipfile, states))


@contextmanager
def _output_errors(output: Path) -> Iterator[None]:
    """What cannot be written is an :class:`OutputError`, whichever library writes it."""
    try:
        yield
    except BrokenPipeError:  # of standard error
        raise
    except (OSError, SafetensorError, RuntimeError) as error:
        if not isinstance(error, OSError) and not _WRITER.search(str(error)):
            raise
        reason = getattr(error, "strerror", None) or next(iter(str(error).splitlines()), type(error).__name__)[:200]
        raise OutputError(f"{output}: cannot be written ({reason}); go on with --resume once it can") from error


#: By which errors of the writers of safetensors and of PyTorch are known.
_WRITER = re.compile("Error while serializing|PytorchStreamWriter|iostream error|unexpected pos")


def _digest(documents: Iterable[Document]) -> str:
    """SHA-256 of the documents' texts and spans."""
    digest = hashlib.sha256()
    for document in documents:
        digest.update(json.dumps([document.text, document.spans]).encode("ascii"))
    return digest.hexdigest()


def _digest_of_files(checkpoint: Path) -> str:
    """SHA-256 of the settings and weights in a directory; of nothing for a hub name."""
    digest = hashlib.sha256()
    for pattern in ("config.json", "*.safetensors", "*.bin"):
        for path in sorted(checkpoint.glob(pattern)):
            digest.update(bundle.sha256_of(path).encode("ascii"))
    return digest.hexdigest()


# ---------------------------------------------------------------------------------------------------------------------
# Training


class _Trainer(Trainer):  # type: ignore[misc]
    """The Trainer with our loss and layers, and devel windows in batches of similar length in a fixed order."""

    def __init__(
        self,
        *args: Any,
        weights: npt.NDArray[np.float64] | None,
        smoothing: float,
        layer_decay: float,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self._weights = None if weights is None else torch.tensor(weights, dtype=torch.float32)
        self._smoothing = smoothing
        self._layer_decay = layer_decay

    def _sorted_checkpoints(self, output_dir: Any = None, checkpoint_prefix: str = "checkpoint", **_: Any) -> Any:
        """From the first epoch's to the last's; by the times of files, which copies may not keep, the Trainer would."""
        return super()._sorted_checkpoints(output_dir, checkpoint_prefix, use_mtime=False)

    def _load_best_model(self) -> None:
        """Load the best epoch's weights; the Trainer only warns where they are gone, and leaves those of the last."""
        best = Path(self.state.best_model_checkpoint)
        if not _is_whole(best):
            raise OutputError(f"{best}: the best epoch's weights are gone; restore them, or name a new directory")
        super()._load_best_model()

    def create_optimizer(self) -> Any:
        """The Trainer's own optimizer, with a learning rate for each layer where that is asked for."""
        if self._layer_decay < 1:
            kind, given = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            decayed = set(self.get_decay_parameter_names(self.model))
            groups = layer_groups(
                self.model.named_parameters(),
                decayed,
                self.args.learning_rate,
                self._layer_decay,
                self.args.weight_decay,
            )
            self.optimizer = kind(groups, **given)
        return super().create_optimizer()

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Cross entropy over labelled tokens: weighted by class, smoothed and shared with teachers as was asked for."""
        if self._weights is None and not self._smoothing and "soft" not in inputs:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        outputs = model(**{name: inputs[name] for name in ("input_ids", "attention_mask") if name in inputs})
        logits = outputs.logits.float()
        rows, labels = logits.view(-1, logits.shape[-1]), inputs["labels"].view(-1)
        by_labels = {
            "weight": None if self._weights is None else self._weights.to(logits.device),
            "label_smoothing": self._smoothing if model.training else 0.0,
            "ignore_index": IGNORED,
        }
        if "soft" not in inputs:
            loss = torch.nn.functional.cross_entropy(rows, labels, **by_labels)
        else:
            known = labels != IGNORED
            hard = inputs["hard"][:, None].expand(inputs["labels"].shape).reshape(-1)[known]
            soft = inputs["soft"].view(-1, logits.shape[-1])[known].float()
            each = torch.nn.functional.cross_entropy(rows[known], labels[known], reduction="none", **by_labels)
            taught = -(soft * rows[known].log_softmax(dim=-1)).sum(dim=-1)
            loss = (hard * each + (1 - hard) * taught).mean()
        return (loss, outputs) if return_outputs else loss

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """Batches in the order given; with length grouping the Trainer would shuffle devel as well."""
        rows = self.eval_dataset if eval_dataset is None else eval_dataset
        loader = DataLoader(rows, batch_size=self.args.eval_batch_size, collate_fn=self.data_collator)
        return self.accelerator.prepare(loader)


_LAYER = re.compile(r"\.(?:layers?|h|blocks?)\.(\d+)\.")
#: Names of embeddings that do not say so: those of GPT-2 and T5.
_EMBEDDINGS = re.compile(r"embed|\.wte\.|\.wpe\.|\.shared\.")


def layer_groups(
    parameters: Iterable[tuple[str, Any]], decayed: Set[str], lr: float, layer_decay: float, weight_decay: float
) -> list[dict[str, Any]]:
    """Groups of an optimizer's parameters, with a learning rate for each layer; weight decay for those in ``decayed``.

    What stands above the layers (the head) has ``lr``, the last layer ``lr * layer_decay`` and so on down to the
    embeddings, which stand below the first. Raises :class:`UsageError` where no parameter's name tells its layer.
    """
    named = [(name, parameter) for name, parameter in parameters if parameter.requires_grad]
    numbers = {name: int(match.group(1)) for name, _ in named if (match := _LAYER.search(name))}
    if not numbers:
        raise UsageError(f"layer_decay {layer_decay}: the model's parameters do not tell their layers; leave it out")
    n_layers = 1 + max(numbers.values())
    groups: dict[tuple[int, bool], list[Any]] = {}
    for name, parameter in named:
        # A layer may have embeddings of its own.
        below = n_layers - numbers[name] if name in numbers else n_layers + 1 if _EMBEDDINGS.search(name) else 0
        groups.setdefault((below, name in decayed), []).append(parameter)
    return [
        {"params": members, "lr": lr * layer_decay**below, "weight_decay": weight_decay if decays else 0.0}
        for (below, decays), members in sorted(groups.items(), key=lambda item: item[0])
    ]


class _BestIsHere(TrainerCallback):  # type: ignore[misc]
    """Finds the best epoch of a training that goes on where the others are: its state has the path of before."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        """Name it by its step, in the directory of now."""
        if state.best_global_step:
            state.best_model_checkpoint = str(Path(args.output_dir) / f"checkpoint-{state.best_global_step}")


class _EpochLines(TrainerCallback):  # type: ignore[misc]
    """One line an epoch on standard error."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:  # noqa: ARG002
        """Print the epoch's figures once its evaluation is there; the untrained model's has no epoch."""
        if "eval_f1" not in logs or "epoch" not in logs:
            return
        loss = next((entry["loss"] for entry in reversed(state.log_history) if "loss" in entry), float("nan"))
        tqdm.write(
            f"epoch {logs['epoch']:.0f}: training loss {loss:.4f}, devel precision {logs['eval_precision']:.4f}, "
            f"recall {logs['eval_recall']:.4f}, F1 {logs['eval_f1']:.4f}",
            file=sys.stderr,
        )


class _Bar(ProgressCallback):  # type: ignore[misc]
    """The Trainer's live bar without its dictionaries on standard output."""

    def on_log(self, *_: Any, **__: Any) -> None:
        """Print nothing; the epoch's line says it."""


def device_arguments(batch_size: int, *, cuda: bool) -> dict[str, Any]:
    """What the Trainer gets so that a device does not wait: see ``transformers.TrainingArguments``.

    A GPU's batches are put together by two processes ahead of it, and devel goes through it in larger ones. On a CPU
    such processes would take time from the training itself.
    """
    return {
        "per_device_eval_batch_size": batch_size * (32 if cuda else 4),
        "dataloader_pin_memory": cuda,
        "dataloader_num_workers": 2 if cuda else 0,
        "dataloader_persistent_workers": cuda,
    }


def _trainer(
    options: TrainOptions,
    precision: str,
    model: Any,
    encoded: Mapping[str, Encoded],
    pad_id: int,
    tags: Sequence[str],
    weights: npt.NDArray[np.float64] | None,
) -> _Trainer:
    cuda = torch.cuda.is_available()
    arguments = TrainingArguments(
        output_dir=str(options.output / "checkpoints"),
        num_train_epochs=options.epochs,
        learning_rate=options.lr,
        per_device_train_batch_size=options.batch_size,
        weight_decay=options.weight_decay,
        warmup_ratio=options.warmup_ratio,
        lr_scheduler_type="linear",
        seed=options.seed,
        data_seed=options.seed,
        bf16=precision == "bf16",
        fp16=precision == "fp16",
        use_cpu=not cuda,
        **device_arguments(options.batch_size, cuda=cuda),
        group_by_length=True,
        remove_unused_columns=False,
        label_names=["labels"],
        eval_strategy="epoch",
        save_strategy="epoch",
        logging_strategy="epoch",
        save_total_limit=options.average + 1,  # the best one stays, too
        load_best_model_at_end=True,
        metric_for_best_model="f1",
        greater_is_better=True,
        report_to=[],
        disable_tqdm=False,
    )
    devel = encoded["devel"]
    order = sorted(range(len(devel.inputs)), key=lambda i: len(devel.inputs[i]["input_ids"]))
    back = np.argsort(order)
    trainer = _Trainer(
        model=model,
        args=arguments,
        train_dataset=encoded["train"].inputs,
        eval_dataset=[devel.inputs[i] for i in order],
        # A closure could not be sent to the loader's processes.
        data_collator=partial(_collate, pad_id=pad_id, window=options.window),
        preprocess_logits_for_metrics=lambda logits, _: logits.argmax(dim=-1),
        compute_metrics=lambda output: _strict(devel, np.asarray(output.predictions)[back], tags),
        weights=weights,
        smoothing=options.label_smoothing,
        layer_decay=options.layer_decay,
    )
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(_BestIsHere())
    trainer.add_callback(_EpochLines())
    if sys.stderr.isatty():
        trainer.add_callback(_Bar())
    return trainer


def _teach(
    options: TrainOptions,
    encoded: Encoded,
    shares: Sequence[float],
    encoder: windows.WordTokenizer,
    tags: Sequence[str],
    precision: str,
) -> None:
    """Add the teachers' mean probabilities to the windows. shares: what a document's labels count for in the loss.

    A teacher reads each segment in a window of its own, whatever stands beside it in the windows that are learnt from:
    so a word's probabilities are the same in both, and windows packed with neighbours learn to answer as single ones.
    """
    apart = encode(encoded.documents, encoder, tags, options.window, packed=False)
    total = np.zeros((sum(map(len, encoded.words)), len(tags)), np.float32)
    for teacher in options.teachers:
        order = _tags_of(_load_config(teacher))
        found = _probabilities(teacher, apart, encoder.pad_id, precision)
        total += found[:, [order.index(tag) for tag in tags]] / len(options.teachers)
    # The words of all documents stand in one order, however they are cut into windows.
    done = 0
    for item, owner in zip(encoded.inputs, encoded.owner, strict=True):
        labelled = np.array(item["labels"]) != IGNORED
        item["soft"] = np.zeros((len(labelled), len(tags)), np.float16)
        item["soft"][labelled] = total[done : done + labelled.sum()]
        item["hard"] = shares[owner]
        done += int(labelled.sum())


def _check_other(other: str, options: TrainOptions, tags: Sequence[str], tokenizer: Any) -> None:
    """Raise :class:`ModelError` where a teacher, or a checkpoint to average with, has other tokens or tags than the
    data's, or no weights; :class:`UsageError` for the window.
    """
    own, config = load_tokenizer(other), _load_config(other)
    if own.get_vocab() != tokenizer.get_vocab() or _rules(own) != _rules(tokenizer):
        what = "a teacher" if other in options.teachers else "a mean of weights"
        raise ModelError(f"{other}: has another tokenizer than {options.base}; {what} needs the same")
    if sorted(_tags_of(config)) != sorted(tags):
        raise ModelError(f"{other}: knows the tags {', '.join(_tags_of(config))}, and the data {', '.join(tags)}")
    if _expanded(other).is_dir() and not evaluate.holds_weights(_expanded(other)):
        raise ModelError(f"{other}: holds no weights of PyTorch, which a bundle has not; name a checkpoint")
    _check_window(options.window, config, own)


def _rules(tokenizer: Any) -> list[Any]:
    """How a tokenizer changes and cuts text before it looks up words, and the special tokens around a window."""
    text = tokenizer.backend_tokenizer.to_str()
    parts, encoder = json.loads(text), windows.WordTokenizer(text)
    return [parts["normalizer"], parts["pre_tokenizer"], encoder.prefix, encoder.suffix]


def _load_config(checkpoint: str) -> Any:
    with _base_errors(checkpoint):
        return AutoConfig.from_pretrained(str(_expanded(checkpoint)), trust_remote_code=False)


def _tags_of(config: Any) -> list[str]:
    return [config.id2label[i] for i in range(len(config.id2label))]


def _probabilities(checkpoint: str, encoded: Encoded, pad_id: int, precision: str) -> npt.NDArray[np.float32]:
    """A model's probabilities for each word, float32 [words, classes]."""
    from medner.pytorch import TorchModel  # here, since it is no part of what training needs otherwise

    device = "cuda:0" if torch.cuda.is_available() else "cpu"
    path = _expanded(checkpoint)
    model = TorchModel(path if path.is_dir() else checkpoint, precision, device, on_hub=not path.is_dir())
    found: list[Any] = [None] * len(encoded.inputs)
    lengths = [len(item["input_ids"]) for item in encoded.inputs]
    batches = list(windows.batches(lengths, _TAUGHT_TOKENS))
    for batch in tqdm(batches, "asking a teacher", disable=None):
        width = max(lengths[i] for i in batch)
        ids = np.full((len(batch), width), pad_id)
        for row, i in enumerate(batch):
            ids[row, : lengths[i]] = encoded.inputs[i]["input_ids"]
        logits = torch.from_numpy(model(ids, np.array([lengths[i] for i in batch])))
        for i, row in zip(batch, logits.softmax(dim=-1).numpy(), strict=True):
            found[i] = row[: lengths[i]][np.array(encoded.inputs[i]["labels"]) != IGNORED]
    return np.concatenate(found)


def _try_average(trainer: _Trainer, options: TrainOptions, best: Epoch) -> dict[str, float]:
    """Scores of the mean of the last epochs' weights; the model keeps them if they are better than the best epoch's."""
    saved = sorted(
        (options.output / "checkpoints").glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2])
    )[-options.average :]
    return _keep_if_better(trainer, mean_weights(saved), "averaged", best.f1)


def _try_average_with(
    trainer: _Trainer, options: TrainOptions, tags: Sequence[str], tokenizer: Any, kept: float
) -> dict[str, float]:
    """Scores of the mean with other checkpoints' weights; the model keeps them if F1 is above that of its own, kept."""
    own = {name: value.detach().cpu() for name, value in trainer.model.named_parameters()}
    others = [_parameters_of(other, trainer.model, tags, tokenizer) for other in options.average_with]
    return _keep_if_better(trainer, _mean([own, *others]), "averaged_with", kept)


def _keep_if_better(trainer: _Trainer, weights: Mapping[str, Any], name: str, least: float) -> dict[str, float]:
    """Scores on devel with other weights, which the model keeps where F1 is above the least."""
    kept = {key: value.clone() for key, value in trainer.model.state_dict().items()}
    trainer.model.load_state_dict(weights, strict=False)
    scores = _scores_of(trainer.evaluate(metric_key_prefix=name), name)
    if scores["f1"] <= least:
        trainer.model.load_state_dict(kept)
    return scores


def _parameters_of(other: str, model: Any, tags: Sequence[str], tokenizer: Any) -> dict[str, Any]:
    """The parameters of a checkpoint to average with a model; :class:`ModelError` where they are not like its own."""
    if _tags_of(_load_config(other)) != list(tags):
        raise ModelError(f"{other}: numbers its tags otherwise than the data; a mean of weights needs the same order")
    found = {name: value.detach() for name, value in _load_model(other, tags, tokenizer).named_parameters()}
    if {name: value.shape for name, value in found.items()} != {
        n: value.shape for n, value in model.named_parameters()
    }:
        raise ModelError(
            f"{other}: is built otherwise than the base; a mean of weights needs models that came from one"
        )
    return found


def mean_weights(checkpoints: Sequence[Path]) -> dict[str, Any]:
    """The mean of the weights of checkpoints that are of one training, or started from one (Wortsman et al. 2022)."""
    return _mean([load_file(checkpoint / "model.safetensors") for checkpoint in checkpoints])


def _mean(weights: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    return {name: torch.stack([each[name] for each in weights]).mean(dim=0) for name in weights[0]}


def _collate(items: Sequence[Mapping[str, Any]], pad_id: int, window: int) -> dict[str, Any]:
    """One batch of windows, padded on the right, to no more than ``window`` tokens."""
    length = min(windows.padded_length(max(len(item["input_ids"]) for item in items)), window)
    ids = torch.full((len(items), length), pad_id)
    mask = torch.zeros((len(items), length), dtype=torch.long)
    labels = torch.full((len(items), length), IGNORED)
    for row, item in enumerate(items):
        n = len(item["input_ids"])
        ids[row, :n] = torch.tensor(item["input_ids"])
        mask[row, :n] = 1
        labels[row, :n] = torch.tensor(item["labels"])
    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    if "soft" in items[0]:
        batch["hard"] = torch.tensor([item["hard"] for item in items])
        batch["soft"] = torch.zeros((len(items), length, items[0]["soft"].shape[1]))
        for row, item in enumerate(items):
            batch["soft"][row, : len(item["soft"])] = torch.from_numpy(item["soft"])
    return batch


def _decode(encoded: Encoded, predicted: Iterable[npt.NDArray[Any]], tags: Sequence[str]) -> list[list[Span]]:
    """Spans of each document in code points, from the class index of each token of each window.

    As in annotation, none crosses a segment's end.
    """
    found: list[list[str]] = [[] for _ in encoded.documents]
    for owner, item, classes in zip(encoded.owner, encoded.inputs, predicted, strict=True):
        marks = np.array(item["labels"])
        found[owner] += [tags[i] for i in classes[: len(marks)][marks != IGNORED].tolist()]
    return [
        [
            (int(words[low + first, 0]), int(words[low + last - 1, 1]), label)
            for low, high in pairwise(segments.tolist())
            for first, last, label in datasets.entities(sequence[low:high])
        ]
        for words, segments, sequence in zip(encoded.words, encoded.segments, found, strict=True)
    ]


#: For gold mentions, which a segment's end does not cut in two.
_ONE_SEGMENT = np.zeros(1, dtype=np.int64)


def _strict(encoded: Encoded, predicted: Iterable[npt.NDArray[Any]], tags: Sequence[str]) -> dict[str, float]:
    """Strict micro precision, recall and F1 by seqeval, on the data set's own tokens, else on words."""
    # By number: seqeval strips hyphens from the ends of a label, and would take CD4- for CD4.
    numbers = {label: number for number, label in enumerate(dict.fromkeys(tag[2:] for tag in tags))}

    def numbered(sequence: Iterable[str]) -> list[str]:
        return [tag if tag == "O" else f"{tag[:2]}{numbers[tag[2:]]}" for tag in sequence]

    gold, found = [], []
    for document, words, spans in zip(encoded.documents, encoded.words, _decode(encoded, predicted, tags), strict=True):
        if document.tokens is None:
            document = replace(document, tokens=tuple((a, b) for a, b in words.tolist()))
            gold.append(numbered(_word_tags(words, document.spans, _ONE_SEGMENT)))  # as they are taught
        else:
            gold.append(numbered(tags_of(document, document.spans)))
        found.append(numbered(tags_of(document, spans)))
    precision, recall, f1, _ = precision_recall_fscore_support(
        gold, found, average="micro", scheme=IOB2, zero_division=0
    )
    return {"precision": float(precision), "recall": float(recall), "f1": float(f1)}


def _find(trainer: _Trainer, encoded: Encoded, tags: Sequence[str]) -> list[tuple[str, ...]]:
    """Spans that the model finds now, as ``text [label]``, for each document."""
    model = trainer.model.eval()
    batch = trainer.data_collator(encoded.inputs)
    del batch["labels"]
    with torch.inference_mode():
        logits = model(**{name: value.to(model.device) for name, value in batch.items()}).logits
    predicted = list(logits.argmax(dim=-1).cpu().numpy())
    return [
        tuple(f"{document.text[start:end]} [{label}]" for start, end, label in spans)
        for document, spans in zip(encoded.documents, _decode(encoded, predicted, tags), strict=True)
    ]


# ---------------------------------------------------------------------------------------------------------------------
# What comes out


def _scores_of(metrics: Mapping[str, float], prefix: str = "eval") -> dict[str, float]:
    return {name: metrics[f"{prefix}_{name}"] for name in ("loss", "precision", "recall", "f1")}


def _epochs(history: Sequence[Mapping[str, Any]]) -> tuple[Epoch, ...]:
    losses = {round(entry["epoch"]): entry["loss"] for entry in history if "loss" in entry}
    scored = {round(entry["epoch"]): entry for entry in history if "eval_f1" in entry}
    return tuple(
        Epoch(n, losses[n], *(scored[n][f"eval_{name}"] for name in ("loss", "precision", "recall", "f1")))
        for n in sorted(losses.keys() & scored.keys())
    )


def _plain_options(options: TrainOptions) -> dict[str, Any]:
    """The options that decide what is trained, for JSON."""
    plain = asdict(options)
    del plain["resume"]
    return (
        plain
        | {name: list(getattr(options, name)) for name in ("data", "silver", "unlabelled", "teachers", "average_with")}
        | {"output": str(options.output)}
    )


def _versions() -> dict[str, str]:
    packages = ("medner", "torch", "transformers", "tokenizers", "accelerate", "seqeval", "numpy")
    return {"python": platform.python_version(), **{name: version(name) for name in packages}}


def _metrics(
    options: TrainOptions,
    precision: str,
    tags: Sequence[str],
    data: Mapping[str, Sequence[Document]],
    encoded: Mapping[str, Encoded],
    weights: npt.NDArray[np.float64] | None,
    result: TrainResult,
) -> dict[str, Any]:
    return {
        "options": _plain_options(options),
        "precision": precision,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "versions": _versions(),
        "window": options.window,
        "tags": list(tags),
        "data": {
            split: {
                "documents": len(documents),
                "spans": sum(len(document.spans) for document in documents),
                "words": sum(len(words) for words in encoded[split].words),
                "windows": len(encoded[split].inputs),
            }
            for split, documents in data.items()
        },
        "class_weights": None if weights is None else dict(zip(tags, weights.tolist(), strict=True)),
        "scoring": "strict entities, seqeval mode strict, IOB2, on the data set's tokens (else on words), "
        "in the precision of training",
        "untrained": dict(result.untrained),
        "epochs": [asdict(epoch) for epoch in result.epochs],
        "best": asdict(result.best),
        "averaged": None if result.averaged is None else dict(result.averaged),
        "averaged_with": None if result.averaged_with is None else dict(result.averaged_with),
        "samples": [
            {"text": text, "before": list(before), "after": list(after)} for text, before, after in result.samples
        ],
        "seconds": round(result.seconds, 1),
        "windows_per_second": round(result.windows_per_second, 1),
    }


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    draft = path.with_name(path.name + ".tmp")
    # JSON has no NaN, which is the loss of a batch without a labelled token.
    value = json.loads(json.dumps(value), parse_constant=lambda _: None)
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    # A path in it may be no valid Unicode.
    draft.write_text(text, encoding="utf-8", errors="backslashreplace")
    draft.replace(path)


def _draw(result: TrainResult, path: Path) -> None:
    """Draw training loss and devel F1 by epoch, without a display."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    numbers = [epoch.epoch for epoch in result.epochs]
    losses = figure.add_subplot()
    losses.set(xlabel="epoch", ylabel="training loss", xticks=numbers)
    scores = losses.twinx()
    scores.set(ylabel="devel F1 (strict)", ylim=(0, 1))
    lines = [
        *losses.plot(numbers, [epoch.training_loss for epoch in result.epochs], "o-", color="tab:orange"),
        *scores.plot([0, *numbers], [result.untrained["f1"], *(e.f1 for e in result.epochs)], "s-", color="tab:blue"),
        scores.axvline(result.best.epoch, color="tab:blue", linestyle=":", linewidth=1),
    ]
    losses.legend(lines, ["training loss", "devel F1 (0: untrained)", "best epoch"], loc="center right")
    figure.savefig(path, dpi=120)


def _listed(spans: Sequence[str]) -> str:
    return ", ".join(spans) or "none"
