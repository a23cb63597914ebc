"""Length policies: how many tokens each image gets, for every tokenizer the same."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from .sequence import TokenSequence

if TYPE_CHECKING:
    from .base import Tokenizer

Images = Tensor | Iterable[Tensor]  # (B, 3, H, W), or batches of such
CHUNK = 32  # images at once, where a policy is calibrated on many


class Policy:
    """Chooses a length for each image. Subclasses define `choose`; `encode` too where tokens come with it.

    A length that the tokenizer does not have becomes the next longer one that it has; one above its longest
    is an error. Whatever else is in the batch, an image gets the same number of tokens, unless the policy is
    `evaluation_only`: those look at the other images, or at what is not known when tokens are made.
    """

    name: ClassVar[str]
    evaluation_only: ClassVar[bool] = False
    knob: ClassVar[str | None] = None  # the field a mean budget sets, by `calibrate(tokenizer, images, mean)`

    def choose(self, tokenizer: Tokenizer, images: Tensor) -> Tensor:
        """(B,) int64, how many tokens each image gets, before rounding up."""
        raise NotImplementedError

    def encode(self, tokenizer: Tokenizer, images: Tensor) -> TokenSequence:
        """The tokens of images (B, 3, H, W), as many of each as this policy chooses."""
        return tokenizer.encode(images, round_up(tokenizer, self.choose(tokenizer, images)))

    def to_dict(self) -> dict[str, Any]:
        """The policy as JSON has it; `policy_from` reads it. Raises ValueError for one with a function."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        for field, value in fields.items():
            if isinstance(value, Policy):
                fields[field] = value.to_dict()
            elif callable(value):
                raise ValueError(f"a '{self.name}' policy with a function as {field} cannot be written down")
            elif isinstance(value, tuple):
                fields[field] = list(value)
        return {"name": self.name, **fields}


@dataclass(frozen=True)
class Fixed(Policy):
    """The same number of tokens for every image."""

    name = "fixed"
    k: int

    def __post_init__(self) -> None:
        check_count("k", self.k)

    def choose(self, tokenizer: Tokenizer, images: Tensor) -> Tensor:
        return torch.full((len(images),), self.k, device=images.device)


@dataclass(frozen=True)
class Halting(Policy):
    """As many tokens as the tokenizer's own halting or length head finds enough for an error of epsilon.

    None is the tokenizer's own default. Raises ValueError for a tokenizer without such a head.
    """

    name = "halting"
    knob = "epsilon"
    epsilon: float | None = None

    def __post_init__(self) -> None:
        if self.epsilon is not None and not 0 < check_number("epsilon", self.epsilon) < math.inf:
            raise ValueError(f"epsilon is a number above 0, not {self.epsilon!r}")

    def choose(self, tokenizer: Tokenizer, images: Tensor) -> Tensor:
        return self.encode(tokenizer, images).lengths

    def encode(self, tokenizer: Tokenizer, images: Tensor) -> TokenSequence:
        return tokenizer.halt(images, self.epsilon)

    @torch.no_grad()
    def calibrate(self, tokenizer: Tokenizer, images: Images, mean: float) -> Halting:
        """The least epsilon between 0.0001 and 1 that keeps the mean length within the budget.

        Raises ValueError where none does. Takes more tokens to go with a smaller epsilon.
        """
        given = batches(images)

        def kept(epsilon: float) -> Tensor:
            return torch.cat([tokenizer.encode(batch, Halting(epsilon)).lengths for batch in given])

        return replace(self, epsilon=least(kept, 1e-4, 1.0, mean, steps=16))


