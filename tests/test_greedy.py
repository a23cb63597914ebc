"""The greedy selections against plain loops: index for index, of any size, batch and structure."""

from itertools import pairwise

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from vtc import greedy
from vtc.nearest import nearest
from vtc.tokens import Reduction, gather


def random(batch=3, n=40, width=64, seed=0):
    return torch.randn(batch, n, width, generator=torch.Generator().manual_seed(seed))


def worths(x, seed=1):
    return torch.rand(x.shape[:2], generator=torch.Generator().manual_seed(seed)) + 0.05


def cosines(x):
    unit = torch.nn.functional.normalize(x.double(), dim=-1)
    return (unit @ unit.T).fill_diagonal_(1)  # and not 1 up to rounding


# -- the rules, one row at a time


def farthest_of_the_card(x, k):
    distance = (1 - cosines(x)).fill_diagonal_(torch.inf).tolist()
    every = range(len(distance))
    chosen = [max(every, key=lambda j: min(distance[j]))]
    while len(chosen) < k:
        left = [j for j in every if j not in chosen]
        chosen.append(max(left, key=lambda j: min(distance[j][i] for i in chosen)))
    return chosen


def volume_of_the_card(x, worth, k):
    """By the determinants themselves."""
    worth = worth.double()
    kernel = worth[:, None] * cosines(x) * worth
    chosen = []
    while len(chosen) < k:
        left = [j for j in range(len(x)) if j not in chosen]
        volumes = [float(torch.linalg.det(kernel[[*chosen, j]][:, [*chosen, j]])) for j in left]
        chosen.append(left[max(range(len(left)), key=volumes.__getitem__)])
    return chosen


def cover_of_the_card(table, weight, worth, k):
    """table (R, N): how well each candidate covers each thing. The choice and what each added."""
    table, weight, worth = table.double(), weight.double(), worth.double()
    best, chosen, gains = torch.zeros(len(table), dtype=torch.double), [], []
    while len(chosen) < k:
        gain = ((table - best[:, None]).clamp_min(0) * weight[:, None]).sum(0) * worth
        gain[chosen] = -1
        gains.append(float(gain.max()))
        chosen.append(
            int((gain >= gains[-1] * (1 - 1e-6)).nonzero()[0])
        )  # equal ones add the same, but for rounding
        best = torch.maximum(best, table[:, chosen[-1]])
    return chosen, gains


def covered(x, weight, worth, k):
    return greedy.cover(greedy.Cosines(x).of, weight, worth, k)


RULES = {
    "farthest": lambda x, k: greedy.farthest(x, k),
    "volume": lambda x, k: greedy.volume(x, torch.ones(x.shape[:2]), k),
    "volume by worth": lambda x, k: greedy.volume(x, worths(x), k),
    "cover": lambda x, k: covered(x, torch.ones(x.shape[:2]), torch.ones(x.shape[:2]), k),
    "cover by worth": lambda x, k: covered(x, torch.ones(x.shape[:2]), worths(x), k),
}
CARDS = {
    "farthest": farthest_of_the_card,
    "volume": lambda x, k: volume_of_the_card(x, torch.ones(len(x)), k),
    "volume by worth": None,
    "cover": lambda x, k: cover_of_the_card(cosines(x), torch.ones(len(x)), torch.ones(len(x)), k)[0],
    "cover by worth": None,
}


@pytest.mark.parametrize("width", [64, 16], ids=["pairs held", "pairs on demand"])
@pytest.mark.parametrize("k", [1, 2, 12])
def test_each_step_is_the_best_one(width, k):
    x = random(width=width)
    worth = worths(x)
    for name in ("farthest", "volume", "cover"):
        assert RULES[name](x, k).tolist() == [CARDS[name](row, k) for row in x], name
    expected = [volume_of_the_card(*row, k) for row in zip(x, worth)]
    assert RULES["volume by worth"](x, k).tolist() == expected
    expected = [cover_of_the_card(cosines(row), torch.ones(40), by, k)[0] for row, by in zip(x, worth)]
    assert RULES["cover by worth"](x, k).tolist() == expected


@pytest.mark.parametrize("n", range(1, 11))
def test_few_tokens_to_the_last_one(n):
    x = random(n=n, width=32, seed=n)
    for name in ("farthest", "volume", "cover"):
        assert RULES[name](x, n)[:, :-1].tolist() == [CARDS[name](row, n)[:-1] for row in x], name
        assert RULES[name](x, n).sort(dim=1).values.tolist() == [list(range(n))] * 3


