"""The model directory: which files it holds, their hashes, its labels and its window.

A bundle is data. Nothing in it is executed, its files are named by :class:`Bundle` alone, and a file that
``medner.json`` lists is used only if its SHA-256 is the recorded one.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from medner.errors import DeviceError, ModelError

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
_MAX_JSON = 64 * 2**20


@dataclass(frozen=True, slots=True)
class Variant:
    """One precision of a bundle: the graph's path relative to the bundle, its SHA-256 (hex) and its size in bytes."""

    file: str
    sha256: str
    bytes: int


@dataclass(frozen=True, slots=True)
class Bundle:
    """A model directory, read but not loaded.

    labels: the model's classes in the order of its outputs. window: tokens a window may have, special tokens included.
    packed: whether a window holds as many segments as fit, or one.
    files: SHA-256 of every other file that is used. foreign: true without ``medner.json``. card: the rest of
    ``medner.json`` (parity, training, scores, licence), empty for a foreign model.
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
                _check_hash(self.path, self.variants[name].file, self.variants[name].sha256)
                return name, self.path / self.variants[name].file
        kind = DeviceError if device == "cuda" else ModelError
        raise kind(
            f"{self.name}: no {precision} variant (it has {', '.join(self.variants)}); make one with: "
            f"medner export CHECKPOINT -o BUNDLE --precision {precision} --parity-data FILE"
        )

    def check(self) -> None:
        """Check the hash of every file, all variants included; raises :class:`ModelError`."""
        for name, digest in self.files.items():
            _check_hash(self.path, name, digest)
        for variant in self.variants.values():
            _check_hash(self.path, variant.file, variant.sha256)

    def identity(self, precision: str) -> dict[str, str]:
        """SHA-256 by file name of all that decides the spans: the graph of one precision, tokenizer and settings."""
        graph = self.variants[precision]
        return {**dict(sorted(self.files.items())), graph.file: graph.sha256}


def load(model: str | Path, window: int | None = None) -> Bundle:
    """Read a bundle or a foreign model.

    model: a directory, the name of a bundle that ships with medner (``default``), or ``organization/name`` on the
    Hugging Face hub. window: overrides the recorded one; a foreign model's is ``min(128, the model's limit)``.
    Raises :class:`ModelError`.
    """
    path, name = _locate(str(model))
    bundle = _own(path, name) if (path / MANIFEST).is_file() else _foreign(path, name)
    return resized(bundle, bundle.window if window is None else window)


def resized(bundle: Bundle, window: int, *, packed: bool | None = None) -> Bundle:
    """The bundle with another window; raises :class:`ModelError` beyond the model's limit."""
    checked = _check_window(window, _position_limit(bundle.path), bundle.name)
    return replace(bundle, window=checked, packed=bundle.packed if packed is None else packed)


def _check_window(window: int, limit: int, name: str) -> int:
    if not 8 <= window <= limit:
        raise ModelError(f"{name}: a window of {window} tokens lies outside 8 to {limit}, the model's limit")
    return window


def load_checkpoint(checkpoint: str | Path, window: int | None = None) -> Bundle:
    """Describe a PyTorch checkpoint, as :func:`load` does a bundle; it has no variants.

    Its window is the one that ``medner train`` recorded in ``metrics.json``, else a foreign model's.
    """
    path = Path(checkpoint)
    if not path.is_dir():
        raise ModelError(f"{path}: no such checkpoint directory")
    files = _foreign_files(path)
    limit = _position_limit(path)
    if window is None:
        metrics = _read_json(path, "metrics.json") if (path / "metrics.json").is_file() else {}
        window = int(metrics.get("options", {}).get("window", min(FOREIGN_WINDOW, limit)))
    window = _check_window(window, limit, path.name)
    return Bundle(path, path.name, _labels_of(path), window, True, {}, files, True)


def _locate(model: str) -> tuple[Path, str]:
    path = Path(model)
    if path.is_dir():
        return path, path.name or model
    shipped = _SHIPPED / model
    if "/" not in model and (shipped / MANIFEST).is_file():
        return shipped, model
    if path.exists():
        raise ModelError(f"{model}: a model is a directory with config.json, tokenizer.json and an ONNX graph")
    if _HUB_NAME.fullmatch(model):
        return _from_hub(model), model
    raise ModelError(f"{model}: no such model directory; shipped with medner: {', '.join(_shipped_names()) or 'none'}")


def _shipped_names() -> list[str]:
    return sorted(p.name for p in _SHIPPED.iterdir()) if _SHIPPED.is_dir() else []


def _from_hub(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        patterns = ["*.json", "*.onnx", "onnx/*", "README.md"]
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
            f"{path / MANIFEST}: format version {card.get('format_version')!r} is not {FORMAT_VERSION}; "
            "use the medner release that wrote it"
        )
    try:
        labels = tuple(str(label) for label in card["labels"])
        window, packed = int(card["window"]), {True: True, False: False}[card["packed"]]
        variants = {
            precision: Variant(VARIANT_FILES[precision], str(entry["sha256"]), int(entry["bytes"]))
            for precision, entry in card["variants"].items()
        }
        files = {_plain_name(key): str(value) for key, value in card["files"].items()}
    except (KeyError, TypeError, ValueError, AttributeError) as exc:
        raise ModelError(f"{path / MANIFEST}: not a bundle description ({type(exc).__name__} {exc})") from exc
    if missing := {"config.json", "tokenizer.json"} - files.keys():
        raise ModelError(f"{path / MANIFEST}: lists no {' or '.join(sorted(missing))}")
    for file, digest in files.items():
        _check_hash(path, file, digest)
    rest = {key: value for key, value in card.items() if key not in _OWN_KEYS}
    files[MANIFEST] = sha256_of(path / MANIFEST)
    return Bundle(path, str(card.get("name", name)), labels, window, packed, variants, files, False, rest)


