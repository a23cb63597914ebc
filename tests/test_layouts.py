"""Geometry that the hosts of test_families.py do not reach: sizes of real models, unusual calls."""

import pytest
import torch
from decoder_oracle import Watch, shortened_rows
from tiny import IMAGE, SUPPRESS, build

import vtc
from vtc.hosts.raster import fitting_grid, patches_behind, squares

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("grid", "tokens"), [((27, 27), (14, 14)), ((24, 24), (9, 9)), ((7, 11), (5, 8)), ((54, 81), (38, 57))]
)
def test_interpolated_tokens_are_made_of_the_patches_behind_them(grid, tokens):
    """Patches that a token reads in torch's own bilinear interpolation, one picture for each patch."""
    n = grid[0] * grid[1]
    one_hot = torch.eye(n, dtype=torch.float64).view(n, 1, *grid)
    weights = torch.nn.functional.interpolate(one_hot, tokens, mode="bilinear").view(n, -1)  # (n, tokens)
    behind = patches_behind(grid, tokens, CPU)
    for token, patches in enumerate(behind):
        assert weights[:, token].gt(1e-9).nonzero()[:, 0].tolist() == patches.unique().tolist()


def test_pooled_tokens_are_squares_and_leave_the_edge_out():
    assert torch.equal(patches_behind((5, 5), (2, 2), CPU), squares((5, 5), 2, CPU))
    corners = squares((5, 5), 2, CPU)[:, 0]
    assert corners.tolist() == [0, 2, 10, 12]


def test_a_grid_has_the_proportions_of_its_picture():
    assert fitting_grid(16, (64, 64)) == (4, 4) and fitting_grid(12, (48, 32)) == (4, 3)
    assert fitting_grid(17, (64, 64)) is None and fitting_grid(0, (64, 64)) is None


def test_several_images_of_a_prompt_are_not_tiled():
    """LLaVA-OneVision's processor says how many images each prompt holds: only a single one is tiled."""
    model, make_inputs = build("llava_onevision")
    inputs = make_inputs((2,))
    pixels, sizes = inputs["pixel_values"], inputs["image_sizes"]
    ids = torch.tensor([[1, 5, *[IMAGE] * 10, 6, *[IMAGE] * 10, 7]])  # 3 x 3 patches and a newline
    call = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}
    with (
        torch.no_grad(),
        Watch(model) as watch,
        vtc.compress(model, "tome", keep=4, positions="keep") as handle,
    ):
        watch.listen()
        model(**call, image_sizes=sizes, batch_num_images=torch.tensor([2]))
        given, hidden = watch.given, watch.hidden
        assert [(len(record.index), len(record.source)) for record in handle.last] == [(4, 10)] * 2
        assert [record.tiles[0].grid for record in handle.last] == [(3, 3)] * 2
    (row,) = shortened_rows(model, call, given)
    torch.testing.assert_close(hidden[0, row.stay], row.hidden, atol=1e-4, rtol=1e-4)


def test_tiles_of_all_images_in_one_row():
    """As the model takes them, too: (tiles of all images, 3, H, W)."""
    model, make_inputs = build("llava_next-clip")
    inputs = make_inputs((1, 2))
    tiles = [5, 3, 3]  # of pictures 0, 1 and 2, thumbnails included
    rows = torch.cat([pixels[:count] for pixels, count in zip(inputs["pixel_values"], tiles)])
    kept = []
    with torch.no_grad(), vtc.compress(model, "random", keep=0.3) as handle:
        for pixels in (inputs["pixel_values"], rows):
            model(**{**inputs, "pixel_values": pixels})
            kept.append([record.index for record in handle.last])
    assert all(torch.equal(a, b) for a, b in zip(*kept, strict=True))


def test_text_may_stand_between_the_rows_of_an_image():
    """Pixtral's processor ends each row of patches with a token of its own."""
    model, make_inputs = build("llava-pixtral")
    picture = make_inputs((1,))
    ids = torch.tensor([[1, 5, *([IMAGE] * 4 + [95]) * 3, *[IMAGE] * 4, 96, 7, 8]])
    inputs = {**picture, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
    with torch.no_grad(), Watch(model) as watch, vtc.compress(model, "hiprune", keep=0.4, positions="keep"):
        watch.listen()
        model(**inputs)
        given, hidden = watch.given, watch.hidden
    (row,) = shortened_rows(model, inputs, given)
    assert int(row.stay.sum()) == ids.shape[1] - 16 + 6 and row.stay[ids[0] == 95].all()
    torch.testing.assert_close(hidden[0, row.stay], row.hidden, atol=1e-4, rtol=1e-4)


def test_pictures_of_one_size_need_no_sizes():
    """Pixtral's features are then one item for all pictures."""
    model, _ = build("llava-pixtral")
    pixels = torch.randn(2, 3, 32, 32)
    ids = torch.tensor([[1, 5, *[IMAGE] * 16, 96, 6, *[IMAGE] * 16, 96, 7]])
    kept = []
    with torch.no_grad(), vtc.compress(model, "hiprune", keep=5) as handle:
        for sizes in ({}, {"image_sizes": torch.tensor([[32, 32], [32, 32]])}):
            model(input_ids=ids, pixel_values=pixels, **sizes)
            kept.append([record.index for record in handle.last])
    assert [len(index) for index in kept[0]] == [5, 5]
    assert all(torch.equal(a, b) for a, b in zip(*kept, strict=True))


@pytest.mark.filterwarnings("ignore:.*pixel_values_images")
def test_the_old_name_of_pictures():
    """Video-LLaVA's processor still gives it."""
    model, make_inputs = build("video_llava")
    inputs = make_inputs((1,))
    old = {**inputs, "pixel_values_images": inputs["pixel_values"]}
    del old["pixel_values"]
    with torch.no_grad(), vtc.compress(model, "vtc-cls", keep=5) as handle:
        assert torch.equal(model(**old).logits, model(**inputs).logits)
        options = {"max_new_tokens": 3, "do_sample": False, "suppress_tokens": SUPPRESS}
        assert torch.equal(model.generate(**old, **options), model.generate(**inputs, **options))
        assert [len(record.index) for record in handle.last] == [5]


def test_a_tower_without_cls_is_told_apart():
    """VipLLaVA always cuts the first token off, which must be CLS."""
    model, make_inputs = build("vipllava")
    inputs = make_inputs((1,))
    model.model.vision_tower = build("llava-siglip")[0].model.vision_tower
    ids = inputs["input_ids"]
    first = int((ids == IMAGE).nonzero()[0, 1])
    ids = torch.cat([ids[:, :first], ids[:, first + 1 :]], dim=1)  # 15 features
    with vtc.compress(model, "divprune", keep=0.4), pytest.raises(ValueError, match="15 features for 4 x 4"):
        model(input_ids=ids, pixel_values=inputs["pixel_values"])
