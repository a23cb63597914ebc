"""Models that say which class a picture shows: by a head for labels, or by the words of the classes."""

from __future__ import annotations

import difflib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .pictures import Pictures
from .tasks import normalise

PROMPT = "a photo of a {}."

Inputs = dict[str, Tensor]
Judge = Callable[[Tensor], Tensor]


class Classifier(ABC):
    """A model, how pictures get into it, and what comes out.

    name     what it was opened by, without any path
    model    what `compress()` takes; every method may be given another model of the same kind
    prepare  RGB images -> what the model takes, in float32 on the CPU
    """

    name: str
    model: nn.Module
    prepare: Callable[[list[Any]], Inputs]

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.model.parameters()).dtype

    @abstractmethod
    def forward(self, model: nn.Module, inputs: Inputs) -> Tensor:
        """What the model makes of pictures, (B, L): what judges are given."""

    @abstractmethod
    def features(self, model: nn.Module, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """What forward() gives, and one vector for each picture: what the classes are told from."""

    @abstractmethod
    def judge(self, task: Pictures) -> Judge:
        """Turns what forward() gives into scores of the task's classes, (B, C).

        Raises ValueError where the task's classes are none that the model knows.
        """


class Labelled(Classifier):
    """A head with an output for each label; `labels[i]` are the names that output i goes by."""

    def __init__(self, name: str, model: nn.Module, prepare: Callable, head: str, labels: list[set[str]]):
        self.name, self.model, self.prepare, self.head, self.labels = name, model, prepare, head, labels

    def forward(self, model: nn.Module, inputs: Inputs) -> Tensor:
        output = model(**inputs)
        return output if isinstance(output, Tensor) else output.logits

    def features(self, model: nn.Module, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """The vector is what enters the head."""
        seen: list[Tensor] = []
        hook = model.get_submodule(self.head).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        try:
            logits = self.forward(model, inputs)
        finally:
            hook.remove()
        return logits, seen[0]

    def judge(self, task: Pictures) -> Judge:
        outputs = torch.tensor(_outputs(self, task), device=self.device)
        return lambda logits: logits[:, outputs]


class ZeroShot(Classifier):
    """Embeddings of pictures compared with those of the classes' words; `embed` and `read` make them."""

    def __init__(self, name: str, model: nn.Module, prepare: Callable, embed: Callable, read: Callable):
        self.name, self.model, self.prepare, self.embed, self.read = name, model, prepare, embed, read

    def forward(self, model: nn.Module, inputs: Inputs) -> Tensor:
        return F.normalize(self.embed(model, inputs).float(), dim=-1)

    def features(self, model: nn.Module, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """The vector is the embedding itself."""
        embedding = self.forward(model, inputs)
        return embedding, embedding

    @torch.no_grad()
    def judge(self, task: Pictures) -> Judge:
        lines = [PROMPT.format(words) for words in task.classes.values()]
        read = [self.read(lines[start : start + 64]) for start in range(0, len(lines), 64)]
        texts = F.normalize(torch.cat(read).float(), dim=-1)  # (C, L)
        return lambda embedding: embedding @ texts.T


def open_classifier(name: str | Path, device: str | torch.device | None = None) -> Classifier:
    """The classifier called

    "timm:NAME"               a timm model with its pretrained weights; "timm:NAME@FILE" with those of a file,
                              whose head decides how many classes there are
    "open_clip:ARCH/WEIGHTS"  zero-shot, by the prompt "a photo of a {class}."; WEIGHTS is a tag or a file
    a folder or a name on     transformers: a model like CLIP, zero-shot, or one for image classification
    the Hugging Face Hub

    device  a GPU where there is one, by default
    Raises ValueError in one sentence where there is no such model or it does not classify pictures.
    """
    kind, colon, rest = str(name).partition(":")
    opened = {"timm": _timm, "open_clip": _open_clip}.get(kind if colon else "")
    classifier = opened(rest) if opened else _transformers(str(name))
    classifier.model.to(device or ("cuda" if torch.cuda.is_available() else "cpu")).eval()
    return classifier


def _timm(name: str) -> Classifier:
    import timm
    from timm.data import ImageNetInfo, create_transform, infer_imagenet_subset, resolve_data_config

    name, at, file = name.partition("@")
    if at and not Path(file).expanduser().is_file():
        raise ValueError(f"there is no file '{file}' with weights of timm:{name}")
    if ":" not in name and not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), n=3)
        hint = f"did you mean {' or '.join(near)}?" if near else "timm.list_models() lists them"
        raise ValueError(f"timm has no model {name!r}; {hint}")
    try:
        model = (
            _timm_from_file(name, str(Path(file).expanduser()))
            if file
            else timm.create_model(name, pretrained=True)
        )
    except Exception as error:  # a dozen kinds, from network to file
        hint = "" if file else f"; weights of your own are given as timm:{name}@FILE"
        raise ValueError(f"the weights of timm:{name} cannot be loaded ({_brief(error)}){hint}") from error
    heads = model.pretrained_cfg.get("classifier") or "head"
    head = heads if isinstance(heads, str) else heads[0]
    if not model.num_classes:
        raise ValueError(f"timm:{name} has no head for classes: give a model that was trained to classify")
    subset = infer_imagenet_subset(model)
    labels: list[set[str]] = [set() for _ in range(model.num_classes)]
    if subset:
        known = ImageNetInfo(subset)
        labels = [
            {label, *_synonyms(known.label_name_to_description(label))} for label in known.label_names()
        ]
    transform = create_transform(**resolve_data_config(model=model))
    return Labelled(f"timm:{name}", model, _stacked("x", transform), head, labels)


def _timm_from_file(name: str, file: str) -> nn.Module:
    import timm

    heads = timm.get_pretrained_cfg(name).classifier or "head"
    weights = timm.models.load_state_dict(file)
    head = weights.get(f"{heads if isinstance(heads, str) else heads[0]}.weight")
    how = {} if head is None else {"num_classes": len(head)}
    return timm.create_model(name, checkpoint_path=file, **how)


def _open_clip(name: str) -> Classifier:
    import open_clip

    architecture, _, weights = (name, "", "") if name.startswith("hf-hub:") else name.partition("/")
    if not weights and not name.startswith("hf-hub:"):
        tags = ", ".join(open_clip.list_pretrained_tags_by_model(architecture)[:4]) or "none"
        raise ValueError(f"give weights, as open_clip:{architecture}/TAG; tags of this model: {tags}")
    if not name.startswith("hf-hub:") and architecture not in open_clip.list_models():
        near = difflib.get_close_matches(architecture, open_clip.list_models(), n=3)
        hint = f"did you mean {' or '.join(near)}?" if near else "open_clip.list_models() lists them"
        raise ValueError(f"open_clip has no model {architecture!r}; {hint}")
    try:
        model, transform = open_clip.create_model_from_pretrained(architecture, weights or None)
        tokenizer = open_clip.get_tokenizer(architecture)
    except Exception as error:
        raise ValueError(f"open_clip:{name} cannot be loaded ({_brief(error)})") from error

    def read(lines: list[str]) -> Tensor:
        return model.encode_text(tokenizer(lines).to(next(model.parameters()).device))

    shown = architecture if Path(weights).is_file() else name
    prepare = _stacked("image", transform)
    return ZeroShot(
        f"open_clip:{shown}", model, prepare, lambda model, inputs: model.encode_image(**inputs), read
    )


def _transformers(name: str) -> Classifier:
    from timm.data import ImageNetInfo
    from transformers import (
        AutoConfig,
        AutoImageProcessor,
        AutoModelForImageClassification,
        AutoModelForZeroShotImageClassification,
        AutoTokenizer,
    )
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_ZERO_SHOT_IMAGE_CLASSIFICATION_MAPPING_NAMES as ZERO_SHOT,
    )

    folder = Path(name).expanduser()
    source = str(folder) if folder.exists() else name
    try:
        config = AutoConfig.from_pretrained(source)
        labelled = any(kind.endswith("ForImageClassification") for kind in config.architectures or ())
        if not labelled and config.model_type not in ZERO_SHOT:
            raise ValueError(
                f"'{name}' is a {config.model_type} model, which does not classify pictures: it is not like "
                "CLIP and has no head for classes"
            )
        processor = AutoImageProcessor.from_pretrained(source)
        auto = AutoModelForImageClassification if labelled else AutoModelForZeroShotImageClassification
        model = auto.from_pretrained(source, dtype="auto")
        tokenizer = None if labelled else AutoTokenizer.from_pretrained(source)
    except OSError as error:
        raise ValueError(
            f"there is no complete model '{name}': no folder with config, weights and processor files here "
            "and no such name on the Hugging Face Hub, or it is out of reach"
        ) from error
    shown = folder.resolve().name if folder.exists() else name

    def prepare(images: list[Any]) -> Inputs:
        return dict(processor(images=images, return_tensors="pt"))

    if labelled:
        labels = [{*_synonyms(str(config.id2label[i]))} for i in range(config.num_labels)]
        if len(labels) == 1000 and "tench" in labels[0] and "toilet tissue" in labels[-1]:
            labels = [
                one | {number} for one, number in zip(labels, ImageNetInfo().label_names(), strict=True)
            ]
        return Labelled(shown, model, prepare, _head(model, len(labels)), labels)

    longest = getattr(config.text_config, "max_position_embeddings", None)
    how = {"truncation": longest is not None, "max_length": longest, "return_tensors": "pt"}
    how["padding"] = "max_length" if config.model_type.startswith("siglip") else True  # as it was trained

    def read(lines: list[str]) -> Tensor:
        return _pooled(model.get_text_features(**tokenizer(lines, **how).to(model.device)))

    return ZeroShot(
        shown, model, prepare, lambda model, inputs: _pooled(model.get_image_features(**inputs)), read
    )


