"""The model at full size beside its rivals: 8,537,092,336 random weights, in 4 bits, on this machine.

    python -m lensc.bench.full_size [build onnxruntime openvino vision] [--folder build/full] [--repeat 5]

Everything is made once in `--folder` (45 GB) and used again: the checkpoint, a bundle for both engines, an environment
and a model for each rival, made by the rival's own tools (`lensc.bench.rivals`). Then, for each section:

    build          checkpoint to bundle: time, peak memory, size
    onnxruntime    the decoder beside ONNX Runtime GenAI
    openvino       the decoder beside OpenVINO GenAI
    vision         a slice of 448 x 448 on both engines, beside what their own tools make of the tower in 8 bits

Ours and the rival's run in processes of their own and take turns, `--repeat` times; while one is asked, the other one is
stopped. Ratios are of runs that followed each other. What the machine can reach at best is measured before and after.
Ours has passed its golden probes on the engine when it is measured, or the benchmark ends.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lensc.backends.bundle import load_manifest
from lensc.backends.errors import ExecutionError
from lensc.contender import Contender, end_with_us
from lensc.profiles import probe

from . import limits, record, turns

SCHEME, MAX_MEMORY = "int4", "4GiB"
TARGETS = {"onnxruntime": "onnxruntime:cpu", "openvino": "openvino:cpu"}
RIVALS = Path(__file__).parent / "rivals"

TORCH = "torch==2.13.0"
ENVIRONMENTS = {
    "onnxruntime": (TORCH, "onnxruntime-genai==0.18.0", "onnxruntime==1.32.0", "onnx==1.23.2", "onnx-ir==1.1.0",
                    "onnxscript==0.7.2", "transformers==5.23.0", "safetensors==0.8.0", "sentencepiece", "psutil", "pillow"),
    "openvino": (TORCH, "openvino==2026.4.1", "openvino-genai==2026.4.1.0", "nncf==3.4.0", "optimum-intel==2.2.0",
                 "safetensors==0.8.0"),
    "llama": ("--no-cache-dir", "--no-binary=llama-cpp-python", "llama-cpp-python==0.3.36", "gguf==0.19.0",
              "safetensors==0.8.0"),
}  # fmt: skip
"""What pip installs for a rival, torch's CPU build before all else. llama.cpp is compiled for this processor."""
LEFT_OUT = {"openvino": ("torchvision",)}
"""What comes along and is removed again: optimum-intel asks for torchvision, pip takes a build for another torch, and importing
transformers fails at it, which does without where there is none."""
COMPILED = {"CMAKE_ARGS": "-DGGML_NATIVE=ON -DLLAVA_BUILD=OFF", "CXXFLAGS": "-fno-tree-dse -fno-dse"}
"""The environment of pip where it compiles. GCC 12.2 takes most of what llama.cpp stores for `ldtilecfg` for dead and leaves
it out: on a CPU with AMX the first prompt would end with an illegal instruction."""

THREADS = probe.machine().cores

SHORT, LONG, STEPS, TURNS = 32, 1024, 8, 4
"""Tokens of a short and of a long prompt; after each, so many tokens are decoded in so many turns. Turns are short because
the bandwidth of a shared machine changes from second to second."""

FLOP_PER_TOKEN = 13.96e9
"""Of a prefilled token in products with weights, the head left out: 2 for each of the 6.98 x 10^9 weights."""

TIME_LIMIT_S, PEAK_LIMIT_GB, SIZE_LIMIT_GB, MEMORY_LIMIT_GB, LOAD_LIMIT_S = 900.0, 4.0, 5.2, 4.7, 2.5
"""What we promised ourselves (the table of docs/full_size.md)."""


