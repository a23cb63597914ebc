"""DART: of tokens that repeat a few pivots the least stay (arXiv:2502.11494)."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..method import Need, Select, register
from ..tokens import Tokens


@register
@dataclass
class DART(Select):
    """Keeps a few pivots and for each the tokens least like it, inside of the decoder or in front of it.

    Pivots are the image tokens and the text tokens behind the image with the longest keys (L1). One pivot
    after the other, those of the image first and each kind in the order of the prompt, takes the T image
    tokens of lowest cosine similarity to it that are left. Text pivots take part, and are text.

    pivot_image_token, pivot_text_token  how many pivots there are, at most
    pivots  "norm", or "random": any, drawn anew for every picture and every seed (the paper finds that the
            choice hardly matters)

    Departures: exactly k tokens stay, where the official code keeps 4 + 8 floor(k / 8) of them: T is the most
    that fits, and what is left of k goes one by one to the pivots in their order. A budget below the number
    of image pivots keeps the longest keys. The order of pivots is that of the prompt, not of Python's
    sets; ties go to the first token. Keys are those of the model, where a published copy mixes up tokens and
    heads. At the features stage there are no keys and no text as the decoder sees them: pivots are of the
    image only, by the length of the features, and each of several tiles has its own.
    """

    name = "dart"
    paper = "arXiv:2502.11494"
    stages = ("decoder", "features")
    decoder_layer = 2
    decoder_needs = (Need("all_keys"), Need("text"), Need("text_keys"))

    pivot_image_token: int = 4
    pivot_text_token: int = 4
    pivots: str = "norm"
    seed: int = 0

    def __post_init__(self):
        for name, least in (("pivot_image_token", 1), ("pivot_text_token", 0)):
            value = getattr(self, name)
            if value != int(value) or value < least:
                raise ValueError(f"{name} is a whole number of at least {least}, not {value!r}")
        if self.pivots not in ("norm", "random"):
            raise ValueError(f"pivots is 'norm' or 'random', not {self.pivots!r}")
        if self.seed != int(self.seed):
            raise ValueError(f"seed is a whole number, not {self.seed!r}")

    def select(self, tokens: Tokens, k: int) -> Tensor:
        image, text, candidates = self._lengths(tokens)
        most = min(int(self.pivot_image_token), k, tokens.n)
        pivots = _highest(image, most)  # (B, m)
        x = F.normalize(tokens.x.float(), dim=-1)
        directions, real = [_rows(x, pivots)], [torch.ones_like(pivots, dtype=torch.bool)]
        if text is not None:
            own = _highest(text, int(self.pivot_text_token))
            directions.append(_rows(F.normalize(_longer(tokens.text.float(), text), dim=-1), own))
            real.append(candidates.gather(1, own))  # a short text has fewer
        real = torch.cat(real, dim=1)  # (B, P)
        similar = torch.cat(directions, dim=1) @ x.transpose(1, 2)  # (B, P, N)

        left, count = k - most, real.sum(dim=1, keepdim=True)
        each = left // count * real  # (B, P) how many each pivot takes: T
        more = (real.cumsum(dim=1) <= left % count) & real  # and who takes one of what is then left
        taken = torch.zeros_like(image, dtype=torch.bool).scatter(1, pivots, True)  # (B, N)
        places = torch.arange(tokens.n, device=x.device)
        for turn in (each, more.long()):
            for pivot in range(real.shape[1]):
                order = similar[:, pivot].masked_fill(taken, torch.inf).sort(dim=1, stable=True).indices
                taken = taken.scatter(1, order, taken.gather(1, order) | (places < turn[:, pivot, None]))
        return taken.long().sort(dim=1, descending=True, stable=True).indices[:, :k]

    def _lengths(self, tokens: Tokens) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """What image tokens and text tokens are chosen as pivots by, (B, N) and (B, T), and which text tokens
        may be, (B, T). T is at least as many as are wanted."""
        inside = "all_keys" in tokens.extras
        image = _l1(tokens.all_keys[:, 0] if inside else tokens.x)
        behind = inside and int(self.pivot_text_token) > 0
        text = candidates = None
        if behind:
            candidates = tokens.text_mask & tokens.text_after
            text = _l1(tokens.text_keys[:, 0])
        if self.pivots == "random":
            image, text = self._draw(tokens.lot.tolist(), image, text, candidates)
        if behind:
            short = max(0, int(self.pivot_text_token) - text.shape[1])
            text = F.pad(text.masked_fill(~candidates, -1), (0, short), value=-1)
            candidates = F.pad(candidates, (0, short))
        return image, text, candidates

    def _draw(self, lots: list[int], image: Tensor, text: Tensor | None, candidates: Tensor | None) -> tuple:
        """The same for the same picture and seed in any batch, however its text is padded."""
        image, text = torch.empty_like(image), None if text is None else torch.zeros_like(text)
        for row, lot in enumerate(lots):
            generator = torch.Generator().manual_seed((lot * 1_000_003 + int(self.seed)) % (1 << 63))
            image[row] = torch.rand(image.shape[1], generator=generator).to(image.device)
            if text is not None:
                drawn = torch.rand(int(candidates[row].sum()), generator=generator)
                text[row, candidates[row]] = drawn.to(text.device)
        return image, text


def _l1(x: Tensor) -> Tensor:
    return x.float().abs().sum(dim=-1)


def _rows(x: Tensor, index: Tensor) -> Tensor:
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[2]))


def _longer(x: Tensor, like: Tensor) -> Tensor:
    """x (B, T, D) with rows of zeros, as many as `like` (B, T or more) has."""
    return F.pad(x, (0, 0, 0, like.shape[1] - x.shape[1]))


def _highest(length: Tensor, m: int) -> Tensor:
    """The m highest of each row, in the order of their places: (B, m)."""
    return length.sort(dim=1, descending=True, stable=True).indices[:, :m].sort(dim=1).values
