"""Length policies, on a tokenizer whose error at every length is written down: all answers are known."""

import io
import itertools
import json
import math
from dataclasses import dataclass, replace

import pytest
import torch
from PIL import Image

from vtc.tokenizers import (
    Complexity,
    Continuous,
    Fixed,
    Halting,
    MeanBudget,
    Oracle,
    Policy,
    Shuffled,
    TargetQuality,
    Tokenizer,
    TokenSequence,
    parse_policy,
    policy_from,
)
from vtc.tokenizers.complexity import gradient_energy, jpeg_bytes
from vtc.tokenizers.errors import error_of, l1, mse, psnr
from vtc.tokenizers.oracle import allocate
from vtc.tokenizers.parse import FORMS
from vtc.tokenizers.policies import round_up
from vtc.tokenizers.quality import error_curves


class Scripted(Tokenizer):
    """Picture i, grey of value i / 100, comes out brighter by curves[i][j] at length number j."""

    name, paper, halts = "scripted", "", True

    @dataclass(frozen=True)
    class Config:
        image_size: int = 4
        sizes: tuple[int, ...] = tuple(range(1, 9))

    def __init__(self, curves, sizes=None):
        super().__init__(self.Config(sizes=tuple(sizes or range(1, len(curves[0]) + 1))))
        self.quantize = Continuous(2)
        self.curves = torch.tensor(curves)
        self.offset = torch.nn.Parameter(torch.zeros(()))
        self.decoded = []  # (picture, length) of every decoded picture

    @property
    def lengths(self):
        return self.config.sizes

    def encode_images(self, images, k):
        value = images.flatten(1).mean(1)[:, None, None].expand(-1, k, 1) + self.offset
        return TokenSequence.of(torch.cat([value, torch.full_like(value, k)], 2))

    def decode_values(self, values, valid, index):
        picture, lengths = (values[:, 0, 0] * 100).round().long(), valid.sum(1)
        self.decoded += zip(picture.tolist(), lengths.tolist(), strict=True)
        column = torch.searchsorted(torch.tensor(self.lengths), lengths)
        brightness = values[:, 0, 0] + self.curves[picture, column]
        return brightness[:, None, None, None].expand(-1, 3, 4, 4)

    def halt(self, images, epsilon=None):
        enough = self.curves[(images[:, 0, 0, 0] * 100).round().long()] <= (epsilon or 0.1)
        enough[:, -1] = True
        column = enough.int().argmax(1)
        return self.encode_images(images, self.max_tokens).truncate(torch.tensor(self.lengths)[column])


class Anew(Scripted):
    """The same, where tokens tell for what length they were made, and are of no use at another."""

    prefix_stable = False

    def decode_values(self, values, valid, index):
        assert torch.equal(values[:, 0, 1].long(), valid.sum(1))
        return super().decode_values(values, valid, index)


def pictures(n):
    return (torch.arange(n) / 100)[:, None, None, None].expand(n, 3, 4, 4).clone()


