"""Folders of pictures become shards of tokens, and pictures again, whatever is in them."""

import json
import os
import re
import shutil
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from tiny_tokenizers import TINY

from vtc import cli
from vtc.evaluation.scenes import scene
from vtc.tokenizers import (
    Complexity,
    Halting,
    MeanBudget,
    Oracle,
    TokenSequence,
    build,
    detokenize_folder,
    from_pretrained,
    get_tokenizer,
    list_tokenizers,
    load_images,
    policy_from,
    read_shard,
    read_tokens,
    shard_files,
    to_images,
    tokenize_folder,
)
from vtc.tokenizers.detokenize import png_names
from vtc.tokenizers.job import Job, Reading
from vtc.tokenizers.listing import rows

RED, WHITE, BLUE = (255, 0, 0), (255, 255, 255), (0, 0, 255)
SIDE = TINY["ordered"]["image_size"]
RAGGED = MeanBudget(3, Complexity("jpeg", (1, 3, 6)))  # whatever the weights


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """The folder of a tokenizer of that name, or of the ordered one with another bottleneck."""
    root = tmp_path_factory.mktemp("weights")

    def folder(name="ordered", bottleneck=None):
        path = root / f"{name}-{bottleneck}"
        if not path.is_dir():
            torch.manual_seed(0)
            options = TINY[name] | ({"bottleneck": bottleneck} if bottleneck else {})
            build(name, **options).save_pretrained(path)
        return path

    return folder


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    """Ten pictures in two folders, not in the order of their names."""
    root = tmp_path_factory.mktemp("scenes")
    for name in ("z", "a/9", "a/10", "a/b/c", "m", "k.tar", "ä ö/日本", "B", "b", "a/1"):
        path = root / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        scene("test", len(list(root.rglob("*.png")))).image.save(path)
    return root


@pytest.fixture
def tokenize(weights):
    def call(folder, out, policy=None, *, tokenizer=None, shard_size=3, batch_size=2, **options):
        options |= {"shard_size": shard_size, "batch_size": batch_size, "device": "cpu"}
        return tokenize_folder(folder, tokenizer or weights(), policy, out, **options)

    return call


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def names_of(folder):
    return [name for name, _, _ in read_tokens(folder)]


# -- pictures


def stripes():
    """Red, white and blue, each 10 pixels wide."""
    image = Image.new("RGB", (30, 10), WHITE)
    image.paste(RED, (0, 0, 10, 10))
    image.paste(BLUE, (20, 0, 30, 10))
    return image


def test_a_picture_becomes_a_square_in_three_ways(tmp_path):
    stripes().save(tmp_path / "stripes.png")
    crop = load_images(stripes(), 10)
    assert crop.shape == (1, 3, 10, 10) and crop.dtype == torch.float32 and bool((crop == 1).all())
    stretch = to_images(load_images([tmp_path / "stripes.png", stripes()], 30, fit="stretch"))[0]
    assert [stretch.getpixel((x, 29)) for x in (0, 15, 29)] == [RED, WHITE, BLUE]
    pad = to_images(load_images(str(tmp_path / "stripes.png"), 30, fit="pad"))[0]
    assert [pad.getpixel((x, 15)) for x in (0, 15, 29)] == [RED, WHITE, BLUE]
    assert {pad.getpixel((0, y)) for y in (0, 9, 20, 29)} == {WHITE}
    with pytest.raises(ValueError, match="crop, pad, stretch, not by 'squash'"):
        load_images(stripes(), 8, fit="squash")
    assert load_images([], 8).shape == (0, 3, 8, 8)


def test_pictures_that_fit_come_back_exactly_and_smaller_ones_are_smooth():
    noise = np.random.default_rng(0).integers(0, 256, (2, 12, 12, 3), dtype=np.uint8)
    again = to_images(load_images([Image.fromarray(one) for one in noise], 12))
    np.testing.assert_array_equal(np.stack([np.asarray(image) for image in again]), noise)
    board = Image.fromarray(np.indices((64, 64)).sum(0).astype(np.uint8) % 2 * 255)
    small = load_images(board, 8)[0, :, 1:-1, 1:-1]  # without the border, where a window is cut off
    torch.testing.assert_close(small, torch.full_like(small, 0.5), atol=0.02, rtol=0)
    with pytest.raises(ValueError, match=r"\(3, 8, 8\)"):
        to_images(torch.zeros(3, 8, 8))