@dataclass(frozen=True)
class Place:
    """Where everything lies, and how it is run."""

    folder: Path
    threads: int
    repeat: int

    @property
    def checkpoint(self) -> Path:
        return self.folder / "checkpoint"

    @property
    def bundle(self) -> Path:
        return self.folder / "bundle"

    @property
    def judge(self) -> Path:
        """Pictures, and what the model gives for them in float32."""
        return self.folder / "rivals" / "openvino-vision" / "judge.npz"

    def python(self, rival: str) -> str:
        """The interpreter of a rival's environment."""
        return str(self.folder / f"env-{rival}" / "bin" / "python")

    def ours(self, graph: str, engine: str) -> Contender:
        """Our server of a graph."""
        command = [sys.executable, "-P", "-m", "lensc.bench.serve", str(self.bundle), graph]
        command += ["--target", TARGETS[engine], "--threads", str(self.threads)]
        return Contender(f"lensc {graph} {engine}", command, self.folder)

    def rival(self, engine: str, script: str) -> Contender:
        """A rival's server."""
        command = [self.python(engine), str(file_of(script)), "serve", str(self.model(script))]
        command += ["--threads", str(self.threads), *SETTINGS.get(script, ())]
        return Contender(script, command, self.folder, _outside())

    def model(self, script: str) -> Path:
        """What the rival runs."""
        return self.folder / "rivals" / script.replace("_", "-")

    def files(self, graph: str, engine: str) -> list[Path]:
        """What our server of a graph opens."""
        return turns.files_of(self.bundle, graph, TARGETS[engine])


VARIANTS = {"llama_cpp_q3_k_m": ("llama_cpp_decoder", ("--type", "Q3_K_M"))}
"""A rival that another one's script makes, and what `build` is told for it."""


def file_of(script: str) -> Path:
    """The file of a rival's script."""
    return RIVALS / f"{VARIANTS[script][0] if script in VARIANTS else script}.py"


DECODERS = {"onnxruntime": ("ort_genai", "ONNX Runtime GenAI, int4 block 128"),
            "openvino": ("openvino_decoder", "OpenVINO GenAI, int4_sym group 128, float32"),
            "llama": ("llama_cpp_decoder", "llama.cpp Q4_0")}  # fmt: skip
SMALLER = ("llama_cpp_q3_k_m", "llama.cpp Q3_K_M")
TOWERS = {"onnxruntime": ("ort_vision", "onnxruntime.quantization, dynamic int8"),
          "openvino": ("openvino_vision", "OpenVINO, NNCF int8")}  # fmt: skip
SETTINGS = {
    "openvino_decoder": ("--set", "INFERENCE_PRECISION_HINT=f32", "--set", "DYNAMIC_QUANTIZATION_GROUP_SIZE=128")
}
"""What makes a rival faster than its defaults do. On a CPU with AMX OpenVINO computes in bfloat16 if nobody says anything:
2.4 tokens/s where it reaches 4.1, and a prefill of 1024 tokens at 31 in the place of 33."""


def prepare(place: Place, sections: Sequence[str]) -> None:
    """Make what the sections need and is not there yet. Raises ExecutionError if a step fails."""
    prepare_checkpoint(place)
    if "build" not in sections and not place.bundle.is_dir():
        run(_build_command(place))
    scripts = [(name, DECODERS[name][0]) for name in DECODERS if name in sections]
    prepare_rivals(place, scripts + [(name, TOWERS[name][0]) for name in TOWERS if "vision" in sections])


def prepare_checkpoint(place: Place) -> None:
    """Make the folder and the checkpoint in it."""
    (place.folder / "rivals").mkdir(parents=True, exist_ok=True)
    if not place.checkpoint.is_dir():
        run([sys.executable, "-P", "-m", "lensc.bench.checkpoint", "-o", str(place.checkpoint)])


