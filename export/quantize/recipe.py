"""Which weight is stored how: a named recipe, or a file that can be edited.

    format = 1
    name = "int4"
    method = "rtn"                      # how values are chosen: rtn rounds to nearest, gptq looks at real data

    smooth = true                       # vision: move outlier channels of activations into the weights (`smooth`)

    [activations]                       # bits in matrix products, by graph; 32 where it is not named
    vision = 8

    [kv_cache]                          # bits of stored keys and values: 8, or the engine's own without this
    bits = 8

    [weights]                           # pattern of names = format; the first that fits decides, f32 leaves it alone
    "llm.lm_head.weight" = "w8-g128"
    "llm.model.layers.*" = "w4-g128-s4"

Patterns are those of `fnmatch`, over the names of linears' weights (`lensc.export.quantize.linears`) and
`llm.model.embed_tokens.weight`, whose format is `f32` (as stored), `w8` or like `w4-g64`, and which is always rounded to
nearest.
"""

from __future__ import annotations

import fnmatch
import tomllib
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lensc.backends.errors import UsageError

from .scheme import Scheme
from .weights import WeightFormat

FORMAT = 1
FLOAT = "f32"
METHODS = ("rtn", "gptq")
ACTIVATION_BITS = (8, 16, 32)
GRAPHS = ("vision", "decoder")
EMBEDDING = "llm.model.embed_tokens.weight"
KV_BITS = (8,)
RECIPE_BYTES = 1 << 20
"""A recipe that names each of 400 linears has 30 KB."""


@dataclass(frozen=True)
class Recipe:
    """See the module. `weights` is in order: the first pattern that fits a name decides, and no pattern means f32."""

    name: str
    weights: tuple[tuple[str, str], ...] = ()
    activations: Mapping[str, int] = field(default_factory=dict)
    method: str = "rtn"
    kv_bits: int | None = None
    smooth: bool = False

    def __post_init__(self) -> None:
        problems = []
        if self.method not in METHODS:
            problems.append(f"method {self.method!r} is not one of {', '.join(METHODS)}")
        for graph, bits in self.activations.items():
            if graph not in GRAPHS:
                problems.append(f"activations: {graph!r} is not one of {', '.join(GRAPHS)}")
            elif bits not in ACTIVATION_BITS:
                problems.append(f"activations: {graph} = {bits}, expected {', '.join(map(str, ACTIVATION_BITS))}")
        for pattern, text in self.weights:
            try:
                WeightFormat.parse(text) if text != FLOAT else None
            except UsageError as error:
                problems.append(f"weights: {pattern!r}: {error}")
        if self.kv_bits is not None and self.kv_bits not in KV_BITS:
            problems.append(f"kv_cache: bits = {self.kv_bits}, expected {' or '.join(map(str, KV_BITS))}")
        if self.smooth and self.activations.get("vision") != 8:
            problems.append("smooth: is for products in 8 bits, expected activations: vision = 8 beside it")
        if not _suits_table(self._text_of(EMBEDDING)):
            problems.append(f"weights: {EMBEDDING} is {self._text_of(EMBEDDING)}, expected f32, w8 or like w4-g64")
        if problems:
            raise UsageError(f"recipe {self.name}: " + "; ".join(problems))

    def format_of(self, name: str) -> WeightFormat | None:
        """How the weight `name` is stored; None leaves it as it is."""
        text = self._text_of(name)
        return None if text == FLOAT else WeightFormat.parse(text)

    def formats(self, names: Iterable[str]) -> dict[str, WeightFormat]:
        """The formats of those of `names` that are quantized."""
        found = {name: self.format_of(name) for name in names}
        return {name: format for name, format in found.items() if format is not None}

    def scheme(self, graph: str, names: Iterable[str]) -> Scheme:
        """One word for a graph whose linears are `names`: the most frequent format, marked if there are others."""
        counts = Counter(self._text_of(name) for name in names)
        text, count = counts.most_common(1)[0] if counts else (FLOAT, 0)
        activation_bits = self.activations.get(graph, 32)
        kv_bits = self.kv_bits if graph == "decoder" else None
        if text == FLOAT:
            return Scheme(kv_bits=kv_bits, mixed=len(counts) > 1)
        format = WeightFormat.parse(text)
        mixed = count < sum(counts.values())
        return Scheme(
            format.bits,
            format.group_size,
            format.symmetric,
            activation_bits,
            kv_bits,
            mixed,
            scale_bits=format.scale_bits,
        )

    def schemes(self, graph: str, names: Iterable[str]) -> dict[str, list[str]]:
        """The same for each format among `names` as if it were the only one, with the names that have it: what an engine
        has to be able to run.
        """
        alone: dict[str, list[str]] = {}
        for name in names:
            alone.setdefault(self._text_of(name), []).append(name)
        return {str(self.scheme(graph, same)): same for same in alone.values()}

    @property
    def is_float(self) -> bool:
        """Whether no weight is quantized."""
        return all(text == FLOAT for _, text in self.weights)

    @property
    def is_calibrated(self) -> bool:
        """Whether values below 8 bits are chosen by what the model computes of real data."""
        return self.method == "gptq" and not self.is_float

    @property
    def needs_data(self) -> bool:
        """Whether anything is chosen by what the model computes of real data."""
        return self.is_calibrated or self.smooth

    def to_toml(self, header: Iterable[str] = (), notes: Mapping[str, str] | None = None) -> str:
        """The recipe as a file, with the lines of `header` above it and `notes` behind their patterns, as comments."""
        behind = {pattern: f"  # {note}" for pattern, note in (notes or {}).items()}
        lines = [
            *(f"# {line}" for line in header),
            f"format = {FORMAT}",
            f"name = {_quoted(self.name)}",
            f"method = {_quoted(self.method)}",
            *(["smooth = true"] if self.smooth else []),
            "",
        ]
        lines += ["[activations]", *(f"{graph} = {bits}" for graph, bits in self.activations.items()), ""]
        lines += ["[kv_cache]", f"bits = {self.kv_bits}", ""] if self.kv_bits is not None else []
        lines += ["[weights]", *(f"{_quoted(p)} = {_quoted(text)}{behind.get(p, '')}" for p, text in self.weights), ""]
        return "\n".join(lines)

    def _text_of(self, name: str) -> str:
        return next((text for pattern, text in self.weights if fnmatch.fnmatchcase(name, pattern)), FLOAT)


