"""The reference tokenizer that the repository ships does what its README says."""

import json
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch

from vtc.evaluation.ranks import rank_correlation
from vtc.evaluation.scenes import scene
from vtc.evaluation.textures import KINDS, texture
from vtc.tokenizers import Fixed, Halting, from_pretrained, load_images
from vtc.tokenizers.errors import mse, wrong

FOLDER = Path(__file__).parents[1] / "models" / "tiny-tokenizer"
N = 160


@cache
def tokenizer():
    return from_pretrained(FOLDER)


@cache
def pictures():
    return load_images([scene("test", i).image for i in range(N)], tokenizer().config.image_size)


def test_it_is_small_and_was_trained_within_an_hour():
    assert sum(file.stat().st_size for file in FOLDER.iterdir()) <= 10_000_000
    told = json.loads((FOLDER / "training.json").read_text())
    assert told["minutes"] <= 60


@torch.inference_mode()
@pytest.mark.parametrize("of", ["scenes", "textures"])
def test_more_tokens_leave_less_error_on_average(of):
    images = pictures()
    if of == "textures":
        images = load_images([texture("test", i) for i in range(10 * len(KINDS))], images.shape[-1])
    tokens = tokenizer().encode(images)
    errors = [float(mse(tokenizer().decode(tokens, k), images).mean()) for k in (1, 2, 4, 8, 16, 32, 64)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.35 * errors[0]


@torch.inference_mode()
def test_scenes_with_more_objects_get_more_tokens():
    lengths = tokenizer().encode(pictures(), Halting()).lengths.numpy()
    objects = np.array([len(scene("test", i).objects) for i in range(N)])
    assert rank_correlation(objects, lengths) >= 0.6
    means = [lengths[objects == n].mean() for n in (1, 2, 3, 4)]
    assert means == sorted(means)


@torch.inference_mode()
def test_choosing_lengths_leaves_fewer_wrong_pixels_than_one_length_for_all():
    images, t = pictures(), tokenizer()
    own = t.encode(images, Halting())
    mean = int(own.lengths.float().mean().ceil())
    chosen = wrong(t.decode(own), images).mean()
    assert chosen < wrong(t.decode(t.encode(images, Fixed(mean))), images).mean()
    dealt = own.lengths[torch.randperm(N, generator=torch.Generator().manual_seed(0))]
    assert chosen < wrong(t.decode(t.encode(images, dealt)), images).mean()


@torch.inference_mode()
def test_prefixes_and_batches_are_exact():
    images, t = pictures()[:8], tokenizer()
    ids = t.encode(images).ids
    for k in (1, 7, 40):
        assert torch.equal(t.encode(images, k).ids, ids[:, :k])
    assert torch.equal(torch.cat([t.encode(image[None]).ids for image in images]), ids)
