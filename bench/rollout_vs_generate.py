"""Speed of rollouts: `rollout.transformers_generate` against the library's own `model.generate`.

    python bench/rollout_vs_generate.py [--models toy/base random sums-32 sums-256] [--rounds 5]

In turn, in one process, after a short warm-up of each; float32, temperature 1, n responses to a
prompt. Counted are the tokens up to the EOS, which is included: what is computed for rows that have
already stopped counts for nothing. Prints a Markdown table, and the ratio of the tokens a second;
exits 1 where a model misses the goal.

`random` is an untrained Llama of some 10M parameters, `hybrid` a Qwen3.5 (three layers of linear
attention to one of full attention), `mamba` a Mamba-2, whose EOS has the same probability
everywhere: lengths differ as much as they can, from 1 to the limit. Their batch is smaller, so that
a round takes seconds. `sums-32` and `sums-256` are SmolLM2-135M and 32 or 256 responses of
configs/smollm2_135m_sums.yaml (`examples/sums/prepare.py --model` makes it), 8 to a prompt. A
trained policy is any model directory of the embedded task, as runs/toy/model. Linear attention and
Mamba run as transformers' own PyTorch code, in both.

What the two return is not the same. Ours comes with log-probs, and with texts; the library is
measured without both, and once more with log-probs its own way (`output_scores`, and then
`compute_transition_scores`). The goal is about whichever of the two is quicker; who comes after
whom makes a difference on a CPU, so the order rotates. The library runs the prompt once for each
response, ours once for all n: part of the difference, and meant to be. Mean lengths are in the
table, to show that both did the same work."""

import argparse
import os
import statistics
import sys
import time
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
import transformers  # noqa: E402
from torch.nn.utils.rnn import pad_sequence  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402
from transformers import LlamaConfig, Mamba2Config, Qwen3_5TextConfig  # noqa: E402

from data_types import SamplingParams  # noqa: E402
from infra.config import load_config, split_list  # noqa: E402
from infra.data import load_data  # noqa: E402
from infra.tokens import add_stop_tokens, stop_token_ids  # noqa: E402
from rollout import transformers_generate  # noqa: E402

EOS, MEAN_LENGTH = 0, 64
GOALS = {"hybrid": 0.8, "mamba": 0.8, "sums-32": 2.2, "sums-256": 2.2}  # of others: 1.5
WAYS = ("rollout.py", "model.generate", "model.generate, log-probs")


