"""forks/: every patch applies, is small, does what its equation says, and trains."""

import json
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from importlib import import_module
from pathlib import Path

import pytest
import torch
from conftest import TINY, make_group, mean_mismatch, read_rows
from transformers import (AttentionInterface, AttentionMaskInterface, AutoConfig,
                          AutoModelForCausalLM, AutoTokenizer)

pytestmark = pytest.mark.house
ROOT = Path(__file__).parent.parent
FORKS = sorted(path.stem for path in ROOT.glob("forks/*.patch"))
LOGGED = {  # a metric of its own, or one that it changes
    "band_pass": "groups/kept", "batch_std": "actor/loss", "cispo": "actor/weight_clip_frac", "curriculum": "retired",
    "dr_grpo": "actor/loss", "geometric_mask": "actor/geometric_mask_frac",
    "gspo": "actor/clip_frac_low", "high_entropy": "actor/high_entropy_frac",
    "icepop": "actor/icepop_mask_frac", "kl_cov": "actor/kl_cov_frac",
    "leave_one_out": "actor/loss", "one_step_ahead": "actor/mismatch_kl",
    "router_aux_loss": "actor/router_aux_loss", "weighted_reinforce": "actor/loss"}
LIMITS = {"one_step_ahead": 60, "router_aux_loss": 60}  # changed lines, 40 otherwise


