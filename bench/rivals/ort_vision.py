"""ONNX Runtime with its own quantization tool: the vision tower and resampler of a checkpoint in 8 bits.

    python ort_vision.py build CHECKPOINT OUT
    python ort_vision.py serve OUT [--threads 2]

The tower is that of `vision_tower`, exported by `torch.onnx` and quantized by `quantize_dynamic` as its documentation
says: weights in int8 with a scale per output, activations as they come. `serve` answers, besides the lines that every
rival does:

    vision [COUNT] {"what": "vision", "seconds": 1.26}        as many slices, one if nothing is said
    sqnr JUDGE     {"what": "sqnr …", "db": 31.2}             the pictures of `judge.npz` against float32
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any


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

    def run(pixels: Any) -> Any:
        return session.run(None, {name: pixels})[0]

    picture = vision_tower.pictures(1)[0]
    run(vision_tower.pixels(picture))
    yield {"ready": True, "load_seconds": time.perf_counter() - started}
    yield from vision_tower.answers(run, picture)


def main() -> None:
    """Build or serve."""
    import rival_command

    parser, *_ = rival_command.parsers(__doc__)
    options = parser.parse_args()
    if options.verb == "build":
        build(options.checkpoint, options.out)
    else:
        rival_command.say(serve(options.out, options.threads))


if __name__ == "__main__":
    main()
