"""Train the demo model from scratch: `python -m lensc.export.demo.train -o FOLDER --minutes 108`.

One process draws, one learns. Three stages, by share of the budget:

1. the vision tower alone, from a linear head that names the character or shape under each patch (the drawing knows it);
2. the whole model on short lines and scenes, lines growing longer as the loss falls; the head stays as an auxiliary loss;
3. pages, receipts and forms join in, small ones first.

Hidden matrices are trained with Muon, everything else with AdamW, in bfloat16 where that is fast; the learning rate
falls to zero over the last third; the weights that are saved are an exponential moving average. Interrupted,
`--resume` goes on from the last state in FOLDER. The pictures follow from the seed; how many are seen follows from the
machine's speed when the budget is in minutes, so two runs give equally good models, not equal ones.
"""

from __future__ import annotations

import argparse
import json
import math
import pickle
import queue
import sys
import time
from collections import deque
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context
from multiprocessing.queues import Queue
from pathlib import Path
from random import Random
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn

from lensc.backends.errors import CheckpointError, ExecutionError, LensError, StorageError, UnavailableError

from ..checkpoint import Checkpoint
from ..models.config import ModelConfig
from .batches import Batch, Encoder, Stage, draw_samples, make_batch
from .files import QUERIES, config_json, picture_spec, write_checkpoint
from .fonts import font
from .learner import Learner, Recipe, optimizers
from .muon import compute_dtype
from .tokenizer import write_tokenizer

STATE = "train.state"
"""Beside the checkpoint, whose folder may hold no .pt file."""
SAVE_EVERY_S = 300.0
REPORT_EVERY_S = 20.0
START = Stage(longest=5, cells=0, scenes=0.12, pages=0.0, fields=0.0)
PAGES = Stage(longest=16, cells=3, scenes=0.2, pages=0.45, fields=0.1)
WHOLE = Stage(longest=16, cells=9, scenes=0.24, pages=0.48, fields=0.08)


@dataclass(frozen=True)
class Budget:
    """How long to train: wall time, or steps (0: no bound on steps)."""

    minutes: float
    steps: int = 0

    def used(self, elapsed_s: float, step: int) -> float:
        """The share that is used up; 1 or more is the end."""
        return max(elapsed_s / (self.minutes * 60), step / self.steps if self.steps else 0.0)


@dataclass(frozen=True)
class Position:
    """Where a run stands: what `--resume` takes up again, beside the tensors."""

    step: int = 0
    pictures: int = 0
    spent_s: float = 0.0
    stage: Stage = START
    line_loss: float = 4.0
    page_loss: float = 4.0


def next_stage(stage: Stage, used: float, line_loss: float, page_loss: float) -> Stage:
    """The curriculum: longer lines when the loss on the current ones is low, then small pages, then all pages.

    Whatever the losses, small pages start when 45 % of the budget is used, large ones at 72 %.
    """
    if used > 0.72 or (stage == PAGES and page_loss < 0.3):
        return WHOLE
    if stage in (PAGES, WHOLE):
        return stage
    if used > 0.45 or (stage.longest == 16 and line_loss < 0.35):
        return PAGES
    if line_loss < 0.35:
        return replace(stage, longest={5: 8, 8: 12, 12: 16}[stage.longest])
    return stage


@dataclass(frozen=True)
class Machine:
    """What to train on. On a GPU one drawing process is too slow. `cuda` is untested."""

    device: str = "cpu"
    threads: int = 2
    drawers: int = 1


