"""The memory formulas of docs/SCALING.md, against what small random models of Qwen2's shape take.

    python bench/memory.py        seconds on 2 cores; on a GPU, a larger model too

Asks a GPU's allocator; follows each storage on a CPU. Prints tables, exits with 1 where a ratio is
out of bounds."""

import io
import sys
import weakref
from pathlib import Path
from types import SimpleNamespace

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import DynamicCache, Qwen2Config, Qwen2ForCausalLM

sys.path.insert(0, str(Path(__file__).parent.parent))
import rollout
from data_types import Sample, SamplingParams
from infra import logprobs
from infra.batching import collate

ON_GPU, EXACT, LOOSE = torch.cuda.is_available(), (0.9, 1.1), (0.8, 1.25)
SMALL = {"L": 4, "H": 128, "heads": 4, "kv_heads": 2, "I": 512, "V": 8192, "B": 2, "P": 16,
         "T": 112, "n": 8}
HALF_B = {"L": 24, "H": 896, "heads": 14, "kv_heads": 2, "I": 4864, "V": 151936, "B": 4, "P": 128,
          "T": 1024, "n": 8}
# formula, bounds; the symbols are those of docs/SCALING.md, with one type for weights and computing
TERMS = {
    # 3H: two norms, q's bias
    "parameters": ("c*(2*V*H + L*(2*H*H + 2*H*K + 3*H*I + 3*H + 2*K) + H)", EXACT),
    "gradients": ("c*N", EXACT),
    "Adam's moments": ("2*c*N", EXACT),
    "checkpoint file": ("3*c*N", EXACT),
    "activations, checkpointed": ("M*(L*c*H + (4 + 2*c)*H)", LOOSE),  # layers' inputs, last norm
    "activations, all kept": ("M*(L*((8 + 4*c)*H + 2*c*(H + K) + 4*c*I) + (4 + 2*c)*H)", LOOSE),
    "head: gradient, chunk of logits, tokens": ("W*V*H + 8*C + 2*c*B*T*H", LOOSE),
    "KV cache": ("2*c*L*K*B*n*(P + T - 1)", EXACT),
    "responses": ("(8 + 4)*B*n*T", EXACT)}


class Storages(TorchDispatchMode):
    """`read()`: bytes that were made inside it and still exist, and the peak."""
    def __enter__(self):
        self.live, self.peak = weakref.WeakValueDictionary(), 0
        self.before = torch.cuda.memory_allocated()
        if ON_GPU:
            torch.cuda.reset_peak_memory_stats()
        return super().__enter__()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if not ON_GPU:
            given, made = ({t.untyped_storage()._cdata: t.untyped_storage()
                            for t in tree_leaves(tensors)
                            if isinstance(t, torch.Tensor)} for tensors in ((args, kwargs), result))
            self.live.update({key: storage for key, storage in made.items() if key not in given})
            self.peak = max(self.peak, self.read()[0])
        return result

    def read(self) -> tuple[int, int]:
        gpu = (torch.cuda.memory_allocated() - self.before,
               torch.cuda.max_memory_allocated() - self.before)
        return gpu if ON_GPU else (sum(storage.nbytes() for storage in self.live.values()),
                                   self.peak)


def measure_training(model, batch: dict[str, torch.Tensor]) -> dict[str, int]:
    """A step of the trainer: forward and backward, without gradient checkpointing and then with it,
    and AdamW."""
    sizes = {}
    for term in ("activations, all kept", "activations, checkpointed"):
        model.zero_grad()
        with Storages() as storages:
            loss = logprobs.response_logprobs(model, batch)[0].sum()
            sizes[term] = storages.read()[0]
            loss.backward()
            sizes["gradients"] = storages.read()[0]
        model.gradient_checkpointing_enable()
    with Storages() as storages:
        hidden = torch.randn(batch["tokens"].numel(), model.config.hidden_size, device=model.device,
                             dtype=model.dtype, requires_grad=True)
        logprobs.fused_linear_logprobs(hidden, model.lm_head.weight,
                                       batch["tokens"])[0].sum().backward()
        sizes["head: gradient, chunk of logits, tokens"] = storages.read()[1]
    optimizer = torch.optim.AdamW(model.parameters())
    optimizer.step()
    sizes["Adam's moments"] = sum(tensor.nbytes for state in optimizer.state.values()
                                  for tensor in state.values())
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()},
               file := io.BytesIO())
    return {**sizes, "checkpoint file": file.tell()}


