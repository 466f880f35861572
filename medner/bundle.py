"""The model directory: which files it holds, their hashes, its labels and its window.

A bundle is data, and may come from anyone. Nothing in it is executed, its files are named by :class:`Bundle` alone, and
a file that ``medner.json`` lists is used only if its SHA-256 is the recorded one. Every file is a regular one that lies
in the directory; a link may lead to another file there, and in a snapshot of the Hugging Face cache to the ``blobs``
beside it. Sizes, labels and windows are bounded, so that a file of absurd values ends in one line.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import re
import stat
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any

from medner import graphfile
from medner.errors import DeviceError, ModelError, UsageError

FORMAT_VERSION = 1
MANIFEST = "medner.json"

#: Where each precision's graph lies, in the layout that the Hugging Face ecosystem uses for ONNX models.
VARIANT_FILES = {"fp32": "onnx/model.onnx", "fp16": "onnx/model_fp16.onnx", "int8": "onnx/model_int8.onnx"}

#: Precisions in the order in which ``auto`` looks for them.
PREFERRED = {"cpu": ("int8", "fp32", "fp16"), "cuda": ("fp16", "fp32", "int8")}

#: The window of a model that does not say which one it was validated with (see :func:`load`).
FOREIGN_WINDOW = 128

_SHIPPED = Path(__file__).parent / "bundles"
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")

#: Bytes: of settings, of any file but a graph, such as ``tokenizer.json``, and of a graph, which is a protocol buffer.
_MAX_JSON, _MAX_FILE, _MAX_GRAPH = 16 * 2**20, 64 * 2**20, 2**31
#: Tokens of the longest window that anyone can ask for, whatever a model says; attention grows with its square.
_MAX_WINDOW = 2**16
#: And of the shortest.
LEAST_WINDOW = 8
#: Labels, and characters of one.
_MAX_LABELS, _MAX_NAME = 10_000, 200
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class Variant:
    """One precision of a bundle: the graph's path relative to the bundle, and its SHA-256 (hex).

    bytes: its size together with that of the files in ``data``. data: SHA-256 by path of the files that hold weights
    outside the graph, as ONNX allows.
    """

    file: str
    sha256: str
    bytes: int
    data: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Bundle:
    """A model directory, read but not loaded.

    labels: the model's classes in the order of its outputs. window: tokens a window may have, special tokens included.
    packed: whether a window holds as many segments as fit, or one.
    files: SHA-256 of every other file that is used. foreign: true without ``medner.json``. card: the rest of
    ``medner.json`` (parity, training, scores, licence), empty for a foreign model. min_score: spans below it are left
    out where nobody asks for another.
    """

    path: Path
    name: str
    labels: tuple[str, ...]
    window: int
    packed: bool
    variants: Mapping[str, Variant]
    files: Mapping[str, str]
    foreign: bool
    card: Mapping[str, Any] = field(default_factory=dict)
    min_score: float = 0.0

    def tokenizer_json(self) -> str:
        """Text of ``tokenizer.json``."""
        return (self.path / "tokenizer.json").read_text(encoding="utf-8")

    def variant(self, precision: str, device: str) -> tuple[str, Path]:
        """The precision that runs and its graph, its hash checked.

        precision: ``auto`` or a key of :data:`VARIANT_FILES`; device: ``cpu`` or ``cuda``. Raises
        :class:`ModelError` where the bundle lacks the variant or the file is not the recorded one.
        """
        wanted = PREFERRED[device] if precision == "auto" else (precision,)
        for name in wanted:
            if name in self.variants:
                _check_variant(self.path, self.variants[name])
                return name, self.path / self.variants[name].file
        kind = DeviceError if device == "cuda" else ModelError
        raise kind(
            f"{self.name}: no {precision} variant (it has {', '.join(self.variants)}); make one with: "
            f"medner export CHECKPOINT -o BUNDLE --precision {precision} --parity-data FILE"
        )

    def check(self) -> None:
        """Check the hash of every file, all variants included; raises :class:`ModelError`."""
        for name, digest in self.files.items():
            _check_hash(self.path, name, digest, _MAX_FILE)
        for variant in self.variants.values():
            _check_variant(self.path, variant)

    def identity(self, precision: str) -> dict[str, str]:
        """SHA-256 by file name of all that decides the spans: the graph of one precision, tokenizer and settings."""
        graph = self.variants[precision]
        return {**dict(sorted(self.files.items())), **dict(sorted(graph.data.items())), graph.file: graph.sha256}


def load(model: str | Path, window: int | None = None) -> Bundle:
    """Read a bundle or a foreign model.

    model: a directory, the name of a bundle that ships with medner (``default``; a directory of that name is
    ``./default``), or ``organization/name`` on the Hugging Face hub. window: overrides the recorded one; a foreign
    model's is ``min(128, the model's limit)``.
    Raises :class:`ModelError`.
    """
    with _readable(str(model)):
        path, name = _locate(model)
        bundle = _own(path, name) if os.path.lexists(path / MANIFEST) else _foreign(path, name)
    return resized(bundle, bundle.window if window is None else window)


@contextmanager
def _readable(model: str) -> Iterator[None]:
    """What the system says of a path is the model's error."""
    try:
        yield
    except OSError as exc:
        raise ModelError(f"{exc.filename or model}: cannot be read ({exc.strerror or exc})") from exc