@dataclass(frozen=True)
class MeanBudget(Policy):
    """Another policy, tuned so that images get `mean` tokens on average, or a little less.

    policy      whose knob is set: the epsilon of Halting, the target of TargetQuality, the thresholds of
                Complexity. It is left out there.
    measured    the mean length over the images it was calibrated on; None until then

    The budget holds for the images of the calibration, and for others as far as they are alike. Once
    calibrated the number of tokens of an image depends on nothing but the image.
    """

    name = "mean"
    mean: float
    policy: Policy
    measured: float | None = None

    def __post_init__(self) -> None:
        if not 1 <= check_number("mean", self.mean) < math.inf:
            raise ValueError(f"mean is a number of tokens of 1 or more, not {self.mean!r}")
        knob = getattr(self.policy, "knob", None)
        if knob is None:
            raise ValueError(f"a mean budget tunes halting, quality or complexity, not {self.policy!r}")
        if self.measured is None and getattr(self.policy, knob) is not None:
            raise ValueError(f"leave out {knob}: it is what the mean budget finds")

    def calibrate(self, tokenizer: Tokenizer, images: Images) -> MeanBudget:
        """The policy tuned on images (B, 3, H, W) or batches of such.

        Their mean length is at most `mean`, and so near to it that one more step of one image would go
        beyond, where the knob allows. Raises ValueError for no images, and for a budget that cannot be kept.
        """
        given = batches(images)
        tuned = self.policy.calibrate(tokenizer, given, self.mean)
        with torch.no_grad():
            kept = torch.cat([tokenizer.encode(batch, tuned).lengths for batch in given])
        return replace(self, policy=tuned, measured=float(kept.double().mean()))

    def choose(self, tokenizer: Tokenizer, images: Tensor) -> Tensor:
        return self._calibrated().choose(tokenizer, images)

    def encode(self, tokenizer: Tokenizer, images: Tensor) -> TokenSequence:
        return self._calibrated().encode(tokenizer, images)

    def _calibrated(self) -> Policy:
        if self.measured is None:
            raise ValueError(
                "a mean budget must be calibrated first: policy = policy.calibrate(tokenizer, images)"
            )
        return self.policy


def round_up(tokenizer: Tokenizer, lengths: Tensor) -> Tensor:
    """Each length (B,), or the next longer one the tokenizer has. Raises ValueError for one above all."""
    own = torch.tensor(list(tokenizer.lengths), device=lengths.device)
    place = torch.searchsorted(own, lengths)
    if lengths.numel() and int(lengths.max()) > int(own[-1]):
        raise ValueError(f"{tokenizer.name} encodes to {own[-1]} tokens at most, not to {int(lengths.max())}")
    return own[place]


def batches(images: Images) -> list[Tensor]:
    """Images, or batches of them, as a list of batches. Raises ValueError for none at all."""
    given = list(images.split(CHUNK)) if isinstance(images, Tensor) else list(images)
    if not sum(map(len, given)):
        raise ValueError("a policy is calibrated on one image or more, not on none")
    return given


def least(
    lengths_at: Callable[[float], Tensor], low: float, high: float, mean: float, steps: int = 60
) -> float:
    """The least value from `low` to `high` at which lengths, which fall with it, keep the mean: by bisection.

    Of the values with the same lengths one that is not at the edge, so that rounding changes no length.
    Raises ValueError where even `high` does not keep the mean.
    """

    def fits(lengths: Tensor) -> bool:
        return int(lengths.sum()) <= mean * len(lengths) + 1e-6

    if fits(lengths_at(low)):
        return low
    kept, top = lengths_at(high), high
    if not fits(kept):
        raise ValueError(
            f"no setting keeps a mean of {mean:g} tokens: the least is {float(kept.double().mean()):.4g}"
        )
    for _ in range(steps):
        middle = (low + high) / 2
        if int(kept.sum()) > mean * len(kept) - 1 or not low < middle < high:
            break
        lengths = lengths_at(middle)
        if fits(lengths):
            high, kept = middle, lengths
        else:
            low = middle
    for share in (1e-1, 1e-2, 1e-3, 1e-4, 1e-5):
        farther = high + share * (top - high)
        if torch.equal(lengths_at(farther), kept):
            return (high + farther) / 2
    return high


def check_count(what: str, k: Any) -> None:
    if isinstance(k, bool) or not isinstance(k, int) or k < 1:
        raise ValueError(f"{what} is a whole number of tokens of 1 or more, not {k!r}")


def check_number(what: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"{what} is a number, not {value!r}")
    return value
