"""How responses travel between ranks, as flat arrays: to the ranks that train them, and the few
that are saved to the main process. Until then each stays on the rank that generated it."""

import pickle
from collections.abc import Sequence
from dataclasses import replace
from itertools import chain

import numpy as np
import torch
from accelerate import Accelerator
from torch import distributed

from infra.batching import split_micro_batches
from infra.distributed import Remote, in_order, owner_of
from infra.packing import packing_kind
from infra.setup import TrainState
from rollout import Response
from sampling import Sample


def send_to_trainers(state: TrainState, samples: list[Sample], batches: Sequence[np.ndarray],
                     names: Sequence[str] = ("rollout_logprobs",)) -> list[Sample]:
    """The samples, each whole on the ranks that train it in one of the mini-batches `batches`, and
    with a `Remote` on the others. Token ids travel, and the log-probs `names`.

    All ranks know all lengths, so each knows what it gets from whom.
    """
    accelerator, samples = state.accelerator, list(samples)
    rank, world = accelerator.process_index, accelerator.num_processes
    if world == 1:
        return samples
    trainers = find_trainers(state, samples, batches)
    owners = [owner_of(accelerator, sample.response_ids) for sample in samples]
    outgoing = [[np.empty(0, np.int32)] for _ in range(world)]
    for sample, owner, ranks in zip(samples, owners, trainers, strict=True):
        for trainer in ranks - {owner} if owner == rank else ():
            logprobs = [getattr(sample, name).float().numpy().view(np.int32) for name in names]
            outgoing[trainer] += [sample.response_ids, *logprobs]
    incoming = all_to_all(accelerator, [np.concatenate(arrays) for arrays in outgoing])
    starts = [0] * world
    for i, (sample, owner, ranks) in enumerate(zip(samples, owners, trainers, strict=True)):
        if rank not in ranks:
            ids, logprobs = Remote(len(sample.response_ids), min(ranks)), dict.fromkeys(names)
        elif owner == rank:
            continue
        else:
            start, size = starts[owner], (1 + len(names)) * len(sample.response_ids)
            rows = incoming[owner].view(np.int32)[start:start + size].reshape(1 + len(names), -1)
            starts[owner] += size
            ids, logprobs = rows[0], {name: torch.from_numpy(row.view(np.float32))
                                      for name, row in zip(names, rows[1:], strict=True)}
        samples[i] = replace(sample, response_ids=ids, **logprobs)
    return samples


def find_trainers(state: TrainState, samples: list[Sample],
                  batches: Sequence[np.ndarray]) -> list[set[int]]:
    """For each sample, the ranks that train it in one of the mini-batches."""
    trainers = [set() for _ in samples]
    for batch in batches:
        shares = split_micro_batches([samples[i] for i in batch],
                                     state.config.actor.max_tokens_per_micro_batch,
                                     state.accelerator.num_processes,
                                     bool(packing_kind(state.policy)))
        for rank, micros in enumerate(shares):
            for i in chain(*micros):
                trainers[batch[i]].add(rank)
    return trainers


def gather_on_main(accelerator: Accelerator, groups: list[list[Response]]) -> list[list[Response]]:
    """The groups of responses; on the main process, all are whole."""
    owners = [owner_of(accelerator, group[0].token_ids) for group in groups]
    own = [group for group, owner in zip(groups, owners, strict=True)
           if owner == accelerator.process_index]
    of_ranks = send_to_main(accelerator, own)
    return in_order(of_ranks, owners) if of_ranks else groups


def send_to_main(accelerator: Accelerator, value) -> list:
    """On the main process the values of all ranks, on the others []."""
    if accelerator.num_processes == 1:
        return [value]
    nothing = np.empty(0, np.uint8)
    parts = [np.frombuffer(pickle.dumps(value), np.uint8)]
    parts += [nothing] * (accelerator.num_processes - 1)
    received = all_to_all(accelerator, parts)
    return [pickle.loads(part) for part in received if accelerator.is_main_process]


def all_to_all(accelerator: Accelerator, parts: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Send the bytes of `parts[r]` to rank r. Returns those that each rank sent to this one, uint8.
    """
    sizes = torch.tensor([part.nbytes for part in parts], device=accelerator.device)
    incoming = torch.empty_like(sizes)
    distributed.all_to_all_single(incoming, sizes)
    sizes, incoming = sizes.tolist(), incoming.tolist()
    sent = torch.from_numpy(np.concatenate([part.view(np.uint8) for part in parts]))
    received = torch.empty(sum(incoming), dtype=torch.uint8, device=accelerator.device)
    distributed.all_to_all_single(received, sent.to(accelerator.device), incoming, sizes)
    return np.split(received.cpu().numpy(), np.cumsum(incoming)[:-1])