def _pooled(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output.pooler_output


def _head(model: nn.Module, labels: int) -> str:
    """The name of the layer that gives the labels' logits."""
    found = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module.out_features == labels
    ]
    return found[-1]


def _stacked(name: str, transform: Callable[[Any], Tensor]) -> Callable[[list[Any]], Inputs]:
    return lambda images: {name: torch.stack([transform(image) for image in images])}


def _synonyms(description: str) -> Iterable[str]:
    """ "tench, Tinca tinca" goes by all of it and by each part."""
    return (description, *description.split(", "))


def _outputs(classifier: Labelled, task: Pictures) -> list[int]:
    """Which output of the head stands for each class of the task: by name, by number, or by order."""
    known: dict[str, set[int]] = {}
    for output, names in enumerate(classifier.labels):
        for name in names:
            known.setdefault(normalise(name), set()).add(output)
    named = {
        label: known.get(normalise(label)) or known.get(normalise(words), set())
        for label, words in task.classes.items()
    }
    missing = [label for label, outputs in named.items() if len(outputs) != 1]
    outputs = len(classifier.labels)
    if not missing:
        return [next(iter(outputs)) for outputs in named.values()]
    if len(missing) == len(named):  # no name is known, so that numbers and order mean something
        if all(label.isdecimal() and int(label) < outputs for label in named):
            return [int(label) for label in named]
        if len(named) == outputs:
            return list(range(outputs))
    raise ValueError(
        f"{len(missing)} of the {len(named)} classes of {task.name} are none of the {outputs} labels of "
        f"{classifier.name}, such as {missing[0]!r}: name the folders by its labels, by their numbers from 0 "
        f"on, or have as many folders as labels, in its order"
    )


def _brief(error: Exception) -> str:
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {lines[0][:160]}" if lines else type(error).__name__
