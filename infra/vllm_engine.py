"""How does vLLM write responses? Its engine in each training process, on the same device, with the policy's weights.

On CUDA the engine sleeps while the policy is updated: `rest` gives up its weights and cache, `sync` takes new
weights in first, and makes room for the cache then. No file lies in between.
"""

import os
from collections.abc import Iterable
from functools import partial
from types import SimpleNamespace

import numpy as np
from accelerate import Accelerator
from torch import Tensor

from rollout import Engine, Response, make_responses, request_seed

CPU_CACHE = 2**29  # bytes of KV cache where there is no GPU memory to take a share of


def start_vllm(config: SimpleNamespace, accelerator: Accelerator):
    """A vLLM engine with no weights yet, in this process. Raises ValueError where it cannot start."""
    os.environ.update(VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_CPU_OMP_THREADS_BIND="nobind", VLLM_NO_USAGE_STATS="1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    from vllm import LLM
    rollout, longest = config.rollout, config.data.max_prompt_length + config.data.max_response_length
    on_cpu = accelerator.device.type == "cpu"
    device = {"enforce_eager": True, "enable_chunked_prefill": False, "kv_cache_memory_bytes": CPU_CACHE,
              "max_num_batched_tokens": max(8192, longest)} if on_cpu else {
              "enable_sleep_mode": True, "gpu_memory_utilization": rollout.gpu_memory_utilization}
    if accelerator.num_processes > 1:
        device["distributed_executor_backend"] = "external_launcher"
    try:
        return LLM(config.model.path, dtype="bfloat16" if config.mixed_precision == "bf16" else config.model.dtype,
                   load_format="dummy", skip_tokenizer_init=True, generation_config="vllm", seed=config.seed,
                   max_model_len=longest, max_num_seqs=rollout.max_num_seqs, enable_prefix_caching=True,
                   tensor_parallel_size=rollout.tensor_parallel_size, logprobs_mode="processed_logprobs",
                   disable_log_stats=True, **device)
    except Exception as error:  # its own and those of its parts
        raise ValueError(f"rollout.backend: vLLM does not start: {error}") from error


def vllm_engine(config: SimpleNamespace, accelerator: Accelerator, tokenizer, stop_ids: list[int]) -> Engine:
    """vLLM in this process, as an `Engine`."""
    llm, sleeps, asleep = start_vllm(config, accelerator), accelerator.device.type != "cpu", False

    def sync(weights: Iterable[tuple[str, Tensor]]) -> None:
        nonlocal asleep
        if asleep:
            llm.wake_up(tags=["weights"])
        llm.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})
        if asleep:
            llm.wake_up(tags=["kv_cache"])
        asleep = False
        if not llm.reset_prefix_cache():
            raise RuntimeError("vLLM did not empty its prefix cache")

    def rest() -> None:
        nonlocal asleep
        if sleeps and not asleep:
            llm.sleep(level=2)
            asleep = True
    return Engine(partial(write_responses, llm, tokenizer, stop_ids), sync, rest,
                  close=llm.llm_engine.engine_core.shutdown, apart=True)


def write_responses(llm, tokenizer, stop_ids: list[int], prompts, seeds, n: int, max_tokens: int, temperature: float,
                    top_p: float, progress: str = "") -> list[list[Response]]:
    """`n` responses to each prompt."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind
    copies = n if temperature == 0 else 1  # greedy ones are all the same, and vLLM wants to write but one
    settings = [SamplingParams(n=n // copies, seed=request_seed(seed), temperature=temperature, top_p=top_p,
                               max_tokens=max_tokens, logprobs=0, stop_token_ids=stop_ids, detokenize=False,
                               output_kind=RequestOutputKind.FINAL_ONLY) for seed in seeds]
    outputs = llm.generate([{"prompt_token_ids": ids} for ids in prompts], settings, use_tqdm=False)
    responses = iter(make_responses(tokenizer, [read_output(output) for result in outputs for output in result.outputs]))
    return [[next(responses) for _ in result.outputs] * copies for result in outputs]


def read_output(output) -> tuple[np.ndarray, np.ndarray, bool]:
    """Token ids, their log-probs, and whether it ended by itself, of what vLLM wrote."""
    ids = np.array(output.token_ids, dtype=np.int32)
    logprobs = [at[token].logprob for at, token in zip(output.logprobs, output.token_ids, strict=True)]
    return ids, np.array(logprobs, dtype=np.float32), output.finish_reason == "stop"
