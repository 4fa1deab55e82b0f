"""rollout.py: what is sampled, from which distribution, and when a response ends."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch

from data_types import Response, SamplingParams
from infra.config import stop_strings
from infra.rng import make_rng
from infra.tokens import make_responses, stop_token_ids
from infra.vllm_engine import request_params
from rollout import decode, generate, sample_tokens, transformers_generate

PROMPTS = ["a7 b*3 c+5?", "a1 b+1?", "a9 b-5 c-7 d+2 e+1 f+8 g*2 h*3 i*7?"]


def sample(model, tokenizer, texts=PROMPTS, n=4, seed=0, max_tokens=96, temperature=1.0,
           max_num_seqs=512, stop=()) -> list[list[Response]]:
    prompts = [tokenizer.encode(text) for text in texts]
    return transformers_generate(model, tokenizer, prompts, [(seed, i) for i in range(len(texts))],
                                 SamplingParams(n, max_tokens, temperature, stop=stop),
                                 max_num_seqs=max_num_seqs)


def ids(groups):
    return [[response.token_ids.tolist() for response in group] for group in groups]


def expected_logprobs(model, prompt: list[int], response_ids, temperature: float = 1.0):
    """By a forward pass over the whole text."""
    whole = torch.tensor([[*prompt, *response_ids]])
    with torch.no_grad():
        logits = model(whole).logits[0, len(prompt) - 1:-1] / temperature
    found = logits.log_softmax(-1).gather(-1, whole[0, len(prompt):, None]).squeeze(-1)
    return pytest.approx(found.numpy(), abs=1e-4)


def test_the_same_seed_gives_the_same_tokens_another_seed_others(model, tokenizer):
    first = ids(sample(model, tokenizer))
    assert ids(sample(model, tokenizer)) == first != ids(sample(model, tokenizer, seed=1))


def test_what_is_sampled_does_not_depend_on_batching(model, tokenizer):
    one_prompt_at_a_time = ids(sample(model, tokenizer, max_num_seqs=4))
    assert ids(sample(model, tokenizer, max_num_seqs=512)) == one_prompt_at_a_time


def test_responses_to_one_prompt_differ(model, tokenizer):
    assert len({tuple(row) for row in ids(sample(model, tokenizer, n=16))[0]}) > 1


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_are_those_of_a_forward_pass_over_the_whole_text(model, tokenizer, temperature):
    """Also across left padding, shared prefill and rows that leave the batch."""
    groups = sample(model, tokenizer, n=8, temperature=temperature)
    for text, group in zip(PROMPTS, groups, strict=True):
        prompt = tokenizer.encode(text)
        for response in group:
            expected = expected_logprobs(model, prompt, response.token_ids, temperature)
            assert response.logprobs == expected


@pytest.mark.parametrize("prefix, shared", [("a7 b*3 ", 0), ("a7 b*3 c+5 d-2 e*9 f+4 ", 18)])
def test_what_all_prompts_begin_with_is_computed_once(model, tokenizer, prefix, shared):
    """A system prompt or worked examples; a few tokens are not worth a pass of their own."""
    prompts = [tokenizer.encode(prefix + text) for text in PROMPTS]
    computed = []
    hook = model.model.embed_tokens.register_forward_hook(
        lambda module, inputs, output: computed.append(inputs[0].shape))
    groups = sample(model, tokenizer, [prefix + text for text in PROMPTS], n=8)
    hook.remove()
    longest = max(map(len, prompts))
    rows = [(1, shared)] * (shared > 0) + [(len(prompts), longest - shared), (8 * len(prompts), 1)]
    assert computed[:len(rows)] == rows
    for prompt, group in zip(prompts, groups, strict=True):
        for response in group:
            assert response.logprobs == expected_logprobs(model, prompt, response.token_ids)


def test_a_cache_is_not_copied_for_each_token(model, tokenizer, monkeypatch):
    """Over 300 tokens that no EOS ends: its buffers grow a few times, and keep what they have."""
    copies, new_empty = [], torch.Tensor.new_empty
    monkeypatch.setattr(torch.Tensor, "new_empty",
                        lambda *args: copies.append(args) or new_empty(*args))
    prompt, uniforms = tokenizer.encode(PROMPTS[0]), torch.rand(2, 300)
    rows = decode(model, [prompt], uniforms, SamplingParams(2, 300), torch.tensor([-1]))
    assert 0 < len(copies) <= 2 * 2 * 5  # keys and values of two layers
    for token_ids, logprobs, _ in rows:
        assert len(token_ids) == 300
        assert logprobs == expected_logprobs(model, prompt, token_ids)


def test_greedy_agrees_with_the_librarys_generate(model, tokenizer):
    groups = sample(model, tokenizer, n=1, temperature=0)
    for text, (response,) in zip(PROMPTS, groups, strict=True):
        prompt = torch.tensor([tokenizer.encode(text)])
        expected = model.generate(prompt, attention_mask=torch.ones_like(prompt),
                                  max_new_tokens=96, do_sample=False)
        assert response.token_ids.tolist() == expected[0, prompt.shape[1]:].tolist()


def test_a_response_ends_with_its_eos_or_at_the_limit(model, tokenizer):
    for group in sample(model, tokenizer, n=32, max_tokens=12):
        for response in group:
            stopped = response.token_ids[-1] == tokenizer.eos_token_id
            assert response.finish_reason == ("stop" if stopped else "length")
            assert stopped or len(response.token_ids) == 12
            assert tokenizer.eos_token_id not in response.token_ids[:-1]


def test_an_eos_on_the_last_allowed_token_is_a_stop_not_a_truncation(model, tokenizer):
    # `\nAnswer: `, a digit, EOS
    (group,) = sample(model, tokenizer, texts=["a1 b+1?"], n=32, max_tokens=3)
    assert any(len(r.token_ids) == 3 and r.finish_reason == "stop" for r in group)


def test_every_eos_of_the_generation_config_ends_a_response(model, tokenizer):
    answer = tokenizer.convert_tokens_to_ids("\nAnswer: ")
    model.generation_config.eos_token_id = [0, answer]
    assert stop_token_ids(model, tokenizer) == sorted([0, answer])
    for group in sample(model, tokenizer, max_tokens=95, n=8):
        assert all(response.finish_reason == "stop" and response.token_ids[-1] == answer
                   for response in group if response.finish_reason == "stop")
        assert any(response.token_ids[-1] == answer for response in group)


@pytest.mark.parametrize("stop, cut", [
    (("r: ",), "r: "), (("5=6\nA",), "5=6\nAnswer: "), (("nowhere", "1+5"), "1+5")])
def test_a_stop_string_ends_a_response_and_is_part_of_it(model, tokenizer, stop, cut):
    """Also one over several tokens, and within a token, which is whole."""
    free = sample(model, tokenizer, PROMPTS[:1], n=16)[0]
    stopped = sample(model, tokenizer, PROMPTS[:1], n=16, stop=stop)[0]
    for before, after in zip(free, stopped, strict=True):
        found = [before.text.find(string) for string in stop if string in before.text]
        if not found:
            assert after.text == before.text
            continue
        length = len(after.token_ids)
        assert after.finish_reason == "stop" and length < len(before.token_ids)
        assert after.token_ids.tolist() == before.token_ids[:length].tolist()
        assert after.logprobs == pytest.approx(before.logprobs[:length], abs=1e-5)
        assert after.text == before.text[:before.text.index(cut) + len(cut)]
    assert any(one.text.endswith(cut) for one in stopped)


@pytest.mark.parametrize("text, strings", [
    ("", ()), ("\n\n", ("\n\n",)), (", and", (", and",)), ("[end]", ("[end]",)),
    ('["\\n", "Q:"]', ("\n", "Q:")), ('["\n"]', ("\n",))])
def test_stop_strings_are_one_or_a_list(text, strings):
    assert stop_strings(text) == strings


@pytest.mark.parametrize("text", ['["a"', '["a", 1]', '["a", ""]'])
def test_a_list_of_stop_strings_that_is_none_is_an_error(text):
    with pytest.raises(ValueError, match="rollout.stop=.* is neither a string nor a JSON list"):
        stop_strings(text)


def test_gradient_checkpointing_does_not_cost_the_cache(model, tokenizer):
    expected = ids(sample(model, tokenizer))
    model.gradient_checkpointing_enable()
    assert ids(sample(model.train(), tokenizer)) == expected
    assert model.training


def test_text_lacks_the_marks_of_ends_and_padding_and_keeps_other_special_tokens(tokenizer):
    """A reward function sees <think>; the token that ended the response is not in its text."""
    other = copy.deepcopy(tokenizer)
    other.add_special_tokens({"bos_token": "<s>", "pad_token": "<pad>",
                              "additional_special_tokens": ["<think>", "<|end|>"]})
    s, pad, think, end = other.convert_tokens_to_ids(["<s>", "<pad>", "<think>", "<|end|>"])
    a, one = other.convert_tokens_to_ids(["a", "1"])

    def text_of(ids: list[int], stopped: bool) -> str:
        row = (np.array(ids, dtype=np.int32), None, stopped)
        return make_responses(other, [row], n=1)[0][0].text
    assert text_of([think, a, end, one, end], stopped=True) == "<think>a<|end|>1"
    assert text_of([think, a, end], stopped=False) == "<think>a<|end|>"
    assert text_of([s, a, pad, one, other.eos_token_id], stopped=True) == "a1"
    assert text_of([other.eos_token_id], stopped=True) == text_of([], stopped=False) == ""


# ---- for a whole run ----

def test_a_response_depends_on_the_seed_the_stream_and_the_position_and_on_no_words(make_state):
    state, prompts = make_state()

    def generated(seed: int, stream: str, position: int, description: str = "") -> str:
        state.config.seed = seed
        groups = generate(state, [replace(prompts[0], position=position)], SamplingParams(4, 96),
                          stream, description)
        return str(ids(groups))
    first = generated(0, "step 1", 0)
    assert generated(0, "step 1", 0) == generated(0, "step 1", 0, "other words") == first
    others = ((1, "step 1", 0), (0, "step 2", 0), (0, "validation", 0), (0, "step 1", 1))
    assert len({first, *(generated(*other) for other in others)}) == 5


def test_a_policy_that_has_diverged_is_an_error_not_a_wrong_answer(make_state):
    state, prompts = make_state()
    with torch.no_grad():
        next(state.policy.parameters()).fill_(torch.nan)
    with pytest.raises(ValueError, match="step 1: log-probs are not finite: the policy has "
                                         "diverged"):
        generate(state, prompts[:1], SamplingParams(4, 96), "step 1", "step 1")


def test_logprobs_that_were_not_asked_for_are_no_error_but_one_that_diverged_is(tokenizer):
    ids = np.array([1, 2], dtype=np.int32)
    rows = [(ids, None, True), (ids, np.array([-1, -2], dtype=np.float32), False)]
    (first, second), = make_responses(tokenizer, rows, n=2)
    assert np.isnan(first.logprobs).all() and first.logprobs.dtype == np.float32
    assert second.logprobs.tolist() == [-1, -2] and second.finish_reason == "length"
    for bad in (np.nan, -np.inf):
        rows[1] = (ids, np.array([-1, bad], dtype=np.float32), False)
        with pytest.raises(ValueError, match="log-probs are not finite"):
            make_responses(tokenizer, rows, n=2)


def test_the_seeds_choose_whose_logprobs_vllm_is_asked_for():
    seeds = [tuple(make_rng(0, "step 1", i).integers(2**32, size=4).tolist()) for i in range(100)]

    def chosen(seeds, share):
        requests = request_params(SamplingParams(4, 9, logprobs=share), seeds, stop_ids=[0])
        assert {request["logprobs"] for request in requests} <= {0, None}
        return {seed for seed, request in zip(seeds, requests, strict=True)
                if request["logprobs"] == 0}
    first = chosen(seeds, 1 / 16)
    assert len(first) == 7 and chosen(seeds[::-1], 1 / 16) == first
    assert first != set(seeds[:7])
    assert chosen(seeds, 1) == set(seeds) and chosen(seeds, 0) == set()
    assert len(chosen(seeds[:3], 1 / 16)) == 1 and chosen([], 1 / 16) == set()


# ---- from a distribution to a token ----

def test_inverse_transform_by_hand():
    logits = torch.tensor([[0.1, 0.2, 0.7]]).log().repeat(5, 1)
    tokens, logprobs = sample_tokens(logits, torch.tensor([0.0, 0.05, 0.15, 0.5, 0.9999]), 1.0)
    assert tokens.tolist() == [0, 0, 1, 2, 2]
    assert logprobs.exp().tolist() == pytest.approx([0.1, 0.1, 0.2, 0.7, 0.7])


def test_frequencies_meet_probabilities():
    logits = torch.tensor([[0.1, 0.2, 0.7]]).log().repeat(20_000, 1)
    uniforms = torch.rand(20_000, generator=torch.Generator().manual_seed(0))
    tokens, _ = sample_tokens(logits, uniforms, 1.0)
    assert (tokens.bincount() / 20_000).tolist() == pytest.approx([0.1, 0.2, 0.7], abs=0.012)


def test_an_impossible_token_is_never_sampled():
    logits = torch.tensor([[-torch.inf, 0.0, -torch.inf, 0.0, -torch.inf]]).repeat(3, 1)
    tokens, _ = sample_tokens(logits, torch.tensor([0.0, 0.5, 1 - 2**-24]), 1.0)
    assert tokens.tolist() == [1, 3, 3]
    for size in range(40_000, 40_020):  # rounding leaves the sum of all probabilities below 1
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
