"""What test_distributed.py starts in several processes: two steps in every loss_agg_mode, and more.

    worker.py OUT [sharded]      OUT holds, for each mode, what was kept, trained on and learned
    worker.py OUT overflow [sharded]     instead, updates in fp16, one of which is skipped
    worker.py OUT sharded loading KEY=VALUE...     instead, memory that the setup of a model takes
"""

import os
import sys
from dataclasses import replace
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin, gather_object
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
os.chdir(ROOT)

import infra.logprobs  # noqa: E402
import infra.setup  # noqa: E402
import train_dapo  # noqa: E402
from data_types import Progress, Sample  # noqa: E402
from infra.checkpoint import (find_corruption, load_checkpoint, save_checkpoint,  # noqa: E402
                              save_model)
from infra.config import load_config  # noqa: E402
from infra.distributed import iter_full_weights  # noqa: E402
from infra.packing import packing_kind  # noqa: E402
from infra.setup import setup, sync_weights  # noqa: E402
from rollout import transformers_engine  # noqa: E402

MODES = ["token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "uneven", "lora"]
LORA = ["model.lora_rank=4", "actor.lr=1e-3"]
SMALL = ["data.train_batch_size=4", "data.gen_batch_size=6", "rollout.n=4", "val.file=",
         "actor.ppo_mini_batch_size=8", "actor.max_tokens_per_micro_batch=150"]


def sharded_accelerator(**settings) -> Accelerator:
    """Accelerate offers FSDP2 on GPUs only; its own code for it runs on CPUs too, if told to."""
    accelerator = Accelerator(**settings)
    accelerator.state.distributed_type = DistributedType.FSDP
    # as Accelerate does, for states made later
    PartialState._shared_state["distributed_type"] = DistributedType.FSDP
    accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap", cpu_ram_efficient_loading=True)
    return accelerator


def uneven(generate, rank, world):
    """Every other prompt's responses are cut after 3 tokens: of two ranks, one has responses ten
    times as long as the other's, which keeps no group. One process cuts the same prompts."""
    def cut(prompts, *arguments, **options):
        groups = generate(prompts, *arguments, **options)
        for i, group in enumerate(groups):
            if (rank + world * i) % 2:
                groups[i] = [replace(r, token_ids=r.token_ids[:3], logprobs=r.logprobs[:3], text="",
                                     finish_reason="length") for r in group]
        return groups
    return cut


def whole(tensor) -> np.ndarray:
    tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return tensor.detach().double().numpy().ravel()


def policy_weights(state) -> np.ndarray:
    """Those that are trained."""
    return np.concatenate([whole(weight) for weight in state.policy.parameters()
                           if weight.requires_grad])


def merged_weights(model) -> np.ndarray:
    """What an engine gets: all weights, with LoRA's adapters merged."""
    return np.concatenate([whole(weight) for _, weight in iter_full_weights(model)])


def make_state(*overrides: str):
    state, data = setup(load_config("config.yaml", [*SMALL, *overrides]), transformers_engine)
    for name, weight in state.policy.named_parameters():
        if "lora_B" in name:  # 0 at first, and so is the gradient of the others
            weight.data.fill_(0.01)
    sync_weights(state)
    return state, data


def train(state, data, steps) -> dict:
    """Train; what was trained on, and the losses. Every rank must have the same responses."""
    results = {"positions": [], "tokens": [], "losses": [], "lengths": [], "saved": []}

    def write_step(state, record, buffer, metrics):
        results["losses"].append(metrics["actor/loss"])
        for _, stats in sorted(record.gather_token_stats().items()):
            results["saved"] += stats["values"]["ratio"] + stats["values"]["entropy"]
        written = [(response.text, response.token_ids.tolist(), response.logprobs.tolist(), score)
                   for group in record.generated
                   for response, score in zip(group.responses, group.scores, strict=True)]
        assert all(other == written for other in gather_object([written]))
        for group in record.groups:
            results["positions"].append(group.prompt.position)
            for response in group.responses:
                results["lengths"].append(len(response.token_ids))
                results["tokens"] += response.token_ids.tolist()

    train_dapo.write_step, train_dapo.save_results = write_step, lambda *_, **__: None
    state.config.total_training_steps, progress = steps, Progress()
    train_dapo.train(state, data, progress)
    assert progress.counters["step"] == steps
    return results | {"progress": progress}


def two_steps(mode: str) -> dict[str, np.ndarray]:
    """The results of training in a mode, with the gradient of each optimizer step."""
    overrides = {"uneven": [], "lora": [*LORA, "actor.use_kl_loss=true", "actor.kl_loss_coef=1"]}
    state, data = make_state(*overrides.get(mode, [f"actor.loss_agg_mode={mode}"]))
    accelerator, gradients = state.accelerator, []
    clip, rollout_model = accelerator.clip_grad_norm_, state.engine.generate.args[0]

    def keep_gradients(parameters, bound):
        parameters = list(parameters)
        gradients.append(np.concatenate([whole(p.grad) for p in parameters if p.requires_grad]))
        return clip(parameters, bound)

    accelerator.clip_grad_norm_ = keep_gradients
    if mode == "uneven":
        generate = uneven(state.engine.generate, accelerator.process_index,
                          accelerator.num_processes)
        state = replace(state, engine=replace(state.engine, generate=generate))
    paths = ("fused_linear_logprobs", "token_logprobs")  # in chunks, or from whole logits
    with mock.patch.multiple(infra.logprobs, **{
            name: mock.Mock(wraps=getattr(infra.logprobs, name)) for name in paths}):
        results = train(state, data, steps=2)
        used = [getattr(infra.logprobs, name).call_count > 0 for name in paths]
    results.pop("progress")
    policy = accelerator.unwrap_model(state.policy)
    sharded = (all(isinstance(p, DTensor) for p in policy.parameters()) and accelerator.is_fsdp2
               and state.engine.has_own_weights and rollout_model is not policy
               and packing_kind(state.policy) == "varlen")
    merged = merged_weights(policy)
    return {**results, "gradients": np.stack(gradients), "weights": policy_weights(state),
            "merged": merged, "sharded": sharded, "head_paths": used,
            "synced": np.array_equal(merged, merged_weights(rollout_model))}


def moments(state) -> list[np.ndarray]:
    """AdamW's state of all parameters."""
    optimizer = state.optimizer.optimizer
    return [whole(value) for p in state.policy.parameters() if p.requires_grad
            for value in optimizer.state[p].values()]


def round_trip(run_dir: str, *overrides: str) -> dict:
    """A sharded run trains a step, is saved, exported, and read again; then a shard is missing."""
    state, data = make_state(f"run_dir={run_dir}", *overrides)
    accelerator = state.accelerator
    if accelerator.is_main_process:
        Path(run_dir).mkdir()
    accelerator.wait_for_everyone()
    progress = train(state, data, steps=1)["progress"]
    save_checkpoint(state, progress)
    save_model(state, "model")
    (path,) = Path(run_dir, "checkpoints").iterdir()
    other, _ = make_state(f"run_dir={run_dir}", *overrides)
    weights, before = policy_weights(state), policy_weights(other)
    load_checkpoint(accelerator, other.policy, other.optimizer.optimizer, path)
    pairs = list(zip(moments(state), moments(other), strict=True))
    exported = AutoModelForCausalLM.from_pretrained(Path(run_dir, "model"))
    result = {
        "shards": len(list(path.glob("*.distcp"))),
        "restored": np.array_equal(weights, policy_weights(other)) and bool(pairs)
                    and not np.array_equal(weights, before)
                    and all(np.array_equal(a, b) for a, b in pairs),
        "exported": np.array_equal(merged_weights(exported),
                                   merged_weights(accelerator.unwrap_model(state.policy))),
        "intact": find_corruption(accelerator, path) == ""}
    if accelerator.is_main_process:
        (path / "__1_0.distcp").unlink()
    accelerator.wait_for_everyone()
    return {**result, "missing": find_corruption(accelerator, path)}


def overflow() -> None:
    """Three fp16 updates; in the first, the gradient of one rank (of its shard, if the policy is
    sharded) is not finite. Prints which were skipped, and the scales before each."""
    state, _ = make_state("mixed_precision=fp16")
    accelerator, rng = state.accelerator, np.random.default_rng(0)
    backward, skipped, scales = accelerator.backward, [], []
    samples = [Sample([1, 2, 3], rng.integers(1, 20, 9).astype(np.int32), rng.normal(),
                      rollout_logprobs=torch.full((9,), -3.0)) for _ in range(8)]

    def plant(loss):
        bad = len(scales) == 1 and accelerator.process_index == 1
        backward(loss * (torch.inf if bad and not accelerator.is_fsdp2 else 1))
        if bad and accelerator.is_fsdp2:
            next(state.policy.parameters()).grad.to_local()[:] = torch.inf

    accelerator.backward = plant
    for _ in range(3):
        before = policy_weights(state)
        scales.append(accelerator.scaler.get_scale())
        update = train_dapo.update_policy(state, samples, step=1)
        skipped.append(int(np.array_equal(before, policy_weights(state))))
        assert (update.grad_norm is None) == skipped[-1]
    print(f"skipped {skipped} scales {scales}", flush=True)


def loading(overrides: list[str]) -> None:
    """Set up without an engine. Prints, for each rank: how much memory it took at most to load the
    two models, and to shard the policy, as shares of the weights; and how far its weights are from
    the file's."""
    load, resident, rises = infra.setup.load_on_ranks, [], []

    def kilobytes(name: str) -> int:
        return int(Path("/proc/self/status").read_text().partition(f"{name}:")[2].split()[0])

    def measured_load(*args, **kwargs):
        before = kilobytes("VmRSS")
        model = load(*args, **kwargs)
        rises.append(kilobytes("VmHWM") - before)
        return model

    with mock.patch.multiple(infra.setup, load_on_ranks=measured_load, keep_freed_memory=mock.Mock(),
                             make_engine=lambda *_: resident.append(kilobytes("VmRSS"))):
        state, _ = setup(load_config("config.yaml", overrides), transformers_engine)
    rises.append(kilobytes("VmHWM") - resident[0])
    exact = AutoModelForCausalLM.from_pretrained(state.config.model.path, dtype=torch.float32)
    size = sum(weight.nbytes for weight in exact.parameters()) / 1024
    apart, own = 0.0, dict(exact.named_parameters())
    for model in (state.policy, state.reference):
        weights = dict(iter_full_weights(model))
        assert weights.keys() == own.keys() and not model.training
        apart = max(apart, *((weights[name] - own[name]).abs().max().item() for name in own))
    trained = [id(weight) for group in state.optimizer.param_groups for weight in group["params"]]
    assert trained == list(map(id, state.policy.parameters()))
    shares = " ".join(f"{rise / size:.3f}" for rise in rises)
    lines = gather_object([f"rank {state.accelerator.process_index} {shares} {apart}"])
    state.accelerator.print(*lines, sep="\n", flush=True)  # by one: theirs could mix


def main() -> None:
    out, sharded = sys.argv[1], "sharded" in sys.argv
    if sharded:
        infra.setup.Accelerator = sharded_accelerator
    results = {}
    if "overflow" in sys.argv:
        overflow()
        MODES.clear()
    if "loading" in sys.argv:
        loading(sys.argv[4:])
        MODES.clear()
    for mode in MODES:
        results |= {f"{mode}/{name}": value for name, value in two_steps(mode).items()}
    if sharded and MODES:
        results |= round_trip(f"{out}.run")
        found = round_trip(f"{out}.lora", *LORA, "model.dtype=bfloat16")
        results |= {f"lora_{name}": value for name, value in found.items()}
    accelerator = PartialState(cpu=True)
    if accelerator.is_main_process:
        np.savez(out, world=accelerator.num_processes, **results)
    accelerator.wait_for_everyone()
    os._exit(0)  # gloo's own shutdown sometimes hangs


if __name__ == "__main__":
    main()
