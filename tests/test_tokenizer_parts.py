"""What tokenizers are made of: sequences, bottlenecks, drop schedules, blocks and masks, files of weights."""

import itertools
import json
import math
from collections import OrderedDict

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_tokenizers import TINY
from torch import nn

from vtc.tokenizers import FSQ, KL, VQ, Continuous, TokenSequence, build, from_pretrained, get_tokenizer
from vtc.tokenizers.schedules import DropSchedule
from vtc.transformer import Block, causal_last, initialise, present

# -- sequences


def sequence(lengths=(2, 4, 1), k=4, extras=None):
    b = len(lengths)
    values = torch.arange(1, b * k * 2 + 1).view(b, k, 2).float()
    ids = torch.arange(b * k).view(b, k)
    return TokenSequence(values, torch.tensor(lengths, dtype=torch.long), ids, extras=extras or {})


def contents(tokens):
    """Of each image its own tokens: numbers of codes, places, and first numbers of values."""
    return [
        (t.ids[0].tolist(), t.index[0].tolist(), t.values[0, :, 0].tolist())
        for t in (tokens[i] for i in range(len(tokens)))
    ]


def test_nothing_stands_behind_the_own_tokens():
    tokens = sequence()
    assert tokens.valid.tolist() == [[1, 1, 0, 0], [1, 1, 1, 1], [1, 0, 0, 0]]
    assert tokens.ids.tolist() == [[0, 1, -1, -1], [4, 5, 6, 7], [8, -1, -1, -1]]
    assert tokens.index.tolist() == [[0, 1, -1, -1], [0, 1, 2, 3], [0, -1, -1, -1]]
    assert tokens.values[0, 2:].abs().sum() == 0 and tokens.values[2, 1:].abs().sum() == 0
    assert len(tokens) == 3
    with pytest.raises(ValueError, match="lengths must be 3 numbers up to 4"):
        sequence((2, 5, 1))
    with pytest.raises(ValueError, match="lengths must be 3 numbers up to 4"):
        TokenSequence(tokens.values, torch.tensor([1, 2]))


def test_truncating_keeps_the_first():
    tokens = sequence()
    for k, lengths in (
        (4, [2, 4, 1]),
        (3, [2, 3, 1]),
        (1, [1, 1, 1]),
        ([1, 3, 2], [1, 3, 1]),
        (9, [2, 4, 1]),
    ):
        cut = tokens.truncate(k)
        assert cut.lengths.tolist() == lengths
        assert cut.values.shape == (3, max(lengths), 2)  # no longer than the longest
        for i, n in enumerate(lengths):
            assert cut.ids[i, :n].tolist() == tokens.ids[i, :n].tolist() and (cut.ids[i, n:] == -1).all()
            assert torch.equal(cut.values[i, :n], tokens.values[i, :n])
    twice = tokens.truncate(3).truncate(2)
    assert contents(twice) == contents(tokens.truncate(2))
    assert tokens.lengths.tolist() == [2, 4, 1]  # frozen
    for bad in (0, -1, [1, 0, 2], 1.5, True, [1, 2], [[1, 2, 3]]):
        with pytest.raises(ValueError):
            tokens.truncate(bad)


def test_truncating_keeps_places_that_skip_some():
    tokens = TokenSequence(torch.ones(1, 3, 2), torch.tensor([3]), index=torch.tensor([[0, 4, 7]]))
    assert tokens.truncate(2).index.tolist() == [[0, 4]] and tokens.truncate(2).ids is None


