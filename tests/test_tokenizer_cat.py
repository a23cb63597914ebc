import dataclasses

import pytest
import torch
import torch.nn.functional as F

from vtc.tokenizers import TokenSequence
from vtc.tokenizers.complexity import Complexity, gradient_energy
from vtc.tokenizers.systems.cat import CAT

TINY = {
    "image_size": 32,
    "width": 8,
    "multipliers": (1, 2, 2, 4),
    "res_blocks": 1,
    "dim": 3,
    "ratios": (2, 4, 8),
}
LENGTHS = (16, 64, 256)


@pytest.fixture
def cat():
    torch.manual_seed(0)
    made = CAT(CAT.Config(**TINY)).eval()
    with torch.no_grad():  # norms and biases that cannot be overlooked
        for p in made.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    return made


@pytest.fixture
def images():
    torch.manual_seed(1)
    smooth = F.interpolate(torch.rand(8, 3, 4, 4), 32, mode="bilinear")
    rough = torch.linspace(0, 1, 8).view(-1, 1, 1, 1)
    return smooth * (1 - rough) + torch.rand(8, 3, 32, 32) * rough


def block_shapes(name, start, width):
    shapes = {f"{name}.norm1": (start,), f"{name}.norm2": (width,)}
    shapes |= {f"{name}.conv1": (width, start, 3, 3), f"{name}.conv2": (width, width, 3, 3)}
    return shapes | ({f"{name}.nin_shortcut": (width, start, 1, 1)} if start != width else {})


def expected_shapes(widths, res_blocks, dim, exits):
    top, shapes = widths[-1], {}
    sides = (("encoder", 3, 2 * dim, res_blocks), ("decoder", dim, 3, res_blocks + 1))
    for side, first, last, n in sides:
        down = side == "encoder"
        stack, step = ("down", "shrink") if down else ("up", "grow")
        begin, end = (widths[0], top) if down else (top, widths[0])
        shapes[f"{side}.conv_in"] = (begin, first, 3, 3)
        shapes[f"{side}.conv_out"] = (last, end, 3, 3)
        shapes[f"{side}.norm_out"] = (end,)
        for i, width in enumerate(widths):
            start = widths[max(i - 1, 0)] if down else widths[min(i + 1, len(widths) - 1)]
            for j in range(n):
                shapes |= block_shapes(f"{side}.{stack}.{i}.{j}", start if j == 0 else width, width)
            if i in exits:
                ends = (width, top) if down else (top, start)
                shapes |= block_shapes(f"{side}.match.{i}", *ends)
        for i in range(len(widths) - 1):
            width = widths[i] if down else widths[i + 1]
            shapes[f"{side}.{step}.{i}"] = (width, width, 3, 3)
        for name in ("block_1", "block_2"):
            shapes |= block_shapes(f"{side}.mid.{name}", top, top)
        shapes |= {f"{side}.mid.attn_1.{name}": (top, top, 1, 1) for name in ("q", "k", "v", "proj_out")}
        shapes[f"{side}.mid.attn_1.norm"] = (top,)
    weights = {f"{name}.weight": shape for name, shape in shapes.items()}
    return weights | {f"{name}.bias": shape[:1] for name, shape in shapes.items()}


@pytest.mark.parametrize(
    "config, widths, exits",
    [
        (CAT.Config(), [128, 128, 256, 256, 512, 512], (3, 4, 5)),
        (CAT.Config(**TINY), [8, 16, 16, 32], (1, 2, 3)),
    ],
)
def test_names_and_shapes(config, widths, exits):
    with torch.device("meta"):
        state = CAT(config).state_dict()
    assert {k: tuple(v.shape) for k, v in state.items()} == expected_shapes(
        widths, config.res_blocks, config.dim, exits
    )


def test_lengths_of_the_paper():
    with torch.device("meta"):
        assert CAT(CAT.Config()).lengths == (64, 256, 1024)


