from __future__ import annotations

from dataclasses import dataclass

from ..registry import register_tokenizer
from ..schedules import DropSchedule
from .titok import TiTok


@register_tokenizer
class OneDPiece(TiTok):
    """One-D-Piece: TiTok with the tail of the tokens cut off at random in training (arXiv:2501.10064).

    So what matters most is in front, and the first k of all tokens make a picture, for any k. The encoder
    never knows k. Training draws one k for the whole batch, from 1 to all equally often, and the bottleneck's
    loss is of all tokens whatever k is. In the layout of the published weights (`legacy_layout`) each token
    is a mixture of all latents: the order is one of tokens, not of latents.

    Departure from github.com/turingmotors/One-D-Piece: `training_loss` drops, `decode` does not, whether the
    module is in training mode or not.
    """

    name = "one-d-piece"
    paper = "arXiv:2501.10064"
    weights = "Apache-2.0"
    ordered = True
    prefix_stable = True
    drop = DropSchedule("uniform", shared=True)

    @dataclass(frozen=True)
    class Config(TiTok.Config):
        """As of TiTok."""

        tokens: int = 256

    @property
    def lengths(self) -> range:
        return range(1, self.config.tokens + 1)


OneDPiece.published = {
    f"turing-motors/One-D-Piece-{size[0].upper()}-256": OneDPiece.Config(encoder=size, decoder=size)
    for size in ("small", "base", "large")
}
