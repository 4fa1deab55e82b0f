"""infra/packing.py: packed rows attend as if alone. Their log-probs are in test_logprobs.py."""

import torch
from conftest import read_rows
from transformers import AutoModelForCausalLM, Gemma3Config, LlamaConfig, MistralConfig

from infra import packing
from infra.packing import BLOCK_SDPA, block_sdpa, enable_packing, make_blocks, packing_kind
from infra.setup import copy_without_weights
from rollout import SamplingParams, transformers_generate

SIZES = {"vocab_size": 40, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2, "eos_token_id": 0, "pad_token_id": 0}


def make_llama(attention: str = "sdpa"):
    torch.manual_seed(0)
    config = LlamaConfig(**SIZES)
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()


def test_blocks_by_hand():
    # 3 is three quarters of 4; 2 is less; 1 is less than three quarters of 2
    first, second, third = make_blocks([4, 3, 3, 2, 2, 1])
    assert (first.size, first.longest) == (10, 4)
    # whatever a padding is, nothing looks at it
    assert first.gather_index.tolist() == [0, 1, 2, 3, 4, 5, 6, 0, 7, 8, 9, 0]
    assert first.scatter_index.tolist() == [0, 1, 2, 3, 4, 5, 6, 8, 9, 10]
    assert second == (4, 2, None, None)
    assert (third.size, third.longest) == (1, 1)


def test_sequences_of_any_order_attend_as_if_alone():
    torch.manual_seed(0)
    lengths = [3, 9, 1, 9, 7, 5, 8]
    packed = [torch.randn(1, heads, sum(lengths), 8, dtype=torch.float64) for heads in (4, 2, 2)]
    module = torch.nn.Module()
    module.num_key_value_groups = 2
    together, _ = block_sdpa(module, *packed, None, make_blocks(lengths), scaling=0.3)
    alone = []
    for parts in zip(*(x.split(lengths, dim=2) for x in packed), strict=True):
        alone.append(block_sdpa(module, *parts, None, scaling=0.3)[0])
    assert torch.allclose(together, torch.cat(alone, dim=1), atol=1e-12)


def test_a_model_packs_only_if_all_layers_are_plainly_causal():
    for attention, expected in {"sdpa": "blocks", "eager": ""}.items():
        model = make_llama(attention)
        enable_packing(model)
        assert packing_kind(model) == expected
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
              "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    nested = Gemma3Config(text_config={**SIZES, "head_dim": 8, "sliding_window": 6},
                          vision_config=vision)  # its windows are in a config within
    for config in (MistralConfig(**SIZES, sliding_window=6), nested):
        sliding = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
        enable_packing(sliding)
        assert packing_kind(sliding) == ""


def test_a_packing_model_generates_the_same_and_its_saved_config_does_not_name_it(tmp_path,
                                                                                   tokenizer):
    model, prompts, seeds = make_llama(), [[5, 6, 7, 8, 9], [5], [7, 8]], [(0,), (1,), (2,)]

    def generated() -> list[list[int]]:
        groups = transformers_generate(model, tokenizer, prompts, seeds, SamplingParams(4, 12))
        return [response.token_ids.tolist() for group in groups for response in group]
    before = generated()
    enable_packing(model)
    assert packing_kind(model) == "blocks" and generated() == before
    model.save_pretrained(tmp_path)
    assert BLOCK_SDPA not in (tmp_path / "config.json").read_text()


def test_a_model_whose_packed_rows_are_wrong_is_trained_on_padded_ones(start, monkeypatch, capsys):
    calls = []

    def one_block(lengths, device):  # all tokens see all before, those of other responses too
        calls.append(1)
        return make_blocks([sum(lengths)], device)
    monkeypatch.setattr(packing, "make_blocks", one_block)
    # The reference model is trained on packed rows no more than the policy.
    run_dir = start("actor.use_kl_loss=true", "val.file=")
    assert "packed rows change this model's log-probs: it is trained on padded rows" in (
        capsys.readouterr().out)
    assert len(calls) == 1
    assert all(row["actor/mismatch_abs"] < 1e-5 for row in read_rows(run_dir))


def test_a_copy_that_generates_leaves_the_policy_packing(make_state):
    state, _ = make_state()
    copy = copy_without_weights(state.policy, state.config, state.accelerator.device)
    assert (packing_kind(state.policy), packing_kind(copy)) == ("blocks", "")
