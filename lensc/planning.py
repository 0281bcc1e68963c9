"""The verbs `profile` and `plan`: what this machine reaches, and what a model will take on one."""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING

from lensc.backends.errors import InputError, StorageError, UsageError
from lensc.export.quantize.scheme import NAMED, Scheme

from . import console

if TYPE_CHECKING:
    from lensc.backends.bundle import Manifest, PictureSpec
    from lensc.profiles.profile import DeviceProfile, Figure
    from lensc.runtime.roofline import Model, Prediction, Request, Stored

OFFICIAL = "minicpm-llama3-v-2.5"
"""The published model, whose sizes are known without a file."""
OFFICIAL_DECODER = (4096, 32, 8, 128, 128256)
"""Hidden size, layers, KV heads, their width, vocabulary."""
GROUP = 128


def add_profile(verb: argparse.ArgumentParser) -> None:
    """The arguments of `lensc profile`."""
    verb.add_argument(
        "-o", "--output", metavar="FILE", help="profile to write, a .toml (default: the user's own, here)"
    )
    verb.add_argument("--threads", metavar="N", type=int, help="default: one per physical core")


def add_plan(verb: argparse.ArgumentParser) -> None:
    """The arguments of `lensc plan`."""
    text = f"checkpoint folder or its config.json, a bundle, or {OFFICIAL} for the published one"
    verb.add_argument("model", metavar="MODEL", help=text)
    text = "a device that lensc knows, a profile (.toml), or here for this machine after lensc profile (the default)"
    verb.add_argument("--profile", metavar="NAME", action="append", default=[], help=text + "; repeat for several")
    text = "how weights are stored, see lensc export; repeat for several (default: all; a bundle's own)"
    verb.add_argument("--scheme", metavar="SCHEME", action="append", default=[], help=text)
    verb.add_argument("--image", metavar="WxH", default="1344x1344", help="size of the picture (default: %(default)s)")
    text = "tokens of the question (default: %(default)s)"
    verb.add_argument("--prompt-tokens", metavar="N", type=int, default=32, help=text)
    text = "tokens that picture, question and answer may have (default: %(default)s)"
    verb.add_argument("--context", metavar="N", type=int, default=2048, help=text)


# --- profile ------------------------------------------------------------------------------------------------------


def profile(options: argparse.Namespace) -> int:
    """Measure this machine and write its profile."""
    from dataclasses import replace

    from lensc.backends.codec import encode
    from lensc.backends.files import write_text
    from lensc.profiles import measure, probe
    from lensc.profiles.folders import profile_folder
    from lensc.profiles.profile import to_toml

    path = Path(options.output) if options.output else None
    if path is not None and path.suffix != ".toml":
        raise UsageError(f"--output {path}: expected a file that ends in .toml, e.g. {path}.toml")
    if path is None:
        folder = profile_folder()
        if folder is None:
            raise UsageError("there is no home folder to keep the profile in; say where with --output FILE.toml")
        path = folder / f"{measure.HERE}.toml"
        _make(folder)
    elif not path.parent.is_dir():
        raise UsageError(f"--output {path}: {path.parent} is no folder")
    with console.Progress() as progress:
        found = measure.measure(probe.machine(), options.threads, progress.show)
    found = replace(found, name=path.stem)
    write_text(path, to_toml(found))
    if options.json:
        console.print_json({"file": str(path), "profile": encode(found)})
    else:
        print(_measured(found, path))
    return 0


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(f"{folder}: not made: {error.strerror}") from error


