"""ONNX Runtime with its own quantization tool: the vision tower and resampler of a checkpoint in 8 bits.

    python ort_vision.py build CHECKPOINT OUT
    python ort_vision.py serve OUT [--threads 2]

The tower is that of `vision_tower`, exported by `torch.onnx` and quantized by `quantize_dynamic` as its documentation
says: weights in int8 with a scale per output, activations as they come. `serve` answers, besides the lines that every
rival does:

    vision         {"what": "vision", "seconds": 1.26}        one slice
    sqnr JUDGE     {"what": "sqnr …", "db": 31.2}             the pictures of `judge.npz` against float32
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np


def build(checkpoint: Path, out: Path) -> None:
    """Write a folder that `serve` opens."""
    import torch
    import vision_tower
    from onnxruntime.quantization import QuantType, quant_pre_process, quantize_dynamic

    work = out.with_name(out.name + ".partial")
    shutil.rmtree(work, ignore_errors=True)
    (work / "model").mkdir(parents=True)
    config = json.loads((checkpoint / "config.json").read_text())
    module = vision_tower.module(config, vision_tower.weights(checkpoint))
    example = torch.from_numpy(vision_tower.pixels(vision_tower.pictures(1)[0]))
    with torch.no_grad():
        torch.onnx.export(module, (example,), str(work / "float.onnx"), dynamo=True, external_data=True)
    del module
    quant_pre_process(work / "float.onnx", work / "ready.onnx", skip_symbolic_shape=True, save_as_external_data=True)
    quantize_dynamic(
        work / "ready.onnx", work / "model" / "vision.onnx", per_channel=True, weight_type=QuantType.QInt8,
        use_external_data_format=True,
    )  # fmt: skip
    shutil.rmtree(out, ignore_errors=True)
    (work / "model").rename(out)
    shutil.rmtree(work)


def serve(folder: Path, threads: int) -> Iterator[dict[str, Any]]:
    """Answer the lines of stdin."""
    import onnxruntime as ort
    import vision_tower

    started = time.perf_counter()
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    session = ort.InferenceSession(folder / "vision.onnx", options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name

    def run(picture: Any) -> Any:
        return session.run(None, {name: vision_tower.pixels(picture)})[0]

    picture = vision_tower.pictures(1)[0]
    run(picture)
    yield {"ready": True, "load_seconds": time.perf_counter() - started}
    for line in sys.stdin:
        what, *rest = line.split()
        if what == "quit":
            return
        if what == "sqnr":
            with np.load(rest[0]) as judge:
                expected = judge["image_embeds"].astype(np.float64)
                found = np.concatenate([run(one) for one in judge["pictures"]])
            noise = float(np.square(found - expected).sum())
            yield {"what": line.strip(), "db": 10 * math.log10(float(np.square(expected).sum()) / noise)}
        elif what == "vision":
            started = time.perf_counter()
            run(picture)
            yield {"what": what, "seconds": time.perf_counter() - started}
        else:
            raise SystemExit(f"error: {what!r}: expected vision, sqnr or quit")


def main() -> None:
    """Build or serve."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    verbs = parser.add_subparsers(dest="verb", required=True)
    make = verbs.add_parser("build")
    make.add_argument("checkpoint", type=Path)
    make.add_argument("out", type=Path)
    run = verbs.add_parser("serve")
    run.add_argument("out", type=Path)
    run.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    if options.verb == "build":
        build(options.checkpoint, options.out)
        return
    for answer in serve(options.out, options.threads):
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
