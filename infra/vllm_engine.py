"""vLLM inside each training process: an `Engine` on the trainer's device.

Weights go from the policy into vLLM one at a time, with no file in between. On a GPU the engine
sleeps while the trainer computes: `sleep` frees its weights and KV cache; the next `sync`, or
`generate`, takes the policy's weights, then allocates the cache again.
"""

import math
import os
from collections.abc import Iterable, Sequence
from copy import deepcopy
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from accelerate import Accelerator
from torch import Tensor
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

from data_types import Engine, Response, SamplingParams
from infra.config import compute_dtype, longest_response
from infra.distributed import iter_full_weights
from infra.tokens import make_responses


def vllm_engine(config: SimpleNamespace, accelerator: Accelerator, tokenizer,
                stop_ids: list[int], policy) -> Engine:
    """An `Engine` backed by vLLM in this process, with random weights until its first `sync`.

    Raises ValueError if vLLM does not start, or cannot take the policy's weights.
    """
    os.environ.update(VLLM_ENABLE_V1_MULTIPROCESSING="0",  # in this process
                      VLLM_CPU_OMP_THREADS_BIND="nobind", VLLM_NO_USAGE_STATS="1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    from vllm import LLM  # reads the environment when it is imported
    rollout = config.rollout
    max_len = config.data.max_prompt_length + longest_response(config)
    options = {"enable_sleep_mode": True, "enable_prefix_caching": True,
               "gpu_memory_utilization": rollout.gpu_memory_utilization}
    on_cpu = accelerator.device.type == "cpu"
    if on_cpu:  # where chunked prefill fails with seeds; without it, recurrent states have no cache
        options = {"enforce_eager": True, "enable_chunked_prefill": False,
                   "enable_prefix_caching": not policy._is_stateful,
                   "max_num_batched_tokens": max(8192, max_len), "kv_cache_memory_bytes": 2**29}
    if accelerator.num_processes > 1:
        options["distributed_executor_backend"] = "external_launcher"
    dtype = compute_dtype(config)
    fp32_head = rollout.fp32_head and dtype != "float32"
    try:
        for file in Path("/dev/shm").glob("-tp:*-cpushm_*"):  # left by an earlier run on a CPU:
            file.unlink(missing_ok=True)                      # vLLM would not start
        llm = LLM(config.model.path, dtype=dtype, seed=config.seed, max_model_len=max_len,
                  max_num_seqs=rollout.max_num_seqs, load_format="dummy", generation_config="vllm",
                  tensor_parallel_size=rollout.tensor_parallel_size,
                  skip_tokenizer_init=not rollout.stop,  # it finds stop strings in texts
                  trust_remote_code=config.model.trust_remote_code,
                  hf_overrides=partial(language_config, policy.config, fp32_head),
                  logprobs_mode="processed_logprobs", disable_log_stats=True, **options)
    except Exception as error:  # of vLLM or of any library below it
        if "out of memory" in str(error):
            raise
        raise ValueError(f"rollout.backend: vLLM does not start: {error} "
                         "(VLLM_LOGGING_LEVEL=INFO shows its log)") from error

    def sync(weights: Iterable[tuple[str, Tensor]]) -> None:
        llm.wake_up(tags=["weights"])  # does nothing if it does not sleep
        llm.collective_rpc(reload_weights, args=(weights, on_cpu))
        llm.wake_up(tags=["kv_cache"])
        if not llm.reset_prefix_cache():  # its entries are of the old weights
            raise RuntimeError("vLLM did not empty its prefix cache")

    def sleep() -> None:
        if not on_cpu and not llm.llm_engine.is_sleeping():
            llm.sleep(level=2)  # 2: drop the weights instead of copying them to the CPU

    def generate(llm, *args, **kwargs) -> list[list[Response]]:
        if llm.llm_engine.is_sleeping():  # for passes of the trainer in the middle of a step
            sync(iter_full_weights(policy, tied=True))
        return generate_in_process(llm, tokenizer, stop_ids, *args, **kwargs)

    return Engine(generate=partial(generate, llm), sync=sync, sleep=sleep,
                  close=llm.llm_engine.engine_core.shutdown, has_own_weights=True)


def language_config(policy_config, fp32_head: bool, found):
    """The model's config for vLLM, which has `found` this one. That of a vision-language model
    becomes that of its language part, the policy, so that weights have the same names."""
    if found.model_type != policy_config.model_type:
        found = deepcopy(policy_config)
        found.architectures = [MODEL_FOR_CAUSAL_LM_MAPPING[type(found)].__name__]
    if fp32_head:
        found.head_dtype = "float32"
    return found


def reload_weights(worker, weights: Iterable[tuple[str, Tensor]], on_cpu: bool) -> None:
    """Give the weights to vLLM's worker. Raises ValueError if it does not know one of them, or one
    of its own is not among them."""
    model, loaded = worker.get_model(), set()
    name = f"rollout.backend: {type(model).__name__} of vLLM"

    def load_weights(weights):
        names = type(model).load_weights(model, weights)
        loaded.update(own if names is None else names)
        return names

    own = {name for name, _ in model.named_parameters()}
    for module in model.modules():
        if on_cpu and hasattr(module, "moe_kernel"):  # else vLLM 0.32 does not repack experts
            module.moe_kernel = None
    model.load_weights = load_weights  # vLLM would only log what is missing
    try:
        worker.reload_weights(weights_iterator=weights)
    except (AttributeError, KeyError, ValueError) as error:
        reason = str(error).partition(". The available")[0]
        raise ValueError(f"{name} cannot take the policy's weights: {reason}") from error
    finally:
        del model.load_weights
    if missing := sorted(own - loaded):
        raise ValueError(f"{name} got no value for {len(missing)} of its {len(own)} weights, "
                         f"{', '.join(missing[:3])} among them: the policy has none of that name")


def generate_in_process(llm, tokenizer, stop_ids: list[int], prompts: Sequence[list[int]],
                        seeds: Sequence[tuple[int, ...]], params: SamplingParams,
                        progress: str = "") -> list[list[Response]]:
    """`params.n` responses to each prompt; `progress` is unused. Raises ValueError if it fails."""
    from vllm import SamplingParams as Request
    from vllm.sampling_params import RequestOutputKind
    requests = [Request(**request, output_kind=RequestOutputKind.FINAL_ONLY, flat_logprobs=True,
                        detokenize=bool(params.stop))
                for request in request_params(params, seeds, stop_ids)]
    try:
        results = llm.generate([{"prompt_token_ids": ids} for ids in prompts], requests,
                               use_tqdm=False)
    except (AssertionError, RuntimeError) as error:  # only now it says what it cannot compute
        if "out of memory" in str(error):
            raise
        raise ValueError(f"rollout.backend: vLLM cannot run this model: {error}") from error
    rows = []
    for output in (output for result in results for output in result.outputs):
        ids = np.array(output.token_ids, dtype=np.int32)
        logprobs = output.logprobs and np.array(output.logprobs.logprobs, dtype=np.float32)
        rows.append((ids, logprobs, what_ended(output.finish_reason, output.stop_reason)))
    return group_responses(tokenizer, rows, params)


def request_params(params: SamplingParams, seeds: Sequence[tuple[int, ...]],
                   stop_ids: list[int]) -> list[dict]:
    """vLLM's names and values for each prompt; it allows only one sample if greedy.

    By the seeds, so that a resumed run repeats it, log-probs are asked for some prompts: at least
    one, if any at all, since they show whether this engine has the policy's weights.
    """
    n = params.n if params.temperature > 0 else 1
    chosen = set(sorted(seeds)[:math.ceil(params.logprobs * len(seeds))])
    return [{**params._asdict(), "n": n, "stop": list(params.stop), "stop_token_ids": stop_ids,
             "skip_special_tokens": False,  # in what stop strings are looked for
             "logprobs": 0 if seed in chosen else None,  # 0: of the sampled token alone
             "seed": int(np.random.default_rng(seed).integers(2**62))}  # plus i for response i
            for seed in seeds]


def what_ended(finish_reason: str, stop_reason: int | str | None) -> bool | str:
    """What vLLM says ended a response, as `make_responses` takes it."""
    return finish_reason == "stop" and (stop_reason if isinstance(stop_reason, str) else True)


def group_responses(tokenizer, rows: Sequence[tuple[np.ndarray, np.ndarray | None, bool | str]],
                    params: SamplingParams) -> list[list[Response]]:
    """The `params.n` responses to each prompt, from the rows of `make_responses`."""
    if params.temperature == 0:
        return [group * params.n for group in make_responses(tokenizer, rows, n=1)]
    return make_responses(tokenizer, rows, params.n)
