"""Memory that is known beforehand, and running out of it: one line, and the checkpoint is whole."""

import os
import platform
import re
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from conftest import ROOT, TINY, read_rows
from test_distributed import LAUNCH
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedConfig,
)

import evaluate
import infra.checkpoint
import infra.memory
import infra.setup
import rollout
import train_dapo
from infra.checkpoint import find_corruption, list_checkpoints
from infra.config import load_config
from infra.memory import estimate_memory
from infra.setup import load_model

CUDA = ("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.11 GiB of "
        "which 1.00 GiB is free.")


def test_the_first_lines_say_what_memory_the_run_will_need(make_state, capsys):
    make_state()
    printed = capsys.readouterr().out
    assert re.search(r"memory of each process, about: .* to generate \(weights .*, optimizer .*, "
                     r"engine .*\), .* to update \(.*activations .*, output head .*\), of .* GB\n",
                     printed)
    assert "may not suffice" not in printed


def test_a_warning_says_what_to_lower_if_it_is_more_than_there_is(make_state, capsys, monkeypatch):
    monkeypatch.setattr(infra.memory.psutil, "virtual_memory", lambda: SimpleNamespace(total=8 * 10**6))
    make_state("rollout.max_num_seqs=4")
    assert "may not suffice to update: lower actor.max_tokens" in capsys.readouterr().out
    make_state("actor.max_tokens_per_micro_batch=10")
    assert "may not suffice to generate: lower rollout.max_num_seqs" in capsys.readouterr().out


# ---- the estimate ----

def parts(overrides=(), model=None, **kwargs):
    config = load_config("config.yaml", ["rollout.max_num_seqs=64", *overrides])
    return estimate_memory(config, model or load_model(config), **kwargs)


def test_only_weights_that_are_trained_have_gradients_and_moments(model):
    full = parts()["update"]
    assert full["weights"] == 4 * sum(p.numel() for p in model.parameters())
    for p in list(model.parameters())[1:]:
        p.requires_grad_(False)
    few = parts(model=model)["update"]
    assert few["optimizer"] == 8 * next(model.parameters()).numel() < full["optimizer"]
    assert few["weights"] == full["weights"]


def test_a_reference_counts_unless_it_is_the_policy_itself(model):
    config = load_config("config.yaml")
    copy = load_model(config)
    sizes = [estimate_memory(config, model, reference)["update"]["reference"]
             for reference in (None, model, copy)]
    assert sizes == [0, 0, 4 * sum(p.numel() for p in copy.parameters())]


def test_ranks_share_what_is_sharded_and_each_generates_with_a_whole_copy():
    one, four = parts(), parts(ranks=4, sharded=True)
    for name in ("weights", "optimizer"):
        assert four["update"][name] == one["update"][name] / 4
    assert four["generate"]["engine"] - one["generate"]["engine"] == one["update"]["weights"]
    assert parts(ranks=4)["update"]["DDP's buckets"] == one["update"]["weights"]


def test_vllm_takes_its_share_of_a_gpu_and_sleeps_in_the_update():
    both = parts(["rollout.gpu_memory_utilization=0.5"], vllm=True, gpu_memory=80 * 10**9)
    assert both["generate"]["engine"] == 40e9 and both["update"]["engine"] == 0
    served = parts(["rollout.mode=server", "rollout.server_urls=http://localhost:1"])
    assert served["generate"]["engine"] == served["update"]["engine"] == 0


def test_less_at_a_time_takes_less():
    def sums(*overrides):
        return [sum(phase.values()) for phase in parts(overrides).values()]
    plain = sums()
    assert sums("rollout.max_num_seqs=32")[0] < plain[0]
    for lower in ("actor.max_tokens_per_micro_batch=1000", "model.gradient_checkpointing=true"):
        assert sums(lower)[1] < plain[1] and sums(lower)[0] == plain[0]


