"""Which prompts come next, which groups train, and how do they become tensors?

DAPO's dynamic sampling (section 3.2, equation 11) keeps a group only if its responses differ in what
they achieved, since equal rewards give every one of them the advantage 0. Departure from the paper:
the test is on any metric, not only on accuracy being neither 0 nor 1.

The prompt stream is endless: epoch after epoch, each in an order of its own. A position in the stream
is one integer, and identifies a group even where the data repeat a prompt.
"""

import math
import zlib
from dataclasses import dataclass
from functools import lru_cache
from heapq import heapreplace

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from infra.packing import pack_arguments
from infra.data import Mixture, Prompt
from reward import Score
from rollout import Response


@dataclass(frozen=True)
class Group:
    """The n responses to one prompt, judged. All lists have length n.

    `scores` are the verifier's; `rewards` add the overlong penalty; `final_rewards` subtract the KL
    term from those, where it is on. `position` in the prompt stream is the group's identity.
    """
    position: int
    prompt: Prompt
    responses: list[Response]
    scores: list[Score]
    rewards: list[float]
    final_rewards: list[float]

    def metric(self, name: str) -> list[float]:
        """The values that `filter_groups.metric` looks at."""
        return {"acc": [score.acc for score in self.scores], "score": [score.score for score in self.scores],
                "seq_reward": self.rewards, "seq_final_reward": self.final_rewards}[name]


@dataclass(frozen=True)
class Sample:
    """One response, ready to train on. `trains` is False where it is masked out of the loss.

    Log-probs are (T,) tensors on the CPU: `rollout_logprobs` as they were when it was sampled,
    `old_logprobs` as the trainer computes the same, `ref_logprobs` of the initial policy.
    """
    prompt_ids: list[int]
    response_ids: np.ndarray
    advantage: float
    trains: bool = True
    rollout_logprobs: Tensor | None = None
    old_logprobs: Tensor | None = None
    ref_logprobs: Tensor | None = None

    def __len__(self) -> int:
        return len(self.prompt_ids) + len(self.response_ids)


def make_rng(seed: int, purpose: str, *counters: int) -> np.random.Generator:
    """Every random draw of a run is a function of the seed, what it is for, and where in the run it is."""
    return np.random.default_rng([seed, zlib.crc32(purpose.encode()), *counters])


# ---- prompts ----------------------------------------------------------------------------------------------------

@lru_cache(maxsize=64)
def _epoch_order(num_prompts: int, seed: int, epoch: int, part: int) -> np.ndarray:
    return make_rng(seed, "prompt order", epoch, part).permutation(num_prompts)


@lru_cache(maxsize=16)
def _mixing_order(weights: tuple[int, ...], seed: int, round_: int) -> np.ndarray:
    return make_rng(seed, "mixture", round_).permutation(np.repeat(np.arange(len(weights)), weights))


def draw_prompts(mixture: Mixture, position: int, count: int, seed: int) -> list[tuple[int, Prompt]]:
    """The `count` prompts from `position` of the endless stream, each with its own position.

    The stream goes in rounds, in each of which every part of the mixture has as many places as its weight says, in
    shuffled order. A part gives its prompts epoch after epoch, each in an order of its own.
    """
    weights, drawn = tuple(weight for weight, _ in mixture), []
    for at in range(position, position + count):
        round_, place = divmod(at, sum(weights))
        order = _mixing_order(weights, seed, round_)
        part = order[place]
        epoch, index = divmod(round_ * weights[part] + np.count_nonzero(order[:place] == part), len(mixture[part][1]))
        drawn.append((at, mixture[part][1][_epoch_order(len(mixture[part][1]), seed, epoch, part)[index]]))
    return drawn


def auto_batch_size(missing: int, kept: float, drawn: float) -> int:
    """So many prompts that `missing` groups will be kept of them, more likely than not, if as large a share is as the
    `kept` of those `drawn` before (as if there had been one more, and that kept).

    Draws until m successes of probability p have mean m / p and standard deviation sqrt(m (1 - p)) / p: one of these
    is the margin. More would waste responses, less generation batches.
    """
    share = (kept + 1) / (drawn + 1)
    return math.ceil((missing + math.sqrt(missing * (1 - share))) / share)


# ---- groups -----------------------------------------------------------------------------------------------------

def is_informative(values: list[float]) -> bool:
    """Whether a group's metric values differ, by more than rounding noise: only then can it teach anything."""
    return max(values) - min(values) > 1e-9


# ---- mini-batches and micro-batches -----------------------------------------------------------------------------

