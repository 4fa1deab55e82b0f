"""One process, two, two hosts, or a sharded policy: the same groups, losses, gradients and policy. Real processes, over gloo."""

import json
import os
import pickle
import subprocess
import sys
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
from conftest import TINY
from safetensors.torch import load_file
from worker import MODES

from rollout import Response, pack, unpack

ROOT = Path(__file__).parent.parent
LAUNCH = [sys.executable, "-m", "accelerate.commands.launch", "--main_process_port", str(20_000 + os.getpid() % 20_000)]
WORKER = str(ROOT / "tests/worker.py")


def run_to_end(command, **environment):
    result = subprocess.run(command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, check=False,
                            timeout=500)
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    out = tmp_path_factory.mktemp("one") / "out.npz"
    run_to_end([*LAUNCH, "--num_processes", "1", WORKER, str(out)])
    return np.load(out)


def assert_alike(one, other):
    assert (one["world"], other["world"]) == (1, 2)
    for mode in MODES:
        for name in ("positions", "tokens", "lengths"):  # the same groups in the same order, to the token
            assert np.array_equal(one[f"{mode}/{name}"], other[f"{mode}/{name}"]), (mode, name)
        assert np.allclose(one[f"{mode}/losses"], other[f"{mode}/losses"], rtol=1e-5, atol=1e-5)
        gradients, others = one[f"{mode}/gradients"], other[f"{mode}/gradients"]
        assert gradients.shape == others.shape and len(gradients) == 6
        assert np.abs(gradients - others).max() < 1e-5 * max(1.0, np.abs(gradients).max()), mode
        clear = np.abs(gradients).min(axis=0) > 1e-5 * np.abs(gradients).max()  # of rounding noise Adam makes a step too
        apart = np.abs(one[f"{mode}/weights"] - other[f"{mode}/weights"])
        assert clear.mean() > 0.5 and apart[clear].max() < 1e-5 and apart.max() < 1e-4


def test_two_processes_do_what_one_does(one_process, tmp_path):
    out = tmp_path / "out.npz"
    run_to_end([*LAUNCH, "--config_file", "configs/accelerate_ddp.yaml", "--num_processes", "2", WORKER, str(out)])
    assert_alike(one_process, np.load(out))


def test_a_sharded_policy_is_the_same_policy(one_process, tmp_path):
    """FSDP2: same gradients, and whole weights reach the model that writes the responses."""
    out = tmp_path / "out.npz"
    run_to_end([*LAUNCH, "--multi_gpu", "--num_processes", "2", WORKER, str(out), "sharded"])
    sharded = np.load(out)
    assert_alike(one_process, sharded)
    for mode in MODES:
        assert sharded[f"{mode}/sharded"] and sharded[f"{mode}/synced"] and not one_process[f"{mode}/sharded"]
    assert sharded["shards"] == 2 and sharded["restored"] and sharded["exported"] and sharded["missing"] == "__1_0.distcp is missing"


def test_the_uneven_case_is_uneven(one_process):
    """What `uneven` cuts is never kept: so one of two ranks keeps nothing, while its responses have 3 tokens."""
    assert one_process["uneven/lengths"].mean() > 10 and one_process["uneven/lengths"].max() > 30
    assert set(one_process["uneven/positions"] % 2) == {0}


def test_deepspeed_shards_the_same_policy(tmp_path):
    """ZeRO-3 on CPUs; everything is sharded, however small. Its first run compiles for minutes."""
    pytest.importorskip("deepspeed", reason="needs deepspeed, which is optional")
    zero = tmp_path / "zero3.json"
    zero.write_text(json.dumps({"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
                                "gradient_accumulation_steps": 1, "train_micro_batch_size_per_gpu": 1,
                                "zero_allow_untested_optimizer": True}))
    launch = [*LAUNCH, "--use_deepspeed", "--zero3_init_flag", "true", "--deepspeed_config_file", str(zero), "--num_processes", "2"]
    common = ["train_dapo.py", "--config", "config.yaml", *TINY, "save_every=1", "actor.max_tokens_per_micro_batch=300", "val.file="]
    for steps in (1, 2):  # the second goes on from a checkpoint
        run_to_end([*launch, *common, f"run_dir={tmp_path / 'two'}", f"total_training_steps={steps}"], DS_ACCELERATOR="cpu")
    run_to_end([*LAUNCH, "--num_processes", "1", *common, f"run_dir={tmp_path / 'one'}"])
    for a, b in zip(read(tmp_path / "one"), read(tmp_path / "two"), strict=True):
        assert a == pytest.approx(b, rel=1e-4, abs=1e-5)
    one, two = (load_file(tmp_path / name / "model/model.safetensors") for name in ("one", "two"))
    assert all(np.allclose(one[name], two[name], atol=1e-5) for name in one)


