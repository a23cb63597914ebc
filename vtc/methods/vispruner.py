"""VisPruner: half of the tokens by CLS attention, half by what is unlike the others (arXiv 2412.01818)."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..method import Layer, Need, Select, register
from ..pairs import products
from ..tokens import Tokens, gather

_PAIRS = 1 << 23  # similarities held at once for a row: 32 MiB
_STEP = 8  # how many tokens go in one round


@register
@dataclass
class VisPruner(Select):
    """Keeps what CLS attends to, and of the rest what is left when near-duplicates go, eight at a time.

    important_ratio  the share of the budget that goes by attention; 1 is FasterVLM, 0 similarity only
    layer            the block whose attention is read
    signal           "cls_attention"; or, for encoders without CLS, "mean_attention": what a token receives
                     from all

    The rest begins in falling order of attention. In each round it is dealt to two sets in turn, and those
    eight of the first go that are most like one of the second. What stays of the first, most alike in front,
    and then the second are the rest of the next round.

    Departures: of an odd number the first set gets one more, where the official code fails. Similarities are
    float32. The tiles of an image share its budget by their size after un-padding, where the official code
    gives each the same and does not un-pad. Rounds grow with the number of tokens, and work with its cube.
    """

    name = "vispruner"
    paper = "arXiv:2412.01818"
    positions = "repack"
    before_projector = True

    important_ratio: float = 0.5
    layer: Layer = -2
    signal: str = "cls_attention"

    def __post_init__(self):
        if not 0 <= self.important_ratio <= 1:
            raise ValueError(f"important_ratio={self.important_ratio} must be a share between 0 and 1")
        if self.signal not in ("cls_attention", "mean_attention"):
            raise ValueError(f"signal must be 'cls_attention' or 'mean_attention', not {self.signal!r}")

    @property
    def needs(self) -> tuple[Need, ...]:
        return (Need(self.signal, (self.layer,)),)

    def select(self, tokens: Tokens, k: int) -> Tensor:
        attention = getattr(tokens, self.signal)[:, 0].float()  # (B, N)
        order = attention.argsort(dim=1, descending=True, stable=True)
        important, rest = order.tensor_split([int(k * self.important_ratio)], dim=1)
        return torch.cat([important, _distinct(tokens.x, rest, k - important.shape[1])], dim=1)  # (B, k)


def _distinct(x: Tensor, rest: Tensor, k: int) -> Tensor:
    """The k of the tokens at `rest` (B, R) that stay: (B, k)."""
    if k == 0:
        return rest[:, :0]
    x, pairs = gather(x, rest), None  # (B, R, D)
    # All pairs are held where they are few; that must not depend on the batch.
    if x.shape[1] ** 2 <= _PAIRS:
        pairs = products(x)  # (B, R, R)
        length = pairs.diagonal(dim1=1, dim2=2).sqrt().clamp_min(1e-12)
        pairs /= length[:, None]
        pairs /= length[..., None]
    else:
        x = F.normalize(x.float(), dim=-1)
    left = torch.arange(x.shape[1], device=x.device).expand(len(x), -1)  # (B, n) of the rest
    while left.shape[1] > k:
        first, second = left[:, ::2], left[:, 1::2]  # (B, a), (B, b): a is b or b + 1
        alike = _nearest(x, pairs, first, second)  # (B, a)
        order = alike.argsort(dim=1, descending=True, stable=True)[:, min(_STEP, left.shape[1] - k) :]
        left = torch.cat([first.gather(1, order), second], dim=1)
    return rest.gather(1, left)


def _nearest(x: Tensor, pairs: Tensor | None, first: Tensor, second: Tensor) -> Tensor:
    """The similarity of each token of the first set to the one of the second most like it: (B, a)."""
    if pairs is not None:  # They are symmetric, and whole rows are several times as fast to gather.
        return gather(pairs, second).amax(dim=1).gather(1, first)
    other = gather(x, second).transpose(1, 2)  # (B, D, b)
    some = first.split(max(1, _PAIRS // second.shape[1]), dim=1)
    return torch.cat([(gather(x, part) @ other).amax(dim=2) for part in some], dim=1)
