"""What blocks of an encoder merged or dropped lies where the encoder looked, block by block."""

import numpy as np
import pytest
import torch
from PIL import Image
from small import REFERENCE
from timm.data import create_transform
from tiny.encoders import ENCODERS, make
from torchvision import transforms
from torchvision.transforms import v2
from transformers import CLIPImageProcessor, SiglipImageProcessor

import vtc
from vtc import cli
from vtc.draw import GAP, INK, draw
from vtc.evaluation.scenes import scene
from vtc.record import Record, Tile
from vtc.views import after, join, views

GRID = (4, 6)
RED, GREEN = (200, 0, 0), (0, 200, 0)
SIZE = {"height": 32, "width": 32}


def state(labels, n=24):
    """(index, source) of groups that are called as they like, -1 for dropped."""
    names = [name for name in dict.fromkeys(labels) if name != -1]
    source = torch.tensor([names.index(name) if name != -1 else -1 for name in labels])
    return torch.tensor([labels.index(name) for name in names]), source


def record(blocks, grid=GRID):
    """Of an encoder by itself, as its stage makes it."""
    n = grid[0] * grid[1]
    index, source = blocks[max(blocks)] if blocks else (torch.arange(n), torch.arange(n))
    entering = {"encoder": n, "out": len(index)}
    return Record(index, source, grid, [Tile(torch.arange(n), grid)], entering, blocks)


def noise(size=(96, 64), seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (*size[::-1], 3), dtype=np.uint8))


def scattered(k, seed=0, dropped=0):
    """k groups of a random partition of 24 patches, some of which are dropped."""
    draws = np.random.default_rng(seed)
    labels = [*range(k), *draws.integers(0, k, 24 - k - dropped), *[-1] * dropped]
    return state(draws.permutation(labels).tolist())


MANY = {b: scattered(24 - 3 * b, b) for b in range(1, 8)}  # 21, 18, ... 3 tokens leave blocks 1 to 7


