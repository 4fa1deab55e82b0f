"""LoRA: only adapters are trained and saved, and whoever asks for the weights gets merged ones."""

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from conftest import TINY, logprobs_of
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

import infra.setup
import infra.vllm_server
from data_types import Progress, Sample
from infra.checkpoint import save_checkpoint
from infra.config import load_config
from infra.distributed import iter_full_weights
from infra.lora import add_adapters
from infra.setup import copy_without_weights, load_model, make_engine, sync_weights
from rollout import transformers_engine

sys.path.insert(0, str(Path(__file__).parent.parent / "bench"))
from kill_resume import kill_and_resume, run_differences

ROOT = Path(__file__).parent.parent
LORA = ["model.lora_rank=4", "actor.lr=1e-3", "val.file="]
SMALL = {"vocab_size": 32, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2, "n_embd": 32, "n_layer": 2,
         "n_head": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}


def adapters(policy, part="lora_"):
    return {name: weight for name, weight in policy.named_parameters() if part in name}


def move_adapters(policy):
    """As training does: away from the base, whose output they do not change at first."""
    torch.manual_seed(1)
    with torch.no_grad():
        for weight in adapters(policy, "lora_B").values():
            weight.normal_(0, 0.05)


def make_lora(policy, target="all-linear", rank=4):
    config = load_config("config.yaml", [f"model.lora_rank={rank}", f"model.lora_target={target}"])
    return add_adapters(config, policy)


# ---- what is trained -----------------------------------------------------------------------------

@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_models_own_weights_stay_to_the_bit_and_adapters_are_float32(make_state, train_steps,
                                                                         dtype):
    state, prompts = make_state(*LORA, f"model.dtype={dtype}")
    before = {name: weight.clone() for name, weight in adapters(state.policy).items()}
    train_steps(state, prompts)
    base, compared = load_model(state.config).state_dict(), 0
    for name, weight in state.policy.state_dict().items():
        if "lora_" in name:
            assert weight.dtype == torch.float32 and not torch.equal(weight, before[name])
        else:
            assert torch.equal(weight, base[name.replace(".base_layer", "")])
            compared += 1
    assert compared == len(base) and len(before) == 28
    trained = [weight for group in state.optimizer.param_groups for weight in group["params"]]
    assert list(map(id, trained)) == list(map(id, adapters(state.policy).values()))


def test_gradient_checkpointing_changes_no_gradient(make_state):
    found = []
    for checkpointing in ("false", "true"):
        state, _ = make_state(*LORA, f"model.gradient_checkpointing={checkpointing}")
        move_adapters(state.policy)
        logits = state.policy(input_ids=torch.arange(1, 21)[None], use_cache=False).logits
        logits.logsumexp(-1).sum().backward()
        found.append(torch.cat([p.grad.flatten() for p in adapters(state.policy).values()]))
    assert found[0].norm() > 0.1 and torch.allclose(*found, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(("target", "message"), [
    ("query", "query is not in the model. The linear layers are down_proj, gate_proj, .*v_proj$"),
    ("q_proj, mlp", "mlp is not a linear layer"), ("embed_tokens", "is not a linear layer"),
    ("lm_head", "lm_head shares its weight with the input embeddings"), (",", "names no layer")])
def test_a_target_that_does_not_fit_ends_in_one_line(start, target, message):
    with pytest.raises(SystemExit, match=f"^error: model.lora_target.*{message}") as error:
        start(*LORA, f"model.lora_target={target}")
    assert "\n" not in str(error.value)


def test_named_layers_only(model):
    assert make_lora(model, "v_proj,layers.1.mlp.up_proj,1.mlp.up_proj").startswith("LoRA: 3 layers ")
    layers = {name.partition(".lora_")[0] for name in adapters(model)}
    assert layers == {"model.layers.0.self_attn.v_proj", "model.layers.1.self_attn.v_proj",
                      "model.layers.1.mlp.up_proj"}


def test_frozen_layers_get_no_adapters(model):
    """A vision tower's, say."""
    model.model.layers[0].requires_grad_(False)
    make_lora(model)
    assert len(adapters(model)) == 14 and not any("layers.0" in name for name in adapters(model))


def make_tiny(kind, **settings):
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**SMALL, **settings}))


