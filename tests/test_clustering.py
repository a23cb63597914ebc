"""Agglomerative clustering: the partition of scipy's linkage, by both ways, for any k."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.cluster import hierarchy

from vtc.clustering import LINKAGES, agglomerate, by_library, by_rounds

WAYS = (by_library, by_rounds)


def distances(batch, n, seed=0, dim=16, smooth=False):
    """Cosine distances of random vectors, or of ones that change little from token to token."""
    x = torch.randn(batch, n, dim, generator=torch.Generator().manual_seed(seed))
    x = F.normalize(x.cumsum(dim=1) if smooth else x, dim=-1)
    return 1 - x @ x.transpose(1, 2)


def cut(joins, n, k):
    """Labels by rank of first members, of the first n - k joins in scipy's format."""
    group = {i: [i] for i in range(n)}
    for number, (a, b) in enumerate(joins[: n - k]):
        group[n + number] = group.pop(int(a)) + group.pop(int(b))
    labels = [0] * n
    for label, members in enumerate(sorted(group.values(), key=min)):
        for i in members:
            labels[i] = label
    return labels


def of_scipy(distance, k, linkage):
    n = len(distance)
    above = distance.double().numpy()[np.triu_indices(n, 1)]
    return cut(hierarchy.linkage(above, linkage)[:, :2], n, k)


@pytest.mark.parametrize("linkage", LINKAGES)
@pytest.mark.parametrize("smooth", [False, True])
@pytest.mark.parametrize(
    ("n", "counts"), [(2, [1]), (3, [1, 2]), (7, [1, 3, 6]), (24, [1, 2, 8, 20, 23]), (49, [3, 24, 44])]
)
def test_partitions_are_those_of_scipy(linkage, smooth, n, counts):
    for k in counts:  # 14 counts, 3 linkages, 2 kinds, 40 images each: 3360 cases, each by both ways
        distance = distances(40, n, seed=100 * n + k, smooth=smooth)
        expected = [of_scipy(image, k, linkage) for image in distance]
        for way in WAYS:
            assert way(distance, k, linkage).tolist() == expected
            assert way(distance.double(), k, linkage).tolist() == expected


@pytest.mark.parametrize("linkage", LINKAGES)
@pytest.mark.parametrize("k", [3, 49, 98, 176])
def test_partitions_of_a_vision_transformer_are_those_of_scipy(linkage, k):
    distance = distances(3, 196, seed=k, dim=64)
    expected = [of_scipy(image, k, linkage) for image in distance]
    for way in WAYS:
        assert way(distance, k, linkage).tolist() == expected


@pytest.mark.parametrize("linkage", LINKAGES)
def test_one_cluster_and_as_many_as_tokens(linkage):
    distance = distances(2, 9)
    assert agglomerate(distance, 9, linkage).tolist() == [list(range(9))] * 2
    assert agglomerate(distance[:, :1, :1], 1, linkage).tolist() == [[0]] * 2
    for way in WAYS:
        assert way(distance, 1, linkage).tolist() == [[0] * 9] * 2


@pytest.mark.parametrize("linkage", LINKAGES)
@pytest.mark.parametrize("way", WAYS)
def test_labels_are_ranks_of_first_members(linkage, way):
    for row in way(distances(20, 30), 11, linkage).tolist():
        first = [row.index(label) for label in range(11)]
        assert first == sorted(first)


@pytest.mark.parametrize("linkage", LINKAGES)
@pytest.mark.parametrize("way", WAYS)
def test_the_order_of_tokens_does_not_matter(linkage, way):
    distance = distances(5, 40)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(1))
    labels, other = way(distance, 13, linkage), way(distance[:, order][:, :, order], 13, linkage)
    together = labels[:, :, None] == labels[:, None]
    assert torch.equal(together[:, order][:, :, order], other[:, :, None] == other[:, None])


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("seed", range(20))
def test_single_linkage_among_ties_is_a_valid_partition(way, seed):
    """What is nearer than the cut is together, what is not connected by distances up to the cut is apart."""
    n, k = 24, 6
    whole = torch.randint(1, 40, (1, n, n), generator=torch.Generator().manual_seed(seed)).float()
    labels = way(whole, k, "single")[0]
    assert labels.unique().tolist() == list(range(k))
    above = whole[0].double().numpy()[np.triu_indices(n, 1)]
    joins = hierarchy.linkage(above, "single")
    pairs, heights = joins[:, :2], joins[:, 2]
    last = heights[n - k - 1]
    sure, at_most = (cut(pairs, n, n - int(below.sum())) for below in (heights < last, heights <= last))
    for i in range(n):
        for j in range(i):
            assert labels[i] == labels[j] or sure[i] != sure[j]
            assert labels[i] != labels[j] or at_most[i] == at_most[j]


