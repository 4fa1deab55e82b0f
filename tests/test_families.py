"""Models of every family: tiny random ones, which train by the transformers backend as they are.

To add a family, add a line to FAMILIES: the model type of transformers, and what its config needs
besides SIZES to be tiny.
"""

import pytest
import torch
import train_dapo
import transformers
from conftest import make_score, read_rows
from test_train import gradient, make_mini_batch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.trainer_utils import set_seed

from data_types import SamplingParams
from infra.config import load_config
from infra.packing import packing_kind
from infra.setup import load_model
from rollout import transformers_generate

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
         "max_position_embeddings": 256}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
SHARED = {**EXPERTS, "shared_expert_intermediate_size": 16}
DEEPSEEK = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8,
            "v_head_dim": 8, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1,
            "topk_group": 1, "moe_intermediate_size": 16, "first_k_dense_replace": 1,
            "num_key_value_heads": 4}
WINDOW = {"sliding_window": 8}
LINEAR = {"layer_types": ["linear_attention", "full_attention"], "linear_num_key_heads": 2,
          "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1,
         "mamba_expand": 2, "mamba_d_ssm": 64}
FAST = ["qwen3", "qwen3_moe", "qwen3_5_text", "mamba2", "gpt_oss"]
FAMILIES = {
    # attention in every layer, over all tokens or a window
    "llama": {}, "qwen2": {}, "qwen3": {}, "ministral3": {}, "mistral": WINDOW, "gemma2": WINDOW,
    "gemma3_text": WINDOW, "exaone4": WINDOW, "phi3": {}, "olmo2": {}, "granite": {}, "cohere": {},
    "smollm3": {}, "glm4": {}, "gpt_neox": {}, "seed_oss": {}, "starcoder2": {}, "ernie4_5": {},
    "gemma4_text": {**WINDOW, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 28},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32}, "bloom": {"n_layer": 2, "n_head": 4},
    # mixtures of experts
    "qwen3_moe": EXPERTS, "olmoe": EXPERTS, "mixtral": {"num_local_experts": 4},
    "gpt_oss": {**WINDOW, "num_local_experts": 4, "num_experts_per_tok": 2},
    "granitemoe": {"num_local_experts": 4, "num_experts_per_tok": 2}, "deepseek_v3": DEEPSEEK,
    "llama4_text": {"intermediate_size_mlp": 48, "num_local_experts": 2},
    "glm4_moe": {**DEEPSEEK, "num_key_value_heads": 2},
    # hybrids of linear and full attention, or of convolutions
    "qwen3_5_text": LINEAR, "qwen3_next": {**LINEAR, **SHARED},
    "qwen3_5_moe_text": {**LINEAR, **SHARED}, "olmo_hybrid": LINEAR,
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "kimi_linear": {"layer_types": ["linear_attention", "full_attention"], "kv_lora_rank": 16,
                    "mlp_layer_types": ["dense", "sparse"], "num_experts": 4,
                    "num_experts_per_token": 2, "moe_intermediate_size": 16, "qk_nope_head_dim": 8,
                    "qk_rope_head_dim": 8, "v_head_dim": 8, "linear_head_dim": 8,
                    "linear_num_heads": 4, "num_key_value_heads": 4},
    # state-space layers, alone or with attention
    "mamba": {"state_size": 8}, "falcon_mamba": {"state_size": 8},
    "mamba2": {"num_heads": 8, "head_dim": 8, "state_size": 8, "n_groups": 1},
    "falcon_h1": MAMBA, "bamba": {**MAMBA, "attn_layer_indices": [1]},
    "granitemoehybrid": {**MAMBA, "layer_types": ["mamba", "attention"], "num_local_experts": 4,
                         "num_experts_per_tok": 2, "shared_intermediate_size": 16},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2,
              "expert_layer_offset": 1, "num_experts": 4, "num_experts_per_tok": 2,
              "mamba_d_state": 8, "use_mamba_kernels": False},
}
PROMPTS = [[5, 6, 7, 8, 9, 10, 11, 12, 4, 3, 5], [5, 7], [7, 8, 9, 5], [6] * 7]
ALIKE = [[*range(5, 25), *prompt] for prompt in PROMPTS]  # rollouts compute their beginning once


