"""llama.cpp's decode rate by number of rows, for benchmarks/cpu.py: python llama_rows.py FILE.gguf STEPS THREADS"""

import ctypes
import json
import sys
import time

import llama_cpp

PROMPT = 60


def fill(batch, entries):
    """entries: (token, position, sequence, whether to compute its logits)."""
    batch.n_tokens = len(entries)
    for i, (token, position, sequence, wanted) in enumerate(entries):
        batch.token[i], batch.pos[i], batch.n_seq_id[i] = token, position, 1
        batch.seq_id[i][0], batch.logits[i] = sequence, wanted


def main(path, steps, threads):
    llama_cpp.llama_backend_init()
    llama_cpp.llama_log_set(silent, ctypes.c_void_p(0))
    model = llama_cpp.llama_model_load_from_file(path.encode(), llama_cpp.llama_model_default_params())
    params = llama_cpp.llama_context_default_params()
    params.n_ctx, params.n_batch, params.n_ubatch, params.n_seq_max = 16 * 512, 1024, 1024, 16
    params.n_threads = params.n_threads_batch = threads
    rates = {}
    for rows in (1, 2, 8, 16):
        context = llama_cpp.llama_init_from_model(model, params)
        batch = llama_cpp.llama_batch_init(1024, 0, 1)
        for row in range(rows):
            fill(batch, [(100 + i, i, row, i == PROMPT - 1) for i in range(PROMPT)])
            assert llama_cpp.llama_decode(context, batch) == 0
        started = time.perf_counter()
        for step in range(steps):
            fill(batch, [(200 + row, PROMPT + step, row, True) for row in range(rows)])
            assert llama_cpp.llama_decode(context, batch) == 0
            llama_cpp.llama_get_logits(context)
        rates[rows] = rows * steps / (time.perf_counter() - started)
        llama_cpp.llama_batch_free(batch)
        llama_cpp.llama_free(context)
    print(json.dumps(rates))


@llama_cpp.llama_log_callback
def silent(*_):
    pass


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