def test_what_two_processes_saved_one_goes_on_with(tmp_path, start):
    common = [*TINY, "save_every=1", "val.file="]
    run_to_end([*LAUNCH, "--multi_gpu", "--num_processes", "2", "train_dapo.py", "--config", "config.yaml",
                f"run_dir={tmp_path / 'run'}", *common, "total_training_steps=1"])
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
        ip("link", "add", "cable", "netns", names[0], "type", "veth", "peer", "name", "cable", "netns", names[1])
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
    """Run a shell script on both hosts, where `disk` is a file system of each host's own, and LAUNCH starts a
    process on each."""
    disk.mkdir()
    processes = []
    for rank, host in enumerate(hosts):
        launch = " ".join([*LAUNCH, "--multi_gpu", "--num_machines", "2", "--num_processes", "2", "--machine_rank",
                           str(rank), "--main_process_ip", "10.77.0.1"])
        processes.append(subprocess.Popen(
            ["ip", "netns", "exec", host, "unshare", "--mount", "bash", "-ec",
             f"mount -t tmpfs none {disk}; LAUNCH='{launch}'; RANK={rank}; {script}"], cwd=ROOT, text=True,
            env=os.environ | {"GLOO_SOCKET_IFNAME": "cable"}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT))
    outputs = [process.communicate(timeout=300)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], "\n".join(outputs)[-4000:]
    return outputs


def test_two_hosts_do_what_one_process_does(one_process, two_hosts, tmp_path):
    disk = tmp_path / "disk"
    on_both(two_hosts, disk, f"$LAUNCH {WORKER} {disk}/out.npz; [ $RANK = 1 ] || cp {disk}/out.npz {tmp_path}")
    assert_alike(one_process, np.load(tmp_path / "out.npz"))


def read(run_dir):
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith(("time/", "tokens_per_s/"))} for row in rows]


def test_a_run_on_two_hosts_with_disks_of_their_own_is_resumed_by_them(two_hosts, tmp_path, start):
    disk = tmp_path / "disk"
    common = " ".join([*TINY, "save_every=1", "algorithm.use_kl_in_reward=true", "actor.use_kl_loss=true",
                       "filter_groups.metric=seq_final_reward", "actor.ppo_epochs=2"])
    train = f"$LAUNCH train_dapo.py --config config.yaml run_dir={disk}/run {common}"
    outputs = on_both(two_hosts, disk, f"{train}; {train} total_training_steps=3; ls {disk}/run/checkpoints; "
                                       f"[ $RANK = 1 ] || cp -r {disk}/run {tmp_path}/hosts")
    assert all("step_00003" in output for output in outputs)  # each host has its own
    assert "going on from" in outputs[0]
    run_dir = start(*common.split(), "total_training_steps=3")
    for a, b in zip(read(run_dir)[1:], read(tmp_path / "hosts")[-3:], strict=True):
        assert {k: v for k, v in a.items() if "val/" not in k} == pytest.approx(
            {k: v for k, v in b.items() if "val/" not in k}, rel=1e-4, abs=1e-5)
    one, two = (load_file(path / "model/model.safetensors") for path in (run_dir, tmp_path / "hosts"))
    assert all(np.allclose(one[name], two[name], atol=1e-4) for name in one)


def test_responses_travel_as_flat_arrays():
    rng = np.random.default_rng(0)
    groups = [[Response(rng.integers(0, 150_000, length).astype(np.int32), rng.normal(size=length).astype(np.float32), "hm",
                        "stop" if length % 2 else "length") for length in rng.integers(0, 999, 16)] for _ in range(9)]
    packed = pack(groups)
    tokens = sum(len(r.token_ids) for group in groups for r in group)
    assert len(pickle.dumps(packed)) < 8 * tokens + 20 * 9 * 16 + 1000
    for before, after in zip(chain(*groups), chain(*unpack(packed, 16)), strict=True):
        assert np.array_equal(before.token_ids, after.token_ids) and np.array_equal(before.logprobs, after.logprobs)
        assert (before.text, before.finish_reason) == (after.text, after.finish_reason)
        assert after.token_ids.dtype == np.int32 and after.logprobs.dtype == np.float32
    assert unpack(pack([]), 16) == []
