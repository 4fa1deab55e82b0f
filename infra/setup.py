"""Makes a run's parts from its config: processes, models, tokenizer, prompts, engine, optimizer."""

import gc
import logging
import math
import os
from collections.abc import Callable
from contextlib import nullcontext
from copy import deepcopy
from datetime import timedelta
from functools import partial
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from types import SimpleNamespace

import torch
import transformers
from accelerate import Accelerator
from accelerate.utils import (DistributedType, InitProcessGroupKwargs, broadcast_object_list,
                              set_seed)
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from torch.distributed.fsdp import MixedPrecisionPolicy
from tqdm import tqdm
from transformers import (MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoModelForCausalLM,
                          AutoTokenizer, GenerationConfig)
from transformers.initialization import no_init_weights
from transformers.utils import is_flash_attn_2_available

import infra
from data_types import Data, Engine, TrainState
from infra.checks import check_start
from infra.config import compute_dtype, longest_response, one_line_errors, split_list
from infra.data import load_data
from infra.distributed import is_sharded, iter_full_weights, raise_on_all_ranks
from infra.lora import BasePolicy, add_adapters
from infra.memory import keep_freed_memory, out_of_memory, report_memory
from infra.packing import PACKED_ATTENTION, enable_packing, packing_kind
from infra.precision import fp32_head
from infra.reward_pool import make_scorer
from infra.tokens import add_stop_tokens, stop_token_ids
from infra.watchdog import rendezvous_limit, start_watchdog

# Of a vision-language checkpoint: its names of the language part, as that part alone names them.
LANGUAGE_PART = {r"^language_model\.lm_head\.": "lm_head.",
                 r"^(model\.)?language_model\.(model\.)?": "model."}


@one_line_errors()
@out_of_memory("start")
def setup(config: SimpleNamespace, transformers_engine: Callable[..., Engine],
          training: bool = True) -> tuple[TrainState, Data]:
    """The state of a run and its prompts; without `training`, only those for validation.

    `transformers_engine` is that of rollout.py, for runs without vLLM. Raises SystemExit with one
    line if the config names something that does not load.
    """
    if not gc.get_freeze_count():
        gc.freeze()  # what is imported stays: looking through it again takes 2% of a step
    gc.set_threshold(*infra.GC_THRESHOLD)
    accelerator = start_processes(config)
    set_seed(config.seed)
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it reports every retry
    tokenizer = load_pretrained(AutoTokenizer, config.model)
    data = load_data(config, tokenizer, accelerator.print, training)
    examples = list({tuple(prompt.row): prompt for prompt in
                     chain(data.train, *data.val.values())}.values())  # one of each layout
    weights = [float(weight) for weight in split_list(config.reward.weights)]
    scorer = make_scorer(split_list(config.reward.name), weights, cpus_per_process(accelerator),
                         config.reward.timeout, examples)
    policy = load_on_ranks(config, accelerator, trained=not config.model.lora_rank)
    add_stop_tokens(policy, tokenizer, split_list(config.rollout.stop_tokens))
    accelerator.print(describe_model(policy))
    if training and config.model.lora_rank:
        accelerator.print(add_adapters(config, policy))
    check_start(config, accelerator, tokenizer, policy, scorer, data)
    reference = None
    has_kl = config.algorithm.use_kl_in_reward or config.actor.use_kl_loss
    if has_kl and config.model.lora_rank:
        reference = BasePolicy(policy)
    elif has_kl:
        reference = load_on_ranks(config, accelerator, trained=False).requires_grad_(False)
        reference = (fsdp2_prepare_model(accelerator, reference) if accelerator.is_fsdp2
                     else reference.to(accelerator.device))
    # Dropout, router jitter and whatever else differs in training mode is off: the policy that is
    # trained is the one that was sampled from. Only layers with gradient checkpointing need it.
    policy.eval()
    if config.model.gradient_checkpointing:
        policy.gradient_checkpointing_enable()
        for module in policy.modules():
            module.training = getattr(module, "gradient_checkpointing", False)
    save_dtype = export_dtype(config)
    if training:
        if save_dtype != getattr(torch, config.model.dtype):
            accelerator.print(f"models are saved in {str(save_dtype)[6:]} (save_dtype)")
        report_memory(config, accelerator, policy, reference, is_sharded(accelerator),
                      uses_vllm(config))
    engine = make_engine(config, accelerator, policy, tokenizer, transformers_engine)
    trained = [weight for weight in policy.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=config.actor.lr, fused=True,  # makes no copies
                                  weight_decay=config.actor.weight_decay)
    policy, optimizer = accelerator.prepare(policy, optimizer)
    # Accelerate's wrapper would copy the model's output to float32.
    accelerator.unwrap_model(policy, keep_fp32_wrapper=False)
    return TrainState(config, accelerator, tokenizer, policy, engine, reference, optimizer,
                      scorer, save_dtype), data


