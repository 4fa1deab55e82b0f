"""What test_vllm.py and test_vllm_server.py share: one engine and one run for all tests."""

import json
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from conftest import TINY, mean_mismatch
from torch.nn.utils.rnn import pad_sequence
from test_distributed import LAUNCH, ROOT
from test_families import EXPERTS, LINEAR, SIZES, save, small_vision
from transformers import (AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText,
                          Qwen3_5Config)

import infra.vllm_engine
import train_dapo
from data_types import SamplingParams
from infra.config import load_config
from infra.setup import setup, sync_weights
from rollout import transformers_engine

VLLM = ["rollout.backend=vllm", "rollout.max_num_seqs=64"]
COMMON = [*TINY, "save_rollouts=99", "save_every=1", "val.file=", "save_token_stats=false"]
ALL_LOGPROBS = "rollout.correction=token"  # asks for those of every response
STEPS = 8  # of the run `alone`


@pytest.fixture(scope="session")
def engine(tokenizer):
    """vLLM in this process."""
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    # With the tokenizer that stop strings need; each request names its own.
    config = load_config(ROOT / "config.yaml", [*VLLM, "rollout.stop=none"])
    policy = AutoModelForCausalLM.from_pretrained(ROOT / "toy/base")
    engine = infra.vllm_engine.vllm_engine(config, accelerator, tokenizer, [tokenizer.eos_token_id],
                                           policy)
    forget_accelerator()
    yield replace(engine, close=lambda: None)
    engine.close()


@pytest.fixture(scope="session")
def alone(engine, tmp_path_factory):
    """The directory of a run of one process, which writes its responses by the engine."""
    run_dir = tmp_path_factory.mktemp("alone") / "run"
    train_here(engine, run_dir, *COMMON, f"total_training_steps={STEPS}")
    return run_dir


def forget_accelerator():
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@contextmanager
def using(engine, *argv):
    """Inside, what starts vLLM gets `engine` (None: a new one), and a script that runs has the
    arguments `argv`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        patch.setattr(sys, "argv", list(argv) or sys.argv)
        if engine:
            patch.setattr(infra.vllm_engine, "vllm_engine", lambda *_: engine)
        patch.setattr(Accelerator, "end_training", lambda _: None)  # would end vLLM's process group
        yield
    forget_accelerator()


def train_here(engine, run_dir, *overrides):
    """Train in this process, with `engine` or a new one. Returns the rows of metrics.jsonl."""
    arguments = ["--config", "config.yaml", f"run_dir={run_dir}", "rollout.backend=vllm"]
    with using(engine, "train_dapo.py", *arguments, *overrides):
        train_dapo.main()
    return read_metrics(run_dir)


def launch(run_dir, *overrides, processes=1):
    """Start a training as the command line does."""
    options = ["--num_processes", str(processes), *["--multi_gpu"] * (processes > 1)]
    return subprocess.Popen(
        [*LAUNCH, *options, "train_dapo.py", "--config", "config.yaml", f"run_dir={run_dir}",
         *overrides], cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def train_in_two_processes(run_dir, *overrides):
    """Train in two new processes. Returns the rows of metrics.jsonl."""
    trainer = launch(run_dir, *overrides, processes=2)
    output, _ = trainer.communicate(timeout=500)
    assert trainer.returncode == 0 and "Traceback" not in output, output[-3000:]
    return read_metrics(run_dir)


def read_metrics(run_dir):
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def read_rollouts(run_dir, step):
    return (run_dir / f"rollouts/step_{step:05}.jsonl").read_text()


def make_state(run_dir, *overrides):
    """A `TrainState` whose engine has the policy's weights, and token ids of 12 prompts."""
    config = load_config("config.yaml", [f"run_dir={run_dir}", *TINY, *overrides])
    state, data = setup(config, transformers_engine)
    sync_weights(state)
    return state, [prompt.token_ids for prompt in data.train[:12]]


def generate(state, prompts, **params):
    params = SamplingParams(**{"n": 4, "max_tokens": 96, **params})
    return state.engine.generate(prompts, [(7, i) for i in range(len(prompts))], params)


def token_ids(groups):
    return [[response.token_ids.tolist() for response in group] for group in groups]


def assert_same(expected, found):
    """The same responses, with the same log-probs up to rounding."""
    for ours, theirs in zip(expected, found, strict=True):
        for a, b in zip(ours, theirs, strict=True):
            assert a.token_ids.tolist() == b.token_ids.tolist()
            assert (a.text, a.finish_reason) == (b.text, b.finish_reason)
            assert np.abs(a.logprobs - b.logprobs).max() < 1e-4


def make_model(kind, tokenizer, path):
    """A random model of the sizes that vLLM's kernels for CPUs can compute. `vision`: a checkpoint
    with a vision tower, whose language part is a hybrid."""
    sizes = {**SIZES, "head_dim": 32, "hidden_size": 64, "vocab_size": len(tokenizer),
             "bos_token_id": None, "pad_token_id": 0, "eos_token_id": tokenizer.eos_token_id}
    hybrid = {**sizes, **LINEAR, "linear_key_head_dim": 64, "linear_value_head_dim": 64}
    if kind == "vision":
        config = Qwen3_5Config(text_config=hybrid,
                               vision_config={**small_vision(), "out_hidden_size": 64})
        return save(AutoModelForImageTextToText.from_config(config), tokenizer, path)
    options = {"qwen3_moe": {**sizes, **EXPERTS}, "qwen3_5_text": hybrid}.get(kind, sizes)
    config = AutoConfig.for_model(kind, **options)
    return save(AutoModelForCausalLM.from_config(config), tokenizer, path)


def add_noise(policy, seed):
    """Change the weights, as much as some updates do."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))


def largest_difference(state, prompts):
    """Between the engine's log-probs and the policy's, over responses that the engine samples."""
    texts, responses = [], []
    for ids, group in zip(prompts, generate(state, prompts), strict=True):
        responses += [(len(ids), response.logprobs) for response in group]
        texts += [torch.tensor([*ids, *response.token_ids]) for response in group]
    tokens = pad_sequence(texts, batch_first=True).to(state.policy.device)  # on the right: no mask
    with torch.no_grad():
        logprobs = state.policy(tokens).logits[:, :-1].log_softmax(-1)
    logprobs = logprobs.gather(2, tokens[:, 1:, None]).squeeze(2).cpu().numpy()
    return max(np.abs(row[start - 1:start - 1 + len(theirs)] - theirs).max()
               for row, (start, theirs) in zip(logprobs, responses, strict=True))


def mean_difference(state, prompts):
    """The same, on average: in half precision the largest depends on a few unlikely tokens."""
    return mean_mismatch(state, prompts, generate(state, prompts))


def assert_each_sync_arrives(state, prompts, measure=largest_difference, limit=1e-4):
    assert measure(state, prompts) < limit
    for seed in range(2):
        add_noise(state.policy, seed)
        assert measure(state, prompts) > max(0.01, 4 * limit)  # not synced yet
        sync_weights(state)
        assert measure(state, prompts) < limit