def mini_batches(num_samples: int, size: int, rng: np.random.Generator) -> list[np.ndarray]:
    """Shuffled indices, in as few parts as hold at most `size` each, which differ by at most one in length."""
    return np.array_split(rng.permutation(num_samples), -(-num_samples // size))


def micro_batches(samples: list[Sample], max_tokens: int, rank: int = 0, world: int = 1,
                  packed: bool = False) -> list[list[int]]:
    """This rank's share of `samples`, as indices, in batches of at most `max_tokens` tokens (or of one sample).

    The longest first, to whichever rank has the fewest tokens yet; or, `packed`, to whichever batch has, of as few
    as will do. Not packed, padding counts, and the samples of a batch are of about the same length. Every rank gets as
    many batches as the others, since collectives need them all; what it lacks is empty.
    """
    order = sorted(range(len(samples)), key=lambda i: len(samples[i]), reverse=True)
    lengths = [len(samples[i]) for i in order]
    if packed:
        parts = balance_lengths(lengths, world * -(-sum(lengths) // (world * max_tokens)))
        while over := sum(len(part) > 1 and sum(lengths[at] for at in part) > max_tokens for part in parts):
            parts = balance_lengths(lengths, len(parts) + -(-over // world) * world)
        return [[order[at] for at in part] for part in parts[rank::world]]
    batches = [fill_batches([order[at] for at in part], samples, max_tokens) for part in balance_lengths(lengths, world)]
    return batches[rank] + [[] for _ in range(max(map(len, batches)) - len(batches[rank]))]


def balance_lengths(lengths: list[int], count: int) -> list[list[int]]:
    """Each of the lengths, by its place, to whichever of `count` parts is the least yet."""
    parts, sums = [[] for _ in range(count)], [(0, part) for part in range(count)]
    for at, length in enumerate(lengths):
        least, part = sums[0]
        heapreplace(sums, (least + length, part))
        parts[part].append(at)
    return parts


def fill_batches(indices: list[int], samples: list[Sample], max_tokens: int) -> list[list[int]]:
    """Batches of `indices`, longest first, which are padded to that."""
    batches, room, row = [], 0, 1
    for i in indices:
        if room < row:
            batches.append([])
            room, row = max_tokens, len(samples[i])
        batches[-1].append(i)
        room -= row
    return batches


def collate(samples: list[Sample], pad_id: int, device="cpu", packing: str = "") -> dict:
    """Tensors for `losses.response_logprobs` and the loss.

    Each sample is a row of `input_ids`, padded on the right, which causal attention needs no mask for; or all are one
    row, where the model takes that (`packing`, as `attention.packing` has it), and `packed` tells them apart. Of the
    N response tokens, one after the other: `tokens`; `before`, the position before each, counted through all rows;
    `places`, where they are among (B, T).

    Masks come from lengths, never from token values: the EOS that ended a response is trained, even
    where padding has the same id. `mask` is what trains.
    """
    sizes, lengths = [len(s) for s in samples], torch.tensor([len(s.response_ids) for s in samples])
    flat = torch.from_numpy(np.concatenate([ids for s in samples for ids in (s.prompt_ids, s.response_ids)]))
    if packing:
        ids = flat[None]
        starts = torch.tensor([0, *sizes]).cumsum(0)[:-1]
    else:
        ids = pad_sequence(flat.split(sizes), batch_first=True, padding_value=pad_id)  # (B, L)
        starts = torch.arange(len(sizes)) * ids.shape[1]
    column = torch.arange(int(lengths.max()))  # (T,)
    written = column < lengths[:, None]  # (B, T)
    first = starts + torch.tensor(sizes) - lengths - 1
    before = (first[:, None] + column)[written]
    places = written.flatten().nonzero().squeeze(1)
    batch = {"input_ids": ids, "tokens": ids.flatten()[before + 1], "before": before, "places": places,
             "mask": written & torch.tensor([[s.trains] for s in samples]),
             "advantages": torch.tensor([[s.advantage] for s in samples], dtype=torch.float32)}
    for name in ("rollout_logprobs", "old_logprobs", "ref_logprobs"):
        values = [getattr(s, name) for s in samples]
        if all(value is not None for value in values):
            values = torch.cat(values)
            batch[name] = values.new_zeros(written.numel()).index_copy(0, places, values).view(written.shape)
    batch = {name: tensor.to(device) for name, tensor in batch.items()}
    batch["packed"] = pack_arguments(sizes, packing, device) if packing else {}
    return batch
