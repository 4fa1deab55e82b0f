"""What memory a run will need, roughly (docs/SCALING.md is exact); and running out of it."""

import ctypes
import os
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import psutil
import torch
from accelerate import Accelerator

from infra.config import compute_dtype

CHUNK_ELEMENTS = 2**25  # logits that exist at a time (128 MB in float32); four times that on a GPU
SHARD = "shard the policy over more GPUs (configs/accelerate_fsdp2.yaml)"
REMEDIES = {  # by phase
    "start": f"lower rollout.gpu_memory_utilization if vLLM generates, or {SHARD}",
    "generate": "lower rollout.max_num_seqs, or rollout.gpu_memory_utilization if vLLM generates",
    "logprobs": "lower actor.max_tokens_per_micro_batch",
    "update": "lower actor.max_tokens_per_micro_batch, set model.gradient_checkpointing=true, or "
              f"{SHARD}",
    "sync": f"lower rollout.gpu_memory_utilization if vLLM generates, or {SHARD}"}


def kept_elements(gpu_memory: int) -> int:
    """How many log-probs, over the vocabulary, a micro-batch's forward pass may leave to its
    backward pass: in float32 a sixteenth of a GPU's memory. `gpu_memory` is 0 on a CPU."""
    return gpu_memory // 64 or CHUNK_ELEMENTS


def keep_freed_memory() -> None:
    """Keep GNU's malloc from returning the memory of freed tensors to the system, which clears it
    for the next ones: 7% of the processor time of a step on a CPU."""
    libc = ctypes.CDLL(None) if os.name == "posix" else None
    thresholds = -1, -3  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD
    for option in thresholds if hasattr(libc, "mallopt") else ():
        libc.mallopt(option, 2**30)  # bytes


@contextmanager
def out_of_memory(phase: str) -> Iterator[None]:
    """Turn running out of memory in the block into a ValueError that says what to do."""
    try:
        yield
    except RuntimeError as error:  # torch's, or that of vLLM's allocator, without a type of its own
        if "out of memory" not in str(error):
            raise
        reason = ". ".join(" ".join(str(error).split()).split(". ")[:2])
        remedy = REMEDIES.get(phase, REMEDIES["start"])
        cause = torch.OutOfMemoryError(error)  # which tells whoever ends the run that it was this
        raise ValueError(f"out of memory in phase {phase}: {remedy}. {reason}") from cause

def report_memory(config: SimpleNamespace, accelerator: Accelerator, policy: torch.nn.Module,
                  reference: torch.nn.Module | None, sharded: bool, vllm: bool) -> None:
    """Print what each process will need, and a warning if it has less."""
    device, processes = accelerator.device, int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    gpu_memory = torch.cuda.mem_get_info(device)[1] if device.type == "cuda" else 0
    total = gpu_memory or psutil.virtual_memory().total // processes
    phases = estimate_memory(config, policy, reference, accelerator.num_processes, sharded, vllm,
                             gpu_memory)
    sums, texts = {phase: sum(parts.values()) for phase, parts in phases.items()}, []
    for phase, parts in phases.items():
        text = ", ".join(f"{name} {_size(part)}" for name, part in parts.items() if part)
        texts.append(f"{_size(sums[phase])} to {phase} ({text})")
    accelerator.print(f"memory of each process, about: {', '.join(texts)}, of {_size(total)}")
    most = max(sums, key=sums.get)
    if sums[most] > total:
        accelerator.print(f"warning: memory may not suffice to {most}: {REMEDIES[most]}")


def peak_memory(device: torch.device) -> float:
    """The most GB that this process has held so far: of the GPU, or of the machine's memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def _size(count: float) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"


def estimate_memory(config: SimpleNamespace, policy: torch.nn.Module,
                    reference: torch.nn.Module | None = None, ranks: int = 1, sharded: bool = False,
                    vllm: bool = False, gpu_memory: int = 0) -> dict[str, dict[str, float]]:
    """Bytes of a process at its peak, by their use, to generate and to update the policy: roughly,
    with responses of full length. The models are whole; `gpu_memory` is 0 on a CPU."""
    data, rollout, text = config.data, config.rollout, policy.config.get_text_config(decoder=True)
    weights, embeddings = list(policy.parameters()), policy.get_input_embeddings().weight
    total, (vocabulary, hidden) = sum(map(torch.numel, weights)), embeddings.shape
    known = text.to_dict()  # not all may be read as attributes
    known |= {name: known.get(own) for name, own in text.attribute_map.items()}
    names = "num_hidden_layers", "num_attention_heads", "num_experts_per_tok"
    layers, heads, experts = (known.get(name) or 1 for name in names)
    length, shards = data.max_prompt_length + data.max_response_length, ranks if sharded else 1
    size = getattr(torch, compute_dtype(config)).itemsize  # bytes of a number that a layer computes
    stream = size if sharded else embeddings.itemsize      # and of one that goes between layers
    casts = total * size if stream != size else 0          # autocast's copies of the weights
    gradients = sum(p.nbytes for p in weights if p.requires_grad) / shards
    copied = set(reference.parameters()) - set(weights) if reference else ()
    held = {"weights": sum(p.nbytes for p in weights) / shards, "optimizer": 2 * gradients,
            "reference": sum(p.nbytes for p in copied) / shards,
            "DDP's buckets": gradients if ranks > 1 and not sharded else 0}

    drawn = 4 * data.train_batch_size if data.gen_batch_size == "auto" else data.gen_batch_size
    keys = (known.get("num_key_value_heads") or heads) * (known.get("head_dim") or hidden // heads)
    decoding = casts + min(rollout.max_num_seqs, rollout.n * drawn / ranks) * (
        2 * stream * layers * keys * length + (size + 12) * vocabulary)  # keys, values, logits
    asleep = total * size if sharded or vllm else 0  # the engine's own weights
    awake = asleep + (2**29 if vllm else decoding)   # vLLM's cache on a CPU
    if rollout.mode == "server" or (vllm and gpu_memory):  # vllm is False if servers generate
        awake, asleep = vllm * rollout.gpu_memory_utilization * gpu_memory, 0

    tokens = max(length, min(config.actor.max_tokens_per_micro_batch,
                             config.actor.ppo_mini_batch_size * length / ranks))
    logits = vocabulary * tokens * data.max_response_length / length
    chunk = min(logits, (4 if gpu_memory else 1) * CHUNK_ELEMENTS)
    head = 4 * (chunk + min(logits, kept_elements(gpu_memory)))
    if embeddings.requires_grad:  # the head's too: summed in float32, beside a half-precision part
        head += 16 // size * embeddings.numel()
    # A matrix keeps what goes in and what comes out; a quarter more is kept between matrices.
    activations = 1.25 * size * tokens * sum(
        sum(p.shape[-2:]) * (experts if p.ndim > 2 else 1) for name, p in policy.named_parameters()
        if p.ndim > 1 and vocabulary not in p.shape and "lora_" not in name)
    if config.model.gradient_checkpointing:  # the layers' inputs; then the head, or a layer
        activations = stream * tokens * hidden * (layers + 3) + max(0, activations / layers - head)
    gathered = (2 * size + 4) * (total / layers + embeddings.numel()) if sharded else 0
    return {"generate": held | {"engine": awake},
            "update": held | {"engine": asleep, "gradients": gradients, "autocast": casts,
                              "activations": activations, "output head": head, "shards": gathered}}
