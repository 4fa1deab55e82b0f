"""From samples to tensors: micro-batches of equal work, and their collation."""

from collections.abc import Sequence
from heapq import heapreplace
from itertools import groupby

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from data_types import Sample, TrainState
from infra.packing import SHARES_PROMPTS, packing_kind, packing_kwargs


def micro_batches(samples: list[Sample], max_tokens: int, rank: int = 0, world: int = 1,
                  packing: str = "") -> list[list[Sample]]:
    """This rank's share of `samples`, in batches of at most `max_tokens` tokens.

    `packing` is the kind of packed row. Packed: samples that share the tokens of a prompt stay
    together; those with the most tokens go first, to the batch that has the fewest, of as few
    batches as suffice. Padded (padding counts): the same over ranks, then batches of samples of
    similar length. Every rank gets the same number of batches, since all take part in collectives:
    a rank that lacks one gets an empty batch. A sample longer than `max_tokens` is a batch of its
    own.
    """
    if not packing:
        ordered = sorted(samples, key=len, reverse=True)
        lengths = list(map(len, ordered))
        batches = [fill_batches([ordered[i] for i in part], max_tokens)
                   for part in balance_lengths(lengths, world)]
        max_batches = max(map(len, batches))
        return batches[rank] + [[]] * (max_batches - len(batches[rank]))
    shares, options = packing == SHARES_PROMPTS, []
    # Ranks wait for the slowest: smaller pieces of the groups may be quicker, though each computes
    # the prompt again.
    for pieces_per_rank in (0, 1, 2, 4, 8) if world > 1 and shares else (0,):
        limit = sum(map(len, samples)) // (world * pieces_per_rank or 1)
        pieces = split_by_prompt(samples, min(limit, max_tokens), shares)
        pieces.sort(key=count_tokens, reverse=True)
        lengths = list(map(count_tokens, pieces))
        parts = split_evenly(lengths, max_tokens, world)
        slowest = max(sum(lengths[i] for part in parts[r::world] for i in part)
                      for r in range(world))
        options.append((slowest, pieces, parts))
    _, pieces, parts = min(options, key=lambda option: option[0])
    return [[sample for i in part for sample in pieces[i]] for part in parts[rank::world]]