def resized(bundle: Bundle, window: int, *, packed: bool | None = None) -> Bundle:
    """The bundle with another window; raises :class:`ModelError` beyond the model's limit."""
    limit = _position_limit(bundle.path, tokenizer_config=bundle.foreign or _TOKENIZER_CONFIG in bundle.files)
    checked = _check_window(window, limit, bundle.name)
    return replace(bundle, window=checked, packed=bundle.packed if packed is None else packed)


def _check_window(window: int, limit: int, name: str) -> int:
    if not LEAST_WINDOW <= window <= limit:
        raise ModelError(
            f"{name}: a window of {window} tokens lies outside {LEAST_WINDOW} to {limit}, the model's limit"
        )
    return window


def load_checkpoint(checkpoint: str | Path, window: int | None = None) -> Bundle:
    """Describe a PyTorch checkpoint, as :func:`load` does a bundle; it has no variants.

    Its window is the one that ``medner train`` recorded in ``metrics.json``, else a foreign model's.
    """
    path = Path(checkpoint)
    with _readable(str(path)):
        if not path.is_dir():
            raise ModelError(f"{path}: no such checkpoint directory")
        files = _foreign_files(path)
        limit = _position_limit(path)
    if window is None:
        window = _recorded_window(path)
        if window is None:
            window = min(FOREIGN_WINDOW, limit)
    window = _check_window(window, limit, path.name)
    return Bundle(path, path.name, _labels_of(path), window, True, {}, files, True)


def _recorded_window(path: Path) -> int | None:
    try:
        window = (recorded_training(path) or {})["options"]["window"]
    except (LookupError, TypeError):
        return None
    return window if type(window) is int else None


