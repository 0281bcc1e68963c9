"""llama.cpp: the decoder of a checkpoint at full size, in 3 or 4 bits.

    python llama_cpp_decoder.py build CHECKPOINT OUT [--type Q4_0|Q3_K_M]
    python llama_cpp_decoder.py serve OUT [--threads 2]

Its own tool quantizes a file in which all weights lie in float, 16 GB. So that tool is asked for what it chooses, with a
model of as many layers and as many query heads to a key head, but rows of 256, and the weights of the checkpoint are
quantized to that by the function it calls for it, one tensor after the other. Every layer has values of its own.

`serve` answers the lines that every rival does. Its settings are llama.cpp's defaults: the file is mapped, and weights are
packed into memory beside it where there are faster kernels for that (with AMX all types here but Q3_K); a prompt is computed
in pieces of 512 tokens; the cache is float16.
"""

from __future__ import annotations

import ctypes
import json
import logging
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

INSTALL = (
    "CMAKE_ARGS='-DGGML_NATIVE=ON -DLLAVA_BUILD=OFF' CXXFLAGS='-fno-tree-dse -fno-dse' python -m pip install "
    "--no-cache-dir --no-binary=llama-cpp-python llama-cpp-python==0.3.36 gguf==0.19.0 safetensors==0.8.0"
)
"""As `lensc.bench.full_size` does it."""
TYPES = ("Q4_0", "Q3_K_M")
MODEL = "model.gguf"
PREFIX = "llm."
"""Of the decoder's weights in a checkpoint."""

PATTERN_WIDTH = 256
"""Of the model whose types are asked for: the shortest row that every type of llama.cpp can have."""

PIECE = 1 << 23
"""Values that a thread quantizes at once."""


def require(name: str) -> Any:
    """The module `name`. Ends with a line that says how to install it if it is not there."""
    import importlib

    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise SystemExit(f"error: {error}; install what the rival needs: {INSTALL}") from None


def require_llama_cpp() -> Any:
    """The module `llama_cpp`, silent: it tells all about every model that it loads."""
    module = require("llama_cpp")
    logging.getLogger("llama-cpp-python").setLevel(logging.ERROR)
    return module


# --- making the model ---------------------------------------------------------------------------------------------


def build(checkpoint: Path, out: Path, kind: str) -> None:
    """Write a folder that `serve` opens, its weights as llama.cpp's `kind` of file has them."""
    safe_open = require("safetensors").safe_open
    work = out.with_name(out.name + ".partial")
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    config = json.loads((checkpoint / "config.json").read_text())
    index = json.loads((checkpoint / "model.safetensors.index.json").read_text())["weight_map"]
    heads = config["hidden_size"] // config["num_attention_heads"]

    def values_of(name: str, of: str) -> Any:
        with safe_open(checkpoint / index[PREFIX + of], framework="numpy") as file:
            values = file.get_tensor(PREFIX + of)
        rotated = name.endswith(("attn_q.weight", "attn_k.weight"))
        return values[neighbours(len(values), heads)] if rotated else values

    write(work / MODEL, config, chosen_types(config, kind, work), values_of)
    shutil.rmtree(out, ignore_errors=True)
    work.rename(out)


def tensors_of(config: Mapping[str, Any]) -> dict[str, tuple[str, tuple[int, ...]]]:
    """What llama.cpp calls each tensor of a Llama: what transformers calls it, and its shape, [outputs, inputs]."""
    width, inner, vocabulary = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    keys = width // config["num_attention_heads"] * config["num_key_value_heads"]
    layer: dict[str, tuple[str, tuple[int, ...]]] = {
        "attn_norm": ("input_layernorm", (width,)),
        "attn_q": ("self_attn.q_proj", (width, width)),
        "attn_k": ("self_attn.k_proj", (keys, width)),
        "attn_v": ("self_attn.v_proj", (keys, width)),
        "attn_output": ("self_attn.o_proj", (width, width)),
        "ffn_norm": ("post_attention_layernorm", (width,)),
        "ffn_gate": ("mlp.gate_proj", (inner, width)),
        "ffn_up": ("mlp.up_proj", (inner, width)),
        "ffn_down": ("mlp.down_proj", (width, inner)),
    }
    found: dict[str, tuple[str, tuple[int, ...]]] = {"token_embd": ("model.embed_tokens", (vocabulary, width))}
    for number in range(config["num_hidden_layers"]):
        found |= {f"blk.{number}.{name}": (f"model.layers.{number}.{of}", shape) for name, (of, shape) in layer.items()}
    found |= {"output_norm": ("model.norm", (width,)), "output": ("lm_head", (vocabulary, width))}
    return {f"{name}.weight": (f"{of}.weight", shape) for name, (of, shape) in found.items()}