def apply_fork(name: str, copy: Path) -> None:
    """Make `copy` a copy of what a run needs, with the patch applied."""
    copy.mkdir()
    for path in [*ROOT.glob("*.py"), ROOT / "config.yaml"]:
        shutil.copy(path, copy)
    for folder in ("infra", "toy"):
        shutil.copytree(ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__"))
    result = subprocess.run(["git", "apply", "--verbose", str(ROOT / f"forks/{name}.patch")],
                            cwd=copy, capture_output=True, text=True, check=False,
                            env=os.environ | {"GIT_CEILING_DIRECTORIES": str(copy.parent)})
    assert result.returncode == 0, f"forks/{name}.patch: refresh it, see forks/README.md\n" + (
        result.stderr)


@pytest.fixture
def fork(request, tmp_path, monkeypatch):
    """The directory of a copy of the repository with the patch `request.param` applied, whose
    modules are what `import` gives during the test."""
    copy = tmp_path / "copy"
    apply_fork(request.param, copy)
    before, names = dict(sys.modules), {"infra", *(path.stem for path in copy.glob("*.py"))}
    for name in before:
        if name.split(".")[0] in names:
            del sys.modules[name]
    monkeypatch.syspath_prepend(copy)
    monkeypatch.chdir(copy)
    for attentions in (AttentionInterface, AttentionMaskInterface):  # the copy puts its own there
        monkeypatch.setattr(attentions, "_global_mapping", dict(attentions._global_mapping))
    yield copy
    for name in list(sys.modules):
        if name.split(".")[0] in names:
            del sys.modules[name]
    sys.modules.update(before)


def of_fork(name: str):
    return pytest.mark.parametrize("fork", [name], indirect=True, ids=[name])


def tensor(*rows):
    return torch.tensor(rows, dtype=torch.float64)


def test_there_are_at_least_ten_forks_and_each_is_tested():
    assert len(FORKS) >= 10 and LOGGED.keys() == set(FORKS)
    source = Path(__file__).read_text()
    assert all(f'@of_fork("{name}")' in source for name in FORKS)


def changed_lines(name: str) -> list[str]:
    """The removed and added lines of a patch, with their sign."""
    lines = (ROOT / f"forks/{name}.patch").read_text().splitlines()
    return [line for line in lines if re.match(r"[+-](?!\+\+ |-- )", line)]


@pytest.mark.parametrize("name", FORKS)
def test_a_fork_has_few_changed_lines_a_source_and_no_new_key(name):
    changed = changed_lines(name)
    added = [line[1:] for line in changed if line[0] == "+"]
    assert 0 < len(changed) <= LIMITS.get(name, 40) and max(map(len, added)) <= 100
    assert any(re.search(r"# .*(arXiv|https://)", line) for line in added)
    removed_keys, added_keys = (re.findall(rf"^\{sign}  (\w+): ", "\n".join(changed), re.MULTILINE)
                                for sign in "-+")
    assert added_keys == removed_keys  # values in config.yaml may change


def test_the_table_has_a_row_for_each_fork_with_its_size():
    rows = re.findall(r"^\| \[`(\w+)`\]\((\w+)\.patch\) \|.* \((\d+)\) \|",
                      (ROOT / "forks/README.md").read_text(), re.MULTILINE)
    assert rows == [(name, name, str(len(changed_lines(name)))) for name in FORKS]


# ---- two at once ---------------------------------------------------------------------------------

# pairs that apply and yet undo each other, by hand
CANCEL = {("batch_std", "dr_grpo"), ("batch_std", "leave_one_out"), ("cispo", "gspo"),
          ("cispo", "kl_cov"), ("gspo", "kl_cov"), ("dr_grpo", "gspo"),
          ("geometric_mask", "icepop")}


def pairs_table(folder: Path) -> str:
    """The table of pairs in forks/README.md: `yes` if the second patch applies after the first,
    `3way` if with `git apply --3way`, `no` otherwise; `undo` for those of `CANCEL`."""
    lines = ["| | " + " | ".join(f"`{name}`" for name in FORKS[1:]) + " |",
             "|---" * len(FORKS) + "|"]

    def git(*arguments: str) -> bool:
        return not subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=b", *arguments],
                                  cwd=folder, capture_output=True, check=False).returncode

    for path in subprocess.run(["git", "ls-files", "*.py", "*.yaml"], cwd=ROOT, text=True,
                               capture_output=True, check=True).stdout.split():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / path, folder / path)
    assert git("init", "-q") and git("add", "-A") and git("commit", "-q", "-m", "all")
    for i, first in enumerate(FORKS[:-1]):
        assert git("apply", "--index", str(ROOT / f"forks/{first}.patch"))
        assert git("commit", "-q", "-m", first)
        cells = [""] * i
        for second in FORKS[i + 1:]:
            patch = str(ROOT / f"forks/{second}.patch")
            word = "yes" if git("apply", "--check", patch) else "no"
            if word == "no" and git("apply", "--3way", patch):
                word = "3way"
            git("reset", "-q", "--hard", "HEAD")
            cells.append("undo" if (first, second) in CANCEL else word)
        git("reset", "-q", "--hard", "HEAD~1")
        lines.append(f"| `{first}` | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def test_the_table_of_pairs_says_which_apply_together(tmp_path):
    """`python tests/test_forks.py` writes it."""
    assert pairs_table(tmp_path) in (ROOT / "forks/README.md").read_text()


# ---- equations, by hand --------------------------------------------------------------------------

@of_fork("gspo")
def test_gspo_has_one_ratio_per_response(fork):
    losses, config = import_module("losses"), import_module("infra.config")
    old, mask = tensor([0, 0], [0, 0]), torch.tensor([[1, 1], [1, 0]])
    logprobs = tensor([math.log(2), math.log(8)], [math.log(0.5), 9]).requires_grad_()
    loss, stats = losses.policy_loss(logprobs, old, tensor([-1], [1]), mask, 0.2, 0.28)
    # sqrt(2 * 8) = 4, bad and more frequent: not clipped; 1/2 of its only token, good: not clipped
    assert loss.squeeze(1).tolist() == pytest.approx([4, -0.5])
    assert stats["ratio"].values.squeeze(1).tolist() == pytest.approx([4, 0.5])
    losses.aggregate(loss, mask, "seq-mean-token-mean").backward()
    # equation 10: -A s / |o|, by 2 responses
    assert logprobs.grad.flatten().tolist() == pytest.approx([1, 1, -0.25, 0])
    actor = config.load_config("config.yaml", []).actor
    assert (actor.clip_ratio_low, actor.clip_ratio_high) == (0.03, 0.04)
    assert actor.loss_agg_mode == "seq-mean-token-mean"


@of_fork("cispo")
def test_cispo_clips_the_weight_and_keeps_the_gradient(fork):
    losses = import_module("losses")
    logprobs = tensor([math.log(ratio) for ratio in (1.0, 1.5, 0.5, 0.5, 1.5)]).requires_grad_()
    advantages, mask = tensor([1, 1, 1, -1, -1]), torch.ones(1, 5)
    loss, stats = losses.policy_loss(logprobs, torch.zeros(1, 5), advantages, mask, 0.2, 0.28)
    assert loss[0].tolist() == pytest.approx(
        [0, -1.28 * math.log(1.5), -0.5 * math.log(0.5), 0.5 * math.log(0.5), 1.28 * math.log(1.5)])
    loss.sum().backward()  # -min(r, 1.28) A; PPO has 0 for the second and the fourth
    assert logprobs.grad[0].tolist() == pytest.approx([-1, -1.28, -0.5, 0.5, 1.28])
    assert stats["weight_clip_frac"].values[0].tolist() == [False, True, False, False, True]
    # the page of a step shows `clip_frac...` as tokens without a gradient
    assert not [name for name in stats if name.startswith("clip_frac")]


@of_fork("leave_one_out")
def test_leave_one_out_compares_with_the_others(fork):
    losses, config = import_module("losses"), import_module("infra.config")
    algorithm = config.load_config("config.yaml", []).algorithm
    advantages = losses.group_advantages(tensor([1, 0, 0, 0]), algorithm.norm_adv_by_std_in_grpo)
    assert advantages[0].tolist() == pytest.approx([1, -1 / 3, -1 / 3, -1 / 3])


@of_fork("weighted_reinforce")
def test_weighted_reinforce_weighs_what_was_right_less(fork):
    losses = import_module("losses")
    # mean 1/4, by hand: 0.1 * 3/4, -1/4; divided by the std, 1/2
    assert losses.group_advantages(tensor([1, 0, 0, 0]), eps=0)[0].tolist() == pytest.approx(
        [0.15, -0.5, -0.5, -0.5])
    assert losses.group_advantages(tensor([1, 0, 0, 0]), norm_by_std=False)[0].tolist() == (
        pytest.approx([0.075, -0.25, -0.25, -0.25]))


@of_fork("band_pass")
@pytest.mark.parametrize("accs, dropped", [
    ([1, 0, 0, 0, 0], ""), ([1, 1, 1, 1, 0], ""), ([1, 1, 1, 1, 1, 0], "not in 0.2 to 0.8"),
    ([1, 0, 0, 0, 0, 0], "not in 0.2 to 0.8"), ([0, 0], "the same acc")])
def test_band_pass_keeps_prompts_of_middling_accuracy(fork, accs, dropped):
    sampling, types = import_module("sampling"), import_module("data_types")
    scores = [types.Score(float(acc), float(acc)) for acc in accs]
    group = types.Group(None, [], scores, [], [])
    reason = sampling.drop_reason(group, "acc")
    assert dropped in reason and bool(dropped) == bool(reason)


@of_fork("batch_std")
def test_batch_std_is_that_of_all_rewards(fork):
    losses = import_module("losses")
    # means 1/2 and 3/2; all four: mean 1, squared deviations 0 + 1 + 4 + 1, by 3: std sqrt(2)
    advantages = losses.group_advantages(tensor([1, 0], [3, 0]), eps=0)
    half = 0.5 / math.sqrt(2)
    assert advantages.flatten().tolist() == pytest.approx([half, -half, 3 * half, -3 * half])


def gradient(monkeypatch, logprobs, entropy=None, overrides=(), **batch):
    """What `compute_loss` makes of these log-probs (B, T): their gradient, times the number of
    tokens, and the statistics by name. The old log-probs are 0 unless given."""
    train_dapo = import_module("train_dapo")
    logprobs = logprobs.clone().requires_grad_()
    entropy = torch.zeros_like(logprobs) if entropy is None else entropy
    monkeypatch.setattr(train_dapo, "response_logprobs", lambda *_: (logprobs, entropy))
    zeros, mask = torch.zeros_like(logprobs), torch.ones_like(logprobs, dtype=torch.bool)
    batch = {"mask": mask, "old_logprobs": zeros, "rollout_logprobs": zeros,
             "advantages": torch.ones_like(logprobs[:, :1])} | batch
    config = import_module("infra.config").load_config("config.yaml", list(overrides))
    num_tokens = batch.pop("num_tokens", int(batch["mask"].sum()))
    num_seqs = int(batch["mask"].any(dim=1).sum())
    loss, stats = train_dapo.compute_loss(config, None, batch, num_tokens, num_seqs)
    loss.backward()
    return logprobs.grad * num_tokens, stats


@of_fork("geometric_mask")
def test_geometric_mask_drops_responses_by_their_mean_mismatch(fork, monkeypatch):
    # The mean of log(pi_old / pi_rollout): 0.0005 in spite of one token; 0.0011; -0.0011; masked 9
    rollout = -tensor([0.5, -0.499], [0.0011, 0.0011], [-0.0022, 0.0], [0.0005, 9])
    mask = torch.tensor([[1, 1], [1, 1], [1, 1], [1, 0]]).bool()
    grad, stats = gradient(monkeypatch, torch.zeros(4, 2, dtype=torch.float64), mask=mask,
                           rollout_logprobs=rollout)
    assert grad.tolist() == [[-1, -1], [0, 0], [0, 0], [-1, 0]]
    assert stats["geometric_mask_frac"].values.flatten().tolist() == [False, True, True, False]
    assert stats["geometric_mean_max"].values.max().item() == pytest.approx(math.exp(0.0011))


@of_fork("icepop")
def test_icepop_weighs_tokens_by_the_ratio_and_drops_those_outside(fork, monkeypatch):
    ratios = [0.4, 0.5001, 1.0, 4.9, 5.1]  # pi_old / pi_rollout, with pi_old = 1
    rollout = -tensor([math.log(ratio) for ratio in ratios])
    grad, stats = gradient(monkeypatch, torch.zeros(1, 5, dtype=torch.float64),
                           rollout_logprobs=rollout)
    assert grad[0].tolist() == pytest.approx([0, -0.5001, -1, -4.9, 0])
    assert stats["icepop_mask_frac"].values[0].tolist() == [True, False, False, False, True]


@of_fork("dr_grpo")
def test_dr_grpo_divides_by_a_constant_length(fork, monkeypatch):
    mask = torch.tensor([[1, 1, 1], [1, 0, 0]]).bool()
    grad, _ = gradient(monkeypatch, torch.zeros(2, 3, dtype=torch.float64), mask=mask,
                       overrides=["data.max_response_length=96"])
    # 4 tokens (what `gradient` multiplies by), 2 responses, 96 tokens at most
    assert grad.flatten().tolist() == pytest.approx([-4 / 2 / 96] * 4 + [0, 0])
    config = import_module("infra.config").load_config("config.yaml", [])
    assert not config.algorithm.norm_adv_by_std_in_grpo


@of_fork("high_entropy")
def test_high_entropy_trains_only_tokens_that_reach_the_threshold(fork, monkeypatch):
    entropy = tensor([0.1, 0.9, 0.5, 2.0], [0.2, 3.0, 0.6, 9.0])
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]]).bool()
    grad, stats = gradient(monkeypatch, torch.zeros(2, 4, dtype=torch.float64), entropy, mask=mask,
                           tau=2.0, num_tokens=2)
    assert grad.tolist() == [[0, 0, 0, -1], [0, -1, 0, 0]]
    assert stats["high_entropy_frac"].values.sum() == 2
    assert stats["high_entropy_tau"].values.unique().tolist() == [2.0]


