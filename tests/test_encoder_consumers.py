"""What reads the tokens of a compressed encoder: pooling heads, maps of features, hidden states, heads for
dense prediction."""

import pytest
import torch
from encoder_oracle import RULES, Ordered, Watch, bare, close, compressed, equal, shared, tensors
from tiny.encoders import ENCODERS, make, randomise
from torch import Tensor, nn

import vtc

TIMM = [name for name, spec in ENCODERS.items() if spec.library == "timm"]
OPEN_CLIP = [n for n, spec in ENCODERS.items() if spec.library == "open_clip" and "CLIP" not in n]
TRANSFORMERS = [n for n, spec in ENCODERS.items() if spec.library == "transformers"]
POOLED = [n for n, spec in ENCODERS.items() if spec.library != "transformers" or spec.pooled]
BUDGET = {"keep": 0.4, "schedule": "staged"}


def pooled(spec, output) -> list[Tensor]:
    return [output[name] for name in spec.pooled] or tensors(output)


@torch.no_grad()
def rest_of_the_model(spec, model, pixels, tokens: Tensor):
    """What the bare model makes of these tokens (B, M, D) behind its last block."""

    def replaced(block, args, output):
        return (tokens, *output[1:]) if isinstance(output, tuple) else tokens

    hook = spec.blocks_of(model)[-1].register_forward_hook(replaced, prepend=True)
    try:
        return spec.call(model, pixels)
    finally:
        hook.remove()


def unmerged(spec, x: Tensor, records, block: int | None = None) -> Tensor:
    """Copies of x (B, prefix + K, D) for all patches of each picture, none of which was dropped."""
    rows = []
    for row, record in zip(x, records):
        source = record.source if block is None else record.blocks[block][1]
        assert int(source.min()) == 0
        rows.append(torch.cat([row[: spec.prefix], row[spec.prefix :][source]]))
    return torch.stack(rows)


class Kept(vtc.Select):
    name = "test-kept"
    stages = ("encoder",)

    def score(self, tokens):
        return tokens.x.float().norm(dim=-1)


# -- pooling heads


@pytest.mark.parametrize("host", POOLED)
def test_pooling_counts_a_merged_token_as_often_as_it_has_patches(host):
    """The head gives what it would give for un-merged copies."""
    spec, model = ENCODERS[host], shared(host)
    pixels = spec.images()
    for proportional in (True, False):
        method = Ordered()
        method.proportional = proportional
        output, watch, records = compressed(spec, model, pixels, method, **BUDGET)
        full = unmerged(spec, watch.left[-1], records)
        assert full.shape[1] == spec.prefix + spec.n > watch.left[-1].shape[1]
        expected = rest_of_the_model(spec, model, pixels, full)
        for found, wanted in zip(pooled(spec, output), pooled(spec, expected), strict=True):
            close(found, wanted)


@pytest.mark.parametrize("host", POOLED)
def test_pooling_of_pruned_tokens_is_pooling_of_those_kept(host):
    spec, model = ENCODERS[host], shared(host)
    pixels = spec.images()
    output, watch, _ = compressed(spec, model, pixels, Kept(), **BUDGET)
    expected = rest_of_the_model(spec, model, pixels, watch.left[-1])
    for found, wanted in zip(pooled(spec, output), pooled(spec, expected), strict=True):
        close(found, wanted)


def test_size_makes_a_difference_to_every_pool():
    """The test above can fail: without sizes these heads give something else."""
    for host in ("timm-avg", "timm-avg-all", "timm-siglip", "timm-map-cls", "timm-eva02", "timm-pe"):
        check_sizes_matter(host)
    for host in ("open_clip-avg", "open_clip-pooler", "SiglipVisionModel", "Siglip2VisionModel"):
        check_sizes_matter(host)
    for host in ("SiglipModel", "Dinov2ForImageClassification"):
        check_sizes_matter(host)


def check_sizes_matter(host):
    spec, model = ENCODERS[host], shared(host)
    pixels = spec.images()
    output, watch, _ = compressed(spec, model, pixels, Ordered(), **BUDGET)
    plain = rest_of_the_model(spec, model, pixels, watch.left[-1])
    for found, wanted in zip(pooled(spec, output), pooled(spec, plain), strict=True):
        assert not torch.allclose(found, wanted, atol=1e-3)


def test_average_pool_in_numbers():
    """Average pooling: each picture's patches have equal shares, whichever token they are in."""
    spec, model = ENCODERS["timm-avg"], shared("timm-avg")
    output, watch, records = compressed(spec, model, spec.images(), Ordered(), **BUDGET)
    means = []
    for x, record in zip(watch.left[-1][:, 1:], records):
        shares = torch.bincount(record.source, minlength=len(x)) / 24
        assert shares.sum() == 1 and shares.max() > 1 / 24
        means.append((shares[:, None] * x).sum(0))
    with torch.no_grad():
        close(output, model.head(model.fc_norm(torch.stack(means))))