def neighbours(rows: int, head_dim: int) -> Any:
    """The order of the rows of a projection whose rotated pairs are neighbours, not half a head apart: int64[rows]."""
    return np.arange(rows).reshape(-1, 2, head_dim // 2).swapaxes(1, 2).reshape(-1)


def chosen_types(config: Mapping[str, Any], kind: str, folder: Path) -> dict[str, Any]:
    """The type of every tensor in a file that llama.cpp quantizes to `kind`; `folder` is written to meanwhile."""
    gguf, llama_cpp = require("gguf"), require_llama_cpp()
    shared = config["num_attention_heads"] // config["num_key_value_heads"]
    pattern = dict(config) | {"hidden_size": PATTERN_WIDTH, "intermediate_size": PATTERN_WIDTH}
    pattern |= {"vocab_size": PATTERN_WIDTH, "num_attention_heads": shared, "num_key_value_heads": 1}
    random, source, made = np.random.default_rng(0), folder / "pattern.gguf", folder / f"pattern-{kind}.gguf"
    shapes = {name: shape for name, (_, shape) in tensors_of(pattern).items()}
    floats = gguf.GGMLQuantizationType
    types = {name: floats.F16 if len(shape) == 2 else floats.F32 for name, shape in shapes.items()}
    write(source, pattern, types, lambda name, _: random.normal(size=shapes[name]))
    options = llama_cpp.llama_model_quantize_default_params()
    options.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind}")
    if llama_cpp.llama_model_quantize(os.fsencode(source), os.fsencode(made), options):
        raise SystemExit(f"error: llama.cpp does not make {kind} of a model with {shared} query heads to a key head")
    types = {tensor.name: tensor.tensor_type for tensor in gguf.GGUFReader(made).tensors}
    source.unlink()
    made.unlink()
    return types


