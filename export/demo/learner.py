"""The model while it learns: initial weights, losses, optimizers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..models.config import ModelConfig
from ..models.functions import MASK
from ..models.minicpmv import MiniCPMV
from .batches import IGNORED, PATCH_CLASSES, Batch
from .muon import Muon


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
        self.head = nn.Linear(config.vision.hidden_size, PATCH_CLASSES)
        side = 128
        axis = torch.arange(side, dtype=torch.float32)[:, None] * 10000.0 ** (
            -torch.arange(config.hidden_size // 4) / (config.hidden_size // 4)
        )
        self.waves: Tensor
        self.register_buffer("waves", torch.cat((axis.sin(), axis.cos()), dim=1), persistent=False)

    def losses(self, batch: Batch, vision_only: bool) -> tuple[Tensor, Tensor]:
        """Mean cross entropy of the auxiliary head and of the answers' tokens (zero if `vision_only`)."""
        device = self.waves.device

        def tensor(array: npt.NDArray[Any]) -> Tensor:
            return torch.from_numpy(array).to(device)

        patches = tensor(batch.patches).float() / 127.5 - 1.0
        index = torch.arange(patches.shape[1], device=device)[None, :]
        lengths = tensor(batch.lengths)[:, None]
        contexts = tensor(batch.context_lengths)[:, None]
        attention_bias = torch.where(index < contexts, 0.0, MASK)
        features = self.model.vpm(patches, tensor(batch.position_ids), attention_bias)
        classes = tensor(batch.classes)
        aux = F.cross_entropy(self.head(features).float().flatten(0, 1), classes.flatten(), ignore_index=IGNORED)
        if vision_only:
            return aux, aux.new_zeros(())
        columns = tensor(batch.columns)[:, None]
        waves = self.waves
        position = torch.cat((waves[index % columns], waves[(index // columns).clamp(max=len(waves) - 1)]), dim=-1)
        key_bias = torch.where(index < lengths, 0.0, MASK)
        images = self.model.resampler(features, key_bias, position)
        ids = tensor(batch.ids)
        embeds = self.model.llm.model.embed_tokens(ids)
        rows = tensor(batch.image_rows)
        embeds = embeds.flatten(0, 1).index_copy(0, rows, images.flatten(0, 1).to(embeds.dtype)).view_as(embeds)
        steps = torch.arange(ids.shape[1], device=device)
        logits, _, _ = self.model.llm(embeds, steps, steps)
        targets = tensor(batch.targets).flatten()
        return aux, F.cross_entropy(logits.float().flatten(0, 1), targets, ignore_index=IGNORED)


def optimizers(learner: Learner, recipe: Recipe, dtype: torch.dtype) -> list[torch.optim.Optimizer]:
    """Muon, with products in `dtype`, for the matrices inside the layers; AdamW for embeddings, norms and heads."""
    inner: list[nn.Parameter] = []
    outer: list[nn.Parameter] = []
    for name, parameter in learner.named_parameters():
        is_inner = parameter.ndim == 2 and not any(k in name for k in ("embed", "lm_head", "query", "head."))
        (inner if is_inner else outer).append(parameter)
    muon = Muon(inner, recipe.muon_lr, recipe.weight_decay, dtype)
    adamw = torch.optim.AdamW(outer, lr=recipe.adam_lr, betas=(0.9, 0.98), weight_decay=0.0)
    return [muon, adamw]
