"""Packed rows: what attention does with them. That log-probs and gradients are the same is in test_losses.py."""

import json

import torch
from transformers import AutoModelForCausalLM, Gemma3Config, LlamaConfig, MistralConfig

import infra.packing as attention
from infra.packing import BLOCK_SDPA, block_sdpa, enable_packing, make_blocks, packing
from rollout import generate
from infra.setup import copy_without_weights

SIZES = {"vocab_size": 40, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "eos_token_id": 0, "pad_token_id": 0}


def llama():
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(LlamaConfig(**SIZES), attn_implementation="sdpa").eval()


def test_blocks_by_hand():
    first, second, third = make_blocks([4, 3, 3, 2, 2, 1])  # 3 is three quarters of 4; 2 less; 1 less than those of 2
    assert (first.size, first.longest) == (10, 4)
    assert first.into.tolist() == [0, 1, 2, 3, 4, 5, 6, 0, 7, 8, 9, 0]  # whatever a padding is, nothing looks at it
    assert first.back.tolist() == [0, 1, 2, 3, 4, 5, 6, 8, 9, 10]
    assert (second.size, second.longest, second.into, second.back) == (4, 2, None, None)
    assert (third.size, third.longest) == (1, 1)


def test_sequences_of_any_order_attend_as_if_alone():
    torch.manual_seed(0)
    lengths = [3, 9, 1, 9, 7, 5, 8]
    query, key, value = (torch.randn(1, heads, sum(lengths), 8, dtype=torch.float64) for heads in (4, 2, 2))
    module = torch.nn.Module()
    module.num_key_value_groups = 2
    packed, _ = block_sdpa(module, query, key, value, None, make_blocks(lengths), scaling=0.3)
    alone = [block_sdpa(module, *parts, None, scaling=0.3)[0] for parts in zip(*(x.split(lengths, dim=2) for x in (query, key, value)), strict=True)]
    assert torch.allclose(packed, torch.cat(alone, dim=1), atol=1e-12)


def test_a_model_packs_only_where_all_layers_are_plainly_causal():
    for kind, expected in {"sdpa": "blocks", "eager": ""}.items():
        model = AutoModelForCausalLM.from_config(LlamaConfig(**SIZES), attn_implementation=kind)
        enable_packing(model)
        assert packing(model) == expected
    text = {**SIZES, "head_dim": 8, "sliding_window": 6}
    within = Gemma3Config(text_config=text, vision_config={"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
                                                           "num_attention_heads": 2, "image_size": 28, "patch_size": 14})
    for config in (MistralConfig(**SIZES, sliding_window=6), within):  # the latter's windows are in a config within
        sliding = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
        enable_packing(sliding)
        assert packing(sliding) == ""


def test_what_it_writes_is_the_same_and_what_it_saves_does_not_name_it(tmp_path, tokenizer):
    model, (before, after) = llama(), ([], [])
    prompts, seeds = [[5, 6, 7, 8, 9], [5], [7, 8]], [(0,), (1,), (2,)]
    for found in (before, after):
        found += [r.token_ids.tolist() for group in generate(model, tokenizer, prompts, seeds, 4, 12, 1.0) for r in group]
        enable_packing(model)
    assert before == after and packing(model) == "blocks"
    model.save_pretrained(tmp_path)
    assert BLOCK_SDPA not in json.dumps(json.loads((tmp_path / "config.json").read_text()))


def test_a_model_whose_packed_rows_are_not_right_trains_on_padded_ones(start, monkeypatch, capsys):
    wrong = []
    monkeypatch.setattr(attention, "make_blocks", lambda lengths, device: wrong.append(1) or make_blocks([sum(lengths)], device))
    run_dir = start("actor.use_kl_loss=true")  # all would see all before; of the reference too
    assert "packed rows are not for this model: it trains on padded ones" in capsys.readouterr().out
    assert len(wrong) == 1
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert all(row["actor/mismatch_abs"] < 1e-5 for row in rows if "actor/loss" in row)


def test_a_copy_that_writes_leaves_the_policy_packing(make_run):
    run, _ = make_run()
    copy = copy_without_weights(run.policy, run.config, run.accelerator.device)
    assert (packing(run.policy), packing(copy)) == ("blocks", "")
