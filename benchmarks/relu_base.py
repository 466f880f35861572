"""A pretrained encoder made cheaper on a CPU: ReLU in the place of GELU, and no special tokens.

    python benchmarks/relu_base.py BASE OUT --text FILE [--text FILE ...] [--steps 500] [--keep-specials]

BASE is a BERT-like checkpoint, FILE a JSONL or CSV file of unlabelled text (``--text FILE:COLUMN`` where the column is
not called ``text``). OUT is a checkpoint to fine-tune by ``medner train``, with a tokenizer that adds nothing.

ReLU costs int8 nothing. ``[CLS]`` and ``[SEP]`` are two tokens of every window, which is a seventh of all where a
window is a sentence. Positions are counted from the first real token on, so that each keeps the one that it had behind
``[CLS]``. Then two steps, neither of which needs labels:

1. The second product of each feed-forward layer is fitted anew, from the first layer to the last, by least squares:
   from what ReLU now gives it, to what the layer made of GELU (ridge towards the old weights).
2. All weights are trained for some minutes so that every layer's output stays the old one's at the real tokens (mean
   squared error, after Mirzadeh et al. 2023, "ReLU Strikes Back", and Jiao et al. 2020, "TinyBERT"), in windows of
   several lengths.

The share of each layer's variance that is off is printed after each step.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import common
import torch
import transformers
from tqdm import tqdm

from medner import sources
from medner.train import load_tokenizer, resolve_precision

#: Tokens of an example, special ones left out, and examples of a step.
LENGTH, BATCH = 96, 32
#: Into so many windows each example is cut, in turn: what is fine-tuned reads sentences, and some of them are short.
CUTS = (1, 2, 4, 8)
#: Examples that the fit uses, and those that tell how far the layers are off; both are left out of the training.
FITTED, HELD_OUT = 400, 64
#: Characters of text taken from each file.
CHARACTERS = 1_500_000

RIDGE, LR, WARMUP, SEED = 1e-3, 2e-4, 50, 13

Tensor = torch.Tensor


@dataclass(frozen=True, slots=True)
class Encoder:
    """A model, and the special tokens that it reads before and after the real ones."""

    model: Any
    before: tuple[int, ...] = ()
    after: tuple[int, ...] = ()

    def framed(self, ids: Tensor) -> Tensor:
        """Windows with the special tokens, int64 [n, length]; ids: without them."""
        before, after = (torch.tensor(given).expand(len(ids), -1) for given in (self.before, self.after))
        return torch.cat([before.long(), ids, after.long()], dim=1)

    def inner(self, values: Tensor) -> Tensor:
        """What stands at the real tokens, [n, length, ...]; values: at all of them."""
        return values[:, len(self.before) : values.shape[1] - len(self.after)]

    def layers(self, ids: Tensor) -> list[Tensor]:
        """What each layer makes of windows, float [n, length, hidden] each; ids: int64 [n, length], real tokens."""
        framed = self.framed(ids)
        found = self.model(framed, torch.ones_like(framed), output_hidden_states=True).hidden_states
        return [self.inner(values) for values in found[1:]]


def texts(given: str, characters: int = CHARACTERS) -> list[str]:
    """Different texts of ``FILE`` or ``FILE:COLUMN``, about so many characters in all, evenly over the file."""
    found = list(dict.fromkeys(sources.texts(given)))
    share = min(1.0, characters / sum(map(len, found)))
    return common.every_kth(found, max(1, round(share * len(found))))


def examples(tokenizer: transformers.PreTrainedTokenizerFast, corpus: Sequence[str]) -> Tensor:
    """Shuffled stretches of real tokens, int64 [n, LENGTH]."""
    rows = []
    for text in tqdm(corpus, "tokenizing", disable=None):
        ids = tokenizer.encode(text, add_special_tokens=False, verbose=False)
        rows += [ids[start : start + LENGTH] for start in range(0, len(ids) - LENGTH + 1, LENGTH)]
    random.Random(SEED).shuffle(rows)
    return torch.tensor(rows)


@torch.no_grad()
def off(student: Encoder, teacher: Encoder, ids: Tensor) -> list[float]:
    """Share of the variance of each layer of the teacher that the student misses."""
    student.model.eval()
    pairs = zip(student.layers(ids), teacher.layers(ids), strict=True)
    return [round(float((ours - theirs).pow(2).mean() / theirs.var()), 4) for ours, theirs in pairs]


@torch.no_grad()
def refit(student: Encoder, teacher: Encoder, ids: Tensor) -> None:
    """Fit the second feed-forward product of each layer, from the first to the last, to what the teacher's makes."""
    student.model.eval()
    for ours, theirs in zip(student.model.encoder.layer, teacher.model.encoder.layer, strict=True):
        dense = ours.output.dense
        _, wanted = _through(theirs.output.dense, teacher, ids)
        inputs, _ = _through(dense, student, ids)
        inputs = torch.cat([inputs, torch.ones(len(inputs), 1)], dim=1)
        old = torch.cat([dense.weight.T, dense.bias[None]])
        gram = inputs.T @ inputs
        ridge = RIDGE * gram.diagonal().mean() * torch.eye(len(gram))
        new = old + torch.linalg.solve(gram + ridge, inputs.T @ (wanted - inputs @ old))
        dense.weight.copy_(new[:-1].T)
        dense.bias.copy_(new[-1])


