"""Randomness: every random draw of a run is a function of the seed, a purpose and counters."""

import zlib

import numpy as np


def make_rng(seed: int, purpose: str, *counters: int) -> np.random.Generator:
    """The generator for one draw, for example of ("mini-batches", step, epoch)."""
    return np.random.default_rng([seed, zlib.crc32(purpose.encode()), *counters])
