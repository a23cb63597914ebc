"""A baseline that looks at nothing: a regular sub-grid."""

from dataclasses import dataclass

from torch import Tensor

from ..grid import centres
from ..method import Select, register
from ..tokens import Tokens


@register
@dataclass
class Uniform(Select):
    """Keeps a regular sub-grid: the centres of k about equal rectangles."""

    name = "uniform"
    needs_grid = True

    def select(self, tokens: Tokens, k: int) -> Tensor:
        return centres(tokens.grid, k, tokens.x.device).expand(len(tokens.x), k)