@pytest.mark.parametrize("width", [24, 600])
def test_looking_at_few_candidates_again_gives_what_looking_at_all_gives(width):
    """On many tokens with smooth features, as pictures have, where gains are close to each other."""
    noise = random(batch=2, n=500, width=width)
    x = noise.cumsum(dim=1) / torch.arange(1, 501)[:, None] + 0.1 * noise
    weight, worth = worths(x, seed=2), worths(x, seed=3)
    for by in (worth, torch.ones_like(worth)):
        picks = covered(x, weight, by, 120)
        for row in range(2):
            chosen, gains = cover_of_the_card(cosines(x[row]), weight[row], by[row], 120)
            assert picks[row].tolist() == chosen
            assert by is worth or all(later <= gain + 1e-9 for gain, later in pairwise(gains))


def test_covering_is_at_least_1_minus_1_over_e_of_the_best():
    x = random(batch=1, n=9, width=4, seed=5)
    table = cosines(x[0]).clamp_min(0)

    def value(chosen):
        return float(table[list(chosen)].amax(dim=0).sum())

    best = max(value(chosen) for chosen in torch.combinations(torch.arange(9), 3).tolist())
    assert value(RULES["cover"](x, 3)[0].tolist()) >= (1 - torch.exp(torch.tensor(-1.0))) * best


def test_a_volume_grows_by_less_each_time():
    x = random(batch=1, n=60, width=64)
    picks = RULES["volume"](x, 30)[0]
    volumes = [float(torch.linalg.slogdet(cosines(x[0, picks[:i]])).logabsdet) for i in range(1, 31)]
    steps = [after - before for before, after in pairwise(volumes)]
    assert all(after <= before + 1e-9 for before, after in pairwise(steps))


def test_orthogonal_tokens_are_chosen_by_worth_alone():
    x = torch.eye(16)[None] * torch.linspace(0.1, 9, 16)[:, None]
    worth = worths(x)
    assert torch.equal(greedy.volume(x, worth, 16), worth.sort(dim=1, descending=True).indices)


def part(name, x, rows, k):
    """What a rule chooses for some rows of x, each with its own worths."""
    if "worth" not in name:
        return RULES[name](x[rows], k)
    worth = worths(x)[rows]
    return (
        covered(x[rows], torch.ones_like(worth), worth, k)
        if "cover" in name
        else greedy.volume(x[rows], worth, k)
    )


@pytest.mark.parametrize("width", [16, 64])
@pytest.mark.parametrize("name", RULES)
def test_rows_of_a_batch_and_sizes_of_chunks_do_not_matter(name, width, monkeypatch):
    x = random(batch=4, n=48, width=width)
    picks = RULES[name](x, 20)
    for rows in ([0], [1], [2], [3], [3, 1]):
        assert torch.equal(part(name, x, rows, 20), picks[rows])
    monkeypatch.setattr(greedy, "_PAIRS", 150)  # three tokens at a time
    monkeypatch.setattr(greedy, "_FEW", 1)
    assert torch.equal(RULES[name](x, 20), picks)


@pytest.mark.parametrize("name", RULES)
def test_directions_and_no_lengths_decide(name):
    x = random()
    turned = x @ torch.linalg.qr(random(1, 64, 64)[0])[0] * torch.rand(3, 40, 1).add(0.5)
    assert torch.equal(RULES[name](turned, 15), RULES[name](x, 15))


def structures():
    x = random(n=8, width=16)
    yield "duplicates", x.repeat(1, 6, 1)
    yield "scaled duplicates", x.repeat(1, 6, 1) * torch.rand(3, 48, 1).add(0.5)
    yield "constant", torch.ones(3, 48, 16)
    yield "zeros", torch.zeros(3, 48, 16)
    yield "half zeros", torch.cat([torch.zeros(3, 24, 16), random(n=24, width=16)], dim=1)
    yield "two directions", random(n=48, width=2)
    yield "opposites", torch.cat([x, -x], dim=1).repeat(1, 3, 1)
    yield "bfloat16", random(n=48, width=16).bfloat16()