@of_fork("high_entropy")
def test_high_entropy_divides_by_the_number_of_its_tokens(fork, make_state, monkeypatch):
    train_dapo, divisors = import_module("train_dapo"), set()
    compute_loss = train_dapo.compute_loss

    def compute_and_keep(config, policy, batch, num_tokens, num_seqs):
        divisors.add(num_tokens)
        return compute_loss(config, policy, batch, num_tokens, num_seqs)
    monkeypatch.setattr(train_dapo, "compute_loss", compute_and_keep)
    update_gradient(make_state, 60)
    assert divisors == {25}  # 20% of 5 + 8 + ... + 26 = 124


@of_fork("kl_cov")
def test_kl_cov_penalises_the_tokens_with_the_largest_covariance(fork, monkeypatch):
    logprobs, advantages = tensor([-0.5, -2.5], [-1.0, -4.0]), tensor([1], [-3])
    # means -2 and -1: (1.5)(2) = 3, (-0.5)(2) = -1, (1)(-2) = -2, (-2)(-2) = 4
    grad, stats = gradient(monkeypatch, logprobs, advantages=advantages, old_logprobs=logprobs - 1,
                           kl_cov=(-2.0, -1.0, 3.0))
    assert stats["cov"].values.tolist() == [[3, -1], [-2, 4]]
    assert stats["kl_cov_frac"].values.tolist() == [[True, False], [False, True]]
    # -A r without a clip, and +1 where penalised: the log-prob has risen by 1
    e = math.e
    assert grad.flatten().tolist() == pytest.approx([1 - e, -e, 3 * e, 1 + 3 * e])


