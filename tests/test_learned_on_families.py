"""Modules with weights in other families: tiles, frames, grids of several components, memories, refusals."""

import inspect

import pytest
import torch
from tiny import HOSTS, build

import vtc
from vtc.hosts import open_host
from vtc.learned import build as build_module
from vtc.stages.fields import items, join

WIDTH = 32  # of the language models, and of most encoders
JOINED = {"internvl": 128, "nemotron_h_omni": 128, "vipllava": 96}  # what their projectors are given
BEFORE = ["llava-clip", "llava-clip-full", "vipllava", "llava_next-clip", "llava_onevision", "internvl"]
INSTEAD = [*BEFORE, "gemma3", "idefics3", "mistral3", "video_llama_3", "paligemma-gemma"]
BEHIND = [
    *BEFORE, "gemma3", "idefics3", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "granite_docling", "aria",
    "idefics2", "gemma4", "lfm2_vl", "molmo2", "video_llama_3", "hunyuan_vl", "emu3", "minicpmv4_6",
    "step3p7",
]  # fmt: skip
VIDEOS = ["llava_onevision", "llava_next_video", "qwen2_vl", "qwen3_vl", "video_llava", "video_llama_3"]


def made(name, width=WIDTH, **options):
    torch.manual_seed(0)
    sizes = {
        "ordered": {
            "in_width": width, "tokens": 64, "width": 32, "heads": 2, "decoder_width": 32, "decoder_heads": 2,
        },
        "mqt": {"in_width": width, "out_width": WIDTH, "queries": 64, "heads": 4},
        "m3": {"width": width},
        "learned-scorer": {"in_width": width},
        "tokenpacker": {
            "in_width": width, "out_width": WIDTH, "width": 32, "heads": 2, "layers": (0, 1, -1), "window": 1,
        },
    }  # fmt: skip
    module = build_module(name, **sizes[name] | options)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return module.eval()


class Seen:
    """What a model's own method made, and what its projector and its blocks saw meanwhile."""

    def __init__(self, model, inputs, video=False):
        self.vision = vision = open_host(model)
        name = "get_video_features" if video else "get_image_features"
        original, self.given, calls = getattr(vision.base, name), [], []

        def noting(*args, **kwargs):
            output = original(*args, **kwargs)
            calls.append((args, kwargs, output))
            return output

        hooks = []
        if vision.projector is not None:
            note = lambda module, args: args and self.given.append(args[0])  # noqa: E731
            hooks.append(vision.projector.register_forward_pre_hook(note))
        encoder = vision.video_encoder if video else vision.encoder
        self.states = {}
        for number, block in enumerate(encoder.blocks):
            hooks.append(block.register_forward_hook(lambda m, a, out, n=number: self._note(n, out)))
        setattr(vision.base, name, noting)
        with torch.no_grad():
            self.logits = model(**inputs).logits
        delattr(vision.base, name)
        for hook in hooks:
            hook.remove()
        args, kwargs, self.output = calls[0]
        bound = inspect.signature(original).bind(*args, **kwargs).arguments
        arguments = {**bound, **bound.pop("kwargs", {})}
        layout = vision.host.video if video else vision.host.layout
        self.layouts = layout(vision, arguments, items(self.output[vision.host.features]))

    def _note(self, number, out):
        self.states.setdefault(number, []).append(out[0] if isinstance(out, tuple) else out)


def features_of(model, inputs, video=False):
    """Those of all images of a forward (tokens, D), first columns first, as the compressed model has them."""
    vision = open_host(model)
    name, found = "get_video_features" if video else "get_image_features", []
    inner = getattr(vision.base, name)

    def noting(*args, **kwargs):
        found.append(inner(*args, **kwargs))
        return found[-1]

    before = vars(vision.base).get(name)
    setattr(vision.base, name, noting)
    try:
        with torch.no_grad():
            logits = model(**inputs).logits
    finally:
        delattr(vision.base, name)
        if before is not None:
            setattr(vision.base, name, before)
    tokens, width = join(found[0], vision.host.features, vision.host.deep)
    return tokens, width, logits


