"""Measures both models on held-out test scenes, through the code path that any checkpoint takes."""

import json
import platform
from datetime import date
from pathlib import Path

import numpy as np
import torch
import transformers
from tqdm import tqdm
from transformers import AutoModel, AutoModelForImageTextToText, AutoProcessor

from vtc.evaluation.questions import KINDS, dataset
from vtc.evaluation.scenes import CLASSES, scene, singles

PATCHES = 144


class Reader:
    """tiny-llava with its processor, asked in batches."""

    def __init__(self, folder: Path):
        self.processor = AutoProcessor.from_pretrained(folder)
        self.model = AutoModelForImageTextToText.from_pretrained(folder).eval()

    def prompt(self, question: str, picture: bool = True) -> str:
        parts = [{"type": "image"}] * picture + [{"type": "text", "text": question}]
        return self.processor.apply_chat_template(
            [{"role": "user", "content": parts}], add_generation_prompt=True
        )

    @torch.no_grad()
    def answers(self, images: list, prompts: list[str], keep: np.ndarray | None = None) -> list[str]:
        """`keep` (B, K): the patches of each picture that the decoder gets; None: the model as it is."""
        inputs = self.processor(images=images or None, text=prompts, padding=True, return_tensors="pt")
        length = inputs["input_ids"].shape[1]
        if keep is not None:
            inputs, length = self.shorten(inputs, torch.from_numpy(keep)), 0
        out = self.model.generate(**inputs, max_new_tokens=4, do_sample=False)
        return [t.strip() for t in self.processor.batch_decode(out[:, length:], skip_special_tokens=True)]

    def shorten(self, inputs, keep: torch.Tensor) -> dict[str, torch.Tensor]:
        """The prompts as embeddings that hold only the patches `keep` (B, K)."""
        ids = inputs["input_ids"]  # (B, L)
        batch = torch.arange(len(ids))[:, None]
        seen = self.model.model.get_image_features(inputs["pixel_values"], return_dict=True).pooler_output
        kept = torch.stack(list(seen))[batch, keep]  # (B, K, D)
        image = ids == self.model.config.image_token_id
        stay = ~image
        stay[batch, image.int().argmax(1, keepdim=True) + torch.arange(keep.shape[1])] = (
            True  # one run of K places
        )
        short = ids[stay].view(len(ids), -1)  # (B, L - 144 + K)
        embeds = self.model.get_input_embeddings()(short.where(short != self.model.config.image_token_id, 0))
        embeds[short == self.model.config.image_token_id] = kept.flatten(0, 1)
        return {"inputs_embeds": embeds, "attention_mask": inputs["attention_mask"][stay].view(len(ids), -1)}

    def score(
        self, split: str, n: int, way: str = "full", tokens: int = 16, batch: int = 50
    ) -> dict[str, float]:
        """Share of right answers per kind and overall; `way` is full, blind, random or uniform."""
        right = {kind: [] for kind in KINDS}
        asked = dataset(split, n)
        rng = np.random.default_rng(0)
        for start in tqdm(range(0, n, batch), f"{way} on {split}", mininterval=5):
            part = asked[start : start + batch]
            images = [scene(split, i).image for i, _ in part] if way != "blind" else []
            keep = None
            if way == "random":
                keep = np.stack([np.sort(rng.choice(PATCHES, tokens, replace=False)) for _ in part])
            elif way == "uniform":
                keep = np.tile((np.arange(tokens) + 0.5) * PATCHES / tokens, (len(part), 1)).astype(int)
            told = self.answers(images, [self.prompt(q.text, way != "blind") for _, q in part], keep)
            for (_, q), answer in zip(part, told, strict=True):
                right[q.kind].append(answer == q.answer)
        every = [r for results in right.values() for r in results]
        return {"overall": float(np.mean(every))} | {kind: float(np.mean(r)) for kind, r in right.items()}


@torch.no_grad()
def zero_shot(folder: Path, n: int, split: str = "test") -> dict[str, float]:
    """Accuracy of tiny-clip on scenes with one object, over all colour and shape combinations."""
    processor, model = AutoProcessor.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
    chosen = singles(split, n)
    lines = [f"a photo of a {name} ." for name in CLASSES]
    logits = []
    for start in range(0, n, 100):
        images = [scene(split, i).image for i, _ in chosen[start : start + 100]]
        inputs = processor(images=images, text=lines, padding=True, return_tensors="pt")
        logits.append(model(**inputs).logits_per_image)  # (100, 56)
    order = torch.cat(logits).argsort(1, descending=True)  # (n, 56)
    target = torch.tensor([CLASSES.index(name) for _, name in chosen])[:, None]
    hit = order == target
    return {
        "classes": len(CLASSES),
        "top1": hit[:, 0].float().mean().item(),
        "top5": hit[:, :5].any(1).float().mean().item(),
    }


def chance(split: str, n: int) -> dict[str, float]:
    """Per kind the share of its commonest answer, which needs no picture."""
    answers = {kind: [q.answer for _, q in dataset(split, n) if q.kind == kind] for kind in KINDS}
    return {kind: max(map(a.count, a)) / len(a) for kind, a in answers.items()}


def measure(llava: Path, clip: Path, n: int = 2000) -> dict:
    reader = Reader(llava)
    ways = {way: reader.score("test", n, way) for way in ("full", "blind", "random", "uniform")}
    guess = chance("test", n)
    ways["chance"] = {"overall": float(np.mean(list(guess.values())))} | guess
    return {
        "questions": n, "kept_tokens": 16, "image_tokens": PATCHES, "scores": ways,
        "zero_shot": zero_shot(clip, n),
        "parameters": sum(p.numel() for p in reader.model.parameters()),
        "megabytes": (llava / "model.safetensors").stat().st_size / 1e6,
        "date": str(date.today()), "torch": torch.__version__, "transformers": transformers.__version__,
        "hardware": f"{torch.get_num_threads()} cores of {processor_name()}",
    }  # fmt: skip


def processor_name() -> str:
    info = Path("/proc/cpuinfo")
    names = (
        [line.split(":")[1].strip() for line in info.read_text().splitlines() if "model name" in line]
        if info.exists()
        else []
    )
    return names[0] if names else platform.processor()


if __name__ == "__main__":
    here = Path(__file__).resolve().parent
    print(json.dumps(measure(here, here.parent / "tiny-clip"), indent=1))