def _through(layer: torch.nn.Module, encoder: Encoder, ids: Tensor) -> tuple[Tensor, Tensor]:
    """What goes into a layer of an encoder and what comes out at real tokens, float [tokens, channels] each."""
    seen: list[tuple[Tensor, Tensor]] = []
    hook = layer.register_forward_hook(
        lambda _, given, made: seen.append((encoder.inner(given[0]).flatten(0, -2), encoder.inner(made).flatten(0, -2)))
    )
    try:
        encoder.layers(ids)
    finally:
        hook.remove()
    return seen[0]


def distil(student: Encoder, teacher: Encoder, ids: Tensor, steps: int) -> None:
    """Train the student so that each of its layers makes what the teacher's does; no drop-out."""
    optimizer = torch.optim.AdamW(student.model.parameters(), lr=LR, weight_decay=0.01, fused=True)
    schedule = transformers.get_linear_schedule_with_warmup(optimizer, min(WARMUP, steps // 2), steps)
    student.model.eval()
    in_bf16 = resolve_precision("auto") == "bf16"  # which may be very slow elsewhere
    for batch in tqdm(_batches(ids, steps), "distilling", total=steps, disable=None):
        with torch.autocast("cpu", torch.bfloat16, enabled=in_bf16):
            with torch.no_grad():
                wanted = teacher.layers(batch)
            losses = [
                (ours.float() - theirs.float()).pow(2).mean()
                for ours, theirs in zip(student.layers(batch), wanted, strict=True)
            ]
        torch.stack(losses).mean().backward()
        torch.nn.utils.clip_grad_norm_(student.model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()


def _batches(ids: Tensor, steps: int) -> Iterator[Tensor]:
    for step in range(steps):
        rows = ids[torch.arange(step * BATCH, (step + 1) * BATCH) % len(ids)]
        yield rows.reshape(-1, LENGTH // CUTS[step % len(CUTS)])


def make(base: str, output: Path, files: Sequence[str], steps: int, *, keep_specials: bool = False) -> None:
    """Write the checkpoint. keep_specials: ReLU alone."""
    torch.manual_seed(SEED)
    tokenizer = load_tokenizer(base)
    # On a CPU the plain attention trains faster than the fused one.
    load: Callable[..., Any] = transformers.AutoModel.from_pretrained
    load = partial(load, add_pooling_layer=False, attn_implementation="eager")
    teacher = Encoder(load(base).eval(), (tokenizer.cls_token_id,), (tokenizer.sep_token_id,))
    student = replace(teacher, model=load(base, hidden_act="relu"))
    if not keep_specials:
        student = Encoder(student.model)
        places = student.model.embeddings.position_embeddings.weight.data
        places[:-1] = places[1:].clone()
    ids = examples(tokenizer, [text for given in files for text in texts(given)])
    if len(ids) < HELD_OUT + FITTED + BATCH:
        raise SystemExit(
            f"{len(ids)} windows of {LENGTH} tokens: too little text, {HELD_OUT + FITTED + BATCH} are needed"
        )
    held_out, fitted, rest = ids[:HELD_OUT], ids[HELD_OUT : HELD_OUT + FITTED], ids[HELD_OUT + FITTED :]
    start = time.monotonic()
    common.say(f"{len(ids)} windows of {LENGTH} tokens; off with ReLU as it is: {off(student, teacher, held_out)}")
    refit(student, teacher, fitted)
    common.say(f"after the fit: {off(student, teacher, held_out)}")
    distil(student, teacher, rest, steps)
    common.say(f"after {steps} steps: {off(student, teacher, held_out)}; {time.monotonic() - start:.0f} s")
    tokenizer.save_pretrained(output)
    if not keep_specials:
        _add_nothing(output)
    student.model.save_pretrained(output)  # last: its config.json says that all is there


def _add_nothing(checkpoint: Path) -> None:
    """Take the special tokens out of what a saved tokenizer makes of a text, for whatever class loads it."""
    for name, key, value in (
        ("tokenizer.json", "post_processor", None),
        ("tokenizer_config.json", "tokenizer_class", "PreTrainedTokenizerFast"),
    ):
        path = checkpoint / name
        content = json.loads(path.read_text(encoding="utf-8"))
        path.write_text(json.dumps({**content, key: value}, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base")
    parser.add_argument("output", type=Path)
    parser.add_argument("--text", action="append", required=True, metavar="FILE[:COLUMN]")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--keep-specials", action="store_true", help="change the activation alone")
    given = parser.parse_args()
    make(given.base, given.output, given.text, given.steps, keep_specials=given.keep_specials)


if __name__ == "__main__":
    main()