def test_some_of_the_images():
    tokens = sequence(extras={"halting": torch.arange(3)})
    for images, rows in (
        (0, [0]), (2, [2]), (-1, [2]), (-3, [0]), (slice(1, None), [1, 2]), (slice(0, 0), []),
        (torch.tensor([2, 0]), [2, 0]), (torch.tensor([True, False, True]), [0, 2]),
        (torch.zeros(3, dtype=torch.bool), []),
    ):  # fmt: skip
        part = tokens[images]
        assert part.extras["halting"].tolist() == rows
        assert part.lengths.tolist() == [[2, 4, 1][row] for row in rows]
        assert part.values.shape == (len(rows), max([0, *part.lengths.tolist()]), 2)
        assert contents(part) == [contents(tokens)[row] for row in rows]
    for outside in (3, -4):
        with pytest.raises(IndexError, match=f"no image {outside} of 3"):
            tokens[outside]
    assert [len(part) for part in tokens] == [1, 1, 1]


def test_joining_pads_to_the_longest():
    both = {"a": torch.ones(3), "b": torch.ones(3)}
    tokens, other = sequence(extras=both), sequence((1, 1), k=2, extras={"a": torch.zeros(2)})
    joined = TokenSequence.cat([other, tokens, other[:0]])
    assert joined.lengths.tolist() == [1, 1, 2, 4, 1] and joined.values.shape == (5, 4, 2)
    assert contents(joined) == contents(other) + contents(tokens)
    assert list(joined.extras) == ["a"] and joined.extras["a"].tolist() == [0, 0, 1, 1, 1]
    assert contents(TokenSequence.cat(list(tokens))) == contents(tokens)
    plain = TokenSequence.of(torch.ones(2, 3, 4))
    assert TokenSequence.cat([plain, plain]).ids is None
    with pytest.raises(ValueError, match="no sequences to join"):
        TokenSequence.cat([])


def test_an_empty_batch_is_a_sequence():
    empty = sequence((), k=4)
    assert len(empty) == 0 and empty.truncate(2).values.shape == (0, 0, 2)
    assert list(empty) == [] and len(TokenSequence.cat([empty, empty])) == 0
    assert empty.to("cpu").lengths.tolist() == []


def test_all_tokens_of_every_image():
    tokens = TokenSequence.of(torch.ones(2, 3, 4), torch.zeros(2, 3, dtype=torch.long), halting=torch.ones(2))
    assert tokens.lengths.tolist() == [3, 3] and tokens.valid.all() and list(tokens.extras) == ["halting"]
    assert contents(tokens.to("cpu")) == contents(tokens)


# -- bottlenecks


@pytest.mark.parametrize("l2", [False, True])
def test_vq_takes_the_nearest_entry(l2):
    vq, z = VQ(16, 5, l2=l2, beta=0.4), torch.randn(3, 7, 5)
    nn.init.normal_(vq.embedding.weight)
    code = vq(z)

    def scaled(x):
        return [v / math.sqrt(sum(u * u for u in x)) for v in x] if l2 else x

    entries, total = [scaled(e) for e in vq.embedding.weight.tolist()], 0
    for b, t in itertools.product(range(3), range(7)):
        x = scaled(z[b, t].tolist())
        distances = [sum((u - v) ** 2 for u, v in zip(x, e, strict=True)) for e in entries]
        assert int(code.ids[b, t]) == min(range(16), key=distances.__getitem__)
        assert code.values[b, t].tolist() == pytest.approx(entries[int(code.ids[b, t])], abs=1e-5)
        total += min(distances)
    assert float(code.loss.detach()) == pytest.approx(1.4 * total / (3 * 7 * 5), rel=1e-4)
    torch.testing.assert_close(vq.lookup(code.ids), code.values)
    assert (vq.bits, vq.size, vq.dim, vq.channels) == (4, 16, 5, 5)


@pytest.mark.parametrize("l2", [False, True])
def test_every_entry_is_its_own_nearest(l2):
    vq = VQ(200, 6, l2=l2)
    assert vq(vq.lookup(torch.arange(200))).ids.tolist() == list(range(200))
    if l2:
        torch.testing.assert_close(vq.lookup(torch.arange(200)).norm(dim=1), torch.ones(200))
        assert vq(5 * vq.embedding.weight).ids.tolist() == list(range(200))  # whatever their length