def split_evenly(lengths: list[int], max_tokens: int, world: int) -> list[list[int]]:
    """The indices of `lengths` (longest first) in as few parts as hold `max_tokens` each, or one
    index, and the ranks can share evenly."""
    count, overfull = world * -(-sum(lengths) // (world * max_tokens)), 1
    while overfull:
        parts = balance_lengths(lengths, count)
        overfull = sum(len(part) > 1 and sum(lengths[i] for i in part) > max_tokens
                       for part in parts)
        count += -(-overfull // world) * world
    return parts


def split_by_prompt(samples: Sequence[Sample], max_tokens: int,
                    shares: bool) -> list[list[Sample]]:
    """The samples of each prompt, in pieces of at most `max_tokens` tokens if a piece has more than
    one sample; in each, the longest first. Each sample, unless it `shares` its prompt."""
    by_prompt, pieces = {}, []
    for sample in samples:
        key = id(sample.prompt_ids) if shares else id(sample)
        by_prompt.setdefault(key, []).append(sample)
    for same in by_prompt.values():
        pieces.append([])
        for sample in sorted(same, key=len, reverse=True):
            if pieces[-1] and count_tokens([*pieces[-1], sample]) > max_tokens:
                pieces.append([])
            pieces[-1].append(sample)
    return pieces


def count_tokens(piece: Sequence[Sample]) -> int:
    """Tokens of samples that share their prompt."""
    return len(piece[0].prompt_ids) + sum(len(sample.response_ids) for sample in piece)


def balance_lengths(lengths: list[int], count: int) -> list[list[int]]:
    """The indices of `lengths` in `count` parts: each goes to the part with the least sum."""
    parts, sums = [[] for _ in range(count)], [(0, part) for part in range(count)]
    for i, length in enumerate(lengths):
        least, part = sums[0]
        heapreplace(sums, (least + length, part))
        parts[part].append(i)
    return parts


def fill_batches(samples: list[Sample], max_tokens: int) -> list[list[Sample]]:
    """Batches of `samples` (longest first), each padded to its first sample's length."""
    batches, room, row = [], 0, 1
    for sample in samples:
        if room < row:
            batches.append([])
            room, row = max_tokens, len(sample)
        batches[-1].append(sample)
        room -= row
    return batches


def make_batch(state: TrainState, samples: list[Sample]) -> dict:
    """A micro-batch on the device. An empty one becomes a sample outside the loss, since every rank
    must run the model equally often."""
    rows = samples or [Sample([0], np.zeros(1, np.int32), 0.0, False, *torch.zeros(3, 1))]
    return collate(rows, state.tokenizer.pad_token_id or 0, state.accelerator.device,
                   packing_kind(state.policy))


def collate(samples: list[Sample], pad_id: int, device="cpu", packing: str = "") -> dict:
    """Tensors for `logprobs.response_logprobs` and the loss.

    input_ids: (B, L) padded on the right, which causal attention needs no mask for; or (1, L) with
        all samples in one row, if `packing` names a kind of it; `packing_kwargs` tells them apart.
        If it shares prompts, samples with the same one (the same list) follow it once.
    tokens (N,): all response tokens. logit_positions (N,): the position before each of them, among
        all of input_ids. flat_positions (N,): their place among (B, T).
    mask (B, T): the tokens in the loss. Masks come from lengths, never from token values: the EOS
        that ended a response is trained, even if padding has the same id.
    advantages (B, 1) or (B, T); rollout_logprobs, old_logprobs, ref_logprobs (B, T), if given.
    """
    lengths = torch.tensor([len(s.response_ids) for s in samples])
    families = [[sample] for sample in samples]
    if packing == SHARES_PROMPTS:  # a prompt stands before all of its samples that come in turn
        families = [list(same) for _, same in groupby(samples, lambda s: id(s.prompt_ids))]
    rows = [np.concatenate([same[0].prompt_ids, *(s.response_ids for s in same)])
            for same in families]
    if packing:
        ids = torch.from_numpy(np.concatenate(rows))[None]  # (1, L)
        starts = np.cumsum([0, *map(len, rows)])
    else:
        ids = pad_sequence([torch.from_numpy(row) for row in rows], batch_first=True,
                           padding_value=pad_id)  # (B, L)
        starts = np.arange(len(rows)) * ids.shape[1]
    prompt_ends, response_starts = [], []  # by sample
    for same, start in zip(families, starts, strict=False):
        end = start + len(same[0].prompt_ids)
        prompt_ends += [end - 1] * len(same)
        response_starts += np.cumsum([end, *(len(s.response_ids) for s in same[:-1])]).tolist()
    column = torch.arange(int(lengths.max()))  # (T,)
    response_mask = column < lengths[:, None]  # (B, T)
    positions = (torch.tensor(response_starts)[:, None] + column)  # of each token, among input_ids
    before = torch.where(column == 0, torch.tensor(prompt_ends)[:, None], positions - 1)
    flat_positions = response_mask.flatten().nonzero().squeeze(1)
    batch = {"input_ids": ids, "tokens": ids.flatten()[positions[response_mask]],
             "logit_positions": before[response_mask], "flat_positions": flat_positions,
             "mask": response_mask & torch.tensor([[s.in_loss] for s in samples])}

    def to_rows(values: list[Tensor]) -> Tensor:
        flat = torch.cat(values)
        return flat.new_zeros(response_mask.numel()).index_copy(0, flat_positions, flat).view(
            response_mask.shape)

    if any(isinstance(s.advantage, Tensor) for s in samples):
        batch["advantages"] = to_rows([
            torch.as_tensor(s.advantage, dtype=torch.float32).expand(len(s.response_ids))
            for s in samples])
    else:
        batch["advantages"] = torch.tensor([[s.advantage] for s in samples], dtype=torch.float32)
    for name in ("rollout_logprobs", "old_logprobs", "ref_logprobs"):
        values = [getattr(s, name) for s in samples]
        if all(value is not None for value in values):
            batch[name] = to_rows(values)
    batch = {name: tensor.to(device) for name, tensor in batch.items()}
    if packing:
        families = [(len(same[0].prompt_ids), tuple(len(s.response_ids) for s in same))
                    if len(same) > 1 else (len(same[0]), ()) for same in families]
    batch["packing_kwargs"] = packing_kwargs(families, packing, device) if packing else {}
    return batch