def recorded_training(checkpoint: Path) -> dict[str, Any] | None:
    """What ``medner train`` recorded; None without that, though another program may have a file of that name."""
    try:
        found = json.loads((checkpoint / "metrics.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def weight_hashes(checkpoint: Path) -> dict[str, str]:
    """SHA-256 of :func:`weight_files`, by name; none for a hub's name. Raises :class:`ModelError`."""
    with _readable(str(checkpoint)):
        return {path.name: sha256_of(path) for path in weight_files(checkpoint)}


def weight_files(checkpoint: Path) -> list[Path]:
    """The files of a PyTorch checkpoint that transformers takes the weights from, sorted."""
    return sorted(checkpoint.glob("model*.safetensors")) or sorted(checkpoint.glob("pytorch_model*.bin"))


def _locate(given: str | Path) -> tuple[Path, str]:
    """The directory of a model, and its name. What ships goes before a directory of its name, else :func:`reference`
    would mean another model elsewhere; ``./default``, or a :class:`Path`, is the directory.
    """
    model, path = str(given), Path(given)
    if isinstance(given, str) and ships(given):
        return _SHIPPED / model, model
    if os.path.isdir(path):  # noqa: PTH112 - Path.is_dir raises below what may not be searched
        return path, path.name or model
    if path.exists():
        raise ModelError(f"{model}: a model is a directory with config.json, tokenizer.json and an ONNX graph")
    if _HUB_NAME.fullmatch(model) and not os.path.isdir(os.path.dirname(model)):  # noqa: PTH112, PTH120
        return _from_hub(model), model
    raise ModelError(f"{model}: no such model directory; shipped with medner: {', '.join(_shipped_names()) or 'none'}")


def ships(model: str) -> bool:
    """Whether a model of that name ships with medner."""
    # Not Path.is_file, which raises for names that no file can have.
    return "/" not in model and os.path.isfile(_SHIPPED / model / MANIFEST)  # noqa: PTH113


def reference(path: Path) -> str:
    """What :func:`load` takes in any directory: the name of a model that ships with medner, else the absolute path."""
    return path.name if path.parent == _SHIPPED else str(path.absolute())


def _shipped_names() -> list[str]:
    return sorted(p.name for p in _SHIPPED.iterdir()) if _SHIPPED.is_dir() else []


def _from_hub(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        patterns = ["*.json", "*.onnx", "*.onnx_data*", "onnx/*", "README.md"]
        return Path(snapshot_download(name, allow_patterns=patterns))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as exc:
        raise ModelError(
            f"{name}: no such directory, and not found on the Hugging Face hub ({type(exc).__name__}); "
            "download it where there is a network and pass its directory"
        ) from exc


def _own(path: Path, name: str) -> Bundle:
    card = _read_json(path, MANIFEST)
    if card.get("format_version") != FORMAT_VERSION:
        raise ModelError(
            f"{path / MANIFEST}: format version {_shown(card.get('format_version'))} is not {FORMAT_VERSION}; "
            "use the medner release that wrote it"
        )
    try:
        labels, window, packed = card["labels"], _integer(card["window"]), {True: True, False: False}[card["packed"]]
        variants = {precision: _own_variant(precision, entry) for precision, entry in card["variants"].items()}
        files = {_plain_path(key): _digest(value) for key, value in card["files"].items()}
        title, min_score = _plain_name(card.get("name", name)), _share(card.get("min_score", 0.0))
    except (KeyError, TypeError, ValueError, AttributeError) as exc:
        raise ModelError(f"{path / MANIFEST}: not a bundle description ({type(exc).__name__} {_shown(exc)})") from exc
    if missing := {"config.json", "tokenizer.json"} - files.keys():
        raise ModelError(f"{path / MANIFEST}: lists no {' or '.join(sorted(missing))}")
    for file, digest in files.items():
        _check_hash(path, file, digest, _MAX_FILE)
    rest = {key: value for key, value in card.items() if key not in _OWN_KEYS}
    files[MANIFEST] = sha256_of(path / MANIFEST)
    known = _check_labels(labels, path / MANIFEST)
    return Bundle(path, title, known, window, packed, variants, files, False, rest, min_score)


def _own_variant(precision: str, entry: Mapping[str, Any]) -> Variant:
    """Read the record of a variant; what it raises, :func:`_own` translates."""
    file, digest, size = VARIANT_FILES[precision], _digest(entry["sha256"]), _integer(entry["bytes"])
    return Variant(
        file, digest, size, {_plain_path(key): _digest(value) for key, value in entry.get("data", {}).items()}
    )


_OWN_KEYS = ("files", "variants", "labels", "window", "packed", "min_score")


def _plain_path(name: str) -> str:
    """A path that stays below where it starts; :class:`ValueError` for any other."""
    path = PurePosixPath(name)
    if not name or path.is_absolute() or ".." in path.parts or not name.isprintable():
        raise ValueError(f"{name!r} is no path inside the model")
    return name


def _plain_name(name: Any) -> str:
    """A name that fits a line, and moves no cursor; :class:`ValueError` for any other."""
    if not isinstance(name, str) or not 0 < len(name) <= _MAX_NAME or not name.isprintable():
        raise ValueError(f"{name!r} is no name")
    return name


def check_name(name: str) -> None:
    """Raise :class:`UsageError` for a name that no bundle can have."""
    try:
        _plain_name(name)
    except ValueError as exc:
        raise UsageError(
            f"{_shown(name)!r}: a bundle's name is printable text of 1 to {_MAX_NAME} characters; pass another --name"
        ) from exc


def _digest(value: Any) -> str:
    if not isinstance(value, str) or not _SHA256.fullmatch(value):
        raise ValueError(f"{value!r} is no SHA-256")
    return value


def _integer(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 2**63:
        raise ValueError(f"{value!r} is no count")
    return value


def _share(value: Any) -> float:
    if type(value) not in (int, float) or not 0 <= value <= 1:
        raise ValueError(f"{value!r} is no share of one")
    return float(value)


def _shown(value: Any) -> str:
    """A value of unknown origin, for a message: its start, on one line, without control characters."""
    text = value if isinstance(value, str) else str(value)
    text = "".join(character if character.isprintable() else "\ufffd" for character in text[: _MAX_NAME + 1])
    return text if len(text) <= _MAX_NAME else text[:_MAX_NAME] + "..."


def _foreign(path: Path, name: str) -> Bundle:
    files = _foreign_files(path)
    labels = _labels_of(path)
    variants = {}
    for precision, stems in _FOREIGN_GRAPHS.items():
        for file in (f"{folder}{stem}.onnx" for stem in stems for folder in ("onnx/", "")):
            if (path / file).is_file() and precision not in variants:
                variants[precision] = _read_variant(path, file)
    if not variants:
        raise ModelError(
            f"{path}: no model.onnx, nor onnx/model.onnx; write one with: "
            f"medner export {path} -o BUNDLE --parity-data NOTES"
        )
    window = min(FOREIGN_WINDOW, _position_limit(path))
    return Bundle(path, name, labels, window, True, variants, files, True)


def _read_variant(path: Path, file: str) -> Variant:
    """Describe a graph, and the files that hold weights outside it."""
    size = _size(path, file, _MAX_GRAPH)
    data = {name: _size(path, name) for name in _data_files(path, file)}
    digests = {name: sha256_of(path / name) for name in data}
    return Variant(file, sha256_of(path / file), size + sum(data.values()), digests)


def _data_files(path: Path, graph: str) -> list[str]:
    """Paths, relative to the model, of the files that hold weights outside a graph; they lie beside it, or below."""
    try:
        locations = graphfile.external_data(path / graph)
    except (OSError, ValueError) as exc:
        if isinstance(exc, OSError) and exc.errno == errno.ENOMEM:
            raise
        raise ModelError(f"{path / graph}: no ONNX graph, or cut short ({exc}); copy or export it again") from exc
    files = []
    for location in sorted(locations):
        try:
            files.append((PurePosixPath(graph).parent / _plain_path(location)).as_posix())
        except ValueError as exc:
            raise ModelError(
                f"{path / graph}: takes weights from {_shown(location)}; a graph may only use files beside it"
            ) from exc
    return files


def _foreign_files(path: Path) -> dict[str, str]:
    needed = ("config.json", "tokenizer.json")
    for name in needed:
        if not os.path.lexists(path / name):
            raise ModelError(f"{path}: no {name}; {_next_step(path, name)}")
        _size(path, name, _MAX_FILE)
    return {name: sha256_of(path / name) for name in needed}


def _next_step(path: Path, missing: str) -> str:
    """What to do about a file that a model directory lacks."""
    # Of words alone it could be made, but whether their case counts would be a guess.
    if missing == "tokenizer.json" and (path / "vocab.txt").is_file():
        return "save there the tokenizer that the model was trained with, by tokenizer.save_pretrained of transformers"
    return "a model directory holds config.json, tokenizer.json and the model"


_FOREIGN_GRAPHS = {
    "fp32": ("model",),
    "fp16": ("model_fp16",),
    "int8": ("model_int8", "model_quantized"),
}


def _labels_of(path: Path) -> tuple[str, ...]:
    named = _read_json(path, "config.json").get("id2label")
    if not isinstance(named, dict) or not named:
        raise ModelError(f"{path / 'config.json'}: no id2label; medner needs the names of the model's labels")
    try:
        ordered = [named[str(i)] for i in range(len(named))]
    except KeyError as exc:
        raise ModelError(f"{path / 'config.json'}: id2label does not number its labels from 0") from exc
    labels = _check_labels(ordered, path / "config.json")
    if any(re.fullmatch(r"LABEL_\d+", label) for label in labels):
        raise ModelError(
            f"{path / 'config.json'}: labels are named LABEL_0, LABEL_1, ...; write the real tags (O, B-Disease, ...) "
            "into id2label"
        )
    return labels


def _check_labels(labels: Any, place: Path) -> tuple[str, ...]:
    if not isinstance(labels, Sequence) or isinstance(labels, str) or not 0 < len(labels) <= _MAX_LABELS:
        raise ModelError(f"{place}: a model has a list of 1 to {_MAX_LABELS:,} labels")
    for number, label in enumerate(labels):
        try:
            _plain_name(label)
        except ValueError as exc:
            raise ModelError(f"{place}: label {number} is no printable text of 1 to {_MAX_NAME} characters") from exc
    return tuple(labels)


def positions(config: Mapping[str, Any]) -> int | None:
    """Tokens that the position embeddings of a ``config.json`` can tell apart; None where it does not say."""
    limit = config.get("max_position_embeddings")
    if not limit:
        return None
    # These number positions from pad_token_id + 1.
    from_padding = config.get("model_type") in ("roberta", "xlm-roberta", "camembert", "longformer", "mpnet")
    return int(limit) - (int(config.get("pad_token_id", 1)) + 1 if from_padding else 0)


def _position_limit(path: Path, *, tokenizer_config: bool = True) -> int:
    """Tokens, special ones included, that the model's position embeddings can tell apart; at most ``_MAX_WINDOW``.

    tokenizer_config: whether that file has a say, where it is there.
    """
    config = _read_json(path, "config.json")
    try:
        limit = positions(config) or 512
    except (TypeError, ValueError, OverflowError) as exc:
        raise ModelError(f"{path / 'config.json'}: positions that are no numbers ({_shown(exc)})") from exc
    if tokenizer_config and os.path.lexists(path / _TOKENIZER_CONFIG):
        stated = _read_json(path, _TOKENIZER_CONFIG).get("model_max_length")
        if isinstance(stated, int | float) and -math.inf < stated < limit:
            limit = int(stated)
    return min(limit, _MAX_WINDOW)


_TOKENIZER_CONFIG = "tokenizer_config.json"


def _read_json(path: Path, name: str) -> dict[str, Any]:
    file = path / name
    _size(path, name, _MAX_JSON)
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as exc:
        raise ModelError(f"{file}: cannot be read ({type(exc).__name__})") from exc
    if not isinstance(value, dict):
        raise ModelError(f"{file}: holds no JSON object")
    return value


def _size(path: Path, name: str, limit: int | None = None) -> int:
    """Bytes of a file of a model.

    Raises :class:`ModelError` where it is larger than ``limit``, is no regular file, which could block or never end,
    or lies outside the model directory.
    """
    file = path / name
    try:
        real = file.resolve(strict=True)
        found = real.stat()
    except (OSError, RuntimeError, ValueError) as exc:  # the latter two for loops of links and NUL characters
        raise ModelError(f"{file}: cannot be read ({getattr(exc, 'strerror', None) or type(exc).__name__})") from exc
    if not stat.S_ISREG(found.st_mode):
        raise ModelError(f"{file}: is no regular file; copy the model again")
    home = path.resolve()
    # The cache of the hub: models--x--y/snapshots/REVISION/config.json -> models--x--y/blobs/HASH.
    blobs = [home.parents[1] / "blobs"] if home.parent.name == "snapshots" else []
    if not any(real.is_relative_to(place) for place in (home, *blobs)):
        raise ModelError(f"{file}: a link that leads out of the model directory; put the file itself there")
    if limit is not None and found.st_size > limit:
        raise ModelError(f"{file}: larger than {limit:,} bytes; this is no {PurePosixPath(name).name}")
    return found.st_size


def _check_hash(path: Path, name: str, digest: str, limit: int | None = None) -> None:
    _size(path, name, limit)
    try:
        found = sha256_of(path / name)
    except OSError as exc:
        raise ModelError(f"{path / name}: cannot be read ({exc.strerror})") from exc
    if found != digest:
        raise ModelError(
            f"{path / name}: SHA-256 {found[:12]}... is not the recorded {digest[:12]}...; "
            "the file was altered or cut short: copy or export the bundle again"
        )


def _check_variant(path: Path, variant: Variant) -> None:
    """Check the hashes of a graph and of its data, and that it draws on no other file."""
    size = _size(path, variant.file, _MAX_GRAPH) + sum(_size(path, name) for name in variant.data)
    if size > variant.bytes:  # said at once, not after hours of hashing a file without end
        raise ModelError(
            f"{path / variant.file}: {size:,} bytes are more than the recorded {variant.bytes:,}; "
            "the file was altered: copy or export the bundle again"
        )
    for name, digest in ((variant.file, variant.sha256), *variant.data.items()):
        _check_hash(path, name, digest)
    if unlisted := set(_data_files(path, variant.file)) - variant.data.keys():
        raise ModelError(
            f"{path / variant.file}: takes weights from {_shown(min(unlisted))}, of which no hash is recorded; "
            "export the bundle again"
        )


def describe(bundle: Bundle) -> str:
    """What a bundle holds, for a person. Raises :class:`ModelError` where its card is of another form."""
    lines = [
        f"{bundle.name} ({bundle.path})",
        f"labels    {', '.join(bundle.labels)}",
        f"window    {bundle.window} tokens, {'as many segments as fit' if bundle.packed else 'one segment'}"
        + (", not recorded by the model" if bundle.foreign else ""),
    ]
    if bundle.min_score:
        lines.append(f"scores    spans below {bundle.min_score:g} are left out (--min-score 0 gives them, too)")
    for precision, variant in bundle.variants.items():
        lines.append(f"{precision:<9} {variant.file}, {variant.bytes / 1e6:.1f} MB, SHA-256 {variant.sha256[:16]}...")
    try:
        lines.extend(map(_shown, _card_lines(bundle.card)))
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as exc:
        raise ModelError(
            f"{bundle.path / MANIFEST}: its scores or its parity are not as medner writes them ({type(exc).__name__})"
        ) from exc
    return "\n".join(lines)


def _card_lines(card: Mapping[str, Any]) -> Iterator[str]:
    if card.get("licence"):
        yield f"licence   {card['licence']}"
    for name, digest in (card.get("checkpoint") or {}).items():
        yield f"made of   {name}, SHA-256 {digest[:16]}..."
    for name, scores in (card.get("scores") or {}).items():
        overall = scores["overall"]
        yield f"score     {name}: F1 {overall['f1']:.4f} (95 % interval {overall['low']:.4f} to {overall['high']:.4f})"
    parity = card.get("parity") or {}
    for precision, result in (parity.get("variants") or {}).items():
        yield f"parity    {precision}: {result['agreement']:.2%} of spans equal PyTorch's on {parity['data']}"


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_manifest(
    path: Path,
    *,
    name: str,
    labels: tuple[str, ...],
    window: int,
    packed: bool,
    card: Mapping[str, Any],
    min_score: float = 0.0,
) -> None:
    """Write ``medner.json`` for the files that lie in a directory; ``card`` adds parity, training, scores, licence."""
    found = {name: _read_variant(path, file) for name, file in VARIANT_FILES.items() if (path / file).is_file()}
    variants = {
        precision: {"sha256": variant.sha256, "bytes": variant.bytes} | ({"data": variant.data} if variant.data else {})
        for precision, variant in found.items()
    }
    used = [file for file in ("config.json", "tokenizer.json", "tokenizer_config.json") if (path / file).is_file()]
    value = {
        "format_version": FORMAT_VERSION,
        "name": name,
        "labels": list(labels),
        "window": window,
        "packed": packed,
        **({"min_score": min_score} if min_score else {}),
        "variants": variants,
        "files": {file: sha256_of(path / file) for file in used},
        **card,
    }
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    # A path in it may be no valid Unicode.
    (path / MANIFEST).write_text(text, encoding="utf-8", errors="backslashreplace")
