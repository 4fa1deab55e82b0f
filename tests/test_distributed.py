"""One process, two, two hosts, or a sharded policy: the same groups, losses and gradients."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path
from threading import Barrier, local
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import PartialState
from conftest import TINY, logprobs_of
from safetensors.torch import load_file
from test_train import make_mini_batch
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config
from worker import MODES

import infra.distributed
import infra.logprobs
from data_types import Prompt, Response, Sample, SamplingParams, Score
from infra.batching import make_batch, micro_batches
from infra.config import load_config
from infra.distributed import map_over_ranks, raise_on_all_ranks
from infra.logprobs import compute_logprobs
from infra.memory import estimate_memory
from infra.packing import packing_kind
from infra.setup import load_on_ranks
from rollout import generate
from sampling import score_responses
from train_dapo import compute_loss

ROOT = Path(__file__).parent.parent
LAUNCH = [sys.executable, "-m", "accelerate.commands.launch", "--main_process_port",
          str(20_000 + os.getpid() % 20_000)]
WORKER = str(ROOT / "tests/worker.py")


# ---- without other processes ---------------------------------------------------------------------

@pytest.mark.parametrize("mode", MODES[:3])
def test_the_gradients_of_two_ranks_add_up_to_that_of_one(make_state, mode):
    state, _ = make_state(f"actor.loss_agg_mode={mode}", double=True)
    rng, gradients = np.random.default_rng(0), {}
    samples = []
    for length in (40, 3, 17, 9, 5):
        ids = rng.integers(1, 20, length).astype(np.int32)
        samples.append(Sample([1, 2, 3], ids, rng.normal(), length != 9,
                              *torch.full((2, length), -1.0)))
    for world, max_tokens in ((1, 10**6), (2, 60)):  # one micro-batch, and several
        state.policy.zero_grad()
        for rank in range(world):
            for micro in micro_batches(samples, max_tokens, rank, world, "varlen"):
                loss, _ = compute_loss(state.config, state.policy, make_batch(state, micro), 65, 4)
                loss.backward()
        gradients[world] = torch.cat([p.grad.flatten() for p in state.policy.parameters()])
    assert gradients[1].norm() > 0.01
    assert torch.allclose(gradients[1], gradients[2], rtol=1e-6, atol=1e-9)


@pytest.fixture
def as_ranks(monkeypatch):
    """`as_ranks(function, world)`: the results or errors of `function(accelerator)` on each of so
    many ranks. They are threads, with a `gather_object` of their own."""
    def as_ranks(function, world):
        barrier, sent, this = Barrier(world, timeout=60), [None] * world, local()

        def gather_object(items):
            sent[this.rank] = items
            barrier.wait()  # all have sent theirs
            gathered = list(chain(*sent))
            barrier.wait()  # all have read: the next call may replace them
            return gathered

        def run(rank):
            this.rank = rank
            try:
                return function(SimpleNamespace(
                    process_index=rank, num_processes=world, is_main_process=rank == 0,
                    device=torch.device("cpu"), autocast=nullcontext))
            except Exception as error:
                return error

        for module in (infra.distributed, infra.logprobs):
            monkeypatch.setattr(module, "gather_object", gather_object)
        with ThreadPoolExecutor(world) as pool:
            return list(pool.map(run, range(world)))
    return as_ranks


@pytest.mark.parametrize("ranks_per_share, shares", [(1, 3), (2, 2), (1, 1), (4, 1)])
@pytest.mark.parametrize("count", [0, 1, 7])
def test_the_ranks_divide_the_work_and_each_gets_all_results_in_order(as_ranks, ranks_per_share,
                                                                      shares, count):
    """Neighbours that work on a share together, as those of one engine, count once."""
    def square_all(rank):
        def square(items):
            worked[rank.process_index] = list(items)
            return [item**2 for item in items]
        return map_over_ranks(rank, square, range(count), "", ranks_per_share)

    worked, world = {}, shares * ranks_per_share
    assert as_ranks(square_all, world) == [[i**2 for i in range(count)]] * world
    for rank in range(world):
        assert worked[rank] == list(range(count))[rank // ranks_per_share::shares]


def test_an_error_on_one_rank_is_raised_on_all_of_them(as_ranks):
    def fail_on_1(rank):
        def work(items):
            if rank.process_index == 1:
                raise KeyError("lost")
            return items
        return map_over_ranks(rank, work, [0, 1, 2], "step 3")

    def fail_on_0(rank):
        with raise_on_all_ranks("cannot save x"):
            if rank.process_index == 0:
                raise PermissionError("a line\nnot allowed")

    for function, kind, message in ((fail_on_1, ValueError, "step 3: KeyError('lost')"),
                                    (fail_on_0, OSError, "cannot save x: not allowed")):
        errors = as_ranks(function, 2)
        assert [(type(error), str(error)) for error in errors] == [(kind, message)] * 2


@pytest.mark.parametrize("failure", [ValueError("no kernel"), KeyError("no kernel")])
def test_a_rank_that_shares_an_engine_and_fails_ends_at_once_with_one_line(failure, monkeypatch,
                                                                           capsys):
    """The other ranks of the engine wait for it there; the launcher stops them."""
    class Ended(BaseException):
        """In place of the end of this process."""

    def exit_now(code):
        raise Ended(code)

    def work(items):
        raise failure
    monkeypatch.setattr(os, "_exit", exit_now)
    monkeypatch.setattr(infra.distributed, "gather_object", None)  # nobody else would come
    rank = SimpleNamespace(process_index=3, num_processes=4)
    with pytest.raises(Ended, match="1"):
        map_over_ranks(rank, work, [0, 1], "step 3", ranks_per_share=2)
    *traceback, line = capsys.readouterr().err.splitlines()
    assert line.startswith("error: step 3: ") and "no kernel" in line and "(rank 3)" in line
    assert "the same command resumes" in line
    assert bool(traceback) == isinstance(failure, KeyError)  # a bug: where it is matters


def test_every_rank_has_the_responses_and_scores_that_one_process_has(as_ranks, capsys):
    """A prompt is given to one engine, on all of its ranks, and scored once; one rank warns."""
    prompts = [Prompt(i, f"p{i}", [i], str(i), {}, position=i) for i in range(7)]

    def respond(seed, n):
        rng = np.random.default_rng(seed)
        return [Response(rng.integers(0, 99, 5, np.int32), rng.random(5, np.float32), "x", "stop")
                for _ in range(n)]

    def score(task):
        if task.ground_truth == "5":
            return [Score(None, 0.0, status="error", message="broken")] * len(task.responses)
        return [Score(1.0, float(task.ground_truth))] * len(task.responses)

    def run_step(rank, per_engine):
        def generate_share(ids, seeds, params, progress):
            assert progress == ("step 1" if rank.is_main_process else "")
            generated.extend((rank.process_index // per_engine, *prompt) for prompt in ids)
            return [respond(seed, params.n) for seed in seeds]

        def score_share(tasks):
            scored.extend(int(task.ground_truth) for task in tasks)
            return list(map(score, tasks))

        config = SimpleNamespace(seed=0, rollout=SimpleNamespace(tensor_parallel_size=per_engine))
        state = SimpleNamespace(accelerator=rank, config=config, scorer=score_share,
                                engine=SimpleNamespace(generate=generate_share))
        groups = generate(state, prompts, SamplingParams(4, 5), "step 1", "step 1")
        found = [[(r.token_ids.tolist(), r.logprobs.tolist()) for r in group] for group in groups]
        return found, score_responses(state, prompts, groups, "step 1")

    results = []
    for world, per_engine in ((1, 1), (3, 1), (4, 2)):
        generated, scored = [], []
        results += as_ranks(partial(run_step, per_engine=per_engine), world)
        engines = world // per_engine
        assert sorted(generated) == sorted([(i % engines, i) for i in range(7)] * per_engine)
        assert sorted(scored) == list(range(7))
        assert capsys.readouterr().out.count("4 responses count as wrong: prompt 5") == 1
    assert results == results[:1] * 8
    groups, scores = results[0]
    assert len({str(response) for group in groups for response in group}) == 28
    assert [group[0].score for group in scores] == [0, 1, 2, 3, 4, 0, 6]


def test_every_rank_has_the_log_probs_of_all_samples(as_ranks, make_state):
    """Of several mini-batches, of which one gives most ranks nothing to do; all ranks run the model
    equally often, as a sharded one must."""
    state, prompts = make_state("actor.max_tokens_per_micro_batch=120")
    samples = make_mini_batch(state, prompts)
    expected = {sample.key: logprobs_of(state, state.policy, [sample])[0] for sample in samples}

    def compute(rank):
        model, passes = deepcopy(state.policy), []
        model.register_forward_hook(lambda *_: passes.append(1))
        found = compute_logprobs(replace(state, accelerator=rank, policy=model), model,
                                 [samples[:1], samples[1:4], samples[4:]])
        return found, len(passes)

    for world in (1, 3):
        outcomes = as_ranks(compute, world)
        assert len({passes for _, passes in outcomes}) == 1 and outcomes[0][1] > 1
        for found, _ in outcomes:
            assert found.keys() == expected.keys()
            assert all(torch.allclose(found[key], expected[key], atol=1e-5) for key in expected)


@pytest.fixture
def as_rank_of_fsdp2(capsys):
    """`as_rank_of_fsdp2(rank, "key=value", ...)`: what such a rank has loaded, and has printed."""
    def load(rank, *overrides, trained=True):
        plugin = SimpleNamespace(cpu_ram_efficient_loading=True)
        accelerator = SimpleNamespace(is_fsdp2=True, is_main_process=rank == 0, print=print,
                                      state=SimpleNamespace(fsdp_plugin=plugin))
        PartialState(cpu=True)
        config = load_config("config.yaml", overrides)
        return load_on_ranks(config, accelerator, trained), capsys.readouterr().out
    return load


def test_a_rank_that_gets_its_weights_from_rank_0_has_all_else_and_reads_none(as_rank_of_fsdp2,
                                                                              monkeypatch):
    """Weights that lie apart in memory too: Accelerate finds those of the optimizer by that."""
    model, _ = as_rank_of_fsdp2(0)
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", None)
    empty, _ = as_rank_of_fsdp2(1)
    for kind in ("named_parameters", "named_buffers"):
        pairs = zip(getattr(model, kind)(), getattr(empty, kind)(), strict=True)
        for (name, one), (other_name, other) in pairs:
            assert (name, one.shape, one.dtype) == (other_name, other.shape, other.dtype)
            assert kind == "named_parameters" or torch.equal(one, other)
    assert len({weight.data_ptr() for weight in empty.parameters()}) == len([*empty.parameters()])
    assert empty.lm_head.weight is empty.model.embed_tokens.weight
    assert not empty.training and packing_kind(empty) == packing_kind(model) == "varlen"


def test_weights_that_fsdp2_will_train_in_float32_are_so_from_the_start(as_rank_of_fsdp2):
    """With mixed precision; so the estimate of memory counts them, and a line says it."""
    bf16 = "model.dtype=bfloat16", "mixed_precision=bf16"
    line = "model.dtype: with mixed_precision, FSDP2 trains weights in float32\n"
    for rank in (0, 1):
        model, printed = as_rank_of_fsdp2(rank, *bf16)
        assert {weight.dtype for weight in model.parameters()} == {torch.float32}
        assert printed == line
        memory = estimate_memory(load_config("config.yaml", bf16), model, ranks=2, sharded=True)
        assert memory["update"]["weights"] == 4 * model.num_parameters() / 2
    for options in ((*bf16, False), (bf16[0], True), (bf16[1], True)):
        model, printed = as_rank_of_fsdp2(0, *options[:-1], trained=options[-1])
        kept = torch.float32 if options[0] == bf16[1] else torch.bfloat16
        assert {weight.dtype for weight in model.parameters()} == {kept} and printed == ""


# ---- real processes, over gloo -------------------------------------------------------------------

def run_to_end(command):
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False,
                            timeout=500)
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    out = tmp_path_factory.mktemp("one") / "out.npz"
    run_to_end([sys.executable, WORKER, str(out)])
    return np.load(out)


def assert_alike(one, other):
    assert (one["world"], other["world"]) == (1, 2)
    for mode in MODES:
        for name in ("positions", "tokens", "lengths"):  # the same groups in the same order
            assert np.array_equal(one[f"{mode}/{name}"], other[f"{mode}/{name}"]), (mode, name)
        losses = [results[f"{mode}/losses"] for results in (one, other)]
        assert np.allclose(*losses, rtol=1e-5, atol=1e-5)
        saved = [results[f"{mode}/saved"] for results in (one, other)]  # of tokens, on any rank
        assert len(saved[0]) and np.allclose(*saved, rtol=2e-3, atol=1e-4)
        gradients, others = one[f"{mode}/gradients"], other[f"{mode}/gradients"]
        assert gradients.shape == others.shape and len(gradients) == 4
        assert np.abs(gradients - others).max() < 1e-5 * max(1.0, np.abs(gradients).max()), mode
        # Adam makes a whole step of rounding noise too
        clear = np.abs(gradients).min(axis=0) > 1e-5 * np.abs(gradients).max()
        apart = np.abs(one[f"{mode}/weights"] - other[f"{mode}/weights"])
        assert clear.mean() > 0.5 and apart[clear].max() < 1e-5 and apart.max() < 1e-4
        assert np.abs(one[f"{mode}/merged"] - other[f"{mode}/merged"]).max() < 1e-4
        for results in (one, other):  # the fused head, and nothing else
            assert results[f"{mode}/head_paths"].tolist() == [True, False], mode


@pytest.mark.slow
def test_two_processes_do_what_one_does(one_process, tmp_path):
    out = tmp_path / "out.npz"
    run_to_end([*LAUNCH, "--config_file", "configs/accelerate_ddp.yaml", "--num_processes", "2",
                WORKER, str(out)])
    assert_alike(one_process, np.load(out))


@pytest.mark.slow
def test_a_sharded_policy_is_the_same_policy(one_process, tmp_path):
    """FSDP2: the same gradients, and whole weights reach the model that generates."""
    out = tmp_path / "out.npz"
    run_to_end([*LAUNCH, "--multi_gpu", "--num_processes", "2", WORKER, str(out), "sharded"])
    sharded = np.load(out)
    assert_alike(one_process, sharded)
    for mode in MODES:
        assert sharded[f"{mode}/sharded"] and sharded[f"{mode}/synced"]
        assert not one_process[f"{mode}/sharded"]
    assert sharded["shards"] == 2 and sharded["restored"] and sharded["exported"]
    assert sharded["intact"] and "__1_0.distcp" in str(sharded["missing"])
    assert sharded["lora_shards"] == 2 and sharded["lora_restored"] and sharded["lora_exported"]


@pytest.mark.slow
@pytest.mark.parametrize("tied", [True, False])
def test_ranks_that_get_their_weights_from_rank_0_start_with_empty_ones(tied, tmp_path):
    """FSDP2 with cpu_ram_efficient_loading, and a reference policy too."""
    config = Qwen2Config(vocab_size=4096, hidden_size=512, num_hidden_layers=12,
                         num_attention_heads=8, num_key_value_heads=8, intermediate_size=2048,
                         tie_word_embeddings=tied)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(ROOT / "toy/base").save_pretrained(tmp_path)
    common = [f"model.path={tmp_path}", "val.file=", "actor.use_kl_loss=true"]
    for precision in ("mixed_precision=no", "mixed_precision=bf16 model.dtype=bfloat16"):
        printed = run_to_end([*LAUNCH, "--multi_gpu", "--num_processes", "2", WORKER,
                              str(tmp_path / "out"), "sharded", "loading", *common,
                              *precision.split()])
        ranks = re.findall(r"rank (.) (\S+) (\S+) (\S+) (\S+)", printed)
        (policy, reference, shards, _), = (found for rank, *found in ranks if rank == "1")
        assert len(ranks) == 2 and all(apart == "0.0" for *_, apart in ranks)
        assert float(policy) < 0.1 and float(reference) < 0.1 and 0.4 < float(shards) < 1


@pytest.mark.slow
def test_what_a_launcher_prints_last_has_our_error_line(tmp_path):
    """With one process, and the launcher told to be quiet, it is the last line; with several, the
    launcher's report ends with it."""
    train = ["train_dapo.py", "--config", "config.yaml", f"run_dir={tmp_path}", "rollout.n=1.5"]
    for options in (["--quiet"], ["--multi_gpu", "--num_processes", "2"]):
        result = subprocess.run([*LAUNCH, *options, *train], cwd=ROOT, stderr=subprocess.PIPE,
                                text=True, timeout=100)
        last = result.stderr.rstrip().rstrip("=").rstrip().splitlines()[-1]
        ours = last.removeprefix("  traceback : ")
        assert result.returncode == 1 and ours.startswith("error: command line: config key rollout.n")
        assert len(re.findall("^error: ", result.stderr, re.MULTILINE)) == 1
        assert "Traceback" not in result.stderr or options != ["--quiet"]


