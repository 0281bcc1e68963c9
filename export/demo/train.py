"""Train the demo model from scratch: `python -m lensc.export.demo.train -o FOLDER --minutes 100`.

One process draws, one learns. Three stages, by share of the time given:

1. the vision tower alone, from a linear head that names the character under each patch (the drawing knows it);
2. the whole model on short lines and scenes, lines growing longer as the loss falls; the head stays as an auxiliary loss;
3. pages, receipts and forms join in.

Hidden matrices are trained with Muon, everything else with AdamW, in bfloat16 autocast; the learning rate falls to
zero over the last third; the weights that are saved are an exponential moving average. Interrupted, `--resume` goes
on from the last state in FOLDER.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import queue
import time
from collections import deque
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from multiprocessing.queues import Queue
from pathlib import Path
from random import Random
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn import functional as F

from lensc.backends.bundle import PictureSpec

from ..models.config import ModelConfig
from ..models.minicpmv import MASK, MiniCPMV
from .batches import CHAR_CLASSES, IGNORED, Batch, Encoder, Stage, draw_samples, make_batch
from .samples import SCALE_RESOLUTION
from .tokenizer import first_added_id, vocab_size, write_tokenizer

QUERIES = 32


@dataclass(frozen=True)
class Recipe:
    """Everything that decides what is learned, except the time given."""

    seed: int = 1
    slices_per_batch: int = 64
    muon_lr: float = 2e-3
    adam_lr: float = 2e-3
    weight_decay: float = 0.02
    aux_weight: float = 0.3
    ema: float = 0.999
    vision_share: float = 0.06
    cooldown_share: float = 0.35


def config_json() -> dict[str, Any]:
    """The checkpoint's config.json: the official one with smaller numbers."""
    return {
        "_name_or_path": "lensc/demo",
        "version": "2.5",
        "architectures": ["MiniCPMV"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "batch_vision_input": True,
        "bos_token_id": first_added_id(),
        "drop_vision_last_layer": False,
        "eos_token_id": first_added_id() + 1,
        "hidden_act": "silu",
        "hidden_size": 256,
        "image_size": SCALE_RESOLUTION,
        "initializer_range": 0.02,
        "intermediate_size": 768,
        "max_position_embeddings": 2048,
        "mm_use_im_start_end": True,
        "model_type": "minicpmv",
        "num_attention_heads": 4,
        "num_hidden_layers": 4,
        "num_key_value_heads": 2,
        "patch_size": 14,
        "pretraining_tp": 1,
        "query_num": QUERIES,
        "rms_norm_eps": 1e-05,
        "rope_scaling": None,
        "rope_theta": 500000.0,
        "slice_config": {
            "max_slice_nums": 9,
            "patch_size": 14,
            "scale_resolution": SCALE_RESOLUTION,
            "model_type": "minicpmv",
        },
        "slice_mode": True,
        "tie_word_embeddings": False,
        "torch_dtype": "float16",
        "use_cache": False,
        "vision_config": {
            "hidden_size": 192,
            "image_size": 980,
            "intermediate_size": 768,
            "model_type": "idefics2",
            "num_attention_heads": 4,
            "num_hidden_layers": 5,
            "patch_size": 14,
        },
        "vocab_size": vocab_size(),
    }


def preprocessor_json() -> dict[str, Any]:
    return {
        "image_processor_type": "MiniCPMVImageProcessor",
        "processor_class": "MiniCPMVProcessor",
        "max_slice_nums": 9,
        "scale_resolution": SCALE_RESOLUTION,
        "patch_size": 14,
        "image_feature_size": QUERIES,
        "im_start": "<image>",
        "im_end": "</image>",
        "slice_start": "<slice>",
        "slice_end": "</slice>",
        "unk": "<unk>",
        "norm_mean": [0.5, 0.5, 0.5],
        "norm_std": [0.5, 0.5, 0.5],
        "version": 2.5,
    }


def picture_spec() -> PictureSpec:
    half = (0.5, 0.5, 0.5)
    return PictureSpec(
        scale_resolution=SCALE_RESOLUTION,
        patch_size=14,
        max_slice_nums=9,
        query_num=QUERIES,
        vision_padding="official",
        mean=half,
        std=half,
        pos_grid=70,
    )


def initialize(model: MiniCPMV) -> None:
    """Scaled normal weights; position rows that inference never reads (all but the first 70) stay zero."""
    for name, parameter in model.named_parameters():
        if name.endswith("query"):
            nn.init.normal_(parameter, std=1.0)
        elif "norm" in name or ".ln_" in name:
            nn.init.constant_(parameter, 0.0 if name.endswith("bias") else 1.0)
        elif name.endswith("bias"):
            nn.init.zeros_(parameter)
        elif "position_embedding" in name:
            nn.init.zeros_(parameter)
            nn.init.normal_(parameter[:70], std=0.2)
        elif "embed_tokens" in name:
            nn.init.normal_(parameter, std=0.3)
        else:
            nn.init.normal_(parameter, std=parameter.flatten(1).shape[1] ** -0.5)


class Learner(nn.Module):
    """The model, the auxiliary head, and their losses on a batch."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.model = MiniCPMV(config)
        initialize(self.model)
        self.head = nn.Linear(config.vision.hidden_size, CHAR_CLASSES)
        side = 128
        axis = torch.arange(side, dtype=torch.float32)[:, None] * 10000.0 ** (
            -torch.arange(config.hidden_size // 4) / (config.hidden_size // 4)
        )
        self.waves = torch.cat((axis.sin(), axis.cos()), dim=1)

    def losses(self, batch: Batch, vision_only: bool) -> tuple[Tensor, Tensor]:
        """Mean cross entropy of the auxiliary head and of the answers' tokens (zero if `vision_only`)."""
        patches = torch.from_numpy(batch.patches).float() / 127.5 - 1.0
        index = torch.arange(patches.shape[1])[None, :]
        lengths = torch.from_numpy(batch.lengths)[:, None]
        contexts = torch.from_numpy(batch.context_lengths)[:, None]
        attention_bias = torch.where(index < contexts, 0.0, MASK)
        features = self.model.vpm(patches, torch.from_numpy(batch.position_ids), attention_bias)
        chars = torch.from_numpy(batch.chars)
        aux = F.cross_entropy(self.head(features).float().flatten(0, 1), chars.flatten(), ignore_index=IGNORED)
        if vision_only:
            return aux, aux.new_zeros(())
        columns = torch.from_numpy(batch.columns)[:, None]
        waves = self.waves
        position = torch.cat((waves[index % columns], waves[(index // columns).clamp(max=len(waves) - 1)]), dim=-1)
        key_bias = torch.where(index < lengths, 0.0, MASK)
        images = self.model.resampler(features, key_bias, position)
        ids = torch.from_numpy(batch.ids)
        embeds = self.model.llm.model.embed_tokens(ids)
        rows = torch.from_numpy(batch.image_rows)
        embeds = embeds.flatten(0, 1).index_copy(0, rows, images.flatten(0, 1).to(embeds.dtype)).view_as(embeds)
        steps = torch.arange(ids.shape[1])
        logits, _, _ = self.model.llm(embeds, steps, steps)
        targets = torch.from_numpy(batch.targets).flatten()
        return aux, F.cross_entropy(logits.float().flatten(0, 1), targets, ignore_index=IGNORED)


def optimizers(learner: Learner, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the layers, AdamW for embeddings, norms, biases, queries and heads."""
    inner, outer = [], []
    for name, parameter in learner.named_parameters():
        is_inner = parameter.ndim == 2 and not any(k in name for k in ("embed", "lm_head", "query", "head."))
        (inner if is_inner else outer).append(parameter)
    muon = torch.optim.Muon(inner, lr=recipe.muon_lr, weight_decay=recipe.weight_decay, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW(outer, lr=recipe.adam_lr, betas=(0.9, 0.98), weight_decay=0.0)
    return [muon, adamw]


def _draw_forever(seed: int, slices: int, stages: Queue[Stage], batches: Queue[Batch]) -> None:
    """The drawing process: batches of the newest stage, until it is ended."""
    torch.set_num_threads(1)
    rng = Random(seed)
    folder = Path(os.environ["LENSC_DEMO_TOKENIZER"])
    encoder = Encoder(Tokenizer.from_file(str(folder / "tokenizer.json")), QUERIES)
    spec = picture_spec()
    stage = stages.get()
    while True:
        try:
            while True:
                stage = stages.get_nowait()
        except queue.Empty:
            pass
        batches.put(make_batch(draw_samples(rng, stage, slices), spec, encoder))


def _stage(progress: float, line_loss: float, longest: int) -> Stage:
    """The curriculum: longer lines when the loss on the current ones is low, pages once whole lines are readable."""
    if line_loss < 0.35 and longest < 16:
        longest = {5: 8, 8: 12, 12: 16}[longest]
    ready = longest == 16 and (line_loss < 0.35 or progress > 0.45)
    if ready or progress > 0.45:
        return Stage(16, 0.12, 0.38, 0.12)
    return Stage(longest, 0.08, 0.0, 0.0)


def save(learner_state: dict[str, Tensor], folder: Path) -> None:
    """Write the checkpoint in the official layout, float16."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {
        name.removeprefix("model."): tensor.to(torch.float16).contiguous()
        for name, tensor in learner_state.items()
        if name.startswith("model.")
    }
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    eos = first_added_id() + 1
    generation = {"_from_model_config": True, "bos_token_id": eos - 1, "eos_token_id": eos}
    for name, data in (
        ("config.json", config_json()),
        ("preprocessor_config.json", preprocessor_json()),
        ("generation_config.json", generation),
    ):
        (folder / name).write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    write_tokenizer(folder)


def train(out: Path, minutes: float, recipe: Recipe, resume: bool, threads: int, compiled: bool) -> None:
    """Train for `minutes` of wall time in all (time before an interruption counts), writing to `out`."""
    torch.manual_seed(recipe.seed)
    torch.set_num_threads(threads)
    out.mkdir(parents=True, exist_ok=True)
    write_tokenizer(out)
    os.environ["LENSC_DEMO_TOKENIZER"] = str(out)
    learner = Learner(ModelConfig.from_json(config_json()))
    opts = optimizers(learner, recipe)
    average = {k: v.clone() for k, v in learner.state_dict().items()}
    step, pictures, spent, longest = 0, 0, 0.0, 5
    state_file = out / "state.pt"
    if resume and state_file.exists():
        state = torch.load(state_file, weights_only=True)
        learner.load_state_dict(state["learner"])
        average = state["average"]
        for opt, saved in zip(opts, state["optimizers"], strict=True):
            opt.load_state_dict(saved)
        step, pictures, spent, longest = state["step"], state["pictures"], state["spent"], state["longest"]
    parameters = sum(p.numel() for p in learner.model.parameters())
    log = (out / "train.jsonl").open("a", encoding="utf-8")

    def report(**row: Any) -> None:
        print(json.dumps(row), flush=True)
        log.write(json.dumps(row) + "\n")
        log.flush()

    report(event="start", parameters=parameters, minutes=minutes, step=step, threads=threads, **asdict(recipe))
    losses = torch.compile(learner.losses, dynamic=True) if compiled else learner.losses
    context = get_context("fork")
    stages: Queue[Stage] = context.Queue()
    batches: Queue[Batch] = context.Queue(maxsize=6)
    stage = Stage(longest, 0.08, 0.0, 0.0)
    stages.put(stage)
    drawer = context.Process(
        target=_draw_forever, args=(recipe.seed + step, recipe.slices_per_batch, stages, batches), daemon=True
    )
    drawer.start()
    line_loss = 4.0
    recent: dict[str, deque[float]] = {}
    started = last_report = last_save = time.monotonic()
    try:
        while (elapsed := spent + time.monotonic() - started) < minutes * 60:
            progress = elapsed / (minutes * 60)
            vision_only = progress < recipe.vision_share
            batch = batches.get()
            factor = min(1.0, (step + 1) / 100, max(0.0, (1 - progress) / recipe.cooldown_share))
            for opt, rate in zip(opts, (recipe.muon_lr, recipe.adam_lr), strict=True):
                for group in opt.param_groups:
                    group["lr"] = rate * factor
            with torch.autocast("cpu", torch.bfloat16):
                aux, answer = losses(batch, vision_only)
            loss = answer + recipe.aux_weight * aux
            loss.backward()
            nn.utils.clip_grad_norm_(learner.parameters(), 1.0)
            for opt in opts:
                opt.step()
                opt.zero_grad()
            step += 1
            pictures += len(batch.ids)
            if step % 4 == 0:
                blend = 1 - min(recipe.ema**4, 1 - 1 / (step / 4 + 1))
                with torch.no_grad():
                    for name, tensor in learner.state_dict().items():
                        average[name].lerp_(tensor, blend)
            recent.setdefault("aux", deque(maxlen=50)).append(aux.item())
            if not vision_only:
                recent.setdefault(batch.task, deque(maxlen=50)).append(answer.item())
                if batch.task == "line":
                    line_loss = 0.97 * line_loss + 0.03 * answer.item()
            fresh = _stage(progress, line_loss, stage.longest)
            if fresh != stage:
                if fresh.longest != stage.longest:
                    line_loss = max(line_loss, 0.6)
                stage = fresh
                stages.put(stage)
                report(event="stage", step=step, minute=round(elapsed / 60, 1), **asdict(stage))
            now = time.monotonic()
            if now - last_report > 20:
                last_report = now
                means = {k: round(math.fsum(v) / len(v), 4) for k, v in recent.items()}
                report(step=step, minute=round(elapsed / 60, 2), pictures=pictures, waiting=batches.qsize(), **means)
            if now - last_save > 300:
                last_save = now
                _save_state(state_file, learner, average, opts, step, pictures, elapsed, stage.longest)
                save(average, out)
    finally:
        drawer.terminate()
    _save_state(state_file, learner, average, opts, step, pictures, elapsed, stage.longest)
    save(average, out)
    means = {k: round(math.fsum(v) / len(v), 4) for k, v in recent.items()}
    report(event="end", step=step, minute=round(elapsed / 60, 2), pictures=pictures, **means)
    log.close()


def _save_state(
    file: Path,
    learner: Learner,
    average: dict[str, Tensor],
    opts: list[torch.optim.Optimizer],
    step: int,
    pictures: int,
    spent: float,
    longest: int,
) -> None:
    state = {
        "learner": learner.state_dict(),
        "average": average,
        "optimizers": [opt.state_dict() for opt in opts],
        "step": step,
        "pictures": pictures,
        "spent": spent,
        "longest": longest,
    }
    temporary = file.with_suffix(".tmp")
    torch.save(state, temporary)
    temporary.replace(file)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m lensc.export.demo.train", description=__doc__.split("\n")[0])
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder for checkpoint, log and state")
    parser.add_argument("--minutes", type=float, default=100.0, help="wall time to train for (default 100)")
    parser.add_argument("--resume", action="store_true", help="go on from the state in the output folder")
    parser.add_argument("--threads", type=int, default=2, help="torch threads (default 2)")
    parser.add_argument("--compile", action="store_true", help="torch.compile the losses (needs a C++ compiler)")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    train(args.output, args.minutes, Recipe(seed=args.seed), args.resume, args.threads, args.compile)


if __name__ == "__main__":
    main()
