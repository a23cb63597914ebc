"""What a prefill costs, measured and by formula: one result row."""

from __future__ import annotations

import ctypes
import gc
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .api import Handle, compress, current, unwrap
from .flops import Lengths, flops
from .hosts import Vision, open_host


@torch.no_grad()
def profile(model: nn.Module, inputs: dict[str, Any], repeats: int = 5) -> dict[str, Any]:
    """One result row: what a prefill costs on the inputs of a processor, as compressed as the model now is.

    plan                   method, options, stage and keep of each step; empty for the bare model
    images, rows           how many images and prompts the inputs hold
    image_tokens           tokens per image before any reduction, newline tokens included
    encoder_tokens         tokens per image that enter the encoder's first block: all tiles, CLS included
    llm_tokens             tokens per image that enter the language model
    prompt_length          positions of the prompt as given
    physical_length        positions that the decoder's first layer holds
    decoder_tokens         positions per decoder layer, mean over layers, text included
    tflops, tflops_total   by formula: encoder, projector, decoder, head (see `flops`), in 10^12 operations
    kv_bytes               size of the KV cache after the prefill, counted from its tensors
    first_token_seconds    median time of a prefill up to the first token
    full_seconds           the same with all tokens, each measured in turn with the other
    first_token_ratio      their quotient, which a busy machine hardly disturbs
    compressor_seconds     median time of the compressor itself, on the host's clock
    compressor_share       the same as a part of first_token_seconds
    peak_memory_bytes      what peak_memory says, in bytes; None where the system does not tell
    Raises ValueError without an image, and for models whose FLOPs are not understood.
    """
    model = unwrap(model)
    vision, handle = open_host(model), current(model)
    call = first_token(model, inputs)
    with _recording(model, handle) as recording, _observed(model, vision) as lengths:
        cache = [(layer.keys, layer.values) for layer in call().past_key_values.layers]
        records = recording.last
    if not lengths.encoder:
        raise ValueError("the inputs hold no image: profile() measures prompts with at least one")
    physical_length = cache[0][0].shape[-2]
    kv_bytes = sum(tensor.nbytes for pair in cache for tensor in pair)
    del cache  # it is no part of the next call's peak
    peak, peak_kind = _peak_memory(vision.decoder.device, call)
    times, full, spent = [], [], []
    for _ in range(repeats):
        with _all_tokens(handle):
            full.append(_seconds(call))
        times.append(_seconds(call) if handle else full[-1])
        spent.append(handle.spent if handle else 0.0)
    seconds, full_seconds = statistics.median(times), statistics.median(full)
    operations = flops(model, vision, lengths)
    images = len(records)
    return {
        "plan": [{**method.to_dict(), **step} for method, step in handle.plan] if handle else [],
        "images": images,
        "rows": len(inputs["input_ids"]),
        "image_tokens": statistics.mean(record.entering["features"] for record in records),
        "encoder_tokens": lengths.encoder[0][0] * lengths.encoder[0][1] / images,
        "llm_tokens": statistics.mean(record.entering["decoder"] for record in records),
        "prompt_length": inputs["input_ids"].shape[1],
        "physical_length": physical_length,
        "decoder_tokens": statistics.mean(queries for _, queries, _ in lengths.decoder),
        "tflops": {part: count / 1e12 for part, count in operations.items()},
        "tflops_total": sum(operations.values()) / 1e12,
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


def compare(functions: dict[str, Callable[[], Any]], repeats: int = 5) -> dict[str, list[float]]:
    """Seconds of each function in each round; they run in turn, A, B, A, B, after a round that is not timed.

    What slows the machine for a while slows all functions of a round, so judge by ratios within rounds.
    """
    for function in functions.values():
        function()
    times = {name: [] for name in functions}
    for _ in range(repeats):
        for name, function in functions.items():
            times[name].append(_seconds(function))
    return times


def versions() -> dict[str, str | None]:
    """What a result was made with. The commit is None outside of a git checkout of this project."""
    import transformers

    from . import __version__

    return {
        "vtc": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "commit": _commit(),
        "cpu": device_name(torch.device("cpu")),
        "gpu": device_name(torch.device("cuda")) if torch.cuda.is_available() else None,
    }


def first_token(model: nn.Module, inputs: dict[str, Any]) -> Callable[[], Any]:
    """A prefill as generate() runs it: a cache is filled and only the last position goes through the head."""

    def call() -> Any:
        output = model(**inputs, use_cache=True, logits_to_keep=1)
        output.logits[:, -1].argmax(dim=-1).tolist()  # the host waits for the token
        return output

    return call


@contextmanager
def _recording(model: nn.Module, handle: Handle | None) -> Iterator[Handle]:
    """A handle with records; for the bare model one that keeps every token, which changes nothing."""
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
        lengths.encoder.append((x.shape[0], x.shape[1]))

    def decoder(x: Tensor) -> None:  # a prefill: the tokens attend to one another, no cache comes before them
        lengths.decoder.append((x.shape[0], x.shape[1], x.shape[1]))

    def projector(x: Tensor) -> None:
        lengths.projected += x[..., 0].numel()

    def head(x: Tensor) -> None:
        lengths.logits += x[..., 0].numel()

    noted = [(encoder, block) for block in vision.encoder.blocks]
    noted += [(decoder, layer) for layer in vision.decoder.layers]
    noted += [(projector, vision.projector), (head, model.get_output_embeddings())]
    hooks = [module.register_forward_pre_hook(_entering(note), with_kwargs=True) for note, module in noted]
    try:
        yield lengths
    finally:
        for hook in hooks:
            hook.remove()


def _entering(note: Callable[[Tensor], None]) -> Callable[..., None]:
    """A hook that shows `note` what enters a module: its first argument, by position or by name."""
    return lambda module, args, kwargs: note(args[0] if args else kwargs["hidden_states"])


def _seconds(function: Callable[[], Any]) -> float:
    _wait()
    start = time.perf_counter()
    function()
    _wait()
    return time.perf_counter() - start


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _peak_memory(device: torch.device, function: Callable[[], Any]) -> tuple[int | None, str]:
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