def adapted_leaves(policy) -> set[str]:
    return {name.partition(".lora_")[0].rpartition(".")[2] for name in adapters(policy)}


@pytest.mark.parametrize(("kind", "settings", "left_out"), [
    ("qwen3_moe", {"mlp_only_layers": [0]}, {"gate_proj", "up_proj", "down_proj"}),
    ("qwen3_next", {"num_hidden_layers": 4, "shared_expert_intermediate_size": 16},
     {"gate_proj", "up_proj", "down_proj"}),
    ("llama4_text", {"head_dim": 8, "num_local_experts": 2, "intermediate_size_mlp": 48,
                     "interleave_moe_layer_step": 2}, {"gate_proj", "up_proj", "down_proj"}),
    ("mamba", {"state_size": 8}, {"x_proj", "dt_proj", "out_proj"}),
    ("mamba2", {"num_heads": 8, "head_dim": 8, "state_size": 8, "n_groups": 1}, {"out_proj"}),
    ("bamba", {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1,
               "attn_layer_indices": [1]}, {"out_proj"})])
def test_all_linear_leaves_out_layers_whose_adapters_would_not_work(kind, settings, left_out):
    """MLPs beside experts, for which peft would mistake them; weights that Mamba's layers read."""
    policy = make_tiny(kind, **settings)
    linear = {name.rpartition(".")[2] for name, layer in policy.named_modules()
              if type(layer) is torch.nn.Linear}
    make_lora(policy)
    assert linear - adapted_leaves(policy) == left_out | {"lm_head"}


@pytest.mark.filterwarnings("ignore:The following .*_pattern keys")  # peft's, of what it mistook
@pytest.mark.parametrize(("target", "message"), [
    ("gate_proj,up_proj,down_proj", "model.lora_target: peft mistakes layers of MLPs for experts"),
    ("down_proj", "model.lora_target: peft mistakes layers of MLPs for experts"),
    ("q_proj,up_proj", "Cannot convert PEFT")])  # peft's own
def test_adapters_that_peft_would_put_on_experts_are_an_error(target, message):
    """They would be trained, and no engine would get them."""
    with pytest.raises(ValueError, match=message) as error:
        make_lora(make_tiny("qwen3_moe", mlp_only_layers=[0]), target)
    assert "\n" not in str(error.value)


# ---- merged weights ------------------------------------------------------------------------------

@pytest.mark.parametrize(("kind", "target", "tied"), [
    ("llama", "all-linear", True), ("llama", "q_proj,lm_head", False), ("gpt2", "all-linear", True),
    ("qwen3_moe", "all-linear", False), ("qwen2_moe", "all-linear", False),
    ("llama4_text", "all-linear", False), ("mamba", "all-linear", True)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merged_weights_are_the_policys_under_the_names_of_the_base(kind, target, tied, dtype):
    settings = {**SMALL, "tie_word_embeddings": tied}
    plain = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **settings), dtype=dtype)
    base = {name: (weight.shape, weight.dtype) for name, weight in plain.state_dict().items()}
    policy = AutoModelForCausalLM.from_config(plain.config, dtype=dtype).eval()
    make_lora(policy, target)
    move_adapters(policy)
    merged = dict(iter_full_weights(policy, tied=True))
    assert {name: (weight.shape, weight.dtype) for name, weight in merged.items()} == base
    assert set(base) - set(dict(iter_full_weights(policy))) == ({"lm_head.weight"} if tied else
                                                                set())
    plain.load_state_dict(merged)
    ids = torch.arange(20)[None]
    with torch.no_grad():
        ours, theirs = policy(ids).logits, plain.eval()(ids).logits
        assert torch.allclose(ours, theirs, atol=1e-5 if dtype == torch.float32 else 0.05)


