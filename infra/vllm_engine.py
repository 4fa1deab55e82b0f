"""vLLM inside each training process: an `Engine` on the trainer's device.

Weights go from the policy into vLLM one at a time, with no file in between. On a GPU the engine
sleeps while the policy is updated: `sleep` frees its weights and KV cache; the next `sync` takes
the new weights, then allocates the cache again.
"""

import os
from collections.abc import Iterable, Sequence
from functools import partial
from types import SimpleNamespace

import numpy as np
from accelerate import Accelerator
from torch import Tensor

from rollout import Engine, Response, SamplingParams, make_responses, request_seed


def vllm_engine(config: SimpleNamespace, accelerator: Accelerator, tokenizer,
                stop_ids: list[int]) -> Engine:
    """An `Engine` backed by vLLM in this process, without weights until its first `sync`.

    Raises ValueError if vLLM does not start.
    """
    llm = start_vllm(config, accelerator)
    can_sleep, asleep = accelerator.device.type != "cpu", False

    def sync(weights: Iterable[tuple[str, Tensor]]) -> None:
        nonlocal asleep
        if asleep:
            llm.wake_up(tags=["weights"])
        llm.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})
        if asleep:
            llm.wake_up(tags=["kv_cache"])
        asleep = False
        if not llm.reset_prefix_cache():  # its entries are of the old weights
            raise RuntimeError("vLLM did not empty its prefix cache")

    def sleep() -> None:
        nonlocal asleep
        if can_sleep and not asleep:
            llm.sleep(level=2)  # 2: drop the weights instead of copying them to the CPU
            asleep = True

    return Engine(generate=partial(generate_in_process, llm, tokenizer, stop_ids), sync=sync,
                  sleep=sleep, close=llm.llm_engine.engine_core.shutdown, has_own_weights=True)


def start_vllm(config: SimpleNamespace, accelerator: Accelerator):
    """A `vllm.LLM` with random weights. Raises ValueError if it does not start."""
    os.environ.update(VLLM_ENABLE_V1_MULTIPROCESSING="0",  # in this process
                      VLLM_CPU_OMP_THREADS_BIND="nobind", VLLM_NO_USAGE_STATS="1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    from vllm import LLM  # reads the environment when it is imported
    rollout = config.rollout
    max_len = config.data.max_prompt_length + config.data.max_response_length
    if accelerator.device.type == "cpu":  # where chunked prefill fails with seeds
        options = {"enforce_eager": True, "enable_chunked_prefill": False,
                   "max_num_batched_tokens": max(8192, max_len),
                   "kv_cache_memory_bytes": 2**29}
    else:
        options = {"enable_sleep_mode": True,
                   "gpu_memory_utilization": rollout.gpu_memory_utilization}
    if accelerator.num_processes > 1:
        options["distributed_executor_backend"] = "external_launcher"
    dtype = "bfloat16" if config.mixed_precision == "bf16" else config.model.dtype
    try:
        return LLM(config.model.path, dtype=dtype, seed=config.seed, max_model_len=max_len,
                   max_num_seqs=rollout.max_num_seqs, load_format="dummy", generation_config="vllm",
                   tensor_parallel_size=rollout.tensor_parallel_size, skip_tokenizer_init=True,
                   enable_prefix_caching=True, logprobs_mode="processed_logprobs",
                   disable_log_stats=True, **options)
    except Exception as error:  # of vLLM or of any library below it
        raise ValueError(f"rollout.backend: vLLM does not start: {error} "
                         "(VLLM_LOGGING_LEVEL=INFO shows its log)") from error


def generate_in_process(llm, tokenizer, stop_ids: list[int], prompts: Sequence[list[int]],
                        seeds: Sequence[tuple[int, ...]], params: SamplingParams,
                        progress: str = "") -> list[list[Response]]:
    """`params.n` responses to each prompt; `progress` is unused."""
    import vllm
    copies = params.n if params.temperature == 0 else 1  # greedy: vLLM only allows one sample
    samples = params.n // copies
    shared = {**params._asdict(), "n": samples, "logprobs": 0, "stop_token_ids": stop_ids,
              "output_kind": vllm.sampling_params.RequestOutputKind.FINAL_ONLY}
    requests = [vllm.SamplingParams(**shared, detokenize=False, seed=request_seed(seed))
                for seed in seeds]
    results = llm.generate([{"prompt_token_ids": ids} for ids in prompts], requests, use_tqdm=False)
    outputs = [output for result in results for output in result.outputs]
    flat = make_responses(tokenizer, [read_output(output) for output in outputs])
    return [flat[i:i + samples] * copies for i in range(0, len(flat), samples)]


def read_output(output) -> tuple[np.ndarray, np.ndarray, bool]:
    """Token ids (T,) int32, their log-probs (T,) float32, and whether the last id is an EOS."""
    ids = np.array(output.token_ids, dtype=np.int32)
    pairs = zip(output.logprobs, output.token_ids, strict=True)
    logprobs = [at[token].logprob for at, token in pairs]
    return ids, np.array(logprobs, dtype=np.float32), output.finish_reason == "stop"
