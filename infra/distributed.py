"""What several ranks need: shared work, errors that reach all of them, whole weights, signals."""

import os
import signal
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, gather_object
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.tensor import DTensor


@dataclass(frozen=True)
class Remote:
    """In the place of token ids (T,) that another rank has: T, and that rank."""
    length: int
    rank: int

    def __len__(self) -> int:
        return self.length

    def __array__(self, *_, **__):
        raise ValueError(f"these {self.length} tokens are on rank {self.rank} only")


def owner_of(accelerator: Accelerator, token_ids: np.ndarray | Remote) -> int:
    """The rank that has the token ids."""
    return token_ids.rank if isinstance(token_ids, Remote) else accelerator.process_index


def map_over_ranks(accelerator: Accelerator, function: Callable[[list], Sequence], items: Sequence,
                   owners: Sequence[int], doing: str) -> list:
    """Every rank gets the results of all items in order: each is computed by the rank that
    `owners` names for it.

    Args:
        function: from the items of a rank to a sequence of as many results.
        doing: what an error message says was going on.
    Raises:
        ValueError on all ranks if `function` raises on one of them; its own error on one process.
    """
    results, error = [], ""
    try:
        results = function([item for item, owner in zip(items, owners, strict=True)
                            if owner == accelerator.process_index])
    except (OSError, ValueError) as failure:
        error = str(failure) or repr(failure)
    except Exception as failure:  # a bug: where it is matters
        if accelerator.num_processes == 1:
            raise
        traceback.print_exc()
        error = repr(failure)
    gathered = gather_object([(results, error)])
    for _, error in gathered:
        if error:
            raise ValueError(f"{doing}: {error}")
    return in_order([results for results, _ in gathered], owners)


def in_order(of_ranks: Sequence[Sequence], owners: Sequence[int]) -> list:
    """One list of all ranks' results; `owners` has the rank of each."""
    iterators = [iter(results) for results in of_ranks]
    return [next(iterators[owner]) for owner in owners]


@contextmanager
def raise_on_all_ranks(doing: str) -> Iterator[None]:
    """A barrier: an error inside on one rank is a one-line OSError on all, so that none waits."""
    error = ""
    try:
        yield
    except (Exception, CheckpointException) as failure:  # a full disk has many names
        error = f"{doing}: {(str(failure).strip() or repr(failure)).splitlines()[-1]}"
    if errors := [error for error in gather_object([error]) if error]:
        raise OSError(errors[0])


def is_sharded(accelerator: Accelerator) -> bool:
    """Whether each rank holds only a shard of the policy (FSDP2)."""
    return accelerator.distributed_type == DistributedType.FSDP


@torch.no_grad()
def iter_full_weights(policy: torch.nn.Module, tied: bool = False) -> Iterator[tuple[str, Tensor]]:
    """Name and value of each weight, whole, one at a time; collective if the policy is sharded.

    LoRA's adapters are merged, and the names are those of the model without them. `tied`: a weight
    with several names comes under each of them.
    """
    seen = set()
    for name, weight in policy.state_dict(keep_vars=True).items():
        if (id(weight) in seen and not tied) or ".lora_" in name:
            continue
        seen.add(id(weight))
        weight = weight.detach()
        layer, found, _ = name.partition(".base_layer.weight")  # peft's name of what has adapters
        if found:  # their product is in float32
            delta = policy.get_submodule(layer).get_delta_weight("default")
            weight = (weight + delta).to(weight.dtype)
        yield (name.replace(".base_layer.", "."),
               weight.full_tensor() if isinstance(weight, DTensor) else weight)


@contextmanager
def stop_on_signal(accelerator: Accelerator) -> Iterator[None]:
    """Ctrl-C or SIGTERM sets the accelerator's trigger: the run ends after the current step. A
    second Ctrl-C raises KeyboardInterrupt."""
    message = ("\nfinishing this step, then saving; Ctrl-C again stops at once (under `accelerate "
               f"launch`, which has returned by then: kill -INT {os.getpid()})\n").encode()

    def on_signal(number: int, _) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        accelerator.set_trigger()
        if accelerator.is_main_process:
            os.write(2, message)  # print is not safe in a signal handler

    before = {number: signal.signal(number, on_signal)
              for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
