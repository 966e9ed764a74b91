"""The program that is timed: vLLM loads the model of a folder and generates.

Runs by itself, with any Python that has vLLM. Prints one line, `FIRST TOKEN` and JSON: times of the monotonic clock,
which all processes share, and the tokens.
"""

from __future__ import annotations

import json
import sys
import time


def main(folder: str) -> None:
    """Load the model, generate one token, then a few more to compare."""
    from vllm import LLM, SamplingParams

    imported = time.monotonic()
    engine = LLM(
        model=folder, enforce_eager=True, skip_tokenizer_init=True, max_model_len=256, dtype="bfloat16"
    )
    ready = time.monotonic()
    prompt = [{"prompt_token_ids": [1, 17, 29, 4711]}]
    one = SamplingParams(max_tokens=1, temperature=0, detokenize=False)
    engine.generate(prompt, one, use_tqdm=False)
    token = time.monotonic()
    more = SamplingParams(max_tokens=8, temperature=0, detokenize=False, ignore_eos=True)
    tokens = engine.generate(prompt, more, use_tqdm=False)[0].outputs[0].token_ids
    told = {"imported": imported, "ready": ready, "token": token, "tokens": list(tokens)}
    print("FIRST TOKEN", json.dumps(told), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
