"""Teach the decoder massive activations, which a model this small does not grow by itself.

In LLaVA, BOS and a few background patches carry very large values in fixed channels, and heads with nothing to
do attend to them. Here one channel is trained to mark BOS and the plain corner patches, from the third block
on; whether heads then attend to them is left to the language loss.
"""

import torch
from torch import Tensor

CHANNEL = 7
FIRST_BLOCK = 2
HIGH, LOW = 7.0, 1.5  # of sqrt(128) = 11.3: a sink holds over a third of its energy in the channel
_CORNERS = (0, 7, 56, 63)


def sink_tokens(ids: Tensor, image_token: int, plain: Tensor) -> Tensor:
    """BOS (first column) and plain corner patches: ids (B, S), plain (B, 64) bool -> (B, S) bool."""
    corners = torch.zeros_like(plain)
    corners[:, list(_CORNERS)] = plain[:, list(_CORNERS)]
    sinks = torch.zeros_like(ids, dtype=torch.bool)
    sinks = sinks.masked_scatter(ids == image_token, corners)
    sinks[:, 0] = True
    return sinks


def sink_loss(states: tuple[Tensor, ...], sinks: Tensor) -> Tensor:
    """Hinge on the channel's share of the RMS in states (B, S, C) entering each block, sinks (B, S) bool."""
    total = states[0].new_zeros(())
    for state in states[FIRST_BLOCK:]:
        level = state[..., CHANNEL] * torch.rsqrt(state.square().mean(-1) + 1e-6)
        total = total + (HIGH - level[sinks]).relu().mean() + (level[~sinks].abs() - LOW).relu().mean()
    return total / len(states[FIRST_BLOCK:])