def test_every_kind_of_picture_is_read(tmp_path, tokenize):
    folder = tmp_path / "in"
    folder.mkdir()
    half = Image.new("RGB", (20, 10), WHITE)
    half.paste(RED, (0, 0, 10, 10))
    for mode, suffix in (("L", "png"), ("1", "png"), ("LA", "png"), ("RGBA", "PNG"), ("CMYK", "jpg")):
        half.convert(mode).save(folder / f"{mode}.{suffix}")
    half.quantize(4).save(folder / "palette.png")
    Image.fromarray(np.full((10, 20), 40_000, np.uint16)).save(folder / "deep.png")
    Image.new("RGB", (8, 8), RED).save(
        folder / "moves.gif", save_all=True, append_images=[Image.new("RGB", (8, 8), BLUE)]
    )
    exif = Image.Exif()
    exif[0x0112] = 6
    half.save(folder / "turned.jpeg", exif=exif)
    half.save(folder / "half.webp")
    half.save(folder / "half.tif")
    half.save(folder / "half.bmp")
    made = tokenize(folder, tmp_path / "out", shard_size=100)
    assert made["images"] == 12 and made["unreadable"] == {}
    (file,) = shard_files(tmp_path / "out")
    sizes = dict(zip((shard := read_shard(file)).names, shard.sizes, strict=True))
    assert sizes["turned.jpeg"] == (10, 20) and sizes["moves.gif"] == (8, 8) and sizes["L.png"] == (20, 10)
    assert to_images(load_images(folder / "moves.gif", 8))[0].getpixel((4, 4)) == RED
    assert to_images(load_images(folder / "deep.png", 8))[0].getpixel((4, 4)) == (155, 155, 155)


