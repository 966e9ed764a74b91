"""vLLM, unmodified, its offline API: load a model, continue the prompts, let go of it.

With VLLM_ENABLE_V1_MULTIPROCESSING=0 the engine runs in this process, so that a load costs seconds; tensor-parallel
ranks are processes of their own.
"""

from __future__ import annotations

from typing import Any

from tests.engines.models import PROMPTS
from tests.engines.process import answer


def generate(folder: str, **options: Any) -> list[dict[str, Any]]:
    """Per prompt: the tokens, and the log probability of each."""
    from vllm import LLM, SamplingParams

    llm = LLM(
        folder, enforce_eager=True, max_model_len=128, max_num_seqs=4, dtype="float32", seed=0, **options
    )
    sampling = SamplingParams(temperature=0, max_tokens=12, logprobs=1, ignore_eos=True)
    found = []
    for request in llm.generate(list(PROMPTS), sampling, use_tqdm=False):
        output = request.outputs[0]
        pairs = zip(output.token_ids, output.logprobs or (), strict=True)
        chances = [round(told[token].logprob, 6) for token, told in pairs]
        found.append({"tokens": list(output.token_ids), "logprobs": chances})
    return found


if __name__ == "__main__":
    answer({"generate": generate})
