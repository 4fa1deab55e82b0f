"""infra/vllm_engine.py on a GPU, where vLLM sleeps: with a stand-in for vLLM alone, so that it runs
without either. Real vLLM is in test_vllm.py; on CPUs it does not sleep."""

import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from test_train import weights_of

import infra.logprobs
import infra.setup
import infra.vllm_engine
from infra.logprobs import check_weight_sync
from infra.setup import make_engine, sync_weights
from infra.vllm_engine import vllm_engine
from rollout import generate

CUMEM = "CUDA Error: out of memory at /workspace/csrc/cumem_allocator.cpp:62"


class StandIn:
    """vLLM's LLM: what it is asked, and whether it sleeps. Asleep it has no weights."""
    def __init__(self, *args, **kwargs):
        self.asleep, self.asked, self.weights = set(), [], None
        self.llm_engine = SimpleNamespace(is_sleeping=lambda: bool(self.asleep),
                                          engine_core=SimpleNamespace(shutdown=None))

    def sleep(self, level):
        assert not self.asleep and level == 2
        self.asleep, self.weights = {"weights", "kv_cache"}, None
        self.asked.append("sleep")

    def wake_up(self, tags):
        self.asleep -= set(tags)

    def collective_rpc(self, method, args):
        assert "weights" not in self.asleep
        self.weights = torch.cat([weight.flatten() for _, weight in args[0]])
        self.asked.append("weights")

    def reset_prefix_cache(self):
        return True


@pytest.fixture
def on_gpu(make_state, monkeypatch):
    """`on_gpu("key=value", ...)`: a state whose engine is vLLM's on a GPU, prompts, the stand-in.
    The trainer's own model writes the responses."""
    def on_gpu(*overrides: str):
        monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(LLM=StandIn))
        state, prompts = make_state(*overrides)
        write = state.engine.generate
        accelerator = SimpleNamespace(device=torch.device("cuda"), num_processes=1)
        engine = vllm_engine(state.config, accelerator, state.tokenizer, [0], state.policy)
        (llm,) = engine.generate.args

        def in_process(llm, tokenizer, stop_ids, *args, **kwargs):
            names = [weight.flatten() for weight in state.policy.state_dict().values()]
            assert not llm.asleep and torch.equal(llm.weights, torch.cat(names))
            llm.asked.append("generate")
            return write(*args, **kwargs)

        def passes(*args, original=infra.logprobs.response_logprobs):
            llm.asked.append("pass, asleep" if llm.asleep else "pass, awake")
            return original(*args)

        monkeypatch.setattr(infra.vllm_engine, "generate_in_process", in_process)
        monkeypatch.setattr(infra.logprobs, "response_logprobs", passes)
        return replace(state, engine=engine), prompts, llm
    return on_gpu


def test_vllm_sleeps_while_the_trainer_computes_log_probs_and_wakes_with_the_policys_weights(
        on_gpu, train_steps):
    """In the check of the weight sync, and for the KL term of the reward in the middle of a step."""
    state, prompts, llm = on_gpu("algorithm.use_kl_in_reward=true", "rollout.correction=token",
                                 "filter_groups.max_num_gen_batches=2")
    sync_weights(state)
    check_weight_sync(state, prompts, generate)
    assert llm.asked == ["weights", "generate", "sleep", "pass, asleep"]
    before = weights_of(state)
    train_steps(state, prompts)
    assert "pass, asleep" in llm.asked and "pass, awake" not in llm.asked
    assert any(not torch.equal(a, b) for a, b in zip(before, weights_of(state), strict=True))
    # woken before it generates, once at the end of the step, and never asleep twice
    text = " ".join(llm.asked).replace("pass, asleep ", "")
    assert "sleep weights generate" in text and "sleep sleep" not in text


@pytest.mark.parametrize("wake_up", [True, False])
def test_running_out_of_memory_in_vllm_is_the_line_of_that_phase(on_gpu, wake_up, monkeypatch):
    state, prompts, llm = on_gpu()
    sync_weights(state)

    def exhausted(*args, **kwargs):
        raise RuntimeError(CUMEM)
    if wake_up:
        state.engine.sleep()
        llm.wake_up = exhausted
    else:
        monkeypatch.setattr(infra.vllm_engine, "generate_in_process", exhausted)
    with pytest.raises(ValueError, match="out of memory in phase generate: lower "
                                         "rollout.max_num_seqs.*CUDA Error") as error:
        check_weight_sync(state, prompts, generate)
    assert "\n" not in str(error.value)


def test_the_processes_of_an_engine_are_on_one_machine(make_state, monkeypatch):
    """8 on 2 machines: 8 is a multiple of 8, but a machine has 4."""
    state, _ = make_state()
    state.config.rollout.backend, state.config.rollout.tensor_parallel_size = "vllm", 8
    monkeypatch.setattr(infra.setup, "find_spec", lambda name: name)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    with pytest.raises(ValueError, match="tensor_parallel_size=8 does not divide the number of "
                                         "processes on a machine, 4"):
        make_engine(state.config, SimpleNamespace(num_processes=8), state.policy, state.tokenizer,
                    None)