def lora_with_a_copy(make_state):
    """A LoRA run whose engine has weights of its own."""
    state, prompts = make_state(*LORA, "actor.lr=0.01", "total_training_steps=3")
    copy = copy_without_weights(state.policy, state.config, state.accelerator.device)
    assert not adapters(copy)
    engine = transformers_engine(copy, state.tokenizer, state.accelerator.autocast, 64, True)
    state = replace(state, engine=engine)
    sync_weights(state)
    return state, prompts


def test_adapters_that_reach_the_engine(make_state, train_steps):
    state, prompts = lora_with_a_copy(make_state)
    for step in train_steps(state, prompts):
        assert step.metrics["actor/mismatch_abs"] < 1e-5


def test_adapters_that_never_reach_the_engine_are_an_error(make_state, train_steps, monkeypatch):
    def unmerged(policy, tied):
        return ((name.replace(".base_layer", ""), weight)
                for name, weight in policy.state_dict().items() if "lora_" not in name)
    monkeypatch.setattr(infra.setup, "iter_full_weights", unmerged)
    state, prompts = lora_with_a_copy(make_state)
    with pytest.raises(ValueError, match="step 2.*does not have the policy's weights"):
        train_steps(state, prompts)


def test_servers_are_told_the_names_and_shapes_of_the_base(make_state, monkeypatch, model):
    state, _ = make_state(*LORA)
    monkeypatch.setattr(infra.vllm_server, "server_engine", lambda *args: args[-1])
    state.config.rollout.mode = "server"
    metas = make_engine(state.config, state.accelerator, state.policy, state.tokenizer,
                        transformers_engine)
    assert metas == {name: (tuple(weight.shape), torch.float32)
                     for name, weight in model.state_dict().items()}


# ---- the reference policy ------------------------------------------------------------------------

def test_the_kl_is_that_of_a_run_with_a_copy_of_the_base(make_state, train_steps):
    found = {}
    for kind in ("adapters off", "copy"):
        state, prompts = make_state(*LORA, "actor.lr=0.01", "actor.use_kl_loss=true",
                                    "actor.kl_loss_coef=0.1", "algorithm.use_kl_in_reward=true",
                                    "algorithm.kl_coef=0.1")
        if kind == "copy":
            state = replace(state, reference=load_model(state.config))
        steps = train_steps(state, prompts)
        groups = [group for step in steps for group in step.groups]
        found[kind] = ([step.metrics["actor/ref_kl"] for step in steps],
                       [reward for group in groups for reward in group.final_rewards])
        assert all(weight.requires_grad for weight in adapters(state.policy).values())
    assert found["copy"][0][1] > 1e-3  # in the second step the policy is another one
    for ours, theirs in zip(*found.values(), strict=True):
        assert ours == pytest.approx(theirs, abs=1e-6)


def test_the_reference_is_the_policy_with_its_adapters_off(make_state):
    state, prompts = make_state(*LORA, "algorithm.use_kl_in_reward=true")
    base = load_model(state.config)
    move_adapters(state.policy)
    samples = [Sample(prompt.token_ids, [5, 6, 7, 8, 0], 0.0) for prompt in prompts[:4]]
    policy, reference, expected = (torch.cat(logprobs_of(state, model, samples))
                                   for model in (state.policy, state.reference, base))
    assert torch.equal(reference, expected) and (policy - reference).abs().max() > 0.1
    again = torch.cat(logprobs_of(state, state.policy, samples))
    assert torch.equal(policy, again)  # they are on again


# ---- what is saved -------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def master(tmp_path_factory):
    return tmp_path_factory.mktemp("master") / "run"


@pytest.fixture
def saved(start, master):
    """A run of two steps, with a model and a checkpoint after each: trained once."""
    if not master.exists():
        start(*LORA, "save_model_every=1", "save_every=1").rename(master)
    return master


