# SPDX-FileCopyrightText: The kvxfer authors
# SPDX-License-Identifier: Apache-2.0
"""The training loop: fixed seed, fixed order of windows, one progress bar."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import FrameType

import numpy as np
import numpy.typing as npt
import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from tiny_model.model import Shape, TinyLlama
from tiny_model.optimizer import Muon

Ids = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Recipe:
    """Everything besides the text that decides the weights."""

    steps: int
    batch_size: int = 4
    seed: int = 0
    matrix_lr: float = 0.01
    vector_lr: float = 0.003  # embedding and norms
    warmup_steps: int = 40
    decay_fraction: float = 0.5  # the last part of the run, linearly to 0
    # Every so many steps the same tokens are cut into windows this short. Prompts like `def ` have no past,
    # and of 512-token windows only one token in 512 has none either: after 300 steps the loss on it
    # was 5.1 nats where a table of bigrams reaches 4.0.
    short_every: int = 4
    short_context: int = 32
    eval_every: int = 100
    max_eval_windows: int = 32

    @property
    def decay_start(self) -> int:
        return self.steps - int(self.steps * self.decay_fraction)

    def lr_scale(self, step: int) -> float:
        """Factor on both rates: ramp up, stay, fall to (almost) 0 at the last step."""
        warm = (step + 1) / self.warmup_steps
        left = (self.steps - step) / max(1, self.steps - self.decay_start)
        return min(1.0, warm, left)


@dataclass
class Curve:
    """What the picture is drawn from. Losses in nats per token."""

    train: list[tuple[int, float]] = field(default_factory=list)
    held_out: list[tuple[int, float]] = field(default_factory=list)


@dataclass(frozen=True)
class Result:
    model: TinyLlama
    recipe: Recipe  # with the number of steps really done
    curve: Curve
    seconds: float


def _batches(ids: Ids, recipe: Recipe, length: int) -> Iterator[torch.Tensor]:
    """Windows of ``length + 1`` ids, each epoch cut at another offset and shuffled anew.

    The order depends on seed and epoch, not on the number of steps: a shorter run sees the same start.
    """
    epoch = 0
    pending: list[int] = []
    while True:
        while len(pending) < recipe.batch_size:
            rng = np.random.default_rng([recipe.seed, epoch])
            starts = np.arange(rng.integers(length), len(ids) - length, length)
            if len(starts) == 0:
                raise SystemExit(f"the corpus has {len(ids)} tokens, too few for one window")
            pending += rng.permutation(starts).tolist()
            epoch += 1
        batch, pending = pending[: recipe.batch_size], pending[recipe.batch_size :]
        yield torch.from_numpy(np.stack([ids[start : start + length + 1] for start in batch]))


@torch.no_grad()
def held_out_loss(
    model: TinyLlama, ids: Ids, *, length: int, max_windows: int, yarn: bool = False, skip: int = 0
) -> float:
    """Mean loss over windows spread evenly over ``ids``; ``skip`` leaves out each window's first targets."""
    starts = np.arange(0, len(ids) - length, length)
    if len(starts) > max_windows:
        starts = starts[np.linspace(0, len(starts) - 1, max_windows).astype(np.int64)]
    if len(starts) == 0:
        return math.nan
    losses = []
    for start in starts:
        window = torch.from_numpy(ids[start : start + length + 1])[None]
        hidden = model.hidden(window[:, :-1], yarn=yarn)[0, skip:]
        logits = torch.nn.functional.linear(hidden, model.model.embed_tokens.weight)
        losses.append(torch.nn.functional.cross_entropy(logits, window[0, skip + 1 :]).item())
    return float(np.mean(losses))


def _wind_down(recipe: Recipe, step: int) -> Recipe:
    """The recipe that has just reached its decay; what was done so far is also that recipe's start."""
    steps = math.ceil(step / (1 - recipe.decay_fraction))
    return Recipe(**{**recipe.__dict__, "steps": max(1, steps)})


def train(
    train_ids: Ids,
    held_out_ids: Ids,
    shape: Shape,
    recipe: Recipe,
    *,
    console: Console,
    on_eval: Callable[[TinyLlama, Curve], None] | None = None,
) -> Result:
    """Train from scratch. Ctrl-C in the constant part of the schedule begins the decay at once: the
    weights are then those of a run with the smaller ``steps``, which is what the result records."""
    model = TinyLlama(shape, generator=torch.Generator().manual_seed(recipe.seed))
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if p.ndim == 1 or "embed" in n]
    optimizers: list[tuple[torch.optim.Optimizer, float]] = [
        (Muon(matrices, lr=recipe.matrix_lr), recipe.matrix_lr),
        (
            torch.optim.AdamW(others, lr=recipe.vector_lr, betas=(0.9, 0.95), weight_decay=0.0),
            recipe.vector_lr,
        ),
    ]
    asked_to_stop = False

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal asked_to_stop
        if asked_to_stop:
            raise KeyboardInterrupt  # the second time it is meant
        asked_to_stop = True

    curve = Curve()
    batches = _batches(train_ids, recipe, shape.context)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.3f}  {task.fields[speed]:.0f} tokens/s"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    previous_handler = signal.signal(signal.SIGINT, stop)
    started = time.monotonic()
    recent: list[float] = []
    try:
        with Progress(*columns, console=console) as progress:
            bar = progress.add_task("training", total=recipe.steps, loss=math.nan, speed=0.0)
            step = 0
            while step < recipe.steps:
                for optimizer, lr in optimizers:
                    for group in optimizer.param_groups:
                        group["lr"] = lr * recipe.lr_scale(step)
                batch = next(batches)
                inputs, targets = batch[:, :-1], batch[:, 1:]
                if (step + 1) % recipe.short_every == 0:
                    inputs = inputs.reshape(-1, recipe.short_context)
                    targets = targets.reshape(-1, recipe.short_context)
                loss = model.loss(inputs, targets)
                loss.backward()  # type: ignore[no-untyped-call]
                torch.nn.utils.clip_grad_norm_(others, 1.0)
                for optimizer, _ in optimizers:
                    optimizer.step()
                    optimizer.zero_grad()
                step += 1
                recent.append(loss.item())
                seconds = time.monotonic() - started
                speed = step * recipe.batch_size * shape.context / seconds
                progress.update(bar, completed=step, loss=recent[-1], speed=speed)
                if asked_to_stop and step < recipe.decay_start:
                    recipe = _wind_down(recipe, step)
                    progress.update(bar, total=recipe.steps)
                    progress.console.print(f"winding down: {recipe.steps} steps in all")
                if step % recipe.eval_every == 0 or step == recipe.steps:
                    held_out = held_out_loss(
                        model,
                        held_out_ids,
                        length=shape.context,
                        max_windows=recipe.max_eval_windows,
                    )
                    curve.train.append((step, round(float(np.mean(recent)), 4)))
                    curve.held_out.append((step, round(held_out, 4)))
                    recent.clear()
                    # Lines, beside the bar, so that a log file shows the run too.
                    progress.console.print(
                        f"step {step}/{recipe.steps}  train {curve.train[-1][1]:.3f}  "
                        f"held out {held_out:.3f}  {speed:.0f} tokens/s  {seconds:.0f} s"
                    )
                    if on_eval is not None:
                        on_eval(model, curve)
    finally:
        signal.signal(signal.SIGINT, previous_handler)
    return Result(model, recipe, curve, time.monotonic() - started)