def check(model, module, inputs, keep, wanted, seen, video=False):
    """What is left of each tile is what the module makes of it: wanted(features, tile, patches, k)."""
    with vtc.compress(model, module, keep=keep) as handle:
        found, width, logits = features_of(model, inputs, video)
        records = handle.last
    assert logits.isfinite().all() and logits.shape == seen.logits.shape
    host = seen.vision.host
    full, _ = join(seen.output, host.features, host.deep)
    start = 0
    for layout, record in zip(seen.layouts, records, strict=True):
        own, new = (x[start : start + layout.length] for x in (full, found))
        kept = ~new[:, 0].isnan()
        assert kept.nonzero()[:, 0].tolist() == record.index.tolist()
        for number, tile in enumerate(layout.tiles):
            left = new[tile.slots][kept[tile.slots]]
            patches = None if layout.patches is None else layout.patches[number]
            expected = wanted(own[tile.slots, :width], tile, patches, len(left))
            torch.testing.assert_close(left[:, :width], expected, atol=2e-4, rtol=1e-4)
            assert left.shape[1] == own.shape[1]
        start += layout.length
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, seen.logits)
    return records


def given_of(seen, tile, patches):
    """What the projector was given for the tokens of a tile, the mean over patches of each: (1, n, D')."""
    vision = seen.vision
    rows = [x[:, x.shape[1] - 16 :] if x.dim() == 3 and x.shape[1] == 17 else x for x in seen.given]
    flat = torch.cat([x.reshape(-1, x.shape[-1]) for x in rows])
    joined = any(own.shape[1] > 1 for layout in seen.layouts for own in layout.patches)
    if joined and len(flat) == sum(layout.length for layout in seen.layouts):  # joined before
        sizes = [layout.length for layout in seen.layouts]
        for layout, own in zip(seen.layouts, flat.split(sizes)):
            if any(tile is other for other in layout.tiles):
                return own[tile.slots][None]
    assert vision.projector is not None
    return flat[patches].mean(1)[None]


@pytest.mark.parametrize("name", BEFORE)
@pytest.mark.parametrize("kind, keep", [("ordered", None), ("ordered", 3), ("learned-scorer", 0.25)])
def test_in_front_of_a_projector(name, kind, keep):
    model, make_inputs = build(name)
    inputs = make_inputs((2, 1), pads=2)
    seen, module = Seen(model, inputs), made(kind, JOINED.get(name, WIDTH))

    def wanted(x, tile, patches, k):
        with torch.no_grad():
            if not k:
                return x[:0]
            return seen.vision.projector(module(given_of(seen, tile, patches), tile.grid, k))[0]

    if name == "llava_onevision":  # blends tokens of large pictures behind its projector
        inputs = make_inputs((1,), first=1)
        seen = Seen(model, inputs)
    records = check(model, module, inputs, keep, wanted, seen)
    if keep == 3:
        assert all(len(record.index) == 3 for record in records)


@pytest.mark.parametrize("name", INSTEAD)
@pytest.mark.parametrize("kind, keep", [("mqt", 3), ("mqt", None), ("tokenpacker", None)])
def test_in_the_place_of_a_projector(name, kind, keep):
    if kind == "tokenpacker" and name in (
        "vipllava",
        "internvl",
    ):  # which give it several patches side by side
        kind = "mqt"
    model, make_inputs = build(name)
    inputs = make_inputs((2, 1), pads=1)
    seen, module = Seen(model, inputs), made(kind, JOINED.get(name, WIDTH))
    encoder = seen.vision.encoder

    def level(layer, patches):
        number = layer % (len(encoder.blocks) + 1)
        if number == 0:  # what enters the first block
            return entering[patches].mean(1)[None]
        states = [x if x.dim() == 3 else x[None] for x in seen.states[number - 1]]
        flat = torch.cat([x[:, encoder.prefix : x.shape[1] - encoder.suffix].flatten(0, 1) for x in states])
        return flat[patches].mean(1)[None]

    entered = []
    hook = encoder.blocks[0].register_forward_pre_hook(
        lambda m, args, kwargs: entered.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
    )
    with torch.no_grad():
        model(**inputs)
    hook.remove()
    entered = [x if x.dim() == 3 else x[None] for x in entered]
    entering = torch.cat([x[:, encoder.prefix : x.shape[1] - encoder.suffix].flatten(0, 1) for x in entered])

    def wanted(x, tile, patches, k):
        with torch.no_grad():
            levels = [level(layer, patches) for layer in module.layers]
            return module(given_of(seen, tile, patches), tile.grid, k, levels)[0] if k else x[:0]

    check(model, module, inputs, keep, wanted, seen)


