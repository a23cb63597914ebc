"""A baseline that looks at nothing: a regular sub-grid."""

from dataclasses import dataclass

from torch import Tensor

from ..grid import centres
from ..method import Select, register
from ..tokens import Tokens
from .pool import compact


@register
@dataclass
class Uniform(Select):
    """Keeps a regular sub-grid: the centres of k about equal rectangles.

    Where earlier blocks of an encoder left only some of the grid, of k compact groups of them, as `pool` has.
    """

    name = "uniform"
    stages = ("features", "encoder")
    needs_grid = True

    def select(self, tokens: Tokens, k: int) -> Tensor:
        if tokens.n < tokens.grid[0] * tokens.grid[1]:
            return compact(tokens.place, tokens.grid, k)[0]
        return centres(tokens.grid, k, tokens.x.device).expand(len(tokens.x), k)