def save(model, tokenizer, path) -> str:
    """With weights that make tokens differ, as a checkpoint."""
    set_seed(0)
    for weight in model.parameters():
        if weight.dim() > 1:
            torch.nn.init.normal_(weight, std=0.15)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


def make_family(family: str, tokenizer, path, **options) -> str:
    config = AutoConfig.for_model(family, **{
        **SIZES, "vocab_size": len(tokenizer), "bos_token_id": None, "pad_token_id": 0,
        "eos_token_id": tokenizer.eos_token_id, **FAMILIES[family], **options})
    return save(AutoModelForCausalLM.from_config(config), tokenizer, path)


def greedy_by_generate(model, prompts: list[list[int]], max_tokens: int) -> list[list[int]]:
    """What the library's own `generate` writes."""
    longest = max(map(len, prompts))
    padding = [longest - len(prompt) for prompt in prompts]
    rows = [[0] * pad + prompt for pad, prompt in zip(padding, prompts, strict=True)]
    mask = [[0] * pad + [1] * (longest - pad) for pad in padding]
    output = model.generate(input_ids=torch.tensor(rows), attention_mask=torch.tensor(mask),
                            do_sample=False, max_new_tokens=max_tokens, pad_token_id=0)
    return output[:, longest:].tolist()


@pytest.fixture
def train_two_steps(start, monkeypatch):
    """Two steps on rewards that differ within each group; the metrics of each."""
    def score_responses(state, prompts, responses, description):
        return [[make_score(i % 2) for i in range(len(group))] for group in responses]

    def train_two_steps(*overrides: str) -> list[dict]:
        monkeypatch.setattr(train_dapo, "score_responses", score_responses)
        return read_rows(start("val.file=", "actor.lr=0.001", *overrides))
    return train_two_steps


@pytest.mark.parametrize("family", [name if name in FAST else
                                    pytest.param(name, marks=pytest.mark.slow)
                                    for name in FAMILIES])
def test_a_family_trains_as_it_samples(family, tmp_path, tokenizer, make_state, train_two_steps):
    path = make_family(family, tokenizer, tmp_path / "base")
    state, prompts = make_state(f"model.path={path}")
    for texts in (PROMPTS, ALIKE):
        groups = transformers_generate(state.policy, tokenizer, texts, [(0,)] * len(texts),
                                       SamplingParams(1, 24, temperature=0))
        expected = greedy_by_generate(state.policy.eval(), texts, 24)
        for (response,), row in zip(groups, expected, strict=True):
            assert response.token_ids.tolist() == row[:len(response.token_ids)]
            assert response.finish_reason == "stop" or len(response.token_ids) == 24

    mini_batch = make_mini_batch(state, prompts)
    gradients = []
    for max_tokens in (10_000, 120):  # one micro-batch, and five
        state.config.actor.max_tokens_per_micro_batch = max_tokens
        gradients.append(gradient(state, mini_batch)[0])
    assert (gradients[0] - gradients[1]).norm() < 1e-4 * gradients[0].norm()

    rows = train_two_steps(f"model.path={path}")
    assert [row["step"] for row in rows] == [1, 2]
    assert all(row["actor/mismatch_abs"] < 1e-5 and row["actor/grad_norm"] > 0 for row in rows)


@pytest.mark.parametrize("family", [
    family if family in FAST else pytest.param(family, marks=pytest.mark.slow)
    for family in FAMILIES])