def start_processes(config: SimpleNamespace) -> Accelerator:
    """The Accelerator, on GPUs if there are any, distributed as the launcher says: DDP or FSDP2."""
    on_cpu = not torch.cuda.is_available()
    # Some ranks wait while others generate the longest responses or write a checkpoint.
    group = InitProcessGroupKwargs(timeout=timedelta(hours=2))
    with rendezvous_limit(2 * config.watchdog_seconds):
        accelerator = Accelerator(cpu=on_cpu, mixed_precision=config.mixed_precision,
                                  kwargs_handlers=[group], log_with=config.log_with or None,
                                  project_dir=config.run_dir)
    start_watchdog(accelerator, config.watchdog_seconds)
    kind = accelerator.distributed_type
    if kind == DistributedType.DEEPSPEED or (is_sharded(accelerator) and not accelerator.is_fsdp2):
        raise ValueError(f"accelerate launch: {kind.value} is not supported; launch with "
                         "configs/accelerate_ddp.yaml or configs/accelerate_fsdp2.yaml")
    if config.log_with and not accelerator.log_with:
        raise ValueError(f"log_with: {config.log_with} is not installed: "
                         f"pip install {config.log_with}")
    # A launcher's default is one; on GPU machines too, the optimizer may be on the CPU (offload).
    launched = {"ACCELERATE_DYNAMO_BACKEND", "TORCHELASTIC_RUN_ID"} & os.environ.keys()
    if os.environ.get("OMP_NUM_THREADS", "") in (("", "1") if launched else ("",)):
        torch.set_num_threads(cpus_per_process(accelerator))
    if on_cpu:
        keep_freed_memory()
    torch.backends.cuda.enable_cudnn_sdp(False)  # replans for each length: decoding is 10x slower
    if on_cpu and config.mixed_precision == "fp16":  # what Accelerate does on GPUs only
        accelerator.native_amp, accelerator.scaler = True, torch.amp.GradScaler("cpu")
    if accelerator.is_fsdp2 and config.mixed_precision != "no":
        # Accelerate would also reduce gradients in the half-precision type.
        policy = MixedPrecisionPolicy(getattr(torch, compute_dtype(config)), torch.float32)
        accelerator.state.fsdp_plugin.mixed_precision_policy = policy
    count = accelerator.num_processes
    accelerator.print(f"{count} process{'es' * (count > 1)} on {accelerator.device.type}"
                      f"{f', {kind.value}' * (kind != DistributedType.NO)}, passes in "
                      f"{compute_dtype(config)}")
    return accelerator


def cpus_per_process(accelerator: Accelerator) -> int:
    """The number of this machine's cores for each process on it."""
    has_affinity = hasattr(os, "sched_getaffinity")
    cores = len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count() or 1
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", accelerator.num_processes)))


def load_pretrained(auto_class, model: SimpleNamespace, **kwargs):
    """`auto_class.from_pretrained` of the config's section `model`. Raises ValueError with one line
    if that fails."""
    path = model.path
    if Path(path, "model", "config.json").is_file():
        raise ValueError(f"model.path: {path} is the directory of a run; its model is "
                         f"{Path(path, 'model')}")
    if Path(path, "adapter_config.json").is_file():
        raise ValueError(f"model.path: {path} is an adapter (LoRA); use model/ beside it")
    if not Path(path).is_dir() and (path.count("/") != 1 or path.startswith((".", "/", "~"))):
        raise ValueError(f"model.path: {path} is no directory (from {Path.cwd()}) and no hub name "
                         "(owner/name)")
    try:
        return auto_class.from_pretrained(path, trust_remote_code=model.trust_remote_code, **kwargs)
    except Exception as error:  # each library raises its own
        reason = " ".join(str(error).split())
        if "trust_remote_code" in reason and not model.trust_remote_code:
            raise ValueError(f"model.path: {path} brings code of its own; read it, and set "
                             "model.trust_remote_code=true to run it") from error
        if not Path(path).is_dir():
            raise ValueError(
                f"model.path: {path} is no directory (from {Path.cwd()}), and as a hub name it "
                f"cannot be loaded: {reason.partition('. ')[0]}") from error
        attention = kwargs.get("attn_implementation")
        keys = f"model.path or model.attn_implementation={attention}" if attention else "model.path"
        hint = "; auto takes an attention that the model supports" * bool(attention)
        raise ValueError(f"{keys}: cannot load {path}: {reason[:500]}{hint}") from error


