"""What the tiny random hosts share: small configs, random weights, prompts with pictures in them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

IMAGE, VIDEO, PAD, VOCAB = 99, 98, 0, 120
TEXT = range(3, 90)
SUPPRESS = list(range(90, 100))  # random weights would otherwise generate image tokens

LLAMA = {
    "model_type": "llama",
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": PAD,
    "bos_token_id": 1,
    "eos_token_id": None,
}
CLIP = {
    "model_type": "clip_vision_model",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
    "projection_dim": 32,
}
SIGLIP = {**CLIP, "model_type": "siglip_vision_model", "vision_use_head": False}

Inputs = dict[str, Tensor]
MakeInputs = Callable[..., Inputs]
Grouped = list[list[int]]  # for each prompt the numbers of its pictures


def randomise(model: nn.Module) -> nn.Module:
    for parameter in model.parameters():
        if parameter.ndim >= 2:  # the usual 0.02 makes all tokens of a tiny model look alike
            nn.init.normal_(parameter, std=0.15)
    return model.eval()


def noise(shape: Sequence[int], seed: int, number: int) -> Tensor:
    """The pixels of picture `number`: the same alone as in any batch."""
    return torch.randn(tuple(shape), generator=torch.Generator().manual_seed(1000 * seed + number + 1))


def maker(
    draw: Callable[[Grouped, int], Inputs],
    length: Callable[[int], int],
    *,
    film: Callable[[Grouped, int], Inputs] | None = None,
    video_length: Callable[[int], int] | None = None,
    before: Sequence[int] = (),
    after: Sequence[int] = (),
    extra: Callable[[Tensor], Inputs] | None = None,
) -> MakeInputs:
    """A make_inputs() from what a family's processor would give.

    draw, film    (numbers of the pictures of each prompt, seed) -> pixel_values and what goes with them
    length        number of a picture -> how many image tokens its prompt holds
    before, after ids in front of and behind each picture's tokens (all within 90..97)
    extra         input_ids (B, L) -> further inputs of one entry per token, such as token_type_ids
    """

    def make_inputs(images=(1, 1), videos=(), seed=0, pads=0, side="left", first=0) -> Inputs:
        """images, videos: how many each prompt holds; pads: columns of padding for the longest prompt;
        first: the number of the first prompt and of the first picture, to make one row of a batch alone."""
        videos = tuple(videos) or (0,) * len(images)
        pictures, clips = _number(images, first), _number(videos, first)
        prompts = []
        for row in range(len(images)):
            words = torch.Generator().manual_seed(7919 * seed + first + row)
            prompt = [1]
            for count, token in [(length(i), IMAGE) for i in pictures[row]] + [
                (video_length(i), VIDEO) for i in clips[row]
            ]:
                prompt += _words(2, words) + [*before] + [token] * count + [*after]
            prompts.append(prompt + _words(4, words))
        inputs = pad(prompts, pads, side)
        if extra:
            inputs.update(extra(inputs["input_ids"]))
        if any(images):
            inputs.update(draw(pictures, seed))
        if any(videos):
            inputs.update(film(clips, seed))
        return inputs

    return make_inputs


def squares(shape: Sequence[int], name: str = "pixel_values") -> Callable[[Grouped, int], Inputs]:
    """Pictures of one shape, stacked: (pictures, *shape)."""
    return lambda numbers, seed: {name: torch.stack([noise(shape, seed, i) for row in numbers for i in row])}


def pad(prompts: list[list[int]], pads: int, side: str) -> Inputs:
    length = max(map(len, prompts)) + pads
    ids = torch.full((len(prompts), length), PAD)
    mask = torch.zeros(len(prompts), length, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        place = slice(length - len(prompt), None) if side == "left" else slice(len(prompt))
        ids[row, place], mask[row, place] = torch.tensor(prompt), 1
    return {"input_ids": ids, "attention_mask": mask}


def _number(counts: Sequence[int], first: int) -> Grouped:
    numbers, next_one = [], first
    for count in counts:
        numbers.append(list(range(next_one, next_one + count)))
        next_one += count
    return numbers


def _words(count: int, generator: torch.Generator) -> list[int]:
    return torch.randint(TEXT.start, TEXT.stop, (count,), generator=generator).tolist()