def train(
    out: Path,
    budget: Budget,
    recipe: Recipe,
    resume: bool = False,
    init: Path | None = None,
    machine: Machine | None = None,
) -> Position:
    """Train until the budget is used (time before an interruption counts), writing checkpoint, log and state to `out`.

    `init` is a checkpoint of this model to go on from, without its optimizers' state: training begins with pages.
    Raises CheckpointError if there is nothing to resume or `init` is another model, StorageError if `out` cannot be
    written, UnavailableError if the device is not there.
    """
    machine = machine or Machine()
    if machine.device.startswith("cuda") and not torch.cuda.is_available():
        raise UnavailableError(f"device {machine.device}: torch {torch.__version__} sees no GPU here; use --device cpu")
    font(0, 12)  # raises here if the font packages are missing, rather than in the drawing process
    torch.manual_seed(recipe.seed)
    torch.set_num_threads(machine.threads)
    learner = Learner(ModelConfig.from_json(config_json()))
    start = Position()
    if init is not None:
        learner.model.load_state_dict(Checkpoint(init).load_model().state_dict())
        start, recipe = Position(stage=PAGES), replace(recipe, vision_share=0.0)
    learner.to(machine.device)
    dtype = compute_dtype(machine.device)
    opts = optimizers(learner, recipe, dtype)
    average = {name: tensor.clone() for name, tensor in learner.state_dict().items()}
    at = _restore(out / STATE, learner, average, opts) if resume else start
    try:
        out.mkdir(parents=True, exist_ok=True)
        write_tokenizer(out)
    except OSError as error:
        raise StorageError(f"{out}: cannot be written: {error.strerror}") from error

    def report(**row: Any) -> None:
        line = json.dumps(row)
        print(line, flush=True)
        with (out / "train.jsonl").open("a", encoding="utf-8") as log:
            log.write(line + "\n")

    def save() -> None:
        _save_state(out / STATE, learner, average, opts, at)
        write_checkpoint({n.removeprefix("model."): t for n, t in average.items() if n.startswith("model.")}, out)

    parameters = sum(p.numel() for p in learner.model.parameters())
    init_name = None if init is None else str(init)
    report(
        event="start",
        step=at.step,
        parameters=parameters,
        init=init_name,
        dtype=str(dtype).removeprefix("torch."),
        **asdict(machine),
        **asdict(budget),
        **asdict(recipe),
    )
    drawing = Drawing(out, recipe, at, machine.drawers)
    recent: dict[str, deque[float]] = {}
    last_report = last_save = last = time.monotonic()
    try:
        while (used := budget.used(at.spent_s, at.step)) < 1:
            batch = drawing.next()
            vision_only = used < recipe.vision_share
            aux, answer = _step(learner, opts, batch, recipe, used, at.step, vision_only, dtype)
            recent.setdefault("aux", deque(maxlen=50)).append(aux)
            line_loss, page_loss = at.line_loss, at.page_loss
            if not vision_only:
                recent.setdefault(batch.task, deque(maxlen=50)).append(answer)
                line_loss += 0.03 * (answer - line_loss) if batch.task == "line" else 0.0
                page_loss += 0.03 * (answer - page_loss) if batch.task == "page" else 0.0
            stage = next_stage(at.stage, used, line_loss, page_loss)
            if stage != at.stage:
                drawing.show(stage)
                line_loss = max(line_loss, 0.6)  # of what comes, not of what was learned
                report(event="stage", step=at.step, minute=round(at.spent_s / 60, 1), **asdict(stage))
            now = time.monotonic()
            spent_s = at.spent_s + now - last
            at = Position(at.step + 1, at.pictures + len(batch.ids), spent_s, stage, line_loss, page_loss)
            last = now
            if at.step % 4 == 0:
                _blend(average, learner, recipe.ema**4, at.step // 4)
            if now - last_report > REPORT_EVERY_S:
                last_report = now
                report(step=at.step, minute=round(at.spent_s / 60, 2), pictures=at.pictures, **_means(recent))
            if now - last_save > SAVE_EVERY_S:
                last_save = now
                save()
    finally:
        drawing.end()
    save()
    report(event="end", step=at.step, minute=round(at.spent_s / 60, 2), pictures=at.pictures, **_means(recent))
    return at


def _step(
    learner: Learner,
    opts: list[torch.optim.Optimizer],
    batch: Batch,
    recipe: Recipe,
    used: float,
    step: int,
    vision_only: bool,
    dtype: torch.dtype,
) -> tuple[float, float]:
    """One update; returns the auxiliary and the answer loss before it."""
    factor = min(1.0, (step + 1) / 100, max(0.0, (1 - used) / recipe.cooldown_share))
    for opt, rate in zip(opts, (recipe.muon_lr, recipe.adam_lr), strict=True):
        for group in opt.param_groups:
            group["lr"] = rate * factor
    with torch.autocast(learner.waves.device.type, dtype, enabled=dtype != torch.float32):
        aux, answer = learner.losses(batch, vision_only)
    (answer + recipe.aux_weight * aux).backward()  # type: ignore[no-untyped-call]
    nn.utils.clip_grad_norm_(learner.parameters(), 1.0)
    for opt in opts:
        opt.step()
        opt.zero_grad()
    return aux.item(), answer.item()


def _blend(average: dict[str, Tensor], learner: Learner, decay: float, updates: int) -> None:
    """Move the average towards the learner; an early average forgets its random start (weight 1 / updates)."""
    weight = 1 - min(decay, 1 - 1 / (updates + 1))
    with torch.no_grad():
        for name, tensor in learner.state_dict().items():
            average[name].lerp_(tensor, weight)


def _means(recent: dict[str, deque[float]]) -> dict[str, float]:
    return {name: round(math.fsum(values) / len(values), 4) for name, values in recent.items()}


class Drawing:
    """The drawing processes: each has its own seed and its own queue of stages, all fill one queue of batches."""

    def __init__(self, folder: Path, recipe: Recipe, at: Position, drawers: int) -> None:
        # Forking would copy torch's threads' locks into the child; a forked server starts clean.
        context = get_context("forkserver")
        self._batches: Queue[Batch] = context.Queue(maxsize=6 * drawers)
        self._stages: list[Queue[Stage]] = [context.Queue() for _ in range(drawers)]
        self.show(at.stage)
        self._processes = [
            context.Process(
                target=_draw_forever,
                args=(folder, recipe.seed + at.step + 1_000_003 * i, recipe.slices_per_batch, stages, self._batches),
                daemon=True,
            )
            for i, stages in enumerate(self._stages)
        ]
        for process in self._processes:
            process.start()

    def next(self) -> Batch:
        """The next batch. Raises ExecutionError if a drawing process died, which has printed why."""
        while True:
            with suppress(queue.Empty):
                return self._batches.get(timeout=2)
            dead = [process.exitcode for process in self._processes if not process.is_alive()]
            if dead:
                raise ExecutionError(f"a drawing process ended with {dead[0]}; what it printed says why")

    def show(self, stage: Stage) -> None:
        """Let all batches from now on (a few are waiting already) be of `stage`."""
        for stages in self._stages:
            stages.put(stage)

    def end(self) -> None:
        """End the processes and drop what they drew."""
        for process in self._processes:
            process.terminate()
            process.join()
        queues: list[Queue[Any]] = [self._batches, *self._stages]
        for waiting in queues:
            waiting.close()
            waiting.cancel_join_thread()


def _draw_forever(folder: Path, seed: int, slices: int, stages: Queue[Stage], batches: Queue[Batch]) -> None:
    rng = Random(seed)
    encoder = Encoder(Tokenizer.from_file(str(folder / "tokenizer.json")), QUERIES)
    spec = picture_spec()
    stage = stages.get()
    while True:
        with suppress(queue.Empty):
            while True:
                stage = stages.get_nowait()
        batches.put(make_batch(draw_samples(rng, stage, slices), spec, encoder))


def _save_state(
    file: Path, learner: Learner, average: dict[str, Tensor], opts: list[torch.optim.Optimizer], at: Position
) -> None:
    state = {
        "learner": learner.state_dict(),
        "average": average,
        "optimizers": [opt.state_dict() for opt in opts],
        "position": asdict(at),
    }
    temporary = file.with_suffix(".tmp")
    torch.save(state, temporary)
    temporary.replace(file)


def _restore(file: Path, learner: Learner, average: dict[str, Tensor], opts: list[torch.optim.Optimizer]) -> Position:
    """Load what `_save_state` wrote into the given objects. Raises CheckpointError."""
    try:
        state = torch.load(file, weights_only=True, map_location=learner.waves.device)
        learner.load_state_dict(state["learner"])
        for name, tensor in state["average"].items():
            average[name].copy_(tensor)
        for opt, saved in zip(opts, state["optimizers"], strict=True):
            opt.load_state_dict(saved)
        position = state["position"]
        return Position(**(position | {"stage": Stage(**position["stage"])}))
    except FileNotFoundError:
        raise CheckpointError(f"{file} is not there: nothing to resume; start without --resume") from None
    except (pickle.UnpicklingError, RuntimeError, ValueError, KeyError, TypeError, EOFError) as error:
        reason = str(error).splitlines()[0][:100]
        raise CheckpointError(f"{file} is not a state of this training ({reason}); start without --resume") from None


def main() -> int:
    """Parse the command line and train; errors are one line."""
    parser = argparse.ArgumentParser(prog="python -m lensc.export.demo.train", description=str(__doc__).split("\n")[0])
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder for checkpoint, log and state")
    parser.add_argument("--minutes", type=float, default=108.0, help="wall time to train for (default 108)")
    parser.add_argument("--steps", type=int, default=0, help="end after this many steps instead (default: no bound)")
    parser.add_argument("--resume", action="store_true", help="go on from the state in the output folder")
    parser.add_argument(
        "--init", type=Path, metavar="CHECKPOINT", help="go on from these weights, e.g. the shipped ones"
    )
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="default cpu; cuda is untested")
    parser.add_argument("--threads", type=int, default=2, help="torch threads (default 2)")
    parser.add_argument("--drawers", type=int, default=1, help="drawing processes (default 1; a GPU wants more)")
    parser.add_argument("--seed", type=int, default=1, help="default 1")
    args = parser.parse_args()
    for flag, value, least in (
        ("--minutes", args.minutes, 0.01),
        ("--steps", args.steps, 0),
        ("--threads", args.threads, 1),
        ("--drawers", args.drawers, 1),
    ):
        if not value >= least:
            parser.error(f"{flag} {value}: expected at least {least}")
    try:
        machine = Machine(args.device, args.threads, args.drawers)
        train(args.output, Budget(args.minutes, args.steps), Recipe(seed=args.seed), args.resume, args.init, machine)
    except LensError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