def test_a_model_with_other_names_has_an_estimate_too():
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=30, n_embd=32, n_layer=2, n_head=2))
    known = parts(model=gpt2)["update"]
    assert known["activations"] > 0
    gpt2.config.get_text_config = lambda **_: PreTrainedConfig()  # no name is known
    assert parts(model=gpt2)["update"] == known
    gemma4 = AutoModelForCausalLM.from_config(AutoConfig.for_model(  # head sizes differ by layer
        "gemma4_text", vocab_size=30, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, hidden_size_per_layer_input=8,
        vocab_size_per_layer_input=30))
    assert parts(model=gemma4)["generate"]["engine"] > 0


def by_formula(model, config, ranks: int, sharded: bool, gpu_memory: int) -> dict[str, float]:
    """What docs/SCALING.md's formulas say of a dense model that generates by transformers and has
    several micro-batches."""
    sizes, P, T = model.config, config.data.max_prompt_length, config.data.max_response_length
    H, L, V = sizes.hidden_size, sizes.num_hidden_layers, sizes.vocab_size
    K = H * sizes.num_key_value_heads // sizes.num_attention_heads
    N, R = sum(p.numel() for p in model.parameters()), ranks if sharded else 1
    body = N - V * H * (1 if sizes.tie_word_embeddings else 2)
    w, c = model.dtype.itemsize, 2 if config.mixed_precision == "bf16" else model.dtype.itemsize
    autocast = w != c and not sharded
    M = config.actor.max_tokens_per_micro_batch
    n = M * T / (P + T)  # the tokens of responses
    C = min(n * V, 2**27 if gpu_memory else 2**25)
    Z = min(n * V, gpu_memory / 64 if gpu_memory else 2**25)
    layer = M * ((8 + 4 * c) * H + 2 * c * (H + K) + 4 * c * sizes.intermediate_size
                 + autocast * (8 + c) * H)
    head = ((4 if c == 4 else 8) * V * H + 4 * C + 4 * max(Z, C) + 2 * c * n * H
            + autocast * c * V * H)
    last = M * (4 + 2 * c) * H
    if config.model.gradient_checkpointing:
        backward = M * L * (w if autocast else c) * H + last + max(head, layer)
    else:
        backward = L * layer + last + head + autocast * c * body
    shared = 3 * w * N / R + w * N * (ranks > 1 and not sharded)  # weights, moments; DDP's buckets
    copy = sharded * c * N
    gathered = sharded * (2 * c + 4) * (body / L + V * H)
    B = config.rollout.max_num_seqs
    cache = 2 * (w if autocast else c) * L * K * B * (P + T)
    return {"generate": shared + copy + cache + (c + 12) * B * V + autocast * c * N,
            "update": shared + copy + w * N / R + gathered + backward}


@pytest.mark.parametrize("gpu_memory", [0, 80 * 10**9])
@pytest.mark.parametrize(("ranks", "sharded"), [(1, False), (8, False), (8, True)])
@pytest.mark.parametrize("checkpointing", ["true", "false"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "autocast"])
@pytest.mark.parametrize(("kind", "shape"), [  # those of Qwen2.5-0.5B and Llama-2-7B
    ("qwen2", (151936, 896, 24, 14, 2, 4864)), ("llama", (32000, 4096, 32, 32, 32, 11008))])
def test_a_dense_models_estimate_is_within_30_percent_of_the_exact_formulas(
        kind, shape, dtype, checkpointing, ranks, sharded, gpu_memory):
    names = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads",
             "num_key_value_heads", "intermediate_size")
    sizes = AutoConfig.for_model(kind, tie_word_embeddings=kind == "qwen2",
                                 **dict(zip(names, shape, strict=True)))
    weights = "float32" if dtype == "autocast" else dtype
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(sizes, dtype=getattr(torch, weights))
    for prompt, response in ((64, 512), (1024, 8192)):
        config = load_config("config.yaml", [
            f"model.dtype={weights}", f"mixed_precision={'bf16' if dtype == 'autocast' else 'no'}",
            f"model.gradient_checkpointing={checkpointing}", f"data.max_prompt_length={prompt}",
            f"data.max_response_length={response}", "actor.max_tokens_per_micro_batch=16384",
            "actor.ppo_mini_batch_size=512", "rollout.max_num_seqs=128"])
        estimate = estimate_memory(config, model, None, ranks, sharded, False, gpu_memory)
        for phase, exact in by_formula(model, config, ranks, sharded, gpu_memory).items():
            assert sum(estimate[phase].values()) == pytest.approx(exact, rel=0.3), phase


