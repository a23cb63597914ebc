"""Families of transformers that take images and cannot be served: model_type -> why, and what to do."""

_OWN_GENERATE = (
    "its generate() puts the picture's few latents into the prompt itself, behind which no hook of the model "
    "runs; use a model whose tokens are patches"
)
_NO_PROMPT = (
    "its pictures are not in the prompt: its decoder looks at them through cross-attention; use a model "
    "whose image tokens are"
)
_NO_PLACES = (
    "its image tokens have no places in the prompt, and its masks count on a fixed number of them; use a "
    "model whose prompt holds its image tokens"
)
_MASKED_PLACES = (
    "its decoder itself writes a picture's latents to places given by a mask; use a model whose tokens are "
    "patches"
)
_TALKER = (
    "its talker reads the thinker's states of every token of the prompt; call compress(model.thinker, ...) "
    "and generate(return_audio=False)"
)
_ONE_FORWARD = (
    "its base model puts pictures into the prompt and runs its layers in one forward, so that nothing can be "
    "taken out in between; use a model with a language model of its own inside"
)
_NO_BORDERS = (
    "it hands over the patches of all pictures in one row without saying where one ends, so that no picture "
    "can be given a budget; use a model whose pictures come one by one"
)

REFUSED: dict[str, str] = {
    "blip": _NO_PROMPT,
    "blip-2": _OWN_GENERATE,
    "chameleon": _ONE_FORWARD,
    "evolla": "it looks at proteins, not at pictures; leave it as it is",
    "florence2": _NO_PROMPT,
    "fuyu": _NO_BORDERS,
    "git": _NO_PLACES,
    "idefics": _NO_PROMPT,
    "inkling_mm_model": _NO_BORDERS,
    "instructblip": _OWN_GENERATE,
    "instructblipvideo": _OWN_GENERATE,
    "kosmos-2": _MASKED_PLACES,
    "kosmos-2.5": _MASKED_PLACES,
    "mistral4": "it is a language model alone, without an encoder of pictures; leave it as it is",
    "phi4_multimodal": _ONE_FORWARD,
    "pi0": "it is a robot's policy that writes no text; leave it as it is",
    "pix2struct": _NO_PROMPT,
    "pp_formulanet": _NO_PROMPT,
    "qwen2_5_omni": _TALKER,
    "qwen3_omni_moe": _TALKER,
    "udop": _NO_PROMPT,
    "vision-encoder-decoder": _NO_PROMPT,
}
