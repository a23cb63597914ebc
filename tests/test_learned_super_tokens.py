import pytest
import torch
import torch.nn.functional as F
from learned_host import all_have_gradients, apart, distances, random_block, randomise, smooth

from vtc.learned.super_tokens import SuperTokenAttention, SuperTokens
from vtc.learned.superpixels import Assignment


def attention(std=0.3, **options):
    options = {"width": 16, "heads": 2, "cell": (2, 2)} | options
    return randomise(SuperTokenAttention(SuperTokenAttention.Config(**options)), std=std)


def tokens(**options):
    return SuperTokens(SuperTokens.Config(**{"in_width": 64, "heads": 4} | options))


def as_map(x, grid):
    return x.transpose(1, 2).unflatten(2, grid)


def restated(x, cell, rounds, masked):
    """Shares of every pixel of one map (width, H, W) over all super tokens, (H', W', cells), and the super
    tokens (cells, width). H', W': with padding. Loops over pixels and their nine super tokens."""
    (h, w), (width, rows, columns) = cell, x.shape
    x = F.pad(x, (0, -columns % w, 0, -rows % h))
    size = x.shape[1] // h, x.shape[2] // w
    real = [[not masked or (i < rows and j < columns) for j in range(x.shape[2])] for i in range(x.shape[1])]
    places = [(i, j) for i in range(x.shape[1]) for j in range(x.shape[2]) if real[i][j]]
    centres = torch.stack(
        [
            torch.stack([x[:, i, j] for i, j in places if (i // h, j // w) == (r, c)]).mean(0)
            for r in range(size[0])
            for c in range(size[1])
        ]
    )
    for _ in range(rounds):
        shares = torch.zeros(*x.shape[1:], len(centres), dtype=x.dtype)
        for i in range(x.shape[1]):
            for j in range(x.shape[2]):
                around = [(i // h + a, j // w + b) for a in (-1, 0, 1) for b in (-1, 0, 1)]
                inside = [0 <= r < size[0] and 0 <= c < size[1] for r, c in around]
                logits = torch.stack(
                    [
                        x[:, i, j] @ centres[r * size[1] + c] * width**-0.5 if there else x.new_zeros(())
                        for (r, c), there in zip(around, inside, strict=True)
                    ]
                )
                if masked:
                    logits = logits.masked_fill(~torch.tensor(inside), float("-inf"))
                for share, (r, c), there in zip(logits.softmax(0), around, inside, strict=True):
                    if there:
                        shares[i, j, r * size[1] + c] = share
        given = torch.stack([shares[i, j] for i, j in places], 1)  # (cells, pixels that count)
        pixels = torch.stack([x[:, i, j] for i, j in places])
        centres = given @ pixels / (given.sum(1, keepdim=True) + 1e-12)
    return shares, centres


def self_attention(state, x, heads):
    """Among (cells, width), where qkv has a head's q, k and v side by side."""
    qkv = x @ state["stoken_refine.qkv.weight"][:, :, 0, 0].T + state.get("stoken_refine.qkv.bias", 0)
    d, outs = x.shape[1] // heads, []
    for head in qkv.split(3 * d, 1):
        q, k, v = head.split(d, 1)
        outs.append((q @ k.T * d**-0.5).softmax(-1) @ v)
    return (
        torch.cat(outs, 1) @ state["stoken_refine.proj.weight"][:, :, 0, 0].T
        + state["stoken_refine.proj.bias"]
    )


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize(
    "grid, cell, rounds", [((4, 6), (2, 2), 1), ((5, 7), (2, 3), 2), ((6, 6), (4, 4), 3)]
)
@torch.no_grad()
def test_equals_a_restatement(grid, cell, rounds, masked):
    m = attention(cell=cell, rounds=rounds, masked=masked, qkv_bias=masked).double()
    x = torch.randn(2, grid[0] * grid[1], 16, dtype=torch.float64)
    out = m(x, grid)
    for image, result in zip(x, out, strict=True):
        shares, centres = restated(image.T.reshape(16, *grid), cell, rounds, masked)
        expected = shares @ self_attention(m.state_dict(), centres, 2)
        assert torch.allclose(result, expected[: grid[0], : grid[1]].flatten(0, 1), atol=1e-8)


@torch.no_grad()
def test_refining_by_convolutions_and_not_at_all():
    x, grid = torch.randn(1, 16, 16), (4, 4)
    shares, centres = restated(x[0].T.reshape(16, 4, 4), (2, 2), 1, True)
    assert torch.allclose(attention(refine="none")(x, grid)[0], (shares @ centres).flatten(0, 1), atol=1e-5)
    m = attention(refine="conv")
    first, second, third = m.stoken_refine
    y = F.conv2d(centres.T.reshape(1, 16, 2, 2), first.weight, first.bias)
    y = F.conv2d(y, second.weight, second.bias, padding=2, groups=16)
    y = F.conv2d(y, third.weight, third.bias).flatten(2)[0].T
    assert torch.allclose(m(x, grid)[0], (shares @ y).flatten(0, 1), atol=1e-5)


def test_parameters_are_those_of_the_published_code():
    with torch.device("meta"):
        m = SuperTokenAttention(SuperTokenAttention.Config(width=64, heads=1, cell=(8, 8)))
    assert {name: tuple(p.shape) for name, p in m.state_dict().items()} == {
        "unfold.weights": (9, 1, 3, 3),
        "fold.weights": (9, 1, 3, 3),
        "stoken_refine.qkv.weight": (192, 64, 1, 1),
        "stoken_refine.qkv.bias": (192,),
        "stoken_refine.proj.weight": (64, 64, 1, 1),
        "stoken_refine.proj.bias": (64,),
    }
    assert torch.equal(attention().fold.weights.flatten(1), torch.eye(9))


# -- the sampling


@pytest.mark.parametrize("grid", [(8, 8), (7, 9), (5, 6)])
@pytest.mark.parametrize("cell", [2, 4, 8])
def test_shares_sum_to_one_and_a_constant_comes_back(grid, cell):
    x = torch.randn(2, 8, *grid)
    assignment = Assignment(x, (cell, cell), rounds=2)
    assert torch.allclose(assignment.shares.sum(-1), torch.ones(()), atol=1e-6)
    ones = torch.ones(2, 8, *grid)
    constant = Assignment(ones, (cell, cell))
    assert torch.allclose(constant.gather(), torch.ones(()), atol=1e-6)
    assert torch.allclose(constant.scatter(constant.gather()), ones, atol=1e-6)
    # whatever the shares are
    assert torch.allclose(assignment.scatter(assignment.gather(ones)), ones, atol=1e-6)


def test_without_the_mask_a_constant_is_lost_at_borders_as_in_the_official_code():
    ones = torch.ones(1, 8, 32, 32)
    assignment = Assignment(ones, (4, 4), masked=False)
    assert torch.allclose(assignment.shares.sum(-1), torch.ones(()), atol=1e-6)
    assert torch.allclose(assignment.gather(), torch.ones(()), atol=1e-6)
    back = assignment.scatter(assignment.gather())[0, 0]
    assert [round(float(back[i, j]), 3) for i, j in ((16, 16), (0, 16), (0, 0))] == [1.0, 0.971, 0.931]


@pytest.mark.parametrize("grid", [(7, 9), (6, 5)])
@pytest.mark.parametrize("masked", [True, False])
def test_shape_is_kept_where_cells_do_not_fit(grid, masked):
    x = torch.randn(2, grid[0] * grid[1], 16)
    assert attention(cell=(4, 2), masked=masked)(x, grid).shape == x.shape


def test_shares_have_no_gradient():
    x = torch.randn(1, 8, 4, 4, requires_grad=True)
    assignment = Assignment(x, (2, 2))
    assert not assignment.shares.requires_grad
    (gradient,) = torch.autograd.grad(assignment.gather().sum(), x)
    # each pixel counts by its shares of the totals, as if those were constants
    weights = Assignment(x.detach(), (2, 2))
    fixed = x.detach().requires_grad_()
    weights.tokens = weights._cells(fixed)
    (expected,) = torch.autograd.grad(weights.gather().sum(), fixed)
    assert torch.allclose(gradient, expected)


# -- in the place of a host's attention


def test_cells_of_one_are_the_hosts_attention_and_larger_ones_less_and_less():
    host, x, near = random_block(), smooth(grid=(16, 16)), []
    for cell in (1, 2, 4):
        m = SuperTokenAttention(SuperTokenAttention.Config(width=64, heads=4, cell=(cell, cell)))
        m.start_from(host.attn)
        near.append(distances(m, host, x, (16, 16)))
    assert near[0][0] < 1e-5 and near[0][1] < 1e-5
    assert near[0][0] < near[1][0] < near[2][0] and near[1][1] < near[1][2] * 0.8
    # tokens that are all the same
    same = torch.randn(1, 1, 64).expand(1, 64, 64)
    assert torch.allclose(m(same, (8, 8)), host.attn(same), atol=1e-5)


@torch.no_grad()
def test_cls_takes_part_and_super_tokens_count_as_often_as_they_have_tokens():
    host, grid = random_block(), (8, 8)
    x = torch.cat([torch.randn(2, 1, 64), smooth(grid=grid)], 1)

    def started(cell):
        m = SuperTokenAttention(SuperTokenAttention.Config(width=64, heads=4, cell=(cell, cell), prefix=1))
        m.start_from(host.attn)
        return m

    wanted = host.attn(x)
    assert torch.allclose(started(1)(x, grid), wanted, atol=1e-4)
    assert apart(started(2)(x, grid), wanted) < 0.5
    # one picture's tokens all the same: 64 of them weigh against one CLS, however they are shared out
    x[:, 1:] = x[:, 1:2]
    assert torch.allclose(started(2)(x, grid), host.attn(x), atol=1e-4)


def test_what_cannot_be_done_is_said():
    with pytest.raises(ValueError, match="take part in refine='attention' only"):
        attention(refine="none", prefix=1)
    with pytest.raises(ValueError, match="refine is one of"):
        attention(refine="mlp")
    with pytest.raises(ValueError, match="at least 1"):
        attention(cell=(0, 2))
    with pytest.raises(ValueError, match="at least 1"):
        tokens(rounds=0)
    with pytest.raises(ValueError, match="do not divide"):
        tokens(heads=5)
    with pytest.raises(ValueError, match="for a grid of 4 rows"):
        attention()(torch.randn(1, 15, 16), (4, 4))
    with pytest.raises(ValueError, match="only refine='attention'"):
        attention(refine="conv").start_from(random_block().attn)
    with pytest.raises(ValueError, match="qkv_bias=True"):
        attention(width=64, heads=4, qkv_bias=False).start_from(random_block().attn)
    with pytest.raises(ValueError, match="1, 4, 9 or 36 tokens, not 5"):
        tokens()(torch.randn(1, 36, 64), (6, 6), 5)


# -- super tokens as tokens


@torch.no_grad()
def test_super_tokens_start_as_the_sampling_and_equal_a_restatement():
    m, grid, x = tokens().double(), (6, 9), torch.randn(2, 54, 64, dtype=torch.float64)
    assert m.counts_for(grid) == [1, 2, 4, 6, 15, 54]
    for trained in (False, True):
        if trained:
            randomise(m, std=0.2)
        out, state = m(x, grid, 6), m.state_dict()

        def normed(y, state=state):
            return F.layer_norm(y, (64,), state["norm.weight"], state["norm.bias"])

        for image, result in zip(x, out, strict=True):
            shares, _ = restated(normed(image).T.reshape(64, *grid), (3, 3), 1, True)
            shares = shares.flatten(0, 1)
            sampled = shares.T @ image / shares.sum(0)[:, None]
            if trained:
                sampled = sampled + self_attention(state, normed(sampled), 4)
            assert torch.allclose(result, sampled, atol=1e-8)


@torch.no_grad()
def test_how_near_super_tokens_start():
    """To the means of cells; and all tokens where each is a cell."""
    x, m = smooth(grid=(8, 8)), tokens()
    means = F.avg_pool2d(as_map(x, (8, 8)), 2).flatten(2).transpose(1, 2)
    assert apart(m(x, (8, 8), 16), means) < 0.5
    same = torch.randn(1, 1, 64).expand(1, 64, 64)
    assert torch.allclose(m(same, (8, 8), 16), same[:, :16], atol=1e-5)


@pytest.mark.parametrize("make", [attention, lambda: randomise(tokens(in_width=16))])
def test_batches_are_singles_in_float32_and_bfloat16_and_all_parameters_learn(make, tmp_path):
    m, x = make(), torch.randn(3, 35, 16)
    out = m(x, (5, 7))
    assert torch.allclose(out[1:2], m(x[1:2], (5, 7)), atol=1e-5)
    assert all_have_gradients(m, out.square().mean())
    m.save_pretrained(tmp_path)
    assert torch.equal(type(m).from_pretrained(tmp_path)(x, (5, 7)), out)
    assert apart(m.bfloat16()(x.bfloat16(), (5, 7)).float(), out) < 0.05
