"""The recipe of tiny-llava and tiny-clip: python models/tiny-llava/train.py, about an hour on two cores.

Four stages, each resumed from its last checkpoint when the script is started again:
tower    patch labels in the decoder's words, and captions, on vision tower, projector, words and text tower
decoder  questions, on projector, words and decoder; the tower rests
joint    everything on all losses, so that tower, decoder and text tower fit each other at the end
thin     decoder again, on a part of each picture's patches that holds the answers, now and then on none
Then both models are written, measured on the held-out test questions, and their cards are filled in.
On a shared machine set OMP_WAIT_POLICY=PASSIVE:
threads that spin while they wait cost up to eight times the time.
"""

import argparse
import itertools
import json
import os
import time
from pathlib import Path

import card
import numpy as np
import torch
from build import WIDTH, model_pair, save, share, vocabulary
from data import arrays, caption, normalised, pack, thin
from losses import PatchWords, Places, answer_loss, caption_loss, patch_labels
from score import measure
from tqdm import tqdm

from vtc.evaluation.questions import KINDS
from vtc.evaluation.scenes import scene

HERE = Path(__file__).resolve().parent
STAGES = {  # steps, pictures per step, learning rate
    "tower": (1400, 64, 1e-3),
    "decoder": (1250, 32, 1e-3),
    "joint": (1800, 32, 1e-3),
    "thin": (700, 32, 5e-4),
}
RESTING = ("decoder", "thin")  # stages in which the tower is not trained


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--cache", type=Path, default=HERE.parents[1] / ".cache/tiny", help="pictures, checkpoints, log"
    )
    parser.add_argument("--images", type=int, default=80_000, help="training pictures drawn in advance")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--stages", nargs="+", default=list(STAGES), choices=list(STAGES))
    parser.add_argument("--steps", type=int, help="instead of each stage's own number")
    parser.add_argument(
        "--start", type=Path, help="checkpoint to take the weights of, instead of the stage before"
    )
    parser.add_argument("--llava", type=Path, default=HERE)
    parser.add_argument("--clip", type=Path, default=HERE.parent / "tiny-clip")
    args = parser.parse_args()
    run = Run(args)
    for stage in args.stages:
        run.train(stage)
        run.write()
    facts = {"seed": args.seed, "pictures": args.images, "vocabulary": len(run.vocab), "stages": run.spent}
    card.write(facts | measure(args.llava, args.clip), args.llava, args.clip)


