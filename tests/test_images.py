"""Any picture opens upright, in RGB, in a size that processors survive; anything else is one clear error."""

import io

import numpy as np
import pytest
from PIL import Image

from vtc.images import open_image

RED, WHITE = (255, 0, 0), (255, 255, 255)


def half_red(mode="RGB", size=(20, 10)):
    """Left half red, right half white."""
    image = Image.new("RGB", size, WHITE)
    image.paste(RED, (0, 0, size[0] // 2, size[1]))
    return image.convert(mode)


@pytest.mark.parametrize(
    "format, mode",
    [
        ("PNG", "RGB"),
        ("PNG", "P"),
        ("PNG", "RGBA"),
        ("JPEG", "RGB"),
        ("JPEG", "CMYK"),
        ("WEBP", "RGB"),
        ("WEBP", "RGBA"),
    ],
)
def test_formats_and_modes_keep_their_colours(format, mode, tmp_path):
    path = tmp_path / f"image.{format.lower()}"
    half_red(mode).save(path, format, quality=95)
    image = open_image(path)
    assert (image.mode, image.size) == ("RGB", (20, 10))
    np.testing.assert_allclose(image.getpixel((4, 5)), RED, atol=30)
    np.testing.assert_allclose(image.getpixel((16, 5)), WHITE, atol=30)


def test_exif_rotation_is_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rotate by 90 degrees clockwise to show
    half_red().save(tmp_path / "turned.jpg", quality=95, exif=exif)
    image = open_image(tmp_path / "turned.jpg")
    assert image.size == (10, 20)
    np.testing.assert_allclose(image.getpixel((5, 3)), RED, atol=30)


def test_transparency_is_laid_on_white():
    clear = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    half = Image.new("LA", (8, 8), (0, 127))
    palette = Image.new("P", (8, 8))
    palette.info["transparency"] = 0
    assert open_image(clear).getpixel((0, 0)) == WHITE
    assert open_image(half).getpixel((0, 0)) == (128, 128, 128)
    assert open_image(palette).getpixel((0, 0)) == WHITE


def test_sixteen_bits_are_scaled_not_clipped(tmp_path):
    grey = np.array([[0, 257, 32896, 65535]] * 4, dtype=np.uint16)
    Image.fromarray(grey).save(tmp_path / "deep.png")
    image = open_image(tmp_path / "deep.png")
    assert [image.getpixel((x, 0))[0] for x in range(4)] == [0, 1, 128, 255]


def test_greyscale_and_bilevel():
    assert open_image(Image.new("L", (9, 9), 77)).getpixel((0, 0)) == (77, 77, 77)
    assert open_image(Image.new("1", (9, 9), 1)).getpixel((0, 0)) == WHITE


@pytest.mark.parametrize(
    "size, expected",
    [
        ((1, 1), (4, 4)),
        ((1, 10_000), (128, 4096)),
        ((10_000, 1_000), (4096, 410)),
        ((100, 3), (100, 4)),
        ((33, 97), (33, 97)),
    ],
)
def test_extreme_sizes_are_bounded(size, expected):
    assert open_image(Image.new("RGB", size, RED)).size == expected


def test_strip_is_still_there_after_padding():
    image = open_image(Image.new("RGB", (1, 10_000), RED))
    assert (np.asarray(image) == RED).all(axis=2).any(axis=1).all()


@pytest.mark.parametrize("size", [(1, 1), (1, 10_000), (3, 200)])
def test_opened_extremes_pass_a_cropping_processor(size):
    from transformers import CLIPImageProcessor

    processor = CLIPImageProcessor(size={"shortest_edge": 96}, crop_size={"height": 96, "width": 96})
    pixels = processor(open_image(Image.new("RGB", size)), return_tensors="pt").pixel_values
    assert pixels.shape == (1, 3, 96, 96)


def test_truncated_file_is_one_sentence_naming_it(tmp_path):
    data = io.BytesIO()
    Image.effect_noise((64, 64), 80).save(data, "PNG")
    (tmp_path / "cut.png").write_bytes(data.getvalue()[:1000])
    with pytest.raises(ValueError, match=r"cut\.png.*damaged"):
        open_image(tmp_path / "cut.png")


def test_text_file_is_no_image(tmp_path):
    (tmp_path / "notes.png").write_text("not a picture")
    with pytest.raises(ValueError, match=r"notes\.png.*no image file"):
        open_image(tmp_path / "notes.png")


def test_missing_file_and_folder(tmp_path):
    for path in (tmp_path / "nowhere.jpg", tmp_path):
        with pytest.raises(ValueError, match="there is no image file"):
            open_image(path)
