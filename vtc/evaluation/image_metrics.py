"""How alike images and their reconstructions are: torchmetrics' PSNR, SSIM, MS-SSIM, LPIPS and FID.

Images are (B, 3, H, W) with values in [0, 1]. LPIPS and FID look through other people's networks. Nothing is
downloaded for them: they take the path of weights that are there already.
"""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor, nn

WINDOW = 11  # pixels: the side of SSIM's Gaussian window
BETAS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)  # of MS-SSIM's scales (Wang, Simoncelli and Bovik, 2003)
MOST = 100.0  # dB: the PSNR of images without any difference, which would be infinite
BACKBONES = {"alex": "alexnet", "vgg": "vgg16", "squeeze": "squeezenet1_1"}  # of LPIPS, in torchvision


def psnr(decoded: Tensor, images: Tensor) -> Tensor:
    """(B,) dB of a peak of 1, at most 100."""
    measure = _functional().peak_signal_noise_ratio
    return measure(decoded, images, data_range=1.0, reduction="none", dim=(1, 2, 3)).clamp(max=MOST)


def ssim(decoded: Tensor, images: Tensor) -> Tensor:
    """(B,) up to 1: arithmetic mean over channels and places, Gaussian window of 11 pixels (sigma 1.5).

    Raises ValueError for images of fewer pixels.
    """
    scales(images)
    measure = _functional().structural_similarity_index_measure
    return measure(decoded, images, data_range=1.0, reduction="none")


def ms_ssim(decoded: Tensor, images: Tensor) -> Tensor:
    """(B,) 0 to 1: SSIM over scales, of which the first are taken that the images have the pixels for.

    There are five from 176 pixels on, and three at 96 (see `scales`); their weights are scaled to sum to 1.
    """
    betas = torch.tensor(BETAS[: scales(images)])
    measure = _functional().multiscale_structural_similarity_index_measure
    return measure(
        decoded, images, data_range=1.0, reduction="none", betas=tuple((betas / betas.sum()).tolist())
    )


def scales(images: Tensor) -> int:
    """How many of MS-SSIM's scales torchmetrics computes for images of this size, a window inside of each."""
    side = min(images.shape[-2:])
    if side < WINDOW:
        raise ValueError(f"SSIM needs images of {WINDOW} pixels or more, not {side}")
    divisors = [
        max(2 ** (n - 1), (n - 1) ** 2) for n in range(1, len(BETAS) + 1)
    ]  # the square is its own rule
    return sum(side // divisor >= WINDOW for divisor in divisors)


def lpips(weights: str | Path, net: str = "alex") -> Callable[[Tensor, Tensor], Tensor]:
    """A function like `psnr` that gives LPIPS (arXiv:1801.03924): 0 and up, less is better.

    weights: the file that torchvision downloads for the backbone `net`, "alex", "vgg" or "squeeze"
    (alexnet-owt-7be5be79.pth and the like). The layers behind it come with torchmetrics.
    Raises ValueError for another file, OSError where there is none.
    """
    _functional()
    import torchvision
    from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

    if net not in BACKBONES:
        raise ValueError(f"LPIPS looks through one of {', '.join(BACKBONES)}, not {net!r}")
    known = torchvision.models.get_model_weights(BACKBONES[net]).DEFAULT
    with torch.device("meta"):
        wanted = torchvision.models.get_model(BACKBONES[net]).state_dict()
    _check(weights, wanted, f"torchvision's {BACKBONES[net]}", known.url)
    directory = torch.hub.get_dir()
    # torchvision takes weights from torch's directory or the network, and from nowhere else
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "checkpoints").mkdir()
        (Path(folder) / "checkpoints" / known.url.rsplit("/", 1)[1]).symlink_to(Path(weights).resolve())
        torch.hub.set_dir(folder)
        try:
            metric = LearnedPerceptualImagePatchSimilarity(net, reduction="none", normalize=True)
        finally:
            torch.hub.set_dir(directory)

    def measure(decoded: Tensor, images: Tensor) -> Tensor:
        return metric.to(images.device)(decoded, images).reshape(-1)

    return measure


def inception(weights: str | Path, features: int = 2048) -> nn.Module:
    """The network of FID, from torch-fidelity: images (B, 3, H, W) uint8 to (B, features).

    weights: its file weights-inception-2015-12-05-6726825d.pth. features: 2048 for the FID that papers
    report; 64, 192 or 768 for that of an earlier layer.
    Raises ImportError without torch-fidelity, OSError without the file and ValueError for another one.
    """
    _functional()
    if importlib.util.find_spec("torch_fidelity") is None:
        raise ImportError("FID needs torch-fidelity: pip install torch-fidelity")
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3
    from torchmetrics.image.fid import NoTrainInceptionV3

    what = "torch-fidelity's Inception"
    _check(weights, None, what, URL_INCEPTION_V3)
    try:
        network = NoTrainInceptionV3("inception-v3-compat", [str(features)], str(weights))
    except RuntimeError as error:  # torch's, of names and shapes
        raise ValueError(_another(weights, what, URL_INCEPTION_V3)) from error
    network.num_features = features
    return network


class FID:
    """The Fréchet distance between features of images and of reconstructions (arXiv:1706.08500): rFID.

    It falls with the number of images, so that values compare at the same number only.

    network: as `inception` makes it, or another from (B, 3, H, W) uint8 to (B, `num_features`).
    Raises ValueError for fewer than two images.
    """

    def __init__(self, images: Tensor, network: nn.Module, batch: int = 16) -> None:
        _functional()
        from torchmetrics.image.fid import FrechetInceptionDistance

        if len(images) < 2:
            raise ValueError("FID is a distance between distributions: it takes 2 images or more")
        self.batch = batch
        self.metric = FrechetInceptionDistance(network, reset_real_features=False).to(images.device)
        self._update(images, real=True)

    def add(self, decoded: Tensor) -> None:
        """More of the reconstructions (B, 3, H, W) to be compared."""
        self._update(decoded, real=False)

    def distance(self) -> float:
        """That of the reconstructions added since the last call."""
        distance = max(0.0, float(self.metric.compute()))
        self.metric.reset()
        return distance

    def _update(self, images: Tensor, real: bool) -> None:
        for part in images.split(self.batch):
            # not by the metric, which would cut off what is behind the point, and 1 / 255 * 255 is below 1
            self.metric.update((part * 255).round().byte(), real=real)


def _functional() -> ModuleType:
    try:
        import torchmetrics.functional.image as functional
    except ImportError as error:
        raise ImportError(
            "image metrics need torchmetrics: pip install 'vision-token-compression[eval]'"
        ) from error
    return functional


def _check(weights: str | Path, wanted: dict[str, Tensor] | None, what: str, url: str) -> None:
    """Looks into a file before others do, who would let a pickle run what it likes."""
    if not Path(weights).is_file():
        raise OSError(f"there is no file {weights}: it should be {what}, from {url}")
    try:
        state = torch.load(weights, map_location="cpu", weights_only=True)
        found = {name: value.shape for name, value in state.items()}
    except Exception as error:  # whatever the file is, torch has an exception for it
        raise ValueError(_another(weights, what, url)) from error
    if wanted is not None and found != {name: value.shape for name, value in wanted.items()}:
        raise ValueError(_another(weights, what, url))


def _another(weights: str | Path, what: str, url: str) -> str:
    return f"{weights} does not hold the weights of {what}: these are at {url}"
