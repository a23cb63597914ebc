"""Reads the configuration that lies beside published FlexTok weights: modules by name, each with its class
and arguments, in the order in which they run."""

from __future__ import annotations

from typing import Any

from .vae import published_vae

# by class, in the order in which flextok_network.py builds them
ENCODER = ("PatchEmbedder", "Positions2D", "Registers1D", "FlexTransformer", "LinearHead")
DECODER = (
    "LinearLayer", "Positions1D", "MaskedNestedDropout", "LearnedNullCond", "PatchEmbedder", "Positions2D",
    "TimestepEmbedder", "FlexTransformer", "ToPatchesLinearHead",
)  # fmt: skip
# without weights that decoding needs; MLPHead compares features with another network in training
IGNORED = ("PerSampleOp", "BlockWiseSequencePacker", "SequenceUnpacker", "DictKeyFilter", "MLPHead")
TRANSFORMER = {
    "qkv_bias": False, "proj_bias": False, "mlp_bias": False, "gated_mlp": True, "qk_norm": True,
    "rope_forward_read_key": None,
}  # fmt: skip


def options(published: dict[str, Any]) -> dict[str, Any] | None:
    """Options of this project's configuration; None where it is of another system.

    Raises ValueError for a module or an argument that is not supported.
    """
    published = published.get("config", published)
    try:
        encoder, decoder = (published[part]["module_dict"] for part in ("encoder", "decoder"))
        levels = published["regularizer"]["levels"]
    except (KeyError, TypeError):
        return None
    encoder_names, (patch, position, registers, trunk, head) = _find(encoder, ENCODER)
    decoder_names, (_, token_position, mask, null, noise, decoder_position, time, decoder_trunk, out) = _find(
        decoder, DECODER
    )
    if [name for name in decoder if name in decoder_names[1:4]] != list(decoder_names[1:4]):
        raise ValueError(
            "FlexTok is supported where positions come first, then masks, then the null condition"
        )
    _require(null, replace_with_single_token=False, read_write_key=mask["read_write_key"])
    _require(registers, ordering_mode="nested", extra_registers_write_key=None)
    for module in (patch, noise):
        _require(module, patch_sizes=[patch["patch_sizes"][0]] * 2)
    for module in (position, decoder_position):
        _require(module, max_sizes=[position["max_sizes"][0]] * 2)
    _require(token_position, max_sizes=[registers["n_max"]])
    for module in (trunk, decoder_trunk):
        _require(
            module, head_dim=trunk.get("head_dim", 64), mlp_ratio=trunk.get("mlp_ratio", 4.0), **TRANSFORMER
        )
    for module in (head, out):
        _require(module, use_mup_readout=head.get("use_mup_readout", False), proj_bias=True)
    if {out.get("adaLN_emb_read_key"), decoder_trunk.get("adaLN_emb_read_key")} != {
        time["time_embedding_write_key"]
    }:
        raise ValueError("FlexTok is supported where time modulates the decoder's transformer and head")
    sets = decoder_trunk.get("adaLN_expansion", 1)
    _pack(encoder, registers["registers_write_key"], mask_mode="causal_last")
    _pack(decoder, mask["read_write_key"], mask_mode="full", per_subseq_embs=sets == 2)
    vae = _vae(published.get("vae") or {})
    size = patch["patch_sizes"][0] * 2 ** (len(vae["vae_channels"]) - 1)
    return vae | {
        "image_size": position["max_sizes"][0] * size,
        "tokens": registers["n_max"],
        "levels": tuple(levels),
        "patch": patch["patch_sizes"][0],
        "encoder_width": trunk.get("dim", 768),
        "encoder_depth": trunk.get("depth", 12),
        "decoder_width": decoder_trunk.get("dim", 768),
        "decoder_depth": decoder_trunk.get("depth", 12),
        "head_dim": trunk.get("head_dim", 64),
        "mlp_ratio": trunk.get("mlp_ratio", 4.0),
        "encoder_positions": position.get("posemb_type", "sincos"),
        "decoder_positions": decoder_position.get("posemb_type", "sincos"),
        "token_positions": token_position.get("posemb_type", "sincos"),
        "modulation_sets": sets,
        "time_frequencies": time.get("frequency_embedding_size", 256),
        "max_time": time.get("max_timestep", 1000.0),
        "mup_readout": head.get("use_mup_readout", False),
        "schedule": mask.get("size_sampling_mode", "uniform"),
        "drop_condition": null.get("dropout_prob", 0.0),
        "drop_quantiser": published["regularizer"].get("drop_quant_p", 0.0),
        "encoder_names": encoder_names,
        "decoder_names": decoder_names,
    }


def _find(modules: dict[str, Any], wanted: tuple[str, ...]) -> tuple[tuple[str, ...], list[dict[str, Any]]]:
    """Names and arguments of the modules of the wanted classes, one of each."""
    found = {}
    for name, arguments in modules.items():
        kind = arguments["_target_"].rpartition(".")[2]
        if kind == "PositionalEmbeddingAdder":
            kind = f"Positions{len(arguments['max_sizes'])}D"
        if kind in IGNORED:
            continue
        if kind not in wanted or kind in found:
            raise ValueError(f"FlexTok is not supported with the module {name} ({kind})")
        found[kind] = name
    missing = [kind for kind in wanted if kind not in found]
    if missing:
        raise ValueError(f"FlexTok is not supported without a module {', '.join(missing)}")
    names = tuple(found[kind] for kind in wanted)
    return names, [modules[name] for name in names]


def _pack(modules: dict[str, Any], last: str, **supported: Any) -> None:
    """Patches come first in the sequence and registers last, with that mask."""
    for module in modules.values():
        if module["_target_"].endswith("SequencePacker"):
            keys = module["input_list_read_keys"]
            if len(keys) != 2 or keys[1] != last:
                raise ValueError(f"FlexTok is supported with sequences of patches and {last}, not of {keys}")
            _require({"mask_mode": "full", "per_subseq_embs": False} | module, **supported)


def _require(module: dict[str, Any], **supported: Any) -> None:
    for option, value in supported.items():
        if option in module and module[option] != value:
            raise ValueError(f"FlexTok is supported with {option} = {value!r}, not {module[option]!r}")


def _vae(vae: dict[str, Any]) -> dict[str, Any]:
    """The latent VAE: as Stable Diffusion's, or as told where the configuration points to."""
    base = {"latent_channels": vae.get("latent_channels", 16), "block_out_channels": [128, 256, 512, 512],
            "layers_per_block": 2, "norm_num_groups": 32}  # fmt: skip
    if vae.get("hf_hub_path"):
        base |= published_vae(vae["hf_hub_path"])
    scale = vae.get("scaling_factor") or base.get("scaling_factor")
    if not scale:
        raise ValueError("the configuration does not tell the scaling_factor of the latents")
    return {
        "latent_channels": base["latent_channels"],
        "vae_channels": tuple(base["block_out_channels"]),
        "vae_layers": base["layers_per_block"],
        "vae_groups": base["norm_num_groups"],
        "scaling_factor": scale,
    }