def prepare_rivals(place: Place, scripts: Sequence[tuple[str, str]]) -> None:
    """Make the environments and models of (engine, script). Raises ExecutionError if a step fails."""
    for engine, script in scripts:
        if not Path(place.python(engine)).exists():
            run([sys.executable, "-m", "venv", str(place.folder / f"env-{engine}")])
            install = [place.python(engine), "-m", "pip", "install", "-qq"]
            if TORCH in ENVIRONMENTS[engine]:
                run([*install, TORCH])
            run([*install, *ENVIRONMENTS[engine]], dict(os.environ) | COMPILED)
            if engine in LEFT_OUT:
                run([place.python(engine), "-m", "pip", "uninstall", "-qq", "--yes", *LEFT_OUT[engine]])
        if not place.model(script).is_dir():
            command = [place.python(engine), str(file_of(script)), "build", str(place.checkpoint)]
            _, told = VARIANTS.get(script, (script, ()))
            run([*command, str(place.model(script)), *told], _outside())


def build(place: Place) -> list[record.Row]:
    """Checkpoint to bundle, from nothing."""
    run(["rm", "-rf", str(place.bundle), f"{place.bundle}.partial"])
    started = time.perf_counter()
    run(_build_command(place))
    seconds = time.perf_counter() - started
    manifest = load_manifest(place.bundle)
    peak = max(stage.peak_bytes for stage in manifest.stages)
    size = sum(file.bytes for file in manifest.files)
    return [
        record.Row(f"checkpoint to bundle, {SCHEME}", "s", seconds, limit=TIME_LIMIT_S, parity="pass"),
        record.Row("peak memory of export, quantize, compile", "GB", peak / 1e9, limit=PEAK_LIMIT_GB, parity="pass"),
        record.Row("bundle for both engines", "GB", size / 1e9, limit=SIZE_LIMIT_GB, parity="pass"),
    ]


def decoder(place: Place, engine: str, reach: Mapping[str, float]) -> list[record.Row]:
    """Load, prefill, decode and memory of the decoder on an engine, beside its own generator."""
    script, label = DECODERS[engine]
    starts: dict[str, Callable[[], Contender]] = {
        "ours": lambda: place.ours("decoder", engine),
        "theirs": lambda: place.rival(engine, script),
    }
    files = {"ours": place.files("decoder", engine), "theirs": [*place.model(script).iterdir()]}
    loads = turns.loads(starts, files, place.repeat)
    rows = [_row(f"{engine}: load until ready", "s", loads, label, limit=LOAD_LIMIT_S)]
    short, long = f"decode, context {SHORT}", f"decode, context {LONG}"
    first, *prefills = ((line, line) for line in (f"prefill {count}" for count in (SHORT, 128, LONG)))
    asked = [first, *TURNS * [(short, f"decode {STEPS}")], *prefills, *TURNS * [(long, f"decode {STEPS}")]]
    with starts["ours"]() as ours, starts["theirs"]() as theirs:
        took = turns.in_turn({"ours": ours, "theirs": theirs}, asked, place.repeat)
        memory = {"ours": [ours.peak_bytes() / 1e9], "theirs": [theirs.peak_bytes() / 1e9]}
    weights = sum(f.stat().st_size for f in place.files("decoder", engine))
    decode_limit = reach["bandwidth_gb_s"] * 1e9 / weights
    prefill_limit = reach["int8_gemm_gop_s"] * 1e9 / FLOP_PER_TOKEN
    for what, tokens, limit in (
        (short, STEPS, decode_limit),
        (long, STEPS, decode_limit),
        ("prefill 128", 128, prefill_limit),
        (f"prefill {LONG}", LONG, prefill_limit),
    ):
        speeds = {who: [tokens / seconds for seconds in of[what]] for who, of in took.items()}
        rows.append(_row(f"{engine}: {what}", "tokens/s", speeds, label, limit=limit))
    rows.append(_row(f"{engine}: peak memory, {LONG} tokens", "GB", memory, label, limit=MEMORY_LIMIT_GB))
    return rows


