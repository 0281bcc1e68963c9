"""ONNX Runtime GenAI: the decoder of a checkpoint at full size, in 4 bits.

    python ort_genai.py build CHECKPOINT OUT [--block-size 128]
    python ort_genai.py serve OUT [--threads 2]

Its model builder takes 21 GB of memory for 8 layers and more than 24 for 32. So it builds the first two layers, with
the embedding and the head, and the rest is made after its pattern: the nodes of the second layer once more for each
further layer, and its weights with their bytes shifted, so that every layer has memory of its own. What the values are
does not change the speed.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

BUILT_LAYERS = 2
DATA = "model.onnx.data"
PAGE = 4096


def build(checkpoint: Path, out: Path, block_size: int) -> None:
    """Write a folder that `serve` opens."""
    from llama_layers import TOKENIZER, write_llama

    work = out.with_name(out.name + ".partial")
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    layers = write_llama(checkpoint, work / "llama", BUILT_LAYERS, (*TOKENIZER, "generation_config.json"))
    options = [f"block_size={block_size}", "accuracy_level=4", "prune_lm_head=true"]
    command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", str(work / "llama")]
    command += ["-o", str(work / "short"), "-p", "int4", "-e", "cpu", "-c", str(work / "cache")]
    subprocess.run([*command, "--extra_options", *options], check=True, stdout=sys.stderr)
    shutil.rmtree(work / "llama")
    (work / "model").mkdir()
    stretch(work / "short", work / "model", layers)
    shutil.rmtree(out, ignore_errors=True)
    (work / "model").rename(out)
    shutil.rmtree(work)


def stretch(short: Path, out: Path, layers: int) -> None:
    """Write the model of `short` with `layers` layers into `out`."""
    import onnx

    model = onnx.load(str(short / "model.onnx"), load_external_data=False)
    last, graph = BUILT_LAYERS - 1, model.graph
    pattern = [node for node in graph.node if f"layers.{last}/" in node.name]
    after = [node for node in graph.node if _reads(node, f"layers.{last}/") and f"layers.{last}/" not in node.name]
    renamed = [(node, list(node.input)) for node in after]
    weights = [tensor for tensor in graph.initializer if f"layers.{last}." in tensor.name]
    source = np.memmap(short / DATA, np.uint8, "r")
    shutil.copyfile(short / DATA, out / DATA)
    with open(out / DATA, "r+b") as file:
        file.seek(0, 2)
        for layer in range(BUILT_LAYERS, layers):
            for tensor in weights:
                graph.initializer.append(_shifted(tensor, layer, source, file))
            for node in pattern:
                copy = onnx.NodeProto.FromString(node.SerializeToString())
                copy.name = _of_layer(copy.name, layer)
                copy.input[:] = [_of_layer(name, layer) for name in copy.input]
                copy.output[:] = [_of_layer(name, layer) for name in copy.output]
                graph.node.append(copy)
            for values in (graph.input, graph.output):
                for value in [v for v in values if f".{last}." in v.name]:
                    copy = onnx.ValueInfoProto.FromString(value.SerializeToString())
                    copy.name = _of_layer(value.name, layer)
                    values.append(copy)
    for node, inputs in renamed:
        node.input[:] = [_of_layer(name, layers - 1) for name in inputs]
    # what reads the last layer must stand behind it
    kept = [node for node in graph.node if node not in after]
    del graph.node[:]
    graph.node.extend([*kept, *after])
    del graph.value_info[:]
    _sort(graph)
    onnx.save(model, str(out / "model.onnx"))
    config = json.loads((short / "genai_config.json").read_text())
    config["model"]["decoder"]["num_hidden_layers"] = layers
    (out / "genai_config.json").write_text(json.dumps(config, indent=1))
    for path in short.iterdir():
        if path.suffix == ".json" and path.name != "genai_config.json":
            shutil.copyfile(path, out / path.name)


def _reads(node: Any, text: str) -> bool:
    return any(text in name for name in node.input)


def _of_layer(name: str, layer: int) -> str:
    """The name of what layer `layer` has in the place of what the last built layer has."""
    for form in ("layers.{}/", "layers.{}.", "past_key_values.{}.", "present.{}."):
        for k in range(BUILT_LAYERS):
            old, new = form.format(k), form.format(layer - (BUILT_LAYERS - 1 - k))
            if old in name:
                return name.replace(old, new)
    return name


def _shifted(tensor: Any, layer: int, source: Any, file: Any) -> Any:
    """The initializer of another layer: packed values are moved by some bytes, all else is the same."""
    copy = type(tensor).FromString(tensor.SerializeToString())
    copy.name = _of_layer(tensor.name, layer)
    entries = {entry.key: entry for entry in copy.external_data}
    if entries:
        offset, length = int(entries["offset"].value), int(entries["length"].value)
        values = np.array(source[offset : offset + length])
        if tensor.data_type == 2 and length > PAGE:  # uint8
            values = np.roll(values, 64 * layer)
        file.write(bytes(-file.tell() % PAGE))
        entries["offset"].value = str(file.tell())
        file.write(values.tobytes())
    return copy


def _sort(graph: Any) -> None:
    """Order the nodes so that each stands behind those it reads."""
    known = {value.name for value in (*graph.input, *graph.initializer)} | {""}
    waiting, ordered = list(graph.node), []
    while waiting:
        ready = [node for node in waiting if all(name in known for name in node.input)]
        if not ready:
            raise SystemExit(f"error: {waiting[0].name} reads what no node makes")
        chosen = {id(node) for node in ready}
        known |= {name for node in ready for name in node.output}
        ordered += ready
        waiting = [node for node in waiting if id(node) not in chosen]
    copies = [type(node).FromString(node.SerializeToString()) for node in ordered]
    del graph.node[:]
    graph.node.extend(copies)


def serve(folder: Path, threads: int) -> Iterator[dict[str, Any]]:
    """Answer the lines of stdin."""
    import onnxruntime_genai as genai
    import rival_command

    started, room = time.perf_counter(), rival_command.ROOM
    config = genai.Config(str(folder))
    overlay = {"model": {"decoder": {"session_options": {"intra_op_num_threads": threads}}}}
    config.overlay(json.dumps(overlay))
    model = genai.Model(config)
    generator: Any = None
    prompt = np.empty(0, np.int32)

    def begin(tokens: int) -> None:
        nonlocal generator, prompt
        generator = None
        parameters = genai.GeneratorParams(model)
        # no token may end the sequence before its steps are timed
        parameters.set_search_options(max_length=tokens + room, min_length=tokens + room, do_sample=False)
        generator = genai.Generator(model, parameters)
        prompt = np.random.default_rng(tokens).integers(1, 100_000, tokens, dtype=np.int32)

    def prefill() -> None:
        generator.append_tokens(prompt)
        generator.generate_next_token()

    def decode() -> None:
        generator.generate_next_token()

    yield from rival_command.decoder_answers(started, begin, prefill, decode)


def main() -> None:
    """Build or serve."""
    import rival_command

    parser, make, _ = rival_command.parsers(__doc__)
    make.add_argument("--block-size", type=int, default=128)
    options = parser.parse_args()
    if options.verb == "build":
        build(options.checkpoint, options.out, options.block_size)
    else:
        rival_command.say(serve(options.out, options.threads))


if __name__ == "__main__":
    main()
