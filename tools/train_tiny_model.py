#!/usr/bin/env python3
# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""Train the model that ships with kvxfer on the Python standard library's own source.

Without options this repeats the committed run and writes to build/tiny-python-llama; compare its hash with
MODEL_CARD.md. Needs torch, tokenizers, safetensors, rich and matplotlib: the dependency groups `server`
and `test`. On one core of 2.4 GHz with AVX2 a step takes about two seconds.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import shlex
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from tokenizers import Tokenizer
from tokenizers import __version__ as tokenizers_version

from tiny_model import corpus as corpora
from tiny_model import export
from tiny_model import tokenizer as bpe
from tiny_model.model import Shape, TinyLlama
from tiny_model.training import Curve, Ids, Recipe, Result, held_out_loss, train

REPOSITORY = Path(__file__).resolve().parent.parent
RECORD = REPOSITORY / "bench" / "results" / "tiny_model_training.json"
PICTURE = REPOSITORY / "docs" / "tiny_model_loss.png"
PACKAGED = REPOSITORY / "python" / "kvxfer" / "models" / "tiny-python-llama"
SAMPLE_PROMPTS = ("def ", "class ", "import ")


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--steps", type=int, default=1294, help="optimizer steps (default: %(default)s)")
    add("--batch-size", type=int, default=4, help="windows per step (default: %(default)s)")
    add("--seed", type=int, default=0, help="of weights, files and windows (default: %(default)s)")
    add("--threads", type=int, default=1, help="torch threads (default: %(default)s)")
    add(
        "--out",
        type=Path,
        default=REPOSITORY / "build" / "tiny-python-llama",
        help="model directory, also for training.json and loss.png (default: build/tiny-python-llama)",
    )
    add(
        "--publish",
        action="store_true",
        help="then copy model, record and picture to their places in the repository",
    )
    add(
        "--check-reproducible",
        action="store_true",
        help="train twice into temporary directories, compare weight hashes, keep nothing; "
        "combine with a small --steps",
    )
    small = parser.add_argument_group("for quick trials")
    small.add_argument("--corpus", type=Path, help="another directory of .py files")
    small.add_argument("--max-files", type=int, help="use only the first so many files, by name")
    small.add_argument("--vocab-size", type=int, default=Shape.vocab_size)
    small.add_argument("--layers", type=int, default=Shape.num_layers)
    small.add_argument("--context", type=int, default=Shape.context, help="window length in tokens")
    arguments = parser.parse_args(argv)
    if min(arguments.steps, arguments.batch_size, arguments.threads, arguments.context) < 1:
        parser.error("--steps, --batch-size, --threads and --context are positive")
    if arguments.context % Recipe.short_context:
        parser.error(f"--context is a multiple of {Recipe.short_context}")
    return arguments


@torch.no_grad()
def complete(
    model: TinyLlama, tokenizer: Tokenizer, prompt: str, *, temperature: float, num_tokens: int = 64
) -> str:
    """Prompt and answer of the model as it is served, that is with yarn; sampling has a fixed seed."""
    generator = torch.Generator().manual_seed(0)
    ids = tokenizer.encode(prompt, add_special_tokens=False).ids
    for _ in range(num_tokens):
        logits = model(torch.tensor([ids]), yarn=True)[0, -1]
        if temperature == 0:
            next_id = int(logits.argmax())
        else:
            weights = (logits / temperature).softmax(dim=-1)
            next_id = int(torch.multinomial(weights, 1, generator=generator))
        if next_id == bpe.END_OF_TEXT_ID:
            break
        ids.append(next_id)
    return str(tokenizer.decode(ids, skip_special_tokens=False))


def measure(model: TinyLlama, ids: Ids, num_bytes: int) -> dict[str, float]:
    """Held-out losses of the weights as saved: inside the trained length and far beyond it."""
    context = model.shape.context
    short = {
        name: held_out_loss(model, ids, length=context, max_windows=400, yarn=yarn)
        for name, yarn in (("context", False), ("context_yarn", True))
    }
    # The second half of windows of 8,192: targets that see 4,096 to 8,191 tokens before them.
    long = {
        name: held_out_loss(model, ids, length=8192, max_windows=4, yarn=yarn, skip=4096)
        for name, yarn in (("long_plain", False), ("long_yarn", True))
    }
    bits_per_byte = short["context"] / math.log(2) * len(ids) / num_bytes
    return {**short, **long, "bits_per_byte": bits_per_byte}


def load_corpus(arguments: argparse.Namespace, console: Console) -> corpora.Corpus:
    root = arguments.corpus or corpora.standard_library()
    corpus = corpora.load(root, seed=arguments.seed, max_files=arguments.max_files)
    console.print(
        f"corpus: {corpus.num_files} files, {corpus.num_bytes:,} bytes, sha256 {corpus.sha256[:16]}…"
    )
    if RECORD.is_file():
        recorded = json.loads(RECORD.read_text(encoding="utf-8"))
        if recorded["corpus"]["sha256"] != corpus.sha256:
            console.print(
                f"[bold yellow]warning:[/] the corpus differs from the recorded one (Python "
                f"{recorded['versions']['python']}, sha256 {recorded['corpus']['sha256'][:16]}…): "
                "the weights will differ from the committed ones"
            )
    return corpus


