"""What holds of every tokenizer. What each one computes: tests/test_tokenizer_<name>.py."""

import copy
import dataclasses
import functools
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_tokenizers import TINY

from vtc.tokenizers import (
    Complexity,
    Fixed,
    Halting,
    MeanBudget,
    Oracle,
    Shuffled,
    TargetQuality,
    TokenSequence,
    build,
    from_pretrained,
    get_tokenizer,
    list_tokenizers,
)

NAMES = [name for name, options in TINY.items() if options is not None]
README = Path(__file__).parents[1] / "README.md"
every_tokenizer = pytest.mark.parametrize("name", NAMES)


@functools.cache
def made(name):
    """A small one in evaluation mode, of random weights so large that what they do is more than rounding."""
    torch.manual_seed(0)
    tokenizer = build(name, **TINY[name])
    with torch.no_grad():
        for parameter in tokenizer.parameters():
            noise = torch.randn_like(parameter)
            if parameter.dim() > 1:
                parameter.copy_(2 * noise * parameter[0].numel() ** -0.5)
            else:  # norms and biases
                parameter.add_(0.2 * noise)
    return tokenizer.eval()


def pictures(tokenizer, n=3):
    """Flat ones and noisy ones in turn, so that they are far from each other."""
    side, generator = tokenizer.config.image_size, torch.Generator().manual_seed(1)
    noise = torch.rand(n, 3, side, side, generator=generator)
    level = torch.rand(n, 3, 1, 1, generator=generator)
    share = torch.linspace(0, 1, n)[:, None, None, None]
    return level + share * (noise - level)


def beside(tokenizer, rows):
    """What decoding takes beside the tokens, of some of many pictures."""
    if tokenizer.name != "ta-titok":
        return {}
    c, generator = tokenizer.config, torch.Generator().manual_seed(2)
    return {"text": torch.randn(8, c.text_length, c.text_dim, generator=generator)[rows]}


def decode(tokenizer, tokens, length=None, rows=None):
    rows = slice(0, len(tokens)) if rows is None else rows
    with torch.no_grad():
        return tokenizer.decode(tokens, length, **beside(tokenizer, rows))


def encode(tokenizer, images, length=None):
    with torch.no_grad():
        return tokenizer.encode(images, length)