def test_what_cannot_be_read_is_listed_with_a_reason(tmp_path, tokenize, scenes):
    folder = tmp_path / "in"
    (folder / "sub").mkdir(parents=True)
    shutil.copy(scenes / "z.png", folder / "good.png")
    (folder / "empty.png").touch()
    (folder / "sub" / "text.jpg").write_text("no picture")
    scene("test", 1).image.resize((200, 200)).save(folder / "whole.jpg")
    whole = (folder / "whole.jpg").read_bytes()
    (folder / "torn.jpg").write_bytes(whole[: len(whole) // 2])
    (folder / "notes.txt").write_text("not a picture by its suffix")
    (folder / ".hidden.png").write_text("nor this")
    with open(os.fsencode(folder) + b"/\xff.png", "wb") as odd:
        odd.write((folder / "good.png").read_bytes())
    made = tokenize(folder, tmp_path / "out", shard_size=2, batch_size=1)
    assert names_of(tmp_path / "out") == ["good.png", "whole.jpg"] and made["images"] == 2
    unreadable = {os.fsencode(name): reason for name, reason in made["unreadable"].items()}
    assert unreadable.keys() == {b"empty.png", b"sub/text.jpg", b"torn.jpg", b"\xff.png"}
    assert unreadable[b"empty.png"] == "the file is empty" and "truncated" in unreadable[b"torn.jpg"]
    assert unreadable[b"sub/text.jpg"] == "cannot identify image file 'text.jpg'"
    assert unreadable[b"\xff.png"] == "its name is not valid UTF-8"
    assert json.loads((tmp_path / "out" / "manifest.json").read_text()) == made
    assert len(detokenize_folder(tmp_path / "out", tmp_path / "back", device="cpu")) == 2


def test_a_folder_in_which_nothing_can_be_read_is_an_error(tmp_path, tokenize):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "empty.png").touch()
    for _ in range(2):
        with pytest.raises(ValueError, match=r"none of the 1 pictures .* empty.png: the file is empty"):
            tokenize(tmp_path / "in", tmp_path / "out")


def test_folders_are_read_in_order_each_once(tmp_path, tokenize, scenes):
    folder = tmp_path / "in"
    shutil.copytree(scenes, folder)
    (folder / "a" / "loop").symlink_to(folder)
    (tmp_path / "elsewhere").mkdir()
    shutil.copy(scenes / "z.png", tmp_path / "elsewhere" / "linked.png")
    (folder / "link").symlink_to(tmp_path / "elsewhere")
    (folder / "link.png").symlink_to(folder / "z.png")
    (folder / "dangling.png").symlink_to(folder / "nothing.png")
    out = folder / "a" / "tokens"  # within what is read
    tokenize(folder, out)
    expected = [path.relative_to(scenes).as_posix() for path in scenes.rglob("*.png")]
    assert names_of(out) == sorted([*expected, "link/linked.png", "link.png"])
    detokenize_folder(out, out / "pictures", device="cpu")
    before = content(out)
    tokenize(folder, out)  # what was made of them is not read
    assert content(out) == before


# -- tokens


@pytest.mark.parametrize("format", ["safetensors", "parquet"])
@pytest.mark.parametrize(
    "name, bottleneck", [("ordered", "fsq"), ("ordered", "vq"), ("ordered", "none"), ("karl", None)]
)
def test_shards_hold_what_the_tokenizer_gives(tmp_path, tokenize, weights, scenes, name, bottleneck, format):
    tokenizer = from_pretrained(weights(name, bottleneck))
    out, where = tmp_path / "out", weights(name, bottleneck)
    made = tokenize(scenes, out, RAGGED, tokenizer=where, format=format, dtype="float32")
    again = policy_from(made["policy"])
    seen = []
    for found, tokens, index in read_tokens(out):
        with torch.no_grad():
            expected = tokenizer.encode(load_images(scenes / found, tokenizer.config.image_size), again)
        assert len(tokens) == len(index) == int(expected.lengths[0])
        assert torch.equal(index, expected.index[0])
        if expected.ids is None:
            torch.testing.assert_close(tokens, expected.values[0])
        else:
            assert tokens.dtype == torch.int64 and torch.equal(tokens, expected.ids[0])
        seen.append(len(tokens))
    assert made["images"] == 10 == len(seen) and made["tokens"] == sum(seen)
    assert made["mean_length"] == pytest.approx(np.mean(seen)) and made["format"] == format
    assert made["lengths"] == {str(length): seen.count(length) for length in sorted(set(seen))}
    assert made["tokenizer"]["bits_per_token"] == tokenizer.bits_per_token
    files = shard_files(out)
    assert (
        [shard["images"] for shard in made["shards"]] == [3, 3, 3, 1] == [len(read_shard(f)) for f in files]
    )
    assert made["bytes"] == sum(file.stat().st_size for file in files)
    assert len(set(seen)) > 1 and made["mean_length"] <= 3


def test_the_format_of_a_shard(tmp_path, tokenize, scenes, weights):
    tokenize(scenes, tmp_path / "ids", 4)
    with safe_open(tmp_path / "ids" / "shard-000000.safetensors", "np") as shard:
        tensors = {name: shard.get_tensor(name) for name in shard.keys()}  # noqa: SIM118
        images = json.loads(shard.metadata()["images"])
    assert {name: (tensor.dtype.name, tensor.shape) for name, tensor in tensors.items()} == {
        "ids": ("uint16", (12,)), "offsets": ("int64", (4,)), "lengths": ("int32", (3,))
    }  # fmt: skip
    assert images["names"] == ["B.png", "a/1.png", "a/10.png"] and images["sizes"][0] == [96, 96]
    import pyarrow.parquet as parquet

    tokenize(scenes, tmp_path / "values", 2, tokenizer=weights("ordered", "none"), format="parquet")
    table = parquet.read_table(tmp_path / "values" / "shard-000000.parquet")
    assert table.column_names == ["name", "width", "height", "length", "values", "index"]
    assert str(table.schema.field("values").type).count("halffloat") == 1
    assert np.array(table["values"][1].as_py()).shape == (2, TINY["ordered"].get("dim", 12))


def test_a_tokenizer_in_bfloat16_goes_there_and_back(tmp_path, tokenize, scenes):
    torch.manual_seed(0)
    tokenizer = build("reptok", **TINY["reptok"]).bfloat16()
    assert tokenize(scenes, tmp_path / "out", tokenizer=tokenizer)["images"] == 10
    assert len(detokenize_folder(tmp_path / "out", tmp_path / "back", tokenizer, device="cpu")) == 10


def test_only_places_with_gaps_are_stored():
    """KARL's places are not 0, 1, 2, ... where it drops tokens from the middle."""
    tokenizer = build("ordered", **TINY["ordered"])
    job = Job(None, None, "safetensors", 2, "crop", np.dtype(np.uint16), 2, 1)
    ids = torch.tensor([[5, 6, 7], [8, 9, 0]])
    for index, stored in ((None, None), (torch.tensor([[0, 2, 5], [0, 1, -1]]), [0, 2, 5, 0, 1])):
        tokens = TokenSequence(torch.zeros(2, 3, 6), torch.tensor([3, 2]), ids, index)
        shard = job._shard(tokenizer, [Reading("a"), Reading("b")], [tokens], {})
        assert stored is None if shard.index is None else shard.index.tolist() == stored
        _, codes, places = shard[1]
        assert codes.tolist() == [8, 9] and places.tolist() == [0, 1]
        again = shard.sequence(tokenizer)
        assert torch.equal(again.ids, tokens.ids) and torch.equal(again.values[1, 2], torch.zeros(6))
        assert torch.equal(again.index, tokens.index) and torch.equal(again.lengths, tokens.lengths)
    with pytest.raises(IndexError, match="2 pictures"):
        shard[2]


# -- stopping and going on


def test_a_run_that_was_killed_ends_with_the_same_bytes(tmp_path, tokenize, scenes, monkeypatch):
    how = {"policy": MeanBudget(3, Halting()), "calibrate": 5}
    whole, out = tmp_path / "whole", tmp_path / "out"
    made = tokenize(scenes, whole, **how)
    write = Job.write

    def killed(job, tokenizer, names, n, *more):
        if n == 2:
            raise KeyboardInterrupt
        write(job, tokenizer, names, n, *more)

    monkeypatch.setattr(Job, "write", killed)
    with pytest.raises(KeyboardInterrupt):
        tokenize(scenes, out, **how)
    assert not json.loads((out / "manifest.json").read_text())["complete"]
    with pytest.raises(ValueError, match="not finished"):
        next(read_tokens(out))
    (out / ".shard-000002.safetensors.1.tmp").write_bytes(b"half")
    first = (out / "shard-000000.safetensors").stat().st_mtime_ns
    (out / "shard-000001.safetensors").write_bytes(b"torn by a full disk")
    again = []

    def noted(job, tokenizer, names, n, *more):
        again.append(n)
        write(job, tokenizer, names, n, *more)

    def calibrated_again(*_):
        raise AssertionError("a run that goes on uses the policy it was begun with")

    monkeypatch.setattr(Job, "write", noted)
    monkeypatch.setattr(MeanBudget, "calibrate", calibrated_again)
    assert tokenize(scenes, out, **how) == made
    assert again == [1, 2, 3] and content(out) == content(whole)
    assert (out / "shard-000000.safetensors").stat().st_mtime_ns == first
    assert made["policy"]["measured"] <= 3 and made["policy"]["policy"]["epsilon"] > 0
    assert made["policy_asked"]["measured"] is None and made["calibrate"] == 5
    assert tokenize(scenes, out, **how) == made and again == [1, 2, 3]  # nothing to do
    (out / "shard-000003.safetensors").unlink()
    tokenize(scenes, out, **how)
    assert again == [1, 2, 3, 3] and content(out) == content(whole)


@pytest.mark.parametrize("format", ["safetensors", "parquet"])
def test_batches_and_threads_change_nothing(tmp_path, tokenize, scenes, format):
    for n, (batch_size, workers) in enumerate([(1, 1), (2, 3), (100, 2)]):
        how = {"batch_size": batch_size, "workers": workers, "format": format, "shard_size": 4}
        tokenize(scenes, tmp_path / str(n), RAGGED, **how)
    assert len(json.loads((tmp_path / "0" / "manifest.json").read_text())["lengths"]) > 1
    assert content(tmp_path / "0") == content(tmp_path / "1") == content(tmp_path / "2")


def test_another_run_in_the_same_folder_is_an_error(tmp_path, tokenize, scenes, weights):
    folder, out = tmp_path / "in", tmp_path / "out"
    shutil.copytree(scenes, folder)
    tokenize(folder, out, 2)
    torch.manual_seed(1)
    build("ordered", **TINY["ordered"]).save_pretrained(tmp_path / "other")
    begun = re.escape(f"{out} was begun with ")
    for change, message in [
        ({"policy": 3}, "policy asked {name: fixed, k: 2}, not {name: fixed, k: 3}: give another output"),
        ({"shard_size": 4}, "shard size 3, not 4"),
        ({"format": "parquet"}, "format safetensors, not parquet"),
        ({"fit": "pad"}, "fit crop, not pad"),
        ({"tokenizer": weights("karl")}, "a 'ordered' tokenizer, not 'karl'"),
        ({"tokenizer": weights("ordered", "none")}, "a tokenizer with bottleneck='fsq', not 'none'"),
        ({"tokenizer": tmp_path / "other"}, "other weights of the tokenizer"),
    ]:
        with pytest.raises(ValueError, match=begun + re.escape(message)):
            tokenize(folder, out, **({"policy": 2} | change))
    (folder / "z.png").unlink()
    shutil.copy(folder / "b.png", folder / "new.png")
    with (folder / "m.png").open("ab") as grown:
        grown.write(b"more")
    message = "1 new (new.png), 1 gone (z.png), 1 of another size (m.png); give another output folder"
    with pytest.raises(ValueError, match=re.escape(message)):
        tokenize(folder, out, 2)
    made = tokenize(folder, out, 1, overwrite=True, shard_size=9, format="parquet")
    assert made["tokens"] == 10 and sorted(content(out)) == [
        "images.jsonl", "manifest.json", "shard-000000.parquet", "shard-000001.parquet"
    ]  # fmt: skip


def test_folders_of_others_are_left_alone(tmp_path, tokenize, scenes):
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.tex").write_text("precious")
    for overwrite in (False, True):
        with pytest.raises(ValueError, match=r"holds other files, such as thesis.tex"):
            tokenize(scenes, out, overwrite=overwrite)
    (out / "manifest.json").write_text('{"name": "a web application"}')
    with pytest.raises(ValueError, match="is no manifest of tokens"):
        tokenize(scenes, out, overwrite=True)
    assert sorted(content(out)) == ["manifest.json", "thesis.tex"]


def test_two_runs_at_once_are_an_error(tmp_path, tokenize, scenes, monkeypatch):
    write = Job.write

    def meanwhile(job, *more):
        monkeypatch.setattr(Job, "write", write)
        with pytest.raises(RuntimeError, match="another process is writing"):
            tokenize(scenes, tmp_path / "out")
        write(job, *more)

    monkeypatch.setattr(Job, "write", meanwhile)
    assert tokenize(scenes, tmp_path / "out")["images"] == 10


def test_a_policy_that_cannot_work_is_said_before_anything_is_written(tmp_path, tokenize, scenes, weights):
    with pytest.raises(ValueError, match="evaluation only"):
        tokenize(scenes, tmp_path / "out", Oracle(mean=3))
    with pytest.raises(ValueError, match="fixed:K"):
        tokenize(scenes, tmp_path / "out", "half")
    with pytest.raises(ValueError, match="not to 7"):
        tokenize(scenes, tmp_path / "out", 7)
    with pytest.raises(ValueError, match="no halting"):
        tokenize(scenes, tmp_path / "out", "halting", tokenizer=weights("titok"))
    assert tokenize(scenes, tmp_path / "out", "fixed:6") == tokenize(scenes, tmp_path / "out", 6)


def test_values_that_do_not_fit_are_an_error(tmp_path, tokenize, scenes):
    loud = build("ordered", **TINY["ordered"] | {"bottleneck": "none"})
    loud.to_latent.bias.data.fill_(1e6)
    with pytest.raises(ValueError, match="do not fit into float16: take dtype float32"):
        tokenize(scenes, tmp_path / "half", tokenizer=loud)
    made = tokenize(scenes, tmp_path / "full", tokenizer=loud, dtype="float32")
    assert made["dtype"] == "float32" and made["tokenizer"]["source"] is None


# -- and back


@pytest.mark.parametrize("name, bottleneck", [("ordered", "fsq"), ("ordered", "none"), ("karl", None)])
def test_detokenize_draws_what_the_tokenizer_decodes(tmp_path, tokenize, weights, scenes, name, bottleneck):
    tokenizer, out = from_pretrained(weights(name, bottleneck)), tmp_path / "out"
    made = tokenize(scenes, out, RAGGED, tokenizer=weights(name, bottleneck), dtype="float32")
    policy = policy_from(made["policy"])
    for length in (None, 1):
        folder = tmp_path / str(length)
        paths = detokenize_folder(out, folder, length=length, batch_size=2, device="cpu")
        assert sorted(paths) == sorted(folder / path.relative_to(scenes) for path in scenes.rglob("*.png"))
        for path in paths:
            image = load_images(scenes / path.relative_to(folder), tokenizer.config.image_size)
            with torch.no_grad():
                expected = tokenizer.decode(tokenizer.encode(image, policy), length)
            drawn = np.asarray(Image.open(path), dtype=int)
            assert abs(drawn - np.asarray(to_images(expected)[0], dtype=int)).max() <= 1


def test_names_that_become_alike_keep_their_suffix():
    names = ["a.jpg", "a.png", "b.jpeg", "c/a.gif", "c/a.bmp", "d.jpg", "d.png/e.jpg", "f.jpg", "f.jpg.webp"]
    found = png_names([*names, "f.png", "x.jpg.jpg", "x.jpg", "x.png"])
    assert found["a.jpg"] == "a.jpg.png" and found["a.png"] == "a.png.png" and found["b.jpeg"] == "b.png"
    assert found["c/a.gif"] == "c/a.gif.png" and found["c/a.bmp"] == "c/a.bmp.png"
    assert (
        found["d.jpg"] == "d-2.png" and found["d.png/e.jpg"] == "d.png/e.png"
    )  # a file beside a folder d.png
    assert len(set(found.values())) == len(found) == 13
    assert all(name.endswith(".png") for name in found.values())
    assert png_names(reversed(list(found))) == found


def test_a_name_that_leads_out_of_the_folder_is_refused(tmp_path, tokenize, scenes, monkeypatch):
    out, folder = tmp_path / "out", tmp_path / "deep" / "back"
    tokenize(scenes, out)
    from vtc.tokenizers import shards

    file = shard_files(out)[0]
    for name in ("../../out.png", str(tmp_path / "absolute.png"), "a/../../../x.png"):
        shard = read_shard(file)
        shard.names[0] = name
        shards.write_shard(shard, file)
        with pytest.raises(ValueError, match="leads out of"):
            detokenize_folder(out, folder, device="cpu")
        assert not folder.exists() and not list(tmp_path.glob("*.png"))


def test_detokenize_wants_the_tokenizer_that_made_the_tokens(tmp_path, tokenize, weights, scenes):
    moved = tmp_path / "moved"
    shutil.copytree(weights(), tmp_path / "first")
    tokenize(scenes, tmp_path / "out", 3, tokenizer=tmp_path / "first")
    (tmp_path / "first").rename(moved)
    with pytest.raises(OSError, match="say by --tokenizer where it is now"):
        detokenize_folder(tmp_path / "out", tmp_path / "back", device="cpu")
    with pytest.raises(ValueError, match="made by another tokenizer: a 'ordered'"):
        detokenize_folder(tmp_path / "out", tmp_path / "back", weights("karl"), device="cpu")
    with pytest.raises(ValueError, match="not to 9"):
        detokenize_folder(tmp_path / "out", tmp_path / "back", moved, length=9, device="cpu")
    assert len(detokenize_folder(tmp_path / "out", tmp_path / "back", moved, device="cpu")) == 10
    with pytest.raises(ValueError, match="holds files already"):
        detokenize_folder(tmp_path / "out", tmp_path / "back", moved, device="cpu")
    assert (
        len(detokenize_folder(tmp_path / "out", tmp_path / "back", moved, device="cpu", overwrite=True)) == 10
    )
    (tmp_path / "out" / "shard-000001.safetensors").write_bytes(b"torn")
    with pytest.raises(ValueError, match="damaged or no shard"):
        list(read_tokens(tmp_path / "out"))


# -- the commands


@pytest.fixture
def run(tmp_path, monkeypatch, capsys, scenes, weights):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(scenes, "pictures")
    shutil.copytree(weights(), "tokenizer")

    def call(*arguments):
        code = cli.main(list(arguments))
        return code, *capsys.readouterr()

    return call


def test_the_commands_go_there_and_back(run, tmp_path):
    (tmp_path / "pictures" / "bad.jpg").touch()
    how = ["tokenize", "pictures", "--tokenizer", "tokenizer", "-o", "tokens", "--device", "cpu"]
    code, out, err = run(*how, "--policy", "mean:3:halting", "--shard-size", "4")
    lines = out.splitlines()
    assert code == 0 and "vtc:" not in err
    assert re.match(r"10 pictures, [23](\.\d)? tokens of each, 15.97 bits per token", lines[0])
    assert lines[1].startswith("3 shards, ") and lines[2].startswith("1 could not be read")
    assert lines[3] == "tokens/manifest.json"
    assert json.loads((tmp_path / lines[3]).read_text())["tokenizer"]["source"] == "tokenizer"
    code, out, _ = run("detokenize", "tokens", "-o", "back", "--length", "1", "--device", "cpu")
    assert (code, out) == (0, "10 pictures in back\n")
    assert Image.open("back/ä ö/日本.png").size == (SIDE, SIDE)


def test_tokenizers_lists_the_registry(run):
    code, out, _ = run("tokenizers")
    rows = [re.split(r"  +", line) for line in out.split("\n\n")[0].splitlines()]
    assert code == 0 and [row[0] for row in rows[1:]] == list_tokenizers()
    ordered = next(row for row in rows if row[0] == "ordered")
    assert ordered[1:6] == ["1 to 64", "64000", "yes", "yes", "yes"]
    assert all(get_tokenizer(row[0]).weights == row[6] for row in rows[1:])


def test_the_list_needs_no_diffusers(monkeypatch):
    """Its import takes seconds, and warns of what else is installed."""
    monkeypatch.setitem(sys.modules, "diffusers", None)  # an import would raise
    listed = {row[0]: row[1:3] for row in rows()}
    assert listed["flextok"] == ("1 to 256", "64000") and listed["reptok"] == ("1", "continuous")


def test_help_shows_the_policies(run, capsys):
    with pytest.raises(SystemExit):
        run("tokenize", "--help")
    assert "mean:TOKENS:POLICY" in capsys.readouterr().out


def test_ctrl_c_leaves_what_can_be_continued(run, monkeypatch, tmp_path):
    how = ["tokenize", "pictures", "--tokenizer", "tokenizer", "--shard-size", "4", "--device", "cpu", "-o"]
    assert run(*how, "whole")[0] == 0
    encode, calls = Job._encode, []

    def interrupted(job, *more):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return encode(job, *more)

    monkeypatch.setattr(Job, "_encode", interrupted)
    code, _, err = run(*how, "tokens")
    assert code == 130 and "goes on" in err
    assert sorted(content(tmp_path / "tokens")) == [
        "images.jsonl",
        "manifest.json",
        "shard-000000.safetensors",
    ]
    assert run(*how, "tokens")[0] == 0
    assert content(tmp_path / "tokens") == content(tmp_path / "whole")


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["tokenize", "missing", "-o", "t"], "no folder missing"),
        (["tokenize", "empty", "-o", "t"], "empty and its sub-folders hold no pictures"),
        (["tokenize", "pictures", "-o", "pictures"], "cannot go into pictures itself"),
        (["tokenize", "pictures", "-o", "file"], "file: file exists"),
        (["tokenize", "pictures", "-o", "t", "--tokenizer", "titok"], "'titok' is a system, not the weights"),
        (["tokenize", "pictures", "-o", "t", "--tokenizer", "./gone"], "no folder or file ./gone"),
        (["tokenize", "pictures", "-o", "t", "--format", "zip"], "safetensors or parquet, not as 'zip'"),
        (["tokenize", "pictures", "-o", "t", "--dtype", "int8"], "float16 or float32, not as 'int8'"),
        (["tokenize", "pictures", "-o", "t", "--fit", "squash"], "not by 'squash'"),
        (["tokenize", "pictures", "-o", "t", "--shard-size", "0"], "shard_size is a number of 1 or more"),
        (["tokenize", "pictures", "-o", "t", "--device", "abacus"], "no device 'abacus'"),
        (["tokenize", "pictures", "-o", "t", "--policy", "some"], "no policy is written 'some'"),
        (["detokenize", "empty", "-o", "b"], "no tokens in empty"),
        (["detokenize", "missing", "-o", "b"], "no tokens in missing"),
    ],
)
def test_errors_are_one_sentence(run, tmp_path, arguments, message):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    if arguments[0] == "tokenize" and "--tokenizer" not in arguments:
        arguments = [*arguments, "--tokenizer", "tokenizer"]
    code, out, err = run(*arguments)
    assert (code, out) == (2, "") and err.startswith("vtc: error: ") and err.count("\n") == 1
    assert message in err and not (tmp_path / "t").exists()


@pytest.mark.parametrize(
    "library, extra, more", [("pyarrow", "parquet", ["--format", "parquet"]), ("ray", "ray", ["--ray"])]
)
def test_a_missing_library_is_named(run, monkeypatch, library, extra, more):
    monkeypatch.setitem(sys.modules, library, None)
    code, _, err = run("tokenize", "pictures", "--tokenizer", "tokenizer", "-o", "t", *more)
    assert code == 2 and f"vision-token-compression[{extra}]" in err
