"""Random numbers of processes that train one model together, each on batches of its own.

A trainer seeds all of them alike, so that their adapters start alike. Whatever comes from torch's
global generator is then the same in every process.
"""

from __future__ import annotations

import torch
import torch.distributed as dist


def several_processes() -> bool:
    """Whether this process trains together with others."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def own_seed() -> int:
    """A seed from torch's global generator that no other process has."""
    seed = int(torch.randint(2**31, ()))
    return mixed(seed, dist.get_rank()) if several_processes() else seed


def own_generator(device: torch.device) -> torch.Generator | None:
    """A generator that no other process has; None, torch's global one, for a lone process."""
    return torch.Generator(device).manual_seed(own_seed()) if several_processes() else None


def mixed(*entropy: int) -> int:
    """A seed that all the given numbers have a part in."""
    state = 0
    for number in entropy:  # SplitMix64's mixing, so that neighbouring seeds are unrelated
        state = (state + number + 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
        state ^= state >> 31
    return state & 0x7FFFFFFFFFFFFFFF
