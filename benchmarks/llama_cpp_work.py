"""llama.cpp's side of the decoding rows: the same weights in bfloat16, the same prompts, most probable tokens.

    .venv-peers/bin/python benchmarks/llama_cpp_work.py '{"gguf": "SmolLM2.gguf", "rows": 64, ...}'

Not part of `make peers`: llama-cpp-python is compiled on the machine (pip install llama-cpp-python==0.3.36 gguf).
It takes the largest logit where ours draws from all 49,152 probabilities, so it does less.
"""

from __future__ import annotations

import ctypes
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import gguf
import llama_cpp as api
import numpy as np
from language_work import memory, timed, token_prompts


def widened(source: Path, target: Path) -> None:
    """The quantized file with its matrices in bfloat16, as our copy of the model holds them."""
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(target, "llama")
    for field in reader.fields.values():
        if field.name.startswith("GGUF.") or field.name == "general.architecture":
            continue
        sub = field.types[1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(field.name, field.contents(), field.types[0], sub_type=sub)
    for tensor in reader.tensors:
        wide = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        if len(tensor.shape) > 1:
            narrow = gguf.quants.quantize(wide, gguf.GGMLQuantizationType.BF16)
            writer.add_tensor(tensor.name, narrow, raw_dtype=gguf.GGMLQuantizationType.BF16)
        else:
            writer.add_tensor(tensor.name, wide.astype(np.float32))
    for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
        write()
    writer.close()


class Decoder:
    """A context of llama.cpp for so many sequences."""

    def __init__(self, path: Path, rows: int, length: int, threads: int) -> None:
        self.model = api.llama_model_load_from_file(str(path).encode(), api.llama_model_default_params())
        options = api.llama_context_default_params()
        options.n_ctx, options.n_seq_max = rows * length, rows
        options.n_batch = options.n_ubatch = 1024
        options.n_threads = options.n_threads_batch = threads
        self.context = api.llama_init_from_model(self.model, options)
        self.vocabulary = api.llama_vocab_n_tokens(api.llama_model_get_vocab(self.model))
        self.batch = api.llama_batch_init(1024, 0, 1)

    def read(self, tokens: list[tuple[int, int, int, bool]]) -> dict[int, int]:
        """Read (token, place, row, last) and give the most probable next token of each row whose last it was."""
        found: dict[int, int] = {}
        for start in range(0, len(tokens), 1024):
            part, b = tokens[start : start + 1024], self.batch
            b.n_tokens = len(part)
            for i, (token, place, row, last) in enumerate(part):
                b.token[i], b.pos[i], b.n_seq_id[i], b.seq_id[i][0], b.logits[i] = token, place, 1, row, last
            if api.llama_decode(self.context, b):
                raise RuntimeError("llama_decode failed")
            for i, (_, _, row, last) in enumerate(part):
                if last:
                    pointer = api.llama_get_logits_ith(self.context, i)
                    found[row] = int(np.ctypeslib.as_array(pointer, (self.vocabulary,)).argmax())
        return found

    def generate(self, prompts: list[list[int]], new_tokens: int) -> None:
        api.llama_memory_clear(api.llama_get_memory(self.context), True)
        said = self.read(
            [(t, i, row, i == len(p) - 1) for row, p in enumerate(prompts) for i, t in enumerate(p)]
        )  # fmt: skip
        for step in range(new_tokens - 1):
            said = self.read([(t, len(prompts[row]) + step, row, True) for row, t in said.items()])


def main() -> None:
    size: dict[str, Any] = json.loads(sys.argv[1])
    api.llama_log_set(QUIET, ctypes.c_void_p())
    prompts = token_prompts(size["rows"], size["prompt"])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.gguf"
        widened(Path(size["gguf"]), path)
        with memory() as used:
            decoder = Decoder(path, size["rows"], size["prompt"] + size["new_tokens"], size["threads"])
            took = timed(lambda: decoder.generate(prompts, size["new_tokens"]), size)
    speed = size["rows"] * size["new_tokens"] / took["seconds"]
    print(json.dumps({**took, **used, "tokens_per_second": speed, "versions": {"llama-cpp-python": api.__version__}}))


QUIET = api.llama_log_callback(lambda level, text, data: None)

if __name__ == "__main__":
    main()
