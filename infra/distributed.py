"""What several ranks need: shared work, errors that reach all of them, whole weights, signals."""

import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, gather_object
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.tensor import DTensor
from tqdm import tqdm

from data_types import Engine, Sample
from infra.watchdog import PHASE


def map_over_ranks(accelerator: Accelerator, function: Callable[[list], Sequence], items: Sequence,
                   doing: str, ranks_per_share: int = 1) -> list:
    """Every rank gets the results of all items in order; the ranks divide the work.

    Args:
        function: from a share of the items to a sequence of as many results.
        doing: what an error message says was going on.
        ranks_per_share: so many neighbouring ranks compute one share together; if more than one,
            a rank on which `function` raises ends at once, with a line.
    Raises:
        ValueError on all ranks if `function` raises on one of them; its own error on one process.
    """
    share, member = divmod(accelerator.process_index, ranks_per_share)
    shares, results, error = accelerator.num_processes // ranks_per_share, [], ""
    try:
        results = function(items[share::shares])
    except (OSError, ValueError) as failure:
        error = str(failure) or repr(failure)
    except Exception as failure:  # a bug: where it is matters
        if accelerator.num_processes == 1:
            raise
        traceback.print_exc()
        error = repr(failure)
    if error and ranks_per_share > 1:  # its neighbours wait for it there, and would not learn of it
        print(f"error: {doing}: {error} (rank {accelerator.process_index}); the same command "
              "resumes from the last checkpoint", file=sys.stderr, flush=True)
        os._exit(1)
    gathered = gather_object([([] if member else results, error)])
    for _, error in gathered:
        if error:
            raise ValueError(f"{doing}: {error}")
    ordered = [None] * len(items)
    for i, (results, _) in enumerate(gathered[::ranks_per_share]):
        ordered[i::shares] = results
    return ordered


def warn(accelerator: Accelerator, message: str) -> None:
    """Print a warning above the progress bar, on the main process only."""
    if accelerator.is_main_process:
        tqdm.write(f"warning: {message}")


def step_bar(accelerator: Accelerator, done: int, total: int) -> tqdm:
    """The steps after those that are `done`, with a progress bar. Its forecast takes the mean over
    all steps, so that it does not jump at validations."""
    return tqdm(range(done + 1, total + 1), "DAPO", total, initial=done, smoothing=0,
                disable=not accelerator.is_main_process)


def show_progress(accelerator: Accelerator, batches: Sequence[Sequence[Sample]],
                  phase: str) -> Iterator[Sequence[Sample]]:
    """The batches in turn; on a terminal, a bar names the phase and counts their tokens."""
    shown = accelerator.is_main_process and sys.stderr.isatty()
    with tqdm(desc=phase, total=sum(map(len, chain(*batches))), unit=" tokens", unit_scale=True,
              leave=False, disable=not shown) as bar:
        for batch in batches:
            yield batch
            bar.update(sum(map(len, batch)))


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
def stop_on_signal(accelerator: Accelerator) -> Iterator[list[int]]:
    """Ctrl-C, SIGTERM, SIGHUP (a closed terminal) or SIGUSR1 (a scheduler's warning) sets the
    accelerator's trigger: the run ends after the current step. A second Ctrl-C raises
    KeyboardInterrupt. Gives the numbers of the signals that this process has received."""
    received = []
    at_once = ("; Ctrl-C again stops at once (under `accelerate launch`, which has returned by "
               f"then: kill -INT {os.getpid()})")

    def on_signal(number: int, _) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        received.append(number)
        accelerator.set_trigger()
        if accelerator.is_main_process:
            name = signal.Signals(number).name
            how = at_once if number == signal.SIGINT else ""
            os.write(2, f"\n{name}: finishing this step, then saving{how}\n".encode())  # no print

    numbers = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1")
               if hasattr(signal, name)]  # Windows has not all
    before = {number: signal.signal(number, on_signal) for number in numbers
              if signal.getsignal(number) != signal.SIG_IGN}  # as nohup has SIGHUP
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def end_processes(accelerator: Accelerator, engine: Engine, signals: list[int]) -> None:
    """End the engine and the process groups; of several processes, or if one has received signals
    other than Ctrl-C, end this one, with the exit code 128 + the signal's number."""
    code = max([128 + number for number in gather_object(signals) if number != signal.SIGINT],
               default=0)
    accelerator.wait_for_everyone()  # gloo may deadlock if ranks exit at different times
    PHASE["now"] = "end"
    engine.close()  # before the process groups that it has joined are gone
    accelerator.end_training()
    if accelerator.num_processes > 1 or code:  # gloo's own shutdown may hang; all work is done
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
