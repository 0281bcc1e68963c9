"""Our own kernels at full size (`native:cpu`) beside the engines' own generators and towers, on this machine.

    python -m lensc.bench.cpu [onnxruntime openvino llama small verify vision whole] [--folder build/full] [--repeat 5]

The rivals, what they run, and the rules are those of `lensc.bench.full_size`: processes of their own that take turns, ratios
of runs that followed each other, limits measured before and after. Sections:

    onnxruntime    the decoder beside ONNX Runtime GenAI: load, prefill, decode at three contexts, memory
    openvino       the same beside OpenVINO GenAI
    llama          the same beside llama.cpp with weights in Q4_0, and decode beside the smaller Q3_K_M
    small          decode with weights below 4 bits beside ONNX Runtime GenAI's and llama.cpp's in 4
    verify         a step of 2 to 8 drafted tokens, in steps of one token
    vision         1 and 10 slices beside both engines' 8-bit towers
    whole          a picture of 1344 x 1344 to the first token, beside the faster tower and the fastest prefill added up

`--bundle` measures another bundle for `native:cpu` beside the same rivals. The bundle of `small` is FOLDER/native-small: the
recipe `int2-mlp-gptq`, but for its method. Weights are rounded, which takes minutes; other values would be no faster or slower.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

from lensc.backends import _program_file
from lensc.backends._program import Constant, GatherRows, Place, Program, WeightRecord
from lensc.backends.bundle import DecoderSpec, load_manifest
from lensc.backends.files import write_text
from lensc.contender import Contender, end_with_us
from lensc.export.quantize.scheme import Scheme
from lensc.profiles import probe

from . import full_size, limits, record, turns

COMMAND = "python -m lensc.bench.cpu"
TARGET, SCHEME, SMALL_SCHEME = "native:cpu", "int4", "int2-mlp-gptq"
CONTEXTS, PROMPTS = (32, 1024, 4096), (128, 1024)
STEPS = 8
"""Tokens decoded in a turn; a cache has room for 128 beyond its prompt."""
TURNS, LAST_TURNS, VERIFY_TURNS = 4, 15, 12
"""In each repetition; at the longest context, which is prefilled once; steps of each size."""
SMALL_NAME, BESIDE_SMALL = "int2-mlp", ("onnxruntime", "llama")
"""What the weights of `small` are called, and the rivals whose 4 bits they are set beside."""
DRAFTS = (2, 4, 8)
SLICES = 10
SIDE = 1344
"""Of a picture that becomes 3 x 3 slices and an overview."""

LOAD_LIMIT_S, MEMORY_LIMIT_GB, WHOLE_MEMORY_LIMIT_GB, WHOLE_LIMIT_S, VERIFY_LIMIT = 1.0, 4.5, 5.0, 20.0, 1.25
"""What we promised ourselves."""

Reach = Mapping[str, float]
Measured = Callable[[Reach], list[record.Row]]
"""Rows, once it is known what the machine reached before and after they were measured."""


@dataclass(frozen=True)
class Bench:
    """What is measured, and beside what."""

    place: full_size.Place
    bundle: Path
    longest: int
    """No context is longer."""

    def ours(self, what: str) -> Contender:
        """Our server of a graph, or of the whole bundle."""
        command = [sys.executable, "-P", "-m", "lensc.bench.serve", str(self.bundle), what]
        command += ["--target", TARGET, "--threads", str(self.place.threads)]
        return Contender(f"lensc {what} native", command, self.place.folder)

    def bytes_per_token(self, context: int) -> int:
        """What decoding reads for a token: the weights, and the keys and values of `context` tokens."""
        manifest = load_manifest(self.bundle)
        artifact = next(a for a in manifest.artifacts if a.graph == "decoder" and str(a.target) == TARGET)
        kv_bits = Scheme.parse(artifact.scheme).kv_bits
        program = _program_file.read(self.bundle / artifact.files[0].path)
        return constant_bytes(program) + cache_bytes(manifest.model.decoder, context, kv_bits)


def constant_bytes(program: Program) -> int:
    """Of the constants that all steps read, each place once; a row of those of which a step takes single rows."""
    found: dict[Place, int] = {}
    for step in program.steps:
        for item in vars(step).values():
            read: list[tuple[Place | None, int]] = []
            if isinstance(item, Constant):
                read = [(item.place, 4 * item.width if isinstance(step, GatherRows) else item.nbytes)]
            elif isinstance(item, WeightRecord):
                read = [(item.values, item.values_bytes), (item.scale, item.scale_bytes)]
                read += [(item.zero_point, item.zero_point_bytes), (item.multiples, item.multiples_bytes)]
            found |= {place: max(count, found.get(place, 0)) for place, count in read if place is not None}
    return sum(found.values())


def cache_bytes(spec: DecoderSpec, context: int, kv_bits: int | None) -> int:
    """Of `context` tokens: in 8 bits with a float32 scale for each head and token, else in float16."""
    row = spec.head_dim + 4 if kv_bits == 8 else 2 * spec.head_dim
    return 2 * spec.num_layers * spec.num_kv_heads * context * row


def prepare(bench: Bench, sections: Sequence[str]) -> None:
    """Make what the sections need and is not there yet. Raises ExecutionError if a step fails."""
    place = bench.place
    full_size.prepare_checkpoint(place)
    if not bench.bundle.is_dir():
        _build(place, SCHEME, bench.bundle)
    if "small" in sections and not small_bundle(place).is_dir():
        from lensc.export.quantize.recipe import resolve  # which imports torch

        recipe = place.folder / "small.toml"
        write_text(recipe, replace(resolve(SMALL_SCHEME), name=SMALL_NAME, method="rtn").to_toml())
        _build(place, str(recipe), small_bundle(place))
    full_size.prepare_rivals(place, scripts_of(sections))


def _build(place: full_size.Place, scheme: str, bundle: Path) -> None:
    command = [sys.executable, "-P", "-m", "lensc", "build", str(place.checkpoint), "--scheme", scheme]
    full_size.run([*command, "--target", TARGET, "--max-memory", full_size.MAX_MEMORY, "-o", str(bundle)])


def small_bundle(place: full_size.Place) -> Path:
    """Of weights below 4 bits."""
    return place.folder / "native-small"


def scripts_of(sections: Sequence[str]) -> list[tuple[str, str]]:
    """Engine and script of the rivals that the sections need. The pictures that judge come with OpenVINO's tower."""
    decoders = {name: (name, full_size.DECODERS[name][0]) for name in full_size.DECODERS}
    towers = [(name, full_size.TOWERS[name][0]) for name in full_size.TOWERS]
    beside = {name: (name,) for name in decoders} | {"whole": tuple(decoders), "small": BESIDE_SMALL}
    wanted = {name for section in sections for name in beside.get(section, ())}
    needed = [decoders[name] for name in decoders if name in wanted]
    needed += [("llama", full_size.SMALLER[0])] if "llama" in sections else []
    return needed + (towers if "vision" in sections or "whole" in sections else [])


