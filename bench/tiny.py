"""Makes the tiny model that `lensc doctor` runs on every engine, with what it answers: `runtime/tiny.tar.xz`.

    python -m lensc.bench.tiny [-o runtime/tiny.tar.xz]

A model of the true architecture, one layer in each half, compiled for all engines whose artifacts hold on other machines,
in a bundle of each of `SCHEMES`. Its weights are random and nearly all of them are zero, so that the archive is small;
every product still adds up values. What it answers about its picture is recorded once all engines here agree on it.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shutil
import sys
import tarfile
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lensc.backends.base import Target
from lensc.backends.bundle import Manifest, load_manifest, write_manifest
from lensc.backends.errors import ExecutionError, LensError
from lensc.export import build
from lensc.export.demo.tokenizer import first_added_id, vocab_size, write_tokenizer
from lensc.export.engines import usable
from lensc.runtime.tiny import ANSWER, ARCHIVE, FLOAT, SCHEMES, answer

COMMAND = "python -m lensc.bench.tiny"
TARGETS = ("onnxruntime:cpu", "openvino:cpu", "native:cpu", "cuda:gpu")
SEED = 3
NONZERO = 12
"""Of the inputs of an output."""
SIDE = 56

CONFIG: dict[str, Any] = {
    "_name_or_path": "lensc/tiny",
    "version": "2.5",
    "model_type": "minicpmv",
    "hidden_size": 128,
    "intermediate_size": 128,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "query_num": 4,
    "rope_theta": 500000.0,
    "max_position_embeddings": 256,
    "drop_vision_last_layer": False,
    "slice_config": {"max_slice_nums": 4, "patch_size": 14, "scale_resolution": SIDE},
    "vision_config": {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "image_size": 2 * SIDE,
        "patch_size": 14,
    },
}


def write_checkpoint(folder: Path) -> None:
    """The model's checkpoint, in the official layout."""
    import torch
    from safetensors.torch import save_file

    from lensc.export.models.config import ModelConfig
    from lensc.export.models.minicpmv import MiniCPMV

    special = {"bos_token_id": first_added_id(), "eos_token_id": first_added_id() + 1}
    config = {**CONFIG, **special, "vocab_size": vocab_size()}
    with torch.device("meta"):
        state = MiniCPMV(ModelConfig.from_json(config)).state_dict()
    drawn = np.random.default_rng(SEED)
    tensors = {}
    for name in sorted(state):
        shape = tuple(state[name].shape)
        if len(shape) == 1:
            values = np.full(shape, 0.0 if name.endswith("bias") else 1.0)
        else:
            rows = np.zeros((shape[0], int(np.prod(shape[1:]))))
            count = min(NONZERO, rows.shape[1])
            for row in rows:
                row[drawn.choice(len(row), count, replace=False)] = drawn.choice([-1.0, 1.0], count)
            gain = 3.0 if name.startswith("llm.lm_head") else 1.0
            values = (rows * gain * count**-0.5).reshape(shape)
        tensors[name] = torch.from_numpy(values.astype(np.float16))
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    write_tokenizer(folder)
    preprocessor: dict[str, Any] = {
        "max_slice_nums": 4,
        "scale_resolution": SIDE,
        "patch_size": 14,
        "image_feature_size": 4,
    }
    preprocessor |= {"norm_mean": [0.5] * 3, "norm_std": [0.5] * 3, "version": 2.5}
    documents = {"config": config, "generation_config": special, "preprocessor_config": preprocessor}
    for name, document in documents.items():
        (folder / f"{name}.json").write_text(json.dumps(document))


def make(archive: Path) -> dict[str, int]:
    """Write `archive`; return the bytes of each bundle. Raises ExecutionError if two engines answer differently."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        write_checkpoint(folder / "checkpoint")
        for scheme in SCHEMES:
            bundle = folder / scheme
            targets = [Target.parse(text) for text in TARGETS]
            graphs = folder / f"{scheme}.graphs"
            build.export_checkpoint(folder / "checkpoint", graphs, scheme=scheme, command=COMMAND)
            build.compile_graphs(graphs, targets, bundle, command=COMMAND)
            answers = {str(target): answer(bundle, str(target)) for target in targets if usable(target)[0]}
            if len(set(answers.values())) != 1:
                raise ExecutionError(f"{scheme}: answers differ: {answers}; choose another SEED")
            manifest = _with_graphs(graphs, bundle) if scheme == FLOAT else load_manifest(bundle)
            given = " ".join(map(str, next(iter(answers.values()))))
            write_manifest(bundle, dataclasses.replace(manifest, metadata={**manifest.metadata, ANSWER: given}))
        pack(folder, archive)
        return {s: sum(p.stat().st_size for p in (folder / s).rglob("*") if p.is_file()) for s in SCHEMES}


def _with_graphs(graphs: Path, bundle: Path) -> Manifest:
    """The manifest of the bundle, which holds its portable graphs, too: engines whose artifacts hold on one machine compile
    them there.
    """
    manifest, portable = load_manifest(bundle), load_manifest(graphs).graphs
    for record in portable.values():
        assert record.file is not None
        for source in (graphs / record.file).parent.glob(f"{Path(record.file).name}*"):
            shutil.copyfile(source, bundle / source.relative_to(graphs))
    return dataclasses.replace(manifest, graphs=portable)


def pack(folder: Path, archive: Path) -> None:
    """Write the bundles in `folder` to `archive`. One stream: what both hold is in it once."""
    partial = archive.with_name(archive.name + ".partial")
    with tarfile.open(partial, "w:xz", preset=9) as packed:
        for scheme in SCHEMES:
            for path in sorted(p for p in (folder / scheme).rglob("*") if p.is_file()):
                entry = tarfile.TarInfo(path.relative_to(folder).as_posix())
                entry.size, entry.mode = path.stat().st_size, 0o644
                with open(path, "rb") as file:
                    packed.addfile(entry, file)
    os.replace(partial, archive)


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line and make the archive; errors are one line."""
    parser = argparse.ArgumentParser(prog="python -m lensc.bench.tiny", description=str(__doc__).split("\n")[0])
    parser.add_argument("-o", "--output", type=Path, default=ARCHIVE, metavar="FILE", help=f"default: {ARCHIVE.name}")
    options = parser.parse_args(arguments)
    try:
        sizes = make(options.output)
    except LensError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    held = ", ".join(f"{scheme} {nbytes / 1e3:.0f} kB" for scheme, nbytes in sizes.items())
    print(f"{options.output}: {options.output.stat().st_size / 1e3:.0f} kB ({held})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
