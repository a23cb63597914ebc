"""TiTok and what was made of it written out by hand, for a state dict s with published names.

In double precision: in a decoder of random weights that is as small as in tests, groups of the norms hold a
single channel that hardly varies, and rounding is enlarged a hundred times.
"""

import math

import torch
import torch.nn.functional as F
from maskgit_oracle import both, decode, decoder_shapes, scrambled
from tiny_tokenizers import TINY

# -- what goes in


def made(cls, **options):
    """A tokenizer with random weights whose tokens differ."""
    tokenizer = scrambled(cls(cls.Config(**(TINY[cls.name] | options)))).double()
    if tokenizer.quantize.size:
        with torch.no_grad():  # codes where latents are, or all would have the same
            found = tokenizer.encoder(pictures(12), tokenizer.latent_tokens).flatten(0, 1)
        codes = tokenizer.quantize.size
        tokenizer.quantize.embedding.weight.data = found[:: len(found) // codes][:codes].clone()
    return tokenizer


def pictures(n=4):
    """Of squares and some noise, 16 x 16."""
    g = torch.Generator().manual_seed(2)
    squares = (torch.rand(n, 3, 4, 4, generator=g) > 0.5).double()
    squares = squares.repeat_interleave(4, 2).repeat_interleave(4, 3)
    return squares * 0.8 + torch.rand(n, 3, 16, 16, generator=g).double() * 0.2


# -- forward


def norm(s, name, x):
    mean, var = x.mean(-1, keepdim=True), x.var(-1, unbiased=False, keepdim=True)
    return (x - mean) / (var + 1e-5).sqrt() * s[name + ".weight"] + s[name + ".bias"]


def linear(s, name, x):
    return x @ s[name + ".weight"].flatten(1).T + s[name + ".bias"]  # of a 1 x 1 convolution too


def transformer(s, part, x, heads):
    """x (B, T, width), each token attending to all."""
    depth = len({name.split(".")[2] for name in s if name.startswith(part + ".transformer.")})
    for i in range(depth):
        block = f"{part}.transformer.{i}"
        y = norm(s, block + ".ln_1", x)
        qkv = y @ s[block + ".attn.in_proj_weight"].T + s[block + ".attn.in_proj_bias"]
        outs = []
        for q, k, v in zip(*(part.chunk(heads, -1) for part in qkv.chunk(3, -1)), strict=True):
            weights = (q @ k.transpose(1, 2) / math.sqrt(q.shape[-1])).softmax(-1)
            outs.append(weights @ v)
        x = x + linear(s, block + ".attn.out_proj", torch.cat(outs, -1))
        y = linear(s, block + ".mlp.c_fc", norm(s, block + ".ln_2", x))
        y = y * 0.5 * (1 + torch.erf(y / math.sqrt(2)))
        x = x + linear(s, block + ".mlp.c_proj", y)
    return x


def latents(s, images, heads, patch, legacy):
    """What the bottleneck is given: (B, K, channels)."""
    b, k = len(images), len(s["latent_tokens"])
    kernel, patches = s["encoder.patch_embed.weight"].flatten(1), []
    for top in range(0, images.shape[2], patch):
        for left in range(0, images.shape[3], patch):
            square = images[:, :, top : top + patch, left : left + patch].flatten(1)
            patches.append(square @ kernel.T + s["encoder.patch_embed.bias"])
    x = torch.stack([s["encoder.class_embedding"][0].expand(b, -1), *patches], 1)
    x = x + s["encoder.positional_embedding"]
    own = s["latent_tokens"] + s["encoder.latent_token_positional_embedding"]
    x = torch.cat([x, own[None].expand(b, -1, -1)], 1)
    x = transformer(s, "encoder", norm(s, "encoder.ln_pre", x), heads)
    x = norm(s, "encoder.ln_post", x[:, -k:])  # (B, K, width)
    if legacy:
        width, flat = x.shape[2], x.reshape(b, -1)
        tokens = [torch.stack([flat[:, c * k + token] for c in range(width)], 1) for token in range(k)]
        x = torch.stack(tokens, 1)
    return linear(s, "encoder.conv_out", x)


def quantised(s, z, l2):
    """Values and numbers of the nearest codes, and the loss."""
    codebook = s["quantize.embedding.weight"].to(z)
    if l2:
        codebook = codebook / codebook.norm(dim=1, keepdim=True)
        z = z / z.norm(dim=-1, keepdim=True)
    ids = (z[..., None, :] - codebook).square().sum(-1).argmin(-1)
    loss = 1.25 * (codebook[ids] - z).square().mean()
    return codebook[ids], ids, loss


def decoded(s, values, heads, patch, text=None):
    """values (B, k, d) to pixels, or to logits of codes where the state dict has a head for such."""
    b, k = values.shape[:2]
    n = len(s["decoder.positional_embedding"]) - 1
    side = math.isqrt(n)
    x = torch.cat([s["decoder.class_embedding"][None], s["decoder.mask_token"].expand(1, n, -1)], 1)
    x = (x + s["decoder.positional_embedding"]).expand(b, -1, -1)
    tokens = linear(s, "decoder.decoder_embed", values)
    x = torch.cat([x, tokens + s["decoder.latent_token_positional_embedding"][:k]], 1)
    if text is not None:
        words = linear(s, "decoder.text_guidance_proj", text)
        x = torch.cat([x, words + s["decoder.text_guidance_positional_embedding"]], 1)
    x = transformer(s, "decoder", norm(s, "decoder.ln_pre", x), heads)
    x = linear(s, "decoder.ffn.0", norm(s, "decoder.ln_post", x[:, 1 : 1 + n]))
    if "decoder.ffn.2.weight" in s:
        return linear(s, "decoder.ffn.2", x.tanh()).transpose(1, 2).reshape(b, -1, side, side)
    picture = x.new_zeros(b, 3, side * patch, side * patch)
    for place in range(n):
        top, left = place // side * patch, place % side * patch
        square = x[:, place].reshape(b, patch, patch, 3)
        picture[:, :, top : top + patch, left : left + patch] = square.permute(0, 3, 1, 2)
    return F.conv2d(picture, s["decoder.conv_out.weight"], s["decoder.conv_out.bias"], padding=1)


def painted(s, logits, levels, res_blocks):
    """Logits (B, codes, h, w) as pixels."""
    weights = logits.exp() / logits.exp().sum(1, keepdim=True)
    mixed = (weights.permute(0, 2, 3, 1) @ s["pixel_quantize.embedding.weight"]).permute(0, 3, 1, 2)
    own = {name.removeprefix("pixel_decoder."): p for name, p in s.items()}
    return decode(own, mixed, levels, res_blocks)


# -- names and shapes, of pictures of 256 x 256 in patches of 16 x 16

SIZES = {"s": (512, 8), "b": (768, 12), "l": (1024, 24)}  # width, depth


def vit_shapes(part, size, tokens):
    width, depth = SIZES[size]
    shapes = both(f"{part}.ln_pre", width) | both(f"{part}.ln_post", width)
    shapes[f"{part}.class_embedding"] = (1, width)
    shapes[f"{part}.positional_embedding"] = (257, width)
    shapes[f"{part}.latent_token_positional_embedding"] = (tokens, width)
    for i in range(depth):
        block = f"{part}.transformer.{i}"
        shapes |= both(f"{block}.ln_1", width) | both(f"{block}.ln_2", width)
        shapes[f"{block}.attn.in_proj_weight"] = (3 * width, width)
        shapes[f"{block}.attn.in_proj_bias"] = (3 * width,)
        shapes |= both(f"{block}.attn.out_proj", width, width)
        shapes |= both(f"{block}.mlp.c_fc", 4 * width, width) | both(f"{block}.mlp.c_proj", width, 4 * width)
    return shapes


def shapes(encoder, decoder, tokens, codes, dim, legacy):
    """codes: None for a VAE."""
    w_enc, w_dec = SIZES[encoder][0], SIZES[decoder][0]
    shapes = {"latent_tokens": (tokens, w_enc)}
    shapes |= vit_shapes("encoder", encoder, tokens) | vit_shapes("decoder", decoder, tokens)
    shapes |= both("encoder.patch_embed", w_enc, 3, 16, 16)
    shapes |= both("encoder.conv_out", dim if codes else 2 * dim, w_enc, 1, 1)
    shapes |= both("decoder.decoder_embed", w_dec, dim)
    shapes["decoder.mask_token"] = (1, 1, w_dec)
    if codes:
        shapes["quantize.embedding.weight"] = (codes, dim)
    if not legacy:
        shapes |= both("decoder.ffn.0", 768, w_dec, 1, 1) | both("decoder.conv_out", 3, 3, 3, 3)
        return shapes
    shapes |= both("decoder.ffn.0", 2 * w_dec, w_dec, 1, 1) | both("decoder.ffn.2", 1024, 2 * w_dec, 1, 1)
    shapes["pixel_quantize.embedding.weight"] = (1024, 256)
    return shapes | {f"pixel_decoder.{name}": shape for name, shape in decoder_shapes().items()}


def has_shapes(cls, config, wanted):
    """Whether a tokenizer has parameters of these names and shapes, and nothing else."""
    with torch.device("meta"):
        found = {name: tuple(p.shape) for name, p in cls(config).state_dict().items()}
    assert found == wanted
    return True


# -- what lies beside the weights

WORDS = {"s": "small", "b": "base", "l": "large"}


def official(encoder, decoder, tokens, codes, dim, legacy, **changes):
    """As the official config.json has it. codes: None for a VAE. changes: to model.vq_model."""
    vq = {
        "token_size": dim,
        "num_latent_tokens": tokens,
        "vit_enc_model_size": WORDS[encoder],
        "vit_dec_model_size": WORDS[decoder],
        "vit_enc_patch_size": 16,
        "vit_dec_patch_size": 16,
        "finetune_decoder": legacy,
    }
    if not legacy:  # the first weights were made before there was another kind
        vq |= {"quantize_mode": "vq" if codes else "vae", "is_legacy": False}
    if codes:
        vq |= {"codebook_size": codes, "use_l2_norm": legacy, "commitment_cost": 0.25}
    return {
        "experiment": {"output_dir": "titok"},
        "model": {"vq_model": vq | changes, "generator": {"model_type": "ViT"}},
        "dataset": {"preprocessing": {"crop_size": 256}},
    }
