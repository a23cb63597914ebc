"""Budgets that depend on the picture, allocations given by object, and plans that carry both through JSON."""

from dataclasses import dataclass

import pytest
import torch
from tiny import build

import vtc
from vtc.allocate import Allocation, Part, get_allocation, weighted
from vtc.allocations import Hired
from vtc.record import Tile
from vtc.restoring import Restore

PARTS = [Part(Tile(torch.arange(n), (1, n), thumbnail=not i)) for i, n in enumerate((4, 6, 2))]


@dataclass
class Loud(vtc.Select):
    """Keeps the tokens of the largest norm."""

    name = "loud"

    def score(self, tokens):
        return tokens.x.norm(dim=-1) - 3.0


@dataclass
class Own(Loud):
    """As many as the first feature of a row tells, so that every picture has another number."""

    name = "own"

    def count(self, tokens, k):
        return (tokens.x[:, :, 0] > 0).sum(dim=1).clamp(1, k)


def full_features(model, inputs):
    """For each image its patch tokens, (n, D), and for each of them the tile it is in."""
    with vtc.compress(model, "uniform", keep=1.0) as handle, torch.no_grad():
        model(**inputs)
        records = handle.last
        given = {n: inputs[n] for n in ("pixel_values", "image_sizes") if n in inputs}
        features = model.model.get_image_features(**given, return_dict=True).pooler_output
    return records, list(features)