class Plain:
    """The forward of the paper's nested VAE, read off a state dict with plain operations."""

    def __init__(self, state, widths, n):
        self.state, self.widths, self.n = state, widths, n

    def conv(self, name, x, **options):
        return F.conv2d(x, self.state[f"{name}.weight"], self.state[f"{name}.bias"], **options)

    def norm(self, name, x):
        groups = {8: 8, 16: 16, 32: 32}[x.shape[1]]
        return F.group_norm(x, groups, self.state[f"{name}.weight"], self.state[f"{name}.bias"], 1e-6)

    def block(self, name, x):
        h = self.conv(f"{name}.conv1", F.silu(self.norm(f"{name}.norm1", x)), padding=1)
        h = self.conv(f"{name}.conv2", F.silu(self.norm(f"{name}.norm2", h)), padding=1)
        return h + (
            self.conv(f"{name}.nin_shortcut", x) if f"{name}.nin_shortcut.weight" in self.state else x
        )

    def middle(self, name, x):
        x = self.block(f"{name}.block_1", x)
        normed = self.norm(f"{name}.attn_1.norm", x)
        q, k, v = (self.conv(f"{name}.attn_1.{part}", normed).flatten(2) for part in "qkv")
        weights = (torch.einsum("bci,bcj->bij", q, k) / x.shape[1] ** 0.5).softmax(-1)
        x = x + self.conv(f"{name}.attn_1.proj_out", torch.einsum("bij,bcj->bci", weights, v).view(x.shape))
        return self.block(f"{name}.block_2", x)

    def encode(self, x, level):
        x = self.conv("encoder.conv_in", x * 2 - 1, padding=1)
        for i in range(level + 1):
            for j in range(self.n):
                x = self.block(f"encoder.down.{i}.{j}", x)
            if i < level:
                x = self.conv(f"encoder.shrink.{i}", F.pad(x, (0, 1, 0, 1)), stride=2)
        x = self.middle("encoder.mid", self.block(f"encoder.match.{level}", x))
        z = self.conv("encoder.conv_out", F.silu(self.norm("encoder.norm_out", x)), padding=1)
        return z[:, :3].reshape(len(z), 3, -1).permute(0, 2, 1)

    def decode(self, values, level):
        side = int(values.shape[1] ** 0.5)
        z = torch.stack([values[:, r * side : (r + 1) * side] for r in range(side)], 1).permute(0, 3, 1, 2)
        x = self.middle("decoder.mid", self.conv("decoder.conv_in", z, padding=1))
        x = self.block(f"decoder.match.{level}", x)
        for i in reversed(range(level + 1)):
            for j in range(self.n + 1):
                x = self.block(f"decoder.up.{i}.{j}", x)
            if i:
                x = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
                x = self.conv(f"decoder.grow.{i - 1}", x, padding=1)
        x = self.conv("decoder.conv_out", F.silu(self.norm("decoder.norm_out", x)), padding=1)
        return (x + 1) / 2