def falling(n=10, lengths=8, seed=0):
    """Error curves between 0 and 0.5 that fall with the length."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(n, lengths, generator=generator).sort(1, descending=True).values.div(2).tolist()


def first_below(curve, target, sizes):
    return next((size for size, error in zip(sizes, curve, strict=True) if error <= target), sizes[-1])


# -- errors


def test_errors_are_those_of_each_image():
    images, others = torch.rand(3, 3, 5, 4), torch.rand(3, 3, 5, 4)
    for i in range(3):
        differences = [float(a - b) for a, b in zip(images[i].flatten(), others[i].flatten(), strict=True)]
        square = sum(d * d for d in differences) / 60
        assert float(l1(images, others)[i]) == pytest.approx(sum(map(abs, differences)) / 60, rel=1e-5)
        assert float(mse(images, others)[i]) == pytest.approx(square, rel=1e-5)
        assert float(psnr(images, others)[i]) == pytest.approx(10 * math.log10(1 / square), rel=1e-5)
    assert l1(images, images).tolist() == [0, 0, 0] and psnr(images, images).tolist() == [math.inf] * 3


def test_an_error_is_the_lower_the_better():
    images, others = torch.rand(2, 3, 4, 4), torch.rand(2, 3, 4, 4)
    assert torch.equal(error_of("psnr")(images, others), -psnr(images, others).double())
    assert torch.equal(error_of("mse")(images, others), mse(images, others).double())
    assert error_of(lambda a, b: torch.tensor([1.0, 2.0]))(images, others).tolist() == [1, 2]


@pytest.mark.parametrize("metric", [
    "ssim", lambda a, b: 0.1, lambda a, b: torch.zeros(5), lambda a, b: torch.full((2,), torch.nan)
])  # fmt: skip
def test_what_is_no_error_is_refused(metric):
    with pytest.raises(ValueError, match="an error is one"):
        error_of(metric)(pictures(2), pictures(2))


# -- fixed, and lengths that a tokenizer does not have


def test_fixed_gives_every_image_the_same():
    tokenizer = Scripted(falling())
    assert tokenizer.encode(pictures(3), Fixed(5)).lengths.tolist() == [5, 5, 5]
    with pytest.raises(ValueError, match="8 tokens at most, not to 9"):
        tokenizer.encode(pictures(3), Fixed(9))
    for k in (0, -1, 1.5, True, "3", None):
        with pytest.raises(ValueError, match="k is a whole number of tokens of 1 or more"):
            Fixed(k)


@pytest.mark.parametrize("kind", [Scripted, Anew])
def test_lengths_are_rounded_up_to_those_that_there_are(kind):
    tokenizer = kind(falling(lengths=3), sizes=(2, 4, 8))
    rounded = round_up(tokenizer, torch.tensor([1, 2, 3, 4, 5, 8]))
    assert rounded.tolist() == [2, 2, 4, 4, 8, 8]
    assert tokenizer.encode(pictures(2), Fixed(3)).lengths.tolist() == [4, 4]
    policy = Complexity(lambda x: x.flatten(1).mean(1), lengths=(1, 3, 7), thresholds=(0.005, 0.015))
    tokens = tokenizer.encode(pictures(3), policy)
    assert tokens.lengths.tolist() == [2, 4, 8]
    tokenizer.decode(tokens)
    assert Scripted([[0.3]] * 3, sizes=(32,)).encode(pictures(3), Fixed(1)).lengths.tolist() == [32] * 3


def test_a_policy_of_ones_own_defines_choose():
    class Odd(Policy):
        def choose(self, tokenizer, images):
            return 1 + 2 * torch.arange(len(images))

    assert Scripted(falling()).encode(pictures(3), Odd()).lengths.tolist() == [1, 3, 5]


# -- target quality


@pytest.mark.parametrize("kind", [Scripted, Anew])
@pytest.mark.parametrize("sizes", [None, (3, 5, 20)])
@pytest.mark.parametrize("exhaustive", [False, True])
def test_the_search_finds_the_shortest_length_that_reaches_the_target(kind, sizes, exhaustive):
    curves = falling(lengths=len(sizes or range(8)))
    tokenizer = kind(curves, sizes)
    for target in (0.0, 0.1, 0.2, 0.3, 0.45, 0.6):
        expected = [first_below(curve, target, tokenizer.lengths) for curve in curves]
        tokens = tokenizer.encode(pictures(10), TargetQuality("l1", target, exhaustive))
        assert tokens.lengths.tolist() == expected
        tokenizer.decode(tokens)


@pytest.mark.parametrize("metric, target", [
    ("mse", 0.04), ("psnr", 10 * math.log10(1 / 0.04)), (lambda a, b: l1(a, b) * 7, 1.4)
])  # fmt: skip
def test_the_same_target_in_another_metric_gives_the_same_lengths(metric, target):
    curves = falling()
    expected = [first_below(curve, 0.2, range(1, 9)) for curve in curves]
    assert Scripted(curves).encode(pictures(10), TargetQuality(metric, target)).lengths.tolist() == expected


def test_an_image_that_never_reaches_the_target_gets_all_tokens():
    for exhaustive in (False, True):
        tokens = Scripted([[0.4] * 8, [0.1] * 8]).encode(pictures(2), TargetQuality("l1", 0.2, exhaustive))
        assert tokens.lengths.tolist() == [8, 1]


def test_the_search_decodes_what_it_must_and_no_more():
    curves = falling(lengths=64)
    tokenizer = Scripted(curves)
    tokenizer.encode(pictures(10), TargetQuality("l1", 0.2))
    decodes = [sum(picture == i for picture, _ in tokenizer.decoded) for i in range(10)]
    assert max(decodes) <= 6 and len(set(tokenizer.decoded)) == len(tokenizer.decoded)

    tokenizer = Scripted([[0.1] * 8, [0.4] * 6 + [0.1] * 2])
    tokenizer.encode(pictures(2), TargetQuality("l1", 0.2, exhaustive=True))
    assert [length for picture, length in tokenizer.decoded if picture == 0] == [1]
    assert [length for picture, length in tokenizer.decoded if picture == 1] == [1, 2, 3, 4, 5, 6, 7]

    tokenizer = Scripted([[0.4]], sizes=(32,))
    assert tokenizer.encode(pictures(1), TargetQuality("l1", 0.2)).lengths.tolist() == [32]
    assert tokenizer.decoded == []  # there is nothing to choose


def test_only_the_exhaustive_search_sees_a_good_length_in_front_of_worse_ones():
    tokenizer = Scripted([[0.3, 0.1, 0.3, 0.3, 0.3, 0.3, 0.1, 0.1]])
    assert tokenizer.encode(pictures(1), TargetQuality("l1", 0.2)).lengths.tolist() == [7]
    assert tokenizer.encode(pictures(1), TargetQuality("l1", 0.2, exhaustive=True)).lengths.tolist() == [2]


def test_a_search_leaves_the_way_of_gradients_open():
    tokenizer = Scripted(falling())
    tokenizer.encode(pictures(4), TargetQuality("l1", 0.2)).values.sum().backward()
    assert tokenizer.offset.grad is not None


def test_a_quality_without_a_target_says_what_to_do():
    with pytest.raises(ValueError, match="needs a target, or a mean budget"):
        Scripted(falling()).encode(pictures(1), TargetQuality("mse"))
    for target in (math.nan, math.inf, "x", True):
        with pytest.raises(ValueError, match="target is a"):
            TargetQuality("mse", target)
    with pytest.raises(ValueError, match="l1, mse, psnr, wrong or a function"):
        TargetQuality("lpips", 1.0)


def test_error_curves_are_of_all_lengths_and_images():
    curves = falling(40)
    found = error_curves(Scripted(curves), pictures(40))
    assert found.dtype == torch.float64 and torch.allclose(found.float(), torch.tensor(curves), atol=1e-6)
    assert torch.equal(error_curves(Anew(curves), pictures(40).split(7)), found)


# -- halting


def test_halting_asks_the_tokenizer():
    curves = falling()
    for epsilon, meant in ((None, 0.1), (0.3, 0.3)):
        lengths = Scripted(curves).encode(pictures(10), Halting(epsilon)).lengths
        assert lengths.tolist() == [first_below(curve, meant, range(1, 9)) for curve in curves]
    assert Halting(0.3).choose(Scripted(curves), pictures(10)).tolist() == lengths.tolist()


def test_halting_is_refused_where_there_is_no_head():
    tokenizer = Scripted(falling())
    tokenizer.halt = lambda images, epsilon: Tokenizer.halt(tokenizer, images, epsilon)
    for policy in (Halting(), Halting(0.1)):
        with pytest.raises(ValueError, match=r"no halting or length head; these have: .*ordered"):
            tokenizer.encode(pictures(1), policy)
    for epsilon in (0, -0.1, math.nan, math.inf, "x"):
        with pytest.raises(ValueError, match="epsilon is a number"):
            Halting(epsilon)


# -- mean budgets


def grey(images):
    return images.flatten(1).mean(1)


TUNABLE = [Halting(), TargetQuality("l1"), TargetQuality("mse"), TargetQuality("psnr", exhaustive=True),
           Complexity(grey), Complexity(grey, lengths=(2, 3, 8))]  # fmt: skip
NAMES = ["halting", "l1", "mse", "psnr", "grey", "grey of three"]  # the same in every process


@pytest.mark.parametrize("policy", TUNABLE, ids=NAMES)
@pytest.mark.parametrize("mean", [2, 2.35, 4, 5.5, 7.9])
@pytest.mark.parametrize("kind", [Scripted, Anew])
def test_a_mean_budget_is_kept_and_used(policy, mean, kind):
    tokenizer, images = kind(falling(31)), pictures(31)
    budget = MeanBudget(mean, policy).calibrate(tokenizer, images)
    lengths = tokenizer.encode(images, budget).lengths
    assert budget.measured == pytest.approx(float(lengths.double().mean())) and budget.measured <= mean
    # one image, by its next step, would go beyond
    step = 5 if getattr(policy, "lengths", None) else 7
    assert int(lengths.sum()) > mean * 31 - step
    singles = [int(tokenizer.encode(image[None], budget).lengths) for image in images]
    assert singles == lengths.tolist()


@pytest.mark.parametrize("metric", ["l1", "psnr", "mse"])
def test_no_other_target_uses_the_budget_better(metric):
    curves = falling(9, 5, seed=3)
    tokenizer, images = Scripted(curves), pictures(9)
    critical = sorted({error for curve in curves for error in curve} | {0.0})
    means = [sum(first_below(c, t, range(1, 6)) for c in curves) / 9 for t in critical]
    for mean in torch.linspace(1, 5, 17).tolist():
        measured = MeanBudget(mean, TargetQuality(metric)).calibrate(tokenizer, images).measured
        assert measured == max(m for m in means if m <= mean) or 9 * (mean - measured) < 1


def test_a_target_that_was_found_is_not_at_an_edge():
    curves = falling(5, 2)
    for policy in (TargetQuality("l1"), Halting()):
        budget = MeanBudget(50, policy).calibrate(Scripted(curves, sizes=(1, 100)), pictures(5))
        assert budget.measured == (2 * 100 + 3) / 5  # a third would be too many
        for noise in (-1e-5, 1e-5):
            shaken = Scripted((torch.tensor(curves) + noise).tolist(), sizes=(1, 100))
            assert int(shaken.encode(pictures(5), budget).lengths.sum()) == 2 * 100 + 3


def test_calibration_decodes_an_image_at_a_length_once():
    tokenizer = Scripted(falling(20, 32))
    TargetQuality("l1").calibrate(tokenizer, pictures(20), 9)
    assert len(set(tokenizer.decoded)) == len(tokenizer.decoded) < 20 * 32


def test_errors_that_rise_on_the_way_do_not_hide_a_budget():
    curves = [[0.1, 0.1, 0.1, 0.4, 0.4, 0.1, 0.1, 0.1]] * 3  # at both ends less than between
    assert MeanBudget(1, TargetQuality("l1")).calibrate(Scripted(curves), pictures(3)).measured == 1


def test_a_budget_for_all_tokens_and_for_the_fewest():
    tokenizer, images = Scripted(falling()), pictures(10)
    for policy in TUNABLE:
        assert MeanBudget(8, policy).calibrate(tokenizer, images).measured == 8
        assert MeanBudget(100, policy).calibrate(tokenizer, images).measured == 8
        least = 2 if getattr(policy, "lengths", None) else 1
        assert MeanBudget(least, policy).calibrate(tokenizer, images).measured == least


@pytest.mark.parametrize("policy", TUNABLE, ids=NAMES)
def test_a_budget_that_cannot_be_kept_is_refused(policy):
    with pytest.raises(ValueError, match="a mean of 3 tokens"):
        MeanBudget(3, policy).calibrate(Scripted(falling(lengths=3), sizes=(4, 6, 8)), pictures(10))


def test_a_head_that_does_not_heed_epsilon_is_told():
    tokenizer = Scripted(falling())
    tokenizer.halt = lambda images, epsilon: tokenizer.encode_images(images, 5)
    assert MeanBudget(6, Halting()).calibrate(tokenizer, pictures(4)).measured == 5
    with pytest.raises(ValueError, match="no setting keeps a mean of 4 tokens: the least is 5"):
        MeanBudget(4, Halting()).calibrate(tokenizer, pictures(4))


def test_calibration_takes_batches_and_does_not_ask_for_their_size():
    tokenizer, images = Scripted(falling(40)), pictures(40)
    for policy in TUNABLE:
        whole = MeanBudget(4, policy).calibrate(tokenizer, images)
        assert MeanBudget(4, policy).calibrate(tokenizer, iter(images.split(3))) == whole
    for nothing in (images[:0], [], iter(())):
        with pytest.raises(ValueError, match="calibrated on one image or more"):
            MeanBudget(4, Halting()).calibrate(tokenizer, nothing)


def test_a_mean_budget_is_calibrated_once_and_again():
    tokenizer = Scripted(falling(20))
    budget = MeanBudget(4, TargetQuality("l1"))
    for use in (budget.choose, budget.encode):
        with pytest.raises(ValueError, match="calibrated first"):
            use(tokenizer, pictures(2))
    once = budget.calibrate(tokenizer, pictures(20))
    assert budget.measured is None  # frozen: a new one
    assert once.calibrate(tokenizer, pictures(20)) == once
    assert once.calibrate(tokenizer, pictures(5)).measured <= 4


def test_a_mean_budget_refuses_what_it_cannot_tune():
    for policy in (Fixed(4), Oracle(mean=4), MeanBudget(4, Halting()), "halting", None):
        with pytest.raises(ValueError, match="tunes halting, quality or complexity"):
            MeanBudget(4, policy)
    for policy in (Halting(0.1), TargetQuality("l1", 0.1), Complexity("jpeg", (1, 2), (0.1,))):
        with pytest.raises(ValueError, match="leave out"):
            MeanBudget(4, policy)
    for mean in (0, 0.5, math.nan, math.inf, "4", None):
        with pytest.raises(ValueError, match="mean is a number"):
            MeanBudget(mean, Halting())


# -- complexity


def test_gradient_energy_is_that_of_neighbours():
    images = torch.rand(2, 3, 4, 5)
    for i in range(2):
        g = images[i].mean(0).tolist()
        across = [(g[r][c + 1] - g[r][c]) ** 2 for r in range(4) for c in range(4)]
        down = [(g[r + 1][c] - g[r][c]) ** 2 for r in range(3) for c in range(5)]
        expected = sum(across) / 16 + sum(down) / 15
        assert float(gradient_energy(images)[i]) == pytest.approx(expected, rel=1e-5)
    assert gradient_energy(torch.full((1, 3, 8, 8), 0.3)).tolist() == [0]


def test_jpeg_bytes_are_those_of_a_file():
    images = torch.rand(2, 3, 16, 24)
    images[0] = 1.005  # within what encode takes
    for i, size in enumerate(jpeg_bytes(images).tolist()):
        pixels = (images[i].clamp(0, 1) * 255).round().byte().permute(1, 2, 0).contiguous().numpy()
        Image.fromarray(pixels).save(file := io.BytesIO(), "JPEG", quality=75)
        assert size == pytest.approx(len(file.getvalue()) / (16 * 24))
    assert jpeg_bytes(images)[1] > jpeg_bytes(images)[0]


@pytest.mark.parametrize("score", ["gradient", "jpeg"])
def test_noisier_pictures_get_more_tokens_in_any_batch(score):
    noise = torch.randn(12, 3, 32, 32).clamp(-2, 2) / 4
    images = (0.5 + torch.linspace(0, 1, 12)[:, None, None, None] * noise).clamp(0, 1)
    policy = Complexity(score).calibrate(range(1, 17), images, 7)
    lengths = policy.choose(None, images)
    assert (lengths.diff() >= 0).all() and int(lengths[0]) < int(lengths[-1])
    assert torch.cat([policy.choose(None, image[None]) for image in images]).equal(lengths)
    assert policy.choose(None, images[:0]).tolist() == []


def test_a_score_at_a_threshold_gets_the_longer_length():
    policy = Complexity(lambda x: (x[:, 0, 0, 0] * 100).round(), lengths=(1, 4, 8), thresholds=(2, 5))
    assert policy.choose(None, pictures(8)).tolist() == [1, 1, 4, 4, 4, 8, 8, 8]
    assert Complexity("jpeg", lengths=(3,), thresholds=()).choose(None, pictures(2)).tolist() == [3, 3]


@pytest.mark.parametrize("seed", range(30))
def test_cut_points_keep_the_mean_and_leave_no_room(seed):
    generator = torch.Generator().manual_seed(seed)
    n = int(torch.randint(1, 40, (), generator=generator))
    sizes = sorted(set(torch.randint(1, 300, (5,), generator=generator).tolist()))
    scores = torch.rand(n, generator=generator)
    if seed % 3 == 0:
        scores = (scores * 6).round()  # many are equal
    mean = sizes[0] + float(torch.rand((), generator=generator)) * (sizes[-1] - sizes[0])
    policy = Complexity(lambda x: scores, lengths=sizes).calibrate(sizes, [torch.zeros(n, 3, 2, 2)], mean)
    lengths = policy.choose(None, torch.zeros(n, 3, 2, 2))
    budget = mean * n
    assert int(lengths.sum()) <= budget + 1e-6
    order = scores.sort(stable=True).indices
    assert (lengths[order].diff() >= 0).all()  # more for the more complex
    for score, score_lengths in ((s, lengths[scores == s]) for s in scores.unique()):
        assert len(set(score_lengths.tolist())) == 1, score
    # the most complex of those with one length cannot get the next
    for now, longer in itertools.pairwise(sizes):
        with_it = scores[lengths == now]
        if len(with_it):
            moved = int((with_it == with_it.max()).sum())
            assert int(lengths.sum()) + moved * (longer - now) > budget - 1e-6


def test_lengths_are_used_as_evenly_as_the_mean_allows():
    n, sizes = 100_000, (64, 256, 1024)
    scores = torch.rand(n, dtype=torch.float64)
    images = torch.zeros(n, 3, 1, 1)
    even = Complexity(lambda x: scores).calibrate(sizes, [images], sum(sizes) / 3)  # one batch
    even = replace(even, score=lambda x: scores)
    counts = even.choose(None, images).bincount()[list(sizes)]
    assert (counts - n / 3).abs().max() <= 2
    tuned = Complexity(lambda x: scores, sizes).calibrate(sizes, [images], 256)
    shares = tuned.choose(None, images).bincount()[list(sizes)].double() / n
    assert float(shares @ torch.tensor(sizes).double()) == pytest.approx(256, abs=0.02)
    # of highest entropy: the logarithm of a share is linear in the length
    rates = shares.log().diff() / torch.tensor(sizes).diff()
    assert float(rates[0]) == pytest.approx(float(rates[1]), rel=1e-2)


def test_lengths_come_from_the_tokenizer_where_none_are_asked_for():
    scores = torch.rand(400)
    policy = Complexity(lambda x: scores)
    images = [torch.zeros(400, 3, 1, 1)]
    assert policy.calibrate(range(1, 25), images, 9).lengths == (1, 2, 4, 8, 16, 24)
    assert policy.calibrate((32, 64, 96, 128), images, 70).lengths == (32, 64, 128)
    assert policy.calibrate((1,), images, 1).lengths == (1,)
    asked = Complexity(lambda x: scores, lengths=(10, 20, 64))
    assert asked.calibrate((32, 64, 96), images, 50).lengths == (32, 64)  # rounded up
    with pytest.raises(ValueError, match="longest length there is is 32, not 64"):
        asked.calibrate((16, 32), images, 20)


@pytest.mark.parametrize("options, message", [
    ({"score": "entropy"}, "gradient, jpeg or a function"),
    ({"lengths": (4, 2)}, "lengths ascend"),
    ({"lengths": ()}, "lengths ascend"),
    ({"lengths": (0, 2)}, "whole number of tokens"),
    ({"lengths": (1.5, 2)}, "whole number of tokens"),
    ({"lengths": (1, 2), "thresholds": (0.1, 0.2)}, "one more than thresholds"),
    ({"thresholds": (0.1,)}, "one more than thresholds"),
    ({"lengths": (1, 2, 3), "thresholds": (0.2, 0.1)}, "ascending finite"),
    ({"lengths": (1, 2), "thresholds": (math.inf,)}, "ascending finite"),
    ({"lengths": (1, 2), "thresholds": ("x",)}, "a threshold is a number"),
])  # fmt: skip
def test_what_is_no_complexity_policy_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Complexity(**options)


def test_complexity_without_thresholds_says_what_to_do():
    with pytest.raises(ValueError, match="needs lengths and thresholds, or a mean budget"):
        Scripted(falling()).encode(pictures(1), Complexity("jpeg"))
    for score in (lambda x: torch.zeros(3), lambda x: torch.full((len(x),), torch.nan)):
        with pytest.raises(ValueError, match="one finite number for each of 2 images"):
            Complexity(score, (1, 2), (0.5,)).choose(None, pictures(2))


# -- what is best, and what is chance


def brute_force(curves, sizes, mean):
    """The least sum of errors at that mean, by trying everything."""
    options = itertools.product(range(len(sizes)), repeat=len(curves))
    sums = [
        sum(curve[j] for curve, j in zip(curves, chosen, strict=True))
        for chosen in options
        if sum(sizes[j] for j in chosen) <= mean * len(curves) + 1e-9
    ]
    return min(sums)


def error_of_lengths(curves, sizes, lengths):
    return sum(curve[sizes.index(k)] for curve, k in zip(curves, lengths.tolist(), strict=True))


@pytest.mark.parametrize("seed", range(12))
def test_allocation_against_trying_everything(seed):
    generator = torch.Generator().manual_seed(seed)
    sizes = sorted(torch.randperm(12, generator=generator)[:5].add(1).tolist())
    curves = torch.rand(4, 5, generator=generator, dtype=torch.float64)
    if seed % 2:
        curves = curves.sort(1, descending=True).values
    drops = curves.max(1).values - curves.min(1).values
    for mean in torch.linspace(sizes[0], sizes[-1], 7).tolist():
        lengths = allocate(curves, sizes, mean)
        assert int(lengths.sum()) <= mean * 4 + 1e-6
        found, best = (
            error_of_lengths(curves.tolist(), sizes, lengths), brute_force(curves.tolist(), sizes, mean)
        )  # fmt: skip
        assert best - 1e-9 <= found <= best + float(drops.max())
    # where the budget is what a price of tokens leads to, nothing is better
    for price in (0.003, 0.01, 0.03, 0.1, 0.3):
        wanted = (curves + price * torch.tensor(sizes)).argmin(1)
        mean = float(torch.tensor(sizes)[wanted].sum()) / 4
        found = error_of_lengths(curves.tolist(), sizes, allocate(curves, sizes, mean))
        assert found == pytest.approx(brute_force(curves.tolist(), sizes, mean), abs=1e-9)


def test_allocation_is_exact_for_convex_errors():
    generator = torch.Generator().manual_seed(1)
    for _ in range(10):
        gains = torch.rand(4, 4, generator=generator, dtype=torch.float64).sort(1, descending=True).values
        curves = torch.cat([torch.zeros(4, 1), -gains.cumsum(1)], 1) + 5
        for tokens in range(4, 21):
            found = error_of_lengths(
                curves.tolist(), [1, 2, 3, 4, 5], allocate(curves, range(1, 6), tokens / 4)
            )
            assert found == pytest.approx(brute_force(curves.tolist(), [1, 2, 3, 4, 5], tokens / 4))


def test_allocation_spends_nothing_on_what_gets_worse():
    curves = torch.tensor([[0.1, 0.2, 0.3], [0.5, 0.5, 0.2]])
    assert allocate(curves, (1, 2, 3), 3).tolist() == [1, 3]
    assert allocate(curves, (1, 2, 3), 1.5).tolist() == [1, 1]  # two tokens away, one at hand
    assert allocate(curves[:0], (1, 2, 3), 2).tolist() == []
    with pytest.raises(ValueError, match="below the shortest length, 4"):
        allocate(curves, (4, 5, 6), 3)
    with pytest.raises(ValueError, match="finite errors"):
        allocate(torch.tensor([[1.0, -math.inf]]), (1, 2), 2)


@pytest.mark.parametrize("kind", [Scripted, Anew])
def test_the_oracle_knows_every_length(kind):
    curves = torch.rand(6, 8).div(2).tolist()  # not falling
    tokenizer, images = kind(curves), pictures(6)
    lengths = tokenizer.encode(images, Oracle("l1", target=0.2)).lengths
    assert lengths.tolist() == [first_below(curve, 0.2, range(1, 9)) for curve in curves]
    lengths = tokenizer.encode(images, Oracle("l1", mean=3)).lengths
    assert torch.equal(lengths, allocate(error_curves(tokenizer, images), range(1, 9), 3))
    assert float(lengths.double().mean()) <= 3


def test_nothing_beats_the_oracle_at_its_budget():
    curves = falling(30)
    tokenizer, images = Scripted(curves), pictures(30)
    for policy in (TargetQuality("l1"), Complexity(grey)):
        budget = MeanBudget(4, policy).calibrate(tokenizer, images)
        lengths = tokenizer.encode(images, budget).lengths
        best = tokenizer.encode(images, Oracle("l1", mean=budget.measured)).lengths
        sizes = list(range(1, 9))
        assert error_of_lengths(curves, sizes, best) <= error_of_lengths(curves, sizes, lengths)


def test_an_oracle_takes_one_of_two():
    for options in (
        {},
        {"target": 0.1, "mean": 4},
        {"mean": 0},
        {"mean": math.nan},
        {"metric": "x", "mean": 4},
    ):
        with pytest.raises(ValueError):
            Oracle(**options)


def test_shuffled_deals_the_same_lengths_to_others():
    curves = falling(40)
    tokenizer, images = Scripted(curves), pictures(40)
    oracle = Oracle("l1", mean=3)
    best = tokenizer.encode(images, oracle).lengths
    dealt = [tokenizer.encode(images, Shuffled(oracle, seed)).lengths for seed in (0, 0, 1)]
    assert torch.equal(dealt[0], dealt[1]) and not torch.equal(dealt[0], dealt[2])
    assert all(torch.equal(lengths.sort().values, best.sort().values) for lengths in dealt)
    sizes = list(range(1, 9))
    assert error_of_lengths(curves, sizes, dealt[0]) > error_of_lengths(curves, sizes, best)


def test_only_the_two_are_for_evaluation():
    assert Oracle(mean=1).evaluation_only and Shuffled(Fixed(1)).evaluation_only
    assert not any(policy.evaluation_only for policy in (Fixed(1), MeanBudget(4, Halting()), *TUNABLE))


# -- on a command line and in a manifest

WRITTEN = [
    ("fixed:32", Fixed(32)),
    ("halting", Halting()),
    ("halting:0.05", Halting(0.05)),
    ("psnr:24", TargetQuality("psnr", 24.0)),
    (" l1:0.05", TargetQuality("l1", 0.05)),
    ("mse:1e-3", TargetQuality("mse", 0.001)),
    ("complexity:gradient:16,32,64:0.1,0.3", Complexity("gradient", (16, 32, 64), (0.1, 0.3))),
    ("mean:32:halting", MeanBudget(32, Halting())),
    ("mean:32.5:psnr", MeanBudget(32.5, TargetQuality("psnr"))),
    ("mean:32:complexity:jpeg", MeanBudget(32, Complexity("jpeg"))),
    ("mean:32:complexity:jpeg:16,64", MeanBudget(32, Complexity("jpeg", (16, 64)))),
]


@pytest.mark.parametrize("text, policy", WRITTEN)
def test_a_policy_is_read_from_text_and_from_json(text, policy):
    assert parse_policy(text) == policy
    assert policy_from(json.loads(json.dumps(policy.to_dict()))) == policy


@pytest.mark.parametrize("text", [
    "", "fixed", "fixed:", "fixed:0", "fixed:1.5", "fixed:3:4", "32", "halting:x", "halting:-1",
    "halting:0.1:2", "psnr", "psnr:", "l1:nan", "oracle:3", "complexity", "complexity:jpeg",
    "complexity:jpeg:1,2",
    "complexity:jpeg:2,1:0.5", "complexity:size:1,2:0.5", "complexity:jpeg:1,2:a", "mean:32",
    "mean:x:halting", "mean:32:fixed:4", "mean:32:halting:0.1", "mean:32:psnr:24", "mean:2:mean",
    "mean:32:complexity:jpeg:1,2:0.5",
])  # fmt: skip
def test_text_that_is_no_policy_is_told_the_forms(text):
    with pytest.raises(ValueError) as error:
        parse_policy(text)
    assert repr(text) in str(error.value) and all(form in str(error.value) for form in FORMS)


def test_what_calibration_found_is_written_and_read_bit_by_bit():
    tokenizer, images = Scripted(falling(20)), pictures(20)
    for policy in (Halting(), TargetQuality("psnr"), Complexity("gradient"), Complexity("jpeg", (1, 3, 8))):
        budget = MeanBudget(4, policy).calibrate(tokenizer, images)
        again = policy_from(json.loads(json.dumps(budget.to_dict(), allow_nan=False)))
        assert again == budget
        assert torch.equal(tokenizer.encode(images, again).lengths, tokenizer.encode(images, budget).lengths)
    for policy in (Oracle("mse", target=0.1), Shuffled(MeanBudget(4, Halting()), seed=3), Shuffled(budget)):
        assert policy_from(json.loads(json.dumps(policy.to_dict()))) == policy


def test_what_cannot_be_written_or_read_is_told():
    for policy in (
        Complexity(grey, (1, 2), (0.5,)),
        MeanBudget(4, TargetQuality(l1)),
        Shuffled(Oracle(l1, mean=4)),
    ):
        with pytest.raises(ValueError, match="with a function as"):
            policy.to_dict()
    for content in ({}, None, [], {"name": "best"}, {"k": 3}):
        with pytest.raises(ValueError, match="a policy has a name, one of fixed, halting"):
            policy_from(content)
    with pytest.raises(ValueError, match="look at q"):
        policy_from({"name": "fixed", "k": 3, "q": 4})
    with pytest.raises(ValueError, match="look at k"):
        policy_from({"name": "fixed"})
    with pytest.raises(ValueError, match="whole number"):
        policy_from({"name": "fixed", "k": 0})