def vision(place: Place) -> list[record.Row]:
    """One slice on both engines, each beside what its own tools make of the float tower."""
    rows = []
    for engine, (script, label) in TOWERS.items():
        with place.ours("vision", engine) as ours, place.rival(engine, script) as theirs:
            pair = {"ours": ours, "theirs": theirs}
            # the first run with other inputs may still allocate
            turns.in_turn(pair, [("vision", "vision")], 1)
            took = turns.in_turn(pair, TURNS * [("vision", "vision")], place.repeat)
            quality = {who: [contender.ask(f"sqnr {place.judge}")["db"]] for who, contender in pair.items()}
            memory = {who: [contender.peak_bytes() / 1e9] for who, contender in pair.items()}
        rows.append(_row(f"{engine}: slice of 448 x 448", "s", {w: t["vision"] for w, t in took.items()}, label))
        rows.append(_row(f"{engine}: slice, SQNR against float32", "dB", quality, label))
        rows.append(_row(f"{engine}: slice, peak memory", "GB", memory, label))
    return rows


def _row(
    what: str, unit: str, values: Mapping[str, Sequence[float]], rival: str, limit: float | None = None
) -> record.Row:
    return turns.compared(what, unit, values["ours"], values["theirs"], rival, limit)


def _build_command(place: Place) -> list[str]:
    command = [sys.executable, "-P", "-m", "lensc", "build", str(place.checkpoint), "--scheme", SCHEME]
    for target in TARGETS.values():
        command += ["--target", target]
    return [*command, "--max-memory", MAX_MEMORY, "-o", str(place.bundle)]


def _outside() -> dict[str, str]:
    """The environment without what leads to our own packages; a script's own folder is on its path again."""
    return {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONSAFEPATH")}


def run(command: list[str], environment: dict[str, str] | None = None) -> None:
    """Run a step that must succeed. Raises ExecutionError."""
    print("+ " + " ".join(command), file=sys.stderr, flush=True)
    done = subprocess.run(command, env=environment, stdout=sys.stderr, check=False)
    if done.returncode:
        raise ExecutionError(f"{' '.join(command)}: ended with {done.returncode}")


SECTIONS: dict[str, Callable[[Place, Mapping[str, float]], list[record.Row]]] = {
    "build": lambda place, _: build(place),
    "onnxruntime": lambda place, reach: decoder(place, "onnxruntime", reach),
    "openvino": lambda place, reach: decoder(place, "openvino", reach),
    "vision": lambda place, _: vision(place),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print the tables, write a record for each section."""
    parser = argparse.ArgumentParser(prog="python -m lensc.bench.full_size", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=f"{', '.join(SECTIONS)} (default: all)")
    parser.add_argument("--folder", type=Path, default=Path("build/full"), help="default: %(default)s")
    parser.add_argument("--repeat", type=int, default=5, help="runs of each in turn (default 5)")
    parser.add_argument("--threads", type=int, default=THREADS, help="default: the physical cores")
    parser.add_argument("--results", type=Path, metavar="FOLDER", help="write the records here (default: do not)")
    options = parser.parse_args(arguments)
    unknown = [name for name in options.sections if name not in SECTIONS]
    if unknown:
        parser.error(f"{unknown[0]!r} is not one of {', '.join(SECTIONS)}")
    for name in ("repeat", "threads"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} {getattr(options, name)}: expected at least 1")
    sections = options.sections or list(SECTIONS)
    place = Place(options.folder.resolve(), options.threads, options.repeat)
    end_with_us()
    with turns.told_errors():
        prepare(place, sections)
        for section in sections:
            reach = limits.measure(options.threads)
            rows = SECTIONS[section](place, reach)
            after = limits.measure(options.threads)
            reach = {name: max(value, after[name]) for name, value in reach.items()}
            turns.show(section, rows, reach)
            if options.results:
                command = f"python -m lensc.bench.full_size {section}"
                record.write("full_size", command, rows, options.results, reach)
    return 0


if __name__ == "__main__":
    sys.exit(main())
