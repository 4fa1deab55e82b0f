"""What test_distributed.py starts: the ways of responses between ranks, in four processes over gloo,
with random responses in the place of a model. Each process prints its checks at the end."""

import os
import sys
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import torch
from accelerate import Accelerator

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]

from exchange import count_bytes, start_processes  # noqa: E402

from infra.batching import make_batch, micro_batches  # noqa: E402
from infra.data import Prompt  # noqa: E402
from infra.distributed import Remote  # noqa: E402
from infra.exchange import gather_on_main, send_to_trainers  # noqa: E402
from reward import Score  # noqa: E402
from rollout import Response, SamplingParams, generate  # noqa: E402
from sampling import make_groups, mini_batches, score_responses  # noqa: E402
from train_dapo import add_logprobs, make_samples  # noqa: E402

N, PROMPTS = 4, [Prompt(i, f"p{i}", [i + 1], "8", {}) for i in range(14)]
PARAMS, LIMIT = SamplingParams(N, 900), 2000  # tokens; of a micro-batch


def random_group(seed: int) -> list[Response]:
    """Responses to prompt `seed` of 300 to 900 tokens; the last one is truncated."""
    rng, group = np.random.default_rng(seed), []
    for i in range(N):
        length = rng.integers(300, 900)
        group.append(Response(rng.integers(0, 20, length, np.int32),
                              rng.normal(size=length).astype(np.float32), f"text {seed} {i}",
                              "length" if i == N - 1 else "stop"))
    return group


def make_state(accelerator: Accelerator, per_engine: int = 1, **actor) -> SimpleNamespace:
    def generate(prompts, seeds, params, progress):
        return [random_group(ids[0] - 1) for ids in prompts]

    def score(tasks):
        return [[Score(0.0, -1.0, status="error", message="broken") if text == "text 5 2" else
                 Score(float(length % 2), float(length)) for text, length
                 in zip(task.responses, task.lengths, strict=True)] for task in tasks]

    actor = SimpleNamespace(**{"max_tokens_per_micro_batch": LIMIT, "ppo_epochs": 1,
                               "old_logprobs": "rollout", "use_kl_loss": False, **actor})
    config = SimpleNamespace(
        seed=0, actor=actor, reward=SimpleNamespace(timeout=1),
        rollout=SimpleNamespace(tensor_parallel_size=per_engine),
        algorithm=SimpleNamespace(overlong_filtering=True),
        overlong_buffer=SimpleNamespace(enable=False))
    policy = SimpleNamespace(config=SimpleNamespace(_attn_implementation="eager"))
    return SimpleNamespace(accelerator=accelerator, config=config, policy=policy, scorer=score,
                           engine=SimpleNamespace(generate=generate, has_own_weights=True),
                           tokenizer=SimpleNamespace(pad_token_id=0))


def same(a: Response, b: Response) -> bool:
    return (np.array_equal(a.token_ids, b.token_ids) and np.array_equal(a.logprobs, b.logprobs)
            and (a.text, a.finish_reason) == (b.text, b.finish_reason)
            and (a.token_ids.dtype, a.logprobs.dtype) == (np.int32, np.float32))


def check_generate(state) -> None:
    """Each response is whole on one rank, one of those that generated it; the main process can have
    all; the rest is known everywhere."""
    rank, per_engine = state.accelerator.process_index, state.config.rollout.tensor_parallel_size
    engines = state.accelerator.num_processes // per_engine
    groups = generate(state, PROMPTS, range(len(PROMPTS)), "step 1", PARAMS)
    for i, group in enumerate(groups):
        for found, expected in zip(group, random_group(i), strict=True):
            assert len(found.token_ids) == len(expected.token_ids)
            assert found.finish_reason == expected.finish_reason
            if isinstance(found.token_ids, Remote):
                assert found.token_ids.rank != rank and found.text is found.logprobs is None
                assert found.token_ids.rank // per_engine == i % engines
            else:
                assert rank // per_engine == i % engines and same(found, expected)
    whole = sum(not isinstance(group[0].token_ids, Remote) for group in groups)
    assert whole in (3, 4)  # of 14 on 4 ranks
    for i, group in enumerate(gather_on_main(state.accelerator, groups)):
        if state.accelerator.is_main_process:
            assert all(same(*pair) for pair in zip(group, random_group(i), strict=True))
    assert gather_on_main(state.accelerator, []) == []


def check_scores(state) -> None:
    """All ranks have all scores; a failure is described by the rank that has the response."""
    responses = generate(state, PROMPTS, range(len(PROMPTS)), "step 1", PARAMS)
    with mock.patch("sampling.warn") as warn:
        scores = score_responses(state, PROMPTS, responses, "step 1")
    for i, (group, of_group) in enumerate(zip(responses, scores, strict=True)):
        for j, (response, score) in enumerate(zip(group, of_group, strict=True)):
            assert score.status == ("error" if (i, j) == (5, 2) else "ok")
            assert score.score == (-1 if (i, j) == (5, 2) else len(response.token_ids))
    assert warn.call_args.args[1] == ("step 1, 1 responses count as wrong: prompt 5 ('p5'), "
                                      "response ('text 5 2'): broken")