@pytest.mark.parametrize("name", BEHIND)
def test_behind_a_projector(name):
    model, make_inputs = build(name)
    inputs = make_inputs((2, 1))
    seen, module = Seen(model, inputs), made("m3")

    def smallest(x, tile, patches, k):
        with torch.no_grad():
            return module(x[None], tile.grid, module.counts_for(tile.grid)[0])[0]

    def all_of_them(x, tile, patches, k):
        return x

    check(model, module, inputs, None, all_of_them, seen)
    fixed = made("ordered", tokens=2)
    fixed.place = "behind"

    def first(x, tile, patches, k):
        with torch.no_grad():
            return fixed(x[None], tile.grid, 2)[0]

    check(model, fixed, inputs, None, first, seen)


@pytest.mark.parametrize("name", ["gemma3", "idefics3", "qwen2_vl", "qwen3_vl", "mistral3"])
def test_where_no_projector_works_token_by_token_it_is_behind(name):
    model, make_inputs = build(name)
    inputs = make_inputs((2, 1))
    seen, module = Seen(model, inputs), made("ordered")

    def wanted(x, tile, patches, k):
        with torch.no_grad():
            return module(x[None], tile.grid, k)[0]

    check(model, module, inputs, 4, wanted, seen)


@pytest.mark.parametrize("name", VIDEOS)
def test_frames_of_videos_are_rows(name):
    model, make_inputs = build(name)
    inputs = make_inputs((0, 0), videos=(1, 2))
    seen, module = Seen(model, inputs, video=True), made("ordered", tokens=2)
    module.place = "behind"

    def wanted(x, tile, patches, k):
        assert k == 2
        with torch.no_grad():
            return module(x[None], tile.grid, 2)[0]

    check(model, module, inputs, None, wanted, seen, video=True)


