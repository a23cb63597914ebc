"""Learning DiffRate's rates: what the masks compute, what their gradient is, and what is learned."""

import math
import warnings

import pytest
import torch
from encoder_oracle import tensors
from footprint import footprint
from tiny.encoders import ENCODERS, make

import vtc
from vtc.encoder_cost import operations
from vtc.hosts.trunk import open_trunk
from vtc.methods.diffrate import DiffRate
from vtc.schedule import counts
from vtc.training.rate_learner import Learner
from vtc.training.rates import learn_rates

# CLS, average and attention pools, registers, rotary positions, distillation, LayerScale
HOSTS = (
    "timm-deit", "timm-dinov2", "timm-distilled", "timm-avg", "timm-map-cls", "timm-eva02",
    "open_clip-scaled", "open_clip-avg", "CLIPVisionModel", "CLIPModel", "DINOv3ViTModel",
    "Dinov2ForImageClassification", "ViTForImageClassification", "DeiTForImageClassificationWithTeacher",
)  # fmt: skip


def pooled(spec, output):
    """What a head makes of the tokens, which has no place for masked ones."""
    return tensors([output[name] for name in spec.pooled]) if spec.pooled else tensors(output)


def opened(model, keep=0.5):
    return Learner(open_trunk(model), keep, "constant", 1)


def put(learner, pruned, merged):
    """Distributions that have nearly decided for these counts in the blocks after the first."""
    for pair, wanted in zip(learner.choices, zip(pruned, merged), strict=True):
        for choice, k in zip(pair, wanted):
            with torch.no_grad():
                choice.logits.fill_(0)[choice.n - k] = 16.0


@pytest.mark.parametrize("host", HOSTS)
def test_a_forward_with_masks_is_one_with_tokens_removed(host):
    spec, model = ENCODERS[host], make(host)
    pixels, n = spec.images(), spec.n
    learner = opened(model)
    with learner.installed():
        spec.call(model, pixels)
        blocks = len(learner.choices)
        pruned, merged = [n - 2, n - 5, 5][:blocks], [n - 4, n - 5, 3][:blocks]
        put(learner, pruned, merged)
        found = pooled(spec, spec.call(model, pixels))
        assert learner.pruned() == [n, *pruned] and learner.kept() == [n, *merged]
    with vtc.compress(model, DiffRate(learner.pruned()), keep=learner.kept()), torch.no_grad():
        expected = pooled(spec, spec.call(model, pixels))
    with torch.no_grad():
        bare = pooled(spec, spec.call(model, pixels))
    for a, b, c in zip(found, expected, bare, strict=True):
        torch.testing.assert_close(a, b, atol=2e-4, rtol=2e-3)
        assert (b - c).abs().max() > 0.01
    sum(a.square().sum() for a in found).backward()
    (prune, merge), (prune_only, _) = learner.choices[:2]
    for choice in (prune, merge, prune_only)[: 3 if blocks > 2 else 2]:  # behind the last, pools alone look
        assert choice.logits.grad.isfinite().all() and choice.logits.grad.abs().max() > 0


def card_forward(model, x, logits):
    """The card's training of one picture, block by block, sorted and masked with plain sums. logits: (prune,
    merge) of each block, over counts n, n - 1, ..., 1; None for the first."""
    x = model.patch_embed(x)
    x = model.norm_pre(model.patch_drop(model._pos_embed(x)))[0]
    total = len(x)
    mask, size = torch.ones(total), torch.ones(total)

    def count(logit):
        candidates = torch.arange(total - 1, 0, -1).float()
        return math.ceil(float((logit.detach().softmax(0) * candidates).sum()) - 1e-4) + 1

    def token_mask(logit, k, last):
        p = torch.zeros(total)
        for candidate, prob in zip(range(total - 1, 0, -1), logit.softmax(0)):
            p = p + prob * (torch.arange(total) < candidate + 1)
        hard = torch.ones(total)
        hard[k:last] = 0
        return hard - p.detach() + p

    for number, block in enumerate(model.blocks):
        y, heads = block.norm1(x), block.attn.num_heads
        q, k, v = block.attn.qkv(y).reshape(total, 3, heads, -1).permute(1, 2, 0, 3)
        weight = (q @ k.transpose(1, 2)) * block.attn.scale + size.log()
        policy = mask + (1 - mask) * torch.eye(total)
        weight = (weight - weight.amax(-1, keepdim=True).detach()).exp() * policy
        weight = weight / weight.sum(-1, keepdim=True)
        x = x + block.ls1(block.attn.proj((weight @ v).transpose(0, 1).reshape(total, -1)))
        if number:
            row = weight[:, 0].mean(0).detach().clone()
            row[0] = 2.0
            row[mask == 0] -= 1.0  # those removed have next to none in the official softmax
            order = sorted(range(total), key=lambda j: -float(row[j]))
            x, size, mask = x[order], size[order], mask[order]
            prune, merge = logits[number]
            last = int(mask.sum().round())
            pruned, kept = min(last, count(prune)), count(merge)
            if pruned < last:
                mask = mask * token_mask(prune, pruned, last)
            if kept < pruned:
                unit = torch.nn.functional.normalize(x.detach(), dim=-1)
                new, count_in, sizes = list(x), [1] * kept, list(size)
                for j in range(kept, pruned):
                    similarity = [float(unit[j] @ unit[i]) for i in range(1, kept)]
                    to = 1 + similarity.index(max(similarity))
                    new[to], count_in[to] = new[to] + x[j], count_in[to] + 1
                    sizes[to] = sizes[to] + size[j] * max(0.0, max(similarity))
                x = torch.stack([new[i] / count_in[i] if i < kept else new[i] for i in range(total)])
                size, mask = torch.stack(sizes), mask * token_mask(merge, kept, pruned)
        x = x + block.ls2(block.mlp(block.norm2(x)))
    return model.forward_head(model.norm(x)[None])


