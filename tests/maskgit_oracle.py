"""The convolutional coder of MaskGIT's VQGAN written out by hand, for a state dict s with published names."""

import torch
import torch.nn.functional as F


def scrambled(module):
    """All parameters random, the norms' among them, so that none can be left out unseen."""
    g = torch.Generator().manual_seed(1)
    for name, p in module.named_parameters():
        fan = p[0].numel() if p.dim() > 1 else 4
        p.data = torch.randn(p.shape, generator=g) * fan**-0.5 + (p.dim() == 1 and name.endswith("weight"))
    return module.eval()


def same(x, w, b=None, stride=1):
    """A convolution with TensorFlow's "SAME" padding, worked out from its formula."""
    for dim, kernel in ((2, w.shape[2]), (3, w.shape[3])):
        size = x.shape[dim]
        total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
        pad = [total // 2, total - total // 2]
        x = F.pad(x, [0, 0, *pad] if dim == 2 else pad)
    return F.conv2d(x, w, b, stride)


def norm_silu(s, name, x):
    b, c, h, w = x.shape
    groups = x.reshape(b, 32, c // 32, h, w)
    mean, var = groups.mean((2, 3, 4), True), groups.var((2, 3, 4), unbiased=False, keepdim=True)
    x = ((groups - mean) / (var + 1e-6).sqrt()).reshape(b, c, h, w)
    x = x * s[name + ".weight"][:, None, None] + s[name + ".bias"][:, None, None]
    return x * x.sigmoid()


def res_block(s, name, x):
    y = same(norm_silu(s, name + ".norm1", x), s[name + ".conv1.weight"])
    y = same(norm_silu(s, name + ".norm2", y), s[name + ".conv2.weight"])
    if y.shape == x.shape:
        return y + x
    return y + same(y, s[name + ".nin_shortcut.weight"])  # of what came out


def encode(s, x, levels, n):
    x = same(x, s["conv_in.weight"])
    for level in range(levels):
        for j in range(n):
            x = res_block(s, f"down.{level}.block.{j}", x)
        if level < levels - 1:
            x = (x[..., ::2, ::2] + x[..., 1::2, ::2] + x[..., ::2, 1::2] + x[..., 1::2, 1::2]) / 4
    for j in range(n):
        x = res_block(s, f"mid.{j}", x)
    return same(norm_silu(s, "norm_out", x), s["conv_out.weight"], s["conv_out.bias"])


def decode(s, x, levels, n):
    x = same(x, s["conv_in.weight"], s["conv_in.bias"])
    for j in range(n):
        x = res_block(s, f"mid.{j}", x)
    for level in range(levels)[::-1]:
        for j in range(n):
            x = res_block(s, f"up.{level}.block.{j}", x)
        if level:
            x = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
            x = same(x, s[f"up.{level}.upsample_conv.weight"], s[f"up.{level}.upsample_conv.bias"])
    return same(norm_silu(s, "norm_out", x), s["conv_out.weight"], s["conv_out.bias"])


# -- names and shapes


def block_shapes(name, start, width):
    shapes = {f"{name}.norm1.{p}": (start,) for p in ("weight", "bias")}
    shapes |= {f"{name}.norm2.{p}": (width,) for p in ("weight", "bias")}
    shapes |= {f"{name}.conv1.weight": (width, start, 3, 3), f"{name}.conv2.weight": (width, width, 3, 3)}
    return shapes | ({f"{name}.nin_shortcut.weight": (width, width, 1, 1)} if start != width else {})


def both(name, *shape):
    return {f"{name}.weight": shape, f"{name}.bias": shape[:1]}


def decoder_shapes():
    """Of the published one."""
    wanted = both("conv_in", 512, 256, 3, 3) | block_shapes("mid.0", 512, 512)
    wanted |= block_shapes("mid.1", 512, 512)
    widths = [(128, 128), (256, 128), (256, 256), (512, 256), (512, 512)]  # of each level, in and out
    for level, (start, width) in enumerate(widths):
        wanted |= block_shapes(f"up.{level}.block.0", start, width)
        wanted |= block_shapes(f"up.{level}.block.1", width, width)
        if level:
            wanted |= both(f"up.{level}.upsample_conv", width, width, 3, 3)
    wanted |= both("norm_out", 128) | both("conv_out", 3, 128, 3, 3)
    return wanted


def encoder_shapes():
    """Of the published one."""
    wanted = {"conv_in.weight": (128, 3, 3, 3)}
    widths = [(128, 128), (128, 128), (128, 256), (256, 256), (256, 512)]
    for level, (start, width) in enumerate(widths):
        wanted |= block_shapes(f"down.{level}.block.0", start, width)
        wanted |= block_shapes(f"down.{level}.block.1", width, width)
    wanted |= block_shapes("mid.0", 512, 512) | block_shapes("mid.1", 512, 512)
    wanted |= both("norm_out", 512) | both("conv_out", 256, 512, 1, 1)
    return wanted
