"""The judge computes what the reference model computes, prompts at once or token by token."""

from __future__ import annotations

import dataclasses

import pytest

torch = pytest.importorskip("torch", reason="pip install 'lensc[cuda]'")
from torch import Tensor

from lensc.backends._program import Constant, Place, WeightRecord
from lensc.bench.gpu_program import FREQUENCIES, TINY, RandomSource, decoder_program, vision_program
from lensc.bench.gpu_torch import TorchDecoder, TorchVision, Weights
from lensc.export.models.minicpmv import MiniCPMV

CPU = torch.device("cpu")


class FromModel(RandomSource):
    """The constants of a reference model, under the names that lowering gives them."""

    def __init__(self, model: MiniCPMV) -> None:
        super().__init__(CPU)
        self._state = dict(model.state_dict())
        for kind in ("weight", "bias"):
            parts = self._state[f"resampler.attn.in_proj_{kind}"].chunk(3)
            self._state |= {f"resampler.attn.in_proj_{kind}.{part}": x for part, x in zip("qkv", parts, strict=True)}
        # programs hold it normalized and projected
        query = model.resampler.ln_q(model.resampler.query)
        product = query @ self._state["resampler.attn.in_proj_weight.q"].T
        self._state["resampler.query"] = product + self._state["resampler.attn.in_proj_bias.q"]
        self._state["resampler.proj"] = self._state["resampler.proj"].T

    def constant(self, constant: Constant) -> Tensor:
        if constant.name == FREQUENCIES:
            return super().constant(constant)
        return self._state[constant.name].reshape(constant.rows, constant.width)

    def values(self, weight: WeightRecord) -> Tensor:
        return self._state[weight.name].reshape(weight.outputs, weight.inputs)


@pytest.fixture(scope="module")
def model() -> MiniCPMV:
    torch.manual_seed(1)
    model = MiniCPMV(TINY).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        one = parameter.ndim == 1 and name.endswith("weight")
        parameter.normal_(1 if one else 0, 0.1 if parameter.ndim == 1 else parameter.shape[-1] ** -0.5)
    return model


@pytest.mark.parametrize("batch", (1, 2))
@torch.no_grad()
def test_the_decoder_is_the_models(model: MiniCPMV, batch: int) -> None:
    _, program = decoder_program(TINY, 2, "f32")
    decoder = TorchDecoder(TINY, program, FromModel(model), torch.float32, 2, 20, batch)
    embeds, positions = torch.randn(batch, 14, 128), torch.arange(14)
    expected = model.llm(embeds, positions, positions)[0]
    whole = decoder(embeds, positions, range(14), 0)
    torch.testing.assert_close(whole, expected, rtol=1e-4, atol=1e-4)
    for start, end, past in ((0, 7, 0), (7, 8, 7), (8, 9, None), (9, 13, 9), (13, 14, None)):
        found = decoder(embeds[:, start:end], positions[start:end], range(end - start), past)
        torch.testing.assert_close(found, expected[:, start:end], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_the_tower_is_the_models(model: MiniCPMV) -> None:
    _, program = vision_program(TINY)
    vision = TorchVision(TINY, program, FromModel(model), torch.float32)
    patches, ids, places = torch.randn(3, 9, 588), torch.randint(0, 4900, (3, 9)), torch.randn(3, 9, 128)
    bias = torch.zeros(3, 9)
    expected = model.vision_encoder()(patches, ids, bias, bias, places)
    torch.testing.assert_close(vision(patches, ids, None, None, places), expected, rtol=1e-4, atol=1e-4)
    bias[1, 4:] = -1e4
    expected = model.vision_encoder()(patches, ids, bias, bias, places)
    torch.testing.assert_close(vision(patches, ids, bias, bias, places), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ("uint4", "uint2", "int8"))
def test_quantized_weights_are_what_they_stand_for(kind: str) -> None:
    """Against the reference of kernels.linear, with and without zero points, and a last group that is shorter."""
    from lensc.kernels.linear.reference import dequantize, unpack

    bits = {"uint4": 4, "uint2": 2, "int8": 8}[kind]
    place, group = Place("", 0), 0 if kind == "int8" else 48
    _, program = decoder_program(TINY, 1, "f32")
    source = RandomSource(CPU)
    for zero in (None, place)[: 1 if kind == "int8" else 2]:
        record = WeightRecord("w", kind, 24, 128, group, place, place, zero, "float")  # type: ignore[arg-type]
        step = dataclasses.replace(program.steps[1], weight=record)  # type: ignore[call-arg]
        values = source.values(record).numpy()
        if bits < 8:
            values = unpack(values.reshape(-1), bits, 24 * 128).reshape(24, 128)
        point = source.zero_point(record)
        zeros = None if kind == "int8" else torch.full((24, record.groups), 2 ** (bits - 1)).numpy()
        zeros = zeros if point is None else point.numpy()
        expected = dequantize(values, source.scale(record).numpy(), zeros, group)
        found = Weights(dataclasses.replace(program, steps=(step,)), source, torch.float32).matrix("w")
        torch.testing.assert_close(found.double(), torch.from_numpy(expected), rtol=1e-5, atol=1e-6)
