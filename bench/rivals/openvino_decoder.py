"""OpenVINO GenAI: the decoder of a checkpoint at full size, in 4 bits.

    python openvino_decoder.py build CHECKPOINT OUT
    python openvino_decoder.py serve OUT [--threads 2] [--set KEY=VALUE ...]

Optimum exports and NNCF compresses (`INT4_SYM`, groups of 128, embedding and head in 8 bits) the first two layers with
the embedding and the head: for all 32 the float model would have to be held. The rest is made after that pattern: the
second layer's part of the graph once more for each further layer, and its weights with their bytes turned, so that every
layer has memory of its own. What the values are does not change the speed.

`serve` answers the lines that every rival does. It steps the pipeline that `LLMPipeline` uses by default on a CPU (paged
attention), with its settings.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np

BUILT_LAYERS = 2
GROUP = 128
PAGE = 4096
PIECE = 64 << 20


def build(checkpoint: Path, out: Path) -> None:
    """Write a folder that `serve` opens."""
    import nncf
    import openvino as ov
    from llama_layers import write_llama
    from openvino_tokenizers import convert_tokenizer
    from optimum.exporters.openvino import main_export
    from optimum.intel import OVConfig
    from transformers import AutoTokenizer

    work = out.with_name(out.name + ".partial")
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    layers = write_llama(checkpoint, work / "llama", BUILT_LAYERS)
    # told nothing, it compresses large models to 8 bits by itself
    main_export(
        str(work / "llama"), work / "traced", task="text-generation-with-past", stateful=True, convert_tokenizer=False,
        library_name="transformers", ov_config=OVConfig(dtype="fp16"),
    )  # fmt: skip
    model = ov.Core().read_model(work / "traced" / "openvino_model.xml")
    model = nncf.compress_weights(model, mode=nncf.CompressWeightsMode.INT4_SYM, group_size=GROUP, ratio=1.0)
    (work / "short").mkdir()
    ov.save_model(model, work / "short" / "openvino_model.xml", compress_to_fp16=False)
    del model
    (work / "model").mkdir()
    stretch(work / "short", work / "model", layers)
    tokenizers = convert_tokenizer(AutoTokenizer.from_pretrained(work / "llama"), with_detokenizer=True)
    for tokenizer, name in zip(tokenizers, ("tokenizer", "detokenizer"), strict=True):
        ov.save_model(tokenizer, work / "model" / f"openvino_{name}.xml")
    for file in (work / "traced").glob("*.json"):
        shutil.copyfile(file, work / "model" / file.name)
    config = json.loads((work / "model" / "config.json").read_text()) | {"num_hidden_layers": layers}
    (work / "model" / "config.json").write_text(json.dumps(config))
    shutil.rmtree(out, ignore_errors=True)
    (work / "model").rename(out)
    shutil.rmtree(work)


def stretch(source: Path, target: Path, layers: int) -> None:
    """Write the model of `source` with its last layer repeated until there are `layers`.

    A layer is what lies on the way from the sum that ends the layer before it to its own, with what feeds or stores only
    that: its weights, its states.
    """
    tree = ET.parse(source / "openvino_model.xml")
    parts = {part.tag: part for part in tree.getroot()}
    nodes_element, edges_element = parts["layers"], parts["edges"]
    nodes = {node.attrib["id"]: node for node in nodes_element}
    edges = [dict(edge.attrib) for edge in edges_element]
    into: dict[str, list[dict[str, str]]] = {key: [] for key in nodes}
    out_of: dict[str, list[dict[str, str]]] = {key: [] for key in nodes}
    for edge in edges:
        into[edge["to-layer"]].append(edge)
        out_of[edge["from-layer"]].append(edge)

    first, last = layer_ends(nodes)
    inside = reach(first, out_of, "to-layer") & (reach(last, into, "from-layer") | {last})
    sinks = {key for key, node in nodes.items() if node.get("type") == "Assign"}
    while True:
        more = {key for key in nodes if key not in inside and key != first and key not in sinks
                and out_of[key] and {e["to-layer"] for e in out_of[key]} - sinks <= inside}  # fmt: skip
        more |= {key for key in sinks - inside if {e["from-layer"] for e in into[key]} <= inside}
        if not more:
            break
        inside |= more
    inside -= {key for key in inside if nodes[key].get("type") in ("Parameter", "Result")}

    data = source / "openvino_model.bin"
    after = [edge for edge in edges if edge["from-layer"] == last and edge["to-layer"] not in inside]
    follow = max(int(key) for key in nodes) + 1
    previous, previous_port = last, after[0]["from-port"]
    with open(data, "rb") as weights, open(target / "openvino_model.bin", "wb") as written:
        shutil.copyfileobj(weights, written, PIECE)
        new_nodes, new_edges = [], []
        for layer in range(BUILT_LAYERS, layers):
            renamed = {key: str(follow + i) for i, key in enumerate(sorted(inside, key=int))}
            follow += len(renamed)
            for key, new in renamed.items():
                new_nodes.append(copy_node(nodes[key], new, layer, weights, written))
            for edge in edges:
                if edge["to-layer"] in inside:
                    begin = edge["from-layer"]
                    edge = edge | {"to-layer": renamed[edge["to-layer"]]}
                    if begin == first:
                        edge |= {"from-layer": previous, "from-port": previous_port}
                    else:
                        edge |= {"from-layer": renamed.get(begin, begin)}
                    new_edges.append(edge)
            previous = renamed[last]
    for edge in after:
        edge["from-layer"] = previous
    for element in list(edges_element):
        edges_element.remove(element)
    for edge in (*edges, *new_edges):
        ET.SubElement(edges_element, "edge", edge)
    for node in new_nodes:
        nodes_element.append(node)
    tree.write(target / "openvino_model.xml")


def layer_ends(nodes: dict[str, ET.Element]) -> tuple[str, str]:
    """The nodes whose sums end the last but one layer and the last."""
    ends = {}
    for layer in (BUILT_LAYERS - 2, BUILT_LAYERS - 1):
        sums = [key for key, node in nodes.items()
                if node.get("type") == "Add" and f"model.layers.{layer}/" in node.get("name", "")]  # fmt: skip
        ends[layer] = max(sums, key=int)
    return ends[BUILT_LAYERS - 2], ends[BUILT_LAYERS - 1]


def reach(start: str, edges: dict[str, list[dict[str, str]]], side: str) -> set[str]:
    seen: set[str] = set()
    pending = [start]
    while pending:
        for edge in edges[pending.pop()]:
            if edge[side] not in seen:
                seen.add(edge[side])
                pending.append(edge[side])
    return seen


def copy_node(node: ET.Element, key: str, layer: int, weights: IO[bytes], written: IO[bytes]) -> ET.Element:
    """A copy of `node` with weights of its own: those it copies, turned by `layer` pages."""
    copied = ET.fromstring(ET.tostring(node))
    copied.set("id", key)
    for element in copied.iter():
        for name, value in element.attrib.items():
            for form in (".{}.", ".{}/", "_{}."):
                value = value.replace("layers" + form.format(BUILT_LAYERS - 1), "layers" + form.format(layer))
            value = value.replace(f"key_values.{BUILT_LAYERS - 1}.", f"key_values.{layer}.")
            value = value.replace(f"present.{BUILT_LAYERS - 1}.", f"present.{layer}.")
            element.set(name, value)
    if copied.get("name") == node.get("name"):
        copied.set("name", f"{node.get('name')}/layer_{layer}")
    if node.get("type") == "Const":
        constant = next(element for element in copied if element.tag == "data")
        weights.seek(int(constant.attrib["offset"]))
        values = weights.read(int(constant.attrib["size"]))
        turn = PAGE * layer if len(values) >= 1 << 20 else 0
        begin = -(-written.tell() // PAGE) * PAGE
        written.seek(begin)
        written.write(values[turn:])
        written.write(values[:turn])
        constant.set("offset", str(begin))
    return copied


def serve(folder: Path, threads: int, properties: dict[str, str]) -> Iterator[dict[str, Any]]:
    """Answer the lines of stdin."""
    import openvino as ov
    import openvino_genai as genai

    started = time.perf_counter()
    scheduler = genai.SchedulerConfig()
    scheduler.max_num_batched_tokens = 1 << 16
    scheduler.enable_prefix_caching = False
    options = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": threads} | properties
    pipeline = genai.ContinuousBatchingPipeline(folder, scheduler, "CPU", options)
    vocabulary = json.loads((folder / "config.json").read_text())["vocab_size"]
    random, count = np.random.default_rng(0), 0

    def begin(tokens: int) -> Any:
        """A request that goes on until it is dropped, its first token made."""
        nonlocal count
        count += 1
        config = genai.GenerationConfig(max_new_tokens=1 << 16, ignore_eos=True, do_sample=False)
        ids = ov.Tensor(random.integers(1000, vocabulary - 1000, (1, tokens)))
        request = pipeline.add_request(count, ids, config)
        pipeline.step()
        return request

    def end(request: Any) -> None:
        request.stop()
        while pipeline.has_non_finished_requests():
            pipeline.step()

    # ready means that it answers, as for all that are measured: the first token, too
    request = begin(8)
    yield {"ready": True, "load_seconds": time.perf_counter() - started}
    for line in sys.stdin:
        what, *rest = line.split()
        if what == "quit":
            end(request)
            return
        if what == "prefill":
            end(request)
            started = time.perf_counter()
            request = begin(int(rest[0]))
        elif what == "decode":
            started = time.perf_counter()
            for _ in range(int(rest[0])):
                pipeline.step()
        else:
            raise SystemExit(f"error: {what!r}: expected prefill, decode or quit")
        seconds = time.perf_counter() - started
        if not request.can_read():
            raise SystemExit(f"error: {line.strip()}: no token was made")
        request.read()
        yield {"what": line.strip(), "seconds": seconds}


def main() -> None:
    """Build or serve."""
    import rival_command

    parser, _, run = rival_command.parsers(__doc__)
    run.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a property of OpenVINO")
    options = parser.parse_args()
    if options.verb == "build":
        build(options.checkpoint, options.out)
    else:
        rival_command.say(serve(options.out, options.threads, dict(entry.split("=", 1) for entry in options.set)))


if __name__ == "__main__":
    main()