# --- the decoder --------------------------------------------------------------------------------------------------


def decoder(bench: Bench, engine: str) -> Measured:
    """Load, prefill, decode and memory beside an engine's own generator."""
    place, (script, label) = bench.place, full_size.DECODERS[engine]
    starts: turns.Starts = {"ours": lambda: bench.ours("decoder"), "theirs": lambda: place.rival(engine, script)}
    files = {
        "ours": turns.files_of(bench.bundle, "decoder", TARGET),
        "theirs": [path for path in place.model(script).iterdir() if path.is_file()],
    }
    loads = turns.loads(starts, files, place.repeat)
    short, *longer = (context for context in CONTEXTS if context <= bench.longest)
    prompts = [tokens for tokens in PROMPTS if tokens <= bench.longest]
    # the rival first: it needs most memory while it loads
    with starts["theirs"]() as theirs, starts["ours"]() as ours:
        pair = {"ours": ours, "theirs": theirs}
        took = turns.in_turn(pair, _asked(short, prompts, longer[:1]), place.repeat)
        memory = {who: contender.peak_bytes() / 1e9 for who, contender in pair.items()}
        for context in longer[1:]:
            turns.in_turn(pair, [(f"prefill {context}", f"prefill {context}")], 1)
            last = turns.in_turn(pair, LAST_TURNS * [_decode(context)], 1)
            took = {who: of | last[who] for who, of in took.items()}

    def row(what: str, unit: str, values: Mapping[str, Sequence[float]], limit: float | None) -> record.Row:
        return turns.compared(what, unit, values["ours"], values["theirs"], label, limit)

    def rows(reach: Reach) -> list[record.Row]:
        found = [row("load until ready", "s", loads, LOAD_LIMIT_S)]
        for context in (short, *longer):
            what = _decode(context)[0]
            limit = reach["bandwidth_gb_s"] * 1e9 / bench.bytes_per_token(context)
            found.append(row(what, "tokens/s", _speeds(took, what, STEPS), limit))
        for tokens in prompts:
            what, limit = f"prefill {tokens}", reach["int8_gemm_gop_s"] * 1e9 / full_size.FLOP_PER_TOKEN
            found.append(row(what, "tokens/s", _speeds(took, what, tokens), limit))
        held = {who: [peak] for who, peak in memory.items()}
        return [*found, row(f"peak memory, {max([short, *prompts])} tokens", "GB", held, MEMORY_LIMIT_GB)]

    return rows