@pytest.mark.parametrize("kind", ["avgmax", "max", "token", ""])
def test_other_pools_of_timm(kind):
    spec, model = ENCODERS["timm-avg"], make("timm-avg")
    model.reset_classifier(5, global_pool=kind)
    pixels = spec.images()
    if kind == "avgmax":  # tokens weighted for the average would be so for the maximum too
        with pytest.raises(RuntimeError, match="restore='unmerge'"):
            compressed(spec, model, pixels, Ordered(), **BUDGET)
        full, watch, _ = compressed(spec, model, pixels, Ordered(), restore="unmerge", **BUDGET)
        close(full, rest_of_the_model(spec, model, pixels, watch.left[-1]))
        return
    output, watch, records = compressed(spec, model, pixels, Ordered(), **BUDGET)
    tokens = unmerged(spec, watch.left[-1], records) if kind else watch.left[-1]
    close(output, rest_of_the_model(spec, model, pixels, tokens))


@torch.no_grad()
def test_forward_features_and_head_apart():
    """Callers of timm take the two steps of forward() by themselves."""
    for host in ("timm-avg", "timm-siglip", "timm-deit", "timm-eva02", "timm-distilled"):
        spec, model = ENCODERS[host], shared(host)
        with vtc.compress(model, Ordered(), **BUDGET):
            whole = model(spec.images())
            features = model.forward_features(spec.images())
            assert features.shape[1] < spec.prefix + spec.n
            assert torch.equal(model.forward_head(features), whole)


@torch.no_grad()
def test_open_clip_output_tokens():
    spec, model = ENCODERS["open_clip-avg"], make("open_clip-avg")
    model.output_tokens = True
    with vtc.compress(model, Ordered(), **BUDGET) as handle:
        output, tokens = model(spec.images())
        assert tokens.shape[1] == len(handle.last[0].index) < spec.n
        assert equal(output, compressed(spec, shared("open_clip-avg"), spec.images(), Ordered(), **BUDGET)[0])


@torch.no_grad()
@pytest.mark.parametrize("host", ["open_clip-CLIP", "open_clip-CustomTextCLIP", "CLIPModel", "SiglipModel"])
def test_image_and_text_together(host):
    """The text encoder of a two-tower model is left alone, and pictures are scored by the short encoder."""
    spec, model = ENCODERS[host], shared(host)
    pixels, text = spec.images(), torch.tensor([[3, 4, 5, 6, 7, 8, 9, 1], [9, 3, 5, 7, 7, 8, 8, 1]])

    def scores():
        if spec.library == "open_clip":
            image, words, *_ = model(pixels, text)
            return image, words
        output = model(pixel_values=pixels, input_ids=text)
        return output.image_embeds, output.text_embeds

    expected = scores()
    with vtc.compress(model, Ordered(), **BUDGET) as handle:
        found = scores()
        assert len(handle.last) == 2 and len(handle.last[0].index) < spec.n
        features = pooled(spec, spec.call(model, pixels))[0]
    close(found[0], nn.functional.normalize(features, dim=-1))
    assert torch.equal(found[1], expected[1]) and not torch.allclose(found[0], expected[0], atol=1e-3)


# -- maps of features


@torch.no_grad()
@pytest.mark.parametrize("restore", [None, "unmerge"])
@pytest.mark.parametrize("host", TIMM)
def test_timm_maps_have_all_patches(host, restore):
    spec, model = ENCODERS[host], shared(host)
    pixels, depth = spec.images(), len(spec.blocks_of(model))
    _, watch, records = compressed(spec, model, pixels, Ordered(), **BUDGET)
    full = [unmerged_as_of(spec, x, records, layer) for layer, x in enumerate(watch.left)]
    bare_maps = model.forward_intermediates(pixels, intermediates_only=True)
    with vtc.compress(model, Ordered(), restore=restore, **BUDGET):
        maps = model.forward_intermediates(pixels, intermediates_only=True)
        assert [m.shape for m in maps] == [m.shape for m in bare_maps] == [(2, 32, *spec.grid)] * depth
        for found, x in zip(maps, full):
            close(found.flatten(2).transpose(1, 2), x[:, spec.prefix :])

        normed = model.forward_intermediates(pixels, indices=[1, depth - 1], norm=True, output_fmt="NLC")[1]
        for found, layer in zip(normed, (1, depth - 1), strict=True):
            close(found, model.norm(full[layer])[:, spec.prefix :])

        (early,) = model.forward_intermediates(pixels, indices=[1], stop_early=True, intermediates_only=True)
        close(early, maps[1])
        if spec.prefix:
            both = model.forward_intermediates(pixels, return_prefix_tokens=True, intermediates_only=True)
            for (found, prefix), m, x in zip(both, maps, full):
                close(found, m)
                close(prefix, x[:, : spec.prefix])
        if hasattr(model, "get_intermediate_layers"):
            last = model.get_intermediate_layers(pixels, n=2, reshape=True)
            assert equal(list(last), maps[-2:])
            flat = model.get_intermediate_layers(pixels, n=[0, 2])
            for found, layer in zip(flat, (0, 2)):
                close(found, full[layer][:, spec.prefix :])
        # and the ordinary call right behind it is what it was
        short = compressed_tokens(spec, model, pixels)
        assert short.shape[1] == spec.prefix + (len(records[0].index) if restore is None else spec.n)