def make_mini_batch(prompts: list) -> list:
    """Eight samples of 5, 8, ..., 26 tokens."""
    generator, samples = torch.Generator().manual_seed(0), []
    for i, prompt in enumerate(prompts[:8]):
        ids = torch.randint(3, 20, (5 + 3 * i,), generator=generator)
        zeros = torch.zeros(len(ids), dtype=torch.float64)
        samples.append(import_module("data_types").Sample(
            prompt.token_ids, ids.numpy(), (-1.0) ** i * (i + 1), rollout_logprobs=zeros,
            old_logprobs=zeros - 2, key=(i, 0)))
    return samples


def update_gradient(make_state, max_tokens: int, *overrides: str,
                    double: bool = True) -> tuple[list, dict]:
    """The gradient of `update_policy` on the same mini-batch, and the step's statistics."""
    state, prompts = make_state(f"actor.max_tokens_per_micro_batch={max_tokens}", *overrides,
                                double=double)
    record, grads = import_module("infra.metrics").StepRecord(1, state.config), []
    state.optimizer.step = lambda: grads.extend(p.grad.clone() for p in state.policy.parameters())
    record.add_update(import_module("train_dapo").update_policy(state, make_mini_batch(prompts), 1))
    return grads, record.reduce_stats(state.accelerator)


@pytest.mark.parametrize(("fork", "metric", "share"), [
    ("high_entropy", "high_entropy_frac", 25 / 124), ("kl_cov", "kl_cov_frac", 1 / 124)],
    indirect=["fork"])
def test_the_share_is_that_of_the_mini_batch_however_it_is_split(fork, make_state, metric, share):
    whole, stats = update_gradient(make_state, 10_000, "model.attn_implementation=eager")
    split, stats_split = update_gradient(make_state, 60, "model.attn_implementation=eager")
    assert stats[metric] == stats_split[metric] == pytest.approx(share)  # of 5 + 8 + ... + 26 tokens
    assert all(torch.allclose(a, b) for a, b in zip(whole, split, strict=True))