@pytest.mark.parametrize("k, level", [(16, 3), (64, 2), (256, 1)])
@torch.no_grad()
def test_forward_is_the_papers(cat, images, k, level):
    plain = Plain(cat.state_dict(), [8, 16, 16, 32], 1)
    tokens = cat.encode(images[:2], k)
    torch.testing.assert_close(tokens.values, plain.encode(images[:2], level), atol=1e-5, rtol=1e-5)
    expected = plain.decode(tokens.values, level)
    decoded = cat.decode_values(tokens.values, tokens.valid, tokens.index)
    torch.testing.assert_close(decoded, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(cat.decode(tokens), expected.clamp(0, 1), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_all_ratios_decode_to_the_same_size_with_the_same_weights(cat, images):
    used = {}
    for k in LENGTHS:
        seen = set()
        hooks = [
            m.register_forward_pre_hook(lambda m, _, name=name, seen=seen: seen.add(name))
            for name, m in cat.named_modules()
            if not list(m.children())
        ]
        assert cat(images, k).shape == images.shape
        used[k] = seen
        for hook in hooks:
            hook.remove()
    shared = used[16] & used[64] & used[256]
    assert {
        "encoder.conv_in",
        "encoder.mid.block_1.conv1",
        "encoder.conv_out",
        "decoder.mid.attn_1.q",
    } <= shared
    # what a coarser grid has to itself is beyond the exit of the finer
    assert all(name.split(".")[1] == "match" for name in used[256] - used[16])


@torch.no_grad()
def test_a_ragged_batch_equals_single_images(cat, images):
    k = torch.tensor([64, 16, 256, 16, 64, 64, 256, 16])
    together = cat.encode(images, k)
    assert together.lengths.tolist() == k.tolist()
    decoded = cat.decode(together)
    for i, n in enumerate(k.tolist()):
        alone = cat.encode(images[i : i + 1], n)
        torch.testing.assert_close(together[i].values, alone.values, atol=1e-5, rtol=1e-5)
        assert torch.equal(together[i].index, alone.index)
        torch.testing.assert_close(decoded[i : i + 1], cat.decode(alone), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_padding_is_not_seen(cat, images):
    tokens = cat.encode(images[:2], torch.tensor([16, 64]))
    noisy = tokens.values + 100 * torch.randn_like(tokens.values) * ~tokens.valid[..., None]
    assert torch.equal(
        cat.decode_values(noisy, tokens.valid, tokens.index),
        cat.decode_values(tokens.values, tokens.valid, tokens.index),
    )


@torch.no_grad()
def test_the_index_is_the_first_cell_a_token_covers(cat, images):
    grid = torch.arange(256).view(16, 16)
    for k, step in zip(LENGTHS, (4, 2, 1)):
        expected = grid[::step, ::step].flatten()
        assert torch.equal(cat.encode(images[:1], k).index[0], expected)


@pytest.mark.parametrize("kept", [16, 64, 5])
@torch.no_grad()
def test_tokens_of_a_finer_grid_are_not_truncated(cat, images, kept):
    tokens = cat.encode(images[:1], 256)
    with pytest.raises(ValueError, match="no whole grid of cat: encode the image with 16 or 64 or 256"):
        cat.decode(tokens.truncate(kept))
    with pytest.raises(ValueError):
        cat.decode(tokens, kept)
    assert torch.equal(cat.decode(tokens, 256), cat.decode(tokens))


def test_other_lengths_are_rejected(cat, images):
    with pytest.raises(ValueError, match="cat encodes to 16 or 64 or 256 tokens, not to 32"):
        cat.encode(images, 32)
    with pytest.raises(ValueError, match="8 images take one length or 8, not 2"):
        cat.encode(images, [16, 64])


@torch.no_grad()
def test_a_higher_score_never_gets_fewer_tokens(cat, images):
    policy = Complexity(lengths=LENGTHS).calibrate(cat, images, 100)
    order = gradient_energy(images).argsort()
    lengths = cat.encode(images, policy).lengths
    assert (lengths[order].diff() >= 0).all()
    assert len(set(lengths.tolist())) > 1


@pytest.mark.parametrize("mean", [40, 64, 100, 200])
@torch.no_grad()
def test_calibration_meets_the_mean_within_one_sample(cat, images, mean):
    policy = Complexity(lengths=LENGTHS).calibrate(cat, images, mean)
    lengths = cat.encode(images, policy).lengths
    total, budget = int(lengths.sum()), mean * len(images)
    assert total <= budget
    steps = [256 - 64 if n == 64 else 64 - 16 for n in lengths.tolist() if n < 256]
    assert total + max(steps) > budget  # one more image of the next longer grid would go beyond


@torch.no_grad()
def test_the_same_image_gets_the_same_tokens(cat, images):
    policy = Complexity(lengths=LENGTHS).calibrate(cat, images, 100)
    first, again = cat.encode(images, policy), cat.encode(images, policy)
    assert torch.equal(first.lengths, again.lengths) and torch.equal(first.values, again.values)
    for i in range(len(images)):
        assert cat.encode(images[i : i + 1], policy).lengths == first.lengths[i]


@torch.no_grad()
def test_sampling_is_asked_for(cat, images):
    drawing = CAT(CAT.Config(**TINY, sample=True)).eval()
    drawing.load_state_dict(cat.state_dict())
    assert not torch.equal(drawing.encode(images, 16).values, drawing.encode(images, 16).values)
    assert torch.equal(cat.encode(images, 16).values, cat.encode(images, 16).values)


def test_training_loss_is_that_of_each_image_at_its_length(cat, images):
    lengths = torch.tensor([16, 64, 256, 64])
    losses = cat.training_loss(images[:4], lengths)
    singles = [cat.training_loss(images[i : i + 1], lengths[i : i + 1]) for i in range(4)]
    for name in ("l1", "kl"):
        torch.testing.assert_close(losses[name], sum(s[name] for s in singles) / 4)
    sum(losses.values()).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in cat.parameters() if p.dim() > 1)
    tokens = cat.encode(images[:1], 16)
    decoded = cat.decode_values(tokens.values, tokens.valid, tokens.index)
    torch.testing.assert_close(singles[0]["l1"], (decoded - images[:1]).abs().mean())
    mean, logvar = cat.latents(images[:1], 16).chunk(2, -1)
    normal = torch.distributions.Normal(0, 1)
    divergence = torch.distributions.kl_divergence(
        torch.distributions.Normal(mean, (logvar / 2).exp()), normal
    )
    torch.testing.assert_close(singles[0]["kl"], divergence.sum(-1).mean())


def test_every_grid_sees_every_kind_of_image(cat):
    chosen = torch.full((600,), 64)
    drawn = cat.draw_lengths(chosen, 0.3, torch.Generator().manual_seed(0))
    assert set(drawn.tolist()) == set(LENGTHS)
    assert 0.75 < (drawn == 64).float().mean() < 0.85  # 0.7, and a third of 0.3
    assert torch.equal(cat.draw_lengths(chosen, 0.0), chosen)


def test_bad_configurations():
    for ratios in ((3, 8), (8, 32), (8, 64)):
        with pytest.raises(ValueError, match="powers of two that divide 32 and are below it"):
            CAT(CAT.Config(**TINY | {"ratios": ratios}))
    with pytest.raises(ValueError, match="go down to a ratio of 8, not 4"):
        CAT(CAT.Config(**TINY | {"ratios": (2, 4)}))


@torch.no_grad()
def test_saved_and_loaded(cat, images, tmp_path):
    cat.save_pretrained(tmp_path)
    again = CAT.from_pretrained(tmp_path)
    assert dataclasses.asdict(again.config) == dataclasses.asdict(cat.config)
    k = torch.tensor([16, 256, 64, 16, 16, 16, 64, 64])
    assert torch.equal(again.encode(images, k).values, cat.encode(images, k).values)
    tokens = cat.encode(images, k)
    assert torch.equal(again.decode(tokens), cat.decode(tokens))
    joined = TokenSequence.cat([tokens[3:], tokens[:3]])
    torch.testing.assert_close(again.decode(joined)[-3:], cat.decode(tokens)[:3], atol=1e-5, rtol=1e-5)
