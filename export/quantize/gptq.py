"""Calibrated rounding: GPTQ. Each weight is rounded so that it makes up for the errors of those rounded before it.

The inputs X seen by a linear layer say what an error costs: |X (w - q)|^2 = (w - q)^T H (w - q) with H = X^T X. With the
Cholesky factor H = L L^T this is |L^T (w - q)|^2, and L^T is upper triangular: going from the last input to the first,
term i is L[i,i] (w_i - q_i) + sum of L[j,i] (w_j - q_j) over the j already rounded, so the best q_i is the nearest to

    w_i + sum_j L[j,i] (w_j - q_j) / L[i,i].

That is the method of Frantar et al. (arXiv 2210.17323), whose updates with the inverse of H it equals in exact
arithmetic (Chen et al., arXiv 2507.18553, who recognize Babai's nearest plane), at the cost of one Cholesky
factorization instead of two and an inversion, and with one matrix of H's size instead of two.

Inputs with the largest mean square are rounded first, when all others can still make up for them. Scales are fixed
beforehand from the weights (static groups), so the order needs no index at run time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lensc.backends.errors import InputError

from .grid import round_to_grid
from .parallel import for_each, pieces
from .weights import QuantizedWeight, WeightFormat, check_weight, fit_scales

Order = Literal["activation", "natural"]

SHRINK = (1.0, 0.95, 0.9)
"""Ranges tried for the scales. Narrower ones suit weights that are only rounded, but here every weight also carries the
corrections for others and must not be clipped: on the demo decoder the longer list is 2 % worse at 4 bits."""

DAMPINGS = 6
"""How often the damping is raised tenfold before a matrix is given up."""

ROWS = 2048
"""Outputs that a thread rounds together. Fewer make the many small steps dearer (512: a third more time in all), more
would leave the second thread of a weight with 4096 outputs without work."""

STEPS = 16
"""Inputs that are rounded one after the other, each with the errors of those before it; more go in halves."""

PIECE = 1 << 22
"""Numbers of a temporary while the matrix is permuted (16 MiB)."""

PANEL = 1024
"""Rows of the matrix that are summed together, from the diagonal on: of 4096 inputs five eighths are computed."""


class Hessian:
    """X^T X over all activations X: float[tokens, in] that were added. Holds in * in * 4 bytes."""

    def __init__(self, inputs: int) -> None:
        self._matrix = torch.zeros(inputs, inputs)
        self._is_whole = True
        self.tokens = 0

    @property
    def matrix(self) -> Tensor:
        """float32[in, in], symmetric."""
        if not self._is_whole:
            for part in pieces(self._matrix.shape[0], PANEL):
                self._matrix[part.stop :, part] = self._matrix[part, part.stop :].mT
            self._is_whole = True
        return self._matrix

    def add(self, activations: Tensor) -> None:
        """Add activations: float[..., in]. Raises InputError for another width, NaN or Inf."""
        x = activations.reshape(-1, activations.shape[-1]).float()
        inputs = self._matrix.shape[0]
        if x.shape[1] != inputs:
            raise InputError(f"activations {list(activations.shape)}: expected {inputs} channels")
        if not bool(torch.isfinite(x).all()):
            raise InputError(f"activations {list(activations.shape)} hold NaN or Inf")
        for part in pieces(inputs, PANEL):
            self._matrix[part, part.start :].addmm_(x[:, part].mT, x[:, part.start :])
        self._is_whole = False
        self.tokens += x.shape[0]

    @property
    def diagonal(self) -> Tensor:
        """The mean square of each input: float32[in]."""
        return self._matrix.diagonal() / max(1, self.tokens)

    def factor(self, damp: float = 0.01, order: Order = "activation") -> Factor:
        """The Cholesky factor, in a matrix of its own; the Hessian is left as it is.

        `damp` times the mean of the diagonal is added to the diagonal, ten times more each time that the matrix is
        not positive definite. Inputs that were always 0 thus stand alone: their weights are rounded to the nearest.
        Raises InputError where that does not help, and for activations that are all 0 or too large to be squared.
        """
        mean = float(self._matrix.diagonal().double().mean())
        if not 0 < mean < torch.inf:
            raise InputError(
                f"Hessian of {self.tokens} tokens: mean of the diagonal is {mean}, expected a positive number; "
                "calibrate with other data"
            )
        inputs = self._matrix.shape[0]
        columns = torch.arange(inputs - 1, -1, -1)
        if order == "activation":
            columns = self.matrix.diagonal().argsort(stable=True)
        # LAPACK works in columns: the transpose of a contiguous matrix is factored in place
        work = torch.empty(inputs, inputs).mT
        info = torch.empty((), dtype=torch.int32)
        for _ in range(DAMPINGS):
            _permute(self.matrix, columns, work)
            work.diagonal().add_(damp * mean)
            torch.linalg.cholesky_ex(work, out=(work, info))
            if int(info) == 0:
                return Factor(work, columns, self.diagonal)
            damp = max(10 * damp, 1e-6)
        raise InputError(
            f"the Hessian of {inputs} inputs from {self.tokens} tokens is not positive definite even with {damp / 10:g} "
            "of its mean diagonal added; calibrate with other data"
        )


@dataclass(frozen=True, eq=False)
class Factor:
    """A Hessian as `quantize_gptq` uses it, once for all weights that read the same inputs.

    lower: float32[in, in], lower lower^T = the damped Hessian with rows and columns in the order `columns`, undefined
    above the diagonal; columns: int64[in], the last is rounded first; diagonal: float32[in], the mean square of each
    input.
    """

    lower: Tensor
    columns: Tensor
    diagonal: Tensor


def quantize_gptq(
    weight: Tensor,
    hessian: Hessian | Factor,
    format: WeightFormat,
    damp: float = 0.01,
    block: int = 128,
    order: Order = "activation",
    search: bool = True,
) -> QuantizedWeight:
    """Round `weight: float[out, in]` to `format` so that its outputs on the calibration data change least.

    `search` as in `quantize_rtn`, errors weighed by the Hessian's diagonal. With a `Factor`, which saves factorizing
    again and lets go of the Hessian, `damp` and `order` have no effect. `block` inputs are rounded between updates of
    the rest: that changes the speed, and results no more than float32 does. Beside weight and result it holds
    in * in * 4 bytes for the factor, and in * `ROWS` * 4 for each thread. Raises InputError for NaN or Inf, and where the Hessian cannot
    be factored.
    """
    check_weight(weight)
    outputs, inputs = weight.shape
    if hessian.diagonal.shape[0] != inputs:
        raise InputError(f"weight {list(weight.shape)}: the Hessian has {hessian.diagonal.shape[0]} inputs")
    scales, zeros = fit_scales(weight, format, SHRINK if search else (), hessian.diagonal, are_rounded=False)
    factor = hessian if isinstance(hessian, Factor) else hessian.factor(damp, order)
    lower, columns = factor.lower, factor.columns
    group = columns // format.group_of(inputs)
    values = torch.empty(outputs, inputs, dtype=format.dtype)

    def round_rows(rows: slice) -> None:
        # errors[i] of input columns[i], a row each so that all that is read and written is contiguous
        errors = torch.empty(inputs, rows.stop - rows.start)
        for end in range(inputs, 0, -block):
            start = max(0, end - block)
            here = columns[start:end]
            truth = torch.index_select(weight[rows], 1, here).float().mT.contiguous()
            scale = scales[rows].mT[group[start:end]]
            zero = None if zeros is None else zeros[rows].mT[group[start:end]].float()
            pull = lower[end:, start:end].mT @ errors[end:]
            rounded = torch.empty_like(truth)
            _round_block(truth, pull, lower[start:end, start:end], scale, zero, format, errors[start:end], rounded)
            values[rows, here] = rounded.mT.to(values.dtype)

    for_each(round_rows, outputs, ROWS)
    return QuantizedWeight(values, scales, zeros, format)


def _round_block(
    truth: Tensor,
    pull: Tensor,
    lower: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    format: WeightFormat,
    errors: Tensor,
    values: Tensor,
) -> None:
    """Round the inputs of one block, the last first: write `values` and `errors`, and use `pull` up.

    truth: float32[block, out], the weights; pull: float32[block, out], what the errors of earlier blocks add to L[i,i]
    times each weight; lower: float32[block, block], the block's part of the factor; scale, zero: float32[block, out].
    """
    size = truth.shape[0]
    if size > STEPS:
        # the errors of the later half reach the earlier one in one product
        for part in (slice(size // 2, size), slice(0, size // 2)):
            if part.stop < size:
                pull[part].addmm_(lower[part.stop :, part].mT, errors[part.stop :])
            zeros = None if zero is None else zero[part]
            _round_block(
                truth[part], pull[part], lower[part, part], scale[part], zeros, format, errors[part], values[part]
            )
        return
    diagonal = lower.diagonal().tolist()
    for i in range(size - 1, -1, -1):
        if i + 1 < size:
            pull[i].addmv_(errors[i + 1 :].mT, lower[i + 1 :, i])
        origin: Tensor | float = float(format.zero_point) if zero is None else zero[i]
        wanted = torch.add(truth[i], pull[i], alpha=1 / diagonal[i])
        values[i] = round_to_grid(wanted, scale[i], origin, format.lowest, format.highest)
        torch.addcmul(truth[i], values[i] - origin, scale[i], value=-1, out=errors[i])


def _permute(matrix: Tensor, columns: Tensor, out: Tensor) -> None:
    """out = matrix[columns][:, columns] for a symmetric matrix, piece by piece."""
    size = matrix.shape[0]
    count = min(size, max(1, PIECE // size))
    # two buffers for all pieces: memory that is freed between them does not all go back to the system
    rows, piece = torch.empty(count, size), torch.empty(count, size)
    for part in pieces(size, count):
        length = part.stop - part.start
        torch.index_select(matrix, 0, columns[part], out=rows[:length])
        torch.index_select(rows[:length], 1, columns, out=piece[:length])
        # the matrix is symmetric, and out's columns are contiguous
        out[:, part] = piece[:length].mT
