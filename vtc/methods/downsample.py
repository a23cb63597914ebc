"""The baseline that needs no method: a picture of lower resolution."""

from dataclasses import dataclass

import torch

from ..method import register
from ..tokens import Reduction, Tokens
from .pool import Pool


@register
@dataclass
class Downsample(Pool):
    """Shows the encoder the picture at a resolution of about k patches, so that it makes k tokens itself.

    The picture is shrunk (bicubic, antialiased) after the host's own processor; position embeddings are
    interpolated by the encoder. Where k is no product of rows and columns, the next larger grid is encoded
    and its surplus tokens are dropped evenly.
    """

    name = "downsample"
    lowers_resolution = True

    def assign(self, tokens: Tokens, k: int) -> Reduction:
        # Each patch of a region carries the same low-resolution token: the one at its centre stands for all.
        regions = super().assign(tokens, k)
        weight = torch.zeros_like(tokens.size).scatter(1, regions.index, 1.0)
        return Reduction.merge(regions.index, regions.index.gather(1, regions.source), weight)
