"""Attention on a GPU, or in Triton's interpreter, against the reference."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="pip install 'lensc[cuda]'")
pytest.importorskip("triton", reason="pip install 'lensc[cuda]'")

from lensc.kernels import nvrtc
from lensc.kernels.attention import reference
from lensc.kernels.attention.gpu import (
    attention,
    decode_attention,
    decode_scratch,
    one_token,
    prefill_attention,
    takes_one_token,
)
from lensc.kernels.rope.gpu import rope_append
from lensc.kernels.rope.reference import quantize_rows

LIMIT = {
    torch.float32: 1e-5,
    torch.float16: 2.0**-10,
    torch.bfloat16: 2.0**-7 if torch.cuda.is_available() else 2.0**-6,
}
"""Weights and results are rounded to the type (cut off, in the interpreter), each by this half of what is added up."""
TYPES = (
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.bfloat16, torch.int8),
    (torch.float16, torch.float16),
    (torch.float32, torch.int8),
)


class Cached:
    """A cache filled up to past + tokens, and queries; behind what is filled stands what must not be read."""

    def __init__(
        self,
        past: int,
        tokens: int,
        heads: tuple[int, int],
        dim: int,
        batch: int,
        types: tuple[torch.dtype, torch.dtype],
        device: torch.device,
    ) -> None:
        self.dtype, kind = types
        self.tokens, self.batch, self.length, self.scale = tokens, batch, past + tokens, dim**-0.5
        self.device = device
        random = np.random.default_rng([past, tokens, dim, batch])
        self.q = random.standard_normal((batch, tokens, heads[0], dim)).astype(np.float32)
        self.rows = [random.standard_normal((batch, heads[1], past + tokens, dim)).astype(np.float32) for _ in range(2)]
        self.rows[0][..., -1] *= 4  # an outlier column
        self.rows[1][..., 0] *= 20
        self.kind = kind
        self.past = torch.tensor([past], dtype=torch.int32, device=device)

    def stored(self) -> tuple[list[torch.Tensor], list[torch.Tensor | None]]:
        """The cache with spare places; `rows` become what it holds."""
        caches, scales, spare = [], [], ((0, 0), (0, 0), (0, 5), (0, 0))
        for side, rows in enumerate(self.rows):
            if self.kind == torch.int8:
                integers, scale = quantize_rows(rows)
                self.rows[side] = integers * scale[..., None].astype(np.float64)
                caches.append(torch.from_numpy(np.pad(integers, spare, constant_values=-128)).to(self.device))
                padded = np.pad(scale, spare[:3], constant_values=np.nan)
                scales.append(torch.from_numpy(padded).to(self.device))
            else:
                cache = torch.from_numpy(np.pad(rows, spare, constant_values=np.nan)).to(self.kind)
                self.rows[side] = cache[:, :, : self.length].double().numpy()
                caches.append(cache.to(self.device))
                scales.append(None)
        return caches, scales

    def check(self, splits: int | None, limit: float = 1, launches: int = 1) -> None:
        """By decode_attention if there are splits, over one scratch, else by prefill_attention."""
        caches, scales = self.stored()
        q = torch.from_numpy(self.q).to(self.dtype)
        _, _, heads, dim = q.shape
        given = (q.reshape(-1, heads, dim).to(self.device), *caches, self.past, self.scale, self.batch, self.tokens)
        if splits is None:
            results = [prefill_attention(*given, *scales)]
        else:
            kv_heads = caches[0].shape[1]
            scratch = decode_scratch(self.batch, self.tokens, heads, kv_heads, dim, self.device, splits)
            results = [decode_attention(*given, scratch, *scales) for _ in range(launches)]
            assert (scratch.finished == 0).all()
        past = self.length - self.tokens
        for b in range(self.batch):
            keys, values = self.rows[0][b], self.rows[1][b]
            y, sizes = (
                reference.causal_attention(q[b].double().numpy(), keys, v, past, self.scale)
                for v in (values, np.abs(values))
            )
            for result in results:
                assert result.dtype == self.dtype
                found = result.reshape(self.batch, self.tokens, -1)[b].double().cpu().numpy()
                assert (np.abs(found - y) <= limit * LIMIT[self.dtype] * sizes).all()


@pytest.mark.parametrize(("tokens", "past"), ((1, 0), (1, 1), (1, 63), (1, 200), (2, 0), (2, 63), (8, 0), (8, 200)))
def test_decode_past(tokens: int, past: int, device: torch.device) -> None:
    Cached(past, tokens, (4, 2), 64, 1, TYPES[1], device).check(splits=3, launches=2 if tokens == 1 else 1)


@pytest.mark.parametrize("types", TYPES, ids=str)
@pytest.mark.parametrize(("heads", "dim"), (((4, 4), 8), ((4, 2), 64), ((8, 1), 72), ((3, 1), 128)), ids=str)
def test_decode_shapes(heads: tuple[int, int], dim: int, types: tuple, device: torch.device) -> None:
    Cached(70, 2, heads, dim, 2, types, device).check(splits=2)


@pytest.mark.parametrize("splits", (1, 2, 5, 16, None))
def test_decode_splits(splits: int | None, device: torch.device) -> None:
    """More splits than blocks, and the number that is chosen for a large GPU."""
    case = Cached(100, 1, (2, 1), 8, 1, TYPES[0], device)
    case.check(splits if splits else decode_scratch(1, 1, 2, 1, 8, device).splits)


def test_a_token_that_sees_nothing_of_the_last_part(device: torch.device) -> None:
    """Token 0 sees 60 positions of 68; the last part begins at 64."""
    Cached(59, 9, (2, 1), 8, 1, TYPES[1], device).check(splits=2)


def test_decode_beyond_the_capacity(device: torch.device) -> None:
    """What does not fit is not there; nothing behind the cache is read."""
    case = Cached(6, 2, (2, 1), 8, 1, TYPES[0], device)
    k, v = (torch.from_numpy(rows).to(device) for rows in case.rows)
    past = torch.tensor([20], dtype=torch.int32, device=device)
    q = torch.from_numpy(case.q[0]).to(device)
    scratch = decode_scratch(1, 2, 2, 1, 8, device)
    found = decode_attention(q, k, v, past, case.scale, 1, 2, scratch)
    # both tokens stand behind the cache and see all of it
    y = reference.causal_attention(case.q[0], case.rows[0][0], case.rows[1][0], 6, case.scale)
    np.testing.assert_allclose(found[1].cpu(), y[1], rtol=0, atol=1e-4)
    assert torch.isfinite(found).all()


@pytest.mark.parametrize(
    ("tokens", "past"), ((1, 0), (1, 63), (7, 1), (7, 200), (65, 0), (65, 1), (65, 63), (130, 0), (130, 1), (130, 200))
)
def test_prefill_past(tokens: int, past: int, device: torch.device) -> None:
    Cached(past, tokens, (2, 1), 64, 1, TYPES[1], device).check(splits=None)


@pytest.mark.parametrize("types", TYPES, ids=str)
@pytest.mark.parametrize(("heads", "dim"), (((4, 4), 8), ((2, 1), 72), ((4, 2), 128)), ids=str)
def test_prefill_shapes(heads: tuple[int, int], dim: int, types: tuple, device: torch.device) -> None:
    Cached(33, 37, heads, dim, 2, types, device).check(splits=None)


@pytest.mark.parametrize("splits", (3, None))
@pytest.mark.parametrize("types", (TYPES[0], TYPES[1]), ids=str)
def test_large_logits(types: tuple, splits: int | None, device: torch.device) -> None:
    """One key takes all weight; exp of a logit would overflow. Of logits near 4000, float32 keeps 4 digits."""
    case = Cached(100, 3, (2, 1), 64, 1, types, device)
    case.q *= 1000
    case.check(splits, limit=100)


@pytest.mark.parametrize("splits", (3, None))
def test_zeros(splits: int | None, device: torch.device) -> None:
    """All weights alike."""
    case = Cached(100, 3, (2, 1), 64, 1, TYPES[0], device)
    case.q *= 0
    case.check(splits)


def full_case(
    slices: int, queries: int, keys: int, heads: int, dim: int, dtype: torch.dtype, one_query: bool = False
) -> list[torch.Tensor]:
    random = np.random.default_rng([slices, queries, keys, heads, dim])
    shapes = ((1 if one_query else slices, queries), (slices, keys), (slices, keys))
    return [torch.from_numpy(random.standard_normal((*s, heads * dim)).astype(np.float32)).to(dtype) for s in shapes]


def check_full(
    given: list[torch.Tensor],
    bias: np.ndarray | None,
    heads: int,
    device: torch.device,
    limit: float = 1,
    scale: float = 0,
) -> None:
    q, k, v = given
    slices = k.shape[0]
    scale = scale or (k.shape[2] // heads) ** -0.5
    on_device = None if bias is None else torch.from_numpy(bias).to(device)
    found = attention(q.to(device), k.to(device), v.to(device), on_device, heads, scale)
    assert found.dtype == q.dtype
    exact = [x.double().numpy() for x in (q.expand(slices, -1, -1), k, v)]
    y, sizes = (
        reference.attention(*exact[:2], values, bias, heads, scale).reshape(found.shape)
        for values in (exact[2], np.abs(exact[2]))
    )
    assert (np.abs(found.double().cpu().numpy() - y) <= limit * LIMIT[q.dtype] * sizes).all()


@pytest.mark.parametrize("dtype", LIMIT, ids=str)
@pytest.mark.parametrize("dim", (8, 20, 40, 64, 72, 96, 128))
def test_full_dims(dim: int, dtype: torch.dtype, device: torch.device) -> None:
    check_full(full_case(2, 9, 70, 2, dim, dtype), None, 2, device)


@pytest.mark.parametrize(("queries", "keys"), ((1, 1), (1, 130), (7, 2), (63, 64), (130, 1), (130, 64), (130, 130)))
def test_full_lengths(queries: int, keys: int, device: torch.device) -> None:
    check_full(full_case(1, queries, keys, 2, 72, torch.float32), None, 2, device)


def test_full_of_parts_of_a_wider_matrix(device: torch.device) -> None:
    """q, k and v where one linear left them."""
    random = np.random.default_rng(0)
    merged = torch.from_numpy(random.standard_normal((2, 64, 3 * 144)).astype(np.float32)).to(device)
    parts = list(merged.chunk(3, -1))
    found = attention(*parts, None, 2, 0.1)
    y = reference.attention(*(part.cpu().numpy() for part in parts), bias=None, heads=2, scale=0.1)
    np.testing.assert_allclose(found.cpu(), y.reshape(found.shape), rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("hidden", (-10000, -np.inf))
@pytest.mark.parametrize("keys", (64, 70))
def test_full_bias(keys: int, hidden: float, dtype: torch.dtype, device: torch.device) -> None:
    """One query for all slices; in the second slice the first block of keys and more is hidden, in the third none."""
    bias = np.random.default_rng(1).standard_normal((3, keys)).astype(np.float32)
    bias[0, 5:9] = hidden
    bias[1, :-3] = hidden
    check_full(full_case(3, 10, keys, 2, 64, dtype, one_query=True), bias, 2, device)


def test_full_of_hidden_keys_alone(device: torch.device) -> None:
    """They count alike; of logits beside -10000, float32 keeps 3 digits."""
    for hidden, limit in ((-np.inf, 1), (-10000, 100)):
        check_full(full_case(1, 5, 70, 2, 64, torch.float32), np.full((1, 70), hidden, np.float32), 2, device, limit)


def test_full_large_logits(device: torch.device) -> None:
    check_full(full_case(1, 5, 70, 2, 72, torch.float32), None, 2, device, limit=1000, scale=1000.0)


@pytest.mark.parametrize("heads", [(32, 8), (8, 8), (4, 2)])
@pytest.mark.parametrize("past", [0, 1, 63, 64, 700, 2000])
def test_one_token_is_rope_and_attention(past: int, heads: tuple[int, int]) -> None:
    if not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] < 9:
        pytest.skip("one_token is CUDA C++: needs a GPU of compute capability 9.0")
    device, (num_heads, kv_heads) = torch.device("cuda"), heads
    torch.manual_seed(past)
    caches = [torch.randn(1, kv_heads, 2048, 128, device=device).bfloat16() for _ in range(2)]
    copies = [cache.clone() for cache in caches]
    qkv = torch.randn(1, (num_heads + 2 * kv_heads) * 128, device=device).bfloat16()
    frequencies = (500000.0 ** -(torch.arange(64, device=device) / 64)).float()
    at = torch.tensor([past], dtype=torch.int32, device=device)
    scratch = decode_scratch(1, 1, num_heads, kv_heads, 128, device)
    query = rope_append(qkv, *copies, at, frequencies, num_heads, 1, 1)
    expected = decode_attention(query, *copies, at, 0.1, 1, 1, scratch).float()
    assert takes_one_token(qkv, caches[0])
    for _ in range(2):  # the second time from what the first left of the scratch
        found = one_token(qkv, *caches, at, frequencies, num_heads, 0.1, scratch).float()
        assert (found - expected).abs().max() <= 2.0**-6 * expected.abs().max()
    for mine, theirs in zip(caches, copies, strict=True):
        assert (mine.float() - theirs.float()).abs().max() <= 2.0**-6  # one rounding of a rotated key


def test_one_token_compiles_without_a_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("cuda.bindings", reason="pip install 'lensc[cuda]'")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    source = Path(decode_attention.__code__.co_filename).with_name("one_token.cu")
    assert nvrtc.binary(source, {"HEADS": 32, "KV_HEADS": 8}, "sm_90")[:4] == b"\x7fELF"
