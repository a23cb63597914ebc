"""SliME's selector: tokens of the crops that are most like the words of the prompt (arXiv 2406.08487)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..method import Need, Select, register
from ..tokens import Tokens


@register
@dataclass
class SliME(Select):
    """Keeps the tokens most similar to the words of the prompt, as many as hold most of the similarity.

    adaptive     an image keeps the fewest tokens whose probabilities exceed top_p together, at most
                 as many as `keep` says; False: exactly as many as `keep` says
    top_p        how much of the probability stays
    temperature  of the softmax over the tokens' similarities
    question     "prompt": all words of the prompt, as the official code reads them; "after": those behind the
                 image, which leaves a system prompt out

    The similarity of a token is the sum of its cosines with the embeddings of all words, so that a longer
    question makes a sharper choice. A tiled image's thumbnail stays as it is, and all crops compete for the
    rest (`allocate="thumbnail"`). Departures: SliME is a trained model, and what is here is its last step
    alone, in models that never learned it: neither the attention that compresses each crop to 144 tokens, nor
    the gated projector, nor the separator token, nor the training that made tokens and words comparable. So
    its published numbers say nothing of this method, and 95 % of an untrained softmax is nearly all tokens:
    let `keep` decide. An image that is not tiled is reduced too, where SliME keeps it whole.
    """

    name = "slime"
    paper = "arXiv:2406.08487"
    positions = "repack"
    allocate = "thumbnail"

    adaptive: bool = True
    top_p: float = 0.95
    temperature: float = 1.0
    question: str = "prompt"

    def __post_init__(self):
        if not 0 <= self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p} must be a share between 0 and 1")
        if not 0 < self.temperature < math.inf:
            raise ValueError(f"temperature must be a number above 0, not {self.temperature!r}")
        if self.question not in ("prompt", "after"):
            raise ValueError(f"question must be 'prompt' or 'after', not {self.question!r}")

    @property
    def needs(self) -> tuple[Need, ...]:
        return (Need("text"),)

    def count(self, tokens: Tokens, k: int) -> Tensor | None:
        if not self.adaptive:
            return None
        chance = (self.similarity(tokens) / self.temperature).softmax(dim=1)
        sums = chance.sort(dim=1, descending=True).values.cumsum(dim=1)
        # All of it is all tokens, even where rounding made the last sum a little more than 1.
        within = (sums <= self.top_p) | (self.top_p == 1)
        own = (within.sum(dim=1) + 1).clamp_max(k)
        return torch.where(tokens.thumbnail, k, own)

    def score(self, tokens: Tokens) -> Tensor:
        similarity = self.similarity(tokens)
        rank = similarity.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
        # Far below the sums of probabilities; keeps in order those that are too small for a float.
        chance = torch.maximum((similarity / self.temperature).softmax(dim=1), 1e-30 * (tokens.n - rank))
        return chance * tokens.n  # so that those of the thumbnail and those of all crops can be compared

    def similarity(self, tokens: Tokens) -> Tensor:
        """The sum of the cosines of each token with all words: (B, N)."""
        words = tokens.text_mask if self.question == "prompt" else tokens.text_after  # (B, T)
        text = F.normalize(tokens.text.float(), dim=-1).masked_fill(~words[..., None], 0).sum(dim=1)  # (B, D)
        return (F.normalize(tokens.x.float(), dim=-1) @ text[..., None])[..., 0]