def _measured(found: DeviceProfile, path: Path) -> str:
    (cpu,) = found.processors
    threads = [str(rates.threads) for rates in cpu.by_threads]
    rows = [["", *(f"{count} thread{'s' * (count != '1')}" for count in threads), "", ""]]

    def row(name: str, figures: list[Figure | None], unit: str, scale: float = 1) -> None:
        if any(figures):
            what = next(figure.reference.split(", ")[0] for figure in figures if figure)
            cells = ["" if figure is None else f"{figure.value * scale:.4g}" for figure in figures]
            rows.append([name, *cells, unit, what])

    row("memory read", [rates.bandwidth_gb_s for rates in cpu.by_threads], "GB/s")
    row("4-bit decode", [rates.achieved_gb_s for rates in cpu.by_threads], "GB/s")
    names = {"float32": "float32 product", "int8": "int8 vision", "int4": "4-bit prefill"}
    for dtype, name in names.items():
        row(name, [rates.achieved_tops.get(dtype) for rates in cpu.by_threads], "GOP/s", 1e3)
    row("attention, prefill", [rates.attention_tops for rates in cpu.by_threads], "GOP/s", 1e3)
    blank = [""] * (len(threads) - 1)
    for dtype, peak in cpu.peak_tops.items():
        rows.append([f"{dtype} peak", *blank, f"{peak.value * 1e3:.4g}", "GOP/s", peak.reference.split(", ")[0]])
    for name, cost in cpu.overheads_us.items():
        rows.append([f"engine, a {name}", *blank, f"{cost.value:.3g}", "us", "steps that compute next to nothing"])
    if not cpu.overheads_us:
        rows.append(["without the compiled kernels only numpy is measured; see lensc devices"])
    use = f"lensc plan {OFFICIAL} --profile {path if path.stem != 'here' else 'here'}"
    return f"{found.title}\n{console.table(rows, '  ')}\nwritten to {path}; use it: {use}"


# --- plan ---------------------------------------------------------------------------------------------------------


def plan(options: argparse.Namespace) -> int:
    """Predict what a model takes on devices."""
    from lensc.backends.codec import encode
    from lensc.runtime.roofline import predict

    model, stored, picture, basis = model_of(options.model, options.scheme)
    request = _request(options, picture, model)
    found: list[tuple[DeviceProfile, list[Prediction]]] = []
    for name in options.profile or ["here"]:
        device = device_of(name)
        found.append((device, [predict(model, s, p, request) for p in device.processors for s in stored]))
    if options.json:
        plans = [{"profile": device.name, "title": device.title, "quirks": list(device.quirks),
                  "predictions": [encode(one) for one in of]} for device, of in found]  # fmt: skip
        console.print_json({"model": model.name, "basis": basis, "request": encode(request), "plans": plans})
        return 0
    slices, tokens = len(request.patches), request.tokens(model)
    print(f"{model.name}, {basis}")
    print(
        f"a picture of {options.image}: {slices} slices, {tokens} tokens with the question, {request.context} at most\n"
    )
    print("\n\n".join(_table(device, of) for device, of in found))
    return 0


def _table(device: DeviceProfile, predictions: list[Prediction]) -> str:
    rows = [["scheme", "on", "memory", "fits", "picture", "prefill", "first token", "decode"]]
    for one in predictions:
        fits = one.fits or "unknown"
        rows.append([
            one.scheme, f"{one.processor} {one.arch}", console.size(one.memory_bytes), fits,
            _time(one.image_ms), _speed(one.prefill_tokens_s), _time(one.ttft_ms), _speed(one.decode_tokens_s),
        ])  # fmt: skip
    lines = [f"{device.title} ({device.name}), predicted, not measured", console.table(rows, "  ")]
    for title, kind in (("rests on", "rests_on"), ("unknown", "unknown")):
        said = dict.fromkeys(f"{one.processor} {text}" for one in predictions for text in getattr(one, kind))
        lines += [f"  {title}: {text}" for text in said]
    return "\n".join([*lines, *(f"  note: {text}" for text in device.quirks)])


def _time(milliseconds: float | None) -> str:
    if milliseconds is None:
        return "unknown"
    return f"{milliseconds / 1e3:.3g} s" if milliseconds >= 1000 else f"{milliseconds:.3g} ms"


def _speed(tokens_s: float | None) -> str:
    return "unknown" if tokens_s is None else f"{tokens_s:.3g} tokens/s"


def device_of(name: str) -> DeviceProfile:
    """The profile that `--profile` names. Raises UsageError, and InputError for a file that is none."""
    from lensc.profiles import profile as profiles

    if name.endswith(".toml"):
        return profiles.load_profile(Path(name))
    try:
        return profiles.get(name)
    except UsageError:
        if name == "here":
            raise UsageError(
                "this machine has no profile yet; run lensc profile, or choose a device by --profile"
            ) from None
        raise


def _request(options: argparse.Namespace, picture: PictureSpec, model: Model) -> Request:
    from lensc.runtime.picture import plan_slices
    from lensc.runtime.roofline import Request

    match = re.fullmatch(r"([1-9]\d{0,5})x([1-9]\d{0,5})", options.image, re.ASCII)
    if match is None:
        raise UsageError(f"--image {options.image}: expected WIDTHxHEIGHT in pixels, e.g. 1344x1344")
    if options.prompt_tokens < 0:
        raise UsageError(f"--prompt-tokens {options.prompt_tokens}: expected at least 0")
    patches = plan_slices(int(match[1]), int(match[2]), picture, "--image").patches(picture.patch_size)
    request = Request(patches, options.prompt_tokens, options.context)
    if request.tokens(model) >= options.context:
        raise UsageError(
            f"--context {options.context}: picture and question have {request.tokens(model)} tokens, expected more"
        )
    return request