def test_vq_passes_gradients_straight_through():
    vq, z = VQ(8, 4, beta=0.25), torch.randn(5, 4, requires_grad=True)
    code, weight = vq(z), torch.randn(5, 4)
    (code.values * weight).sum().backward()
    torch.testing.assert_close(z.grad, weight)
    assert vq.embedding.weight.grad is None
    z.grad = None
    vq(z).loss.backward()
    distance = (vq.lookup(code.ids) - z).detach()
    torch.testing.assert_close(z.grad, -0.25 * 2 * distance / 20)
    moved = torch.zeros(8, 4).index_add(0, code.ids, 2 * distance / 20)
    torch.testing.assert_close(vq.embedding.weight.grad, moved)


def fsq_by_hand(number, levels):
    """The values of a code: digits of its number in the base of the levels, between -1 and 1."""
    values = []
    for level in levels:
        values.append((number % level - level // 2) / (level // 2))
        number //= level
    return values


def test_all_64000_codes_of_fsq_come_back():
    levels = (8, 8, 8, 5, 5, 5)
    fsq, ids = FSQ(levels), torch.arange(64000)
    values = fsq.lookup(ids)
    assert values.shape == (64000, 6) and fsq.size == 64000 and fsq.bits == pytest.approx(math.log2(64000))
    for number in (0, 1, 7, 8, 63999, 12345):
        assert values[number].tolist() == pytest.approx(fsq_by_hand(number, levels))
    assert len(values.unique(dim=0)) == 64000 and float(values.min()) == -1 and float(values.max()) == 1
    # latents that are bounded to just these values
    level = torch.tensor(levels)
    half, offset = (level - 1) * 1.001 / 2, (level % 2 == 0) * 0.5
    z = ((values * (level // 2) + offset) / half).atanh() - (offset / half).atanh()
    code = fsq(z.view(250, 256, 6))
    assert torch.equal(code.ids.flatten(), ids)
    torch.testing.assert_close(code.values.view(-1, 6), values)
    assert float(code.loss) == 0


@pytest.mark.parametrize("levels", [(2,), (3, 4), (8, 8, 8, 5, 5, 5), (7, 2, 6)])
def test_fsq_rounds_what_tanh_bounds(levels):
    fsq, z = FSQ(levels), 3 * torch.randn(50, len(levels))
    code = fsq(z)
    for row in range(50):
        number, basis = 0, 1
        for i, level in enumerate(levels):
            half, offset = (level - 1) * 1.001 / 2, 0.5 if level % 2 == 0 else 0.0
            digit = round(math.tanh(float(z[row, i]) + math.atanh(offset / half)) * half - offset)
            assert float(code.values[row, i]) == pytest.approx(digit / (level // 2), abs=1e-5)
            number, basis = number + (digit + level // 2) * basis, basis * level
        assert int(code.ids[row]) == number
    far = fsq(torch.tensor([[-50.0] * len(levels), [50.0] * len(levels)]))
    assert far.ids.tolist() == [0, fsq.size - 1]


def test_gradients_go_through_rounding():
    z = torch.zeros(1, 3, requires_grad=True)
    FSQ((5, 5, 5))(z).values.sum().backward()
    torch.testing.assert_close(z.grad, torch.full((1, 3), 4 * 1.001 / 2 / 2))  # of tanh at 0


def test_fsq_refuses_levels_that_are_none():
    for levels in ((), (8, 1), (0,)):
        with pytest.raises(ValueError, match="levels of 2 or more"):
            FSQ(levels)


@pytest.mark.parametrize("bottleneck", [VQ(8, 4), FSQ((4, 2))])
def test_codes_that_do_not_exist_are_refused(bottleneck):
    assert bottleneck.lookup(torch.zeros(0, 3, dtype=torch.long)).shape == (0, 3, bottleneck.dim)
    for wrong in (-1, 8):
        with pytest.raises(ValueError, match="codes are numbered 0 to 7"):
            bottleneck.lookup(torch.tensor([[0, wrong]]))


@pytest.mark.parametrize("bottleneck", [VQ(8, 4), VQ(8, 4, l2=True), FSQ((4, 2)), KL(3)])
def test_bottlenecks_work_in_float32_under_autocast(bottleneck):
    z = torch.randn(2, 3, bottleneck.channels)
    expected = bottleneck(z)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = bottleneck(z)
    assert found.values.dtype == torch.float32 and torch.equal(found.values, expected.values)
    assert bottleneck(z.bfloat16()).values.dtype == torch.float32


def test_kl_is_that_of_two_gaussians():
    mean, logvar = torch.randn(2, 5, 3), torch.randn(2, 5, 3)
    code = KL(3)(torch.cat([mean, logvar], -1))
    standard = torch.distributions.Normal(0.0, 1.0)
    there = torch.distributions.Normal(mean, (0.5 * logvar).exp())
    expected = torch.distributions.kl_divergence(there, standard).sum(-1).mean()
    assert float(code.loss) == pytest.approx(float(expected), rel=1e-5)
    assert torch.equal(code.values, mean) and code.ids is None
    assert (KL(3).bits, KL(3).channels, KL(3).dim) == (48, 6, 3)
    assert KL(1)(torch.tensor([[0.0, 1e9]])).loss.isfinite()


def test_a_drawn_value_has_the_mean_and_the_variance():
    z = torch.tensor([2.0, math.log(0.25)]).expand(100_000, 2)
    values = KL(1, sample=True)(z).values
    assert float(values.mean()) == pytest.approx(2, abs=0.01)
    assert float(values.std()) == pytest.approx(0.5, abs=0.01)


def test_no_bottleneck_is_the_latent_itself():
    z = torch.randn(2, 3, 4)
    code = Continuous(4)(z)
    assert code.values is z and code.ids is None and float(code.loss) == 0 and Continuous(4).bits == 64
    for bottleneck in (Continuous(4), KL(4)):
        with pytest.raises(ValueError, match="continuous: it has no codes"):
            bottleneck.lookup(torch.zeros(1, dtype=torch.long))


# -- drop schedules

N = 100_000


def shares(schedule, k):
    drawn = schedule.draw(k, N, torch.Generator().manual_seed(0))
    assert drawn.shape == (N,) and drawn.dtype == torch.long
    return {int(length): float((drawn == length).float().mean()) for length in drawn.unique()}


@pytest.mark.parametrize("schedule, k, expected", [
    (DropSchedule("uniform"), 5, dict.fromkeys(range(1, 6), 0.2)),
    (DropSchedule("pow2"), 16, dict.fromkeys((1, 2, 4, 8, 16), 0.2)),
    (DropSchedule("pow2"), 6, dict.fromkeys((1, 2, 4, 6), 0.25)),
    (DropSchedule("pow2"), 1, {1: 1.0}),
    (DropSchedule("uniform_pow2"), 256, {1: 1 / 256, 2: 1 / 256, **{2**i: 2**i / 512 for i in range(2, 9)}}),
    (DropSchedule("uniform_pow2"), 6, {1: 1 / 6, 2: 1 / 6, 4: 2 / 6, 6: 2 / 6}),
    (DropSchedule("levels", levels=(4, 8, 16)), 16, dict.fromkeys((4, 8, 16), 1 / 3)),
    (DropSchedule("levels", levels=(4, 8), weights=(1.0, 3.0)), 8, {4: 0.25, 8: 0.75}),
    (DropSchedule("levels", levels=(4, 8)), 6, {4: 0.5, 6: 0.5}),
    (DropSchedule("full"), 7, {7: 1.0}),
])  # fmt: skip
def test_schedules_draw_lengths_as_often_as_they_say(schedule, k, expected):
    found = shares(schedule, k)
    assert found.keys() == expected.keys()  # both ends are reached, and nothing else
    for length, share in expected.items():
        assert found[length] == pytest.approx(share, abs=5 * math.sqrt(share * (1 - share) / N) + 1e-9)


def test_half_of_the_draws_rounded_up_are_all_tokens():
    found = shares(DropSchedule("uniform_pow2"), 256)
    assert found[256] == pytest.approx(0.5, abs=0.01)
    assert found[1] == pytest.approx(1 / 256, abs=0.001) and found[2] == pytest.approx(1 / 256, abs=0.001)


@pytest.mark.parametrize("kind", ["uniform", "pow2", "uniform_pow2", "levels", "full"])
def test_a_shared_draw_is_one_for_the_batch(kind):
    levels = (1, 3, 9) if kind == "levels" else ()
    generator = torch.Generator().manual_seed(0)
    draws = [DropSchedule(kind, levels, shared=True).draw(9, 6, generator) for _ in range(40)]
    assert all(len(set(draw.tolist())) == 1 for draw in draws)
    assert kind == "full" or len({int(draw[0]) for draw in draws}) > 1
    alone = DropSchedule(kind, levels).draw(9, 200, torch.Generator().manual_seed(1))
    assert torch.equal(alone, DropSchedule(kind, levels).draw(9, 200, torch.Generator().manual_seed(1)))
    assert kind == "full" or len(set(alone.tolist())) > 1
    alone[0] = 100  # each has its own place in memory
    assert int((alone == 100).sum()) == 1


@pytest.mark.parametrize("options", [
    {"kind": "linear"}, {"kind": "levels"}, {"levels": (1, 2)}, {"weights": (1.0,)},
    {"kind": "levels", "levels": (1, 2), "weights": (1.0,)},
])  # fmt: skip
def test_schedules_that_are_none_are_refused(options):
    with pytest.raises(ValueError, match="schedule"):
        DropSchedule(**options)


# -- blocks and masks


class Plain(nn.Module):
    """The same block of torch's own attention."""

    def __init__(self, width, heads):
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        layers = OrderedDict(
            c_fc=nn.Linear(width, 4 * width), gelu=nn.GELU(), c_proj=nn.Linear(4 * width, width)
        )
        self.mlp = nn.Sequential(layers)

    def forward(self, x, blocked=None, padding=None):
        y = self.ln_1(x)
        y = self.attn(y, y, y, attn_mask=blocked, key_padding_mask=padding, need_weights=False)[0]
        return x + y + self.mlp(self.ln_2(x + y))


def test_a_block_is_that_of_torchs_attention():
    block, plain = Block(24, 3), Plain(24, 3)
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.3)
    plain.load_state_dict(block.state_dict())  # the names are the same
    x = torch.randn(2, 7, 24)
    torch.testing.assert_close(block(x), plain(x), atol=1e-5, rtol=1e-5)
    seen = torch.rand(7, 7) > 0.4
    seen.fill_diagonal_(True)
    torch.testing.assert_close(block(x, seen), plain(x, ~seen), atol=1e-5, rtol=1e-5)
    each = torch.stack([seen, seen.T])
    apart = torch.cat([plain(x[:1], ~each[0]), plain(x[1:], ~each[1])])
    torch.testing.assert_close(block(x, each), apart, atol=1e-5, rtol=1e-5)
    there = torch.tensor([[1, 1, 1, 0, 1, 0, 0], [1, 1, 1, 1, 1, 1, 1]]).bool()
    expected = plain(x, padding=~there)
    torch.testing.assert_close(block(x, there[:, None]), expected, atol=1e-5, rtol=1e-5)
    assert block(x[:0]).shape == (0, 7, 24)


def test_registers_see_the_picture_and_the_registers_before():
    for n, k in ((1, 1), (3, 4), (5, 0), (0, 3)):
        mask = causal_last(n, k)
        assert mask.shape == (n + k, n + k)
        for row, column in itertools.product(range(n + k), repeat=2):
            assert bool(mask[row, column]) == (column < n or (row >= n and column <= row))


def test_presence_is_a_mask_only_where_something_is_missing():
    assert present(3, None) is None and present(3, torch.ones(2, 4, dtype=torch.bool)) is None
    valid = torch.tensor([[True, False], [True, True]])
    assert present(2, valid).tolist() == [[[True, True, True, False]], [[True, True, True, True]]]


def test_blocks_start_with_small_weights():
    block = Block(64, 2)
    initialise(block, std=0.02)
    for name, parameter in block.named_parameters():
        if name.endswith("bias"):
            assert not parameter.any(), name
        elif "ln_" in name:
            assert (parameter == 1).all(), name
        else:
            assert 0.015 < float(parameter.detach().std()) < 0.025, name


# -- files of weights


@pytest.fixture
def saved(tmp_path):
    tokenizer = build("ordered", **TINY["ordered"])
    tokenizer.save_pretrained(tmp_path / "saved")
    return tokenizer, tmp_path / "saved"


def same(found, tokenizer):
    expected = tokenizer.state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in found.state_dict().items())


def rewritten(folder, change):
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors")


def test_a_folder_tells_what_it_holds(saved):
    tokenizer, folder = saved
    content = json.loads((folder / "config.json").read_text())
    assert content["tokenizer"] == "ordered" and content["options"]["tokens"] == 6 and content["vtc"]
    assert content["options"]["levels"] == [8, 8, 8, 5, 5, 5]
    for path in (folder, str(folder), folder / "model.safetensors"):
        again = from_pretrained(path)
        same(again, tokenizer)
        assert again.config == tokenizer.config and not again.training
    changed = from_pretrained(folder, epsilon=0.3)
    assert changed.config.epsilon == 0.3 and changed.config.tokens == 6
    with pytest.raises(ValueError, match="no option 'colour'"):
        from_pretrained(folder, colour=1)


def test_saving_needs_a_folder(saved):
    tokenizer, folder = saved
    with pytest.raises(ValueError, match="is a file: a tokenizer is saved into a folder"):
        tokenizer.save_pretrained(folder / "config.json")


def test_a_class_refuses_the_weights_of_another(saved):
    _, folder = saved
    with pytest.raises(ValueError, match="is a 'ordered' tokenizer, not 'titok'"):
        get_tokenizer("titok").from_pretrained(folder)
    same(get_tokenizer("ordered").from_pretrained(folder), saved[0])


def test_weights_that_do_not_fit_are_named(saved):
    _, folder = saved

    def spoil(state):
        del state["registers"]
        state["stranger"] = torch.zeros(1)
        state["patch_embed.weight"] = torch.zeros(2, 2)

    rewritten(folder, spoil)
    with pytest.raises(ValueError) as error:
        from_pretrained(folder)
    for part in ("not of this ordered", "without registers (1)", "with unknown stranger (1)",
                 "of another shape patch_embed.weight (1)"):  # fmt: skip
        assert part in str(error.value)
    rewritten(folder, lambda state: [state.pop(key) for key in list(state) if key.startswith("decoder.")])
    with pytest.raises(ValueError, match=r"without decoder.*\.\.\. \(\d+\)"):
        from_pretrained(folder)


def test_several_files_of_weights_are_not_guessed_among(saved):
    tokenizer, folder = saved
    save_file(tokenizer.state_dict(), folder / "other.safetensors")
    with pytest.raises(
        ValueError, match=r"several files of weights \(model.safetensors, other.safetensors\)"
    ):
        from_pretrained(folder)
    same(from_pretrained(folder / "other.safetensors"), tokenizer)


def test_what_is_not_there_is_an_oserror(saved, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(OSError, match="holds no weights"):
        from_pretrained(tmp_path / "empty")
    for name in (tmp_path / "nowhere", "nowhere", "./a/b"):
        with pytest.raises(OSError, match="no folder or file"):
            from_pretrained(name)
    with pytest.raises(OSError, match="could not be fetched from the Hub"):
        from_pretrained("somebody/something")  # tests are offline


def test_weights_without_a_configuration_need_the_class(saved, tmp_path):
    tokenizer, _ = saved
    save_file(tokenizer.state_dict(), tmp_path / "bare.safetensors")
    with pytest.raises(ValueError, match="does not say which tokenizer it is"):
        from_pretrained(tmp_path / "bare.safetensors")
    same(
        get_tokenizer("ordered").from_pretrained(tmp_path / "bare.safetensors", **TINY["ordered"]), tokenizer
    )


@pytest.mark.parametrize("wrap", [
    lambda state: state,
    lambda state: {"state_dict": state, "epoch": 3},
    lambda state: {"model": state, "optimizer": {"state": {}}},
    lambda state: {"model_state_dict": state},
    lambda state: {"ema": state, "model": {key: value + 1 for key, value in state.items()}},
    lambda state: {f"module.{key}": value for key, value in state.items()},
    lambda state: {"model": {f"module.{key}": value for key, value in state.items()}},
])  # fmt: skip
def test_weights_are_found_in_what_a_trainer_wrote(saved, wrap):
    tokenizer, folder = saved
    (folder / "model.safetensors").unlink()
    torch.save(wrap(tokenizer.state_dict()), folder / "model.pth")
    same(from_pretrained(folder), tokenizer)


class Trap:
    def __reduce__(self):
        return (exec, ("open('sprung', 'w').close()",))


def test_pickles_that_run_code_are_refused(saved, tmp_path, monkeypatch):
    tokenizer, folder = saved
    monkeypatch.chdir(tmp_path)
    (folder / "model.safetensors").unlink()
    torch.save({"state_dict": tokenizer.state_dict(), "more": Trap()}, folder / "model.pt")
    with pytest.raises(ValueError, match="is not read: it is no file of weights, or would run code"):
        from_pretrained(folder)
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("form", ["json", "yaml"])
def test_published_weights_get_their_names_here(saved, monkeypatch, form):
    tokenizer, folder = saved
    cls = get_tokenizer("ordered")

    def config_from(published):
        return cls.Config(**TINY["ordered"]) if published.get("arch") == {"kind": "theirs"} else None

    def rename(state):
        return {key.removeprefix("theirs."): value for key, value in state.items() if key != "loss.weight"}

    monkeypatch.setattr(cls, "config_from", staticmethod(config_from))
    monkeypatch.setattr(cls, "rename", staticmethod(rename))
    (folder / "config.json").unlink()
    text = "arch:\n  kind: theirs\n" if form == "yaml" else '{"arch": {"kind": "theirs"}}'
    (folder / f"config.{form}").write_text(text)
    published = {f"theirs.{key}": value for key, value in tokenizer.state_dict().items()}
    save_file(published | {"loss.weight": torch.zeros(3)}, folder / "model.safetensors")
    for load in (from_pretrained, cls.from_pretrained):
        same(load(folder), tokenizer)
    assert from_pretrained(folder, epsilon=0.3).config.epsilon == 0.3
    # what was saved here already has the names of here: nothing is renamed
    monkeypatch.setattr(cls, "rename", staticmethod(lambda state: {}))
    tokenizer.save_pretrained(folder / "own")
    same(from_pretrained(folder / "own"), tokenizer)


def test_attention_is_unchanged_by_dropping_what_is_masked():
    block, x = Block(16, 2), torch.randn(2, 6, 16)
    valid = torch.tensor([[True, True, False, False], [True, True, False, False]])
    masked = block(x, present(2, valid))[:, :4]
    torch.testing.assert_close(masked, block(x[:, :4]), atol=1e-6, rtol=1e-5)
    assert not torch.allclose(block(x)[:, :4], masked, atol=1e-4)
