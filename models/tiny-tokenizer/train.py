"""The recipe of tiny-tokenizer: python models/tiny-tokenizer/train.py, under an hour on two cores.

Pictures are drawn first, scenes and textures. The tokenizer starts as their principal components, and is
trained to reconstruct: in every step some pictures are decoded from all of their tokens and the others from a
beginning (nested dropout). Then the halting head learns from the errors of the finished tokenizer. Started
again after a stop, it goes on from the last checkpoint.
The clock, drawing included, is kept over stops and written into training.json beside the weights. On a shared
machine set OMP_WAIT_POLICY=PASSIVE.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from vtc.evaluation.scenes import scene
from vtc.evaluation.textures import texture
from vtc.tokenizers.images import load_images
from vtc.tokenizers.schedules import DropSchedule
from vtc.tokenizers.systems.ordered import Ordered

HERE = Path(__file__).resolve().parent
SCENES_PER_TEXTURE = 3
UNIFORM, POWERS = DropSchedule("uniform"), DropSchedule("pow2")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    cache = HERE.parents[1] / ".cache/tiny-tokenizer"
    parser.add_argument("--cache", type=Path, default=cache, help="pictures, checkpoint and log")
    parser.add_argument("--out", type=Path, default=HERE)
    parser.add_argument("--images", type=int, default=80_000, help="training pictures drawn in advance")
    parser.add_argument("--steps", type=int, default=1700)
    parser.add_argument("--halting-steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=96)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.cache.mkdir(parents=True, exist_ok=True)
    train(args)


def train(args: argparse.Namespace) -> None:
    torch.manual_seed(args.seed)
    started, before = time.perf_counter(), (0.0, 0.0)
    tokenizer = Ordered(Ordered.Config())
    optimisers = _optimisers(tokenizer, args.lr)
    checkpoint, start = args.cache / "checkpoint.pt", 0
    if checkpoint.is_file():
        state = torch.load(checkpoint, weights_only=True)
        tokenizer.load_state_dict(state["weights"])
        for optimiser, known in zip(optimisers, state["optimisers"]):
            optimiser.load_state_dict(known)
        start, before = state["step"], state["seconds"]
    pictures = draw(args.cache / f"pictures-{args.images}.npy", args.images, tokenizer.config.image_size)
    if not start:
        tokenizer.start_from(batch(pictures, np.arange(min(8000, args.images))))
    for step in tqdm(range(start, args.steps), initial=start, total=args.steps, disable=None):
        chosen = np.random.default_rng([args.seed, step]).integers(0, len(pictures), args.batch)
        images = batch(pictures, chosen)
        for optimiser in optimisers:
            for group in optimiser.param_groups:
                group["lr"] = group["initial_lr"] * pace(step, args.steps)
        losses = advance(tokenizer, optimisers, images, _lengths(tokenizer, args, step))
        if not math.isfinite(losses["reconstruction"]):
            raise RuntimeError(
                f"the loss is not finite at step {step}: start again from {checkpoint} with a lower --lr"
            )
        seconds = before[0] + time.perf_counter() - started
        busy = before[1] + time.process_time()  # of all threads
        with open(args.cache / "log.jsonl", "a") as log:
            log.write(json.dumps({"step": step, "seconds": round(seconds, 1), **losses}) + "\n")
        if (step + 1) % 200 == 0 or step + 1 == args.steps:
            known = [optimiser.state_dict() for optimiser in optimisers]
            new = {"weights": tokenizer.state_dict(), "optimisers": known, "step": step + 1}
            new["seconds"] = (seconds, busy)
            torch.save(new, checkpoint.with_suffix(".new"))
            checkpoint.with_suffix(".new").replace(checkpoint)
    teach_halting(tokenizer, pictures, args)
    seconds = before[0] + time.perf_counter() - started
    busy = before[1] + time.process_time()
    # Half precision halves the file; the codes it changes are those at the border of two levels.
    tokenizer.half().save_pretrained(args.out)
    told = {name: getattr(args, name) for name in ("steps", "halting_steps", "batch", "images", "lr", "seed")}
    told |= {"minutes": round(seconds / 60, 1), "processor_minutes": round(busy / 60, 1)}
    (args.out / "training.json").write_text(json.dumps(told, indent=2) + "\n")


def teach_halting(tokenizer: Ordered, pictures: np.ndarray, args: argparse.Namespace) -> None:
    """The halting head learns from the errors at three lengths of each picture."""
    optimiser = torch.optim.AdamW(tokenizer.halting.parameters(), lr=args.lr)
    generator = torch.Generator().manual_seed(args.seed)
    for step in tqdm(range(args.halting_steps), desc="halting", disable=None):
        chosen = np.random.default_rng([args.seed, args.steps + step]).integers(0, len(pictures), args.batch)
        drawn = [
            schedule.draw(tokenizer.max_tokens, args.batch, generator)
            for schedule in (UNIFORM, UNIFORM, POWERS)
        ]
        optimiser.param_groups[0]["lr"] = args.lr * pace(step, args.halting_steps, warm=20)
        with torch.autocast("cpu", torch.bfloat16):
            loss = tokenizer.halting_loss(batch(pictures, chosen), torch.stack(drawn, 1))
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        with open(args.cache / "log.jsonl", "a") as log:
            log.write(json.dumps({"step": step, "halting": round(loss.item(), 4)}) + "\n")


def draw(file: Path, n: int, side: int) -> np.ndarray:
    """n training pictures, three scenes to each texture: (n, side, side, 3) uint8, kept in a file."""
    if not file.is_file():
        pictures = np.lib.format.open_memmap(file.with_suffix(".new"), "w+", np.uint8, (n, side, side, 3))
        for i in tqdm(range(n), desc="drawing", disable=None):
            number, which = divmod(i, SCENES_PER_TEXTURE + 1)
            image = scene("train", number * SCENES_PER_TEXTURE + which - 1).image if which else None
            image = load_images([image or texture("train", number)], side)[0]
            pictures[i] = (image * 255).round().permute(1, 2, 0).byte().numpy()
        pictures.flush()
        file.with_suffix(".new").rename(file)
    return np.load(file, mmap_mode="r")


def batch(pictures: np.ndarray, chosen: np.ndarray) -> Tensor:
    return torch.from_numpy(pictures[np.sort(chosen)]).permute(0, 3, 1, 2).float() / 255


def advance(
    tokenizer: Ordered, optimisers: list[torch.optim.Optimizer], images: Tensor, lengths: Tensor
) -> dict[str, float]:
    with torch.autocast("cpu", torch.bfloat16):
        losses = tokenizer.training_loss(images, lengths)
    sum(losses.values()).backward()
    torch.nn.utils.clip_grad_norm_(tokenizer.parameters(), 1.0)
    for optimiser in optimisers:
        optimiser.step()
        optimiser.zero_grad()
    return {name: round(loss.item(), 4) for name, loss in losses.items()}


def pace(step: int, steps: int, warm: int = 100) -> float:
    """The learning rate's factor: up over `warm` steps, then down to nothing along a cosine."""
    return (
        min(1.0, (step + 1) / warm)
        * 0.5
        * (1 + math.cos(math.pi * max(0, step - warm) / max(1, steps - warm)))
    )


