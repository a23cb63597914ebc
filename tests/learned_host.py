"""A random block of a vision transformer, smooth features, and how far apart outputs are."""

import torch
import torch.nn.functional as F
from torch import nn

from vtc.transformer import Block


def randomise(module, seed=0, std=0.3):
    """Random numbers into all parameters, norms and biases too, so that nothing is invisible."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(0, std, generator=generator)
    return module.eval()


def random_block(width=64, heads=4, seed=0, std=0.15):
    """Queries and keys as large as to tell tokens apart."""
    block = randomise(Block(width, heads), seed, std)
    nn.init.ones_(block.ln_1.weight), nn.init.ones_(block.ln_2.weight)
    return block


def smooth(batch=2, grid=(8, 8), width=64, noise=0.3, seed=1):
    """(B, N, width): random maps of a quarter of the size, made larger, and noise."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(batch, width, max(grid[0] // 4, 2), max(grid[1] // 4, 2), generator=generator)
    x = F.interpolate(coarse, grid, mode="bicubic", align_corners=True).flatten(2).transpose(1, 2)
    return x + noise * torch.randn(x.shape, generator=generator)


def apart(x, reference):
    """Relative distance."""
    x, reference = x.detach(), reference.detach()
    return float((x - reference).norm() / reference.norm())


@torch.no_grad()
def distances(module, block, x, grid):
    """How far a block with `module` for its attention is from the block itself: attention's output, the
    block's output, and the block's output where attention is left out."""
    normed = block.ln_1(x)
    host, other = block.attn(normed), module(normed, grid)

    def output(attention):
        y = x + attention
        return y + block.mlp(block.ln_2(y))

    whole = output(host)
    return apart(other, host), apart(output(other), whole), apart(output(torch.zeros_like(host)), whole)


def all_have_gradients(module, loss):
    loss.backward()
    return all(p.grad is not None and torch.isfinite(p.grad).all() for p in module.parameters())