def test_output_and_gradients_are_those_of_the_card():
    model = make("timm-deit")
    pixels, n = ENCODERS["timm-deit"].images(1), 24
    learner = opened(model)
    with learner.installed():
        model(pixels)
        generator = torch.Generator().manual_seed(0)
        for pair, centres in zip(learner.choices, ((20, 16), (12, 8), (6, 6))):
            for choice, centre in zip(pair, centres):
                noise = 0.3 * torch.randn(n, generator=generator)
                with torch.no_grad():
                    choice.logits.copy_(noise - 0.15 * (choice.candidates - centre).square())
        found = model(pixels)
        found.square().sum().backward()
    left = learner.kept()
    pruned = learner.pruned()
    assert n > pruned[1] > left[1] > pruned[2] > left[2] > pruned[3] >= left[3]
    copies = [tuple(c.logits.detach().clone().requires_grad_() for c in pair) for pair in learner.choices]
    expected = card_forward(model, pixels, [None, *copies])
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-3)
    expected.square().sum().backward()
    for pair, copied in zip(learner.choices[:2], copies):  # nobody looks at patches behind the last block
        for choice, logits in zip(pair, copied):
            scale = logits.grad.abs().max()
            assert scale > 0
            torch.testing.assert_close(choice.logits.grad / scale, logits.grad / scale, atol=5e-3, rtol=0)


@pytest.mark.parametrize("host", ["timm-deit", "timm-eva02", "open_clip-scaled", "DINOv3ViTModel"])
def test_operations_are_what_torch_counts(host):
    spec, model = ENCODERS[host], make(host)
    learner = opened(model)
    with learner.installed():
        spec.call(model, spec.images())
    left = counts(
        [1.0, 0.8, 0.5, 0.3][: len(spec.blocks_of(model))], "constant", spec.n, len(learner.choices) + 1
    )
    ours = learner._operations([spec.n] * len(left)) - learner._operations(left)
    bare = operations(lambda: spec.call(model, spec.images(1)))
    with vtc.compress(model, "random", stage="encoder", keep=list(left)):
        assert bare - operations(lambda: spec.call(model, spec.images(1))) == 2 * ours


def test_counts_and_gradients_in_half_precision():
    model, pixels = make("timm-deit"), ENCODERS["timm-deit"].images()
    learner = opened(model)
    with learner.installed():
        expected = model(pixels)
        with torch.autocast("cpu", torch.bfloat16):
            found = model(pixels)
            counted = learner.pruned(), learner.kept()
        found.float().square().sum().backward()
    assert counted == (learner.pruned(), learner.kept()) == ([24, 13, 13, 13], [24, 13, 13, 13])
    torch.testing.assert_close(found.float(), expected, atol=0.1, rtol=0.1)
    assert learner.choices[0][0].logits.grad.abs().max() > 0
    model, data = make("timm-deit").bfloat16(), [pixels.bfloat16()]
    learned = learn_rates(model, data, lambda m, x: m(x).float().square().mean(), keep=0.6, granularity=4)
    assert learned[1] == sorted(learned[1], reverse=True)


def toy(last, depth=5):
    """A classifier in which CLS looks at the patches up to block `last` only: behind it they are useless."""
    from timm.models.vision_transformer import VisionTransformer

    torch.manual_seed(0)
    shape = {"img_size": (32, 48), "patch_size": 8, "embed_dim": 32, "num_heads": 2, "mlp_ratio": 2.0}
    model = VisionTransformer(**shape, depth=depth, num_classes=5).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.15)
    for block in model.blocks[last + 1 :]:
        torch.nn.init.zeros_(block.attn.proj.weight)
        torch.nn.init.zeros_(block.attn.proj.bias)
    return model


@pytest.fixture(scope="module")
def taught():
    """Toys that need the patches up to block 1, 2 and 3: what is learned for the operations of keep=0.3."""
    generator = torch.Generator().manual_seed(1)
    batches = [torch.randn(8, 3, 32, 48, generator=generator) for _ in range(10)]
    found = {}
    for last in (1, 2, 3):
        model = toy(last)
        with torch.no_grad():
            data = [(x, model(x)) for x in batches]

        def loss(model, batch):
            return 30 * (model(batch[0]) - batch[1]).square().mean()

        with warnings.catch_warnings():
            warnings.simplefilter("error")  # none that the budget was missed
            learned = learn_rates(model, data, loss, keep=0.3, epochs=8, granularity=2, lr=0.25)
        found[last] = model, data, loss, *learned
    return found