def load_on_ranks(config: SimpleNamespace, accelerator: Accelerator,
                  trained: bool) -> torch.nn.Module:
    """`load_model`; empty on ranks to which FSDP2 will send rank 0's weights."""
    sends = accelerator.is_fsdp2 and accelerator.state.fsdp_plugin.cpu_ram_efficient_loading
    empty = sends and not accelerator.is_main_process
    with raise_on_all_ranks("rank 0") if sends else nullcontext():
        model = load_model(config, empty)
    dtypes = [weight.dtype for weight in model.parameters()]  # some models keep some in float32
    mixed = accelerator.is_fsdp2 and config.mixed_precision != "no"
    if trained and mixed and config.model.dtype != "float32":  # else Accelerate does it, later
        dtypes = [torch.float32] * len(dtypes)
        accelerator.print("model.dtype: with mixed_precision, FSDP2 trains weights in float32")
    dtypes, model.generation_config = broadcast_object_list([dtypes, model.generation_config])
    for weight, dtype in zip(model.parameters(), dtypes, strict=True):
        weight.data = torch.empty_like(weight, dtype=dtype) if empty else weight.data.to(dtype)
    return model


def load_model(config: SimpleNamespace, empty: bool = False) -> torch.nn.Module:
    """The model, in evaluation mode and without dropout; of a vision-language model, the language
    part. If `empty`, its weights are memory that nothing touches, and so take none.

    Raises ValueError if it is no causal language model, or the checkpoint lacks some weights.
    """
    path = config.model.path
    whole = load_pretrained(AutoConfig, config.model)
    model_config, renamed = whole.get_text_config(decoder=True), None
    known = (type(model_config) in MODEL_FOR_CAUSAL_LM_MAPPING
             or "AutoModelForCausalLM" in (getattr(whole, "auto_map", None) or ()))
    if whole.is_encoder_decoder or not known:
        raise ValueError(f"model.path: transformers has no causal language model of the kind of "
                         f"{path} ({model_config.model_type})")
    if getattr(whole, "quantization_config", None):
        raise ValueError(f"model.path: the weights of {path} are quantized, and cannot be trained: "
                         "name the model that they were made of, or save a copy in bfloat16")
    if model_config is not whole:
        model_config.tie_word_embeddings = whole.tie_word_embeddings
        renamed = LANGUAGE_PART
    for name, value in model_config.to_dict().items():
        if "drop" in name and isinstance(value, float):
            setattr(model_config, name, 0.0)
    longest = config.data.max_prompt_length + longest_response(config)
    positions = getattr(model_config, "max_position_embeddings", longest)
    rope = getattr(model_config, "rope_parameters", None) or {}  # scaled ones reach further
    unscaled = rope.get("original_max_position_embeddings", positions)
    positions = max(positions, int(rope.get("factor", 1) * unscaled))
    if longest > positions:
        raise ValueError(f"data.max_prompt_length + the longest response = {longest} tokens, "
                         f"but {path} has {positions} positions")
    settings = {"dtype": getattr(torch, config.model.dtype),
                "attn_implementation": named_attention(config)}
    if empty:
        with no_init_weights():
            model = AutoModelForCausalLM.from_config(
                model_config, trust_remote_code=config.model.trust_remote_code, **settings).eval()
        model.tie_weights()
    else:
        model, report = load_pretrained(AutoModelForCausalLM, config.model, config=model_config,
                                        key_mapping=renamed, output_loading_info=True, **settings)
        if missing := report["missing_keys"]:
            raise ValueError(f"model.path: {path} lacks {len(missing)} weights of "
                             f"{type(model).__name__}, {min(missing)} among them")
    repair_generation_config(model)
    if renamed:  # save_pretrained would try to undo it
        model._weight_conversions = None
    enable_packing(model)
    if (config.model.attn_implementation == "auto" and compute_dtype(config) != "float32"
            and torch.cuda.is_available() and is_flash_attn_2_available()
            and model._supports_flash_attn and not packing_kind(model)):
        model.set_attn_implementation("flash_attention_2")
    return model


def repair_generation_config(model: torch.nn.Module) -> None:
    """Drop the defaults of sampling, which a run has its own for, if transformers would refuse to
    save them with the trained policy (`do_sample: false` beside a temperature, say)."""
    try:
        model.generation_config.validate(strict=True)
    except ValueError as error:
        found = model.generation_config.to_diff_dict()
        ids = {name: value for name, value in found.items() if name.endswith("token_id")}
        model.generation_config = GenerationConfig(**ids)
        dropped = ", ".join(sorted(found.keys() - ids.keys() - {"transformers_version"}))
        if os.environ.get("RANK", "0") == "0":
            reason = " ".join(str(error).split()).partition(". ")[0]
            tqdm.write(f"warning: generation_config.json cannot be saved ({reason}): a run has its "
                       f"own sampling, and drops {dropped}")


def export_dtype(config: SimpleNamespace) -> torch.dtype:
    """The type of the exported weights, by `save_dtype`."""
    name = config.save_dtype
    if name == "auto":
        whole, name = load_pretrained(AutoConfig, config.model), config.model.dtype
        stored = whole.dtype or whole.get_text_config(decoder=True).dtype
        if name == "float32" and stored in (torch.bfloat16, torch.float16):
            return stored
    return getattr(torch, name)