@of_fork("curriculum")
def test_solved_prompts_leave_the_stream(fork, make_state, train_steps, fake_rollouts):
    state, prompts = make_state("total_training_steps=3", "data.train_batch_size=2",
                                "data.gen_batch_size=4", "rollout.n=10",
                                "actor.ppo_mini_batch_size=10")
    prompts = prompts[:8]
    solved = [1] * 9 + [0]
    accuracies = {0: solved, 5: solved, 1: [1] * 10, 2: [0] * 10}  # others: half of the time
    batches = fake_rollouts(lambda position: accuracies.get(position, [1] * 5 + [0] * 5))
    steps = train_steps(state, prompts)
    sampling, counters = import_module("sampling"), steps[-1].metrics
    order = [sampling.prompt_at(prompts, position, 0) for position in range(16)]
    gone = {order[0].id, order[1].id, order[5].id}
    expected = [position for position in range(8, 16) if order[position].id not in gone]
    assert batches == [[0, 1, 2, 3], [4, 5, 6, 7], expected[:4]]
    assert [step.metrics["retired"] for step in steps] == [2, 3, 3]
    assert steps[2].metrics["prompts_drawn"] == expected[3] + 1
    # what this step has generated so far decides too
    counters = counters | {"prompts_drawn": 7, "retired": []}
    generated = [make_group(7, order[7], [1] * 10), make_group(7, order[9], solved)]
    drawn = sampling.draw_prompts(prompts, state.config, counters, generated, 0)
    assert [prompt.position for prompt in drawn] == [
        position for position in range(8, 16)
        if order[position].id not in {order[7].id, order[9].id}][:4]
    counters["retired"] = [prompt.id for prompt in prompts]
    with pytest.raises(ValueError, match="all training prompts are retired"):
        sampling.draw_prompts(prompts, state.config, counters, [], 0)


# ---- routers of experts --------------------------------------------------------------------------

