"""The kinds of method, what they need from inside a layer, and the registry that names them."""

from __future__ import annotations

import dataclasses
import inspect
import json
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from .named import Named
from .tokens import Reduction, Tokens

Layer = int | float | slice
# what a plan says of a step beside the method's options
SETTINGS = ("stage", "keep", "positions", "allocate", "merge", "decoder_layer")
SETTINGS += ("schedule", "restore", "carry")


@dataclass(frozen=True)
class Need:
    """What a method reads beside the features. From inside the vision encoder, recomputed from captured
    queries and keys of a few layers:

    kind    "cls_attention"    what the CLS token attends to, post-softmax, mean over heads: (B, layers, N)
            "cls_logits"       the same before the softmax, scaled: (B, layers, N)
            "cls_one_head"     what CLS attends to where all heads are taken as one: (B, layers, N)
            "cls_values"       what CLS attends to, times the length of that head's value, summed over heads:
                               (B, layers, N)
            "mean_attention"   attention a token receives, post-softmax, mean over heads and over all query
                               rows (CLS row included, as the HiPrune code does): (B, layers, N)
            "patch_attention"  the same, where CLS and registers do not ask: (B, layers, N)
            "keys"             keys after norm and rotation, mean over heads: (B, layers, N, head_dim)
            "all_keys"         keys of all heads side by side: (B, layers, N, heads * head_dim)
            "attention"        the whole map, post-softmax, all tokens of the encoder's sequence (CLS and
                               registers in front): (B, layers, heads, M, M)
            "shift"            length of what the MLP branch adds to a token, for methods that reduce after
                               the block: (B, layers, N)
            The last two exist at the encoder stage only. And from around it, at the features stage only:
            "vision"           what the projector was given for each token, the mean over its patches; the
                               features themselves where no projector is given patches: (B, N, D')
            "text"             the embeddings of the prompt in which the image is, without image tokens:
                               tokens.text (B, T, D), padded; tokens.text_mask (B, T) True for those that
                               are no padding, tokens.text_after (B, T) for those behind the image
    layers  0-based block indices, negatives from the end; a float is a fraction of the depth; a slice spans
            blocks and its bounds may be fractions too. At the encoder stage it is always the block itself in
            which tokens are reduced, so that there is one layer, whatever is named here
    view    "own", or "thumbnail": what the whole-image view of a tiled image says of the place of each
            token, interpolated, as `tokens.thumbnail_<kind>`; a token's own where there is none
    """

    kind: str
    layers: tuple[Layer, ...] = ()
    view: str = "own"

    @property
    def name(self) -> str:
        """The attribute of the tokens in which it is found."""
        return self.kind if self.view == "own" else f"{self.view}_{self.kind}"

    def resolve(self, depth: int) -> tuple[int, ...]:
        """The block indices in an encoder of `depth` blocks. Raises ValueError if one does not exist."""
        found: list[int] = []
        for layer in self.layers:
            if isinstance(layer, slice):
                start, stop = (_block(bound, depth) for bound in (layer.start, layer.stop))
                found += range(depth)[start:stop]
            else:
                found.append(_block(layer, depth))
        if not found or not all(-depth <= layer < depth for layer in found):
            raise ValueError(f"layers {self.layers} do not all exist in an encoder of {depth} blocks")
        return tuple(layer % depth for layer in found)


def _block(layer: int | float | None, depth: int) -> int | None:
    return int(layer * depth + 1e-6) if isinstance(layer, float) else layer  # 14 / 24 of 24 is 14


@dataclass
class Method:
    """A rule that says which tokens stay and where the others go. Its fields are its options.

    Subclass `Select` or `Merge`, not this class. `stages` lists where the rule may run, its default first.

    At the features stage: `allocate` shares the budget of an image over its tiles, and with
    `before_projector` tokens are reduced in front of a projector that works token by token, so that merged
    ones go through it; where there is none such, behind it.

    At the encoder stage: `schedule` spreads the budget over blocks (see vtc.schedule), `after_block` reduces
    behind a block's MLP instead of in front of it, and `proportional` adds the logarithm of token sizes to
    the attention of later blocks, so that a merged token is attended to like its members.
    """

    name: ClassVar[str]
    paper: ClassVar[str] = ""
    stages: ClassVar[tuple[str, ...]] = ("features",)
    positions: ClassVar[str] = "keep"  # or "repack": what the paper's code does to the kept tokens' positions
    needs_grid: ClassVar[bool] = False  # reads the rows and columns of one picture
    lowers_resolution: ClassVar[bool] = False  # the encoder is shown a picture of k patches
    source: ClassVar[Any] = None  # a module that makes the features in the place of the vision tower
    module: ClassVar[Any] = None  # a `vtc.learned.Resampler` that makes tokens of features, keep may be None
    allocate: ClassVar[Any] = "proportional"  # shares an image's budget over its tiles, see allocate.py
    decoder_layer: ClassVar[int | float] = 2  # decoder stage: in front of which layer tokens are dropped
    decoder_needs: ClassVar[tuple[Need, ...] | None] = None  # what is read there, where that is not `needs`
    before_projector: ClassVar[bool] = False  # tokens are what a projector of single tokens is given
    schedule: ClassVar[str] = "constant"
    after_block: ClassVar[bool] = False
    whole_grid: ClassVar[bool] = False  # reduces tokens of the whole picture only, so in one block
    proportional: ClassVar[bool] = False  # or an option of the method

    @property
    def needs(self) -> tuple[Need, ...]:
        """What `reduce` reads from the tokens beyond their features; may depend on the options."""
        return ()

    def count(self, tokens: Tokens, k: int) -> Tensor | None:
        """How many tokens each row is worth, 1 to k: (B,), by a method that chooses itself; else None. Where
        rows differ they are reduced apart."""
        return None

    def reduce(self, tokens: Tokens, k: int) -> Reduction:
        """Keeps exactly k of the N tokens of every row."""
        raise TypeError(f"{type(self).__name__} must be a Select or a Merge, or define reduce()")

    def to_dict(self) -> dict[str, Any]:
        return {"method": self.name, "options": dataclasses.asdict(self)}

    def check_plan(self) -> None:
        """Raises ValueError where `load()` would not find it by what `to_dict` says."""


