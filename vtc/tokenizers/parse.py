"""Policies as a command line and a manifest have them."""

from __future__ import annotations

import dataclasses
from typing import Any

from .complexity import SCORES, Complexity
from .errors import METRICS
from .oracle import Oracle, Shuffled
from .policies import Fixed, Halting, MeanBudget, Policy
from .quality import TargetQuality

POLICIES: dict[str, type[Policy]] = {
    policy.name: policy
    for policy in (Fixed, Halting, TargetQuality, Complexity, MeanBudget, Oracle, Shuffled)
}

# what a command line takes, and what it means; `vtc tokenize --help` shows them
FORMS = {
    "fixed:K": "K tokens for every image",
    "halting[:EPSILON]": "as many as the tokenizer's own head finds enough for an error of EPSILON",
    "l1:ERROR, mse:ERROR, psnr:DECIBELS, wrong:SHARE": "the fewest with which an image comes out that well",
    "complexity:SCORE:LENGTHS:THRESHOLDS": "by a score of the image, gradient or jpeg: "
    "complexity:jpeg:16,32,64:0.2,0.4",
    "mean:TOKENS:POLICY": "halting, l1, mse, psnr, wrong or complexity:SCORE[:LENGTHS], tuned to that mean "
    "on the first images: mean:32:halting",
}


def parse_policy(text: str) -> Policy:
    """The policy of a text in one of the FORMS. Raises ValueError for another text, naming the forms."""
    kind, *rest = text.strip().split(":")
    try:
        return _parsed(kind, rest)
    except ValueError as error:
        raise ValueError(
            f"no policy is written {text!r} ({error}); the forms are {', '.join(FORMS)}"
        ) from None


def policy_from(content: dict[str, Any]) -> Policy:
    """The policy that `to_dict` wrote. Raises ValueError for what it did not write."""
    cls = POLICIES.get(content.get("name")) if isinstance(content, dict) else None
    if cls is None:
        raise ValueError(f"a policy has a name, one of {', '.join(POLICIES)}, not {content!r}")
    values = {field: value for field, value in content.items() if field != "name"}
    fields = {field.name: field.default for field in dataclasses.fields(cls)}
    needed = {name for name, default in fields.items() if default is dataclasses.MISSING}
    if unknown := sorted(set(values) - set(fields)) or sorted(needed - set(values)):
        raise ValueError(f"a '{cls.name}' policy has {', '.join(fields)}: look at {', '.join(unknown)}")
    if "policy" in values:
        values["policy"] = policy_from(values["policy"])
    return cls(**values)


def _parsed(kind: str, rest: list[str]) -> Policy:
    if kind == "fixed" and len(rest) == 1:
        return Fixed(_number(rest[0], int))
    if kind == "halting" and len(rest) <= 1:
        return Halting(*(_number(text) for text in rest))
    if kind in METRICS and len(rest) == 1:
        return TargetQuality(kind, _number(rest[0]))
    if kind == "complexity" and len(rest) == 3:
        return Complexity(rest[0], _numbers(rest[1], int), _numbers(rest[2]))
    if kind == "mean" and len(rest) >= 2:
        return MeanBudget(_number(rest[0]), _tunable(rest[1], rest[2:]))
    known = ("fixed", "halting", *METRICS, "complexity", "mean")
    if kind not in known:
        raise ValueError(f"{kind!r} is none of {', '.join(known)}")
    raise ValueError(f"{kind} is short of a part, or has one too many")


def _tunable(kind: str, rest: list[str]) -> Policy:
    """A policy without what a mean budget finds."""
    if kind == "halting" and not rest:
        return Halting()
    if kind in METRICS and not rest:
        return TargetQuality(kind)
    if kind == "complexity" and 1 <= len(rest) <= 2:
        return Complexity(rest[0], _numbers(rest[1], int) if len(rest) == 2 else None)
    names = ", ".join(["halting", *METRICS])
    raise ValueError(
        f"a mean tunes {names} or complexity:{'|'.join(SCORES)}[:LENGTHS], without the last number"
    )


def _number(text: str, kind: type = float) -> Any:
    try:
        return kind(text)
    except ValueError:
        what = "a whole number" if kind is int else "a number"
        raise ValueError(f"{text!r} is not {what}") from None


def _numbers(text: str, kind: type = float) -> list[Any]:
    return [_number(part, kind) for part in text.split(",")]
