"""Rollouts, weight sync and sleep of the two backends, on a random model of Qwen2's shape.

    python bench/vllm_gpu.py [--shape 0.5B 1.5B] [--backend transformers vllm]

Prints a Markdown table. Each backend runs in a process of its own, so that memory is its own.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
SHAPES = {"tiny": {"vocab_size": 2048, "hidden_size": 128, "num_hidden_layers": 2,
                   "num_attention_heads": 4, "num_key_value_heads": 2,
                   "intermediate_size": 256, "tie_word_embeddings": True},
          "0.5B": {"hidden_size": 896, "num_hidden_layers": 24, "num_attention_heads": 14,
                   "num_key_value_heads": 2, "intermediate_size": 4864,
                   "tie_word_embeddings": True},
          "1.5B": {"hidden_size": 1536, "num_hidden_layers": 28, "num_attention_heads": 12,
                   "num_key_value_heads": 2, "intermediate_size": 8960,
                   "tie_word_embeddings": True}}
PROMPTS, N, PROMPT_TOKENS, TOKENS = 32, 16, 128, 1024


def make_model(shape: str, folder: Path) -> None:
    """A random model, with the toy's tokenizer: its ids are all that the prompts need."""
    from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM
    torch.manual_seed(0)
    config = Qwen2Config(**{"vocab_size": 151936, "max_position_embeddings": 4096,
                            "eos_token_id": 0, "pad_token_id": 0, **SHAPES[shape]})
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        Qwen2ForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    AutoTokenizer.from_pretrained(ROOT / "toy/base").save_pretrained(folder)


def seconds(function) -> float:
    """How long a call takes, what it started on a GPU included."""
    start = time.perf_counter()
    function()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def measure(folder: str, backend: str, tokens: int) -> dict:
    """Start, first and later syncs, tokens a second, sleep and wake-up, and how far the log-probs
    are apart."""
    from data_types import Sample, SamplingParams
    from harness import load_config, logprobs_of, setup, sync_weights, transformers_engine
    config = load_config("config.yaml", [
        f"model.path={folder}", "model.dtype=bfloat16", "mixed_precision=bf16", "val.file=",
        f"rollout.backend={backend}", f"data.max_prompt_length={PROMPT_TOKENS}",
        f"data.max_response_length={tokens}", "rollout.max_num_seqs=512",
        "overlong_buffer.enable=false"])
    result, holder = {"backend": backend}, []
    result["start"] = seconds(lambda: holder.append(setup(config, transformers_engine)))
    state = holder[0][0]
    result["first sync"] = seconds(lambda: sync_weights(state))
    result["sync"] = min(seconds(lambda: sync_weights(state)) for _ in range(3))
    torch.manual_seed(1)
    prompts = torch.randint(1, state.policy.config.vocab_size, (PROMPTS, PROMPT_TOKENS)).tolist()

    def write(seed: int, limit: int) -> list:
        seeds = [(seed, i) for i in range(PROMPTS)]
        return state.engine.generate(prompts, seeds, SamplingParams(N, limit))

    write(0, 32)
    groups = []
    result["generate"] = seconds(lambda: groups.extend(write(1, tokens)))
    generated = [(ids, response) for ids, group in zip(prompts, groups, strict=True)
                 for response in group]
    total = sum(len(response.token_ids) for _, response in generated)
    result["tokens/s"] = total / result["generate"]
    before = torch.cuda.memory_reserved() if torch.cuda.is_available() else 0
    free = [torch.cuda.mem_get_info()[0]] if torch.cuda.is_available() else [0]
    result["sleep"] = seconds(state.engine.sleep)
    free.append(torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else 0)
    result["freed GB"], result["reserved GB"] = (free[1] - free[0]) / 1e9, before / 1e9
    samples = [Sample(ids, response.token_ids, 0.0) for ids, response in generated[:64]]
    ours = torch.cat(logprobs_of(state, samples))
    theirs = torch.cat([torch.from_numpy(response.logprobs) for _, response in generated[:64]])
    result["difference"] = (ours - theirs).abs().mean().item()
    result["wake and sync"] = seconds(lambda: sync_weights(state))
    again = write(1, 64)
    pairs = [(a.token_ids[:64], b.token_ids[:64]) for x, y in zip(groups, again, strict=True)
             for a, b in zip(x, y, strict=True)]
    result["same after waking"] = sum(a.tolist() == b.tolist() for a, b in pairs) / len(pairs)
    return result


def main() -> None:
    """Measure each shape with each backend."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", nargs="+", default=["0.5B", "1.5B"])
    parser.add_argument("--backend", nargs="+", default=["transformers", "vllm"])
    parser.add_argument("--tokens", type=int, default=TOKENS)
    parser.add_argument("--in-folder", help="measure a model that is there, in this process")
    args = parser.parse_args()
    if args.in_folder:
        print("RESULT " + json.dumps(measure(args.in_folder, args.backend[0], args.tokens)),
              flush=True)
        return
    rows = []
    for shape in args.shape:
        with tempfile.TemporaryDirectory() as folder:
            make_model(shape, Path(folder))
            for backend in args.backend:
                command = [sys.executable, __file__, "--in-folder", folder, "--backend", backend,
                           "--tokens", str(args.tokens)]
                run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
                lines = [line for line in run.stdout.splitlines() if line.startswith("RESULT ")]
                if not lines:
                    print(f"{shape} {backend} failed:\n{(run.stdout + run.stderr)[-4000:]}",
                          flush=True)
                    continue
                rows.append({"shape": shape, **json.loads(lines[0].removeprefix("RESULT "))})
                print(rows[-1], flush=True)
    if rows:
        names = list(rows[0])
        print("\n| " + " | ".join(names) + " |\n|" + "---|" * len(names))
        for row in rows:
            cells = [f"{row[name]:.3g}" if isinstance(row[name], float) else str(row[name])
                     for name in names]
            print("| " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
