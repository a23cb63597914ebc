"""Codecs at a budget: sizes are those of the files, and the best setting is the best."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from vtc.evaluation.codecs import (
    CODECS,
    FACTORS,
    QUALITIES,
    SETTINGS,
    Coded,
    best,
    coded,
    scan_bytes,
    vp8_bytes,
)
from vtc.evaluation.image_metrics import psnr
from vtc.evaluation.scenes import scene

PICTURES = [scene("test", index).image for index in range(2)]
BUDGETS = (1, 8, 32, 64, 128, 300, 500, 1000, 3000)


@pytest.fixture(scope="module", params=CODECS)
def codec(request):
    return request.param


@pytest.fixture(scope="module")
def settings(codec):
    return [coded(picture, codec) for picture in PICTURES]


def encode(image, kind, **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def remade(image, codec, setting):
    """The file of a setting, and the picture in it at full size, by Pillow alone."""
    small = image.resize([max(1, round(setting.factor * side)) for side in image.size], Image.LANCZOS)
    if codec == "jpeg":
        options = {"quality": setting.quality, "subsampling": setting.subsampling, "optimize": True}
        data = encode(small, "JPEG", **options)
    else:
        data = encode(small, "WEBP", quality=setting.quality, method=6)
    return data, Image.open(io.BytesIO(data)).convert("RGB").resize(image.size, Image.BICUBIC)


def tensor(image):
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 255


@pytest.mark.parametrize("count", ["file", "payload"])
def test_best_is_in_the_budget_and_never_worse_with_more(settings, count):
    for some in settings:
        chosen = [best(some, budget, count) for budget in BUDGETS]
        for budget, one in zip(BUDGETS, chosen):
            if one is None:
                assert min(getattr(setting, count) for setting in some) > budget
            else:
                assert getattr(one, count) <= budget
                assert one.psnr == max(other.psnr for other in some if getattr(other, count) <= budget)
        reached = [-1.0 if one is None else one.psnr for one in chosen]
        assert reached == sorted(reached)
        assert chosen[0] is None and chosen[-1] is not None


def test_files_are_as_told(codec, settings):
    for picture, some in zip(PICTURES, settings):
        for setting in some[:: len(some) // 12]:
            data, decoded = remade(picture, codec, setting)
            assert len(data) == setting.file
            assert float(psnr(tensor(decoded), tensor(picture))) == pytest.approx(setting.psnr, abs=1e-3)


def test_every_setting_is_tried(codec, settings):
    assert all(len(some) == SETTINGS[codec] for some in settings)
    for field, values in {"factor": FACTORS, "quality": QUALITIES}.items():
        assert {getattr(setting, field) for setting in settings[0]} == set(values)


def test_a_limit_leaves_out_larger_payloads_only(codec, settings):
    limit = 200
    found = coded(PICTURES[0], codec, limit)
    assert found and all(setting.payload <= limit for setting in found)
    for budget in (64, 128, limit):
        one, other = best(found, budget, "payload"), best(settings[0], budget, "payload")
        assert (one and one.psnr) == (other and other.psnr)


def test_scan_is_what_the_decoder_is_left_with():
    """Headers end with SOS, and do not depend on pixels."""
    small = [picture.resize((32, 32)) for picture in PICTURES]
    files = [encode(picture, "JPEG", quality=30, optimize=False) for picture in small]
    headers = [data[: len(data) - 2 - scan_bytes(data)] for data in files]
    assert headers[0] == headers[1] and len(headers[0]) > 500
    assert all(data.endswith(b"\xff\xd9") for data in files)
    start = headers[0].rindex(b"\xff\xda")
    assert len(headers[0]) - start == 2 + 12  # SOS of three components: marker, then 6 + 2 * 3 bytes


def test_vp8_is_all_but_the_container():
    data = encode(PICTURES[0], "WEBP", quality=20, method=6)
    assert len(data) - 20 - vp8_bytes(data) in (0, 1)  # a chunk is padded to an even number of bytes
    with pytest.raises(ValueError, match="lossy"):
        vp8_bytes(encode(PICTURES[0], "WEBP", lossless=True))


def test_a_flat_picture_is_coded_perfectly_or_nearly(codec):
    flat = Image.new("RGB", (64, 64), (128, 128, 128))
    assert best(coded(flat, codec), 1000).psnr > 45


def test_odd_shapes_and_unknown_codecs():
    assert best(coded(Image.new("RGB", (37, 5), "red"), "webp", 400), 400, "payload") is not None
    with pytest.raises(ValueError, match="jpeg, webp"):
        coded(PICTURES[0], "gif")
    assert best([], 100) is None
    assert best([Coded(10, 5, 20.0, 1, 1.0)], 7) is None
    assert best([Coded(10, 5, 20.0, 1, 1.0)], 7, "payload").file == 10
