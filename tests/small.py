"""A tiny random model with the reference model's processor, and a task that it can answer."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import torch

from vtc.evaluation.prompts import encode
from vtc.evaluation.scenes import scene

REFERENCE = Path(__file__).parents[1] / "models" / "tiny-llava"
QUESTIONS = ("what colour is the star ?", "how many objects are there ?", "which digit is written ?")


def small_model(seed: int = 0):
    """A llava of 144 image tokens whose answers depend on the picture, the same for the same seed."""
    from transformers import AutoConfig, LlavaForConditionalGeneration

    config = AutoConfig.from_pretrained(REFERENCE)
    for part in (config.vision_config, config.text_config):
        part.hidden_size, part.intermediate_size, part.num_hidden_layers, part.num_attention_heads = (
            32,
            48,
            3,
            4,
        )
    config.text_config.num_key_value_heads, config.text_config.head_dim = 4, 8
    config._name_or_path = ""
    torch.manual_seed(seed)
    model = LlavaForConditionalGeneration(config).eval()
    for parameter in model.parameters():
        if parameter.ndim >= 2:
            torch.nn.init.normal_(parameter, std=0.3)
    vocabulary = range(config.text_config.vocab_size)
    model.generation_config.eos_token_id = list(vocabulary)  # answers of one word
    model.generation_config.suppress_tokens = list(vocabulary[:5])  # <pad>, <unk>, <image>, <s>, </s>
    return model


@cache
def small_processor():
    from transformers import AutoProcessor

    return AutoProcessor.from_pretrained(REFERENCE)


def write_task(folder: Path, n: int = 6) -> Path:
    """A jsonl file of n questions about n pictures, whose expected answers are what `small_model()` says."""
    processor, model = small_processor(), small_model()
    images = [scene("test", i).image for i in range(n)]
    asked = [QUESTIONS[i % len(QUESTIONS)] for i in range(n)]
    inputs = encode(processor, asked, images)
    output = model.generate(**inputs, do_sample=False, max_new_tokens=5)
    answers = processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    lines = []
    for i, (image, question, answer) in enumerate(zip(images, asked, answers, strict=True)):
        image.save(folder / f"{i}.png")
        lines.append(
            {"image": f"{i}.png", "question": question, "answer": answer, "kind": question.split()[1]}
        )
    path = folder / "task.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path
