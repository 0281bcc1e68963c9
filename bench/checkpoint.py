"""A checkpoint with random weights in the official layout: what the speed and memory of the full model are measured on.

    python -m lensc.bench.checkpoint -o build/full [--size full|mid|wide|small] [--seed 1]

`full` has the published model's 741 tensors and 8,537,092,336 parameters in 7 shards of exactly the published sizes,
17.1 GB of float16. `mid`, about 430 MB, is for tests of peak memory: the true vision width, a narrower decoder. `wide`,
1.1 GB, is for tests of what depends on the size of a layer: true widths everywhere, two decoder layers, one vision layer.
`small`, 5 MB, is for tests of everything else.

Every weight is drawn on its own: 16 random bits choose one of 65,536 quantiles of a normal distribution from a table.
That takes about 1 ns, and no two rows are related, as they would be if one block of random numbers were used again and
again: matrices have full rank, and no quantizer or engine finds a pattern that true weights do not have. The widths of
the distributions keep activations of the order of 1 through all layers, and let logits spread by about 2.5.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import sys
import time
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np

from lensc.backends.base import Array
from lensc.backends.errors import LensError, StorageError, UsageError
from lensc.export.memory import peak_bytes, shown

from .vocabulary import ADDED, write_tokenizer

PARTIAL = ".partial"
MARGIN_BYTES = 64 << 20
"""For the tokenizer and what a file system keeps for itself."""

PIECE = 4 << 20
"""Weights that one thread draws at a time."""
TABLE_STEP = 1 << 16
"""Weights that are looked up at a time: the indices, widened to 8 bytes, stay in the second-level cache."""
THREADS = 2

EMBEDDING_STD = 0.5
"""With it the layers of the decoder add up to about as much as the embedding they start from."""
LOGIT_STD = 2.5
SCORE_GAIN = math.sqrt(2.0)
"""Of queries and keys: attention scores spread by 2, so that some keys matter more than others."""


@dataclass(frozen=True)
class Size:
    """What is changed of the published configuration, and how many bytes a shard holds at most, counted in float32."""

    config: Mapping[str, Any]
    vision: Mapping[str, Any]
    shard_bytes: int


SIZES = {
    "full": Size({}, {}, 5_000_000_000),
    "mid": Size(
        {
            "hidden_size": 1024,
            "intermediate_size": 3584,
            "num_hidden_layers": 8,
            "num_attention_heads": 8,
            "num_key_value_heads": 2,
            "vocab_size": 32768,
        },
        {"num_hidden_layers": 2},
        200_000_000,
    ),
    "wide": Size({"num_hidden_layers": 2, "vocab_size": 4096}, {"num_hidden_layers": 1}, 5_000_000_000),
    "small": Size(
        {
            "hidden_size": 256,
            "intermediate_size": 528,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "vocab_size": 1280,
        },
        {"hidden_size": 64, "intermediate_size": 172, "num_attention_heads": 4, "num_hidden_layers": 3},
        4_000_000,
    ),
}
"""`small` has rows of 528 and 172 on purpose: no group of 32 or 128 divides them."""


def config_json(size: Size) -> dict[str, Any]:
    """The published config.json with the changes of `size`."""
    config = {
        "_name_or_path": "lensc/random",
        "version": "2.5",
        "architectures": ["MiniCPMV"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "batch_vision_input": True,
        "drop_vision_last_layer": False,
        "hidden_act": "silu",
        "hidden_size": 4096,
        "image_size": 448,
        "initializer_range": 0.02,
        "intermediate_size": 14336,
        "max_position_embeddings": 8192,
        "mm_use_im_start_end": True,
        "model_type": "minicpmv",
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": 8,
        "patch_size": 14,
        "pretraining_tp": 1,
        "query_num": 96,
        "rms_norm_eps": 1e-05,
        "rope_scaling": None,
        "rope_theta": 500000.0,
        "slice_config": {"max_slice_nums": 9, "patch_size": 14, "model_type": "minicpmv"},
        "slice_mode": True,
        "tie_word_embeddings": False,
        "torch_dtype": "float16",
        "transformers_version": "4.40.0",
        "use_cache": False,
        "vocab_size": 128256,
    }
    vision = {
        "hidden_size": 1152,
        "image_size": 980,
        "intermediate_size": 4304,
        "model_type": "idefics2",
        "num_attention_heads": 16,
        "num_hidden_layers": 27,
        "patch_size": 14,
    }
    config |= dict(size.config)
    first_added = int(str(config["vocab_size"])) - ADDED
    special = {"bos_token_id": first_added, "eos_token_id": first_added + 1}
    return {**config, **special, "vision_config": vision | dict(size.vision)}


PREPROCESSOR = {
    "image_processor_type": "MiniCPMVImageProcessor",
    "processor_class": "MiniCPMVProcessor",
    "max_slice_nums": 9,
    "scale_resolution": 448,
    "patch_size": 14,
    "image_feature_size": 96,
    "im_start": "<image>",
    "im_end": "</image>",
    "slice_start": "<slice>",
    "slice_end": "</slice>",
    "unk": "<unk>",
    "norm_mean": [0.5, 0.5, 0.5],
    "norm_std": [0.5, 0.5, 0.5],
    "version": 2.5,
}


# --- layout -------------------------------------------------------------------------------------------------------

Shapes = dict[str, tuple[int, ...]]


def shapes(size: Size) -> Shapes:
    """Every tensor's shape, in the order of the published state dict: decoder, vision tower, resampler."""
    import torch

    from lensc.export.models.config import ModelConfig
    from lensc.export.models.minicpmv import MiniCPMV

    with torch.device("meta"):
        state = MiniCPMV(ModelConfig.from_json(config_json(size))).state_dict()
    parts = ("llm", "vpm", "resampler")
    return {n: tuple(state[n].shape) for n in sorted(state, key=lambda n: parts.index(n.partition(".")[0]))}