def llama(bench: Bench) -> Measured:
    """What `decoder` measures beside llama.cpp, and decode beside the smaller of its files."""
    beside, (script, label) = decoder(bench, "llama"), full_size.SMALLER
    smaller = _short_decode(bench, "llama", script, label)
    return lambda reach: [*beside(reach), smaller(reach)]


def small(bench: Bench) -> Measured:
    """Decode with weights below 4 bits, beside the rivals' in 4."""
    ours = replace(bench, bundle=small_bundle(bench.place))
    found = [_short_decode(ours, engine, *full_size.DECODERS[engine], f", {SMALL_NAME}") for engine in BESIDE_SMALL]
    return lambda reach: [row(reach) for row in found]


def _short_decode(
    bench: Bench, engine: str, script: str, label: str, suffix: str = ""
) -> Callable[[Reach], record.Row]:
    """Decode at the short context alone, beside a rival."""
    short = CONTEXTS[0]
    with bench.place.rival(engine, script) as theirs, bench.ours("decoder") as ours:
        took = turns.in_turn({"ours": ours, "theirs": theirs}, _asked(short, (), ()), bench.place.repeat)

    def row(reach: Reach) -> record.Row:
        what, limit = _decode(short)[0], reach["bandwidth_gb_s"] * 1e9 / bench.bytes_per_token(short)
        speeds = _speeds(took, what, STEPS)
        return turns.compared(what + suffix, "tokens/s", speeds["ours"], speeds["theirs"], label, limit)

    return row


def _asked(short: int, prompts: Sequence[int], long: Sequence[int]) -> list[tuple[str, str]]:
    """A repetition: what is asked for, and with which line. `short` and `long` are decoded behind their prompts."""
    asked = []
    for tokens in (short, *prompts):
        asked.append((f"prefill {tokens}", f"prefill {tokens}"))
        if tokens == short or tokens in long:
            asked += TURNS * [_decode(tokens)]
    return asked


def _decode(context: int) -> tuple[str, str]:
    return f"decode, context {context}", f"decode {STEPS}"


def _speeds(took: Mapping[str, Mapping[str, Sequence[float]]], what: str, tokens: int) -> dict[str, list[float]]:
    return {who: [tokens / seconds for seconds in of[what]] for who, of in took.items()}


def verify(bench: Bench) -> list[record.Row]:
    """Steps of some tokens with all their logits, each divided by the step of one token before it."""
    asked = [("one", "decode 1"), *((f"verify {count}", f"verify {count}") for count in DRAFTS)]
    short = CONTEXTS[0]
    with bench.ours("decoder") as ours:
        turns.in_turn({"ours": ours}, [(f"prefill {short}", f"prefill {short}"), *asked], 1)
        took = turns.in_turn({"ours": ours}, VERIFY_TURNS * asked, max(1, min(bench.place.repeat, 8)))["ours"]
    rows = []
    for count in DRAFTS:
        steps = [many / one for many, one in zip(took[f"verify {count}"], took["one"], strict=True)]
        limit = VERIFY_LIMIT if count == DRAFTS[-1] else None
        spread = (min(steps), max(steps))
        rows.append(record.Row(f"verify {count} tokens", "steps", median(steps), spread, limit=limit, parity="pass"))
    return rows


# --- pictures -----------------------------------------------------------------------------------------------------


def vision(bench: Bench) -> list[record.Row]:
    """Slices beside both engines' towers, all three in turn."""
    place = bench.place
    scripts = {script: (engine, label) for engine, (script, label) in full_size.TOWERS.items()}
    first, second = scripts
    with (
        bench.ours("vision") as ours,
        place.rival(scripts[first][0], first) as one,
        place.rival(scripts[second][0], second) as other,
    ):
        contenders = {"ours": ours, first: one, second: other}
        # the first run with other inputs may still allocate
        turns.in_turn(contenders, [("vision", "vision 1")], 1)
        asked = [*TURNS * [("vision 1", "vision 1")], (f"vision {SLICES}", f"vision {SLICES}")]
        took = turns.in_turn(contenders, asked, place.repeat)
        quality = {who: contender.ask(f"sqnr {place.judge}")["db"] for who, contender in contenders.items()}
        memory = {who: contender.peak_bytes() / 1e9 for who, contender in contenders.items()}
    found: list[tuple[str, str, Mapping[str, Sequence[float]]]] = [
        ("slice of 448 x 448", "s", {who: of["vision 1"] for who, of in took.items()}),
        (f"{SLICES} slices", "s", {who: of[f"vision {SLICES}"] for who, of in took.items()}),
        ("slices, SQNR against float32", "dB", {who: [value] for who, value in quality.items()}),
        (f"{SLICES} slices, peak memory", "GB", {who: [value] for who, value in memory.items()}),
    ]
    return [
        turns.compared(what, unit, of["ours"], of[script], label)
        for script, (_, label) in scripts.items()
        for what, unit, of in found
    ]


