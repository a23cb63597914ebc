"""The configurations that lie beside the weights of TiTok and of its nearest descendants."""

from __future__ import annotations

from typing import Any

# What `model.vq_model` holds. With anything else it is of a system that changed more.
_NEEDED = {
    "num_latent_tokens",
    "token_size",
    "vit_dec_model_size",
    "vit_dec_patch_size",
    "vit_enc_model_size",
    "vit_enc_patch_size",
}
_CODES = {"codebook_size", "commitment_cost", "use_l2_norm"}
_KNOWN = {
    "clustering_vq",
    "finetune_decoder",
    "is_legacy",
    "pretrained_tokenizer_weight",
    "quantize_mode",
    "strict_length_assertion",
    "text_context_length",
    "text_embed_dim",
}


def read(published: dict[str, Any]) -> tuple[str, dict[str, Any]] | None:
    """The name of the system and the options of its Config; None for a configuration of another kind.

    TA-TiTok's differs from TiTok's by nothing but the names of the experiment. Raises ValueError for weights
    of the first of two training stages, which give codes and not pictures.
    """
    model = published.get("model")
    vq = model.get("vq_model") if isinstance(model, dict) else None
    if not isinstance(vq, dict) or not _NEEDED <= set(vq) <= _NEEDED | _CODES | _KNOWN:
        return None
    bottleneck = {"vq": "vq", "vae": "kl"}.get(vq.get("quantize_mode", "vq"))
    if bottleneck is None or (bottleneck == "vq" and not set(vq) >= _CODES):
        return None
    legacy, painted = vq.get("is_legacy", True), vq.get("finetune_decoder", True)
    if legacy and not painted:
        raise ValueError(
            "these are weights of TiTok's first training stage, which give codes and not pictures: "
            "take those of the second, with finetune_decoder"
        )
    if painted and not legacy:
        raise ValueError("finetune_decoder goes with is_legacy: else there are no codes to paint")
    if vq["vit_enc_patch_size"] != vq["vit_dec_patch_size"]:
        raise ValueError("an encoder and a decoder with patches of different sizes are not supported")
    options = {
        "image_size": published["dataset"]["preprocessing"]["crop_size"],
        "patch": vq["vit_enc_patch_size"],
        "tokens": vq["num_latent_tokens"],
        "encoder": vq["vit_enc_model_size"],
        "decoder": vq["vit_dec_model_size"],
        "legacy_layout": legacy,
        "bottleneck": bottleneck,
        "dim": vq["token_size"],
    }
    if bottleneck == "vq":
        options |= {"codes": vq["codebook_size"], "l2": vq["use_l2_norm"], "beta": vq["commitment_cost"]}
    if model.get("type") == "one_d_piece" or not vq.get("strict_length_assertion", True):
        return "one-d-piece", options
    text = {"text_length": "text_context_length", "text_dim": "text_embed_dim"}
    experiment = published.get("experiment") or {}
    if set(text.values()) & set(vq) or any("tatitok" in str(value) for value in experiment.values()):
        return "ta-titok", options | {ours: vq[theirs] for ours, theirs in text.items() if theirs in vq}
    return "titok", options
