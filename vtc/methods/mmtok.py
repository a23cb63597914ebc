"""MMTok: tokens that cover the prompt's words and the whole picture (arXiv 2508.18264)."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..greedy import Cosines, cover
from ..method import Need, Select, register
from ..tokens import Tokens, gather


@register
@dataclass
class MMTok(Select):
    """Keeps tokens that together are likest to the prompt's words and to all other tokens.

    Every word spreads one over the tokens by a softmax of its embedding's cosines with the projected tokens;
    every token by one of the cosines of the vision tower's features. What a kept token has of each is
    covered, by the best of the kept; the next one kept is that which adds most.

    alpha               how much covering the tokens counts against covering the words
    text_temperature    of the words' softmax
    vision_temperature  of the tokens' softmax

    Departures: all of the prompt behind the image is words to cover, where the official code takes out stop
    words and the two closing phrases of LLaVA's prompts, for which the tokenizer is needed. Differences below
    0.00001 of a softmax's largest numerator are rounding. Without any text the picture alone is covered.
    """

    name = "mmtok"
    paper = "arXiv:2508.18264"
    positions = "repack"

    alpha: float = 0.5
    text_temperature: float = 0.02
    vision_temperature: float = 0.2

    def __post_init__(self):
        if not 0 <= self.alpha < float("inf"):
            raise ValueError(f"alpha={self.alpha} must be a number of at least 0")
        if not self.text_temperature > 0 or not self.vision_temperature > 0:
            raise ValueError("text_temperature and vision_temperature must be above 0")

    @property
    def needs(self) -> tuple[Need, ...]:
        return (Need("text"), Need("vision"))

    def select(self, tokens: Tokens, k: int) -> Tensor:
        # Softmax numerators, at most 1, are what is compared, and denominators weigh what is to be covered.
        x, words = tokens.x.float(), F.normalize(tokens.text.float(), dim=-1)
        said = x @ words.transpose(1, 2)  # (B, N, T)
        said.div_(torch.linalg.vector_norm(x, dim=2, keepdim=True).clamp_min(1e-12))
        said.sub_(said.amax(dim=1, keepdim=True)).div_(self.text_temperature).exp_()
        asked = tokens.text_after.float()  # (B, T)
        words_weight = asked / said.sum(dim=1) / asked.sum(dim=1, keepdim=True).clamp_min(1)
        seen = Cosines(tokens.vision, lambda cosine: cosine.sub_(1).div_(self.vision_temperature).exp_())
        total = torch.cat([part.sum(dim=2) for _, part in seen.chunks()], dim=1)  # (B, N)

        def similar(index: Tensor) -> Tensor:
            return torch.cat([gather(said, index), seen.of(index)], dim=2)  # (B, c, T + N)

        weight = torch.cat([words_weight, self.alpha / total / tokens.n], dim=1)
        return cover(similar, weight, torch.ones_like(total), k)
