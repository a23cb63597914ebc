"""What a prefill costs, measured and by formula: one result row."""

from __future__ import annotations

import ctypes
import gc
import inspect
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .api import Handle, compress, current, unwrap
from .flops import Lengths, counted, flops
from .hosts import Vision, is_vlm, open_host
from .hosts.trunk import find_tower


@torch.no_grad()
def profile(model: nn.Module, inputs: dict[str, Any], repeats: int = 5) -> dict[str, Any]:
    """One result row: what a prefill costs on the inputs of a processor, as compressed as the model now is.

    plan                   method, options, stage and keep of each step; empty for the bare model
    images, rows           how many images and prompts the inputs hold; for models that are not told which
                           tiles are of one image, a tile is an image
    image_tokens           tokens per image before any reduction, newline tokens included
    encoder_tokens         tokens per image that enter a block of the encoder, mean over blocks: all tiles,
                           CLS included; None where the encoder has no blocks
    llm_tokens             tokens per image that enter the language model
    prompt_length          positions of the prompt as given
    physical_length        positions that the decoder's first layer holds
    decoder_tokens         positions per decoder layer, mean over layers, text included
    tflops, tflops_total   encoder, projector, decoder, head (see `flops`), in 10^12 operations
    tflops_by              "formula", or "counter": torch's, asked where the formulas do not know the model
    kv_bytes               size of the KV cache after the prefill, counted from its tensors
    first_token_seconds    median time of a prefill up to the first token
    full_seconds           the same with all tokens, each measured in turn with the other
    first_token_ratio      their quotient, which a busy machine hardly disturbs
    compressor_seconds     median time of the compressor itself, on the host's clock
    compressor_share       the same as a part of first_token_seconds
    peak_memory_bytes      what peak_memory says, in bytes; None where the system does not tell
    Raises ValueError without an image, and for a vision transformer by itself: `vtc.encoder_cost` has those.
    """
    model = unwrap(model)
    if not is_vlm(model) and find_tower(model):
        raise ValueError(
            f"profile() measures prompts, and {type(model).__name__} is a vision transformer by itself: use "
            "vtc.encoder_cost.encoder_cost()"
        )
    vision, handle = open_host(model), current(model)
    call = first_token(model, inputs)
    with recording(model) as noted, _observed(model, vision) as lengths:
        before = noted.last
        physical_length, kv_bytes = _held(call().past_key_values)
        records = noted.last
    if not records or any(record is old for record in records for old in before):  # of an earlier call
        raise ValueError("the inputs hold no image: profile() measures prompts with at least one")
    peak, peak_kind = peak_memory(vision.decoder.device, call)
    times, full, spent = [], [], []
    for _ in range(repeats):
        with _all_tokens(handle):
            full.append(_seconds(call))
        times.append(_seconds(call) if handle else full[-1])
        spent.append(handle.spent if handle else 0.0)
    seconds, full_seconds = statistics.median(times), statistics.median(full)
    try:
        operations, by = flops(model, vision, lengths), "formula"
    except ValueError:
        operations, by = counted(model, vision, call), "counter"
    images = len(records)
    return {
        "plan": [{**method.to_dict(), **step} for method, step in handle.plan] if handle else [],
        "images": images,
        "rows": len(inputs["input_ids"]),
        "image_tokens": statistics.mean(record.entering["features"] for record in records),
        "encoder_tokens": _encoder_tokens(vision, lengths, images),
        "llm_tokens": statistics.mean(record.entering["decoder"] for record in records),
        "prompt_length": inputs["input_ids"].shape[1],
        "physical_length": physical_length,
        "decoder_tokens": statistics.mean(queries for _, queries, _ in lengths.decoder),
        "tflops": {part: count / 1e12 for part, count in operations.items()},
        "tflops_total": sum(operations.values()) / 1e12,
        "tflops_by": by,
        "kv_bytes": kv_bytes,
        "first_token_seconds": seconds,
        "full_seconds": full_seconds,
        "first_token_ratio": seconds / full_seconds,
        "compressor_seconds": statistics.median(spent),
        "compressor_share": statistics.median(spent) / seconds,
        "repeats": repeats,
        "peak_memory_bytes": peak,
        "peak_memory": peak_kind,
        "dtype": str(vision.decoder.dtype).removeprefix("torch."),
        "attention": vision.decoder.config._attn_implementation,
        "device": device_name(vision.decoder.device),
    }


def compare(
    functions: dict[str, Callable[[], Any]], repeats: int = 5, clock: Callable[[], float] = time.perf_counter
) -> dict[str, list[float]]:
    """Seconds of each function in each round; they run in turn, A, B, A, B, after a round that is not timed.

    What slows the machine for a while slows all functions of a round, so judge by ratios within rounds. With
    `time.process_time` as the clock, waiting for other processes does not count.
    """
    for function in functions.values():
        function()
    times = {name: [] for name in functions}
    for _ in range(repeats):
        for name, function in functions.items():
            times[name].append(_seconds(function, clock))
    return times