def shards(tensors: Shapes, limit: int) -> list[Shapes]:
    """`tensors` in their order, cut before the one with which a shard would exceed `limit` bytes of float32.

    That is how the published shards were cut, although they hold float16.
    """
    result: list[Shapes] = [{}]
    used = 0
    for name, shape in tensors.items():
        nbytes = 4 * math.prod(shape)
        if used + nbytes > limit and result[-1]:
            result.append({})
            used = 0
        result[-1][name] = shape
        used += nbytes
    return result


def header(tensors: Shapes) -> tuple[bytes, int]:
    """The bytes in front of the data of a float16 safetensors file, and the length of the whole file."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in sorted(tensors):
        begin, end = end, end + 2 * math.prod(tensors[name])
        entries[name] = {"dtype": "F16", "shape": list(tensors[name]), "data_offsets": [begin, end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, 8 + len(text) + end


# --- weights ------------------------------------------------------------------------------------------------------


def distribution(name: str, shape: tuple[int, ...], layers: Mapping[str, int]) -> tuple[float, float]:
    """Mean and standard deviation of the tensor `name`; `layers` has the depth of `llm` and `vpm`.

    A linear layer that is fed values of deviation 1 gives such values; the outputs that are added to the residual
    stream are smaller by √(2 · layers), so that all of them together add a variance of the order of 1.
    """
    parts = name.split(".")
    part, module, kind = parts[0], parts[-2], parts[-1]
    if kind.endswith("bias"):
        return 0.0, 0.02
    if len(shape) == 1:
        return 1.0, 0.1
    if module == "position_embedding":
        return 0.0, 0.5
    if module == "embed_tokens":
        return 0.0, EMBEDDING_STD
    if name == "resampler.query":
        return 0.0, 1.0
    inputs = math.prod(shape[1:])
    gain = 1.0
    if module == "lm_head":
        gain = LOGIT_STD
    elif name == "resampler.proj":  # its output takes the place of embeddings
        gain = EMBEDDING_STD
    elif module in ("q_proj", "k_proj"):
        gain = SCORE_GAIN
    elif module in ("o_proj", "down_proj", "fc2") or (module == "out_proj" and part == "vpm"):
        gain = 1 / math.sqrt(2 * layers[part])
    return 0.0, gain / math.sqrt(inputs)


@cache
def quantiles() -> Array:
    """float64[65536]: the middles of as many equally likely parts of the normal distribution, up to ±4.3."""
    normal = NormalDist()
    upper = np.array([normal.inv_cdf((i + 0.5) / 65536) for i in range(32768, 65536)])
    return np.concatenate([-upper[::-1], upper])


def pieces(name: str, count: int, mean: float, std: float, seed: int) -> Iterator[Callable[[], Array]]:
    """Functions that draw `count` weights of the tensor `name` in float16, `PIECE` at a time, in any order."""
    table = (mean + std * quantiles()).astype(np.float16)
    for number, start in enumerate(range(0, count, PIECE)):
        entropy = (seed, zlib.crc32(name.encode()), number)
        yield partial(_draw, table, entropy, min(PIECE, count - start))


def _draw(table: Array, entropy: tuple[int, ...], count: int) -> Array:
    bits = np.random.SFC64(np.random.SeedSequence(entropy)).random_raw(-(-count // 4)).astype("<u8", copy=False)
    indices = bits.view("<u2")[:count]
    drawn = np.empty(count, np.float16)
    for start in range(0, count, TABLE_STEP):
        step = slice(start, start + TABLE_STEP)
        np.take(table, indices[step], out=drawn[step], mode="clip")  # any other mode makes a copy of `out`
    return drawn


# --- files --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Written:
    """What `write_checkpoint` has written; `nbytes` are those of the weights."""

    tensors: int
    parameters: int
    shards: int
    nbytes: int


def write_checkpoint(
    out: Path, size: str = "small", seed: int = 1, report: Callable[[str], None] = lambda line: None
) -> Written:
    """Write the checkpoint `size` of `SIZES` to the folder `out`, which is complete afterwards or not there.

    Same bytes from the same seed on every machine. Raises UsageError if there is something at `out`, StorageError if
    the disk is too small or cannot be written.
    """
    if not out.name:
        raise UsageError(f"{out}: cannot be the output folder, give a path to a new folder")
    chosen = SIZES[size]
    tensors = shapes(chosen)
    parts = shards(tensors, chosen.shard_bytes)
    nbytes = sum(header(part)[1] for part in parts)
    partial_folder = out.with_name(out.name + PARTIAL)
    _check_output(out, partial_folder)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(out.parent).free
        if nbytes + MARGIN_BYTES > free:
            raise StorageError(
                f"{out}: about {_shown(nbytes + MARGIN_BYTES)} are needed, {_shown(free)} are free; "
                "free some space or choose another output folder"
            )
        partial_folder.mkdir()
        try:
            _write_all(partial_folder, chosen, parts, seed, report)
            with suppress(FileNotFoundError):
                out.rmdir()
            partial_folder.rename(out)
        except BaseException:
            shutil.rmtree(partial_folder, ignore_errors=True)
            raise
    except OSError as error:
        raise StorageError(f"{error.filename or out}: cannot be written: {error.strerror or error}") from error
    return Written(len(tensors), sum(map(math.prod, tensors.values())), len(parts), nbytes)


def _check_output(out: Path, partial_folder: Path) -> None:
    if os.path.lexists(out) and not (out.is_dir() and not any(out.iterdir())):
        found = "is not empty" if out.is_dir() else "is not a folder"
        raise UsageError(f"{out}: exists and {found}; choose another output folder or remove it")
    if os.path.lexists(partial_folder):
        raise UsageError(f"{partial_folder}: is being written, or was left by a run that was killed; remove it")


def _write_all(folder: Path, size: Size, parts: list[Shapes], seed: int, report: Callable[[str], None]) -> None:
    config = config_json(size)
    layers = {"llm": config["num_hidden_layers"], "vpm": config["vision_config"]["num_hidden_layers"]}
    weight_map: dict[str, str] = {}
    for number, part in enumerate(parts, 1):
        name = f"model-{number:05}-of-{len(parts):05}.safetensors"
        started = time.perf_counter()
        _write_shard(folder / name, part, layers, seed)
        weight_map |= dict.fromkeys(part, name)
        nbytes = (folder / name).stat().st_size
        report(f"{name}: {len(part)} tensors, {_shown(nbytes)}, {time.perf_counter() - started:.1f} s")
    # The published index counts float32 bytes, too.
    total = sum(4 * math.prod(shape) for part in parts for shape in part.values())
    special = {key: config[key] for key in ("bos_token_id", "eos_token_id")}
    generation = {"_from_model_config": True, **special, "transformers_version": "4.40.0"}
    for name, data in (
        ("config.json", config),
        ("generation_config.json", generation),
        ("preprocessor_config.json", PREPROCESSOR),
        ("model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map}),
    ):
        (folder / name).write_text(json.dumps(data, indent=2, sort_keys=name.startswith("model")) + "\n")
    write_tokenizer(folder, config["vocab_size"])


def _write_shard(path: Path, tensors: Shapes, layers: Mapping[str, int], seed: int) -> None:
    """Write one shard. Weights are drawn by `THREADS` threads, few pieces ahead of what is being written."""
    jobs = (
        piece
        for name in sorted(tensors)
        for piece in pieces(name, math.prod(tensors[name]), *distribution(name, tensors[name], layers), seed)
    )
    drawing: deque[Future[Array]] = deque()
    with open(path, "wb", buffering=0) as file, ThreadPoolExecutor(THREADS) as pool:
        _write(file, header(tensors)[0])
        for job in jobs:
            drawing.append(pool.submit(job))
            if len(drawing) > 2 * THREADS:
                _write(file, drawing.popleft().result().data)
        while drawing:
            _write(file, drawing.popleft().result().data)


def _write(file: Any, data: bytes | memoryview) -> None:
    """Write all of `data` to an unbuffered file, whose `write` may take only a part."""
    view = memoryview(data).cast("B")
    while view:
        view = view[file.write(view) :]


def _shown(nbytes: int) -> str:
    return f"{nbytes / 1e9:.2f} GB" if nbytes >= 1e9 else f"{nbytes / 1e6:.2f} MB"


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line and write the checkpoint; errors are one line."""
    parser = argparse.ArgumentParser(prog="python -m lensc.bench.checkpoint", description=str(__doc__).split("\n")[0])
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="FOLDER", help="a new folder")
    parser.add_argument("--size", choices=tuple(SIZES), default="full", help="default full: 17.1 GB")
    parser.add_argument("--seed", type=int, default=1, help="0 to 4294967295 (default 1)")
    options = parser.parse_args(arguments)
    if not 0 <= options.seed < 1 << 32:
        parser.error(f"--seed {options.seed}: expected 0 to {(1 << 32) - 1}")
    started = time.perf_counter()
    try:
        written = write_checkpoint(
            options.output, options.size, options.seed, lambda line: print(line, file=sys.stderr, flush=True)
        )
    except LensError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(
        f"{options.output}: {written.tensors} tensors, {written.parameters:,} parameters, {_shown(written.nbytes)} in "
        f"{written.shards} shards; {time.perf_counter() - started:.0f} s, peak memory {shown(peak_bytes())}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