def make_experts(path: Path) -> str:
    """A tiny model with two layers of four experts, two for each token."""
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "toy/base")
    config = AutoConfig.for_model(
        "qwen3_moe", vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48,
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
        num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16,
        max_position_embeddings=256, bos_token_id=None, pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    for weight in model.parameters():
        if weight.dim() > 1:
            torch.nn.init.normal_(weight, std=0.15)  # tokens go to different experts
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return f"model.path={path}"


@of_fork("router_aux_loss")
def test_the_load_balancing_loss_by_hand(fork):
    load_balancing_loss, log3 = import_module("infra.experts").load_balancing_loss, math.log(3)
    logits = tensor([log3, 0], [0, log3], [log3, 0], [log3, 0], [1, 0])  # 3/4 and 1/4; padding
    # Sequence 0: each expert once, mean probabilities 1/2: 2 (1/2 1/2 + 1/2 1/2) = 1, balanced.
    # Sequence 1: expert 0 twice, mean probability 3/4: 2 (1 3/4 + 0) = 3/2.
    losses = load_balancing_loss(logits, torch.tensor([0, 0, 1, 1, 2]), 2, top_k=1)
    assert losses.tolist() == pytest.approx([1.0, 1.5])
    losses = load_balancing_loss(logits, torch.tensor([0, 0, 1, 1, 2]), 2, top_k=2)
    assert losses.tolist() == pytest.approx([2.0, 2.0])  # with both experts, nothing is uneven


@of_fork("router_aux_loss")
def test_the_load_balancing_loss_of_a_sequence_is_transformers_own(fork, make_state, tmp_path):
    from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func
    experts, batching = import_module("infra.experts"), import_module("infra.batching")
    state, prompts = make_state(make_experts(tmp_path / "base"))
    samples, expected = make_mini_batch(prompts), []  # one layer: its own joins several
    for sample in samples:
        ids = torch.tensor([[*sample.prompt_ids, *sample.response_ids.tolist()]])
        logits = state.policy(input_ids=ids, output_router_logits=True).router_logits
        expected += [load_balancing_loss_func((layer,), 4, 2).item() for layer in logits]
    for packing in ("", "varlen"):
        batch = batching.collate(samples, 0, packing=packing)
        with experts.record_routing(state.policy) as routing:
            state.policy(input_ids=batch["input_ids"], **batch["packing_kwargs"])
        losses = [experts.load_balancing_loss(logits, batch["sequence_index"], 8, router.top_k)
                  for router, logits in routing.items()]
        assert torch.stack(losses, dim=1).flatten().tolist() == pytest.approx(expected, rel=1e-5)


@of_fork("router_aux_loss")
def test_the_gradient_of_the_load_balancing_loss_does_not_depend_on_the_split(
        fork, make_state, tmp_path, monkeypatch):
    path, train_dapo = make_experts(tmp_path / "base"), import_module("train_dapo")

    def norm(grads: list) -> float:
        return torch.stack([grad.norm() for grad in grads]).norm().item()

    def find(coef: float, max_tokens: int = 10_000, attention: str = "auto") -> list:
        monkeypatch.setattr(train_dapo, "ROUTER_AUX_LOSS_COEF", coef)
        grads, stats = update_gradient(make_state, max_tokens, path,  # experts take no float64
                                       f"model.attn_implementation={attention}", double=False)
        assert 2 < stats["router_aux_loss"] < 4  # 2 experts of 4: balanced, and all to the same two
        return grads
    whole = find(0.5)
    for same in (find(0.5, 120), find(0.5, 120, "eager")):  # packed and padded
        assert norm([a - b for a, b in zip(whole, same, strict=True)]) < 1e-4 * norm(whole)
    without = find(0.0)
    assert norm([a - b for a, b in zip(whole, without, strict=True)]) > 0.01 * norm(whole)


@of_fork("router_aux_loss")
def test_a_model_without_experts_has_no_load_balancing_loss(fork, make_state):
    with pytest.raises(ValueError, match="^LlamaForCausalLM has no router of experts$"):
        update_gradient(make_state, 10_000)


# ---- one step ahead ------------------------------------------------------------------------------

# Starts a run whose engine, of transformers, has weights of its own as a server has. Ctrl-C comes
# while the responses of the step that STOP_AT names are written.
OWN_WEIGHTS = """
import os, signal
from dataclasses import replace
import infra.setup

def make_engine(config, accelerator, policy, tokenizer, transformers_engine):
    model = infra.setup.copy_without_weights(policy, config, accelerator.device)
    engine = transformers_engine(model, tokenizer, accelerator.autocast, 1024, has_own_weights=True)

    def generate(*args, progress):
        if progress == os.environ.get("STOP_AT"):
            os.kill(os.getpid(), signal.SIGINT)
        return engine.generate(*args, progress=progress)
    return replace(engine, generate=generate, sleep=lambda: None)  # as servers, it generates at any time

infra.setup.make_engine = make_engine
if __name__ == "__main__":
    import train_dapo
    train_dapo.main()
"""
CORRECTED = "rollout.correction=token"


@pytest.fixture
def make_ahead(fork, make_state):
    """`make_ahead("key=value", ...)`: a state and prompts, the engine with weights of its own."""
    def make_ahead(*overrides: str):
        (fork / "own_weights.py").write_text(OWN_WEIGHTS)
        import_module("own_weights")
        state, prompts = make_state(CORRECTED, *overrides)
        import_module("infra.setup").sync_weights(state)
        return state, prompts
    yield make_ahead
    sys.modules.pop("own_weights", None)


@of_fork("one_step_ahead")
def test_ahead_each_step_is_written_while_the_one_before_trains(make_ahead, train_steps,
                                                                monkeypatch):
    state, prompts = make_ahead("total_training_steps=4", "actor.lr_warmup_steps=0")
    train_dapo = import_module("train_dapo")
    written, training, writing = [], threading.Event(), threading.Event()
    generate, update, sync = train_dapo.generate, train_dapo.update_policy, train_dapo.sync_weights
    weights = [{name: value.clone() for name, value in state.policy.state_dict().items()}]

    def generate_and_keep(state, prompts, params, stream, description):
        if description == "step 2":
            writing.set()
            assert training.wait(60)
        if description.startswith("step"):
            written.append((description, [prompt.position for prompt in prompts]))
        return generate(state, prompts, params, stream, description)

    def update_once_writing(*args):
        training.set()
        assert writing.wait(60)
        return update(*args)

    def sync_and_keep(state):
        sync(state)
        weights.append({name: value.clone() for name, value in state.policy.state_dict().items()})
    monkeypatch.setattr(train_dapo, "generate", generate_and_keep)
    monkeypatch.setattr(train_dapo, "update_policy", update_once_writing)
    monkeypatch.setattr(train_dapo, "sync_weights", sync_and_keep)
    start = time.perf_counter()
    steps = train_steps(state, prompts)
    # no second counts twice, though steps share some
    assert sum(step.metrics["time/step"] for step in steps) <= time.perf_counter() - start

    # the stream's order, without a gap; nothing of a fifth step
    assert [at for _, positions in written for at in positions] == list(
        range(steps[-1].metrics["prompts_drawn"]))
    drawn = {step: max(positions) + 1 for step, positions in written}
    assert drawn == {f"step {step.metrics['step']}": step.metrics["prompts_drawn"]
                     for step in steps}
    # after training steps 0, 0, 1, 2 (and not one more): the sampler's log-probs are recomputed
    groups = {step.metrics["step"]: step.groups for step in steps}
    for step, after in ((1, 0), (2, 0), (3, 1), (4, 2)):
        assert mismatch(state, weights[after], groups[step]) < 1e-5
        assert mismatch(state, weights[after + 1], groups[step]) > 1e-3
    assert steps[0].metrics["actor/importance_ratio_max"] == pytest.approx(1, abs=1e-3)
    assert all(step.metrics["actor/importance_ratio_max"] > 1.01 for step in steps[1:])


def mismatch(state, weights: dict, groups: list) -> float:
    """The mean difference of the sampler's log-probs from those under these weights."""
    state.policy.load_state_dict(weights)
    return mean_mismatch(state, [group.prompt.token_ids for group in groups],
                         [group.responses for group in groups])


@of_fork("one_step_ahead")
def test_ahead_the_step_after_a_skipped_one_is_written_by_the_newest_policy(
        make_ahead, train_steps, fake_rollouts, monkeypatch):
    monkeypatch.setattr(import_module("train_dapo"), "check_weight_sync", lambda *_: None)
    state, prompts = make_ahead("total_training_steps=3", "data.gen_batch_size=4",
                                "filter_groups.max_num_gen_batches=1", "filter_groups.at_limit=skip")
    skipped = range(4, 8)  # step 2
    batches = fake_rollouts(lambda at: [1, 0, 0, 0] if at not in skipped else [1, 1, 1, 1])
    steps = train_steps(state, prompts)
    assert batches == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
    assert [step.metrics["prompts_drawn"] for step in steps] == [4, 8, 12]
    assert [step.metrics["groups/trained"] for step in steps] == [4, 0, 4]


@of_fork("one_step_ahead")
def test_ahead_an_error_of_the_thread_ends_the_run_and_so_does_a_sync_that_does_nothing(
        make_ahead, train_steps, monkeypatch):
    state, prompts = make_ahead()
    sync, train_dapo = state.engine.sync, import_module("train_dapo")
    monkeypatch.setattr(train_dapo, "sync_weights", lambda state: None)
    with pytest.raises(ValueError, match="^step 1: the log-probs .* not have the policy's weights"):
        train_steps(state, prompts)
    sync(import_module("infra.distributed").iter_full_weights(state.policy, tied=True))
    generate = train_dapo.generate

    def generate_once(state, prompts, params, stream, description):
        if description == "step 2":
            raise ConnectionError("the server is gone")
        return generate(state, prompts, params, stream, description)
    monkeypatch.setattr(train_dapo, "generate", generate_once)
    with pytest.raises(OSError, match="^the server is gone$"):
        train_steps(state, prompts)


@of_fork("one_step_ahead")
def test_ahead_what_it_needs_is_named_in_one_line(make_ahead, make_state):
    with pytest.raises(SystemExit, match="^error: writing one step ahead needs "
                       "rollout.correction=token or sequence, rollout.mode=server$"):
        make_state()
    for override, need in (("rollout.correction=off", "rollout.correction=token or sequence"),
                           ("algorithm.use_kl_in_reward=true", "algorithm.use_kl_in_reward=false")):
        with pytest.raises(SystemExit, match=f"^error: writing one step ahead needs {need}$"):
            make_ahead(override)


@of_fork("one_step_ahead")
def test_ahead_the_thread_does_not_keep_the_process_from_ending(fork):
    code = "import time; from infra.distributed import start_thread; start_thread(time.sleep, 999)"
    subprocess.run([sys.executable, "-c", code], cwd=fork, timeout=300, check=True)


@pytest.mark.slow
def test_ahead_several_processes_are_refused(tmp_path):
    copy = tmp_path / "copy"
    apply_fork("one_step_ahead", copy)
    (copy / "own_weights.py").write_text(OWN_WEIGHTS)
    result = subprocess.run(
        [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2",
         "--main_process_port", "29747", "own_weights.py", "--config", "config.yaml",
         "run_dir=run", CORRECTED, *TINY], cwd=copy, capture_output=True, text=True, timeout=300,
        check=False)
    assert result.returncode and "error: writing one step ahead needs one training process\n" in (
        result.stderr)


@pytest.mark.slow
def test_ahead_a_run_that_is_stopped_and_resumed_is_the_uninterrupted_one(tmp_path):
    copy = tmp_path / "copy"
    apply_fork("one_step_ahead", copy)
    (copy / "own_weights.py").write_text(OWN_WEIGHTS)
    options = [CORRECTED, "total_training_steps=4", "data.gen_batch_size=auto", "save_rollouts=99"]
    whole = run(copy, "whole", *options, script="own_weights.py")
    # step 3 is being written while step 2 trains: that step ends, then the run
    stopped = run(copy, "parts", *options, script="own_weights.py", STOP_AT="step 3")
    assert [row["step"] for row in stopped] == [0, 1, 2]
    (checkpoint,) = (copy / "parts/checkpoints").iterdir()
    assert checkpoint.name == "step_00002" and (checkpoint / "ahead.pickle").stat().st_size > 10**3
    counters = json.loads((checkpoint / "progress.json").read_text())["counters"]
    assert counters["prompts_drawn"] == whole[2]["prompts_drawn"]
    parts = run(copy, "parts", *options, script="own_weights.py")
    for ours, theirs in zip(parts, whole, strict=True):
        assert {key: value for key, value in ours.items() if not key.startswith(TIMES)} == {
            key: value for key, value in theirs.items() if not key.startswith(TIMES)}
    for file in (*(f"rollouts/step_{step:05d}.jsonl" for step in range(1, 5)),
                 "model/model.safetensors"):
        assert (copy / "parts" / file).read_bytes() == (copy / "whole" / file).read_bytes()


# ---- two steps through the command line ----------------------------------------------------------

TIMES = ("time/", "memory/", "tokens_per_s/")


def run(copy: Path, run_dir: str, *overrides: str, script: str = "train_dapo.py",
        **variables: str) -> list[dict]:
    """The rows that a tiny run in the copy logs. `variables`: more of its environment."""
    command = [sys.executable, script, "--config", "config.yaml", f"run_dir={run_dir}",
               *TINY, *overrides]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    result = subprocess.run(command, cwd=copy, capture_output=True, text=True, timeout=300,
                            env=environment | variables, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    return read_rows(copy / run_dir)


@pytest.mark.slow
@pytest.mark.parametrize("name", FORKS)
def test_a_fork_trains_two_steps_with_the_same_command(name, tmp_path):
    apply_fork(name, tmp_path / "copy")
    script, more = "train_dapo.py", []
    if name == "one_step_ahead":  # it needs a server, or this
        (tmp_path / "copy/own_weights.py").write_text(OWN_WEIGHTS)
        script, more = "own_weights.py", [CORRECTED]
    elif name == "router_aux_loss":  # an untrained model, whose answers are all wrong
        more = [make_experts(tmp_path / "base"), "filter_groups.metric=seq_reward"]
    rows = run(tmp_path / "copy", "run", *more, script=script)
    assert [row["step"] for row in rows] == [0, 1, 2] and rows[-1]["actor/grad_norm"] > 0
    assert all(math.isfinite(row[LOGGED[name]]) for row in rows[1:])


@pytest.mark.slow
@pytest.mark.parametrize("first, second", [
    ("band_pass", "cispo"), ("curriculum", "gspo"), ("high_entropy", "leave_one_out"),
    ("kl_cov", "weighted_reinforce")])
def test_two_forks_that_apply_train_together(first, second, tmp_path):
    copy = tmp_path / "copy"
    apply_fork(first, copy)
    subprocess.run(["git", "apply", str(ROOT / f"forks/{second}.patch")], cwd=copy, check=True,
                   env=os.environ | {"GIT_CEILING_DIRECTORIES": str(tmp_path)})
    rows = run(copy, "run")
    assert [row["step"] for row in rows] == [0, 1, 2] and rows[-1]["actor/grad_norm"] > 0
    assert all(math.isfinite(row[LOGGED[name]]) for row in rows[1:] for name in (first, second))


@pytest.mark.slow
def test_retired_prompts_are_in_the_checkpoint(tmp_path):
    copy = tmp_path / "copy"
    apply_fork("curriculum", copy)
    rows = (copy / "toy/train.jsonl").read_text().splitlines(keepends=True)
    (copy / "few.jsonl").write_text("".join(rows[:12]))
    (copy / "solved.py").write_text(  # about half of the prompts have 92.5% of the answers
        "def score(responses, ground_truth):\n"
        "    accuracies = [1, 1, 1, 0.7] if int(ground_truth) % 2 else [1, 0, 0, 0]\n"
        "    return [{'score': acc, 'acc': acc} for acc in accuracies]\n")
    options = ["data.train_file=few.jsonl", "val.file=", "reward.name=solved.py:score"]
    whole = run(copy, "whole", *options, "total_training_steps=4")
    run(copy, "parts", *options, "total_training_steps=2")
    parts = run(copy, "parts", *options, "total_training_steps=4")
    assert 0 < whole[1]["retired"] < 12 and whole[-1]["prompts_drawn"] > 4 * 6
    assert [row["prompts_drawn"] for row in parts] == [row["prompts_drawn"] for row in whole]
    assert (copy / "parts/rollouts/step_00004.jsonl").read_text() == (
        copy / "whole/rollouts/step_00004.jsonl").read_text()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        table, page = pairs_table(Path(folder)), ROOT / "forks/README.md"
    text = re.sub(r"\| \| `batch_std`.*?\n\n", lambda match: table + "\n\n", page.read_text(),
                  flags=re.DOTALL)
    page.write_text(text)