def test_an_empty_model_lacks_nothing_but_the_values_of_its_weights(family, tmp_path, tokenizer):
    """It is that of a rank to which FSDP2 sends rank 0's: in their order, with buffers of its own."""
    path = make_family(family, tokenizer, tmp_path)
    config = load_config("config.yaml", [f"model.path={path}"])
    whole, empty = load_model(config), load_model(config, empty=True)
    for name in ("named_parameters", "named_buffers"):
        pairs = zip(getattr(whole, name)(), getattr(empty, name)(), strict=True)
        for (key, one), (other_key, other) in pairs:
            assert (key, one.shape, one.dtype) == (other_key, other.shape, other.dtype)
            assert name == "named_parameters" or torch.equal(one, other), key
    assert packing_kind(whole) == packing_kind(empty)


def small_vision() -> dict:
    return {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2,
            "out_hidden_size": 32}


@pytest.mark.parametrize("family", ["qwen3_5", pytest.param("gemma3", marks=pytest.mark.slow),
                                    pytest.param("mistral3", marks=pytest.mark.slow)])
def test_of_a_vision_language_checkpoint_the_language_part_is_trained(family, tmp_path, tokenizer,
                                                                      train_two_steps):
    text = {**SIZES, "vocab_size": len(tokenizer), "pad_token_id": 0,
            "eos_token_id": tokenizer.eos_token_id}
    tower = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
             "num_attention_heads": 2, "image_size": 28, "patch_size": 14, "head_dim": 8}
    config = {
        "qwen3_5": lambda: transformers.Qwen3_5Config(
            text_config={**text, **LINEAR}, vision_config=small_vision()),
        "gemma3": lambda: transformers.Gemma3Config(
            text_config={**text, **WINDOW}, vision_config=tower),
        "mistral3": lambda: transformers.Mistral3Config(
            text_config={"model_type": "mistral", **text},
            vision_config={"model_type": "pixtral", **tower}),
    }[family]()
    path = save(AutoModelForImageTextToText.from_config(config), tokenizer, tmp_path / "base")
    rows = train_two_steps(f"model.path={path}")
    assert all(row["actor/mismatch_abs"] < 1e-5 for row in rows)

    whole = AutoModelForImageTextToText.from_pretrained(path).eval()
    trained, report = AutoModelForCausalLM.from_pretrained(tmp_path / "run/model",
                                                           output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert "Vision" not in str(trained) and type(trained).__name__.endswith("ForCausalLM")
    before = [weight for name, weight in whole.named_parameters() if "language_model" in name]
    after = [weight for name, weight in trained.named_parameters() if name != "lm_head.weight"]
    for old, new in zip(before, after, strict=True):
        assert 0 < (old - new).abs().max() < 0.05


def test_without_training_the_language_part_computes_as_the_whole_model(tmp_path, tokenizer,
                                                                        make_state):
    config = transformers.Qwen3_5Config(
        text_config={**SIZES, **LINEAR, "vocab_size": len(tokenizer), "pad_token_id": 0,
                     "eos_token_id": tokenizer.eos_token_id}, vision_config=small_vision())
    path = save(AutoModelForImageTextToText.from_config(config), tokenizer, tmp_path / "base")
    state, _ = make_state(f"model.path={path}")
    ids = torch.tensor([PROMPTS[0]])
    with torch.no_grad():
        whole = AutoModelForImageTextToText.from_pretrained(path).eval()(input_ids=ids).logits
        part = state.policy.eval()(input_ids=ids).logits
    assert torch.allclose(whole, part, atol=1e-5)


# ---- what cannot work ----

@pytest.mark.parametrize("make, message", [
    (lambda size: transformers.T5ForConditionalGeneration(transformers.T5Config(
        vocab_size=size, d_model=16, d_ff=16, d_kv=8, num_layers=1, num_heads=2)),
     "transformers has no causal language model of the kind of .* (t5)"),
    (lambda size: transformers.Qwen3VLForConditionalGeneration(transformers.Qwen3VLConfig(
        text_config={**SIZES, "vocab_size": size},
        vision_config={**small_vision(), "deepstack_visual_indexes": [0]})),
     "transformers has no causal language model of the kind of .* (qwen3_vl_text)"),
    (lambda size: transformers.RwkvForCausalLM(transformers.RwkvConfig(
        vocab_size=size, hidden_size=32, num_hidden_layers=2)),
     "model.path: RwkvForCausalLM has a cache of a kind of its own"),
    (lambda size: transformers.BertLMHeadModel(transformers.BertConfig(
        vocab_size=size, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4)),
     "sampler and trainer differ by .*BertLMHeadModel is not causal")],
    ids=["encoder-decoder", "vision-language without a text model", "own cache", "encoder"])
def test_what_cannot_work_ends_in_one_line(make, message, tmp_path, tokenizer, start):
    path = save(make(len(tokenizer)), tokenizer, tmp_path / "base")
    with pytest.raises(SystemExit, match=message.replace("(", r"\(").replace(")", r"\)")) as error:
        start(f"model.path={path}", "val.file=")
    assert "\n" not in str(error.value)


def test_a_checkpoint_that_lacks_a_weight_is_not_trained_with_a_random_one(tmp_path, tokenizer,
                                                                           start):
    path = make_family("qwen3", tokenizer, tmp_path / "base")
    from safetensors.torch import load_file, save_file
    weights = load_file(f"{path}/model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, f"{path}/model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SystemExit, match="lacks 1 weights of Qwen3ForCausalLM, "
                                         "model.layers.1.mlp.up_proj.weight among them"):
        start(f"model.path={path}")


# ---- attention ----

@pytest.mark.parametrize("family, attention, rows", [
    ("qwen3", "sdpa", "packed"), ("mistral", "sdpa", "padded"), ("gpt_oss", "eager", "padded")])
def test_auto_takes_the_fastest_attention_that_the_model_supports_and_says_so(
        family, attention, rows, tmp_path, tokenizer, make_state, capsys):
    path = make_family(family, tokenizer, tmp_path / "base")
    state, _ = make_state(f"model.path={path}")
    assert f"parameters, attention {attention}, {rows} rows" in capsys.readouterr().out
    assert bool(packing_kind(state.policy)) == (rows == "packed")


def test_an_attention_that_the_model_lacks_is_named_with_what_to_do(tmp_path, tokenizer, start):
    path = make_family("gpt_oss", tokenizer, tmp_path / "base")
    with pytest.raises(SystemExit, match="model.attn_implementation=sdpa: cannot load .*; auto "
                                         "takes an attention that the model supports"):
        start(f"model.path={path}", "model.attn_implementation=sdpa")


@pytest.mark.parametrize("family, options", [
    ("mixtral", {"num_local_experts": 4, "router_jitter_noise": 0.5}),
    ("phimoe", {"num_local_experts": 4, "router_jitter_noise": 0.5}),
    ("gpt2", {"n_embd": 32, "n_layer": 2, "n_head": 4, "attn_pdrop": 0.5, "resid_pdrop": 0.5})])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_what_is_random_in_training_mode_is_off(family, options, checkpointing, tmp_path, tokenizer,
                                                make_state, train_two_steps, monkeypatch):
    monkeypatch.setitem(FAMILIES, family, {})
    path = make_family(family, tokenizer, tmp_path / "base", **options)
    key = f"model.gradient_checkpointing={str(checkpointing).lower()}"
    state, prompts = make_state(f"model.path={path}", key)
    mini_batch = make_mini_batch(state, prompts)
    first, again = (gradient(state, mini_batch)[0] for _ in range(2))
    assert (first - again).norm() < 1e-6 * first.norm()
    rows = train_two_steps(f"model.path={path}", key)
    assert all(row["actor/mismatch_abs"] < 1e-5 for row in rows)