@pytest.mark.slow
def test_a_killed_rank_ends_in_a_report_that_says_how_to_resume(tmp_path):
    run_dir, log = tmp_path / "run", tmp_path / "log"
    with open(log, "w") as opened:
        process = subprocess.Popen(
            [*LAUNCH, "--multi_gpu", "--num_processes", "2", "train_dapo.py", "--config",
             "config.yaml", *TINY, f"run_dir={run_dir}", "total_training_steps=5000",
             "save_every=1", "val.file="], cwd=ROOT, stderr=opened, stdout=opened)
        while not list(run_dir.glob("checkpoints/step_*")):
            assert process.poll() is None
            time.sleep(0.1)
        children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True,
                                  text=True, check=True).stdout.split()
        os.kill(int(children[-1]), signal.SIGKILL)
        assert process.wait(timeout=120) == 1
    report = log.read_text().partition("train_dapo.py FAILED")[2]
    assert re.search("traceback : error: another rank has ended, or cannot be reached .* is "
                     "intact: the same command resumes from it", report)


@pytest.mark.slow
def test_the_uneven_case_is_uneven(one_process):
    """What `uneven` cuts is never kept: one of two ranks keeps nothing, and its responses have 3
    tokens."""
    lengths = one_process["uneven/lengths"]
    assert lengths.mean() > 10 and lengths.max() > 30
    assert set(one_process["uneven/positions"] % 2) == {0}