def test_deep_features_are_averages_around_the_places():
    """What early layers of the decoder are given beside the tokens of Qwen3-VL."""
    model, make_inputs = build("qwen3_vl")
    inputs = make_inputs((2, 1))
    seen, module = Seen(model, inputs), made("ordered")
    full, width = join(seen.output, seen.vision.host.features, seen.vision.host.deep)
    with vtc.compress(model, module, keep=3):
        found, _, _ = features_of(model, inputs)
    assert found.shape[1] > width
    start = 0
    for layout in seen.layouts:
        own, new = (x[start : start + layout.length, width:] for x in (full, found))
        (tile,) = layout.tiles
        kept = (~new[:, 0].isnan()).nonzero()[:, 0]
        places = torch.stack([torch.arange(len(own)) // tile.grid[1], torch.arange(len(own)) % tile.grid[1]])
        nearest = (places[:, :, None] - places[:, kept][:, None]).square().sum(0).argmin(1)  # (n,)
        wanted = torch.stack([own[nearest == slot].mean(0) for slot in range(3)])
        torch.testing.assert_close(new[kept], wanted, atol=1e-4, rtol=1e-4)
        start += layout.length


def test_deep_features_of_drawn_tokens_are_their_own():
    """In training as in use."""
    model, make_inputs = build("qwen3_vl")
    inputs = make_inputs((2, 1))
    seen, module = Seen(model, inputs), made("learned-scorer").train()
    full, width = join(seen.output, seen.vision.host.features, seen.vision.host.deep)
    vision = open_host(model)
    inner, found = vision.base.get_image_features, []
    with vtc.compress(model, module, keep=3):
        own = vision.base.get_image_features
        vision.base.get_image_features = lambda *args, **kw: found.append(own(*args, **kw)) or found[-1]
        model(**inputs)
        vision.base.get_image_features = own
    assert vision.base.get_image_features == inner
    new, _ = join(found[0], vision.host.features, vision.host.deep)
    kept = ~new[:, 0].isnan()
    assert kept.sum() == 9 and new.requires_grad
    torch.testing.assert_close(new[kept][:, width:], full[kept][:, width:])


def test_tiles_share_a_budget():
    model, make_inputs = build("llava_next-clip")
    inputs = make_inputs((1,))
    with vtc.compress(model, made("ordered"), keep=22) as handle, torch.no_grad():
        model(**inputs)
        (record,) = handle.last
        assert len(record.index) == 22
        shares = [sum(int(slot) in record.index for slot in tile.slots) for tile in record.tiles]
        assert min(shares) >= 1 and max(shares) > min(shares)
        handle.keep = None
        model(**inputs)
        assert len(handle.last[0].index) == len(record.source)  # newline tokens stay where all others do
    with pytest.raises(ValueError, match="no budget to share over tiles"):
        vtc.compress(model, made("ordered"), allocate="uniform")
    with (
        vtc.compress(model, made("m3"), keep=22),
        torch.no_grad(),
        pytest.raises(ValueError, match="m3 makes"),
    ):
        model(**inputs)


@pytest.mark.parametrize("name", ["llava_next-clip", "qwen2_vl", "gemma3", "internvl"])
def test_batches_are_their_rows_and_caches_change_nothing(name):
    model, make_inputs = build(name)
    module = made("ordered", JOINED.get(name, WIDTH))
    with vtc.compress(model, module, keep=3), torch.no_grad():
        together = model(**make_inputs((1, 1, 1), pads=2)).logits[:, -1]
        for row in range(3):
            alone = model(**make_inputs((1,), first=row)).logits[0, -1]
            torch.testing.assert_close(together[row], alone, atol=2e-4, rtol=1e-3)
        inputs = make_inputs((1, 1), pads=2)
        made_ = [
            model.generate(**inputs, max_new_tokens=3, do_sample=False, use_cache=cached)
            for cached in (True, False)
        ]
        assert torch.equal(*made_)


def test_positions_are_counted_anew_but_where_they_are_grids():
    for name, positions in {"llava-clip": "repack", "qwen2_vl": "keep", "mllama": "keep"}.items():
        model, _ = build(name)
        with vtc.compress(model, made("ordered"), keep=3) as handle:
            assert handle.plan[0][1]["positions"] == positions
    with pytest.raises(ValueError, match="positions='repack' is not defined on qwen2_vl"):
        vtc.compress(build("qwen2_vl")[0], made("ordered"), keep=3, positions="repack")


def test_a_memory_gets_shorter():
    model, make_inputs = build("mllama")
    inputs = make_inputs((1, 1))
    with torch.no_grad():
        bare = model(**inputs).logits
        with vtc.compress(model, made("ordered"), keep=3) as handle:
            short = model(**inputs).logits
            assert [len(record.index) for record in handle.last] == [3, 3]
            made_ = [
                model.generate(**inputs, max_new_tokens=3, do_sample=False, use_cache=cached)
                for cached in (True, False)
            ]
        assert torch.equal(*made_) and not torch.allclose(short, bare, atol=1e-3)
        assert torch.equal(model(**inputs).logits, bare)


def test_a_late_projector_is_given_the_modules_tokens():
    model, make_inputs = build("llama4")
    inputs = make_inputs((1,))
    seen, module = Seen(model, inputs), made("ordered")

    def wanted(x, tile, patches, k):
        with torch.no_grad():
            return module(x[None], tile.grid, k)[0]

    check(model, module, inputs, 4, wanted, seen)


REFUSED = [
    ("qwen2_vl", "mqt", {}, "takes the place of a projector .* which qwen2_vl has not: use a module of 32"),
    ("mllama", "mqt", {}, "which mllama has not"),
    ("llama4", "mqt", {}, "which llama4 has not"),
    ("qwen2_vl", "ordered", {"width": 48}, "reads 48 numbers .* is given 32: make it"),
    ("gemma3", "m3", {"width": 48}, "reads 48 numbers .* is given 32"),
    ("gemma3n", "tokenpacker", {}, r"reads the layers \(0, 1, -1\) .* gemma3n has 0 blocks"),
]


@pytest.mark.parametrize("name, kind, how, message", REFUSED)
def test_hosts_that_do_not_take_one(name, kind, how, message):
    model, _ = build(name)
    with pytest.raises(ValueError, match=message):
        vtc.compress(model, made(kind, **how))
    assert vtc.api.current(model) is None


@pytest.mark.parametrize("name, kind", [("idefics2", "mqt"), ("gemma4", "mqt"), ("aria", "tokenpacker")])
def test_what_only_the_features_tell_is_told_in_one_sentence(name, kind):
    """The model works as before afterwards."""
    model, make_inputs = build(name)
    inputs = make_inputs((1,))
    with torch.no_grad():
        bare = model(**inputs).logits
        with vtc.compress(model, made(kind)), pytest.raises(ValueError, match=r"is not known|no patches"):
            model(**inputs)
        assert torch.equal(model(**inputs).logits, bare)


def test_every_host_of_the_lists_is_one_of_the_tests():
    assert {*BEFORE, *INSTEAD, *BEHIND, *VIDEOS} <= HOSTS.keys()
