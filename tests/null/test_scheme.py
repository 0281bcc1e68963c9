"""A scheme has one spelling, and a combination that means nothing is refused with what is wrong."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lensc.backends.errors import UsageError
from lensc.export.quantize.scheme import ACTIVATION_BITS, KV_BITS, SCALE_BITS, WEIGHT_BITS, Scheme


@st.composite
def schemes(draw: st.DrawFn) -> Scheme:
    activation = draw(st.sampled_from(ACTIVATION_BITS))
    kv = draw(st.none() | st.sampled_from([bits for bits in KV_BITS if bits <= activation]))
    if activation != 8 and draw(st.booleans()):
        return Scheme(weight_bits=activation, activation_bits=activation, kv_bits=kv)
    weight_bits = draw(st.sampled_from(WEIGHT_BITS))
    group_size, symmetric = draw(st.none() | st.integers(1, 9_999_999)), draw(st.booleans())
    has_scale_bits = weight_bits < 8 and symmetric and group_size is not None and draw(st.booleans())
    return Scheme(
        weight_bits=weight_bits,
        group_size=group_size,
        symmetric=symmetric,
        scale_bits=draw(st.sampled_from(SCALE_BITS)) if has_scale_bits else None,
        activation_bits=activation,
        kv_bits=kv,
        keep=tuple(sorted(draw(st.sets(st.from_regex(r"[a-z0-9_.]{1,8}", fullmatch=True), max_size=3)))),
    )


@given(schemes())
def test_round_trip(scheme: Scheme) -> None:
    assert Scheme.parse(str(scheme)) == scheme


@given(st.text(alphabet="fwagkvsymkep:+-.0123456789", max_size=20) | st.text(max_size=8))
def test_any_text_has_one_spelling_or_none(text: str) -> None:
    try:
        scheme = Scheme.parse(text)
    except UsageError as error:
        assert repr(text) in str(error)
    else:
        assert str(scheme) == text


@pytest.mark.parametrize(
    ("text", "fields"),
    [
        ("f32", {}),
        ("f16", {"weight_bits": 16, "activation_bits": 16}),
        ("f32-kv8", {"kv_bits": 8}),
        ("w8a8", {"weight_bits": 8, "activation_bits": 8}),
        ("w4a16-g128", {"weight_bits": 4, "activation_bits": 16, "group_size": 128}),
        (
            "w4a8-g32-s4-mixed",
            {"weight_bits": 4, "activation_bits": 8, "group_size": 32, "scale_bits": 4, "mixed": True},
        ),
        ("w4a32-asym", {"weight_bits": 4, "activation_bits": 32, "symmetric": False}),
        (
            "w4a16-g32-asym-kv8-keep:lm_head+resampler",
            {
                "weight_bits": 4,
                "activation_bits": 16,
                "group_size": 32,
                "symmetric": False,
                "kv_bits": 8,
                "keep": ("lm_head", "resampler"),
            },
        ),
    ],
)
def test_meaning(text: str, fields: dict[str, Any]) -> None:
    assert Scheme.parse(text) == Scheme(**fields)
    assert Scheme(**fields).is_float == text.startswith("f")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "scheme '': expected f32, f16 or like w4a16-g128"),
        ("F32", "expected f32, f16"),
        ("int8", "expected f32, f16"),
        ("w4a16_g128", "expected f32, f16"),
        ("w4a16-kv8-g128", "expected f32, f16"),
        ("w04a16", "expected f32, f16"),
        ("w４a16", "expected f32, f16"),
        ("f32\n", "expected f32, f16"),
        ("w16a16", "scheme 'w16a16': is written f16"),
        ("w7a16", "weight bits 7 is not one of 2, 3, 4, 5, 6, 8"),
        ("w4a17", "activation bits 17 is not one of 8, 16, 32"),
        ("w8a8-kv16", "KV bits 16, expected at most the activations' 8"),
        ("w4a16-kv5", "KV bits 5 is not one of 4, 8, 16"),
        ("f32-g128", "float weights have no groups"),
        ("f16-asym", "float weights have no zero point"),
        ("f32-keep:lm_head", "all parts are float, nothing is left to keep"),
        ("f32-s4", "float weights have no scales"),
        ("w4a8-g32-s5", "scale bits 5 is not one of 4"),
        ("w8a8-g32-s4", "scale bits are for groups of weights below 8 bits without a zero point"),
        ("w4a8-s4", "scale bits are for groups"),
        ("w4a8-g32-s4-asym", "scale bits are for groups"),
        ("w4a8-s4-g32", "expected f32, f16"),
        ("w4a16-keep:b+a", "keep: expected sorted names without repetition, a+b"),
        ("w4a16-keep:a+a", "keep: expected sorted names without repetition, a"),
        ("w7a17-g4", "weight bits 7 is not one of 2, 3, 4, 5, 6, 8; activation bits 17 is not"),
    ],
)
def test_refused(text: str, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        Scheme.parse(text)
    assert message in str(caught.value)
