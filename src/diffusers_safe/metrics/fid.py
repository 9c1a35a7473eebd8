"""FID and KID: how far the images are, as a whole, from reference images.

    metric = FID(inception("pt_inception-2015-12-05-6726825d.pth", "clean"), "val2014")

Any other network can be used as an [`Extractor`].
"""

import base64
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from PIL import Image
from tqdm.auto import tqdm

from ..generation.manifest import MANIFEST, read_manifest
from ..provenance import fingerprint
from ..report.statistics import CONFIDENCE, Estimate, normal_reach
from .base import Metric, Quantity
from .inception import FIDInception
from .loading import chosen, image_files, on_device
from .resizing import interpolated, resized, resized_unrounded, to_tensor
from .scores import score_images


LEAST_IMAGES = 4
# name -> resizes an image to (3, 299, 299), 0 to 255; these values are shifted and divided by the second entry
RESIZES: dict[str, tuple[Callable[[Image.Image], torch.Tensor], float]] = {
    "clean": (lambda image: resized_unrounded(image, (299, 299), Image.Resampling.BICUBIC), 128.0),
    "bk-sdm": (
        lambda image: interpolated(resized(image, (256, 256), Image.Resampling.BICUBIC), 299, antialias=False),
        127.5,
    ),
    "pytorch-fid": (lambda image: interpolated(to_tensor(image), 299, antialias=False), 127.5),
    "torchmetrics": (lambda image: interpolated(to_tensor(image), 299, antialias=True), 128.0),
}


@dataclass(frozen=True)
class Extractor:
    """Any network that extracts features of images.

    Attributes:
        name (`str`): Name in the details.
        identity (`dict`): Everything that determines the features, such as a fingerprint of the weights, as JSON
            values.
        features (`Callable`): Takes RGB images (`Sequence[Image.Image]`), returns features `(N, D)`.
    """

    name: str
    identity: dict
    features: Callable[[Sequence[Image.Image]], np.ndarray | torch.Tensor]


def inception(weights: str | Path | None, resize: str = "clean") -> Extractor:
    """The Inception v3 of the FID, with 2048 features.

    Args:
        weights (`str`): File of its weights, `pt_inception-2015-12-05-6726825d.pth`.
        resize (`str`, defaults to `"clean"`): How images are resized to 299 pixels. `"clean"`: PIL's bicubic filter in
            floating point, as in clean-fid; `"bk-sdm"`: PIL's bicubic filter to 256 pixels, rounded, then as
            pytorch-fid (the paper's images were JPEGs as well, which changes the number); `"pytorch-fid"`: bilinear
            without antialiasing; `"torchmetrics"`: torch's bilinear filter with antialiasing, the default of
            torchmetrics 1.9. Numbers with different values are not comparable.

    Raises:
        `ValueError`: If the file is missing or of another network, or the resize is unknown.
    """
    to_299, half = chosen(RESIZES, resize, "fid_resize")
    model = FIDInception.load(weights)

    @torch.inference_mode()
    def features(images: Sequence[Image.Image]) -> torch.Tensor:
        pixels = torch.stack([to_299(image) for image in images])
        return model((pixels.to(on_device(model)) - half) / half)

    identity = {"network": "inception-2015-12-05", "weights": fingerprint(model), "resize": resize}
    return Extractor(f"Inception v3, {resize}", identity, features)


