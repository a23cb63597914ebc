"""The three losses of the recipe: patch labels in the language model's words, captions, packed questions."""

import numpy as np
import torch
import torch.nn.functional as F
from build import WIDTH, vocabulary
from torch import Tensor, nn
from transformers import AttentionInterface

from vtc.evaluation.scenes import COLOURS, DIGIT, DIGITS, PARTIAL, SHAPES, SIDE, SIZES

VOCAB = vocabulary()


def plain_attention(module, query, key, value, attention_mask, scaling=None, **_):
    """Attention in two matrix products: in bfloat16 on a CPU twice as fast to train as the fused kernel."""
    logits = query * scaling @ key.transpose(-1, -2)  # (B, heads, N, N)
    if attention_mask is not None:
        logits = logits + attention_mask
    weights = logits.softmax(-1, dtype=torch.float32 if attention_mask is not None else logits.dtype)
    return (weights.to(value.dtype) @ value).transpose(1, 2).contiguous(), None


AttentionInterface.register("plain", plain_attention)


class PatchWords(nn.Module):
    """Names what is under each patch with the decoder's own word vectors, so that both share a space.

    The feature that the decoder will read must be near the words for shape, colour, size, digit and place of
    the object under the patch, or near "nothing"; a throw-away layer reads the object's exact centre.
    """

    def __init__(self):
        super().__init__()
        self.centre = nn.Linear(WIDTH, 2)
        groups = {
            "shape": (*SHAPES, "nothing"), "colour": (*COLOURS, "nothing"), "size": tuple(SIZES),
            "digit": (*DIGITS, "nothing"), "vertical": ("top", "bottom"), "horizontal": ("left", "right"),
        }  # fmt: skip
        self.groups = {name: torch.tensor([VOCAB[w] for w in words]) for name, words in groups.items()}

    def forward(
        self, features: Tensor, words: Tensor, labels: dict[str, Tensor]
    ) -> tuple[Tensor, dict[str, float]]:
        """features (B, 144, D), words (V, D) -> loss, accuracy on patches that show something."""
        total, right = 0, {}
        shown = labels["shown"]  # (B, 144) bool
        for name, ids in self.groups.items():
            logits, target = features @ words[ids].T, labels[name]  # (B, 144, G), (B, 144)
            loss = F.cross_entropy(logits.transpose(1, 2), target, ignore_index=-100, reduction="none")
            here, nothing = shown & (target >= 0), ~shown & (target >= 0)
            if name in ("shape", "colour"):
                here = here & (labels["digit"] == len(DIGITS))
            if name == "digit":
                here = here & (target < len(DIGITS))
            total = total + loss[here].mean() + (0.5 * loss[nothing].mean() if nothing.any() else 0)
            right[name] = (logits.argmax(-1) == target)[here].float().mean().item()
        error = (self.centre(features) - labels["centre"])[shown].square().mean()
        right["centre"] = SIDE / 2 * error.item() ** 0.5  # in pixels
        return total + 4 * error, right


def patch_labels(owner: np.ndarray, objects: np.ndarray, digit: np.ndarray) -> dict[str, Tensor]:
    """Per word group (B, 144) the target, -100 where there is none, and the centre (B, 144, 2) in [-1, 1]."""
    rows = np.arange(len(owner))[:, None]
    shown, at_digit = owner >= 0, owner == DIGIT
    cells = objects[rows, owner.clip(0)].astype(np.int64)  # (B, 144, 5)
    labels = {}
    for i, (name, n) in enumerate((("shape", len(SHAPES)), ("colour", len(COLOURS)))):
        labels[name] = np.where(shown & ~at_digit, cells[..., i], n)
    labels["size"] = np.where(shown & ~at_digit, cells[..., 2], -100)
    labels["digit"] = np.where(at_digit, digit[:, None].astype(np.int64), len(DIGITS))
    for name in ("shape", "colour", "digit"):
        labels[name][owner == PARTIAL] = -100
    labels["vertical"] = np.where(shown, cells[..., 4] >= SIDE / 2, -100)
    labels["horizontal"] = np.where(shown, cells[..., 3] >= SIDE / 2, -100)
    centre = torch.from_numpy((cells[..., 3:] * 2 / SIDE - 1).astype(np.float32))
    return {name: torch.from_numpy(a) for name, a in labels.items()} | {
        "shown": torch.from_numpy(shown),
        "centre": centre,
    }


def caption_loss(images: Tensor, texts: Tensor, scale: Tensor) -> tuple[Tensor, float]:
    """CLIP's symmetric loss on (B, D) embeddings, and how often the right caption comes first."""
    images, texts = F.normalize(images, dim=-1), F.normalize(texts, dim=-1)
    logits, target = scale.exp().clamp(max=100) * images @ texts.T, torch.arange(len(images))
    right = (logits.argmax(-1) == target).float().mean().item()
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2, right


def packed_mask(segment: Tensor) -> Tensor:
    """(B, L) with 0 for the picture and 1.. for its questions -> (B, 1, L, L) additive mask.

    A question sees the picture and itself, as if it stood alone: no answer leaks into another question.
    """
    same = (segment[:, None, :] == segment[:, :, None]) | (segment[:, None, :] == 0)
    allowed = same & torch.ones(segment.shape[1], segment.shape[1], dtype=torch.bool).tril()
    return torch.zeros(allowed.shape).masked_fill(~allowed, -1e9)[:, None]


class Places(nn.Module):
    """Asks half-way through the decoder where the object is that a word means, and whether there is one.

    "the red circle" means one object only once colour and shape are put together; without this hint the
    decoder needs many thousands of pictures to find that out, and answers by the colour alone meanwhile.
    """

    def __init__(self):
        super().__init__()
        self.read = nn.Linear(WIDTH, 3)

    def forward(self, hidden: Tensor, place: Tensor) -> Tensor:
        """hidden (B, L, D) behind the second layer, place (B, L) as `data.meant` has it."""
        named = place != 0
        if not named.any():
            return hidden.new_zeros(())
        guess, place = self.read(hidden[named]), place[named]  # (names, 3), (names,)
        there = place > 0
        centre = torch.stack([(place - 1) % SIDE, (place - 1) // SIDE], 1) * 2 / SIDE - 1  # (names, 2) x, y
        loss = F.binary_cross_entropy_with_logits(guess[:, 2], there.float())
        return loss + 4 * (guess[:, :2] - centre)[there].square().mean()


def answer_loss(
    llava: nn.Module, features: Tensor, rows: dict[str, Tensor], places: Places
) -> tuple[Tensor, ...]:
    """features (B, K, D) of the projector -> losses on answers and places, (answers,) which are right."""
    embeds = llava.get_input_embeddings()(rows["ids"])  # (B, L, D)
    start = rows["image"]
    embeds = torch.cat(
        [embeds[:, :start], features.to(embeds.dtype), embeds[:, start + features.shape[1] :]], 1
    )
    with torch.autocast("cpu", torch.bfloat16):
        hidden = llava.model.language_model(
            inputs_embeds=embeds,
            attention_mask=packed_mask(rows["segment"]),
            position_ids=rows["position"],
            use_cache=False,
            output_hidden_states=True,
        )
    asked = rows["target"] >= 0  # (B, L)
    logits = hidden.last_hidden_state[asked].float() @ llava.get_input_embeddings().weight.T  # (answers, V)
    target = rows["target"][asked]
    where = places(hidden.hidden_states[2].float(), rows["place"])
    return F.cross_entropy(logits, target), where, logits.argmax(-1) == target
