"""Which text stands around each image, for methods that read the question.

Features are made before they are mixed into the prompt: in a forward of the base model, or in generate(),
which encodes first and repeats the features for beams later. Both note the prompt they were called with.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from ..hosts import Vision, features_owner
from ..hosts.host import Layout
from ..threads import ByThread
from .cache import physical_length
from .plan import mask2d, valid_tokens

_PROMPT = "_vtc_prompt"
_NOT_TEXT = ("image", "video", "audio")
_MARKERS = ("video_start", "video_end")  # some families write videos as images between these
_ALONE = (
    "this method reads the question, which is not known where features are made alone: call the compressed "
    "model or its generate(), or use a method that does not read it"
)


@dataclass
class _Given:
    """What a forward or generate() was called with. whole: with what is in the cache already, as generate()
    may be. asked: the kinds of pictures whose texts were asked for."""

    arguments: dict[str, Any]
    whole: bool = False
    asked: list[str] = field(default_factory=list)

    @property
    def tokens(self) -> Tensor:
        """Its ids (B, L) or embeddings (B, L, D)."""
        for name in ("inputs_embeds", "input_ids", "inputs"):  # the last is what generate() calls them
            if self.arguments.get(name) is not None:
                return self.arguments[name]
        raise RuntimeError(_ALONE)

    @property
    def kinds(self) -> list[str]:
        """The pictures in it, in the order in which models encode them."""
        videos = self.arguments.get("pixel_values_videos") is not None
        images = self.arguments.get("pixel_values") is not None
        return ["image"] * (images or not videos) + ["video"] * videos


class Prompt:
    """Knows which text stands around each image of the forward that is under way."""

    def __init__(self, vision: Vision):
        name = type(vision.model).__name__
        if vision.host.late:
            raise ValueError(
                f"{name} projects features only when it puts them into the prompt, so that they cannot be "
                "compared with its words before: use a method that does not read the question"
            )
        self.vision = vision
        self._parameters = list(inspect.signature(type(vision.base).forward).parameters)[1:]
        found = {kind: getattr(vision.base.config, f"{kind}_token_id", None) for kind in _NOT_TEXT + _MARKERS}
        if found["video"] == found["image"]:
            found["video"] = None
        self._ids = {kind: number for kind, number in found.items() if number is not None}
        if "image" not in self._ids or "input_ids" not in self._parameters:
            raise ValueError(
                f"{name} does not tell which tokens of its prompt are an image's, so that its words cannot "
                "be told from them: use a method that does not read the question"
            )
        self._forward: ByThread[_Given] = ByThread()
        self._generate: ByThread[_Given] = ByThread()
        self._hooks: list[Any] = []

    def install(self) -> None:
        base, model = self.vision.base, self.vision.model
        setattr(base, _PROMPT, self)
        self._hooks = [
            base.register_forward_pre_hook(self._enter, with_kwargs=True),
            base.register_forward_hook(self._leave, always_call=True),
        ]
        self._own = vars(model).get("generate")  # a user's wrapper
        self._noting = None
        if original := getattr(getattr(model, "generate", None), "__func__", None):
            self._noting = _noting(original)
            model.generate = MethodType(self._noting, model)

    def remove(self) -> None:
        base, model = self.vision.base, self.vision.model
        delattr(base, _PROMPT)
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        if self._noting and getattr(vars(model).get("generate"), "__func__", None) is self._noting:
            del model.generate  # else it was wrapped once more
            if self._own is not None:
                model.generate = self._own
        self._forward.clear()
        self._generate.clear()

    def _enter(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        given = {**dict(zip(self._parameters, args)), **kwargs}
        if any(name.startswith("pixel_values") and value is not None for name, value in given.items()):
            self._forward.set(_Given(given))

    def _leave(self, module: nn.Module, args: tuple, output: Any) -> None:
        self._forward.pop()

    @contextmanager
    def generating(self, given: dict[str, Any]) -> Iterator[None]:
        before = self._generate.get()
        self._generate.set(_Given(given, whole=True))
        try:
            yield
        finally:
            self._generate.pop()
            if before is not None:
                self._generate.set(before)

    @torch.compiler.disable
    @torch.no_grad()
    def texts(self, name: str, layouts: list[Layout]) -> list[tuple[Tensor, Tensor]]:
        """For each image of a call of get_image_features or get_video_features, in order: the embeddings of
        the text in its prompt (T, D), and which of them come behind the image (T,), all where none does.

        To be asked once for each call: in some families videos come by the method for images.
        """
        prompt = self._generate.get()
        given = self._forward.get() or prompt
        if given is None:
            raise RuntimeError(_ALONE)
        tokens, real = self._tokens(given)
        embedding = self.vision.base.get_input_embeddings()
        ids = tokens if tokens.dim() == 2 else self._special(tokens, embedding)  # (B, L)
        lengths = [1 if self.vision.host.memory else layout.length for layout in layouts]
        places = self._places(name, given, ids, sum(lengths))
        rows, last = _ends(places, lengths, ids.shape[1])

        visual = torch.isin(ids, ids.new_tensor([self._ids[kind] for kind in _NOT_TEXT if kind in self._ids]))
        text = real.to(ids.device) & ~visual  # (B, L)
        if prompt is not None:
            text[:, prompt.tokens.shape[1] :] = False  # what was generated: without a cache all is run again
        words = tokens[text] if tokens.dim() == 3 else embedding(ids[text][None])[0]  # (words of all rows, D)
        device = layouts[0].tiles[0].slots.device
        words = words.to(device).split(text.sum(dim=1).tolist())
        behind = []
        for row, place in zip(rows, last):
            after = text[row].nonzero()[:, 0] > place  # (T,)
            behind.append((after if bool(after.any()) else torch.ones_like(after)).to(device))
        return [(words[row], after) for row, after in zip(rows, behind)]

    def _tokens(self, given: _Given) -> tuple[Tensor, Tensor]:
        """Ids (B, L) or embeddings (B, L, D) of the prompt as far as it is not in the cache, and which of
        them are no padding (B, L)."""
        tokens, arguments = given.tokens, given.arguments
        cache, mask = arguments.get("past_key_values"), arguments.get("attention_mask")
        embedded = tokens.dim() == 3
        weight = next(self.vision.base.get_input_embeddings().parameters())
        if weight.device.type != "meta":  # else its weights are brought to the ids
            tokens = tokens.to(weight.device)
        if given.whole:
            if mask is None and not embedded:
                mask = _no_padding(self.vision.model, arguments, tokens)
            past = 0 if cache is None else int(cache.get_seq_length())
            if mask is None or mask.shape[1] == tokens.shape[1]:  # else it is what is new
                tokens = tokens[:, past:] if past < tokens.shape[1] else tokens
        like = tokens if embedded else tokens[..., None]
        return tokens, valid_tokens(mask, mask2d(mask), physical_length(cache), like)

    def _special(self, embeds: Tensor, embedding: nn.Module) -> Tensor:
        """Embeddings (B, L, D) read back as ids (B, L), those of words as -1."""
        ids = torch.full(embeds.shape[:2], -1, device=embeds.device)
        for number in self._ids.values():
            one = embedding(torch.tensor([[number]], device=embeds.device))
            ids[(embeds == one).all(dim=-1)] = number
        return ids

    def _places(self, name: str, given: _Given, ids: Tensor, n: int) -> Tensor:
        """Which n tokens of the prompts, one behind the other, are for the features of this call: (n,)."""
        own = ids == self._ids["image"]
        video = ids == self._ids["video"] if "video" in self._ids else torch.zeros_like(own)
        if all(marker in self._ids for marker in _MARKERS):
            start, end = ((ids == self._ids[marker]).cumsum(dim=1) for marker in _MARKERS)
            video = video | own & (start > end)
        # Where no token is a video's, the family writes videos with the token of images.
        found = {"image": own & ~video, "video": video if bool(video.any()) else own}  # (B, L)
        kinds = ["video" if name == "get_video_features" else "image"]
        if not self.vision.host.video:
            kinds = sorted(given.kinds, key=given.asked.count)  # what was not asked for comes first
        counts = {kind: int(found[kind].sum()) for kind in kinds}
        fitting = [kind for kind in kinds if counts[kind] == n]
        if not fitting:
            raise RuntimeError(
                f"the prompt holds {counts[kinds[0]]} tokens for {n} features, so that nobody knows which "
                "text is about which image: pass the prompt together with all of its images"
            )
        given.asked.append(fitting[0])
        return found[fitting[0]].flatten().nonzero()[:, 0]


def _ends(places: Tensor, lengths: list[int], length: int) -> tuple[list[int], list[int]]:
    """The row of each image's tokens, and the place of the last of them in it."""
    own = [part[[0, -1]] for part in places.split(lengths)]
    first, last = torch.stack(own, dim=1).tolist()
    rows = [place // length for place in last]
    if rows != [place // length for place in first]:
        raise RuntimeError(
            "the tokens of an image lie in two prompts, so that nobody knows which text is about it: give "
            "each prompt as many image tokens as its images have features"
        )
    return rows, [place % length for place in last]


def _no_padding(model: nn.Module, given: dict[str, Any], ids: Tensor) -> Tensor | None:
    """The mask that generate() makes where it is given none: (B, L)."""
    config = given.get("generation_config")

    def setting(name: str) -> Any:
        values = (given.get(name), getattr(config, name, None), getattr(model.generation_config, name, None))
        return next((value for value in values if value is not None), None)

    pad, end = setting("pad_token_id"), setting("eos_token_id")
    if pad is None or pad in (end if isinstance(end, (list, tuple)) else [end]):
        return None
    return ids != pad


def _noting(original: Any) -> Any:
    """The model's own generate(); the prompt's knowledge is found on the model, as a deep copy must."""
    names = list(inspect.signature(original).parameters)[1:]

    @functools.wraps(original)
    def generate(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        prompt = getattr(features_owner(model), _PROMPT, None)
        given = {**dict(zip(names, args)), **kwargs}
        with prompt.generating(given) if prompt else nullcontext():
            return original(model, *args, **kwargs)

    return generate