def measure_rollout(model, prompts: list[list[int]], n: int, max_tokens: int) -> dict[str, int]:
    """The cache that `transformers_generate` fills, and its responses (4 bytes of text a token)."""
    caches, texts = [], SimpleNamespace(
        eos_token_id=-1, special_tokens_map={}, convert_tokens_to_ids=list,
        batch_decode=lambda rows, **_: ["abc " * len(row) for row in rows])
    rollout.DynamicCache = lambda **kwargs: caches.append(DynamicCache(**kwargs)) or caches[-1]
    groups = rollout.transformers_generate(model, texts, prompts,
                                           [(i,) for i in range(len(prompts))],
                                           SamplingParams(n, max_tokens))
    return {"KV cache": sum(buffer.nbytes for layer in caches[-1].layers
                            for buffer in layer.buffers),
            "responses": sum(response.token_ids.nbytes + response.logprobs.nbytes
                             + len(response.text) for group in groups for response in group)}


def measure_model(shape: SimpleNamespace, dtype: torch.dtype) -> bool:
    """Print a model's table; whether every ratio is within its bounds."""
    # as small beside the logits as in a large run
    logprobs.CHUNK_ELEMENTS = shape.B * shape.T * shape.V // 16
    logprobs.kept_elements = lambda gpu_memory: 0  # chunks that stay take what memory there is
    config = Qwen2Config(vocab_size=shape.V, hidden_size=shape.H, intermediate_size=shape.I,
                         num_hidden_layers=shape.L, num_attention_heads=shape.heads,
                         num_key_value_heads=shape.kv_heads)
    with torch.device("cuda" if ON_GPU else "cpu") as device, Storages() as storages:
        model = Qwen2ForCausalLM(config).to(dtype).train()
        sizes = {"parameters": storages.read()[0]}
    ids = torch.randint(shape.V, (shape.B, shape.P + shape.T), device=device)
    batch = collate([Sample(row[:shape.P].tolist(), row[shape.P:].int().cpu().numpy(), 0.0)
                     for row in ids], 0, device)
    sizes |= measure_training(model, batch) | measure_rollout(model, ids[:, :shape.P].tolist(),
                                                              shape.n, shape.T)
    # in float32; of bfloat16, a chunk's part beside it
    summed = 4 if dtype == torch.float32 else 8
    symbols = {**vars(shape), "c": dtype.itemsize, "K": shape.kv_heads * shape.H // shape.heads,
               "M": ids.numel(), "C": logprobs.CHUNK_ELEMENTS, "W": summed,
               "N": sum(p.numel() for p in model.parameters())}
    print(f"\n{dtype}: " + ", ".join(f"{k} {v}" for k, v in symbols.items()),
          "\n| term | formula | predicted bytes | measured bytes | ratio |\n|---|---|---|---|---|",
          sep="\n")
    predicted = {term: eval(formula, {}, symbols) for term, (formula, _) in TERMS.items()}
    for term, size in predicted.items():
        print(f"| {term} | `{TERMS[term][0]}` | {size:,} | {sizes[term]:,} | "
              f"{sizes[term] / size:.3f} |")
    return all(low <= sizes[term] / predicted[term] <= high
               for term, (_, (low, high)) in TERMS.items())


if __name__ == "__main__":
    print(f"{torch.cuda.get_device_name() if ON_GPU else 'CPU'}, torch {torch.__version__}")
    shape = SimpleNamespace(**(HALF_B if ON_GPU else SMALL))
    good = [measure_model(shape, dtype) for dtype in (torch.float32, torch.bfloat16)[ON_GPU:]]
    print(f"\ngoal: ratios within {EXACT}, kept activations {LOOSE}: "
          f"{'reached' if all(good) else 'missed'}")
    sys.exit(not all(good))