@pytest.mark.slow
@pytest.mark.parametrize("lora_rank", [0, 4])
def test_one_process_resumes_what_two_have_saved(tmp_path, start, lora_rank):
    common = [*TINY, "save_every=1", "val.file=", f"model.lora_rank={lora_rank}"]
    run_to_end([*LAUNCH, "--multi_gpu", "--num_processes", "2", "train_dapo.py", "--config",
                "config.yaml", f"run_dir={tmp_path / 'run'}", *common, "total_training_steps=1"])
    both = start(*common, "total_training_steps=2").rename(tmp_path / "both")
    one = start(*common, "total_training_steps=2")
    for a, b in zip(read(one), read(both), strict=True):
        assert a == pytest.approx(b, rel=1e-4, abs=1e-5)


@pytest.fixture
def two_hosts():
    """Two network namespaces with a cable between them."""
    names = [f"dapo{os.getpid()}{side}" for side in "ab"]

    def ip(*arguments):
        return subprocess.run(["ip", *arguments], capture_output=True, text=True, check=True)
    try:
        for name in names:
            ip("netns", "add", name)
        ip("link", "add", "cable", "netns", names[0], "type", "veth", "peer", "name", "cable",
           "netns", names[1])
        for i, name in enumerate(names):
            ip("-n", name, "addr", "add", f"10.77.0.{i + 1}/24", "dev", "cable")
            ip("-n", name, "link", "set", "cable", "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield names
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no network namespaces here (they need root and iproute2): {error}")
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)