def quantized(values: Any, kind: Any) -> Any:
    """`values: float[rows, inputs]`, or a vector, as llama.cpp stores them in the type `kind`: uint8[bytes]."""
    gguf, llama_cpp = require("gguf"), require_llama_cpp()
    floats = {gguf.GGMLQuantizationType.F32: np.float32, gguf.GGMLQuantizationType.F16: np.float16}
    if kind in floats:
        return np.ascontiguousarray(values, floats[kind]).reshape(-1).view(np.uint8)
    # the function is ggml's, which the package has as a library of its own
    (library,) = (Path(llama_cpp.__file__).parent / "lib").glob("libggml-base.so")
    chunk = ctypes.CDLL(str(library)).ggml_quantize_chunk
    chunk.restype = ctypes.c_size_t
    chunk.argtypes = [ctypes.c_int, *2 * [ctypes.c_void_p], *3 * [ctypes.c_int64], ctypes.c_void_p]
    rows, inputs = values.shape
    block, size = gguf.GGML_QUANT_SIZES[kind]
    made = np.empty((rows, inputs // block * size), np.uint8)
    step = max(1, PIECE // inputs)

    def some(begin: int) -> None:
        piece = np.ascontiguousarray(values[begin : begin + step], np.float32)
        target = made[begin : begin + step]
        if chunk(int(kind), piece.ctypes.data, target.ctypes.data, 0, len(piece), inputs, None) != target.nbytes:
            raise SystemExit(f"error: ggml made something else of a row than {inputs // block} blocks of {size} bytes")

    with ThreadPoolExecutor(os.cpu_count()) as threads:
        list(threads.map(some, range(0, rows, step)))
    return made.reshape(-1)


def write(
    path: Path, config: Mapping[str, Any], types: Mapping[str, Any], values_of: Callable[[str, str], Any]
) -> None:
    """Write a Llama without a vocabulary: tokens are numbers here.

    `values_of` takes what llama.cpp and what transformers call a tensor. One is held at a time.
    """
    gguf = require("gguf")
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_rope_dimension_count(config["hidden_size"] // config["num_attention_heads"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("no_vocab")
    for name, (_, shape) in tensors_of(config).items():
        block, size = gguf.GGML_QUANT_SIZES[types[name]]
        if shape[-1] % block:
            raise SystemExit(f"error: {name}: {types[name].name} has blocks of {block}, no rows of {shape[-1]} values")
        writer.add_tensor_info(name, shape, np.dtype(np.float32), math.prod(shape) // block * size, types[name])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    try:
        for name, (of, shape) in tensors_of(config).items():
            values = values_of(name, of)
            if values.shape != shape:
                raise SystemExit(f"error: {of} is {list(values.shape)}, expected {list(shape)}")
            writer.write_tensor_data(quantized(values, types[name]))
    finally:
        writer.close()


# --- answering ----------------------------------------------------------------------------------------------------


def serve(folder: Path, threads: int) -> Iterator[dict[str, Any]]:
    """Answer the lines of stdin."""
    import rival_command

    llama_cpp = require_llama_cpp()
    path, room = folder / MODEL, rival_command.ROOM
    started = time.perf_counter()
    llama_cpp.llama_backend_init()
    model = llama_cpp.llama_model_load_from_file(os.fsencode(path), llama_cpp.llama_model_default_params())
    if not model:
        raise SystemExit(f"error: {path}: llama.cpp does not load it; build it again")
    vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
    context: Any = None
    prompt: list[int] = []
    token = 0

    def begin(tokens: int) -> None:
        """An empty context for a prompt of `tokens` in the place of the last one."""
        nonlocal context, prompt
        if context is not None:
            llama_cpp.llama_free(context)
        options = llama_cpp.llama_context_default_params()
        options.n_ctx = tokens + room
        options.n_batch = max(tokens, options.n_batch)
        options.n_threads = options.n_threads_batch = threads
        context = llama_cpp.llama_init_from_model(model, options)
        if not context:
            raise SystemExit(f"error: {path}: no context of {tokens + room} tokens; is there memory for it?")
        prompt = np.random.default_rng(tokens).integers(0, vocabulary, tokens).tolist()

    def step(ids: Any) -> int:
        """The likeliest token after `ids`, which are appended."""
        array = (llama_cpp.llama_token * len(ids))(*ids)
        if failed := llama_cpp.llama_decode(context, llama_cpp.llama_batch_get_one(array, len(ids))):
            raise SystemExit(f"error: llama_decode of {len(ids)} tokens: {failed}")
        logits = np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(context, -1), (vocabulary,))
        likeliest = int(logits.argmax())
        if not np.isfinite(logits[likeliest]):
            raise SystemExit(f"error: {path}: a logit is {logits[likeliest]}; build it again")
        return likeliest

    def prefill() -> None:
        nonlocal token
        token = step(prompt)

    def decode() -> None:
        nonlocal token
        token = step([token])

    yield from rival_command.decoder_answers(started, begin, prefill, decode)


def main() -> None:
    """Build or serve."""
    import rival_command

    parser, make, _ = rival_command.parsers(__doc__)
    make.add_argument("--type", choices=TYPES, default=TYPES[0], help="default: %(default)s")
    options = parser.parse_args()
    if options.verb == "build":
        build(options.checkpoint, options.out, options.type)
    else:
        rival_command.say(serve(options.out, options.threads))


if __name__ == "__main__":
    main()
