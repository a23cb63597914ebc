"""CDPruner: a diverse set of what the prompt asks about (arXiv 2506.10967)."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..greedy import volume
from ..method import Need, Select, register
from ..tokens import Tokens


@register
@dataclass
class CDPruner(Select):
    """Keeps a diverse set of tokens that are like the prompt, by a determinantal point process.

    The k tokens are chosen greedily for the largest determinant of diag(q) S diag(q), where S are the cosine
    similarities of the projected tokens and q says how relevant each is.

    relevance  "prompt": the mean cosine of a projected token with the embeddings of the prompt's words behind
               the image, moved and scaled to lie between 0 and 1; "none": all alike, and no text is read
    negate     whether less similar tokens are the more relevant

    Departures: relevance is similarity in the space that the projector shares with the language model's input
    embeddings. The paper takes that of CLIP's image and text towers, which such models do not hold; there it
    is negated, as patches in CLIP's space are least like what they show. It is scaled over the tokens of a
    row, a tile by itself, where the official code takes all tiles of a batch, so that neighbours had a say.
    Where all directions are spanned, as by k tokens of fewer channels, official determinants are rounding
    noise: here the choice begins anew among the tokens that are left.
    """

    name = "cdpruner"
    paper = "arXiv:2506.10967"
    positions = "repack"

    relevance: str = "prompt"
    negate: bool = False

    def __post_init__(self):
        if self.relevance not in ("prompt", "none"):
            raise ValueError(f"relevance must be 'prompt' or 'none', not {self.relevance!r}")

    @property
    def needs(self) -> tuple[Need, ...]:
        return (Need("text"),) if self.relevance == "prompt" else ()

    def select(self, tokens: Tokens, k: int) -> Tensor:
        x = tokens.x.float()
        if self.relevance == "none":
            return volume(x, torch.ones_like(x[..., 0]), k)
        asked = tokens.text_after.float()[..., None]  # (B, T, 1)
        words = (F.normalize(tokens.text.float(), dim=-1) * asked).sum(dim=1) / asked.sum(dim=1).clamp_min(1)
        length = torch.linalg.vector_norm(x, dim=2).clamp_min(1e-12)
        cosine = (words[:, None] @ x.transpose(1, 2))[:, 0] / (-length if self.negate else length)  # (B, N)
        least, most = cosine.amin(dim=1, keepdim=True), cosine.amax(dim=1, keepdim=True)
        wide = most - least > 1e-6  # else all are alike and the difference is rounding
        worth = torch.where(wide, (cosine - least + 1e-6) / (most - least).clamp_min(1e-6), 1.0)
        return volume(x, worth, k)