def run(arguments: argparse.Namespace, out: Path, console: Console) -> str:
    """One training run into ``out``; returns the hash of the weights."""
    torch.set_num_threads(arguments.threads)
    torch.use_deterministic_algorithms(True)
    corpus = load_corpus(arguments, console)
    tokenizer = bpe.train(corpus.train, vocab_size=arguments.vocab_size)
    train_ids = bpe.encode_documents(tokenizer, corpus.train)
    held_out_ids = bpe.encode_documents(tokenizer, corpus.held_out)
    shape = Shape(
        vocab_size=tokenizer.get_vocab_size(),
        num_layers=arguments.layers,
        context=arguments.context,
    )
    recipe = Recipe(steps=arguments.steps, batch_size=arguments.batch_size, seed=arguments.seed)
    console.print(f"tokens: {len(train_ids):,} to train on, {len(held_out_ids):,} held out")

    def snapshot(model: TinyLlama, curve: Curve) -> None:
        export.save_model(out, model, tokenizer)  # some milliseconds, and the run can be looked at

    result = train(train_ids, held_out_ids, shape, recipe, console=console, on_eval=snapshot)
    weights_sha256 = export.save_model(out, result.model, tokenizer)
    if arguments.check_reproducible:
        return weights_sha256
    if not export.save_licence(out):
        console.print(
            "[bold yellow]warning:[/] this Python installation has no LICENSE.txt to copy"
        )
    with torch.no_grad():
        for parameter in result.model.parameters():  # from here on, what a reader of the file sees
            parameter.copy_(parameter.to(torch.bfloat16))
    held_out_bytes = sum(len(text.encode()) for text in corpus.held_out)
    record = make_record(arguments, corpus, result, len(train_ids), weights_sha256)
    record["tokenizer_sha256"] = export.sha256_of(out / "tokenizer.json")
    record["held_out"] = measure(result.model, held_out_ids, held_out_bytes)
    export.save_record(out / "training.json", record)
    export.save_picture(out / "loss.png", record)
    samples = [
        (prompt, temperature, complete(result.model, tokenizer, prompt, temperature=temperature))
        for temperature in (0.0, 0.7)
        for prompt in SAMPLE_PROMPTS
    ]
    export.save_card(out, record, samples)
    return weights_sha256


def make_record(
    arguments: argparse.Namespace,
    corpus: corpora.Corpus,
    result: Result,
    num_train_tokens: int,
    weights_sha256: str,
) -> dict[str, Any]:
    shape, recipe = result.model.shape, result.recipe
    tokens = recipe.steps * recipe.batch_size * shape.context
    command = ["python", "tools/train_tiny_model.py", "--steps", str(recipe.steps)]
    defaults = vars(parse_arguments([]))
    for name in [
        "batch_size",
        "seed",
        "threads",
        "corpus",
        "max_files",
        "vocab_size",
        "layers",
        "context",
    ]:
        value = getattr(arguments, name)
        if value != defaults[name]:
            command += [f"--{name.replace('_', '-')}", str(value)]
    return {
        "command": shlex.join(command),
        "weights_sha256": weights_sha256,
        "versions": {
            "python": sys.version.split()[0],
            "torch": torch.__version__,
            "tokenizers": tokenizers_version,
        },
        "machine": export.machine(),
        "threads": arguments.threads,
        "corpus": {
            "sha256": corpus.sha256,
            "num_files": corpus.num_files,
            "num_bytes": corpus.num_bytes,
            "train_tokens": num_train_tokens,
        },
        "shape": dataclasses.asdict(shape),
        "parameters": sum(p.numel() for p in result.model.parameters()),
        "recipe": {**dataclasses.asdict(recipe), "decay_start": recipe.decay_start},
        "tokens": tokens,
        "epochs": tokens / num_train_tokens,
        "seconds": round(result.seconds, 1),
        "curve": dataclasses.asdict(result.curve),
    }


def publish(out: Path, console: Console) -> None:
    """Copy the finished run to where package and documentation read it."""
    PACKAGED.mkdir(parents=True, exist_ok=True)
    for path in sorted(out.iterdir()):
        target = {"training.json": RECORD, "loss.png": PICTURE}.get(path.name, PACKAGED / path.name)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())
        console.print(f"wrote {target.relative_to(REPOSITORY)}")


def main(argv: list[str]) -> int:
    arguments = parse_arguments(argv)
    console = Console()
    if arguments.check_reproducible:
        hashes = []
        for _ in range(2):
            with tempfile.TemporaryDirectory() as scratch:
                hashes.append(run(arguments, Path(scratch), console))
        same = hashes[0] == hashes[1]
        console.print(f"{'same' if same else 'DIFFERENT'}: {hashes[0]} {hashes[1]}")
        return 0 if same else 1
    console.print(f"weights sha256 {run(arguments, arguments.out, console)}")
    if arguments.publish:
        publish(arguments.out, console)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
