"""Exact agglomerative clustering of small batches of distance matrices."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

LINKAGES = ("average", "complete", "single")


def agglomerate(distance: Tensor, k: int, linkage: str = "average") -> Tensor:
    """Exactly k clusters of every image: distance (B, N, N) -> labels (B, N), in 0..k-1.

    The two nearest clusters become one, again and again, until k are left. How far apart clusters are is the
    mean ("average"), the largest ("complete") or the smallest ("single") distance between their members. A
    label is the rank of its cluster's first member, so that labels are the same however they were found.
    Only what is above the diagonal is read, and must be finite.

    On the CPU fastcluster does it, in double precision, with as many threads over images as torch has; on
    other devices the data stay where they are, in their own precision, single at least. Both give the
    partition that scipy gives. Where the cut falls among equal distances several partitions are right: it is
    one of them, the same in any batch, but which one depends on the device.
    """
    n = distance.shape[1]
    if linkage not in LINKAGES:
        raise ValueError(f"linkage must be one of {', '.join(LINKAGES)}, not {linkage!r}")
    if not 1 <= k <= n:
        raise ValueError(f"{n} tokens make 1 to {n} clusters, not {k}")
    if k == n:
        return torch.arange(n, device=distance.device).repeat(len(distance), 1)
    way = by_library if distance.device.type == "cpu" else by_rounds
    return way(distance.detach(), k, linkage)


def by_library(distance: Tensor, k: int, linkage: str) -> Tensor:
    """The same with fastcluster, on the CPU."""
    batch, n, _ = distance.shape
    images = _floating(distance).contiguous().numpy()
    mine, *others = np.array_split(images, min(torch.get_num_threads(), batch))
    try:
        with ThreadPoolExecutor(max(1, len(others))) as pool:  # which starts threads as work comes in
            joins = [pool.submit(_joins, part, n - k, linkage) for part in others]
            joins = np.concatenate([_joins(mine, n - k, linkage), *(part.result() for part in joins)])
    except FloatingPointError:
        raise ValueError("distances to cluster by must be finite numbers") from None
    parent = torch.arange(2 * n - k).repeat(batch, 1)  # (B, N + N - K): a node for each token and each join
    nodes = torch.arange(n, 2 * n - k).repeat_interleave(2).expand(batch, -1)
    return _labels(parent.scatter(1, torch.from_numpy(joins).flatten(1), nodes), n)


def _joins(images: np.ndarray, count: int, linkage: str) -> np.ndarray:
    """The lowest joins of each tree, (B, count, 2): pairs of nodes 0..N-1 of tokens, N.. of joins in turn.

    In numpy: torch would start its own threads in each of ours, and fastcluster lets others run meanwhile.
    """
    import fastcluster

    above = _above(images.shape[1])
    trees = [fastcluster.linkage(image.reshape(-1).take(above), linkage) for image in images]
    return np.stack(trees)[:, :count, :2].astype(np.int64)


def by_rounds(distance: Tensor, k: int, linkage: str) -> Tensor:
    """The same in tensor operations over the whole batch: what leaves the device is one bool per round.

    Each round joins all pairs of clusters that are each other's nearest, which gives the same tree as joining
    one pair at a time: with these linkages no cluster gets nearer to others by it. The n - k lowest joins of
    the tree make the clusters, and the rounds end when those are known.
    """
    batch, n, _ = distance.shape
    position = torch.arange(n, device=distance.device)
    parent = position.repeat(batch, 1)  # (B, N) a joined cluster lives on at its first member's position
    near = _floating(distance).triu(1)
    near = near + near.mT  # (B, N, N), infinite on the diagonal and where a cluster is gone
    near.diagonal(dim1=1, dim2=2).fill_(torch.inf)
    members = near.new_ones(batch, n)
    height = near.new_full((batch, n), torch.inf)  # (B, N) of the join by which a position went
    limit = near.new_full((batch, 1), torch.inf)  # the (n - k)-th lowest join until now: higher ones are cut
    for _ in range(n - k):  # after as many rounds that many of the lowest joins are known, mostly much sooner
        nearest, partner = near.min(dim=2)  # (B, N) each; the first of equals, so that there is always a pair
        pair = (partner.gather(1, partner) == position) & (nearest < limit)
        goes, stays = pair & (position > partner), pair & (position < partner)  # (B, N)
        if not goes.any():
            break
        parent = torch.where(goes, partner, parent)
        height = torch.where(goes, nearest, height)
        limit = height.kthvalue(n - k, dim=1, keepdim=True).values
        weights = members[:, :, None], members.gather(1, partner)[:, :, None]
        for _ in range(2):  # rows, then columns
            other = near.gather(1, partner[:, :, None].expand_as(near))
            near = torch.where(stays[:, :, None], _joined(near, other, *weights, linkage), near).mT
        near = (near + near.mT) / 2  # rounding must not make a pair nearer in one direction
        near = near.masked_fill(goes[:, :, None] | goes[:, None, :], torch.inf)
        near.diagonal(dim1=1, dim2=2).fill_(torch.inf)
        members = torch.where(stays, weights[0][..., 0] + weights[1][..., 0], members)
    if not limit.isfinite().all():
        raise ValueError("distances to cluster by must be finite numbers")
    lowest = height.argsort(dim=1, stable=True)[:, : n - k]  # (B, N - K)
    kept = position.repeat(batch, 1).scatter(1, lowest, parent.gather(1, lowest))
    return _labels(kept, n)


def _joined(a: Tensor, b: Tensor, size_a: Tensor, size_b: Tensor, linkage: str) -> Tensor:
    """How far others are from a and b as one (Lance and Williams' formula)."""
    if linkage == "average":
        return (size_a * a + size_b * b) / (size_a + size_b)
    return torch.maximum(a, b) if linkage == "complete" else torch.minimum(a, b)


def _labels(parent: Tensor, n: int) -> Tensor:
    """Of a forest (B, nodes) whose first n nodes are the tokens: the rank of each token's tree (B, N)."""
    for _ in range(parent.shape[1].bit_length()):  # each doubles the steps towards the root
        parent = parent.gather(1, parent)
    root = parent[:, :n]
    position = torch.arange(n, device=parent.device).expand_as(root)
    first = torch.full_like(parent, n).scatter_reduce(1, root, position, "amin").gather(1, root)  # (B, N)
    rank = (first == position).long().cumsum(dim=1) - 1
    return rank.gather(1, first)


def _floating(distance: Tensor) -> Tensor:
    """In single precision at least."""
    return distance if distance.dtype == torch.float64 else distance.float()


@lru_cache(maxsize=8)
def _above(n: int) -> np.ndarray:
    """Where the pairs above the diagonal lie in a flattened N x N matrix, row by row."""
    rows, columns = np.triu_indices(n, 1)
    return rows * n + columns