STRUCTURES = dict(structures())


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("name", RULES)
def test_no_token_twice(name, structure):
    x = STRUCTURES[structure]
    for k in (1, 9, 47, 48):
        picks = RULES[name](x, k)
        assert picks.shape == (3, k)
        assert (picks.sort(dim=1).values.diff(dim=1) > 0).all() and int(picks.min()) >= 0 and picks.max() < 48
        assert torch.equal(part(name, x, [2, 0, 1], k), picks[[2, 0, 1]])


@pytest.mark.parametrize("structure", ["duplicates", "scaled duplicates"])
@pytest.mark.parametrize("name", RULES)
def test_every_direction_once_before_any_comes_again(name, structure):
    picks = RULES[name](STRUCTURES[structure], 8) % 8
    assert picks.sort(dim=1).values.tolist() == [list(range(8))] * 3


@pytest.mark.parametrize("name", ["volume", "cover"])
def test_equal_ones_in_turn(name):
    assert RULES[name](torch.ones(1, 12, 4), 7).tolist() == [list(range(7))]
    first = RULES[name](STRUCTURES["duplicates"], 8)
    assert int(first.max()) < 8  # of each direction the first


def test_a_spent_volume_begins_anew():
    """Four tokens span all there is; the next four are chosen as if those had not been."""
    x = random(batch=2, n=20, width=4)
    picks = greedy.volume(x, torch.ones(2, 20), 12)
    for row in range(2):
        left = list(range(20))
        for first in (0, 4, 8):
            chosen = [left[i] for i in volume_of_the_card(x[row, left], torch.ones(len(left)), 4)]
            assert picks[row, first : first + 4].tolist() == chosen
            left = [j for j in left if j not in chosen]


class _Largest(TorchDispatchMode):
    """The most numbers in any one tensor that is made."""

    def __init__(self):
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, (tuple, list)) else [made]:
            if isinstance(tensor, torch.Tensor) and not tensor._is_view():
                self.numbers = max(self.numbers, tensor.numel())
        return made


@pytest.mark.parametrize("name", [*RULES, "nearest"])
def test_pairs_of_many_tokens_are_never_held_at_once(name):
    x = random(batch=2, n=3000, width=16)
    with _Largest() as largest:
        picks = nearest(x, RULES["farthest"](x, 8)) if name == "nearest" else RULES[name](x, 8)
    assert len(picks) == 2 and largest.numbers <= 2 * greedy._PAIRS < 2 * 3000 * 3000 / 8


# -- the most similar of the kept


@pytest.mark.parametrize("k", [1, 2, 13, 39, 40])
def test_nearest(k):
    x = random(width=8)
    index = torch.stack(
        [torch.randperm(40, generator=torch.Generator().manual_seed(i))[:k] for i in range(3)]
    )
    found = nearest(x, index)
    for row in range(3):
        cosine, kept = cosines(x[row]).tolist(), sorted(index[row].tolist())
        expected = [j if j in kept else max(kept, key=lambda i: cosine[j][i]) for j in range(40)]
        assert found[row].tolist() == expected
    reduction = Reduction.merge(index, found)
    assert torch.equal(gather(reduction.index[..., None], reduction.source)[..., 0], found)


def test_nearest_takes_the_first_of_equals_and_leaves_the_kept_alone():
    x = random(batch=1, n=4, width=8).repeat(1, 3, 1)  # the directions 0 1 2 3 0 1 2 3 0 1 2 3
    x[0, 2::4] = x[0, :1]  # 0 1 0 3 0 1 0 3 ...
    x[0, 3::4] = 0
    found = nearest(x, torch.tensor([[9, 5, 4, 8, 1]]))[0].tolist()
    assert found == [4, 1, 4, 1, 4, 5, 4, 1, 8, 9, 4, 1]  # a token of zeros is like any: the first


def test_nearest_reads_bfloat16_as_float32_and_each_row_alone(monkeypatch):
    x = random(width=8).bfloat16()
    index = torch.tensor([[3, 30, 9, 12]] * 3)
    found = nearest(x, index)
    assert torch.equal(found, nearest(x.float(), index))
    assert all(torch.equal(nearest(x[[i]], index[[i]]), found[[i]]) for i in range(3))
    monkeypatch.setattr("vtc.nearest._PAIRS", 20)
    assert torch.equal(nearest(x, index), found)