def test_model_is_the_merged_one_and_adapter_loads_with_peft(saved):
    run_dir = saved
    assert {"adapter", "adapter_step_00001", "adapter_step_00002"} <= {
        path.name for path in run_dir.iterdir()}
    for name in ("", "_step_00001"):
        base = AutoModelForCausalLM.from_pretrained(ROOT / "toy/base")
        before = {key: weight.clone() for key, weight in base.state_dict().items()}
        loaded = PeftModel.from_pretrained(base, run_dir / f"adapter{name}").merge_and_unload()
        merged = AutoModelForCausalLM.from_pretrained(run_dir / f"model{name}").state_dict()
        for key, weight in loaded.state_dict().items():
            assert torch.allclose(weight, merged[key], atol=1e-7)
            assert torch.equal(merged[key], before[key]) != ("proj" in key)
    saved_keys = load_file(run_dir / "adapter/adapter_model.safetensors").keys()
    assert {key.partition(".lora_")[2] for key in saved_keys} == {"A.weight", "B.weight"}
    keys = dcp.FileSystemReader(run_dir / "checkpoints/step_00002").read_metadata()
    assert {key.split(".")[0] for key in keys.state_dict_metadata} == {"policy", "optimizer"}
    assert all("lora_" in key or "param_groups" in key for key in keys.state_dict_metadata)


def test_an_adapter_is_no_model_and_the_message_says_where_the_merged_one_is(saved, start):
    with pytest.raises(SystemExit, match="adapter is an adapter .LoRA.; use model/ beside it"):
        start(f"model.path={saved / 'adapter'}")


def test_a_lora_run_resumes_as_if_it_had_not_been_interrupted(start, saved, tmp_path):
    resumed = shutil.copytree(saved, tmp_path / "run")
    for name in ("checkpoints/step_00002", "model", "adapter"):
        shutil.rmtree(resumed / name)
    start(*LORA, "save_every=1")
    assert run_differences(saved, resumed) == []
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (saved / "adapter" / name).read_bytes() == (resumed / "adapter" / name).read_bytes()
    targets = json.loads((saved / "adapter/adapter_config.json").read_text())["target_modules"]
    assert targets == sorted(targets)  # not those of a set, in an order of this process


def test_another_rank_is_another_run_and_no_branch_of_this_one(start, saved, tmp_path):
    step = saved / "checkpoints/step_00001"
    for rank in (0, 8):
        with pytest.raises(SystemExit, match=f"other adapters .model.lora_rank: 4 -> {rank}") as error:
            start(*LORA, f"model.lora_rank={rank}", f"resume={step}")
        assert "\n" not in str(error.value)
    shutil.copytree(saved, tmp_path / "run", dirs_exist_ok=True)
    with pytest.raises(SystemExit, match="another config .model.lora_rank: 4 -> 8.") as error:
        start(*LORA, "model.lora_rank=8", "total_training_steps=3")
    assert "branch off" not in str(error.value)  # which would be refused


@pytest.mark.slow
def test_kill_9_at_any_moment_changes_nothing(tmp_path):
    overrides = [*TINY, *LORA, "total_training_steps=24"]
    found, hit = kill_and_resume(tmp_path, 3, seed=1, overrides=overrides)
    assert found == [] and sum(hit.values()) >= 2


def test_checkpoints_take_at_most_5_percent_of_full_ones(make_state, tokenizer, tmp_path):
    """On a model that is large enough for its rank: one layer of width 512."""
    config = AutoConfig.for_model("llama", **{
        **SMALL, "hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 1})
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    sizes = []
    for rank in (0, 8):
        run_dir = tmp_path / f"run{rank}"
        state, _ = make_state(f"model.path={tmp_path / 'base'}", f"model.lora_rank={rank}",
                              f"run_dir={run_dir}")
        for weight in state.policy.parameters():
            weight.grad = torch.zeros_like(weight) if weight.requires_grad else None
        state.optimizer.step()
        run_dir.mkdir()
        save_checkpoint(state, Progress())
        sizes.append(sum(file.stat().st_size for file in run_dir.rglob("*") if file.is_file()))
    assert sizes[1] <= 0.05 * sizes[0] and sizes[0] > 30e6
