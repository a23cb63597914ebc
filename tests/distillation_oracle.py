"""What KARL and ALIT share, written out again: published names, and forwards from weights of such names."""

import math

import torch
import torch.nn.functional as F

SIZES = {"hidden": 128, "mults": (1, 1, 2, 2, 4)}
BASE = {"vqgan": SIZES | {"dim": 256, "codes": 1024}, "vae": SIZES | {"dim": 16}}


def vqgan_names(hidden, mults, dim, codes):
    """MAGE's VQGAN: {name: shape}."""
    top, last = hidden * mults[-1], len(mults) - 1

    def block(name, a, b):
        yield from {f"{name}.norm1.weight": (a,), f"{name}.norm1.bias": (a,)}.items()
        yield from {f"{name}.norm2.weight": (b,), f"{name}.norm2.bias": (b,)}.items()
        yield from {f"{name}.conv1.weight": (b, a, 3, 3), f"{name}.conv2.weight": (b, b, 3, 3)}.items()
        if a != b:
            yield f"{name}.nin_shortcut.weight", (b, b, 1, 1)

    def end(name, a, b, kernel):
        yield from {f"{name}.norm_out.weight": (a,), f"{name}.norm_out.bias": (a,)}.items()
        yield from {f"{name}.conv_out.weight": (b, a, kernel, kernel), f"{name}.conv_out.bias": (b,)}.items()

    yield "encoder.conv_in.weight", (hidden, 3, 3, 3)
    now = hidden
    for i, m in enumerate(mults):
        for j in range(2):
            yield from block(f"encoder.down.{i}.block.{j}", now, hidden * m)
            now = hidden * m
    for j in (1, 2):
        yield from block(f"encoder.mid.block_{j}", top, top)
        yield from block(f"decoder.mid.block_{j}", top, top)
    yield from end("encoder", top, dim, 1)
    yield from {"decoder.conv_in.weight": (top, dim, 3, 3), "decoder.conv_in.bias": (top,)}.items()
    now = top
    for i in range(last, -1, -1):
        for j in range(2):
            yield from block(f"decoder.up.{i}.block.{j}", now, hidden * mults[i])
            now = hidden * mults[i]
        if i:
            yield f"decoder.up.{i}.upsample.conv.weight", (now, now, 3, 3)
            yield f"decoder.up.{i}.upsample.conv.bias", (now,)
    yield from end("decoder", now, 3, 3)
    yield "quantize.embedding.weight", (codes, dim)


def vae_names(hidden, mults, dim):
    """LDM's KL-VAE as MAR has it: {name: shape}."""
    top, last = hidden * mults[-1], len(mults) - 1

    def conv(name, a, b, kernel):
        yield from {f"{name}.weight": (b, a, kernel, kernel), f"{name}.bias": (b,)}.items()

    def norm(name, a):
        yield from {f"{name}.weight": (a,), f"{name}.bias": (a,)}.items()

    def block(name, a, b):
        yield from norm(f"{name}.norm1", a)
        yield from norm(f"{name}.norm2", b)
        yield from conv(f"{name}.conv1", a, b, 3)
        yield from conv(f"{name}.conv2", b, b, 3)
        if a != b:
            yield from conv(f"{name}.nin_shortcut", a, b, 1)

    def attention(name, a):
        yield from norm(f"{name}.norm", a)
        for part in ("q", "k", "v", "proj_out"):
            yield from conv(f"{name}.{part}", a, a, 1)

    for side in ("encoder", "decoder"):
        yield from block(f"{side}.mid.block_1", top, top)
        yield from attention(f"{side}.mid.attn_1", top)
        yield from block(f"{side}.mid.block_2", top, top)
    yield from conv("encoder.conv_in", 3, hidden, 3)
    now = hidden
    for i, m in enumerate(mults):
        for j in range(2):
            yield from block(f"encoder.down.{i}.block.{j}", now, hidden * m)
            now = hidden * m
            if i == last:
                yield from attention(f"encoder.down.{i}.attn.{j}", now)
        if i < last:
            yield from conv(f"encoder.down.{i}.downsample.conv", now, now, 3)
    yield from norm("encoder.norm_out", top)
    yield from conv("encoder.conv_out", top, 2 * dim, 3)
    yield from conv("quant_conv", 2 * dim, 2 * dim, 1)
    yield from conv("post_quant_conv", dim, dim, 1)
    yield from conv("decoder.conv_in", dim, top, 3)
    for i in range(last, -1, -1):
        for j in range(3):
            yield from block(f"decoder.up.{i}.block.{j}", now, hidden * mults[i])
            now = hidden * mults[i]
        if i:
            yield from conv(f"decoder.up.{i}.upsample.conv", now, now, 3)
    yield from norm("decoder.norm_out", now)
    yield from conv("decoder.conv_out", now, 3, 3)