def test_the_32b_run_is_within_15_percent_of_its_page():
    """docs/SCALING.md: 42 GB to update; weights and moments, 3.1 GB, stay beside vLLM's share."""
    shape = {"vocab_size": 152064, "hidden_size": 5120, "num_hidden_layers": 64,
             "num_attention_heads": 40, "num_key_value_heads": 8, "intermediate_size": 27648}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen2", **shape))
    config = load_config("configs/dapo_qwen2.5_32b.yaml")
    estimate = estimate_memory(config, model, None, 128, True, True, 80 * 10**9)
    assert sum(estimate["update"].values()) == pytest.approx(42e9, rel=0.15)
    share = config.rollout.gpu_memory_utilization * 80e9
    assert sum(estimate["generate"].values()) - share == pytest.approx(3.1e9, rel=0.15)


def test_a_mixture_counts_the_experts_that_a_token_goes_to():
    shape = {"vocab_size": 30, "hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2,
             "num_key_value_heads": 2, "moe_intermediate_size": 64, "num_experts_per_tok": 2}
    few, many = (AutoModelForCausalLM.from_config(
        AutoConfig.for_model("qwen3_moe", num_experts=experts, **shape)) for experts in (4, 64))
    few, many = parts(model=few)["update"], parts(model=many)["update"]
    assert many["weights"] > 5 * few["weights"]
    assert many["activations"] < 2 * few["activations"]


# ---- out of memory ----

def exhausted(*args, **kwargs):
    raise torch.OutOfMemoryError(CUDA)


@pytest.fixture(scope="module")
def master(tmp_path_factory):
    return tmp_path_factory.mktemp("master") / "run"


@pytest.fixture
def out_of(monkeypatch, start, master, tmp_path):
    """`out_of(module, name)`: resumes a run, trained once, of which `name` runs out of memory then;
    returns its message."""
    def out_of(module, name: str) -> str:
        common = ["val.file=", "save_every=1"]
        if not master.exists():
            start(*common, "total_training_steps=1").rename(master)
        shutil.copytree(master, tmp_path / "run")
        original, calls = getattr(module, name), []

        def first_works(*args):  # the weight sync of the start
            calls.append(name)
            return original(*args) if len(calls) == 1 else exhausted()
        monkeypatch.setattr(module, name, first_works if name == "sync_weights" else exhausted)
        with pytest.raises(SystemExit) as error:
            start(*common)
        return str(error.value)
    return out_of


@pytest.mark.parametrize(("module", "name", "phase", "key"), [
    (infra.setup, "load_model", "start", "rollout.gpu_memory_utilization"),
    (train_dapo, "check_weight_sync", "start", "rollout.gpu_memory_utilization"),
    (train_dapo, "add_logprobs", "logprobs", "actor.max_tokens_per_micro_batch"),
    (train_dapo, "compute_loss", "update", "model.gradient_checkpointing=true"),
    (train_dapo, "sync_weights", "sync", "rollout.gpu_memory_utilization")])
def test_out_of_memory_is_one_line_with_the_phase_and_what_to_lower(out_of, tmp_path, module, name,
                                                                    phase, key):
    message = out_of(module, name)
    assert message.startswith(f"error: out of memory in phase {phase}: lower ")
    assert key in message and "Tried to allocate 2.00 GiB" in message and "\n" not in message
    (path,) = list_checkpoints(tmp_path / "run")
    assert path.name == "step_00001" and len(read_rows(tmp_path / "run")) == 1
    if phase != "start":  # where nothing was trained
        assert f"{path} is intact" in message and "last_good_model" in message
        assert (tmp_path / "run/last_good_model/model.safetensors").exists()