def model_of(text: str, schemes: list[str]) -> tuple[Model, list[Stored], PictureSpec, str]:
    """The model that `text` names, how its weights are stored, how it cuts pictures, and where its sizes are from."""
    from lensc.backends.bundle import MANIFEST, load_manifest

    path = Path(text)
    if text == OFFICIAL:
        model, picture = official()
        return model, _named(schemes), picture, "sizes of the published model"
    if (path / MANIFEST).is_file():
        manifest = load_manifest(path)
        if schemes:
            raise UsageError(f"--scheme {schemes[0]}: the weights of a bundle are stored already")
        return _of_bundle(manifest)
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        raise UsageError(f"{text}: expected a checkpoint's folder or config.json, a bundle, or {OFFICIAL}")
    model, picture = _of_config(file)
    return model, _named(schemes), picture, f"sizes of {file}"


def official() -> tuple[Model, PictureSpec]:
    """The published MiniCPM-Llama3-V 2.5."""
    hidden, layers, kv_heads, head_dim, vocab = OFFICIAL_DECODER
    return _sized(
        "MiniCPM-Llama3-V 2.5", hidden, 14336, layers, kv_heads, head_dim, vocab, (1152, 4304, 27), 96, 14, 70, 448, 9
    )


def _of_config(file: Path) -> tuple[Model, PictureSpec]:
    from lensc.export.models.config import ModelConfig

    try:
        config = ModelConfig.from_json(json.loads(file.read_text(encoding="utf-8")), str(file))
    except OSError as error:
        raise InputError(f"{file}: cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise InputError(f"{file}: not JSON: {error}") from None
    seen = config.vision
    tower = (seen.hidden_size, seen.intermediate_size, seen.num_hidden_layers - config.drop_vision_last_layer)
    return _sized(
        file.parent.name, config.hidden_size, config.intermediate_size, config.num_hidden_layers,
        config.num_key_value_heads, config.head_dim, config.vocab_size, tower, config.query_num, config.patch_size,
        seen.pos_grid, config.scale_resolution, config.max_slice_nums,
    )  # fmt: skip


def _sized(
    name: str, hidden: int, inner: int, layers: int, kv_heads: int, head_dim: int, vocab: int,
    tower: tuple[int, int, int], queries: int, patch: int, grid: int, resolution: int, slices: int,
) -> tuple[Model, PictureSpec]:  # fmt: skip
    from lensc.backends.bundle import PictureSpec
    from lensc.runtime.roofline import Model

    width, wide, depth = tower
    vision = depth * (4 * width**2 + 2 * width * wide) + (3 * patch**2 + grid**2) * width
    vision += width * hidden + 5 * hidden**2 + queries * hidden
    gate_and_up = layers * 2 * hidden * inner
    model = Model(
        name=name,
        vision_weights=vision,
        layer_weights=layers * (2 * hidden**2 + 2 * hidden * kv_heads * head_dim + hidden * inner) + gate_and_up,
        head_weights=vocab * hidden,
        embedding_weights=vocab * hidden,
        hidden=hidden,
        layers=layers,
        kv_heads=kv_heads,
        head_dim=head_dim,
        queries=queries,
        tower=tower,
        gate_and_up_weights=gate_and_up,
    )
    half = (0.5, 0.5, 0.5)
    return model, PictureSpec(resolution, patch, slices, queries, "official", half, half, grid)


def _of_bundle(manifest: Manifest) -> tuple[Model, list[Stored], PictureSpec, str]:
    """A bundle does not say all sizes: the published model is known by its decoder, of others weights are counted from
    the bytes of their files.
    """
    from lensc.runtime.roofline import Model

    spec, picture = manifest.model.decoder, manifest.model.picture
    schemes = {name: Scheme.parse(graph.scheme) for name, graph in manifest.graphs.items()}
    stored = _of_schemes(manifest.provenance.scheme, schemes["vision"], schemes["decoder"], 8)
    sizes = (spec.hidden_size, spec.num_layers, spec.num_kv_heads, spec.head_dim, spec.vocab_size)
    if sizes == OFFICIAL_DECODER:
        return official()[0], [stored], picture, f"sizes of the published model, scheme {stored.name} of the bundle"

    def weights(graph: str, bits: float) -> int:
        of = [a for a in manifest.artifacts if a.graph == graph]
        files = of[0].files if of else tuple(f for f in manifest.files if f.path.startswith(f"{graph}/"))
        return round(max(file.bytes for file in files) * 8 / bits)

    vocabulary = spec.vocab_size * spec.hidden_size
    model = Model(
        name=manifest.model.name,
        vision_weights=weights("vision", stored.vision_bits),
        layer_weights=max(1, weights("decoder", stored.layer_bits) - vocabulary),
        head_weights=vocabulary,
        embedding_weights=vocabulary,
        hidden=spec.hidden_size,
        layers=spec.num_layers,
        kv_heads=spec.num_kv_heads,
        head_dim=spec.head_dim,
        queries=picture.query_num,
    )
    return model, [stored], picture, "weights counted from the bundle's bytes, attention of the tower not counted"


def _named(names: list[str]) -> list[Stored]:
    """How the named schemes store weights, all by default. Raises UsageError, the nearest name first."""
    from lensc.profiles.profile import nearest

    known = named_schemes()
    for name in names:
        if name not in known:
            raise UsageError(f"--scheme {name!r} is not known; expected one of {', '.join(nearest(name, known))}")
    return [known[name] for name in names or known]


def named_schemes() -> dict[str, Stored]:
    """Those of `NAMED`, as their recipes store weights (`tests/lensc/test_planning.py` holds them against these)."""
    four, eight = "w4a8-g128-s4", "w8a8"
    vision_and_decoder = {
        "f32": ("f32", "f32"),
        "int8": (eight, "w8a8-g128"),
        "int4-g32": (eight, "w4a8-g32-s4"),
        "int4-asym": (eight, "w4a8-g128-asym"),
        "int4-g32-gptq": (eight, "w4a8-g32-s4"),
        "int4-kv8": (eight, "w4a8-g128-s4-kv8"),
        "int3-gptq": (eight, "w4a8-g32-s4"),
        "int4-decoder": ("f32", four),
        "w8a8-vision": (eight, "f32"),
        "w8a16-vision": ("w8a16", "f32"),
        "w4a16-vision": ("w4a16-g16", "f32"),
        "int4-npu": ("w8a16", four),
        "w8a16": ("w8a16", "w8a16"),
        "w4a16-gptq": ("w8a16", "w4a16-g32"),
    }
    found = {}
    for name in NAMED:
        vision, decoder = (Scheme.parse(text) for text in vision_and_decoder.get(name, (eight, four)))
        table = {
            "int4-small": 4 + 32 / 64,
            "f32": 32.0,
            "w8a8-vision": 32.0,
            "w8a16-vision": 32.0,
            "w4a16-vision": 32.0,
        }.get(name, 8.0)
        head = {"int3-gptq": bits_of(Scheme.parse(four)), "w4a16-gptq": bits_of(Scheme.parse(eight))}.get(name)
        inner = 2 + 8 / 64 if name == "int2-mlp-gptq" else None
        found[name] = _of_schemes(name, vision, decoder, table, head, inner)
    return found


def _of_schemes(
    name: str, vision: Scheme, decoder: Scheme, table: float, head: float | None = None, inner: float | None = None
) -> Stored:
    from lensc.runtime.roofline import Stored

    return Stored(
        name=name,
        vision_bits=bits_of(vision),
        layer_bits=bits_of(decoder),
        head_bits=bits_of(decoder) if head is None else head,
        embedding_bits=table,
        kv_bits=8 + 32 / GROUP
        if decoder.kv_bits == 8
        else (32 if decoder.is_float and decoder.weight_bits == 32 else 16),
        vision_integers=vision.activation_bits == 8,
        decoder_integers=decoder.activation_bits == 8,
        gate_and_up_bits=inner,
    )


def bits_of(scheme: Scheme) -> float:
    """What a weight takes when it is read: its values, and its share of scales (a byte where they are multiples of a step,
    else a float32) and zero points.
    """
    if scheme.weights_are_float or scheme.group_size is None:
        return float(scheme.weight_bits)
    bits = 4 if scheme.weight_bits == 3 else scheme.weight_bits
    scale = 8 if scheme.scale_bits else 32
    return bits + (scale + (0 if scheme.symmetric else bits)) / scheme.group_size
