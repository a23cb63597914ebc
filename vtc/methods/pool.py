"""A baseline that keeps everything a little: area pooling."""

from dataclasses import dataclass

from ..grid import centres, regions
from ..method import Merge, register
from ..tokens import Reduction, Tokens


@register
@dataclass
class Pool(Merge):
    """Averages the tokens of k about equal rectangles."""

    name = "pool"
    needs_grid = True

    def assign(self, tokens: Tokens, k: int) -> Reduction:
        device, batch = tokens.x.device, len(tokens.x)
        centre, region = centres(tokens.grid, k, device), regions(tokens.grid, k, device)
        place = centre.new_empty(k).scatter(0, region[centre], centre)  # (k,) centre of each region
        return Reduction.merge(centre.expand(batch, k), place[region].expand(batch, -1))
