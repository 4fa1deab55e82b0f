"""One process, two, two hosts, or a sharded policy: the same groups, losses and gradients."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import TINY
from safetensors.torch import load_file
from worker import MODES

import infra.distributed
from infra.batching import collate, make_batch, micro_batches
from infra.distributed import Remote, map_over_ranks, owner_of, raise_on_all_ranks
from data_types import Sample
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
            for indices in micro_batches(samples, max_tokens, rank, world, packed=True):
                loss, _ = compute_loss(state.config, state.policy,
                                       make_batch(state, samples, indices), 65, 4)
                loss.backward()
        gradients[world] = torch.cat([p.grad.flatten() for p in state.policy.parameters()])
    assert gradients[1].norm() > 0.01
    assert torch.allclose(gradients[1], gradients[2], rtol=1e-6, atol=1e-9)


@pytest.fixture
def as_ranks(monkeypatch):
    """`as_ranks(function, world)`: the results or errors of `function(accelerator)` on each of so
    many ranks, which take part in one `gather_object`."""
    def as_ranks(function, world):
        class Meeting(Exception):
            pass

        def meet(sent):
            raise Meeting(sent)

        ranks, sent, outcomes = [SimpleNamespace(process_index=rank, num_processes=world)
                                 for rank in range(world)], [], []
        monkeypatch.setattr(infra.distributed, "gather_object", meet)
        for rank in ranks:
            with pytest.raises(Meeting) as meeting:
                function(rank)
            sent += meeting.value.args[0]
        monkeypatch.setattr(infra.distributed, "gather_object", lambda _: sent)
        for rank in ranks:
            try:
                outcomes.append(function(rank))
            except Exception as error:
                outcomes.append(error)
        return outcomes
    return as_ranks


@pytest.mark.parametrize("owners", [[0] * 7, [0, 1, 0, 1, 0, 1, 0], [2, 0, 0, 2, 1, 1, 2]])
def test_each_item_is_the_work_of_its_owner_and_every_rank_gets_all_results_in_order(as_ranks,
                                                                                     owners):
    shares, world = [], max(owners) + 1

    def square(items):
        shares.append(list(items))
        return [item**2 for item in items]

    outcomes = as_ranks(lambda rank: map_over_ranks(rank, square, range(7), owners, ""), world)
    assert outcomes == [[0, 1, 4, 9, 16, 25, 36]] * world
    for rank in range(world):
        assert shares[rank] == [i for i, owner in enumerate(owners) if owner == rank]


def test_an_error_on_one_rank_is_raised_on_all_of_them(as_ranks):
    def fail_on_1(rank):
        def work(items):
            if rank.process_index == 1:
                raise KeyError("lost")
            return items
        return map_over_ranks(rank, work, [0, 1, 2], [0, 1, 0], "step 3")

    def fail_on_0(rank):
        with raise_on_all_ranks("cannot save x"):
            if rank.process_index == 0:
                raise PermissionError("a line\nnot allowed")

    for function, kind, message in ((fail_on_1, ValueError, "step 3: KeyError('lost')"),
                                    (fail_on_0, OSError, "cannot save x: not allowed")):
        errors = as_ranks(function, 2)
        assert [(type(error), str(error)) for error in errors] == [(kind, message)] * 2


def test_tokens_of_another_rank_have_a_length_and_nothing_else():
    sample = Sample([1, 2], Remote(30, rank=5), 0.0)
    assert len(sample) == 32
    assert [owner_of(SimpleNamespace(process_index=3), ids)
            for ids in (sample.response_ids, np.zeros(2, np.int32))] == [5, 3]
    with pytest.raises(ValueError, match="these 30 tokens are on rank 5 only"):
        collate([sample], pad_id=0)


# ---- real processes, over gloo -------------------------------------------------------------------

def test_responses_go_to_the_ranks_that_train_them_and_nowhere_else():
    """The checks, by rank, are those of exchange_worker.py."""
    lines = run_to_end([sys.executable, str(ROOT / "tests/exchange_worker.py")]).splitlines()
    assert [line.partition(":")[0] for line in sorted(lines)] == [f"rank {i}" for i in range(4)]
    assert all(line.endswith("generate, engines of two, scores, trainers, two epochs, bytes, errors")
               for line in lines)


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


def on_both(hosts, disk, script):
    """Run a shell script on both hosts; `disk` is a file system of each host's own, and LAUNCH
    starts a process on each."""
    disk.mkdir()
    processes = []
    for rank, host in enumerate(hosts):
        launch = " ".join([*LAUNCH, "--multi_gpu", "--num_machines", "2", "--num_processes", "2",
                           "--machine_rank", str(rank), "--main_process_ip", "10.77.0.1"])
        processes.append(subprocess.Popen(
            ["ip", "netns", "exec", host, "unshare", "--mount", "bash", "-ec",
             f"mount -t tmpfs none {disk}; LAUNCH='{launch}'; RANK={rank}; {script}"], cwd=ROOT,
            text=True, env=os.environ | {"GLOO_SOCKET_IFNAME": "cable"}, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT))
    outputs = [process.communicate(timeout=300)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], "\n".join(outputs)[-4000:]
    return outputs


def read(run_dir):
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items()
             if not name.startswith(("time/", "tokens_per_s/", "val/"))} for row in rows]


@pytest.mark.slow
def test_two_hosts_with_disks_of_their_own_do_what_one_process_does_and_resume(
        one_process, two_hosts, tmp_path, start):
    disk = tmp_path / "disk"
    common = [*TINY, "save_every=1", "algorithm.use_kl_in_reward=true", "actor.use_kl_loss=true",
              "filter_groups.metric=seq_final_reward", "actor.ppo_epochs=2"]
    train = f"$LAUNCH train_dapo.py --config config.yaml run_dir={disk}/run {' '.join(common)}"
    branch = f"$LAUNCH train_dapo.py --config config.yaml run_dir={disk}/branch {' '.join(common)} "
    branch += f"resume={disk}/run/checkpoints/step_00002 total_training_steps=3 actor.lr=1e-5"
    outputs = on_both(two_hosts, disk, "; ".join([
        f"$LAUNCH {WORKER} {disk}/out.npz", train, f"{train} total_training_steps=3", branch,
        f"ls {disk}/run/checkpoints {disk}/branch",
        f"[ $RANK = 1 ] || cp -r {disk}/run {disk}/out.npz {tmp_path}"]))
    assert_alike(one_process, np.load(tmp_path / "out.npz"))
    for output in outputs:  # each host has its own
        assert "step_00003" in output and "branch.json" in output
    assert "resuming from" in outputs[0] and "actor.lr: 0.0001 -> 1e-05" in outputs[0]
    hosts = (tmp_path / "run").rename(tmp_path / "hosts")
    one = start(*common, "total_training_steps=3")
    for a, b in zip(read(one)[1:], read(hosts)[-3:], strict=True):
        assert a == pytest.approx(b, rel=1e-4, abs=1e-5)
    weights, others = (load_file(path / "model/model.safetensors") for path in (one, hosts))
    assert all(np.allclose(weights[name], others[name], atol=1e-4) for name in weights)
