"""Averages carried over reductions, as CLCA does it, against its steps in plain loops."""

from dataclasses import dataclass

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer

import vtc

DEPTH, PREFIX = 6, 1


@dataclass
class Leading(vtc.Select):
    """Keeps the first tokens."""

    name = "test-leading"
    stages = ("encoder",)

    def score(self, tokens):
        return -tokens.place.float()


@pytest.fixture
def vit():
    torch.manual_seed(0)
    model = VisionTransformer(
        img_size=32, patch_size=8, embed_dim=32, depth=DEPTH, num_heads=4, num_classes=3
    )
    for parameter in model.parameters():
        if parameter.ndim >= 2:
            torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


def steps_of_the_card(vit, pixels, left):
    """Blocks one after the other; `left` patches leave each. Recovered averages stand at the end."""
    x = vit.norm_pre(vit._pos_embed(vit.patch_embed(pixels)))
    patches, cache, lengths = x.shape[1] - PREFIX, [], []
    recovers = [b for b in range(DEPTH) if left[b] < ([patches, *left][b])] + [DEPTH - 2]
    for number, block in enumerate(vit.blocks):
        x = x + block.attn(block.norm1(x))
        x = torch.cat([x[:, : PREFIX + left[number]], x[:, PREFIX + patches :]], dim=1)
        patches = left[number]
        x = x + block.mlp(block.norm2(x))
        average = x[:, PREFIX : PREFIX + patches].mean(dim=1, keepdim=True)
        if number in recovers:
            x, cache = torch.cat([x, *cache], dim=1), []
        if number < recovers[-1]:
            cache.append(average)
        lengths.append(x.shape[1])
    return vit.norm(x[:, : PREFIX + patches]), lengths


@pytest.mark.parametrize("keep", [{1: 12, 3: 7}, {2: 0.5}, [14, 12, 10, 8, 6, 5]])
def test_averages_of_the_blocks_join_after_the_next_reduction(vit, keep):
    pixels, lengths = torch.randn(3, 3, 32, 32), []
    hooks = [b.register_forward_hook(lambda *a: lengths.append(a[2].shape[1])) for b in vit.blocks]
    with torch.no_grad(), vtc.compress(vit, Leading(), keep=keep, carry="gap") as handle:
        found = vit.forward_features(pixels)
        logits = vit(pixels)
        left, now = [], 16
        for block in range(DEPTH):
            now = len(handle.last[0].blocks[block][0]) if block in handle.last[0].blocks else now
            left.append(now)
    for hook in hooks:
        hook.remove()
    expected, grown = steps_of_the_card(vit, pixels, left)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert lengths[: DEPTH - 1] == grown[:-1] and lengths[DEPTH - 1] == PREFIX + left[-1]
    assert sum(grown) > sum(PREFIX + count for count in left)  # carried averages are among the tokens
    torch.testing.assert_close(logits, vit.forward_head(found))


def test_merged_tokens_are_not_mixed_with_carried_ones(vit):
    pixels = torch.randn(2, 3, 32, 32)
    with torch.no_grad(), vtc.compress(vit, "tome", keep=0.5, carry="gap") as handle:
        found = vit.forward_features(pixels)
    assert found.shape[1] == PREFIX + 8
    assert all(record.source.max() == 7 and len(record.source) == 16 for record in handle.last)


def test_what_does_not_go_with_it_is_refused(vit):
    with pytest.raises(ValueError, match="restore='unmerge'"):
        vtc.compress(vit, "tome", keep=0.5, carry="gap", restore="unmerge")
    with pytest.raises(ValueError, match="carry must be 'gap'"):
        vtc.compress(vit, "tome", keep=0.5, carry="cls")
    vit.set_grad_checkpointing(True)
    with vtc.compress(vit, "tome", keep=0.5, carry="gap"):
        loss = vit.train()(torch.randn(2, 3, 32, 32)).sum()
        with pytest.raises(RuntimeError, match="gradient checkpointing"):
            loss.backward()
