"""Muon with the number format of its products chosen by the machine.

`torch.optim.Muon` always multiplies in bfloat16, which torch's CPU build does one number at a time where the processor
has no AVX-512: a step of the demo model takes 15 s there and 1 s in float32. Same formula, same constants; the test
compares the two.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

MOMENTUM = 0.95
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the quintic that moves all singular values near 1 in few rounds (https://kellerjordan.github.io/posts/muon/)."""
ROUNDS = 5


def compute_dtype(device: str) -> torch.dtype:
    """bfloat16 where the device multiplies it at least as fast as float32, else float32."""
    if torch.device(device).type == "cpu" and not torch.backends.cpu.get_cpu_capability().startswith("AVX512"):
        return torch.float32
    return torch.bfloat16


def orthogonal(matrix: Tensor, dtype: torch.dtype) -> Tensor:
    """`matrix` (2-D) with its singular values moved near 1, computed and returned in `dtype`."""
    a, b, c = COEFFICIENTS
    wide = matrix.to(dtype)
    tall = wide.shape[0] > wide.shape[1]
    if tall:
        wide = wide.T
    wide = wide / wide.norm().clamp(min=1e-7)
    for _ in range(ROUNDS):
        gram = wide @ wide.T
        wide = torch.addmm(wide, torch.addmm(gram, gram, gram, beta=b, alpha=c), wide, beta=a)
    return wide.T if tall else wide


class Muon(torch.optim.Optimizer):
    """Momentum whose steps are made orthogonal, sized as AdamW's are (https://arxiv.org/abs/2502.16982).

    For the matrices of hidden layers only; `dtype` is that of the products, state and weights keep theirs.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], lr: float, weight_decay: float, dtype: torch.dtype) -> None:
        super().__init__(parameters, {"lr": lr, "weight_decay": weight_decay})
        self._dtype = dtype

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]  # nobody passes a closure
        """One step from the gradients that the parameters hold."""
        for group in self.param_groups:
            for parameter in group["params"]:
                grad = parameter.grad
                if grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(grad)
                momentum = state["momentum_buffer"].lerp_(grad, 1 - MOMENTUM)
                step = orthogonal(grad.lerp(momentum, MOMENTUM), self._dtype)
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.add_(step, alpha=-group["lr"] * 0.2 * math.sqrt(max(parameter.shape)))
