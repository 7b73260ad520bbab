"""vLLM's CPU rate by number of plain streams, for benchmarks/cpu.py: python vllm_rows.py MODEL_DIRECTORY STEPS"""

import json
import sys
import time

from vllm import LLM, SamplingParams, TokensPrompt

PROMPT = 60


def seconds(llm, streams, num_tokens):
    prompts = [TokensPrompt(prompt_token_ids=[200 + stream, *range(100, 99 + PROMPT)]) for stream in range(streams)]
    params = SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True, detokenize=False)
    started = time.perf_counter()
    llm.generate(prompts, params, use_tqdm=False)
    return time.perf_counter() - started


def main(model, steps):
    llm = LLM(model=model, dtype="bfloat16", max_model_len=1024, max_num_seqs=16, disable_log_stats=True)
    rates = {}
    for streams in (1, 8, 16):
        seconds(llm, streams, 4)
        rates[streams] = streams * steps / (seconds(llm, streams, steps + 1) - seconds(llm, streams, 1))
    print(json.dumps(rates))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