@pytest.mark.parametrize("purpose", ["step 2", "validation"])
def test_an_engine_that_is_out_of_memory_says_for_what_it_generated(start, monkeypatch, purpose):
    decode = rollout.decode

    def exhausted_for(*args, **kwargs):
        if doing == [purpose]:
            raise torch.OutOfMemoryError(CUDA)
        return decode(*args, **kwargs)

    doing, generate = [], rollout.generate

    def generate_for(state, prompts, params, stream, description):
        doing[:] = [description]
        return generate(state, prompts, params, stream, description)
    monkeypatch.setattr(rollout, "decode", exhausted_for)
    for module in (train_dapo, evaluate):
        monkeypatch.setattr(module, "generate", generate_for)
    with pytest.raises(SystemExit, match=f"{purpose}: out of memory in phase generate: lower "
                                         "rollout.max_num_seqs"):
        start()


@pytest.mark.slow
def test_one_of_two_ranks_that_is_out_of_memory_ends_both_with_one_line(tmp_path):
    """It takes part in no collective; the other waits in one until the launcher stops it."""
    script = tmp_path / "exhausted.py"
    script.write_text(f"""import sys; sys.path.insert(0, {str(ROOT)!r})
import train_dapo, torch
from accelerate import PartialState
compute, calls = train_dapo.compute_loss, []
def compute_loss(*args):
    calls.append(1)
    if len(calls) > 6 and PartialState().process_index == 1:
        raise torch.OutOfMemoryError({CUDA!r})
    return compute(*args)
train_dapo.compute_loss = compute_loss
train_dapo.main()
""")
    run_dir = tmp_path / "run"
    command = [*LAUNCH, "--config_file", "configs/accelerate_ddp.yaml", "--num_processes", "2",
               str(script), "--config", "config.yaml", f"run_dir={run_dir}", *TINY, "val.file=",
               "save_every=1", "total_training_steps=50"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False,
                            timeout=150)
    line, *again = re.findall(r"error: out of memory.*", result.stderr)
    assert set(again) == {line}  # in the launcher's report
    (path,) = list_checkpoints(run_dir)[:1]
    assert result.returncode and "phase update" in line and "(rank 1)" in line
    assert f"{path} is intact" in line
    assert find_corruption(Accelerator(cpu=True), path) == ""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs GNU's malloc")
def test_the_memory_of_a_freed_tensor_is_kept_for_the_next_one():
    """In a process of its own: what a worker of many tests has allocated is anybody's guess."""
    code = """if True:
        import resource, sys
        import torch
        from infra.memory import keep_freed_memory
        def page_faults() -> int:
            for _ in range(4):
                torch.ones(2**24)  # 16,384 pages
            return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        if sys.argv[1] == "kept":
            keep_freed_memory()
        before = page_faults()
        print(page_faults() - before)
    """
    kept, returned = (int(subprocess.run([sys.executable, "-c", code, mode], cwd=ROOT, check=True,
                                         capture_output=True, text=True).stdout)
                      for mode in ("kept", "returned"))
    assert kept < 2000 and returned > 60_000


@pytest.mark.parametrize("launcher, chosen, expected", [
    ("TORCHELASTIC_RUN_ID", "1", 3), ("ACCELERATE_DYNAMO_BACKEND", "1", 3), (None, None, 3),
    (None, "1", 2), ("TORCHELASTIC_RUN_ID", "4", 2)])
def test_each_process_has_its_share_of_the_cores_unless_the_user_says_otherwise(
        monkeypatch, launcher, chosen, expected):
    """A launcher sets OMP_NUM_THREADS=1 by default, which would slow an optimizer on the CPU
    (fsdp_offload_params); two runs side by side, each told to use one core, would slow each other.
    """
    for name, value in (("TORCHELASTIC_RUN_ID", None), ("ACCELERATE_DYNAMO_BACKEND", None),
                        ("OMP_NUM_THREADS", chosen), (launcher, "no")):
        if name and value:
            monkeypatch.setenv(name, value)
        elif name:
            monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(6))
    accelerator = Accelerator(cpu=True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)  # and all else as it is
    monkeypatch.setattr(infra.setup, "Accelerator", lambda **_: accelerator)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        infra.setup.start_processes(load_config("config.yaml"))
        assert torch.get_num_threads() == expected
    finally:
        torch.set_num_threads(threads)