def compressed_tokens(spec, model, pixels):
    with Watch(spec, model) as watch:
        spec.call(model, pixels)
    return watch.left[-1]


def unmerged_as_of(spec, x, records, layer):
    """All patches behind one block, which may not have reduced any itself."""
    done = [block for block in records[0].blocks if block <= layer]
    return unmerged(spec, x, records, max(done)) if done else x


@torch.no_grad()
@pytest.mark.parametrize("host", OPEN_CLIP)
def test_open_clip_maps_have_all_patches(host):
    spec, model = ENCODERS[host], shared(host)
    pixels = spec.images()
    output, watch, records = compressed(spec, model, pixels, Ordered(), **BUDGET)
    full = [unmerged_as_of(spec, x, records, layer) for layer, x in enumerate(watch.left)]
    with vtc.compress(model, Ordered(), **BUDGET):
        found = model.forward_intermediates(pixels, output_extra_tokens=True)
        for maps, prefix, x in zip(
            found["image_intermediates"], found["image_intermediates_prefix"], full, strict=True
        ):
            assert maps.shape == (2, 32, *spec.grid)
            close(maps.flatten(2).transpose(1, 2), x[:, 1:])
            close(prefix, x[:, :1])
        close(found["image_features"], output)


@torch.no_grad()
def test_maps_of_an_encoder_that_drops_tokens():
    """A dropped token shows its last state: what it was just before it was dropped."""
    spec, model = ENCODERS["timm-deit"], shared("timm-deit")
    pixels = spec.images()
    norm2 = spec.blocks_of(model)[1].norm2
    inputs = []
    hook = norm2.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    model(pixels)
    hook.remove()
    before = inputs[0][:, 1:]  # in front of the reduction, which is the first
    with vtc.compress(model, Kept(), keep={1: 0.5}) as handle:
        maps = model.forward_intermediates(pixels, output_fmt="NLC", intermediates_only=True)
        for row, record in enumerate(handle.last):
            gone = record.source < 0
            assert int(gone.sum()) == 12
            for found in maps[1:]:
                close(found[row, gone], before[row, gone])
                assert not torch.allclose(found[row, ~gone], before[row, ~gone], atol=1e-2)


# -- hidden states


@torch.no_grad()
@pytest.mark.parametrize("host", TRANSFORMERS)
def test_hidden_states(host):
    """Without restore they are as short as the blocks left them, with it they have all patches."""
    spec, model = ENCODERS[host], make(host)
    if host in ("CLIPModel", "SiglipModel"):  # only their encoders give hidden states
        spec, model = ENCODERS[host.replace("Model", "VisionModel")], model.vision_model
    pixels, depth = spec.images(), len(spec.blocks_of(model))
    for _ in range(2):  # transformers installs hooks of its own when it is first asked, which then stay
        for restore in (None, "unmerge"):
            with (
                vtc.compress(model, Ordered(), restore=restore, **BUDGET) as handle,
                Watch(spec, model) as watch,
            ):
                states = spec.call(model, pixels, output_hidden_states=True).hidden_states
            k = len(handle.last[0].index)
            assert len(states) == depth + 1 and k < spec.n
            assert states[0].shape[1] == spec.prefix + spec.n
            assert states[-1].shape[1] == spec.prefix + (k if restore is None else spec.n)
            for state, left in zip(states[1:-1], watch.left):  # the last one may be normed
                assert torch.equal(state, left)
        full = spec.call(model, pixels, output_hidden_states=True).hidden_states
        assert all(state.shape[1] == spec.prefix + spec.n for state in full)


