"""Recipes: presets, files, and what is wrong with them."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("torch", reason="pip install 'lensc[export]'")

from lensc.backends.errors import UsageError
from lensc.export.quantize.recipe import EMBEDDING, PRESETS, VISION, Recipe, read_recipe, resolve
from lensc.export.quantize.scheme import MARKS, NAMED, Scheme
from lensc.export.quantize.weights import WeightFormat

DOWN, HEAD = "llm.model.layers.3.mlp.down_proj.weight", "llm.lm_head.weight"


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_survives_its_file(name: str, tmp_path: Path) -> None:
    path = tmp_path / "r.toml"
    path.write_text(PRESETS[name].to_toml())
    assert read_recipe(path) == PRESETS[name] == resolve(name) and resolve(str(path)) == PRESETS[name]


def test_every_preset_is_offered_in_words() -> None:
    assert list(NAMED) == list(PRESETS) and MARKS.keys() <= NAMED.keys()


def test_the_first_pattern_decides() -> None:
    recipe = Recipe("r", ((DOWN, "w8-g128"), ("llm.model.layers.*", "w4-g128"), ("*", "f32")))
    assert recipe.format_of(DOWN) == WeightFormat(8, 128)
    assert recipe.format_of(DOWN.replace("3", "13")) == WeightFormat(4, 128)
    assert recipe.format_of(HEAD) is None
    assert recipe.formats([DOWN, HEAD]) == {DOWN: WeightFormat(8, 128)}


def test_the_scheme_names_the_most_frequent_format_and_that_there_are_others() -> None:
    recipe = Recipe("r", ((HEAD, "w8-g128"), ("llm.model.layers.*", "w4-g128")), {"decoder": 8})
    names = [DOWN, DOWN.replace("3", "4"), HEAD]
    assert str(recipe.scheme("decoder", names)) == "w4a8-g128-mixed"
    assert str(recipe.scheme("decoder", names[:2])) == "w4a8-g128"
    assert str(recipe.scheme("vision", ["vpm.x"])) == "f32"
    assert Scheme.parse("w4a8-g128-mixed").mixed and not Scheme.parse("f32").mixed


def test_the_scheme_says_that_scales_are_multiples() -> None:
    recipe = Recipe("r", (("*.o_proj.weight", "w4-g128"), ("llm.*", "w4-g128-s4")), {"decoder": 8})
    names = [DOWN, DOWN.replace("3", "4"), DOWN.replace("mlp.down", "self_attn.o")]
    assert str(recipe.scheme("decoder", names)) == "w4a8-g128-s4-mixed"
    assert recipe.schemes("decoder", names) == {"w4a8-g128-s4": names[:2], "w4a8-g128": names[2:]}


def test_symmetric_presets_below_eight_bits_have_scales_that_are_multiples() -> None:
    """Of the decoder: an NPU reads no multiples."""
    formats = [
        WeightFormat.parse(text)
        for recipe in PRESETS.values()
        for pattern, text in recipe.weights
        if recipe.activations.get("decoder") != 16 and pattern not in (EMBEDDING, *VISION) and text != "f32"
    ]
    assert all((f.scale_bits == 4) == (f.bits < 8 and f.symmetric) for f in formats)
    assert {f.bits for f in formats if f.scale_bits} == {2, 3, 4}


def test_int4_is_int4_with_int8_vision() -> None:
    recipe = PRESETS["int4"]
    assert recipe.format_of(DOWN) == recipe.format_of(HEAD) == WeightFormat(4, 128, scale_bits=4)
    assert recipe.format_of("vpm.encoder.layers.0.mlp.fc1.weight") == WeightFormat(8)
    assert recipe.format_of("resampler.proj") == recipe.format_of(EMBEDDING) == WeightFormat(8)
    assert recipe.activations == {"vision": 8, "decoder": 8}
    assert PRESETS["f32"].is_float and not recipe.is_float


def test_the_scheme_of_the_decoder_names_the_bits_of_its_cache() -> None:
    recipe = PRESETS["int4-kv8"]
    assert str(recipe.scheme("decoder", [DOWN])) == "w4a8-g128-s4-kv8"
    assert str(recipe.scheme("vision", ["vpm.encoder.layers.0.mlp.fc1.weight"])) == "w8a8"
    alone = Recipe("r", kv_bits=8)
    assert alone.is_float and str(alone.scheme("decoder", [DOWN])) == "f32-kv8"
    assert "[kv_cache]\nbits = 8\n" in recipe.to_toml()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("format = 2", "format is 2, expected 1"),
        ("name = 'x'", "format is None, expected 1"),
        ("format = 1\nspeed = 3", "'speed' is not known"),
        ("format = 1\nmethod = 'magic'", "method 'magic' is not one of rtn, gptq"),
        ("format = 1\nmethod = 3", "method is 3, expected a word"),
        ("format = 1\n[weights]\n'llm.*' = 'w5'", "'llm.*': weight format 'w5'"),
        ("format = 1\n[weights]\n'llm.*' = 4", "'llm.*' is 4, expected a word"),
        ("format = 1\nweights = 4", "weights is 4, expected a table"),
        ("format = 1\n[activations]\nvision = 4", "vision = 4, expected 8, 16, 32"),
        ("format = 1\n[activations]\nsound = 8", "'sound' is not one of vision, decoder"),
        (f"format = 1\n[weights]\n'{EMBEDDING}' = 'w4-g128-asym'", "is w4-g128-asym, expected f32, w8 or like w4-g64"),
        (f"format = 1\n[weights]\n'{EMBEDDING}' = 'w8-g128'", "is w8-g128, expected f32, w8 or like w4-g64"),
        ("format = 1\n[kv_cache]\nbits = 4", "kv_cache: bits = 4, expected 8"),
        ("format = 1\n[kv_cache]\nbytes = 1", "kv_cache: 'bytes' is not known"),
        ("format = 1\nkv_cache = 8", "kv_cache is 8, expected a table"),
        ("format = 1\n[weights", "not TOML"),
    ],
)
def test_a_wrong_recipe_is_one_line(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "r.toml"
    path.write_text(text)
    with pytest.raises(UsageError) as caught:
        resolve(str(path))
    assert message in str(caught.value) and "\n" not in str(caught.value).strip()


def test_an_unknown_scheme_names_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="'int3': expected one of f32, int8, int4"):
        resolve("int3")
    with pytest.raises(UsageError, match=r"none\.toml: cannot be read: No such file"):
        resolve(str(tmp_path / "none.toml"))