def base_names(base, **sizes):
    sizes = sizes or BASE[base]
    names = vqgan_names(**sizes) if base == "vqgan" else vae_names(**sizes)
    return {f"base_tokenizer.{base}.{name}": shape for name, shape in names}


def block_names(name, width, depth):
    """Transformer blocks of that name."""
    w = width
    shapes = {
        "ln_1.weight": (w,), "ln_1.bias": (w,), "ln_2.weight": (w,), "ln_2.bias": (w,),
        "attn.in_proj_weight": (3 * w, w), "attn.in_proj_bias": (3 * w,),
        "attn.out_proj.weight": (w, w), "attn.out_proj.bias": (w,),
        "mlp.c_fc.weight": (4 * w, w), "mlp.c_fc.bias": (4 * w,),
        "mlp.c_proj.weight": (w, 4 * w), "mlp.c_proj.bias": (w,),
    }  # fmt: skip
    return {f"{name}.{i}.{key}": shape for i in range(depth) for key, shape in shapes.items()}


def linear_names(name, a, b):
    return {f"{name}.weight": (b, a), f"{name}.bias": (b,)}


def norm_names(name, a):
    return {f"{name}.weight": (a,), f"{name}.bias": (a,)}


def random_state(names, seed=0):
    """Weights of those names and shapes, of which none is trivial."""
    g = torch.Generator().manual_seed(seed)

    def draw(name, shape):
        norm = len(shape) == 1 and name.endswith("weight")
        fan = math.prod(shape[1:]) if len(shape) > 1 and "embed" not in name and "token" not in name else 4
        return torch.randn(shape, generator=g) * fan**-0.5 + norm

    # the base coder is called a tokenizer, but its weights are convolutions
    state = {name: draw(name.replace("base_tokenizer", "base"), shape) for name, shape in names.items()}
    for name in state:
        if name.startswith("base_tokenizer") and "decoder.conv_out" in name:  # pictures mostly in [0, 1]
            state[name] = state[name] * 0.05 + 0.5 * name.endswith("bias")
    return state


def shapes(state):
    return {name: tuple(value.shape) for name, value in state.items()}


def group_norm(s, name, x):
    b, c = x.shape[:2]
    y = x.reshape(b, 32, -1)
    y = (y - y.mean(2, True)) / (y.var(2, unbiased=False, keepdim=True) + 1e-6).sqrt()
    return y.reshape(x.shape) * s[name + ".weight"].view(1, c, 1, 1) + s[name + ".bias"].view(1, c, 1, 1)


def swish(x):
    return x * torch.sigmoid(x)