def _lengths(tokenizer: Ordered, args: argparse.Namespace, step: int) -> Tensor:
    """(batch,): three eighths full, three eighths of any length, a quarter powers of two."""
    generator = torch.Generator().manual_seed(args.seed * 1_000_003 + step)
    part, k = args.batch // 8, tokenizer.max_tokens
    powers = POWERS.draw(k, 2 * part, generator)
    uniform = UNIFORM.draw(k, 3 * part, generator)
    full = torch.full((args.batch - 5 * part,), k)
    return torch.cat([full, uniform, powers])


def _optimisers(tokenizer: Ordered, lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the blocks, AdamW for all else; the linear part, which starts as principal
    components and has small numbers, changes slowly."""
    inside = [p for part in (tokenizer.encoder, tokenizer.decoder) for p in part.parameters() if p.dim() == 2]
    linear = list(tokenizer.linear.parameters())
    known = set(map(id, inside + linear))
    others = [p for p in tokenizer.parameters() if id(p) not in known]
    made = [
        torch.optim.Muon(inside, lr=lr, weight_decay=0.02, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW([{"params": others}, {"params": linear, "lr": lr / 100}], lr=lr, betas=(0.9, 0.98)),
    ]
    for optimiser in made:
        for group in optimiser.param_groups:
            group["initial_lr"] = group["lr"]
    return made


if __name__ == "__main__":
    main()