def describe_model(model: torch.nn.Module) -> str:
    """A line about the model."""
    attention = model.config._attn_implementation.replace(PACKED_ATTENTION, "sdpa")
    return (f"{type(model).__name__}: {model.num_parameters() / 1e6:.1f}M parameters, attention "
            f"{attention}, {'packed' if packing_kind(model) else 'padded'} rows")


def named_attention(config: SimpleNamespace) -> str | None:
    """`model.attn_implementation`; None for auto: transformers takes sdpa if the model has it."""
    attention = config.model.attn_implementation
    return None if attention == "auto" else attention


def make_engine(config: SimpleNamespace, accelerator: Accelerator, policy: torch.nn.Module,
                tokenizer, transformers_engine: Callable[..., Engine]) -> Engine:
    """The rollout engine by `rollout.mode` and `rollout.backend`. Raises ValueError if it is not
    available, OSError if servers do not answer."""
    backend, tp_size = config.rollout.backend, config.rollout.tensor_parallel_size
    stop_ids = stop_token_ids(policy, tokenizer)
    if config.rollout.mode == "server":
        from infra.vllm_server import server_engine
        kept = dict(policy.named_buffers())  # a router's corrections: float32 in vLLM too
        dtype = getattr(torch, compute_dtype(config))
        metas = {name: (tuple(weight.shape), weight.dtype if name in kept else dtype)
                 for name, weight in iter_full_weights(policy, tied=True)}
        return server_engine(config, accelerator, tokenizer, stop_ids, metas)
    if backend == "vllm" and not find_spec("vllm"):
        raise ValueError("rollout.backend: vllm is not installed: pip install -r "
                         "requirements-vllm.txt (GPUs) or -r requirements-vllm-cpu.txt, or set it "
                         "to transformers")
    if uses_vllm(config):
        local = int(os.environ.get("LOCAL_WORLD_SIZE", accelerator.num_processes))
        if local % tp_size:
            raise ValueError(f"rollout.tensor_parallel_size={tp_size} does not divide the number "
                             f"of processes on a machine, {local}")
        from infra.vllm_engine import vllm_engine
        return vllm_engine(config, accelerator, tokenizer, stop_ids, policy)
    if tp_size > 1:
        raise ValueError("rollout.tensor_parallel_size: only vllm has engines of several "
                         "processes; set it to 1")
    if not policy._supports_default_dynamic_cache():
        raise ValueError(f"model.path: {type(policy).__name__} has a cache of a kind of its own, "
                         "which rollout.backend=transformers cannot use")
    sharded = is_sharded(accelerator)
    rollout_model = copy_without_weights(policy, config, accelerator.device) if sharded else policy
    autocast = accelerator.autocast
    if config.rollout.fp32_head and compute_dtype(config) != "float32":
        autocast = partial(fp32_head, rollout_model, autocast)
    return transformers_engine(rollout_model, tokenizer, autocast,
                               config.rollout.max_num_seqs, has_own_weights=sharded)


def uses_vllm(config: SimpleNamespace) -> bool:
    """Whether vLLM generates in the training processes."""
    backend = config.rollout.backend
    if backend == "auto" and torch.cuda.is_available() and find_spec("vllm"):
        backend = "vllm"
    return config.rollout.mode == "colocate" and backend == "vllm"


def copy_without_weights(policy: torch.nn.Module, config: SimpleNamespace,
                         device: torch.device) -> torch.nn.Module:
    """A model like the policy, in the type of its passes; `sync_weights` sets its weights."""
    with device:
        model = AutoModelForCausalLM.from_config(
            deepcopy(policy.config), dtype=getattr(torch, compute_dtype(config)),
            attn_implementation=named_attention(config),
            trust_remote_code=config.model.trust_remote_code)
    model.generation_config = policy.generation_config
    return model.requires_grad_(False)


@torch.no_grad()
def sync_weights(state: TrainState) -> None:
    """Give the policy's weights to the engine, if it has weights of its own."""
    state.engine.sync(iter_full_weights(state.accelerator.unwrap_model(state.policy), tied=True))


def set_learning_rate(optimizer: torch.optim.Optimizer, config: SimpleNamespace,
                      step: int) -> None:
    """Set the learning rate of a step: after a linear warm-up constant, or falling, so that the
    step after the last would have 0."""
    warmup, schedule = config.actor.lr_warmup_steps, config.actor.lr_schedule
    done = max(0, step - 1 - warmup) / max(1, config.total_training_steps - warmup)
    factor = {"constant": 1.0, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}
    for group in optimizer.param_groups:
        group["lr"] = config.actor.lr * min(factor[schedule], step / max(1, warmup))