def versions() -> dict[str, str | None]:
    """What a result was made with. The commit is None outside of a git checkout of this project."""
    import transformers

    from . import __version__

    return {
        "vtc": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "timm": version("timm"),
        "open_clip": version("open_clip_torch"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "commit": _commit(),
        "cpu": device_name(torch.device("cpu")),
        "gpu": device_name(torch.device("cuda")) if torch.cuda.is_available() else None,
    }


def first_token(model: nn.Module, inputs: dict[str, Any]) -> Callable[[], Any]:
    """A prefill as generate() runs it: a cache is filled and only the last position goes through the head."""

    from transformers import DynamicCache

    last = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}

    def call() -> Any:
        cache = DynamicCache(config=model.config.get_text_config(decoder=True))
        output = model(**inputs, past_key_values=cache, use_cache=True, **last)
        output.logits[:, -1].argmax(dim=-1).tolist()  # the host waits for the token
        return output

    return call


@contextmanager
def recording(model: nn.Module) -> Iterator[Handle]:
    """A handle with records; for the bare model one that keeps every token, which changes nothing."""
    handle = current(model)
    if handle is not None:
        yield handle
    else:
        with compress(model, "uniform", keep=1.0) as whole:
            yield whole


@contextmanager
def _all_tokens(handle: Handle | None) -> Iterator[None]:
    """Every stage keeps everything for a while, which costs what the bare model costs."""
    if handle is None:
        yield
        return
    budgets = {step["stage"]: step["keep"] for _, step in handle.plan}
    handle.keep = dict.fromkeys(budgets, 1.0)
    try:
        yield
    finally:
        handle.keep = budgets


@contextmanager
def _observed(model: nn.Module, vision: Vision) -> Iterator[Lengths]:
    """Notes what goes through each part while the model runs."""
    lengths = Lengths()

    def encoder(x: Tensor) -> None:
        rows = x.shape[0] if x.dim() > 2 else 1  # else all images are one row (N, D)
        lengths.encoder.append((rows, x[..., 0].numel() // rows))

    def decoder(x: Tensor) -> None:  # a prefill: the tokens attend to one another, no cache comes before them
        lengths.decoder.append((x.shape[0], x.shape[1], x.shape[1]))

    def projector(x: Tensor) -> None:
        lengths.projected += x[..., 0].numel()

    def head(x: Tensor) -> None:
        lengths.logits += x[..., 0].numel()

    noted = [(encoder, block) for block in _blocks(vision)]
    noted += [(decoder, layer) for layer in vision.decoder.layers]
    noted += [(projector, vision.projector)] if vision.projector else []
    noted += [(head, model.get_output_embeddings())]
    noted = [(note, module) for note, module in noted if module is not None]
    hooks = [module.register_forward_pre_hook(_entering(note), with_kwargs=True) for note, module in noted]
    try:
        yield lengths
    finally:
        for hook in hooks:
            hook.remove()


def _blocks(vision: Vision) -> list[nn.Module]:
    video = [] if vision.video_encoder is vision.encoder else vision.video_encoder.blocks
    return [*vision.encoder.blocks, *video]


def _encoder_tokens(vision: Vision, lengths: Lengths, images: int) -> float | None:
    blocks = len(_blocks(vision))
    return sum(rows * tokens for rows, tokens in lengths.encoder) / blocks / images if blocks else None


def _held(cache: Any) -> tuple[int, int]:
    """Positions in the longest layer of a cache, and the bytes of all its tensors."""
    fields = [field for layer in cache.layers for field in vars(layer).items()]
    tensors = [(name, value) for name, value in fields if isinstance(value, Tensor)]
    # keys are (B, H, L, D); layers that keep a state only have none
    lengths = [value.shape[-2] for name, value in tensors if name.endswith("keys") and value.dim() == 4]
    return max(lengths), sum(value.nbytes for _, value in tensors)


def _entering(note: Callable[[Tensor], None]) -> Callable[..., None]:
    """A hook that shows `note` what enters a module: its first tensor, by position or by name."""

    def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
        note(next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)))

    return hook


def _seconds(function: Callable[[], Any], clock: Callable[[], float] = time.perf_counter) -> float:
    _wait()
    start = clock()
    function()
    _wait()
    return clock() - start


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def peak_memory(device: torch.device, function: Callable[[], Any]) -> tuple[int | None, str]:
    """Bytes that a call needs at its height, None where the system does not tell, and what is counted."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        function()
        return torch.cuda.max_memory_allocated(device), "allocated on the GPU, weights included"
    try:
        ctypes.CDLL(None).malloc_trim(0)  # memory freed earlier but still held would hide what comes
        Path("/proc/self/clear_refs").write_text("5")  # Linux: resets the peak to the present size
        before = _resident("VmRSS")
        function()
        return max(0, _resident("VmHWM") - before), "increase of the process's resident set"
    except (OSError, AttributeError, TypeError):  # no Linux, or no glibc
        function()
        return None, "not measured on this system"


def _resident(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _commit() -> str | None:
    root = Path(__file__).parents[1]
    if not (root / ".git").exists():  # an installed copy may lie within someone else's repository
        return None
    try:
        command = ["git", "-C", str(root), "rev-parse", "HEAD"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