@pytest.mark.parametrize("linkage", LINKAGES)
@pytest.mark.parametrize("way", WAYS)
def test_ties_give_exactly_k_clusters_in_any_batch(linkage, way):
    g = torch.Generator().manual_seed(0)
    constant = torch.ones(1, 20, 20)
    x = torch.randint(0, 2, (3, 20, 4), generator=g).float()  # many equal tokens, some of length zero
    x = F.normalize(x, dim=-1)
    batch = torch.cat([constant, 1 - x @ x.transpose(1, 2), 0 * constant, distances(2, 20)])
    for k in range(1, 20):
        labels = way(batch, k, linkage)
        for row, image in enumerate(batch):
            assert labels[row].unique().tolist() == list(range(k))
            assert torch.equal(way(image[None], k, linkage)[0], labels[row])


@pytest.mark.parametrize("linkage", LINKAGES)
@pytest.mark.parametrize("way", WAYS)
def test_equal_tokens_are_together_before_others_are(linkage, way):
    which = torch.randint(0, 6, (4, 30), generator=torch.Generator().manual_seed(0))
    x = torch.randn(6, 16, generator=torch.Generator().manual_seed(1))[which]
    labels = way(torch.cdist(x, x).masked_fill(which[:, :, None] == which[:, None], 0), 6, linkage)
    assert torch.equal(labels[:, :, None] == labels[:, None], which[:, :, None] == which[:, None])


@pytest.mark.parametrize("linkage", LINKAGES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_the_same_numbers_in_single(linkage, dtype):
    distance = distances(4, 30).to(dtype)
    for way in WAYS:
        assert torch.equal(way(distance, 9, linkage), way(distance.float(), 9, linkage))


def test_only_what_is_above_the_diagonal_is_read():
    distance = distances(2, 30)
    lower = distance.triu(1) + torch.rand(2, 30, 30).tril()
    for way in WAYS:
        assert torch.equal(way(lower, 7, "average"), way(distance, 7, "average"))


def test_threads_share_the_images():
    distance, threads = distances(7, 40), torch.get_num_threads()
    expected = by_library(distance, 11, "average")
    try:
        for count in (1, 2, 3, 16):
            torch.set_num_threads(count)
            assert torch.equal(by_library(distance, 11, "average"), expected)
            with pytest.raises(ValueError, match="finite"):
                by_library(torch.full((7, 9, 9), torch.nan), 3, "average")
    finally:
        torch.set_num_threads(threads)


def test_rounds_ask_for_one_bool_each_and_no_data(monkeypatch):
    asked, truth, distance = [], torch.Tensor.__bool__, distances(8, 100)

    def refuse(*args):
        raise AssertionError("data left the device")

    monkeypatch.setattr(torch.Tensor, "__bool__", lambda tensor: asked.append(truth(tensor)) or asked[-1])
    for way in ("cpu", "numpy", "tolist", "item", "nonzero", "__int__", "__float__", "__array__"):
        monkeypatch.setattr(torch.Tensor, way, refuse)
    by_rounds(distance, 50, "average")
    monkeypatch.undo()
    assert asked[:-2] == [True] * len(asked[2:]) and asked[-2:] == [False, True]  # more to join; all finite
    assert 4 <= len(asked) <= 16


@pytest.mark.parametrize("device", ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"])
@pytest.mark.parametrize("linkage", LINKAGES)
def test_labels_stay_on_their_device(linkage, device):
    distance = distances(32, 196, dim=64)
    labels = agglomerate(distance.to(device), 98, linkage)
    assert labels.device.type == device
    assert torch.equal(labels.cpu(), by_rounds(distance, 98, linkage))


def test_what_cannot_be_clustered_is_refused():
    with pytest.raises(ValueError, match="linkage must be one of average, complete, single, not 'ward'"):
        agglomerate(distances(1, 5), 2, "ward")
    for k in (0, 6):
        with pytest.raises(ValueError, match=f"5 tokens make 1 to 5 clusters, not {k}"):
            agglomerate(distances(1, 5), k)
    for way in WAYS:
        with pytest.raises(ValueError, match="finite"):
            way(torch.full((1, 5, 5), torch.nan), 2, "average")


def test_gradients_do_not_disturb():
    distance = distances(1, 6).requires_grad_()
    assert not agglomerate(distance, 2).requires_grad