def random_model(kind: str):
    """Untrained, and with a bias towards the EOS: lengths are geometric, with a mean of
    `MEAN_LENGTH` but for the cut."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 2048, "hidden_size": 320, "tie_word_embeddings": False,
             "bos_token_id": None, "eos_token_id": EOS, "pad_token_id": EOS}
    attention = {"intermediate_size": 1280, "num_attention_heads": 5, "head_dim": 64,
                 "max_position_embeddings": 512}
    linear = {"linear_num_key_heads": 5, "linear_num_value_heads": 5, "linear_key_head_dim": 32,
              "linear_value_head_dim": 32,
              "layer_types": ["linear_attention"] * 3 + ["full_attention"]}
    config = {"random": lambda: LlamaConfig(num_hidden_layers=5, **sizes, **attention),
              "hybrid": lambda: Qwen3_5TextConfig(num_hidden_layers=4, num_key_value_heads=5,
                                                  **sizes, **attention, **linear),
              "mamba": lambda: Mamba2Config(num_hidden_layers=8, num_heads=10, head_dim=64,
                                            n_groups=1, state_size=16, **sizes)}[kind]()
    model = AutoModelForCausalLM.from_config(config)
    head = torch.nn.Linear(model.config.hidden_size, config.vocab_size)  # the others have no bias
    head.weight.data, head.bias.data = model.lm_head.weight.data, torch.zeros(config.vocab_size)
    # the other logits are all near 0
    head.bias.data[EOS] = torch.tensor(config.vocab_size / MEAN_LENGTH).log()
    model.lm_head = head
    return model


def load_case(name: str, args: argparse.Namespace):
    """A model, its tokenizer, the prompts to answer, and n and the most tokens of a response."""
    is_random, overrides, file = name in ("random", "hybrid", "mamba"), ["val.file="], "config.yaml"
    count, n, most = args.prompts, args.n, args.max_tokens
    if is_random:
        count, most = args.random_prompts, args.random_max_tokens
    if name.startswith("sums-"):
        file = "configs/smollm2_135m_sums.yaml"
        overrides.append("model.path=examples/sums/base")
    elif not is_random:
        overrides.append(f"model.path={name}")
    config = load_config(file, overrides)
    if name.startswith("sums-"):
        n, most = config.rollout.n, config.data.max_response_length
        count = int(name.removeprefix("sums-")) // n
    tokenizer = AutoTokenizer.from_pretrained(config.model.path)
    model = (random_model(name) if is_random
             else AutoModelForCausalLM.from_pretrained(config.model.path, dtype=torch.float32))
    add_stop_tokens(model, tokenizer, split_list(config.rollout.stop_tokens))
    prompts = load_data(config, tokenizer, lambda line: None, True).train[:count]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return (model.to(device).eval(), tokenizer, [prompt.token_ids for prompt in prompts], n, most)


def sample_lengths(way: str, model, tokenizer, prompts: list[list[int]], n: int, max_tokens: int,
                   seed: int) -> list[int]:
    """Lengths of n responses to each prompt, generated one of the three ways."""
    if way == "rollout.py":
        groups = transformers_generate(model, tokenizer, prompts,
                                       [(seed, i) for i in range(len(prompts))],
                                       SamplingParams(n, max_tokens), max_num_seqs=n * len(prompts))
        return [len(response.token_ids) for group in groups for response in group]
    torch.manual_seed(seed)
    stop_ids = stop_token_ids(model, tokenizer)
    ids = pad_sequence([torch.tensor(p) for p in prompts], batch_first=True, padding_side="left",
                       padding_value=stop_ids[0])
    mask = torch.arange(ids.shape[1]) >= ids.shape[1] - torch.tensor([[len(p)] for p in prompts])
    add_logprobs = way.endswith("log-probs")
    with torch.no_grad():
        output = model.generate(
            input_ids=ids.to(model.device), attention_mask=mask.long().to(model.device),
            do_sample=True, temperature=1.0, top_k=0, top_p=1.0, num_return_sequences=n,
            max_new_tokens=max_tokens, eos_token_id=stop_ids, pad_token_id=stop_ids[0],
            return_dict_in_generate=add_logprobs, output_scores=add_logprobs)
        if add_logprobs:
            logprobs = model.compute_transition_scores(output.sequences, output.scores,
                                                       normalize_logits=True).cpu()
            output = output.sequences
    tokens = output[:, ids.shape[1]:].cpu()
    if add_logprobs and logprobs.shape != tokens.shape:
        raise SystemExit(f"{tuple(tokens.shape)} tokens, but {tuple(logprobs.shape)} log-probs")
    # tokens before the first that ends a response
    before = (torch.isin(tokens, torch.tensor(stop_ids)).cumsum(1) == 0).sum(1)
    return (before + 1).clamp(max=tokens.shape[1]).tolist()


def measure(case: tuple, rounds: int) -> dict[str, list[tuple[float, float, float]]]:
    """Tokens a second, mean length and seconds of each round of each way."""
    model, tokenizer, prompts, n, max_tokens = case
    rows = defaultdict(list)
    for way in WAYS:
        sample_lengths(way, model, tokenizer, prompts[:4], n, max_tokens, rounds)
    for seed in range(rounds):
        for way in WAYS[seed % 3:] + WAYS[:seed % 3]:
            start = time.perf_counter()
            lengths = sample_lengths(way, model, tokenizer, prompts, n, max_tokens, seed)
            seconds = time.perf_counter() - start
            rows[way].append((sum(lengths) / seconds, statistics.mean(lengths), seconds))
    return rows


def main() -> None:
    """Measure each model, print the table and whether the goal is met."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--models", nargs="+",
                        default=["toy/base", "random", "sums-32", "sums-256"],
                        help="directories, or `random`, `hybrid`, `mamba`, `sums-ROWS`")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--n", type=int, default=16, help="responses a prompt")
    parser.add_argument("--prompts", type=int, default=48)
    parser.add_argument("--max-tokens", type=int, default=96)
    parser.add_argument("--random-prompts", type=int, default=8)
    parser.add_argument("--random-max-tokens", type=int, default=256)
    args = parser.parse_args()
    os.chdir(ROOT)
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    print("| model | parameters | responses x most tokens | generated by | tokens/s, median (least "
          "to most) | seconds | mean length | ours / this |\n|---|---|---|---|---|---|---|---|")
    ratios = {}
    for name in args.models:
        case = load_case(name, args)
        rows = measure(case, args.rounds)
        ours = [speed for speed, *_ in rows[WAYS[0]]]
        for way in WAYS:
            speeds, lengths, seconds = zip(*rows[way], strict=True)
            rounds = [mine / other for mine, other in zip(ours, speeds, strict=True)]
            ratio = statistics.median(ours) / statistics.median(speeds)
            if way != WAYS[0]:
                ratios[name] = min(ratio, ratios.get(name, ratio))
            print(f"| {name} | {case[0].num_parameters() / 1e6:.1f}M | {len(case[2]) * case[3]} x "
                  f"{case[4]} | {way} | {statistics.median(speeds):,.0f} "
                  f"({min(speeds):,.0f} to {max(speeds):,.0f}) | "
                  f"{statistics.median(seconds):.2f} | {statistics.mean(lengths):.1f} | "
                  f"{ratio:.2f} ({min(rounds):.2f} to {max(rounds):.2f}) |", flush=True)
    goals = {name: GOALS.get(name, 1.5) for name in ratios}
    print("\ntokens/s of model.generate's, the quicker of its two: " + ", ".join(
        f"{name} {ratio:.2f} (goal {goals[name]})" for name, ratio in ratios.items()))
    sys.exit(any(ratio < goals[name] for name, ratio in ratios.items()))


if __name__ == "__main__":
    main()