@pytest.mark.parametrize("last", [1, 2, 3])
def test_the_budget_is_met(taught, last):
    model, data, _, method, keep = taught[last]

    def count(method, keep):
        with vtc.compress(model, method, stage="encoder", keep=keep):
            return operations(lambda: model(data[0][0][:1]))

    bare = operations(lambda: model(data[0][0][:1]))
    wanted, found = count("random", 0.3), count("random", keep)
    assert abs(found - wanted) < 0.04 * bare and wanted < 0.75 * bare
    assert keep == sorted(keep, reverse=True) and keep[0] == method.prune[0] == 24


def test_tokens_go_where_they_are_useless(taught):
    one, two, three = (taught[last][4] for last in (1, 2, 3))
    assert one[1] <= 15 and len(set(one[1:])) == 1  # at once, and all of what is to go
    assert two[1] >= 20 and two[2] <= 12
    assert three[1] >= 18 and three[2] > 1.5 * three[3] and three[3] <= 6
    for last in (1, 2, 3):
        model, data, loss, method, keep = taught[last]
        with torch.no_grad():
            with vtc.compress(model, method, keep=keep):
                learned = sum(float(loss(model, batch)) for batch in data)
            with vtc.compress(model, "diffrate", keep=0.3):
                constant = sum(float(loss(model, batch)) for batch in data)
        assert learned < 0.75 * constant


def test_nothing_is_left_on_the_model(taught):
    spec, model = ENCODERS["timm-avg"], make("timm-avg").train()
    model.cls_token.requires_grad_(False)
    pixels, before = spec.images(), footprint(model)
    asking = [weight.requires_grad for weight in model.parameters()]
    weights = [weight.clone() for weight in model.parameters()]
    expected = model(pixels)

    def check():
        assert footprint(model) == before and model.training
        assert [weight.requires_grad for weight in model.parameters()] == asking
        assert all(weight.grad is None for weight in model.parameters())
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), weights))
        assert torch.equal(model(pixels), expected)

    with torch.no_grad():
        learn_rates(model, [pixels], lambda m, x: m(x).square().mean(), keep=0.6, epochs=2, granularity=4)
    check()

    def stops(m, x):
        m.blocks[2].mlp.register_forward_pre_hook(lambda *_: 1 / 0)
        try:
            return m(x)
        finally:
            m.blocks[2].mlp._forward_pre_hooks.clear()

    with pytest.raises(ZeroDivisionError):
        learn_rates(model, [pixels], stops, keep=0.6)
    check()
    spec, model = ENCODERS["CLIPVisionModel"], make("CLIPVisionModel")
    before = footprint(model)
    with pytest.raises(ZeroDivisionError):
        learn_rates(
            model, [0], lambda m, x: spec.call(m, spec.images()).pooler_output.sum() / (x // x), keep=0.6
        )
    assert footprint(model) == before


def test_gradient_checkpointing_gives_the_same_schedule():
    model = make("ViTForImageClassification").train()
    data = [ENCODERS["ViTForImageClassification"].images()]

    def learn():
        loss = lambda m, x: m(pixel_values=x).logits.square().mean()  # noqa: E731
        return learn_rates(model, data, loss, keep=0.5, epochs=6, granularity=1, lr=0.5)

    expected = learn()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert learn() == expected


def test_what_cannot_be_learned_is_refused():
    model, pixels = make("timm-deit"), ENCODERS["timm-deit"].images()

    def loss(m, x):
        return m(x).square().mean()

    with pytest.raises(ValueError, match="CLS"):
        learn_rates(make("timm-siglip"), [pixels], loss, keep=0.5)
    with vtc.compress(model, "diffrate", keep=0.5), pytest.raises(RuntimeError, match="compressed"):
        learn_rates(model, [pixels], loss, keep=0.5)
    with pytest.raises(ValueError, match="epoch 2"):
        learn_rates(model, iter([pixels]), loss, keep=0.5, epochs=2)
    with pytest.raises(RuntimeError, match="did not call"):
        learn_rates(model, [pixels], lambda m, x: x.mean(), keep=0.5)
    with pytest.raises(RuntimeError, match="maps"):
        learn_rates(model, [pixels], lambda m, x: m.forward_intermediates(x)[0].mean(), keep=0.5)
    with pytest.raises(ValueError, match="counts"):
        dynamic = make("timm-dynamic")
        learn_rates(dynamic, [pixels, pixels[..., :32]], loss, keep=0.5)
    for wrong in ({"keep": 0}, {"keep": 0.5, "epochs": 0}, {"keep": 0.5, "granularity": 0}):
        with pytest.raises(ValueError):
            learn_rates(model, [pixels], loss, **wrong)
    with pytest.warns(UserWarning, match="were wanted"):
        learn_rates(model, [pixels], loss, keep=0.9, epochs=1)