def read_recipe(path: Path) -> Recipe:
    """The recipe in a file. Raises UsageError that names what is wrong in it."""
    try:
        if path.stat().st_size > RECIPE_BYTES:
            raise UsageError(f"{path}: {path.stat().st_size} bytes, a recipe has at most {RECIPE_BYTES}")
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror or error}") from error
    except ValueError as error:
        raise UsageError(f"{path}: not TOML: {error}") from None
    problems = [
        f"{key!r} is not known"
        for key in sorted(
            document.keys() - {"format", "name", "method", "smooth", "activations", "kv_cache", "weights"}
        )
    ]
    if document.get("format") != FORMAT:
        problems.append(f"format is {document.get('format')!r}, expected {FORMAT}")
    name, method = document.get("name", path.stem), document.get("method", "rtn")
    problems += [
        f"{key} is {value!r}, expected a word"
        for key, value in (("name", name), ("method", method))
        if not isinstance(value, str)
    ]
    smooth = document.get("smooth", False)
    if type(smooth) is not bool:
        problems.append(f"smooth is {smooth!r}, expected true or false")
    activations = _table(document, "activations", int, problems)
    kv_cache = _table(document, "kv_cache", int, problems)
    problems += [f"kv_cache: {key!r} is not known" for key in sorted(kv_cache.keys() - {"bits"})]
    weights = _table(document, "weights", str, problems)
    if problems:
        raise UsageError(f"{path}: " + "; ".join(problems))
    return Recipe(name, tuple(weights.items()), activations, method, kv_cache.get("bits"), smooth)


