"""rollout.py: what is sampled, from which distribution, and when it ends."""

import numpy as np
import pytest
import torch

from rollout import generate, sample_tokens, stop_token_ids

PROMPTS = ["a7 b*3 c+5?", "a1 b+1?", "a9 b-5 c-7 d+2 e+1 f+8 g*2 h*3 i*7?"]


def write(model, tokenizer, texts=PROMPTS, n=4, seed=0, max_tokens=96, temperature=1.0, **how):
    return generate(model, tokenizer, [tokenizer.encode(text) for text in texts], [(seed, i) for i in range(len(texts))], n,
                    max_tokens, temperature, **how)


def ids(groups):
    return [[response.token_ids.tolist() for response in group] for group in groups]


def test_the_same_seed_gives_the_same_tokens_another_seed_others(model, tokenizer):
    assert ids(write(model, tokenizer)) == ids(write(model, tokenizer)) != ids(write(model, tokenizer, seed=1))


def test_what_is_sampled_does_not_depend_on_batching(model, tokenizer):
    assert ids(write(model, tokenizer, max_num_seqs=4)) == ids(write(model, tokenizer, max_num_seqs=512))


def test_responses_to_one_prompt_differ(model, tokenizer):
    assert len({tuple(row) for row in ids(write(model, tokenizer, n=16))[0]}) > 1


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_are_those_of_a_forward_pass_over_the_whole_text(model, tokenizer, temperature):
    """Also across left padding, shared prefill and rows that leave the batch."""
    for text, group in zip(PROMPTS, write(model, tokenizer, n=8, temperature=temperature), strict=True):
        prompt = tokenizer.encode(text)
        for response in group:
            whole = torch.tensor([prompt + response.token_ids.tolist()])
            with torch.no_grad():
                logprobs = torch.log_softmax(model(whole).logits[0] / temperature, -1)
            expected = [logprobs[len(prompt) + t - 1, token].item() for t, token in enumerate(response.token_ids)]
            assert response.logprobs == pytest.approx(np.array(expected), abs=1e-4)


def test_greedy_agrees_with_the_librarys_generate(model, tokenizer):
    for text, (response,) in zip(PROMPTS, write(model, tokenizer, n=1, temperature=0), strict=True):
        prompt = torch.tensor([tokenizer.encode(text)])
        expected = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=96, do_sample=False)
        assert response.token_ids.tolist() == expected[0, prompt.shape[1]:].tolist()


def test_a_response_ends_with_its_eos_or_at_the_limit(model, tokenizer):
    for group in write(model, tokenizer, n=32, max_tokens=12):
        for response in group:
            stopped = response.token_ids[-1] == tokenizer.eos_token_id
            assert response.finish_reason == ("stop" if stopped else "length")
            assert stopped or len(response.token_ids) == 12
            assert tokenizer.eos_token_id not in response.token_ids[:-1]


def test_an_eos_on_the_last_allowed_token_is_a_stop_not_a_truncation(model, tokenizer):
    (group,) = write(model, tokenizer, texts=["a1 b+1?"], n=32, max_tokens=3)  # `\nAnswer: `, a digit, EOS
    assert any(len(r.token_ids) == 3 and r.finish_reason == "stop" for r in group)


def test_every_eos_of_the_generation_config_ends_a_response(model, tokenizer):
    answer = tokenizer.convert_tokens_to_ids("\nAnswer: ")
    model.generation_config.eos_token_id = [0, answer]
    assert stop_token_ids(model, tokenizer) == sorted([0, answer])
    for group in write(model, tokenizer, max_tokens=95, n=8):
        assert all(response.finish_reason == "stop" and response.token_ids[-1] == answer
                   for response in group if response.finish_reason == "stop")
        assert any(response.token_ids[-1] == answer for response in group)


def test_gradient_checkpointing_does_not_cost_the_cache(model, tokenizer):
    expected = ids(write(model, tokenizer))
    model.gradient_checkpointing_enable()
    assert ids(write(model.train(), tokenizer)) == expected
    assert model.training


def test_text_has_no_special_tokens(model, tokenizer):
    assert "<eos>" not in write(model, tokenizer)[0][0].text


# ---- from a distribution to a token ----

def test_inverse_transform_by_hand():
    logits = torch.tensor([[0.1, 0.2, 0.7]]).log().repeat(5, 1)
    tokens, logprobs = sample_tokens(logits, torch.tensor([0.0, 0.05, 0.15, 0.5, 0.9999]), 1.0)
    assert tokens.tolist() == [0, 0, 1, 2, 2]
    assert logprobs.exp().tolist() == pytest.approx([0.1, 0.1, 0.2, 0.7, 0.7])


def test_frequencies_meet_probabilities():
    logits = torch.tensor([[0.1, 0.2, 0.7]]).log().repeat(20_000, 1)
    tokens, _ = sample_tokens(logits, torch.rand(20_000, generator=torch.Generator().manual_seed(0)), 1.0)
    assert (tokens.bincount() / 20_000).tolist() == pytest.approx([0.1, 0.2, 0.7], abs=0.012)


def test_an_impossible_token_is_never_sampled():
    logits = torch.tensor([[-torch.inf, 0.0, -torch.inf, 0.0, -torch.inf]]).repeat(3, 1)
    tokens, _ = sample_tokens(logits, torch.tensor([0.0, 0.5, 1 - 2**-24]), 1.0)
    assert tokens.tolist() == [1, 3, 3]
    for size in range(40_000, 40_020):  # where rounding leaves the sum of all probabilities below 1
        logits = torch.zeros(1, size)
        logits[0, size // 2:] = -torch.inf
        tokens, logprobs = sample_tokens(logits, torch.tensor([1 - 2**-24]), 1.0)
        assert tokens.item() < size // 2 and logprobs.isfinite()


def test_top_p_renormalises_to_the_nucleus():
    logits = torch.tensor([[0.1, 0.2, 0.7]]).log().repeat(3, 1)
    tokens, logprobs = sample_tokens(logits, torch.tensor([0.0, 0.1, 0.5]), 1.0, top_p=0.8)
    assert tokens.tolist() == [1, 1, 2]  # 0.7 alone is too little; 0.2 / 0.9 comes first
    assert logprobs.exp().tolist() == pytest.approx([2 / 9, 2 / 9, 7 / 9])


def test_temperature_sharpens_before_top_p():
    logits = torch.tensor([[0.1, 0.2, 0.7]]).log()
    _, logprobs = sample_tokens(logits, torch.tensor([0.99]), 0.5)
    assert logprobs.exp().item() == pytest.approx(0.49 / 0.54)
