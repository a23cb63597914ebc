"""Kept tokens show the image itself, dropped ones are grey, groups carry one colour and an outline."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import build
from transformers import CLIPImageProcessor, MllamaImageProcessor, SiglipImageProcessor

import vtc
from vtc.draw import INK, contact_sheet, draw
from vtc.record import Record, Tile

RED, BLUE, GREEN = (200, 0, 0), (0, 0, 200), (0, 200, 0)


def record(source, grid, tiles=()):
    source = torch.tensor(source)
    index = torch.tensor([int((source == slot).nonzero()[0]) for slot in range(int(source.max()) + 1)])
    return Record(index, source, grid, list(tiles) or [Tile(torch.arange(len(source)), grid)])


def cells(picture, grid):
    """The middle pixel of each token: (rows, cols, 3)."""
    pixels = np.asarray(picture).astype(int)
    rows, cols = (
        np.arange(n) * side // n + side // n // 2 for n, side in zip(grid, pixels.shape[:2], strict=True)
    )
    return pixels[np.ix_(rows, cols)]


def is_grey(colour):
    return np.ptp(colour) <= 1


def quartered(size=(96, 96)):
    image = Image.new("RGB", size, RED)
    image.paste(BLUE, (size[0] // 2, 0, size[0], size[1]))
    return image


def test_kept_tokens_keep_their_colour_and_dropped_ones_are_grey():
    picture = draw(Image.new("RGB", (96, 96), RED), record([0, -1, -1, 1], (2, 2)), caption=False)
    shown = cells(picture, (2, 2))
    assert tuple(shown[0, 0]) == tuple(shown[1, 1]) == RED
    assert is_grey(shown[0, 1]) and is_grey(shown[1, 0])


def test_small_images_are_enlarged_to_whole_pixels_per_token():
    picture = draw(Image.new("RGB", (96, 96)), record([0] + [-1] * 143, (12, 12)), caption=False)
    assert picture.size == (576, 576)
    assert draw(Image.new("RGB", (96, 96)), record([0] * 49, (7, 7)), caption=False).width % 7 == 0


def test_merged_group_is_tinted_with_its_mean_colour():
    shown = cells(draw(quartered(), record([0, 0, 1, 2], (2, 2)), caption=False), (2, 2))
    mean = np.add(RED, BLUE) / 2
    np.testing.assert_allclose(shown[0, 0], 0.25 * np.array(RED) + 0.75 * mean, atol=3)
    np.testing.assert_allclose(shown[0, 1], 0.25 * np.array(BLUE) + 0.75 * mean, atol=3)
    assert tuple(shown[1, 0]) == RED and tuple(shown[1, 1]) == BLUE


def test_outlines_run_along_the_borders_of_groups_only():
    picture = np.asarray(draw(Image.new("RGB", (96, 96), RED), record([0, 0, 1, 1], (2, 2)), caption=False))
    assert (picture[288, 4:-4] == 255).all()  # between the two groups
    assert not (picture[100, 4:-4] == 255).any()  # nothing between two members of one group


def test_kept_region_is_outlined_against_dropped_tokens():
    picture = np.asarray(
        draw(Image.new("RGB", (96, 96), RED), record([0, -1, -1, -1], (2, 2)), caption=False)
    )
    assert (picture[100, 288] == INK).all() and (picture[288, 100] == INK).all()


def test_centre_crop_shows_what_the_model_saw():
    image = Image.new("RGB", (200, 100), GREEN)
    image.paste(RED, (50, 0, 150, 100))
    everything = record([0, 1, 2, 3], (2, 2))
    cropped = draw(image, everything, caption=False)
    assert cropped.size == (576, 576)
    assert (cells(cropped, (2, 2)) == RED).all()
    cropping = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    assert draw(image, everything, processor=cropping, caption=False) == cropped
    whole = draw(image, everything, processor=SiglipImageProcessor(), caption=False)
    assert whole.size == (576, 288)
    assert np.asarray(whole)[10, 10].tolist() == list(GREEN)


def tiled():
    """A thumbnail of 2 x 2 tokens and two tiles of 2 x 2 side by side, a newline token after each row."""
    tiles = [
        Tile(torch.arange(4), (2, 2), thumbnail=True),
        Tile(torch.tensor([4, 5, 9, 10]), (2, 2), (0.0, 0.0, 0.5, 1.0)),
        Tile(torch.tensor([6, 7, 11, 12]), (2, 2), (0.5, 0.0, 1.0, 1.0)),
    ]
    source = [-1] * 14
    for slot, position in enumerate((3, 4, 7, 8, 13)):  # thumbnail, left tile, right tile, two newlines
        source[position] = slot
    return record(source, (2, 2), tiles)


def test_tiles_lie_in_their_place_and_the_thumbnail_beside_them():
    picture = draw(Image.new("RGB", (200, 100), RED), tiled(), caption=False)
    assert picture.size == (576 + 16 + 288, 288)
    grid = cells(picture.crop((0, 0, 576, 288)), (2, 4))
    kept = [[not is_grey(colour) for colour in row] for row in grid]
    assert kept == [[True, False, False, True], [False, False, False, False]]
    thumbnail = cells(picture.crop((592, 0, 880, 144)), (2, 2))
    assert [is_grey(colour) for colour in thumbnail.reshape(4, 3)] == [True, True, True, False]


def test_padding_that_a_tile_shows_is_drawn():
    """Mllama lays a picture into the corner of its canvas of tiles."""
    left, right = (Tile(torch.arange(4) + 4 * i, (2, 2), (i / 2, 0.0, i / 2 + 0.5, 1.0)) for i in range(2))
    canvas = MllamaImageProcessor(size={"height": 64, "width": 64}, max_image_tiles=2)
    everything = record(list(range(8)), (2, 2), [left, right])
    picture = draw(Image.new("RGB", (150, 100), RED), everything, processor=canvas, caption=False)
    assert (
        abs(picture.width - 2 * picture.height) < 6
    )  # of the canvas, three quarters of which the picture fills
    seen = (np.asarray(picture)[10, :, 0] > 150).mean()
    assert 0.72 < seen < 0.78


def test_several_images_make_a_row():
    whole = record([0, 1, 2, 3], (2, 2))
    one, two = (
        draw(quartered(), whole),
        draw([quartered(), quartered()], SimpleNamespace(last=[whole, whole], plan=[])),
    )
    assert (two.height, two.width) == (one.height, 2 * one.width - 16)


def test_caption_names_method_budget_and_counts(monkeypatch):
    captions = []
    monkeypatch.setattr(
        "PIL.ImageDraw.ImageDraw.multiline_text", lambda pen, xy, text, *a, **k: captions.append(text)
    )
    plan = [(SimpleNamespace(name="hiprune"), {"keep": 0.5, "stage": "features"})]
    draw(quartered(), SimpleNamespace(last=[record([0, -1, 1, -1], (2, 2))], plan=plan))
    draw(quartered(), record([0, -1, 1, -1], (2, 2)), caption="mine")
    assert captions == ["hiprune, keep 0.5  ·  2 of 4 tokens", "mine"]


def test_before_the_first_forward_it_says_what_to_do():
    with pytest.raises(ValueError, match="run the compressed model on the image once first"):
        draw(quartered(), SimpleNamespace(last=[], plan=[]))


def test_number_of_images_must_match():
    with pytest.raises(ValueError, match=r"2 image.* had 1"):
        draw([quartered(), quartered()], record([0], (1, 1)))


@pytest.mark.parametrize("size", [(1, 1), (2, 3000), (5000, 40)])
def test_extreme_images_can_be_drawn(size):
    picture = draw(Image.new("RGB", size), record([0] + [-1] * 143, (12, 12)))
    assert max(picture.size) < 1000


def test_contact_sheet_lays_out_rows_and_fits_captions():
    images = [Image.new("RGB", (50, 40), RED)] * 5
    plain = contact_sheet(images, columns=2)
    assert plain.size == (2 * 66 + 16, 3 * 56 + 16)
    long = contact_sheet(images, ["a caption much wider than its picture"] * 5, columns=2)
    assert long.width > plain.width and long.height > plain.height
    with pytest.raises(ValueError, match="5 pictures need as many captions"):
        contact_sheet(images, ["one"])


def test_a_video_is_drawn_frame_by_frame():
    frames = [Image.new("RGB", (96, 64), (40 * i, 90, 200 - 40 * i)) for i in range(4)]
    tiles = [Tile(torch.arange(6) + 6 * i, (2, 3)) for i in range(2)]
    source = torch.full((12,), -1)
    source[:6] = torch.arange(6)  # all of the first frame, nothing of the second
    record = Record(torch.arange(6), source, (2, 3), tiles)
    sheet = np.asarray(draw([frames], record, caption=False, long_side=192))
    assert sheet.shape[0] == 64 and sheet.shape[1] == 2 * 96 + 16
    first, second = sheet[:, :96].astype(int), sheet[:, -96:].astype(int)
    assert first[10, 10, 2] - first[10, 10, 0] > 100  # in colour
    assert np.ptp(second[10, 10]) < 10  # faded
    with pytest.raises(ValueError, match=r"2 frames, or tiles .* give a list"):
        draw(frames[0], record)
    with pytest.raises(ValueError, match="1 frames were given for a video of which the model saw 2"):
        draw([frames[:1]], record)


@pytest.mark.parametrize("name", ["idefics2", "aria", "deepseek_ocr2"])
def test_queries_of_a_resampler_are_not_drawn(name):
    """They have no places; maps of convolutional encoders have."""
    model, make_inputs = build(name)
    with torch.no_grad(), vtc.compress(model, "divprune", keep=0.5) as handle:
        model(**make_inputs((1,)))
    with pytest.raises(ValueError, match="queries of a resampler, which belong to no place"):
        draw(quartered(), handle)


@pytest.mark.parametrize("name", ["fast_vlm", "gemma3n", "emu3"])
def test_maps_without_attention_are_drawn(name):
    model, make_inputs = build(name)
    with torch.no_grad(), vtc.compress(model, "divprune", keep=0.5) as handle:
        model(**make_inputs((1,)))
    assert not handle.last[0].latent and handle.last[0].grid[0] > 1
    draw(quartered(), handle)