def some(tokenizer):
    """The shortest length, one between and the longest."""
    lengths = list(tokenizer.lengths)
    return sorted({lengths[0], lengths[len(lengths) // 2], lengths[-1]})


def ragged(tokenizer, n):
    return [some(tokenizer)[i % len(some(tokenizer))] for i in range(n)]


def same_tokens(found, expected):
    assert found.lengths.tolist() == expected.lengths.tolist()
    assert torch.equal(found.index, expected.index)
    assert (found.ids is None) == (expected.ids is None)
    assert found.ids is None or torch.equal(found.ids, expected.ids)
    torch.testing.assert_close(found.values, expected.values, atol=1e-5, rtol=1e-4)


def same_pictures(found, expected):
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


# -- what is told of it


def test_every_tokenizer_is_tested():
    assert sorted(TINY) == list_tokenizers()
    assert [name for name, options in TINY.items() if options is None] == []


@pytest.mark.parametrize("name", sorted(TINY))
def test_the_readme_lists_it(name):
    assert f"`{name}`" in README.read_text()


@pytest.mark.parametrize("name", list_tokenizers())
def test_it_tells_what_it_is(name):
    cls = get_tokenizer(name)
    assert cls.name == name and re.fullmatch(r"[a-z][a-z0-9-]*", name)
    assert re.search(r"arXiv:\d{4}\.\d{5}", cls.paper)
    assert cls.weights and not (cls.published and cls.weights == "none published")
    assert cls.__doc__ and "\n" in cls.__doc__.strip()
    assert dataclasses.is_dataclass(cls.Config) and cls.Config.__dataclass_params__.frozen
    assert all(field.default is not dataclasses.MISSING for field in dataclasses.fields(cls.Config))
    assert all(isinstance(config, cls.Config) for config in cls.published.values())


@every_tokenizer
def test_the_outline_is_that_of_the_tokenizer(name):
    tokenizer = made(name)
    assert type(tokenizer).outline(tokenizer.config) == (tokenizer.lengths, tokenizer.quantize.size)


@every_tokenizer
def test_lengths_ascend_and_bits_are_those_of_the_bottleneck(name):
    tokenizer = made(name)
    lengths = list(tokenizer.lengths)
    assert lengths[0] >= 1 and lengths == sorted(set(lengths)) and tokenizer.max_tokens == lengths[-1]
    size = tokenizer.quantize.size
    assert tokenizer.bits_per_token == (16 * tokenizer.quantize.dim if size is None else math.log2(size))


@every_tokenizer
def test_options_that_do_not_exist_are_named(name):
    with pytest.raises(ValueError, match=rf"{name} has no option 'colour'; it has .*image_size"):
        build(name, **TINY[name], colour="blue")
    with pytest.raises(TypeError, match="Config"):
        get_tokenizer(name)(TINY[name])


def test_an_unknown_name_is_told_a_near_one():
    with pytest.raises(ValueError, match="did you mean 'titok'"):
        build("titokk")
    with pytest.raises(ValueError, match="known: alit, alto"):
        get_tokenizer("#")


# -- encoding and decoding


@every_tokenizer
def test_shapes_ranges_and_lengths(name):
    tokenizer = made(name)
    images, q = pictures(tokenizer), tokenizer.quantize
    for k in (None, *some(tokenizer)):
        tokens = encode(tokenizer, images, k)
        n = tokenizer.max_tokens if k is None else k
        assert tokens.lengths.tolist() == [n] * 3 and tokens.lengths.dtype == torch.long
        assert tokens.values.shape == (3, n, q.dim) and tokens.values.isfinite().all()
        assert tokens.index.shape == (3, n) and (tokens.index.diff(dim=1) > 0).all()
        assert int(tokens.index.min()) >= 0 and int(tokens.index.max()) < tokenizer.max_tokens
        assert (tokens.ids is None) == (q.size is None)
        if q.size is not None:
            assert tokens.ids.shape == (3, n) and tokens.ids.dtype == torch.long
            assert int(tokens.ids.min()) >= 0 and int(tokens.ids.max()) < q.size
        decoded = decode(tokenizer, tokens)
        assert decoded.shape == images.shape and decoded.isfinite().all()
        assert float(decoded.min()) >= 0 and float(decoded.max()) <= 1


@every_tokenizer
def test_pictures_differ_by_their_tokens_and_tokens_by_their_pictures(name):
    tokenizer = made(name)
    tokens = encode(tokenizer, pictures(tokenizer, 8))
    decoded = decode(tokenizer, tokens, rows=[0] * 8)
    assert len(tokens.values.unique(dim=0)) > 1
    assert float((decoded - decoded[:1]).abs().max()) > 1e-2


@every_tokenizer
def test_calling_it_encodes_and_decodes(name):
    tokenizer = made(name)
    images, k = pictures(tokenizer), some(tokenizer)[0]
    with torch.no_grad():
        found = tokenizer(images, k, **beside(tokenizer, slice(0, 3)))
    assert torch.equal(found, decode(tokenizer, encode(tokenizer, images, k)))


@every_tokenizer
def test_a_batch_is_as_its_images_alone(name):
    tokenizer = made(name)
    images = pictures(tokenizer, 4)
    for lengths in (None, ragged(tokenizer, 4), ragged(tokenizer, 4)[::-1]):
        batch = encode(tokenizer, images, lengths)
        decoded = decode(tokenizer, batch)
        assert lengths is None or batch.lengths.tolist() == lengths
        for i in range(4):
            alone = encode(tokenizer, images[i : i + 1], None if lengths is None else lengths[i])
            same_tokens(batch[i], alone)
            same_pictures(decoded[i : i + 1], decode(tokenizer, alone, rows=[i]))


@every_tokenizer
def test_a_prefix_is_the_encoding_with_fewer_tokens(name):
    tokenizer = made(name)
    images = pictures(tokenizer)
    for k in (*some(tokenizer), ragged(tokenizer, 3)):
        fewer = encode(tokenizer, images, k)
        if not tokenizer.prefix_stable:
            decode(tokenizer, fewer)
            continue
        tokens = encode(tokenizer, images)
        same_tokens(fewer, tokens.truncate(k))
        expected = decode(tokenizer, fewer)
        same_pictures(decode(tokenizer, tokens, k), expected)
        same_pictures(decode(tokenizer, tokens.truncate(k)), expected)


@every_tokenizer
def test_padding_has_no_part_in_the_picture(name):
    tokenizer = made(name)
    images = pictures(tokenizer, 2)
    short = encode(tokenizer, images, some(tokenizer)[0])
    long = encode(tokenizer, images)
    expected = decode(tokenizer, short)
    padded = TokenSequence.cat([short, long])[torch.tensor([0, 1])]
    joined = TokenSequence.cat([short, long])
    same_pictures(decode(tokenizer, padded), expected)
    same_pictures(decode(tokenizer, joined, rows=[0, 1, 0, 1])[:2], expected)
    # nor has what stands there
    junk = torch.where(joined.valid[..., None], joined.values, torch.full_like(joined.values, 7.0))
    with torch.no_grad():
        found = tokenizer.decode_values(
            junk, joined.valid, joined.index, **beside(tokenizer, [0, 1, 0, 1])
        ).clamp(0, 1)
    same_pictures(found[:2], expected)


@every_tokenizer
def test_codes_are_all_that_must_be_kept(name):
    tokenizer = made(name)
    tokens = encode(tokenizer, pictures(tokenizer), ragged(tokenizer, 3))
    if tokenizer.quantize.size is None:
        with pytest.raises(ValueError, match="continuous"):
            tokenizer.tokens_of(torch.zeros(1, tokenizer.max_tokens, dtype=torch.long))
        return
    with torch.no_grad():
        again = tokenizer.tokens_of(tokens.ids, tokens.lengths, tokens.index)
        bare = tokenizer.tokens_of(tokens.ids)
    same_tokens(again, tokens)
    assert bare.lengths.tolist() == tokens.lengths.tolist()
    same_pictures(decode(tokenizer, again), decode(tokenizer, tokens))
    for wrong in (-2, tokenizer.quantize.size):
        ids = tokens.ids.clone()
        ids[0, 0] = wrong
        with pytest.raises(ValueError, match=f"codes are numbered 0 to {tokenizer.quantize.size - 1}"):
            tokenizer.tokens_of(ids, tokens.lengths)


@every_tokenizer
def test_no_images_have_no_tokens(name):
    tokenizer = made(name)
    images = pictures(tokenizer)[:0]
    for length in (None, tokenizer.max_tokens, Fixed(1)):
        tokens = encode(tokenizer, images, length)
        assert len(tokens) == 0 and tokens.lengths.tolist() == []
        assert decode(tokenizer, tokens).shape == images.shape


@every_tokenizer
def test_nothing_is_drawn(name):
    tokenizer = made(name)
    images = pictures(tokenizer)
    results = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        tokens = encode(tokenizer, images)
        results.append((tokens.values, decode(tokenizer, tokens)))
        assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


# -- weights and training


@every_tokenizer
def test_weights_are_saved_and_loaded_bit_by_bit(name, tmp_path):
    tokenizer = made(name)
    tokenizer.save_pretrained(tmp_path / "saved")
    images = pictures(tokenizer)
    tokens = encode(tokenizer, images)
    for load in (from_pretrained, get_tokenizer(name).from_pretrained):
        again = load(tmp_path / "saved")
        assert type(again) is type(tokenizer) and again.config == tokenizer.config and not again.training
        state, expected = again.state_dict(), tokenizer.state_dict()
        assert list(state) == list(expected)
        assert all(torch.equal(value, expected[key]) for key, value in state.items())
        assert torch.equal(encode(again, images).values, tokens.values)
        assert torch.equal(decode(again, tokens), decode(tokenizer, tokens))


@every_tokenizer
def test_gradients_go_through_the_bottleneck(name):
    tokenizer = made(name)
    tokenizer.zero_grad()
    tokenizer.encode(pictures(tokenizer)).values.square().sum().backward()
    reached = {key for key, p in tokenizer.named_parameters() if p.grad is not None and bool(p.grad.any())}
    tokenizer.zero_grad()
    assert {key for key in reached if not key.startswith("quantize.")}


@every_tokenizer
def test_it_runs_in_half_precision(name):
    tokenizer = made(name)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        tokens = encode(tokenizer, pictures(tokenizer), ragged(tokenizer, 3))
        decoded = decode(tokenizer, tokens)
    assert tokens.values.isfinite().all() and decoded.isfinite().all()
    assert float(decoded.min()) >= 0 and float(decoded.max()) <= 1


@every_tokenizer
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_it_moves_to_another_type(name, dtype):
    tokenizer = made(name)
    moved, images = copy.deepcopy(tokenizer).to(dtype), pictures(tokenizer)
    tokens = encode(moved, images, ragged(moved, 3))
    decoded = decode(moved, tokens)
    assert decoded.dtype == dtype and decoded.isfinite().all()
    if tokenizer.halts:
        with torch.no_grad():
            assert moved.halt(images).values.isfinite().all()
    if tokens.ids is not None:  # codes are all that must be kept
        looked_up = moved.tokens_of(tokens.ids, tokens.lengths, tokens.index)
        torch.testing.assert_close(looked_up.values, tokens.values, atol=1e-5, rtol=1e-4)
    if dtype == torch.float64:
        expected = encode(tokenizer, images, ragged(tokenizer, 3))
        torch.testing.assert_close(tokens.values.float(), expected.values, atol=1e-4, rtol=1e-3)
        same_pictures(decoded.float(), decode(tokenizer, expected))


# -- lengths


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int32", "int64"])
def test_lengths_are_taken_as_numpy_has_them(dtype):
    tokenizer = made("ordered")
    images = pictures(tokenizer)
    lengths = ragged(tokenizer, 3)
    same_tokens(encode(tokenizer, images, np.array(lengths, dtype)), encode(tokenizer, images, lengths))
    assert len(encode(tokenizer, images[:0], [])) == 0
    with pytest.raises(ValueError, match="a length is a whole number"):
        encode(tokenizer, images, "3")


def policies(tokenizer, images):
    """Every kind, with settings that tell these images apart where that is possible."""
    lengths, most = list(tokenizer.lengths), tokenizer.max_tokens
    middle = (lengths[0] + most) / 2
    scores = Complexity("gradient").scores(images)
    error = (decode(tokenizer, encode(tokenizer, images)) - images).abs().flatten(1).mean(1).median().item()
    return [
        Fixed(1),
        Fixed(most),
        Halting(),
        Halting(0.1),
        TargetQuality("l1", error + 1e-3),
        TargetQuality("psnr", 8.0, exhaustive=True),
        Complexity("gradient", (1, most), (scores.median().item() + 1e-4,)) if most > 1 else Fixed(1),
        MeanBudget(most, Halting()),
        MeanBudget(middle, TargetQuality("mse")),
        MeanBudget(middle, Complexity("gradient")),
        Oracle("l1", target=error),
        Oracle("mse", mean=middle),
        Shuffled(Complexity("jpeg", lengths=(1,), thresholds=())),
    ]


def refusal(tokenizer, policy):
    """What is said where the policy cannot be: by tokenizers without a head, or that decode with more."""
    inner = getattr(policy, "policy", policy)
    if isinstance(inner, Halting) and not tokenizer.halts:
        return "no halting or length head; these have: "
    told = isinstance(policy, MeanBudget) or getattr(inner, "epsilon", None) is not None
    if isinstance(inner, Halting) and told and tokenizer.name == "alto":
        return "halt takes no epsilon"
    if isinstance(inner, (TargetQuality, Oracle)) and beside(tokenizer, slice(0, 1)):
        # who has one length only need not decode to find it
        return "give text=" if getattr(policy, "mean", None) or len(tokenizer.lengths) > 1 else None
    return None


@every_tokenizer
def test_every_policy_works_or_says_why_not(name):
    tokenizer = made(name)
    images = pictures(tokenizer, 4)
    for policy in policies(tokenizer, images):
        message = refusal(tokenizer, policy)
        if message:
            with pytest.raises(ValueError, match=message):
                if isinstance(policy, MeanBudget):
                    policy = policy.calibrate(tokenizer, images)
                encode(tokenizer, images, policy)
            continue
        if isinstance(policy, MeanBudget):
            policy = policy.calibrate(tokenizer, images)
            assert policy.measured <= policy.mean
        tokens = encode(tokenizer, images, policy)
        halting = isinstance(getattr(policy, "policy", policy), Halting)
        allowed = range(1, tokenizer.max_tokens + 1) if halting else tokenizer.lengths
        assert set(tokens.lengths.tolist()) <= set(allowed)
        assert tokens.values.shape[:2] == (4, int(tokens.lengths.max()))
        decode(tokenizer, tokens)
        if policy.evaluation_only:
            continue
        for i in range(4):
            same_tokens(encode(tokenizer, images[i : i + 1], policy), tokens[i])


@every_tokenizer
def test_what_halts_in_a_batch_halts_alone(name):
    tokenizer = made(name)
    if not tokenizer.halts:
        with pytest.raises(ValueError, match=f"{name} has no halting or length head; these have: .*karl"):
            tokenizer.halt(pictures(tokenizer))
        return
    images = pictures(tokenizer, 5)
    with torch.no_grad():
        tokens = tokenizer.halt(images)
        decoded = decode(tokenizer, tokens)
        assert int(tokens.lengths.min()) >= 1 and int(tokens.lengths.max()) <= tokenizer.max_tokens
        for i in range(5):
            alone = tokenizer.halt(images[i : i + 1])
            same_tokens(alone, tokens[i])
            same_pictures(decode(tokenizer, alone), decoded[i : i + 1])
        with pytest.raises(ValueError):
            tokenizer.halt(images * 255)


# -- what is refused


@every_tokenizer
def test_bad_input_is_refused_and_leaves_no_trace(name):
    tokenizer = made(name)
    images, most = pictures(tokenizer), tokenizer.max_tokens
    state = {key: value.clone() for key, value in tokenizer.state_dict().items()}
    generator = torch.get_rng_state()
    tokens = encode(tokenizer, images)

    bad_images = [
        (images * 255).byte(), images[0], images[:, :1], images[..., :-1], images[..., :4, :4],
        images * 255, images * 2 - 1, torch.full_like(images, torch.nan), torch.full_like(images, torch.inf),
    ]  # fmt: skip
    for bad in bad_images:
        for length in (None, most, Fixed(1), Complexity("jpeg", (1,), ())):
            with pytest.raises(ValueError, match="images"):
                encode(tokenizer, bad, length)

    gaps = sorted(set(range(1, most)) - set(tokenizer.lengths))[:1]
    for bad in (
        0,
        -1,
        most + 1,
        1.5,
        True,
        [most] * 2,
        [[most] * 3],
        [most, 0, most],
        torch.tensor(1.0),
        *gaps,
    ):
        with pytest.raises(ValueError):
            encode(tokenizer, images, bad)
        with pytest.raises(ValueError):
            decode(tokenizer, tokens, bad)
    with pytest.raises(ValueError, match=f"{most} tokens at most, not to {most + 1}"):
        encode(tokenizer, images, Fixed(most + 1))

    dim = tokenizer.quantize.dim
    with pytest.raises(ValueError, match="without tokens"):
        decode(tokenizer, TokenSequence(tokens.values, torch.tensor([most, 0, most])))
    for shape in ((3, most + 1, dim), (3, most, dim + 1)):
        with pytest.raises(ValueError, match=f"decodes up to {most} tokens of {dim} numbers"):
            decode(tokenizer, TokenSequence.of(torch.zeros(shape)))

    assert torch.equal(torch.get_rng_state(), generator)
    assert all(torch.equal(value, state[key]) for key, value in tokenizer.state_dict().items())
    same_tokens(encode(tokenizer, images), tokens)


@every_tokenizer
def test_rounding_a_little_beyond_the_range_is_taken(name):
    tokenizer = made(name)
    images = pictures(tokenizer)
    images[0, 0, 0, 0], images[1, 0, 0, 0] = -0.004, 1.004
    assert encode(tokenizer, images).values.isfinite().all()