def prepare(state):
    """The samples of a step, its mini-batches, and the group and place of each sample."""
    responses = generate(state, PROMPTS, range(len(PROMPTS)), "step 1", PARAMS)
    scores = [[Score(1.0, 1.0)] * N] * len(PROMPTS)
    groups = make_groups(state.config, range(len(PROMPTS)), PROMPTS, responses, scores)
    samples = make_samples(state.config, groups, [[0.5] * N] * len(PROMPTS))
    return samples, mini_batches(len(samples), 16, state.config.actor.ppo_epochs, 0, 1)


def check_trainers(state) -> None:
    """A rank has exactly the samples that it trains, whole, and can train no other."""
    accelerator, epochs = state.accelerator, state.config.actor.ppo_epochs
    samples, batches = prepare(state)
    sent, trained, refused = add_logprobs(state, samples, batches), set(), 0
    for batch in batches:
        mini_batch = [sent[i] for i in batch]
        micros = micro_batches(mini_batch, LIMIT, accelerator.process_index,
                               accelerator.num_processes)
        for micro in micros:
            assert make_batch(state, mini_batch, micro)["old_logprobs"].dtype == torch.float32
        trained |= {int(batch[i]) for i in chain(*micros)}
        for other in set(range(len(mini_batch))) - set(chain(*micros)):
            if isinstance(mini_batch[other].response_ids, Remote):
                try:
                    make_batch(state, mini_batch, [other])
                except ValueError as error:
                    refused += "tokens are on rank" in str(error)
    here = {i for i, sample in enumerate(sent) if not isinstance(sample.response_ids, Remote)}
    assert here == trained and len(here) < len(sent) and refused > 0
    for i, (sample, before) in enumerate(zip(sent, samples, strict=True)):
        expected = random_group(i // N)[i % N]
        assert len(sample) == len(before) and sample.in_loss == before.in_loss
        assert sample.in_loss == (i % N != N - 1) and sample.key == (i // N, i % N)
        if i in here:
            assert np.array_equal(sample.response_ids, expected.token_ids)
            for logprobs in (sample.rollout_logprobs, sample.old_logprobs):
                assert np.array_equal(logprobs.numpy(), expected.logprobs)
        else:
            assert sample.rollout_logprobs is sample.old_logprobs is None
    totals = torch.tensor(len(here), device=accelerator.device)
    total = int(accelerator.reduce(totals))
    assert total == len(sent) if epochs == 1 else len(sent) < total <= epochs * len(sent)


def check_bytes(state) -> None:
    """One copy of the responses and little more: headers, scores."""
    with count_bytes(state.accelerator) as counts:
        samples, batches = prepare(state)
        send_to_trainers(state, samples, batches)
    own = 8 * sum(len(sample.response_ids) for sample in samples)
    ratio = int(state.accelerator.reduce(torch.tensor(counts.total()))) / own
    assert 0.5 < ratio < 0.85, ratio  # three quarters of it travel


def check_errors(state) -> None:
    """What fails on one rank ends all, with its message."""
    def fail(prompts, *_, **__):
        if state.accelerator.process_index == 2:
            raise OSError("no engine")
        return [random_group(ids[0] - 1) for ids in prompts]

    broken = SimpleNamespace(**vars(state) | {"engine": SimpleNamespace(generate=fail)})
    try:
        generate(broken, PROMPTS, range(len(PROMPTS)), "step 7", PARAMS)
    except ValueError as error:
        assert str(error) == "step 7: no engine"
    else:
        raise AssertionError("not raised")


def check_all() -> None:
    """In each process."""
    accelerator = Accelerator(cpu=True)
    checks = {"generate": lambda: check_generate(make_state(accelerator)),
              "engines of two": lambda: check_generate(make_state(accelerator, per_engine=2)),
              "scores": lambda: check_scores(make_state(accelerator, per_engine=2)),
              "trainers": lambda: check_trainers(make_state(accelerator)),
              "two epochs": lambda: check_trainers(make_state(accelerator, 2, ppo_epochs=2)),
              "bytes": lambda: check_bytes(make_state(accelerator)),
              "errors": lambda: check_errors(make_state(accelerator))}
    for check in checks.values():
        check()
    # In one piece: four processes share this pipe.
    os.write(1, f"rank {accelerator.process_index}: {', '.join(checks)}\n".encode())


if __name__ == "__main__":
    start_processes(4, check_all)