def whole(bench: Bench) -> list[record.Row]:
    """A picture to the first token, beside OpenVINO's tower and the fastest prefill of all: no rival has a pipeline for
    the model, so its parts are added up, and what lies between them costs it nothing.
    """
    place = bench.place
    rivals: dict[str, tuple[list[float], list[float], float]] = {}
    tower = full_size.TOWERS["openvino"][0]
    for engine, (script, label) in full_size.DECODERS.items():
        with (
            place.rival(engine, script) as prefill,
            place.rival("openvino", tower) as slices,
            bench.ours("whole") as ours,
        ):
            theirs, mine = [], []
            for _ in range(place.repeat):
                answer = ours.ask(f"request {SIDE}")
                mine.append(float(answer["seconds"]))
                seconds = slices.seconds(f"vision {int(answer['slices'])}")
                theirs.append(seconds + prefill.seconds(f"prefill {int(answer['tokens'])}"))
            rivals[label] = (mine, theirs, ours.peak_bytes() / 1e9)
    label = min(rivals, key=lambda name: median(rivals[name][1]))
    mine, theirs, _ = rivals[label]
    name = f"{full_size.TOWERS['openvino'][1]}, then {label}"
    peak = max(memory for *_, memory in rivals.values())
    return [
        turns.compared(f"{SIDE} x {SIDE} to the first token", "s", mine, theirs, name, WHOLE_LIMIT_S),
        record.Row("whole request, peak memory", "GB", peak, limit=WHOLE_MEMORY_LIMIT_GB, parity="pass"),
    ]


SECTIONS: dict[str, Callable[[Bench], Measured]] = {
    "onnxruntime": lambda bench: decoder(bench, "onnxruntime"),
    "openvino": lambda bench: decoder(bench, "openvino"),
    "llama": llama,
    "small": small,
    "verify": lambda bench: _as_they_are(verify(bench)),
    "vision": lambda bench: _as_they_are(vision(bench)),
    "whole": lambda bench: _as_they_are(whole(bench)),
}


def _as_they_are(rows: list[record.Row]) -> Measured:
    return lambda _: rows


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print the tables, write a record for each section."""
    parser = argparse.ArgumentParser(prog=COMMAND, description=(__doc__ or "").split("\n")[0])
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=f"{', '.join(SECTIONS)} (default: all)")
    parser.add_argument("--folder", type=Path, default=Path("build/full"), help="default: %(default)s")
    parser.add_argument("--bundle", type=Path, help="of native:cpu (default: FOLDER/native, built if it is not there)")
    parser.add_argument("--repeat", type=int, default=5, help="runs of each in turn (default 5)")
    parser.add_argument("--threads", type=int, default=probe.machine().cores, help="default: the physical cores")
    parser.add_argument("--longest", type=int, default=CONTEXTS[-1], help="no longer context (default %(default)s)")
    parser.add_argument("--results", type=Path, metavar="FOLDER", help="write the records here (default: do not)")
    options = parser.parse_args(arguments)
    unknown = [name for name in options.sections if name not in SECTIONS]
    if unknown:
        parser.error(f"{unknown[0]!r} is not one of {', '.join(SECTIONS)}")
    for name, least in (("repeat", 1), ("threads", 1), ("longest", CONTEXTS[0])):
        if getattr(options, name) < least:
            parser.error(f"--{name} {getattr(options, name)}: expected at least {least}")
    sections = options.sections or list(SECTIONS)
    folder = options.folder.resolve()
    bundle = options.bundle.resolve() if options.bundle else folder / "native"
    bench = Bench(full_size.Place(folder, options.threads, options.repeat), bundle, options.longest)
    end_with_us()
    with turns.told_errors():
        prepare(bench, sections)
        for section in sections:
            reach = limits.measure(options.threads)
            measured = SECTIONS[section](bench)
            after = limits.measure(options.threads)
            reach = {name: max(value, after[name]) for name, value in reach.items()}
            rows = measured(reach)
            turns.show(section, rows, reach)
            if options.results:
                command = f"{COMMAND} {section}" + (f" --bundle {bundle.name}" if options.bundle else "")
                record.write("native_cpu", command, rows, options.results, reach)
    return 0


if __name__ == "__main__":
    sys.exit(main())