_OWN_KEYS = ("files", "variants", "labels", "window", "packed")


def _plain_name(name: str) -> str:
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise ValueError(name)
    return name


def _foreign(path: Path, name: str) -> Bundle:
    files = _foreign_files(path)
    labels = _labels_of(path)
    variants = {}
    for precision, stems in _FOREIGN_GRAPHS.items():
        for file in (f"{folder}{stem}.onnx" for stem in stems for folder in ("onnx/", "")):
            if (path / file).is_file() and precision not in variants:
                variants[precision] = Variant(file, sha256_of(path / file), (path / file).stat().st_size)
    if not variants:
        raise ModelError(
            f"{path}: no model.onnx, nor onnx/model.onnx; write one with: "
            f"optimum-cli export onnx --task token-classification --model {path} {path}"
        )
    window = min(FOREIGN_WINDOW, _position_limit(path))
    return Bundle(path, name, labels, window, True, variants, files, True)


def _foreign_files(path: Path) -> dict[str, str]:
    for needed in ("config.json", "tokenizer.json"):
        if not (path / needed).is_file():
            raise ModelError(f"{path}: no {needed}; a model directory holds config.json, tokenizer.json and the model")
    return {file: sha256_of(path / file) for file in ("config.json", "tokenizer.json")}


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
        labels = tuple(str(named[str(i)]) for i in range(len(named)))
    except KeyError as exc:
        raise ModelError(f"{path / 'config.json'}: id2label does not number its labels from 0") from exc
    if any(re.fullmatch(r"LABEL_\d+", label) for label in labels):
        raise ModelError(
            f"{path / 'config.json'}: labels are named LABEL_0, LABEL_1, ...; write the real tags (O, B-Disease, ...) "
            "into id2label"
        )
    return labels


def _position_limit(path: Path) -> int:
    """Tokens, special ones included, that the model's position embeddings can tell apart."""
    config = _read_json(path, "config.json")
    try:
        limit = int(config.get("max_position_embeddings") or 512)
        if config.get("model_type") in ("roberta", "xlm-roberta", "camembert", "longformer"):
            # These number positions from pad_token_id + 1.
            limit -= int(config.get("pad_token_id", 1)) + 1
    except (TypeError, ValueError) as exc:
        raise ModelError(f"{path / 'config.json'}: positions that are no numbers ({exc})") from exc
    if (path / "tokenizer_config.json").is_file():
        stated = _read_json(path, "tokenizer_config.json").get("model_max_length")
        if isinstance(stated, int | float) and stated < limit:
            limit = int(stated)
    return limit


def _read_json(path: Path, name: str) -> dict[str, Any]:
    file = path / name
    try:
        if file.stat().st_size > _MAX_JSON:
            raise ModelError(f"{file}: larger than {_MAX_JSON} bytes; this is no {name}")
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as exc:
        raise ModelError(f"{file}: cannot be read ({type(exc).__name__})") from exc
    if not isinstance(value, dict):
        raise ModelError(f"{file}: holds no JSON object")
    return value


def _check_hash(path: Path, name: str, digest: str) -> None:
    try:
        found = sha256_of(path / name)
    except OSError as exc:
        raise ModelError(f"{path / name}: cannot be read ({exc.strerror})") from exc
    if found != digest:
        raise ModelError(
            f"{path / name}: SHA-256 {found[:12]}... is not the recorded {digest[:12]}...; "
            "the file was altered or cut short: copy or export the bundle again"
        )


def describe(bundle: Bundle) -> str:
    """What a bundle holds, for a person."""
    lines = [
        f"{bundle.name} ({bundle.path})",
        f"labels    {', '.join(bundle.labels)}",
        f"window    {bundle.window} tokens, {'as many segments as fit' if bundle.packed else 'one segment'}"
        + (", not recorded by the model" if bundle.foreign else ""),
    ]
    for precision, variant in bundle.variants.items():
        lines.append(f"{precision:<9} {variant.file}, {variant.bytes / 1e6:.1f} MB, SHA-256 {variant.sha256[:16]}...")
    if bundle.card.get("licence"):
        lines.append(f"licence   {bundle.card['licence']}")
    for name, scores in (bundle.card.get("scores") or {}).items():
        overall = scores["overall"]
        lines.append(
            f"score     {name}: F1 {overall['f1']:.4f} (95 % interval {overall['low']:.4f} to {overall['high']:.4f})"
        )
    parity = bundle.card.get("parity") or {}
    for precision, result in (parity.get("variants") or {}).items():
        lines.append(f"parity    {precision}: {result['agreement']:.2%} of spans equal PyTorch's on {parity['data']}")
    return "\n".join(lines)


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_manifest(
    path: Path, *, name: str, labels: tuple[str, ...], window: int, packed: bool, card: Mapping[str, Any]
) -> None:
    """Write ``medner.json`` for the files that lie in a directory; ``card`` adds parity, training, scores, licence."""
    variants = {
        precision: {"sha256": sha256_of(path / file), "bytes": (path / file).stat().st_size}
        for precision, file in VARIANT_FILES.items()
        if (path / file).is_file()
    }
    used = [file for file in ("config.json", "tokenizer.json", "tokenizer_config.json") if (path / file).is_file()]
    value = {
        "format_version": FORMAT_VERSION,
        "name": name,
        "labels": list(labels),
        "window": window,
        "packed": packed,
        "variants": variants,
        "files": {file: sha256_of(path / file) for file in used},
        **card,
    }
    (path / MANIFEST).write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