def conv(s, name, x):
    w = s[name + ".weight"]
    return F.conv2d(x, w, s.get(name + ".bias"), padding=w.shape[2] // 2)


def res_block(s, name, x, of_output):
    y = conv(s, name + ".conv1", swish(group_norm(s, name + ".norm1", x)))
    y = conv(s, name + ".conv2", swish(group_norm(s, name + ".norm2", y)))
    if name + ".nin_shortcut.weight" in s:
        return y + conv(s, name + ".nin_shortcut", y if of_output else x)
    return y + x


def grid_attention(s, name, x):
    q, k, v = (conv(s, f"{name}.{part}", group_norm(s, name + ".norm", x)) for part in "qkv")
    weights = torch.einsum("bchw,bcij->bhwij", q, k) / q.shape[1] ** 0.5
    weights = weights.flatten(3).softmax(-1).unflatten(3, x.shape[2:])
    return x + conv(s, name + ".proj_out", torch.einsum("bhwij,bcij->bchw", weights, v))


def encode_base(s, base, images):
    """(B, N, dim), of the weights of a whole tokenizer."""
    s, is_vqgan = _part(s, base), base == "vqgan"
    x = conv(s, "encoder.conv_in", images)
    levels = 1 + max(int(name.split(".")[2]) for name in s if name.startswith("encoder.down"))
    for i in range(levels):
        for j in range(2):
            x = res_block(s, f"encoder.down.{i}.block.{j}", x, is_vqgan)
            if f"encoder.down.{i}.attn.{j}.q.weight" in s:
                x = grid_attention(s, f"encoder.down.{i}.attn.{j}", x)
        if i < levels - 1 and is_vqgan:
            x = (x[..., ::2, ::2] + x[..., 1::2, ::2] + x[..., ::2, 1::2] + x[..., 1::2, 1::2]) / 4
        elif i < levels - 1:
            name = f"encoder.down.{i}.downsample.conv"
            x = torch.cat([x, torch.zeros_like(x[..., :1])], 3)
            x = torch.cat([x, torch.zeros_like(x[..., :1, :])], 2)
            x = F.conv2d(x, s[name + ".weight"], s[name + ".bias"], stride=2)
    x = res_block(s, "encoder.mid.block_1", x, is_vqgan)
    x = x if is_vqgan else grid_attention(s, "encoder.mid.attn_1", x)
    x = res_block(s, "encoder.mid.block_2", x, is_vqgan)
    x = conv(s, "encoder.conv_out", swish(group_norm(s, "encoder.norm_out", x)))
    if not is_vqgan:
        x = conv(s, "quant_conv", x)
        x = x[:, : x.shape[1] // 2] * 0.2325
    return x.permute(0, 2, 3, 1).flatten(1, 2)


def decode_base(s, base, told):
    """Pictures of what is told of each place, (B, N, outputs)."""
    s, is_vqgan = _part(s, base), base == "vqgan"
    if is_vqgan:
        odds = told.exp()
        told = odds / odds.sum(-1, keepdim=True) @ s["quantize.embedding.weight"]
    side = math.isqrt(told.shape[1])
    x = told.reshape(len(told), side, side, -1).permute(0, 3, 1, 2)
    x = conv(s, "decoder.conv_in", x if is_vqgan else conv(s, "post_quant_conv", x))
    x = res_block(s, "decoder.mid.block_1", x, is_vqgan)
    x = x if is_vqgan else grid_attention(s, "decoder.mid.attn_1", x)
    x = res_block(s, "decoder.mid.block_2", x, is_vqgan)
    levels = 1 + max(int(name.split(".")[2]) for name in s if name.startswith("decoder.up"))
    for i in range(levels - 1, -1, -1):
        for j in range(2 if is_vqgan else 3):
            x = res_block(s, f"decoder.up.{i}.block.{j}", x, is_vqgan)
        if i:
            x = conv(s, f"decoder.up.{i}.upsample.conv", x.repeat_interleave(2, 2).repeat_interleave(2, 3))
    return conv(s, "decoder.conv_out", swish(group_norm(s, "decoder.norm_out", x)))


def layer_norm(s, name, x):
    x = (x - x.mean(-1, True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    return x * s[name + ".weight"] + s[name + ".bias"]


def linear(s, name, x):
    return x @ s[name + ".weight"].T + s[name + ".bias"]


def transformer(s, name, x, heads, blocked=None):
    """Blocks of that name on x (B, T, width). blocked (B, T, T): True where a row must not attend."""
    for i in range(1 + max(int(key[len(name) + 1 :].split(".")[0]) for key in s if key.startswith(name))):
        at = f"{name}.{i}"
        y = layer_norm(s, at + ".ln_1", x)
        q, k, v = (y @ s[at + ".attn.in_proj_weight"].T + s[at + ".attn.in_proj_bias"]).chunk(3, -1)
        outs = []
        for qh, kh, vh in zip(*(part.chunk(heads, -1) for part in (q, k, v))):
            weights = qh @ kh.transpose(1, 2) / qh.shape[-1] ** 0.5
            weights = weights if blocked is None else weights.masked_fill(blocked, -torch.inf)
            outs.append(weights.softmax(-1) @ vh)
        x = x + linear(s, at + ".attn.out_proj", torch.cat(outs, -1))
        y = linear(s, at + ".mlp.c_fc", layer_norm(s, at + ".ln_2", x))
        x = x + linear(s, at + ".mlp.c_proj", y * (1 + torch.erf(y / 2**0.5)) / 2)
    return x


def quantised(s, z):
    """The nearest codes of z (B, k, dim) by cosine, of length 1, and their numbers."""
    z, codes = z / z.norm(dim=-1, keepdim=True), s["quantize.embedding.weight"]
    codes = codes / codes.norm(dim=1, keepdim=True)
    ids = (z @ codes.T).argmax(-1)
    return codes[ids], ids


def _part(s, base):
    prefix = f"base_tokenizer.{base}."
    return {name[len(prefix) :]: value for name, value in s.items() if name.startswith(prefix)}
