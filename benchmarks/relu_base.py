"""A pretrained encoder with ReLU in the place of GELU, which int8 on a CPU computes for nothing.

    python benchmarks/relu_base.py BASE OUT --text FILE [--text FILE ...] [--steps 300]

BASE is a BERT-like checkpoint, FILE a JSONL or CSV file of unlabelled text (``--text FILE:COLUMN`` where the column is
not called ``text``). OUT is a checkpoint to fine-tune by ``medner train``. Two steps, neither of which needs labels:

1. The second product of each feed-forward layer is fitted anew, from the first layer to the last, by least squares:
   from what ReLU now gives it, to what the layer made of GELU (ridge towards the old weights).
2. All weights are trained for some minutes so that every layer's output stays the old one's (mean squared error, after
   Mirzadeh et al. 2023, "ReLU Strikes Back", and Jiao et al. 2020, "TinyBERT").

The share of each layer's variance that is off is printed after each step.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import common
import torch
import transformers
from tqdm import tqdm

from medner import sources

#: Tokens of an example, special ones included, and examples of a step.
LENGTH, BATCH = 96, 32
#: Examples that the fit uses, and those that tell how far the layers are off; both are left out of the training.
FITTED, HELD_OUT = 400, 64
#: Characters of text taken from each file.
CHARACTERS = 1_500_000

RIDGE, LR, WARMUP, SEED = 1e-3, 2e-4, 50, 13

Tensor = torch.Tensor


def texts(given: str, characters: int = CHARACTERS) -> list[str]:
    """Different texts of ``FILE`` or ``FILE:COLUMN``, about so many characters in all, evenly over the file."""
    name, _, column = given.partition(":")
    reader = sources.Reader(sources.discover([name]).files, sources.ReadOptions(text_column=column or "text"))
    found = list(dict.fromkeys(text for batch in reader.batches() for text in batch["text"].to_pylist() if text))
    share = min(1.0, characters / max(1, sum(map(len, found))))
    return common.every_kth(found, max(1, round(share * len(found)))) if found else []


def examples(tokenizer: transformers.PreTrainedTokenizerFast, corpus: Sequence[str]) -> Tensor:
    """Shuffled windows of full length, int64 [n, LENGTH]."""
    inner = LENGTH - 2
    rows = []
    for text in tqdm(corpus, "tokenizing", disable=None):
        ids = tokenizer.encode(text, add_special_tokens=False, verbose=False)
        rows += [
            [tokenizer.cls_token_id, *ids[start : start + inner], tokenizer.sep_token_id]
            for start in range(0, len(ids) - inner + 1, inner)
        ]
    random.Random(SEED).shuffle(rows)
    return torch.tensor(rows)


def layers(model: transformers.PreTrainedModel, ids: Tensor) -> tuple[Tensor, ...]:
    """What each layer makes of a batch, float [n, length, hidden] each."""
    found: tuple[Tensor, ...] = model(ids, torch.ones_like(ids), output_hidden_states=True).hidden_states
    return found[1:]


@torch.no_grad()
def off(student: transformers.PreTrainedModel, teacher: transformers.PreTrainedModel, ids: Tensor) -> list[float]:
    """Share of the variance of each layer of the teacher that the student misses."""
    pairs = zip(layers(student.eval(), ids), layers(teacher, ids), strict=True)
    return [round(float((ours - theirs).pow(2).mean() / theirs.var()), 4) for ours, theirs in pairs]


@torch.no_grad()
def refit(student: transformers.PreTrainedModel, teacher: transformers.PreTrainedModel, ids: Tensor) -> None:
    """Fit the second feed-forward product of each layer, from the first to the last, to what the teacher's makes."""
    student.eval()
    for ours, theirs in zip(student.encoder.layer, teacher.encoder.layer, strict=True):
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


def _through(layer: torch.nn.Module, model: transformers.PreTrainedModel, ids: Tensor) -> tuple[Tensor, Tensor]:
    """What goes into a layer of a model and what comes out, float [tokens, channels] each."""
    seen: list[tuple[Tensor, Tensor]] = []
    hook = layer.register_forward_hook(
        lambda _, given, made: seen.append((given[0].flatten(0, -2), made.flatten(0, -2)))
    )
    try:
        model(ids, torch.ones_like(ids))
    finally:
        hook.remove()
    return seen[0]


def distil(
    student: transformers.PreTrainedModel, teacher: transformers.PreTrainedModel, ids: Tensor, steps: int
) -> None:
    """Train the student so that each of its layers makes what the teacher's does; no drop-out."""
    optimizer = torch.optim.AdamW(student.parameters(), lr=LR, weight_decay=0.01)
    schedule = transformers.get_linear_schedule_with_warmup(optimizer, min(WARMUP, steps // 2), steps)
    student.eval()
    for batch in tqdm(_batches(ids, steps), "distilling", total=steps, disable=None):
        with torch.autocast("cpu", torch.bfloat16):
            with torch.no_grad():
                wanted = layers(teacher, batch)
            losses = [
                (ours.float() - theirs.float()).pow(2).mean()
                for ours, theirs in zip(layers(student, batch), wanted, strict=True)
            ]
        torch.stack(losses).mean().backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()


def _batches(ids: Tensor, steps: int) -> Iterator[Tensor]:
    for step in range(steps):
        yield ids[torch.arange(step * BATCH, (step + 1) * BATCH) % len(ids)]


def make(base: str, output: Path, files: Sequence[str], steps: int) -> None:
    """Write the checkpoint with ReLU."""
    torch.manual_seed(SEED)
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    teacher = transformers.AutoModel.from_pretrained(base, add_pooling_layer=False).eval()
    config = transformers.AutoConfig.from_pretrained(base, hidden_act="relu")
    student = transformers.AutoModel.from_pretrained(base, config=config, add_pooling_layer=False)
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
    student.save_pretrained(output)
    tokenizer.save_pretrained(output)


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base")
    parser.add_argument("output", type=Path)
    parser.add_argument("--text", action="append", required=True, metavar="FILE[:COLUMN]")
    parser.add_argument("--steps", type=int, default=300)
    given = parser.parse_args()
    make(given.base, given.output, given.text, given.steps)


if __name__ == "__main__":
    main()
