"""Seeing, and changing, what the linears of a module of `minicpmv` are given, without touching its definition."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .minicpmv import Resampler, ResamplerAttention, VisionEmbeddings

OnLinear = Callable[[str, Tensor], None]
ChangeInput = Callable[[str, Tensor], Tensor]


@contextmanager
def observed(name: str, module: nn.Module, see: OnLinear | ChangeInput | None) -> Iterator[None]:
    """While inside, call `see` with the full name of each linear's weight of block `name` and its input,
    float[tokens, in], before it computes. What `see` returns, if it is a tensor, is what the linear computes with.

    `StreamedModel` says under which names packed and transposed weights come.
    """
    handles: list[RemovableHandle] = []

    def seen(weight: str, x: Tensor) -> Tensor | None:
        assert see is not None
        changed = see(weight, x.flatten(0, -2))
        return None if changed is None else changed.view_as(x)

    def watch(weight: str, position: int, target: nn.Module) -> None:
        def hook(target: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
            changed = seen(weight, inputs[position])
            return None if changed is None else (*inputs[:position], changed, *inputs[position + 1 :])

        handles.append(target.register_forward_pre_hook(hook))

    def watch_output(weight: str, target: nn.Module) -> None:
        handles.append(target.register_forward_hook(lambda target, inputs, output: seen(weight, output)))

    try:
        for path, part in module.named_modules(prefix=name) if see is not None else ():
            if isinstance(part, nn.Linear):
                watch(f"{path}.weight", 0, part)
            elif isinstance(part, VisionEmbeddings):
                watch(f"{path}.patch_embedding.weight", 0, part)
            elif isinstance(part, ResamplerAttention):
                for position, third in enumerate("qkv"):
                    watch(f"{path}.in_proj_weight.{third}", position, part)
            elif isinstance(part, Resampler):
                watch_output(f"{path}.proj", part.ln_post)
        yield
    finally:
        for handle in handles:
            handle.remove()
