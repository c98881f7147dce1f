"""Run llama.cpp as a worker of speed.py, through llama-cpp-python's low-level API.

Configuration: `model` (a GGUF file), `ctx_size`, `cache` (fp16, q8 or q4: float16, q8_0 and
q4_0), `threads`, `flash_attention`, `requests`. Steps are timed as llama-bench does: `llama_decode`
and waiting for it, with no sampler.
"""

from __future__ import annotations

import ctypes
import re
import struct
import time

import llama_cpp as lib
import numpy as np

from benchmarks.cpu.worker import BATCH_PROMPT, FILL_TOKENS, random_ids, serve

CACHE_TYPES = {"fp16": lib.GGML_TYPE_F16, "q8": lib.GGML_TYPE_Q8_0, "q4": lib.GGML_TYPE_Q4_0}
# enum llama_flash_attn_type.
FLASH_ATTENTION = {False: 0, True: 1}
SEQUENCE, FILL_SEQUENCE = 0, 1
LOG_ERROR = 4
# What llama.cpp says of an instruction set that it was built for.
INSTRUCTION_SETS = re.compile(r"\b((?:AVX|AMX|NEON|SVE)\w*) = 1")
# A sequence's state: magic, sequence, streams, cells (32 bits each), then position, number of
# sequences and sequence of every cell, then keys and values.
STATE_HEADER_BYTES, CELL_BYTES = 16, 12


@lib.llama_log_callback
def log_errors(level, text, _):
    if level == LOG_ERROR:
        print(text.decode(), end="", flush=True)


