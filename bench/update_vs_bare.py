"""The update of a step against a bare forward and backward pass over as many tokens.

    python bench/update_vs_bare.py [--rounds 7] [--models toy/base wide sums]
        [key.sub=value ...]

Tokens of prompts and responses a second, in turn, each prompt counted with each of its responses.
Ours: `train_dapo.update_policy` on all mini-batches of a step's real responses, with clipping,
statistics, and optimizer steps; it computes each prompt once. Bare: the same tokens, prompts
repeated, cut into rows of the mean length, so that nothing is padded, in batches of as many;
cross-entropy, no optimizer. And, to see how much of the difference is what: bare passes over the
rows that ours computes. Models: the embedded task's, one forty times as large, and the pretrained
one of configs/smollm2_135m_sums.yaml (`examples/sums/prepare.py --model` makes it)."""

import argparse
import statistics
import tempfile
import time
from dataclasses import replace

import torch
import torch.nn.functional as F
from harness import make_state

from data_types import Sample, SamplingParams
from infra.batching import make_batch, micro_batches
from infra.metrics import StepRecord, actor_metrics
from infra.packing import packing_kind
from rollout import generate
from sampling import make_groups, mini_batches, prompt_at, score_responses
from train_dapo import compute_advantages, make_samples, update_policy

GOALS = {"toy/base": 1.1, "wide": 1.3, "sums": 2.2}


def bare(state, samples) -> float:
    """Tokens a second of forward and backward passes without padding and without RL, all rows of
    the mean length."""
    stream = torch.cat([torch.tensor([*s.prompt_ids, *s.response_ids.tolist()]) for s in samples])
    length = round(len(stream) / len(samples))
    rows = stream[:len(stream) // length * length].view(-1, length).to(state.accelerator.device)
    actor = state.config.actor
    size = min(actor.max_tokens_per_micro_batch // length, actor.ppo_mini_batch_size)
    return passes(state, [(ids, {}) for ids in rows.split(size)])


def rows_of(state, samples) -> list[tuple[torch.Tensor, dict]]:
    """The rows that the update computes, and the model's arguments for them."""
    actor, batches = state.config.actor, []
    for mini_batch in mini_batches(samples, state.config, step=1):
        batches += [make_batch(state, micro) for micro in micro_batches(
            mini_batch, actor.max_tokens_per_micro_batch, packing=packing_kind(state.policy))]
    return [(batch["input_ids"], batch["packing_kwargs"]) for batch in batches]


def packed(state, samples) -> float:
    """The same of the rows as they are."""
    rows = rows_of(state, samples)
    return passes(state, rows) * sum(map(len, samples)) / sum(ids.numel() for ids, _ in rows)


def passes(state, batches: list[tuple[torch.Tensor, dict]]) -> float:
    """Tokens a second, of cross-entropy and its gradients."""
    state.policy.zero_grad()
    finish()
    start = time.perf_counter()
    for ids, arguments in batches:
        with state.accelerator.autocast():
            logits = state.policy(input_ids=ids, use_cache=False, **arguments).logits
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())
        state.accelerator.backward(loss)
    finish()
    seconds = time.perf_counter() - start
    state.policy.zero_grad()
    return sum(ids.numel() for ids, _ in batches) / seconds


def finish() -> None:
    """Wait for the GPU, where there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def ours(state, samples) -> float:
    """Tokens a second of the update phase."""
    record = StepRecord(1, state.config)
    finish()
    start = time.perf_counter()
    for mini_batch in mini_batches(samples, state.config, step=1):
        record.add_update(update_policy(state, mini_batch, step=1))
    actor_metrics(state.accelerator, record, 0.0)
    finish()
    return record.trained_tokens / (time.perf_counter() - start)


def make_wide(folder: str) -> str:
    """A directory with an untrained model of the base model's kind, vocabulary and tokenizer, forty
    times as large."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    config = AutoConfig.from_pretrained("toy/base", hidden_size=320, intermediate_size=1280,
                                        num_hidden_layers=5, num_attention_heads=5,
                                        num_key_value_heads=5, head_dim=64)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained("toy/base").save_pretrained(folder)
    return folder


def main() -> None:
    """Measure all models, each in turn with and without RL; print medians, spread and whether the
    goal is met."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--models", nargs="+", default=[*GOALS], choices=GOALS)
    parser.add_argument("overrides", nargs="*")
    args = parser.parse_intermixed_args()
    fixed = ["val.file=", "actor.lr=1e-9"]
    overrides, runs = [*fixed, *args.overrides], {}
    for name in args.models:
        if name == "sums":
            run = make_state("model.path=examples/sums/base", *fixed,
                             config="configs/smollm2_135m_sums.yaml")
        else:
            run = make_state(*overrides)
        runs[name] = run[0], make_step(*run)
        if name == "wide":  # is not trained: it gets the responses of the embedded task's model
            with tempfile.TemporaryDirectory() as folder:
                state, _ = make_state(f"model.path={make_wide(folder)}", *overrides)
            runs[name] = state, runs[name][1]
    print("| model | parameters | way | tokens/s, median | least and most | ours / way | tokens "
          "computed, of all |\n|---|---|---|---|---|---|---|")
    ratios = {}
    for model, (state, samples) in runs.items():
        share = sum(ids.numel() for ids, _ in rows_of(state, samples)) / sum(map(len, samples))
        ways = {"ours": ours, "bare": bare, "bare, rows as they are": packed}
        rates = {name: [] for name in ways}
        for number in range(args.rounds + 1):
            for name, way in ways.items():
                rates[name] += [way(state, samples)] if number else []  # the first is to warm up
        for name, found in rates.items():
            ratio = statistics.median(a / b for a, b in zip(rates["ours"], found, strict=True))
            if name == "bare":
                ratios[model] = ratio
            print(f"| {model} | {state.policy.num_parameters() / 1e6:.1f}M | {name} | "
                  f"{statistics.median(found):,.0f} | {min(found):,.0f} to {max(found):,.0f} | "
                  f"{ratio:.2f} | {1 if name == 'bare' else share:.2f} |", flush=True)
    print("\nupdate, of bare: " + ", ".join(f"{name} {ratio:.2f}" for name, ratio in ratios.items())
          + f" (goal {', '.join(str(GOALS[name]) for name in ratios)})")
    raise SystemExit(any(ratio < GOALS[name] for name, ratio in ratios.items()))


def make_step(state, data) -> list[Sample]:
    """The samples of a step, with the sampler's log-probs as the old ones."""
    config = state.config
    prompts = [prompt_at(data.train, i, config.seed) for i in range(config.data.train_batch_size)]
    params = SamplingParams(config.rollout.n, config.data.max_response_length,
                            config.rollout.temperature)
    responses = generate(state, prompts, params, "step 1", "step 1")
    scores = score_responses(state, prompts, responses, "step 1")
    groups = make_groups(config, prompts, responses, scores)
    return [replace(sample, old_logprobs=sample.rollout_logprobs)
            for sample in make_samples(config, groups, compute_advantages(config, groups))]


if __name__ == "__main__":
    main()