@torch.no_grad()
@pytest.mark.parametrize("restore", [None, "unmerge"])
@pytest.mark.parametrize("name", ["Dinov2Backbone", "DINOv3ViTBackbone"])
def test_backbones_give_full_maps(name, restore):
    """Backbones of detectors make maps, for which all patches are shown in any case."""
    import transformers

    config = getattr(transformers, name.replace("Backbone", "Config"))(
        hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4, image_size=32,
        patch_size=8, mlp_ratio=2, out_features=["stage2", "stage4"],
    )  # fmt: skip
    model = randomise(getattr(transformers, name)(config))
    pixels = torch.randn(2, 3, 32, 48)
    expected = model(pixels).feature_maps
    with vtc.compress(model, Ordered(), restore=restore, **BUDGET) as handle:
        maps = model(pixels).feature_maps
        assert [m.shape for m in maps] == [m.shape for m in expected] == [(2, 32, 4, 6)] * 2
        assert len(handle.last) == 2 and not torch.allclose(maps[1], expected[1], atol=1e-3)
    assert equal(list(model(pixels).feature_maps), list(expected))


# -- dense prediction


class Segmenter(nn.Module):
    """A linear head on the patch tokens of an encoder, as in semantic segmentation with DINOv2."""

    def __init__(self, spec, encoder):
        super().__init__()
        self.spec, self.encoder, self.head = spec, encoder, nn.Conv2d(32, 3, 1)

    def forward(self, pixels):
        if self.spec.library == "timm":
            x = self.encoder.forward_features(pixels)
        else:
            x = self.spec.call(self.encoder, pixels).last_hidden_state
        maps = x[:, self.spec.prefix :].transpose(1, 2).unflatten(2, self.spec.grid)  # (B, 32, rows, cols)
        return self.head(maps)


@torch.no_grad()
@pytest.mark.parametrize("method", ["test-pairs", "test-behind", "test-soft", "kept"])
@pytest.mark.parametrize(
    "host",
    ["timm-dinov2", "timm-dinov3", "timm-siglip", "Dinov2Model", "DINOv3ViTModel", "SiglipVisionModel"],
)
def test_a_segmentation_head_keeps_its_shape(host, method):
    spec, model = ENCODERS[host], shared(host)
    segment = Segmenter(spec, model)
    expected = segment(spec.images())
    rule = Kept() if method == "kept" else RULES[method]()
    with vtc.compress(model, rule, keep=0.4, restore="unmerge") as handle:
        found = segment(spec.images())
        assert found.shape == expected.shape == (2, 3, *spec.grid)
        assert found.isfinite().all() and not torch.allclose(found, expected, atol=1e-3)
        for record, logits in zip(handle.last, found.flatten(2).transpose(1, 2)):
            if method in ("test-pairs", "test-behind"):  # members of one token are labelled alike
                for slot in range(len(record.index)):
                    members = logits[record.source == slot]
                    assert torch.equal(members, members[:1].expand_as(members))
            assert len(record.index) == round(0.4 * spec.n)


@torch.no_grad()
def test_unmerged_outputs_are_the_heads_over_all_patches():
    """With restore, a head pools all patches; what it gives is what it gives without, for merges."""
    for host in ("timm-avg", "timm-siglip", "open_clip-avg", "open_clip-pooler", "SiglipVisionModel"):
        check_restored_pool(host)
    check_restored_pool("Dinov2ForImageClassification")


def check_restored_pool(host):
    spec, model = ENCODERS[host], shared(host)
    pixels = spec.images()
    short = compressed(spec, model, pixels, Ordered(), **BUDGET)[0]
    full, watch, _ = compressed(spec, model, pixels, Ordered(), restore="unmerge", **BUDGET)
    assert watch.left[-1].shape[1] == spec.prefix + spec.n
    for found, wanted in zip(pooled(spec, full), pooled(spec, short), strict=True):
        close(found, wanted)
    again, _ = bare(spec, model, pixels)
    assert not torch.allclose(pooled(spec, again)[0], pooled(spec, full)[0], atol=1e-3)


@torch.no_grad()
def test_timm_feature_pyramids():
    """timm's `features_only=True` wraps an encoder and asks it for maps."""
    import timm

    net = timm.create_model("test_vit", features_only=True, out_indices=(1, 4)).eval()
    randomise(net)
    pixels = torch.randn(2, 3, 160, 160)
    expected = net(pixels)
    with vtc.compress(net.model, Ordered(), keep=0.3) as handle:
        maps = net(pixels)
        assert [m.shape for m in maps] == [m.shape for m in expected] == [(2, 64, 10, 10)] * 2
        source = handle.last[0].blocks[4][1]
        patches = maps[1][0].flatten(1).T  # (N, 64)
        for slot in range(int(source.max()) + 1):
            members = patches[source == slot]
            assert torch.equal(members, members[:1].expand_as(members))
    assert equal(list(net(pixels)), list(expected))