class Run:
    """Models, data and the clock of one training."""

    def __init__(self, args: argparse.Namespace):
        self.args, self.vocab = args, vocabulary()
        self.llava, self.clip = model_pair(args.seed)
        share(self.llava, self.clip)
        spread(self.clip)
        for config in (self.clip.config.vision_config, self.llava.config.text_config):
            config._attn_implementation = "plain"
        for layer in (*self.clip.vision_model.encoder.layers, *self.llava.model.language_model.layers):
            layer.compile()  # fuses what lies between the products: the decoder trains twice as fast
        self.words, self.places = PatchWords(), Places()
        self.parts = torch.nn.ModuleList([self.llava, self.clip, self.words, self.places])
        self.train_set = arrays(args.cache, "train", args.images)
        self.validation_set = arrays(args.cache, "validation", 2000)
        self.spent = {}  # per stage: steps, pictures per step, minutes
        if args.start:
            state = torch.load(args.start)
            self.parts.load_state_dict(state["weights"])
            self.spent = state["spent"]

    def train(self, stage: str) -> None:
        steps, batch, rate = STAGES[stage]
        steps = self.args.steps or steps
        file, log = self.args.cache / f"{stage}.pt", self.args.cache / "log.jsonl"
        frozen = self.clip.vision_model if stage in RESTING else None
        self.parts.requires_grad_(True)
        if frozen is not None:
            frozen.requires_grad_(False)
        decay = [p for p in self.parts.parameters() if p.requires_grad and p.ndim > 1]
        rest = [p for p in self.parts.parameters() if p.requires_grad and p.ndim < 2]
        groups = [{"params": decay, "weight_decay": 0.05}, {"params": rest, "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.98))
        first, spent = 0, 0.0
        if file.exists():
            state = torch.load(file)
            self.parts.load_state_dict(state["weights"])
            optimizer.load_state_dict(state["optimizer"])
            first, spent, self.spent = state["step"], state["seconds"], state["spent"]
        clock = time.time() - spent
        bar = tqdm(range(first, steps), stage, steps, initial=first, mininterval=5)
        for step in bar:
            # up in 100 steps, level, and down to a twentieth over the last 40 %
            factor = min(1, (step + 1) / 100, 0.05 + 0.95 * (steps - step) / (0.4 * steps))
            for group in optimizer.param_groups:
                group["lr"] = rate * factor
            rng = np.random.default_rng([self.args.seed, list(STAGES).index(stage), step])
            loss, notes = self.losses(stage, "train", rng.integers(0, self.args.images, batch), rng)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(decay + rest, 1.0)
            optimizer.step()
            if step % 50 == 0:
                bar.set_postfix({k: f"{v:.2f}" for k, v in notes.items()})
            if (step + 1) % 250 == 0 or step + 1 == steps:
                notes = self.validate(stage)
                with log.open("a") as out:
                    out.write(
                        json.dumps({"stage": stage, "step": step + 1, "seconds": time.time() - clock} | notes)
                        + "\n"
                    )
                self.spent[stage] = {"steps": step + 1, "batch": batch, "minutes": (time.time() - clock) / 60}
                state = {
                    "weights": self.parts.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1,
                    "seconds": time.time() - clock, "spent": self.spent,
                }  # fmt: skip
                torch.save(state, file.with_suffix(".part"))
                file.with_suffix(".part").replace(file)

    def losses(
        self, stage: str, split: str, indices: np.ndarray, rng: np.random.Generator
    ) -> tuple[torch.Tensor, dict]:
        pixels, *tables = self.train_set if split == "train" else self.validation_set
        scenes = [scene(split, int(i)) for i in indices]
        with torch.autocast("cpu", torch.bfloat16):
            x = torch.from_numpy(normalised(pixels[indices]))
            with torch.set_grad_enabled(stage not in RESTING and torch.is_grad_enabled()):
                seen = self.clip.vision_model(x, output_hidden_states=True)
            patches = self.llava.model.multi_modal_projector(
                seen.hidden_states[-2][:, 1:]
            ).float()  # (B, 144, D)
        total, notes = 0, {}
        if stage not in RESTING:
            table = self.llava.get_input_embeddings().weight
            loss, right = self.words(patches, table, patch_labels(*(t[indices] for t in tables)))
            total, notes = (
                total + loss * (1 if stage == "tower" else 0.3),
                notes | {f"patch {k}": v for k, v in right.items()},
            )
            lines = [caption(s, rng, self.vocab) for s in scenes]
            ids = torch.tensor(list(itertools.zip_longest(*lines, fillvalue=self.vocab["<pad>"]))).T
            text = self.clip.text_projection(self.clip.text_model(ids).pooler_output)
            image = self.clip.visual_projection(seen.pooler_output.float())
            loss, notes["caption"] = caption_loss(image, text, self.clip.logit_scale)
            total = total + loss * (0.5 if stage == "tower" else 0.3)
        if stage != "tower":
            keep = 144
            if stage == "thin" and split == "train":
                # all, some, or in one step of twenty none: a guess without the picture is an answer too
                some = rng.integers(12, 144)
                keep = int(rng.choice([144, some, 16, 0], p=[0.3, 0.45, 0.2, 0.05]))
                few = torch.from_numpy(thin(tables[0][indices], keep, rng))  # (B, K)
                patches = patches.gather(1, few[..., None].expand(-1, -1, WIDTH))  # (B, K, D)
            rows = pack(scenes, rng, self.vocab, each=8, tell=0.3 * (keep > 0), patches=keep)
            if not keep:
                rows["place"].zero_()
            loss, where, right = answer_loss(self.llava, patches, rows, self.places)
            total = total + loss + where
            notes |= {"loss": loss.item(), "places": where.item()}
            kinds = rows["kind"][rows["target"] >= 0]
            where = torch.arange(len(indices))[:, None].expand_as(rows["kind"])[rows["target"] >= 0]
            # a question is right when all tokens of its answer are; row, place and kind tell questions apart
            question, inverse = (where * 256 + kinds).unique(return_inverse=True)
            whole = torch.ones(len(question)).scatter_reduce(0, inverse, right.float(), "amin")
            for i, name in enumerate((*KINDS, "describe")):
                if (of_kind := question % 16 == i).any():
                    notes[name] = whole[of_kind].mean().item()
        return total, notes

    @torch.no_grad()
    def validate(self, stage: str) -> dict[str, float]:
        rng = np.random.default_rng(1)
        batches = [self.losses(stage, "validation", np.arange(s, s + 64), rng)[1] for s in range(0, 512, 64)]
        return {
            name: round(float(np.mean([b[name] for b in batches if name in b])), 4) for name in batches[0]
        }

    def write(self) -> None:
        """Both folders' weights and configs, each file moved into place when it is complete."""
        drafts = [self.args.cache / "draft-llava", self.args.cache / "draft-clip"]
        save(self.llava, self.clip, *drafts)
        for draft, folder in zip(drafts, (self.args.llava, self.args.clip), strict=True):
            folder.mkdir(parents=True, exist_ok=True)
            for file in draft.iterdir():
                file.chmod(0o644)
                os.replace(file, folder / file.name)


def spread(clip: torch.nn.Module) -> None:
    """CLIP's initial weights are made for wide towers; here every layer keeps the variance of its input."""
    depth = {"out_proj": 12, "fc2": 12}
    for name, module in clip.named_modules():
        if isinstance(module, torch.nn.Linear):
            torch.nn.init.normal_(
                module.weight, std=(module.in_features * depth.get(name.split(".")[-1], 1)) ** -0.5
            )
    vision, text = clip.vision_model.embeddings, clip.text_model.embeddings
    torch.nn.init.normal_(vision.patch_embedding.weight, std=192**-0.5)
    for table in (vision.position_embedding, text.position_embedding, text.token_embedding):
        torch.nn.init.normal_(table.weight, std=0.5 if table is text.token_embedding else 0.2)
    assert vision.class_embedding.shape == (WIDTH,)


if __name__ == "__main__":
    main()