def halves(image):
    image.paste(RED, (0, 0, image.width // 2, image.height))
    return image


# -- groups


@pytest.mark.parametrize("seed, dropped", [(0, 0), (1, 0), (2, 6)])
def test_groups_have_their_mean_colour_wherever_their_members_lie(seed, dropped):
    image, groups = noise(seed=seed), scattered(7, seed, dropped)
    picture = draw(image, record({2: groups}), block=2, caption=False)
    assert picture.size == (576, 384)
    drawn, seen = (
        np.asarray(pixels, dtype=float).reshape(4, 96, 6, 96, 3).swapaxes(1, 2).reshape(24, 96, 96, 3)
        for pixels in (picture, image.resize(picture.size, Image.LANCZOS))
    )
    inner = np.s_[:, 2:-2, 2:-2]  # without outlines and grid lines
    source = groups[1].numpy()
    for slot in range(7):
        members = source == slot
        mean = seen[members].mean(axis=(0, 1, 2))
        expected = seen[members] if members.sum() == 1 else 0.25 * seen[members] + 0.75 * mean
        np.testing.assert_allclose(drawn[members][inner], expected[inner], atol=1.01)
    faded = drawn[source == -1][inner]
    assert len(faded) == dropped and (np.ptp(faded, axis=-1) <= 1).all() and (faded > 190).all()


def test_outlines_run_where_groups_meet_and_nowhere_else():
    groups = scattered(7, 3, dropped=4)
    picture = np.asarray(draw(Image.new("RGB", (96, 64), RED), record({0: groups}), caption=False))
    members = torch.bincount(groups[1].clamp_min(0), minlength=7)
    cells = groups[1].reshape(GRID).tolist()
    met = set()
    for row in range(4):
        for col in range(5):
            a, b = cells[row][col], cells[row][col + 1]
            line = picture[row * 96 + 5 : row * 96 + 90, (col + 1) * 96]
            single = [slot >= 0 and members[slot] == 1 for slot in (a, b)]
            if a == b or all(single):
                met.add("same")
                assert not (line == 255).all() and not (line == INK).all()
            elif -1 in (a, b):
                met.add("dropped")
                assert (line == INK).all()
            else:
                met.add("groups")
                assert (line == 255).all()
    assert met == {"same", "dropped", "groups"}


# -- blocks


@pytest.mark.parametrize("block, taken", [(1, 1), (4, 4), (5, 4), (8, 8), (100, 8), (np.int64(5), 4)])
def test_a_block_shows_the_last_reduction_up_to_it(block, taken):
    blocks = {1: scattered(15, 1), 4: scattered(9, 4, 3), 8: scattered(4, 8, 5)}
    plain = record({0: blocks[taken]})
    for caption in (False, "the same"):
        how = {"caption": caption, "long_side": 200}
        assert draw(noise(), record(blocks), block=block, **how) == draw(noise(), plain, **how)
        assert draw(noise(), record(blocks), **how) == draw(noise(), record(blocks), block=8, **how)


def captions_of(monkeypatch):
    found = []
    monkeypatch.setattr(
        "PIL.ImageDraw.ImageDraw.multiline_text", lambda pen, xy, text, *a, **k: found.append(text)
    )
    return found


@pytest.mark.parametrize(
    "n, columns, rows", [(1, 1, 1), (3, 3, 1), (4, 4, 1), (5, 3, 2), (6, 3, 2), (7, 4, 2)]
)
def test_a_sheet_has_a_panel_for_each_block(n, columns, rows, monkeypatch):
    captions = captions_of(monkeypatch)
    made = record({b: MANY[b] for b in range(1, n + 1)})
    sheet = draw(noise(), made, block="all", long_side=192)
    assert captions == [
        *(f"block {b}: {24 - 3 * b} tokens" for b in range(1, n + 1)),
        f"{24 - 3 * n} of 24 tokens",
    ]
    bare = draw(noise(), made, block="all", long_side=192, caption=False)
    width, height = 96 + GAP, 64 + GAP
    assert bare.size == (columns * width - GAP, rows * height - GAP)
    assert sheet.height > bare.height
    for i in range(n):
        left, top = i % columns * width, i // columns * height
        panel = draw(noise(), made, block=i + 1, long_side=96, caption=False)
        assert bare.crop((left, top, left + 96, top + 64)) == panel


def test_of_many_blocks_a_sheet_shows_twelve_from_the_first_to_the_last(monkeypatch):
    captions = captions_of(monkeypatch)
    draw(noise(), record({b: scattered(24 - b // 2) for b in range(2, 40)}), block="all", long_side=96)
    shown = [int(caption.split()[1][:-1]) for caption in captions[:-1]]
    assert (len(shown), shown[0], shown[-1]) == (12, 2, 39)
    assert set(np.diff(shown)) == {3, 4}


def test_captions_count(monkeypatch):
    captions = captions_of(monkeypatch)
    model, spec = make("timm-deit"), ENCODERS["timm-deit"]
    for keep in (6, [12, -4, 1]):
        schedule = None if isinstance(keep, list) else "staged"
        with torch.no_grad(), vtc.compress(model, "tome", keep=keep, schedule=schedule) as handle:
            model(spec.images(1))
        draw(noise(), handle, block=2)
        draw(noise(), handle, block="all")
    assert captions == [
        "tome, keep 6  ·  block 2  ·  9 of 24 tokens",
        "block 1: 15 tokens", "block 2: 9 tokens", "block 3: 6 tokens", "tome, keep 6  ·  6 of 24 tokens",
        "tome, keep by block  ·  block 2  ·  1 of 24 tokens",
        "block 0: 12 tokens", "block 1: 8 tokens", "block 2: 1 token",
        "tome, keep by block  ·  1 of 24 tokens",
    ]  # fmt: skip


def test_several_pictures_have_a_sheet_each():
    model, spec = make("timm-deit"), ENCODERS["timm-deit"]
    with torch.no_grad(), vtc.compress(model, "atc", keep=0.3) as handle:
        model(spec.images(2))
    images = [noise(), noise(seed=1)]
    row = draw(images, handle, block="all", caption=False, long_side=192)
    width = (row.width - GAP) // 2
    for i in range(2):
        one = draw(images[i], handle.last[i], block="all", caption=False, long_side=192)
        assert row.crop((i * (width + GAP), 0, i * (width + GAP) + width, row.height)) == one


@pytest.mark.parametrize(
    "blocks, block, message",
    [
        ({}, 3, "no block of an encoder reduced tokens in this forward"),
        ({}, "all", "no block of an encoder reduced tokens in this forward"),
        ({4: MANY[4], 2: MANY[2]}, 1, "no block up to 1 reduced tokens, the first that did is block 2"),
        (MANY, -1, "no block up to -1"),
        (MANY, "6", "block must be the number of a block, 'all' or None, not '6'"),
        (MANY, True, "block must be the number"),
        (MANY, 2.0, "block must be the number"),
    ],
)
def test_blocks_that_cannot_be_drawn(blocks, block, message):
    with pytest.raises(ValueError, match=message):
        draw(noise(), record(blocks), block=block)


# -- where the encoder looked


def test_without_a_processor_the_encoder_saw_all_of_the_picture():
    image, everything = halves(Image.new("RGB", (200, 100), GREEN)), record({}, (2, 2))
    assert draw(image, everything, caption=False).size == (576, 288)
    assert draw(image, record({0: state([0, 0, 1, -1])}, (2, 2)), block=0, caption=False).size == (576, 288)


CENTRES = {
    "clip": CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=SIZE),
    "torchvision": transforms.Compose(
        [
            transforms.Resize(32),
            transforms.CenterCrop(32),
            transforms.ToTensor(),
            transforms.Normalize(0.5, 0.3),
        ]
    ),
    "v2": v2.Compose([v2.PILToTensor(), v2.Resize(32), v2.CenterCrop(32)]),
    "picture": transforms.Compose([transforms.Resize(32), transforms.CenterCrop(32)]),
    "timm": create_transform((3, 32, 32), crop_pct=1.0),
    "function": lambda image: CENTRES["clip"](images=[image], return_tensors="pt")["pixel_values"][0],
}


@pytest.mark.parametrize("name", CENTRES)
def test_a_transform_tells_where_the_encoder_looked(name):
    image = Image.new("RGB", (200, 100), GREEN)
    image.paste(RED, (50, 0, 150, 100))
    made = record({3: state([0, 1, 2, 2])}, (2, 2))
    for block in (3, None):
        picture = draw(image, made, processor=CENTRES[name], block=block, caption=False)
        assert abs(picture.width - picture.height) <= 4
        assert np.asarray(picture)[20:-20:40, 20:-20:40].reshape(-1, 3).tolist() == [list(RED)] * 196
    sheet = draw(image, made, processor=CENTRES[name], block="all", caption=False)
    assert abs(sheet.width - 288) <= 4 and abs(sheet.height - 288) <= 4


@pytest.mark.parametrize("share", [0.875, 0.9, 0.95])
@pytest.mark.parametrize("size", [(224, 224), (640, 480), (90, 333)])
def test_a_crop_of_a_few_per_cent_is_seen(share, size):
    (box,) = views(create_transform((3, 224, 224), crop_pct=share), size)
    short = min(size)
    expected = [(1 - share * short / side) / 2 for side in size]
    np.testing.assert_allclose(box, [*expected, *(1 - edge for edge in expected)], atol=0.006)


@pytest.mark.parametrize("size", [(224, 224), (640, 480), (90, 333)])
def test_what_stretches_a_picture_saw_all_of_it(size):
    assert views(SiglipImageProcessor(), size) == [(0.0, 0.0, 1.0, 1.0)]
    assert views(create_transform((3, 224, 224), crop_mode="squash", crop_pct=1.0), size) == [
        (0.0, 0.0, 1.0, 1.0)
    ]


# -- encoders of models with a prompt


def test_patches_of_a_model_that_makes_one_token_of_four():
    """Two tokens in a row and a newline token, of 2 x 4 patches."""
    kept = Record(
        torch.tensor([0, 2]), torch.tensor([0, -1, 1]), (1, 2), [Tile(torch.tensor([0, 1]), (1, 2))],
        blocks={5: state([0, 0, 1, 2, 3, 4, -1, -1])},
    )  # fmt: skip
    tile = after(kept, 5).tiles[0]
    assert tile.grid == (2, 4) and tile.slots.tolist() == list(range(8))
    picture = draw(noise((80, 40)), kept, block=5, caption=False)
    plain = record({0: kept.blocks[5]}, (2, 4))
    assert picture == draw(noise((80, 40)), plain, caption=False)
    kept.blocks = {5: state([0] * 6)}
    with pytest.raises(ValueError, match="6 patches cannot be laid on 2 places"):
        draw(noise(), kept, block=5)


def test_views_of_one_picture_are_drawn_together():
    """A model that takes the tiles of a picture for pictures of their own."""
    parts = [record({1: state([0, 0, 1, 2]), 2: state([0, 0, 0, 1])}, (2, 2)) for _ in range(2)]
    parts[1].blocks = {1: state([0, -1, 1, 1]), 3: state([0, -1, -1, -1])}
    whole = join(parts)
    assert {b: [part.tolist() for part in found] for b, found in whole.blocks.items()} == {
        1: [[0, 2, 3, 4, 6], [0, 0, 1, 2, 3, -1, 4, 4]]
    }
    assert [tile.slots.tolist() for tile in after(whole, 1).tiles] == [[0, 1, 2, 3], [4, 5, 6, 7]]


# -- the command


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    scene("test", 3).image.save("scene.png")

    def call(*arguments):
        code = cli.main(["draw", "scene.png", *arguments])
        return code, *capsys.readouterr()

    return call


def test_the_command_draws_what_an_encoder_merges(run, monkeypatch):
    captions = captions_of(monkeypatch)
    host = ["--host", str(REFERENCE.parent / "tiny-clip"), "--keep", "0.25", "-o"]
    assert run(*host, "all.png", "--method", "atc", "--block", "all") == (0, "all.png\n", "")
    assert run(*host, "three.png", "--block", "3") == (0, "three.png\n", "")
    assert captions == [
        "block 1: 90 tokens", "block 3: 57 tokens", "block 4: 36 tokens",
        "atc, keep 0.25  ·  36 of 144 tokens", "tome, keep 0.25  ·  block 3  ·  72 of 144 tokens",
    ]  # fmt: skip
    assert Image.open("all.png").width > 3 * 288


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--block", "all"], "no block of an encoder reduced tokens"),
        (["--host", "timm:no_such_model"], "timm has no model 'no_such_model'"),
        (["--host", "x", "--model", "y"], "a --model that answers or a --host that classifies, not both"),
    ],
)
def test_errors_of_the_command(run, arguments, message):
    code, _, err = run(*arguments)
    assert code == 2 and message in err
    with pytest.raises(SystemExit):
        run("--block", "some")