@pytest.mark.parametrize("p", [0.05, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("host", ["llava-clip", "llava_next-clip"])
def test_the_fewest_tokens_with_a_share_of_the_scores(host, p):
    model, make_inputs = build(host)
    inputs = make_inputs((2, 1), pads=1)
    records, features = full_features(model, inputs)
    with vtc.compress(model, Loud(), keep=f"p:{p}") as handle, torch.no_grad():
        model(**inputs)
        counts = set()
        for record, before, feature in zip(handle.last, records, features, strict=True):
            slots = torch.cat([tile.slots for tile in before.tiles])
            score = (feature[slots].double().norm(dim=-1) - 3.0).tolist()
            low = min(0.0, min(score))
            ranked = sorted(range(len(slots)), key=lambda j: -score[j])
            total, chosen = sum(s - low for s in score), []
            while sum(score[j] - low for j in chosen) < p * total - 1e-6:
                chosen.append(ranked[len(chosen)])
            kept = sorted(slots[chosen].tolist())
            if len(kept) == len(slots):
                kept = list(range(len(record.source)))  # newline tokens stay, too
            assert record.index.tolist() == kept
            counts.add(len(kept))
    assert p in (1.0,) or len(counts) > 1 or host == "llava-clip"


def test_a_share_of_scores_is_of_scores():
    model, _ = build("llava-clip")
    with pytest.raises(ValueError, match="is a share of scores, but"):
        vtc.compress(model, "divprune", keep="p:0.9")
    with pytest.raises(ValueError, match="share in"):
        vtc.compress(model, "fastervlm", keep="p:1.9")
    with pytest.raises(TypeError, match="keep must be"):
        vtc.compress(model, "fastervlm", keep="mean:8")
    with pytest.raises(ValueError, match="stage='features'"):
        vtc.compress(model, "random", keep="p:0.9", stage="encoder")
    assert vtc.api.current(model) is None


@pytest.mark.parametrize("keep", [10_000, 5])
def test_a_method_may_choose_its_own_number(keep):
    model, make_inputs = build("llava-clip")
    inputs = make_inputs((2, 2), pads=1)
    _, features = full_features(model, inputs)
    with vtc.compress(model, Own(), keep=keep) as handle, torch.no_grad():
        model(**inputs)
        wanted = [min(max(1, int((f[:, 0] > 0).sum())), keep) for f in features]
        assert [len(record.index) for record in handle.last] == wanted
        assert len(set(wanted)) > 1 or keep == 5
        out = model.generate(**inputs, max_new_tokens=3, do_sample=False)
        assert out.shape[1] == inputs["input_ids"].shape[1] + 3
        handle.keep = 1.0  # the bare model, for such a method too
        compressed = model(**inputs).logits
        handle.remove()
        assert torch.equal(model(**inputs).logits, compressed)


def test_own_numbers_are_checked():
    @dataclass
    class Wrong(Loud):
        name = "wrong"

        def count(self, tokens, k):
            return torch.full((len(tokens.x),), k + 1)

    model, make_inputs = build("llava-clip")
    with vtc.compress(model, Wrong(), keep=4), pytest.raises(RuntimeError, match="mend its count"):
        model(**make_inputs((1,)))


# -- allocations


@pytest.mark.parametrize("name", ["proportional", "uniform", "whole", "joint", "thumbnail"])
@pytest.mark.parametrize("k", range(1, 13))
def test_budgets_are_exact(name, k):
    groups = get_allocation(name).split(PARTS, k)
    assert sum(budget for _, budget in groups) == k
    assert all(0 <= budget <= sum(PARTS[i].n for i in numbers) for numbers, budget in groups)
    tiles = [i for numbers, _ in groups for i in numbers]
    assert len(tiles) == len(set(tiles))


def test_budgets_by_hand():
    split = {name: get_allocation(name).split(PARTS, 7) for name in ("uniform", "joint", "thumbnail")}
    assert split["uniform"] == [([0], 3), ([1], 2), ([2], 2)]
    assert split["joint"] == [([0, 1, 2], 7)]
    assert split["thumbnail"] == [([0], 4), ([1, 2], 3)]
    assert get_allocation("thumbnail").split(PARTS[1:], 5) == [([0, 1], 5)]
    assert weighted(10, [3.0, 1.0, 0.0], [4, 9, 9]) == [4, 6, 0]
    assert weighted(12, [1.0, 0.0, 0.0], [4, 6, 2]) == [4, 6, 2]
    assert weighted(5, [0.0, 0.0], [4, 4]) == [3, 2]


def test_an_allocation_of_ones_own_reads_what_it_declares():
    @dataclass(frozen=True)
    class Loudest(Allocation):
        name = "loudest"

        @property
        def needs(self):
            return (vtc.method.Need("mean_attention", (-1,)),)

        def split(self, parts, k):
            most = max(range(len(parts)), key=lambda i: float(parts[i].mean_attention[0].max()))
            with pytest.raises(AttributeError, match="carries no 'keys'"):
                _ = parts[0].keys
            return [([most], min(k, parts[most].n))]

    model, make_inputs = build("llava_next-siglip")
    with vtc.compress(model, "random", keep=3, allocate=Loudest()) as handle, torch.no_grad():
        model(**make_inputs((2,)))
        for record in handle.last:
            of_tile = [sum(int(i) in tile.slots for i in record.index) for tile in record.tiles]
            assert sorted(of_tile)[-1] == 3 and sum(of_tile) == 3


@pytest.mark.parametrize("groups", [[], [([0], 1)], [([0], 3), ([0], 3)], [([0], 7), ([1], -1)]])
def test_wrong_budgets_are_told(groups):
    @dataclass(frozen=True)
    class Wrong(Allocation):
        name = "wrong"

        def split(self, parts, k):
            return groups

    model, make_inputs = build("llava_next-siglip")
    inputs = make_inputs((1,))
    told = pytest.raises(RuntimeError, match="where 6 tokens were to share: mend its split")
    with vtc.compress(model, "random", keep=6, allocate=Wrong()), told:
        model(**inputs)


def test_plans_carry_allocations_and_merges(tmp_path):
    model, make_inputs = build("llava_next-clip")
    inputs = make_inputs((1,))
    options = {"keep": 6, "allocate": {"name": "hired", "alpha": 0.3}, "merge": "nearest"}
    with vtc.compress(model, "fastervlm", **options) as handle, torch.no_grad():
        logits = model(**inputs).logits
        assert handle.plan[0][1]["allocate"]["alpha"] == 0.3 and handle.plan[0][1]["merge"] == "nearest"
        vtc.save(handle.plan, tmp_path / "plan.json")
    with vtc.compress(model, vtc.load(tmp_path / "plan.json")), torch.no_grad():
        assert torch.equal(model(**inputs).logits, logits)


@pytest.mark.parametrize(
    "given, message",
    [
        ({"allocate": "nowhere"}, "allocate must be one of"),
        ({"allocate": {"name": "hired", "beta": 1}}, "has no option 'beta'; its options: alpha"),
        ({"allocate": {"name": "hired", "alpha": "0.3"}}, "options of a wrong type"),
        ({"allocate": ["hired"]}, "allocate must be one of"),
        ({"merge": {"name": "restore", "size": 1}}, "has no option 'size'; its options: place"),
        ({"method": "fopru", "strategy": "row", "keep": "p:0.5"}, "does not choose by scores"),
        ({"merge": "glue"}, "merge must be None or one of"),
        ({"method": "tome", "merge": "nearest"}, "'tome' merges: leave it out"),
        ({"method": "hiprune", "allocate": "thumbnail"}, "reads the rows and columns"),
    ],
)
def test_errors(given, message):
    model, _ = build("llava_next-clip")
    given = {"method": "fastervlm", "keep": 0.5, **given}
    with pytest.raises(ValueError, match=message):
        vtc.compress(model, **given)
    assert vtc.api.current(model) is None


def test_settings_that_would_mean_nothing_are_refused():
    single, _ = build("llava-clip")
    with pytest.raises(ValueError, match="to llava each of them is an image of its own"):
        vtc.compress(single, "fastervlm", keep=0.5, allocate="hired")
    tiled, _ = build("llava_next-siglip")
    with pytest.raises(ValueError, match="allocate='hired' needs a CLS token"):
        vtc.compress(tiled, "divprune", keep=8, allocate="hired")
    with pytest.raises(ValueError, match="method 'hired' needs a CLS token"):
        vtc.compress(tiled, "hired", keep=8)
    with vtc.compress(tiled, "random", keep=8, allocate="whole") as handle:
        with pytest.raises(ValueError, match="leave allocate out"):
            handle.keep = "p:0.7"
        assert handle.keep == 8


@pytest.mark.parametrize(
    "options", [{"keep": "p:0.7"}, {"keep": 6, "allocate": Hired(alpha=0.3), "merge": Restore(sizes=False)}]
)
def test_any_plan_can_be_saved(options, tmp_path):
    model, make_inputs = build("llava_next-clip")
    inputs = make_inputs((1,))
    vtc.save([("fastervlm", options)], tmp_path / "plan.json")
    with vtc.compress(model, "fastervlm", **options) as handle, torch.no_grad():
        logits, plan = model(**inputs).logits, handle.plan
    for again in (plan, vtc.load(tmp_path / "plan.json")):
        with vtc.compress(model, again), torch.no_grad():
            assert torch.equal(model(**inputs).logits, logits)


@pytest.mark.parametrize("keep", [10_000, "p:0.6"])
def test_gradients_flow_where_the_number_depends_on_the_picture(keep):
    model, make_inputs = build("llava-clip")
    with vtc.compress(model, Own(), keep=keep) as handle:
        model(**make_inputs((2,))).logits.square().mean().backward()
        assert any(len(record.index) < len(record.source) for record in handle.last)
    assert sum(p.grad.abs().sum() for p in model.model.vision_tower.parameters() if p.grad is not None) > 0
