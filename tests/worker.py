"""What test_distributed.py starts in several processes: three steps in every loss_agg_mode, and what came of them.

    worker.py OUT [sharded]      OUT.npz holds, for each mode, what was kept, trained on and learned
"""

import os
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch.distributed.tensor import DTensor

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
os.chdir(ROOT)

import infra.setup as run_module  # noqa: E402
import train_dapo  # noqa: E402
from infra.packing import packing  # noqa: E402
from infra.checkpoint import load_checkpoint, save_checkpoint, find_corruption  # noqa: E402
from infra.config import load_config  # noqa: E402

MODES = ["token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "uneven"]
SMALL = ["data.train_batch_size=4", "data.gen_batch_size=6", "rollout.n=4", "actor.ppo_mini_batch_size=8",
         "total_training_steps=3", "actor.max_tokens_per_micro_batch=150", "log_with="]


def sharded_accelerator(**settings) -> Accelerator:
    """Accelerate offers FSDP2 on GPUs only; its own code for it runs on CPUs as well, once it is told to."""
    accelerator = Accelerator(**settings)
    accelerator.state.distributed_type = DistributedType.FSDP
    PartialState._shared_state["distributed_type"] = DistributedType.FSDP  # as Accelerate does, for states made later
    accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap", cpu_ram_efficient_loading=False)
    return accelerator


def uneven(generate, rank, world):
    """Every other prompt's responses are cut after 3 tokens: in a pair, one rank's are ten times longer than the
    other's, which keeps no group. With one process the same prompts are cut."""
    def cut(prompts, *arguments):
        groups = generate(prompts, *arguments)
        return [[replace(r, token_ids=r.token_ids[:3], logprobs=r.logprobs[:3], text="", finish_reason="length")
                 for r in group] if (rank + world * i) % 2 else group for i, group in enumerate(groups)]
    return cut


def whole(tensor):
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().double().numpy().ravel()


def three_steps(mode: str, extras: list[str]) -> dict[str, np.ndarray]:
    overrides = [] if mode == "uneven" else [f"actor.loss_agg_mode={mode}"]
    config = load_config("config.yaml", [*SMALL, *overrides, *extras])
    run, data = train_dapo.setup(config)
    run_module.sync_weights(run)
    gradients, clip, writer = [], run.accelerator.clip_grad_norm_, run.engine.write.args[0]

    def keep_gradients(parameters, bound):
        parameters = list(parameters)
        gradients.append(np.concatenate([whole(p.grad) for p in parameters]))
        return clip(parameters, bound)
    run.accelerator.clip_grad_norm_ = keep_gradients
    if mode == "uneven":
        run = replace(run, engine=replace(run.engine, write=uneven(
            run.engine.write, run.accelerator.process_index, run.accelerator.num_processes)))
    results = {"positions": [], "tokens": [], "losses": [], "lengths": []}
    for metrics, groups, _ in train_dapo.train(run, data.train, Counter()):
        results["positions"] += [group.position for group in groups]
        results["lengths"] += [len(r.token_ids) for group in groups for r in group.responses]
        results["tokens"] += [token for group in groups for r in group.responses for token in r.token_ids]
        results["losses"].append(metrics["actor/loss"])
    policy = run.accelerator.unwrap_model(run.policy)
    weights = np.concatenate([whole(weight) for _, weight in run_module.iter_full_weights(policy)])
    copies = writer.state_dict()
    return {**results, "gradients": np.stack(gradients), "weights": weights,
            "sharded": all(isinstance(p, DTensor) for p in policy.parameters()) and run.accelerator.is_fsdp2
            and run.engine.apart and writer is not policy and packing(run.policy) == "blocks",
            "synced": all(np.array_equal(whole(copies[name]), whole(weight))
                          for name, weight in run_module.iter_full_weights(policy))}


def weights_of(run) -> np.ndarray:
    return np.concatenate([whole(w) for _, w in run_module.iter_full_weights(run.accelerator.unwrap_model(run.policy))])


def round_trip(run_dir: str) -> dict:
    """A sharded run is trained by a step, saved, exported, and read again, whole and with a shard missing."""
    def fresh():
        config = load_config("config.yaml", [*SMALL, f"run_dir={run_dir}", "total_training_steps=1"])
        run, data = train_dapo.setup(config)
        run_module.sync_weights(run)
        return run, data
    run, data = fresh()
    accelerator, directory = run.accelerator, Path(run_dir)
    if accelerator.is_main_process:
        directory.mkdir()
    accelerator.wait_for_everyone()
    (metrics, _, _), = train_dapo.train(run, data.train, Counter())
    counters = {name: metrics[name] for name in train_dapo.COUNTERS}
    save_checkpoint(accelerator, run.policy, run.optimizer.optimizer, run_dir, {"counters": counters}, keep=1)
    train_dapo.save_model(run, "model")
    (path,) = (directory / "checkpoints").iterdir()
    other, _ = fresh()
    before = weights_of(other)
    load_checkpoint(other.accelerator, other.policy, other.optimizer.optimizer, path)
    moments = [[whole(value) for value in optimizer.state[p].values()] for optimizer, policy in
               ((run.optimizer.optimizer, run.policy), (other.optimizer.optimizer, other.policy)) for p in policy.parameters()]
    half = len(moments) // 2
    exported = run_module.AutoModelForCausalLM.from_pretrained(directory / "model").state_dict()
    result = {"shards": len(list(path.glob("*.distcp"))),
              "restored": np.array_equal(weights_of(run), weights_of(other)) and not np.array_equal(weights_of(run), before)
              and half and all(np.array_equal(a, b) for x, y in zip(moments[:half], moments[half:], strict=True)
                               for a, b in zip(x, y, strict=True)),
              "exported": all(np.array_equal(whole(exported[name]), whole(w)) for name, w in
                              run_module.iter_full_weights(run.accelerator.unwrap_model(run.policy)))}
    if accelerator.is_main_process:
        (path / "__1_0.distcp").unlink()
    accelerator.wait_for_everyone()
    return {**result, "missing": find_corruption(accelerator, path)}


def main() -> None:
    out, sharded = sys.argv[1], "sharded" in sys.argv
    if sharded:
        run_module.Accelerator = sharded_accelerator
    results = {f"{mode}/{name}": value for mode in MODES
               for name, value in three_steps(mode, [f"run_dir={out}"]).items()}
    if sharded:
        results |= round_trip(f"{out}.run")
    accelerator = Accelerator(cpu=True)
    if accelerator.is_main_process:
        np.savez(out, world=accelerator.num_processes, **results)
    accelerator.wait_for_everyone()
    accelerator.end_training()


if __name__ == "__main__":
    main()