class Engine:
    """A loaded model whose sequence 0 is set to the requested depth."""

    version = f"llama-cpp-python {lib.__version__}"
    build = ", ".join(sorted(set(INSTRUCTION_SETS.findall(lib.llama_print_system_info().decode()))))
    load_tasks: dict[str, float] = {}

    def __init__(self, config: dict):
        lib.llama_log_set(log_errors, ctypes.c_void_p())
        lib.llama_backend_init()
        self.model = lib.llama_model_load_from_file(
            config["model"].encode(), lib.llama_model_default_params()
        )
        if not self.model:
            raise SystemExit(f"llama.cpp does not load {config['model']}")
        p = lib.llama_context_default_params()
        p.n_ctx, p.n_batch, p.n_ubatch = config["ctx_size"], 2048, 512
        p.n_threads = p.n_threads_batch = config["threads"]
        p.type_k = p.type_v = CACHE_TYPES[config["cache"]]
        p.flash_attn_type = FLASH_ATTENTION[config["flash_attention"]]
        self.requests: int = config["requests"]
        # A second sequence shares the cells; the cache is filled through it.
        p.n_seq_max, p.kv_unified = max(2, self.requests), True
        self.context = lib.llama_init_from_model(self.model, p)
        if not self.context:
            raise SystemExit(f"llama.cpp makes no context with {config}")
        self.memory = lib.llama_get_memory(self.context)
        self.vocab_size = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(self.model))
        self.entries = lib.llama_batch_init(p.n_batch, 0, 1)
        self.filled = 0

    def decode(self, depth: int, count: int) -> float:
        self._move_to(depth)
        ids = random_ids(count + 1, self.vocab_size)
        self._run(ids[:1], depth)
        start = time.perf_counter()
        for i, token in enumerate(ids[1:], depth + 1):
            self._run([token], i)
        return time.perf_counter() - start

    def prefill(self, depth: int, count: int) -> float:
        self._move_to(depth)
        ids = random_ids(count, self.vocab_size)
        start = time.perf_counter()
        self._run(ids, depth)
        return time.perf_counter() - start

    def first_token(self, count: int) -> float:
        self._move_to(0)
        ids = random_ids(count, self.vocab_size)
        start = time.perf_counter()
        self._run(ids, 0)
        self._last_row().argmax()
        return time.perf_counter() - start

    def logits(self, ids: list[int]) -> list[float]:
        self._move_to(0)
        self._run(ids, 0)
        row: list[float] = self._last_row().tolist()
        return row

    def batch(self, count: int) -> float:
        """Decode all sequences by one `llama_decode` a token, as llama-server does."""
        lib.llama_memory_clear(self.memory, False)
        self.filled = 0
        everyone = range(self.requests)
        for sequence in everyone:
            self._run(random_ids(BATCH_PROMPT, self.vocab_size), 0, sequence)
        tokens = random_ids(self.requests, self.vocab_size)
        start = time.perf_counter()
        for position in range(BATCH_PROMPT, BATCH_PROMPT + count):
            for i in everyone:
                self._put(i, tokens[i], position, i, True)
            self._compute(self.requests)
            tokens = [int(self._row(i).argmax()) for i in everyone]
        return time.perf_counter() - start

    def _last_row(self) -> np.ndarray:
        return self._row(-1)

    def _row(self, index: int) -> np.ndarray:
        row = lib.llama_get_logits_ith(self.context, index)
        return np.ctypeslib.as_array(row, shape=(self.vocab_size,))

    def _run(self, ids: list[int], position: int, sequence: int = SEQUENCE) -> None:
        for i, token in enumerate(ids):
            self._put(i, token, position + i, sequence, i == len(ids) - 1)
        self._compute(len(ids))

    def _put(self, index: int, token: int, position: int, sequence: int, logits: bool) -> None:
        """Set an entry of the batch."""
        batch = self.entries
        batch.token[index] = token
        batch.pos[index] = position
        batch.n_seq_id[index] = 1
        batch.seq_id[index][0] = sequence
        batch.logits[index] = logits

    def _compute(self, count: int) -> None:
        """Run the first `count` entries of the batch and wait until they are computed."""
        batch = self.entries
        batch.n_tokens = count
        status = lib.llama_decode(self.context, batch)
        if status:
            raise SystemExit(f"llama_decode: {status}")
        lib.llama_synchronize(self.context)

    def _move_to(self, depth: int) -> None:
        """Set the sequence to `depth` tokens: drop those after it, or fill in missing ones."""
        if depth > self.filled:
            self._fill(depth)
        if not lib.llama_memory_seq_rm(self.memory, SEQUENCE, depth, -1):
            raise SystemExit(f"llama.cpp does not cut its cache at {depth}")
        self.filled = depth
        last = lib.llama_memory_seq_pos_max(self.memory, SEQUENCE)
        assert last == depth - 1, (last, depth)

    def _fill(self, depth: int) -> None:
        """Compute FILL_TOKENS tokens and fill the cache with consecutive copies of their state.

        Computing them all would take llama.cpp half an hour with a quantised cache.
        """
        lib.llama_memory_clear(self.memory, False)
        self._run(random_ids(FILL_TOKENS, self.vocab_size, seed=0), 0)
        size = lib.llama_state_seq_get_size(self.context, SEQUENCE)
        state = (ctypes.c_uint8 * size)()
        if lib.llama_state_seq_get_data(self.context, state, size, SEQUENCE) != size:
            raise SystemExit("llama.cpp does not give its state")
        for first in range(FILL_TOKENS, depth, FILL_TOKENS):
            for i in range(FILL_TOKENS):
                offset = STATE_HEADER_BYTES + i * CELL_BYTES
                struct.pack_into("<i", state, offset, first + i)
            if lib.llama_state_seq_set_data(self.context, state, size, FILL_SEQUENCE) != size:
                raise SystemExit("llama.cpp does not take a state at another position")
            lib.llama_memory_seq_cp(self.memory, FILL_SEQUENCE, SEQUENCE, 0, -1)
            lib.llama_memory_seq_rm(self.memory, FILL_SEQUENCE, -1, -1)


if __name__ == "__main__":
    serve(Engine)
