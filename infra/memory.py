"""A run's memory, known beforehand by the formulas of docs/SCALING.md; and running out of it."""

import ctypes
import os
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
    """Turn a torch.OutOfMemoryError of the block into a ValueError that says what to do."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        reason = ". ".join(" ".join(str(error).split()).split(". ")[:2])
        remedy = REMEDIES.get(phase, REMEDIES["start"])
        raise ValueError(f"out of memory in phase {phase}: {remedy}. {reason}") from error


def report_memory(config: SimpleNamespace, accelerator: Accelerator, policy: torch.nn.Module,
                  reference: torch.nn.Module | None, sharded: bool, vllm: bool) -> None:
    """Print what each process will need, and a warning if it has less."""
    if accelerator.device.type == "cuda":
        total = gpu_memory = torch.cuda.mem_get_info(accelerator.device)[1]
    else:
        processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        total, gpu_memory = psutil.virtual_memory().total // processes, 0
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


def _size(count: float) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"


def estimate_memory(config: SimpleNamespace, policy: torch.nn.Module,
                    reference: torch.nn.Module | None = None, ranks: int = 1, sharded: bool = False,
                    vllm: bool = False, gpu_memory: int = 0) -> dict[str, dict[str, float]]:
    """Bytes of a process at its peak, by their use: when it generates, and when it updates the
    policy, with responses of full length. Activations and cache are missing if the model's config
    lacks the usual names. `policy` and `reference` are whole; `gpu_memory` is 0 on a CPU.
    """
    z = _symbols(config, policy, ranks, sharded, gpu_memory)
    params, shards = list(policy.parameters()), ranks if sharded else 1
    own = set(map(id, params))
    copied = [p for p in reference.parameters() if id(p) not in own] if reference else []
    gradients = sum(p.nbytes for p in params if p.requires_grad) / shards
    held = {"weights": sum(p.nbytes for p in params) / shards, "optimizer": 2 * gradients,
            "reference": sum(p.nbytes for p in copied) / shards,
            "DDP's buckets": gradients if ranks > 1 and not sharded else 0}
    if config.rollout.mode == "server":
        awake = asleep = 0
    elif vllm and gpu_memory:
        awake, asleep = config.rollout.gpu_memory_utilization * gpu_memory, 0
    else:
        asleep = z.c * sum(p.numel() for p in params) if sharded or vllm else 0
        awake = asleep = asleep + 2**29 * vllm  # its cache on a CPU
        if not vllm:
            awake += _cache_and_logits(z)
    backward = _activations(z, config.model.gradient_checkpointing)
    # With one micro-batch, gradients are made as activations go.
    added = gradients if z.several else max(0, gradients - sum(backward.values()))
    return {"generate": held | {"engine": awake},
            "update": held | {"engine": asleep} | backward | {"gradients": added}}


def _symbols(config: SimpleNamespace, policy: torch.nn.Module, ranks: int, sharded: bool,
             gpu_memory: int) -> SimpleNamespace:
    """The symbols of docs/SCALING.md; 0 for what the model's config does not name."""
    text, data, rollout = policy.config.get_text_config(decoder=True), config.data, config.rollout
    known = text.to_dict()  # not all may be read as attributes
    known |= {name: known.get(own) for name, own in text.attribute_map.items()}

    def get(*names: str) -> int:
        found = next((known[name] for name in names if known.get(name)), 0)
        return max(found) if isinstance(found, list | tuple) else found  # one for each layer
    H, L, heads = get("hidden_size"), get("num_hidden_layers"), get("num_attention_heads") or 1
    head_size, experts = get("head_dim") or H // heads, get("num_experts_per_tok")
    inner = get("intermediate_size", "ffn_dim") or 4 * H
    if experts:
        inner = (experts * (get("moe_intermediate_size") or inner)
                 + get("shared_expert_intermediate_size"))
    kinds = known.get("layer_types") or ["full_attention"] * L
    embedding, head = policy.get_input_embeddings(), policy.get_output_embeddings()
    weights = {id(p): p.numel() for p in policy.parameters()}
    VH = head.weight.numel() if head else 0
    ends = {id(module.weight) for module in (embedding, head) if module}
    c, w = getattr(torch, compute_dtype(config)).itemsize, next(policy.parameters()).itemsize
    P, T = data.max_prompt_length, data.max_response_length
    share = config.actor.ppo_mini_batch_size * (P + T) / ranks  # tokens of a rank's mini-batch
    M = max(P + T, min(config.actor.max_tokens_per_micro_batch, share))
    N, V = M * T / (P + T), get("vocab_size")
    prompts = max(1, rollout.max_num_seqs // rollout.n)
    drawn = 4 * data.train_batch_size if data.gen_batch_size == "auto" else data.gen_batch_size
    return SimpleNamespace(
        H=H, L=L, Q=heads * head_size, K=(get("num_key_value_heads") or heads) * head_size,
        I=inner, V=V, VH=VH, P=P, T=T, M=M, N=N, several=share > M, c=c,
        s=c if sharded else w,  # of the stream between layers, which autocast leaves as it is
        casts=w != c and not sharded, sharded=sharded,
        body=sum(count for key, count in weights.items() if key not in ends),
        S=heads * (policy.config._attn_implementation == "eager"),
        W=0 if head and not head.weight.requires_grad else 4 if c == 4 else 8 if gpu_memory else 10,
        C=min((4 if gpu_memory else 1) * CHUNK_ELEMENTS, N * V),
        Z=min(kept_elements(gpu_memory), N * V), B=rollout.n * min(prompts, -(-drawn // ranks)),
        caches=sum(kind in ("full_attention", "sliding_attention") for kind in kinds))


def _cache_and_logits(z: SimpleNamespace) -> float:
    """What decoding with transformers needs besides the model."""
    cache = 2 * z.s * z.caches * z.K * z.B * (z.P + z.T)
    temporary = max(z.s * z.K * z.B * (z.P + z.T), (z.c + 12) * z.B * z.V)  # a longer cache; logits
    return cache + temporary + z.casts * z.c * (z.body + z.VH)


def _activations(z: SimpleNamespace, checkpointing: bool) -> dict[str, float]:
    """What a micro-batch needs when its backward pass begins."""
    layer = (8 + 4 * z.c) * z.H + 2 * z.c * (z.Q + z.K) + 4 * z.c * z.I
    layer += z.S * (z.P + z.T) * (4 + z.c % 4)           # scores of all pairs of tokens
    layer += z.casts * (8 + z.c) * z.H                   # the stream is float32
    layer, last = z.M * layer, z.M * (4 + 2 * z.c) * z.H
    head = z.W * z.VH + 4 * z.C + 4 * max(z.Z, z.C) + 2 * z.c * z.N * z.H
    head += z.casts * z.c * z.VH
    if not checkpointing:
        body = z.L * layer + last + z.casts * z.c * z.body
    else:  # then a layer that is computed again, or half copies of all weights in the forward pass
        forward = z.casts * z.c * (z.body + z.VH) + 8 * z.C
        body = z.M * z.L * z.s * z.H + last + max(0, layer - head, forward - head)
    parts = {"activations": body, "output head": head}
    if z.sharded:  # two layers, embedding and head, and their gradients as they are summed
        of_layer = z.body / max(1, z.L)
        parts["gathered shards"] = 2 * z.c * (of_layer + z.VH) + 4 * (of_layer + z.VH)
    return parts
