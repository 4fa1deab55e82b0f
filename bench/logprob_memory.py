"""Log-probs and entropies of 2,048 tokens from a head of 151,936 x 896, with gradients: memory and
time.

    python bench/logprob_memory.py [--tokens 2048] [--vocabulary 151936] [--rounds 3]

`logprobs.fused_linear_logprobs` against a plain log-softmax of all logits, in turn, each in a
process of its own. Extra memory is the peak above the tensors that go in and the gradients that
come out."""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
WIDTH = 896
MEMORY_GOAL, TIME_GOAL = 1 / 8, 1.3


def plain(hidden, weight, tokens):
    """As one writes it down."""
    logprobs = torch.log_softmax((hidden @ weight.T).float(), dim=-1)
    return logprobs.gather(-1, tokens[:, None]).squeeze(-1), -(logprobs.exp() * logprobs).sum(-1)


def measure(way: str, tokens: int, vocabulary: int) -> dict[str, float]:
    """Extra bytes at the peak, and seconds of a forward and backward pass, the second of two."""
    sys.path.insert(0, str(ROOT))
    from infra.logprobs import fused_linear_logprobs
    on_gpu = torch.cuda.is_available()
    device, dtype = ("cuda", torch.bfloat16) if on_gpu else ("cpu", torch.float32)
    torch.manual_seed(0)
    hidden = torch.empty(tokens, WIDTH, device=device, dtype=dtype).normal_().requires_grad_()
    weight = torch.empty(vocabulary, WIDTH, device=device,
                         dtype=dtype).normal_(std=WIDTH**-0.5).requires_grad_()
    targets = torch.randint(vocabulary, (tokens,), device=device)
    function = plain if way == "plain" else fused_linear_logprobs
    for x in (hidden, weight):
        x.grad = torch.ones_like(x)  # room for the gradients, which both ways need
    peak = torch.cuda.max_memory_allocated if on_gpu else (
        lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
    before = torch.cuda.memory_allocated() if on_gpu else peak()
    for _ in range(2):
        hidden.grad = weight.grad = None
        start = time.perf_counter()
        logprobs, entropy = function(hidden, weight, targets)
        (logprobs.mean() + 0.01 * entropy.mean()).backward()
        if on_gpu:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        del logprobs, entropy
    return {"bytes": peak() - before, "seconds": seconds}


def main() -> None:
    """Measure both in turn, print a table, and whether the goals are met."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--vocabulary", type=int, default=151_936)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--one", choices=("plain", "chunks"),
                        help="measure this one, and print JSON")
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(args.one, args.tokens, args.vocabulary)))
        return
    rows = {"plain": [], "chunks": []}
    for _ in range(args.rounds):
        for way, found in rows.items():
            result = subprocess.run([sys.executable, __file__, "--one", way, "--tokens",
                                     str(args.tokens), "--vocabulary", str(args.vocabulary)],
                                    capture_output=True, text=True, check=True)
            found.append(json.loads(result.stdout))
    print("| way | extra memory (GB) | seconds, median | least and most |\n|---|---|---|---|")
    medians = {}
    for way, found in rows.items():
        seconds = sorted(row["seconds"] for row in found)
        medians[way] = {name: statistics.median(row[name] for row in found)
                        for name in ("bytes", "seconds")}
        print(f"| {way} | {medians[way]['bytes'] / 1e9:.2f} | {medians[way]['seconds']:.2f} | "
              f"{seconds[0]:.2f} to {seconds[-1]:.2f} |")
    memory, seconds = (medians["chunks"][name] / medians["plain"][name]
                       for name in ("bytes", "seconds"))
    print(f"memory {memory:.3f} of plain (goal {MEMORY_GOAL}), time {seconds:.2f} (goal "
          f"{TIME_GOAL})")
    raise SystemExit(memory > MEMORY_GOAL or seconds > TIME_GOAL)


if __name__ == "__main__":
    main()