def on_both(hosts, script):
    """Run a shell script on both hosts, which may mount file systems of their own; LAUNCH starts a
    process on each. Returns what each printed."""
    processes = []
    for rank, host in enumerate(hosts):
        launch = " ".join([*LAUNCH, "--multi_gpu", "--num_machines", "2", "--num_processes", "2",
                           "--machine_rank", str(rank), "--main_process_ip", "10.77.0.1"])
        processes.append(subprocess.Popen(
            ["ip", "netns", "exec", host, "unshare", "--mount", "bash", "-ec",
             f"LAUNCH='{launch}'; {script}"], cwd=ROOT, text=True, stdout=subprocess.PIPE,
            env=os.environ | {"GLOO_SOCKET_IFNAME": "cable"}, stderr=subprocess.STDOUT))
    outputs = [process.communicate(timeout=300)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], "\n".join(outputs)[-4000:]
    return outputs


def read(run_dir):
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items()
             if not name.startswith(("time/", "memory/", "tokens_per_s/", "val/"))} for row in rows]


@pytest.mark.slow
def test_two_hosts_do_what_one_process_does_and_resume(one_process, two_hosts, tmp_path, start):
    """They see one directory."""
    common = [*TINY, "save_every=1", "algorithm.use_kl_in_reward=true", "actor.use_kl_loss=true",
              "filter_groups.metric=seq_final_reward", "actor.ppo_epochs=2"]
    hosts = tmp_path / "hosts"
    train = f"$LAUNCH train_dapo.py --config config.yaml run_dir={hosts} {' '.join(common)}"
    branch = f"$LAUNCH train_dapo.py --config config.yaml run_dir={tmp_path}/branch "
    branch += f"{' '.join(common)} resume={hosts}/checkpoints/step_00002 total_training_steps=3 "
    branch += "actor.lr=1e-5"
    outputs = on_both(two_hosts, "; ".join([
        f"$LAUNCH {WORKER} {tmp_path}/out.npz", train, f"{train} total_training_steps=3", branch]))
    assert_alike(one_process, np.load(tmp_path / "out.npz"))
    assert (tmp_path / "branch/branch.json").exists()
    assert "resuming from" in outputs[0] and "actor.lr: 0.0001 -> 1e-05" in outputs[0]
    one = start(*common, "total_training_steps=3")
    for a, b in zip(read(one)[1:], read(hosts)[-3:], strict=True):
        assert a == pytest.approx(b, rel=1e-4, abs=1e-5)
    weights, others = (load_file(path / "model/model.safetensors") for path in (one, hosts))
    assert all(np.allclose(weights[name], others[name], atol=1e-4) for name in weights)


@pytest.mark.slow
def test_hosts_that_see_different_directories_are_refused_in_one_line(two_hosts, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    outputs = on_both(two_hosts, f"mount -t tmpfs none {disk}; mkdir {disk}/run; "
                      f"echo earlier > {disk}/run/.lock; if $LAUNCH train_dapo.py "
                      f"--config config.yaml run_dir={disk}/run; then exit 9; fi")
    for output in outputs:
        (error,) = [line for line in output.splitlines() if line.startswith("error: ")]
        assert f"run_dir: {disk}/run is not the same directory on all machines" in error
        assert 'train_dapo.py", line' not in output  # a traceback
