"""OpenVINO with NNCF: the vision tower and resampler of a checkpoint, as `nncf.quantize` makes them in 8 bits.

    python openvino_vision.py build CHECKPOINT OUT
    python openvino_vision.py serve OUT [--threads 2]

The model is traced for one slice of 448 x 448 pixels without padding, which is the best case for an engine: all sizes
are known, and positions are constants. `build` calibrates with drawn pictures and keeps others, with what the model
gives for them in float32, in `judge.npz`: `pictures: uint8[n, 448, 448, 3]`, `image_embeds: float32[n, queries, width]`.
`serve` answers, besides the lines that every rival does:

    vision [COUNT] {"what": "vision", "seconds": 0.91}        as many slices, one if nothing is said
    sqnr JUDGE     {"what": "sqnr …", "db": 31.2}             the pictures of `judge.npz` against float32
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

CALIBRATION_PICTURES = 32
JUDGED_PICTURES = 4


def build(checkpoint: Path, out: Path) -> None:
    """Write a folder that `serve` opens."""
    import nncf
    import openvino as ov
    import torch
    import vision_tower

    work = out.with_name(out.name + ".partial")
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    config = json.loads((checkpoint / "config.json").read_text())
    module = vision_tower.module(config, vision_tower.weights(checkpoint))
    pictures = vision_tower.pictures(CALIBRATION_PICTURES + JUDGED_PICTURES)
    judged = pictures[CALIBRATION_PICTURES:]
    with torch.no_grad():
        expected = torch.cat([module(torch.from_numpy(vision_tower.pixels(picture))) for picture in judged]).numpy()
        model = ov.convert_model(module, example_input=torch.from_numpy(vision_tower.pixels(judged[0])))
    del module
    model.reshape([1, 3, vision_tower.SIDE, vision_tower.SIDE])
    calibration = nncf.Dataset(pictures[:CALIBRATION_PICTURES], vision_tower.pixels)
    quantized = nncf.quantize(model, calibration, model_type=nncf.ModelType.TRANSFORMER)
    ov.save_model(quantized, work / "vision.xml")
    np.savez(work / "judge.npz", pictures=judged, image_embeds=expected)
    shutil.rmtree(out, ignore_errors=True)
    work.rename(out)


def serve(folder: Path, threads: int) -> Iterator[dict[str, Any]]:
    """Answer the lines of stdin."""
    import openvino as ov
    import vision_tower

    started = time.perf_counter()
    options = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": threads}
    request = ov.Core().compile_model(folder / "vision.xml", "CPU", options).create_infer_request()

    def run(pixels: Any) -> Any:
        return request.infer([pixels])[0]

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