@dataclass
class Select(Method):
    """Pruning: define `score(tokens) -> (B, N)`, the k highest stay; or `select(tokens, k) -> (B, k)`."""

    @property
    def scored(self) -> bool:
        """Whether those that stay are the highest by score, so that a share of the scores can be kept."""
        return type(self).score is not Select.score and type(self).select is Select.select

    def score(self, tokens: Tokens) -> Tensor:
        raise TypeError(f"{type(self).__name__} must define score() or select()")

    def select(self, tokens: Tokens, k: int) -> Tensor:
        # A stable sort breaks ties by position, so that equal scores give the same tokens in any batch.
        return scores(self, tokens).sort(dim=1, descending=True, stable=True).indices[:, :k]

    def reduce(self, tokens: Tokens, k: int) -> Reduction:
        return Reduction.select(self.select(tokens, k), tokens.n)


def scores(method: Select, tokens: Tokens) -> Tensor:
    """What `score` gives, float32: (B, N). Raises ValueError for another shape."""
    score = method.score(tokens)
    if score.shape != tokens.x.shape[:2]:
        wanted = tuple(tokens.x.shape[:2])
        raise ValueError(f"score() of '{method.name}' must give {wanted}, not {tuple(score.shape)}")
    return score.float()


@dataclass
class Merge(Method):
    """Merging: define `assign(tokens, k) -> Reduction`; kept tokens become averages of their group."""

    def assign(self, tokens: Tokens, k: int) -> Reduction:
        raise TypeError(f"{type(self).__name__} must define assign()")

    def reduce(self, tokens: Tokens, k: int) -> Reduction:
        return self.assign(tokens, k)


_methods: Named[type[Method]] = Named("method", f"{__package__}.methods")
register = _methods.register


def list_methods(stage: str | None = None) -> list[str]:
    """The names `compress()` accepts, sorted: all, or those that run at a stage, "encoder", "features" or
    "decoder"."""
    return sorted(name for name, cls in _methods.all().items() if stage in (None, *cls.stages))


def get_method(name: str, **options: Any) -> Method:
    """The method of that name with the given options. In the place of a name, a folder or a name on the
    Hugging Face Hub of a module that `save_pretrained` saved. Raises ValueError for an unknown name or
    option, OSError for a module that cannot be read."""
    if name not in _methods.all():
        if is_saved(name):
            from .learned.method import load_method

            return load_method(name, options)
        _refuse_module(name)
    cls = _methods.get(name)
    fields = {field.name for field in dataclasses.fields(cls)}
    unknown = sorted(set(options) - fields)
    if unknown:
        has = ", ".join(sorted(fields)) or "none"
        raise ValueError(f"method '{name}' has no option {', '.join(map(repr, unknown))}; its options: {has}")
    for field in dataclasses.fields(cls):
        value = options.get(field.name, field.default)
        if isinstance(field.default, bool):
            fine, kind = isinstance(value, bool), "True or False"
        elif isinstance(field.default, (int, float)):
            fine, kind = isinstance(value, Real) and not isinstance(value, bool), "a number"
        else:
            continue
        if not fine:
            raise ValueError(f"option {field.name} of method '{name}' is {kind}, not {value!r}")
    return cls(**options)


def _refuse_module(name: str) -> None:
    """Raises ValueError where the name is that of a module, which has to have weights."""
    from .learned import list_modules

    if name in list_modules():
        raise ValueError(
            f"'{name}' is a module with weights: give a folder or a name on the Hugging Face Hub where one "
            f"was saved, or what vtc.learned.build('{name}', ...) makes"
        )


def is_saved(name: str | Path) -> bool:
    """Whether it is no name of a method, but may be where a module was saved: a folder, or owner/name."""
    return Path(name).is_dir() or str(name).count("/") == 1 or isinstance(name, Path)


def doc(cls: type[Method]) -> str:
    """The first line of a method's docstring, for tables."""
    return inspect.getdoc(cls).splitlines()[0]


def save(plan: list[tuple[Method | str, dict]], path: str | Path) -> None:
    """Writes what `compress()` was given as JSON. `Handle.plan` is such a list."""
    from . import __version__

    steps = []
    for method, settings in plan:
        settings = dict(settings)
        where = {name: settings.pop(name) for name in SETTINGS if name in settings}
        where = {name: value.shown() if hasattr(value, "shown") else value for name, value in where.items()}
        method = get_method(method, **settings) if isinstance(method, (str, Path)) else method
        if isinstance(method, Method):
            method.check_plan()
        steps.append({**method.to_dict(), **where})
    Path(path).write_text(
        json.dumps({"type": "vtc", "version": __version__, "steps": steps}, indent=2) + "\n"
    )


def load(path: str | Path) -> list[tuple[Method, dict]]:
    """Reads what `save()` wrote: a list that `compress(model, load(path))` takes. Else raises ValueError."""
    content = json.loads(Path(path).read_text())
    if not isinstance(content, dict) or content.get("type") != "vtc":
        raise ValueError(f"{path} is no plan that vtc.save() wrote")
    steps, plan = content["steps"], []
    for step in steps:
        method = get_method(step.pop("method"), **step.pop("options"))
        plan.append((method, step))
    return plan