class FID(Metric):
    """Frechet and kernel distance between the features of the images and those of references.

    Features are stored as float32 in base64: 11 kB for each image with Inception. Those of the references are stored
    in their folder in the same way, so it must be writable the first time.

    *FID.* It depends on the number of images: with fewer images it is larger, whatever the model. Compare models with
    the same number of images, and report N. Its interval is a bootstrap over prompts (over images if there is one
    prompt), shifted to the value itself, because resampling increases the FID. It estimates how much another set of
    images would change the number, not the distance to the FID of infinitely many images. References are not
    resampled.

    *KID.* It has no bias. It is the mean over subsets, sampled from both sides without replacement. Its interval is
    the normal one with the deviation of the subsets as a delete-d jackknife, which assumes independent images.

    Args:
        extractor ([`Extractor`]): Extracts the features.
        references (`str`): A folder of images, or of generated images with their manifest.
        subsets (`int`, defaults to 100): Number of subsets of the KID.
        subset_size (`int`, defaults to 1000): Images in a subset, at most half of the smaller side.
        samples (`int`, defaults to 100): Samples of the FID's bootstrap.
        batch_size (`int`, defaults to 16): Number of references processed at once.

    Raises:
        `ValueError`: If there are fewer than 4 references, or a number is out of range.

    Source: M. Heusel et al., NeurIPS 2017 (arXiv 1706.08500), equation 6; M. Bińkowski et al., Demystifying MMD GANs,
    ICLR 2018 (arXiv 1801.01401), with the cubic kernel; J. Shao and C. F. J. Wu, A general theory for jackknife
    variance estimation, Annals of Statistics 17 (1989).
    """

    name = "fid"
    quantities = {
        "fid": Quantity("FID", better="lower", note="Larger with fewer images: compare models with the same N only."),
        "kid": Quantity("KID", better="lower"),
    }

    def __init__(
        self,
        extractor: Extractor,
        references: str | Path | None,
        subsets: int = 100,
        subset_size: int = 1000,
        samples: int = 100,
        batch_size: int = 16,
    ):
        super().__init__()
        for name, value, least in (
            ("kid_subsets", subsets, 2),
            ("kid_subset_size", subset_size, 2),
            ("samples", samples, 2),
        ):
            if value < least:
                raise ValueError(f"{name} {value}: must be at least {least}")
        self.extractor = extractor
        self.subsets, self.subset_size, self.samples, self.batch_size = subsets, subset_size, samples, batch_size
        if references is None:
            raise ValueError("fid_references: none given; give a folder of images, or a folder of generated ones")
        self.references = Path(references)
        self.reference_rows = _rows(self.references)
        if len(self.reference_rows) < LEAST_IMAGES:
            raise ValueError(f"fid_references {references}: {len(self.reference_rows)} images; needs {LEAST_IMAGES}")
        self.reference_features: np.ndarray | None = None

    def identity(self) -> dict:
        return {"metric": self.name, "extractor": self.extractor.identity}

    def check(self, rows: Sequence[dict]) -> None:
        if len(rows) < LEAST_IMAGES:
            raise ValueError(f"{self.name}: {len(rows)} images; needs at least {LEAST_IMAGES}")

    def score(
        self, images: Sequence[Image.Image], rows: Sequence[dict], originals: Sequence[Image.Image] | None = None
    ) -> list[dict]:
        features = torch.as_tensor(self.extractor.features(images)).cpu().numpy().astype("<f4")
        if features.ndim != 2 or len(features) != len(images) or not np.isfinite(features).all():
            raise ValueError(
                f"{self.name}: {self.extractor.name} gives no finite (N, D) features, but {features.shape}"
            )
        return [{"features": base64.b64encode(row.tobytes()).decode()} for row in features]

    def compute(self) -> dict[str, Estimate]:
        if len(self.rows) < LEAST_IMAGES:
            raise ValueError(f"{self.name}: {len(self.rows)} images; needs at least {LEAST_IMAGES}")
        features, references = unpacked(self.scores), self._reference_features()
        prompts = [row["prompt"] for row in self.rows]
        size = self._subset_size()
        kid = kernel_distances(features, references, self.subsets, size)
        # Delete-d jackknife, Shao and Wu, equation 2.3: d = n - size.
        n = min(len(features), len(references))
        reach = normal_reach() * float(kid.std()) * (size / (n - size)) ** 0.5
        value = float(kid.mean())
        return {
            "fid": self._fid(features, references, prompts),
            "kid": Estimate(value, value - reach, value + reach, len(features), ""),
        }

    def details(self) -> dict:
        """`extractor`; `references`: name of their folder and their number; `features`: their number for each image;
        `kid_subsets` and `kid_subset_size`; `note`: how to read the FID."""
        count, width = len(self.scores), unpacked(self.scores[:1]).shape[1]
        few = f" {count} images of {width} features each do not even span a covariance." if count <= width else ""
        return {
            "extractor": self.extractor.name,
            "references": {"folder": self.references.resolve().name, "images": len(self.reference_rows)},
            "features": width,
            "kid_subsets": self.subsets,
            "kid_subset_size": self._subset_size(),
            "note": f"FID is larger with fewer images: compare it at the same N only.{few}",
        }

    def _subset_size(self) -> int:
        return min(self.subset_size, min(len(self.scores), len(self.reference_rows)) // 2)

    def _reference_features(self) -> np.ndarray:
        if self.reference_features is None:
            scores = score_images(self, self.references, self.reference_rows, batch_size=self.batch_size)
            self.reference_features = unpacked(scores)
        return self.reference_features

    def _fid(self, features: np.ndarray, references: np.ndarray, prompts: list[str]) -> Estimate:
        second = Gaussian.of(references)
        value = Gaussian.of(features).distance(second)
        places = {prompt: [] for prompt in prompts}
        for place, prompt in enumerate(prompts):
            places[prompt].append(place)
        clusters = [np.array(members) for members in places.values()]
        if len(clusters) == 1:
            clusters = [np.array([place]) for place in range(len(prompts))]
        rng = np.random.default_rng(0)
        resampled = []
        for _ in tqdm(range(self.samples), desc="FID bootstrap", unit="sample", leave=False, dynamic_ncols=True):
            chosen_clusters = rng.integers(len(clusters), size=len(clusters))
            chosen_places = np.concatenate([clusters[i] for i in chosen_clusters])
            resampled.append(Gaussian.of(features[chosen_places]).distance(second))
        tail = (1 - CONFIDENCE) / 2
        low, high = value + np.quantile(resampled, [tail, 1 - tail]) - np.mean(resampled)
        return Estimate(value, max(0.0, float(low)), float(high), len(features), "")


@dataclass(frozen=True)
class Gaussian:
    """Mean `(D,)` of features and a root of their covariance, which is `root.T @ root`. float64."""

    mean: torch.Tensor
    root: torch.Tensor

    @classmethod
    def of(cls, features: np.ndarray) -> "Gaussian":
        """The Gaussian of features `(N, D)`, N at least 2. The covariance is divided by N - 1."""
        device = PartialState().device
        features = torch.from_numpy(features).to("cpu" if device.type == "mps" else device, torch.float64)
        mean = features.mean(dim=0)
        root = (features - mean) / (len(features) - 1) ** 0.5
        if len(root) > root.shape[1]:
            root = torch.linalg.qr(root, mode="r").R
        return cls(mean, root)

    def distance(self, other: "Gaussian") -> float:
        """The Frechet distance, squared as in the FID: |m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)).

        With S = R' R the trace of the root is the sum of the singular values of R1 R2'. This avoids the root of a
        matrix that is not symmetric and may be singular.
        """
        overlap = torch.linalg.svdvals(self.root @ other.root.T).sum()
        apart = (self.mean - other.mean).square().sum()
        return max(0.0, float(apart + self.root.square().sum() + other.root.square().sum() - 2 * overlap))


def kernel_distances(
    first: np.ndarray, second: np.ndarray, subsets: int = 100, size: int = 1000, seed: int = 0
) -> np.ndarray:
    """The unbiased squared maximum mean discrepancy of random subsets, with the kernel (x y / D + 1)^3.

    Args:
        first (`np.ndarray`): `(N, D)`.
        second (`np.ndarray`): `(M, D)`.
        subsets (`int`, defaults to 100): Number of subsets.
        size (`int`, defaults to 1000): Rows of each side in a subset, sampled without replacement; at least 2.
        seed (`int`, defaults to 0): Seed of the sampling.

    Returns:
        `np.ndarray`: `(subsets,)`; the KID is their mean.

    Raises:
        `ValueError`: If `size` is below 2 or above the smaller side.
    """
    if not 2 <= size <= min(len(first), len(second)):
        raise ValueError(f"size {size}: must lie between 2 and {min(len(first), len(second))}, the smaller side")
    rng = np.random.default_rng(seed)
    first, second = first.astype(np.float64), second.astype(np.float64)

    def kernel(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        return (x @ y.T / x.shape[1] + 1) ** 3

    distances = []
    for _ in range(subsets):
        x, y = (side[rng.choice(len(side), size, replace=False)] for side in (first, second))
        within = kernel(x, x) + kernel(y, y)
        distances.append((within.sum() - np.trace(within)) / (size * (size - 1)) - 2 * kernel(x, y).mean())
    return np.array(distances)


def unpacked(scores: Sequence[dict]) -> np.ndarray:
    """The features in the scores of [`FID.score`], `(N, D)`, `float32`."""
    rows = [np.frombuffer(base64.b64decode(score["features"]), "<f4") for score in scores]
    if len({len(row) for row in rows}) > 1:
        raise ValueError("fid: features of different lengths")
    return np.stack(rows)


def _rows(folder: Path) -> list[dict]:
    """Rows like those of a manifest for the images of any folder."""
    if (folder / MANIFEST).is_file():
        return read_manifest(folder)
    names = [(path.relative_to(folder).as_posix(), path) for path in image_files(folder, "fid_references")]
    return [
        {"id": name, "file": name, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()} for name, path in names
    ]