def _table(document: Mapping[str, Any], key: str, kind: type, problems: list[str]) -> dict[str, Any]:
    table = document.get(key, {})
    if not isinstance(table, dict):
        problems.append(f"{key} is {table!r}, expected a table")
        return {}
    problems += [
        f"{key}: {name!r} is {value!r}, expected {'a number' if kind is int else 'a word'}"
        for name, value in table.items()
        if type(value) is not kind
    ]
    return table


def _suits_table(text: str) -> bool:
    """Whether the embedding table can be stored so; what is no format at all is another problem."""
    try:
        format = None if text == FLOAT else WeightFormat.parse(text)
    except UsageError:
        return True
    return format is None or (format.symmetric and (format.bits < 8 or format.group_size is None))


def _quoted(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


VISION = ("vpm.*", "resampler.*")
LAYERS, HEAD = "llm.model.layers.*", "llm.lm_head.weight"


def _whole(
    name: str,
    layers: str,
    head: str,
    method: str = "rtn",
    table: str = "w8",
    kv_bits: int | None = None,
    gate_and_up: str | None = None,
    activations: tuple[int, int] = (8, 8),
) -> Recipe:
    """Vision in eight bits, the decoder's layers, its head and the table as named, and two projections of the MLPs, if they
    are; products of activations of as many bits as are named, for vision and decoder.
    """
    vision = ((pattern, "w8") for pattern in VISION)
    inner = ((f"{LAYERS}.{part}_proj.weight", gate_and_up) for part in ("gate", "up") if gate_and_up is not None)
    weights = (*vision, *inner, (LAYERS, layers), (HEAD, head), (EMBEDDING, table))
    return Recipe(name, weights, dict(zip(GRAPHS, activations, strict=True)), method, kv_bits)


PRESETS: dict[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        Recipe("f32"),
        _whole("int8", "w8-g128", "w8-g128"),
        _whole("int4", "w4-g128-s4", "w4-g128-s4"),
        _whole("int4-g32", "w4-g32-s4", "w4-g32-s4"),
        _whole("int4-asym", "w4-g128-asym", "w4-g128-asym"),
        _whole("int4-gptq", "w4-g128-s4", "w4-g128-s4", "gptq"),
        _whole("int4-g32-gptq", "w4-g32-s4", "w4-g32-s4", "gptq"),
        _whole("int4-small", "w4-g128-s4", "w4-g128-s4", "gptq", table="w4-g64"),
        _whole("int4-kv8", "w4-g128-s4", "w4-g128-s4", kv_bits=8),
        _whole("int2-mlp-gptq", "w4-g128-s4", "w4-g128-s4", "gptq", gate_and_up="w2-g64-s4"),
        # three bits lie in four, in files and in both engines: as large as int4-g32 until an engine takes them packed
        _whole("int3-gptq", "w3-g32-s4", "w4-g128-s4", "gptq"),
        Recipe("int4-decoder", ((LAYERS, "w4-g128-s4"), (HEAD, "w4-g128-s4"), (EMBEDDING, "w8")), {"decoder": 8}),
        Recipe("w8a8-vision", tuple((p, "w8") for p in VISION), {"vision": 8}),
        Recipe("w8a16-vision", tuple((p, "w8") for p in VISION), {"vision": 16}),
        Recipe("w4a16-vision", tuple((p, "w4-g16") for p in VISION), {"vision": 16}),
        _whole("int4-npu", "w4-g128-s4", "w4-g128-s4", activations=(16, 8)),
        _whole("w8a16", "w8", "w8", activations=(16, 16)),
        _whole("w4a16-gptq", "w4-g32", "w8", "gptq", activations=(16, 16)),
    )
}
"""The recipes with a name."""


def resolve(scheme: str) -> Recipe:
    """The recipe that `--scheme` means: the name of a preset, or a file. Raises UsageError."""
    if scheme in PRESETS:
        return PRESETS[scheme]
    path = Path(scheme)
    if path.suffix == ".toml" or path.exists():
        return read_recipe(path)
    raise UsageError(
        f"scheme {scheme!r}: expected one of {', '.join(PRESETS)}, or the path of a recipe (.toml); see lensc export --help"
    )
