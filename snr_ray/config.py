"""The configuration tree: every setting with its default, its meaning and its checks. Frozen.

The tree travels whole to every worker and is saved with every run and every model, so a result
always lies beside the settings that made it.
"""

from dataclasses import dataclass, field
from typing import Literal

from snr_ray.errors import check

VIEWS_PER_PIXEL = 4
"""Views per pixel of the longer side of an image, at most: more add memory and nothing else."""
MOST_PHOTONS = 10**18
"""NumPy draws Poisson counts up to 9.2e18."""
LEAST_ANGLES = 1.0
"""Degrees: views of less are all the same, and of next to none their steps are zero."""
FILTERS = ("ramp", "shepp-logan", "cosine", "hamming", "hann", "none")


@dataclass(frozen=True, slots=True, kw_only=True)
class ImagesConfig:
    size: int = 28
    """Height and width of the training images, in pixels."""
    channels: Literal[1, 3] = 1
    """1 turns every image grey (0.299 R + 0.587 G + 0.114 B), 3 makes every image RGB."""
    fit: Literal["resize", "crop"] = "resize"
    """`resize` scales the shorter side to `size` and then crops the centre; `crop` only crops."""
    white: float | None = None
    """The stored value that means 1.0 in 16-bit and float images; 8-bit images always use 255, and
    other numbers of bits their largest."""
    window: tuple[float, float] | None = None
    """Hounsfield units that mean 0.0 and 1.0, in CT slices (DICOM) and in 16-bit and float images
    of any format where `white` is not set. Those outside are clipped for the network; a cleaned
    image has what was above where it is at that end of the window, and below unless it ends at
    air."""
    crop: int | None = None
    """Keep a square of so many pixels of each image, at a place drawn by its id, after the noise of
    the whole image was made: streaks come from all of it."""
    limit: int | None = None
    """Use at most this many images, chosen by the hash of their ids; null means all."""
    group: str | None = None
    """What keeps images together in one split: `PatientID` of DICOM files, `folder` that an image
    lies in (`folder:2`: its first two folders), a column of Parquet tables, or `none`. Left out, it
    is PatientID where there are DICOM files, else a column `patient`, else `none`."""

    def __post_init__(self) -> None:
        check(
            8 <= self.size <= 4096,
            f"images.size must be from 8 to 4096 pixels, but got {self.size}; smaller images have "
            "too few rays to mean anything, and larger operators do not fit in memory.",
        )
        check(
            self.white is None or self.white > 0,
            f"images.white must be above 0, but got {self.white}.",
        )
        check(
            self.window is None or self.window[0] < self.window[1],
            f"images.window must be [low, high] with low < high, but got {self.window}.",
        )
        check(
            self.crop is None or 8 <= self.crop <= self.size,
            f"images.crop must be from 8 to images.size = {self.size}, but got {self.crop}.",
        )
        check(
            self.limit is None or self.limit > 0,
            f"images.limit must be at least 1, but got {self.limit}.",
        )

    @property
    def side(self) -> int:
        """Height and width of what training sees."""
        return self.crop or self.size


@dataclass(frozen=True, slots=True, kw_only=True)
class NoiseConfig:
    n_views: tuple[int, ...] = (40, 20, 10)
    """One noise id per entry, numbered from 1 (0 is clean): projections over 180 degrees."""
    views_per_pixel: tuple[float, float] | None = None
    """Train on every whole view count of this range, low and high, times the longer side of an
    image, in place of the few of n_views; these then are what is validated and what donors are kept
    of, at images.size."""
    filter: Literal["ramp", "shepp-logan", "cosine", "hamming", "hann", "none"] = "ramp"
    """Filter of the back projection, by its scikit-image name. The original method uses ramp."""
    angle_range: float = 180.0
    """Degrees over which the views are spread; below 180, a limited-angle scan. The original method
    uses 180."""
    photons: int = 0
    """Photons per detector bin and view that leave the source, for Poisson noise on the sinogram;
    0 counts none, as the original method does. Low-dose scans have 1,000 to 100,000."""

    def __post_init__(self) -> None:
        check(len(self.n_views) > 0, "noise.n_views needs at least one view count, but is empty.")
        for n_views in self.n_views:
            check(n_views >= 1, f"noise.n_views must be at least 1, but got {n_views}.")
        check(
            len(set(self.n_views)) == len(self.n_views),
            f"noise.n_views must not repeat a view count, but got {list(self.n_views)}.",
        )
        check(
            LEAST_ANGLES <= self.angle_range <= 180,
            f"noise.angle_range must be from {LEAST_ANGLES:g} to 180 degrees, but got "
            f"{self.angle_range:g}.",
        )
        check(self.photons >= 0, f"noise.photons must not be negative, but got {self.photons}.")
        check(
            self.photons <= MOST_PHOTONS,
            f"noise.photons must be at most {MOST_PHOTONS:.0e}, but got {self.photons}.",
        )
        if self.views_per_pixel is not None:
            low, high = self.views_per_pixel
            check(
                0 < low < high <= VIEWS_PER_PIXEL,
                f"noise.views_per_pixel must be [low, high] with 0 < low < high <= "
                f"{VIEWS_PER_PIXEL}, but got [{low:g}, {high:g}].",
            )
            check(
                self.photons == 0,
                f"noise.views_per_pixel is trained without photon noise, but noise.photons is "
                f"{self.photons}; set it to 0, or train on the counts of noise.n_views.",
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    kind: Literal["hvae", "unet", "itnet"] = "hvae"
    """`hvae`: the model of this project. Supervised baselines that it is compared with: `unet`, and
    `itnet`, a U-Net in each of model.unrolled steps with an exact step behind it, told the view
    count."""
    decoder: Literal["operator", "network"] = "operator"
    """`operator`: the decoder makes noise by the noise operator, of the clean image that the
    content code holds. `network`: it learns to, from noise codes merged at every level; for crops,
    whose noise comes from beyond them."""
    physics: bool = False
    """Known geometry: the encoder also sees the linear estimate for the image's noise id."""
    stem_channels: int = 16
    """Feature channels at full resolution."""
    finest_stride: Literal[1, 2] = 2
    """1: the finest level of codes has the resolution of the image; 2: half of it."""
    stem_kernel: int = 3
    """Height and width of the first convolution's kernel, odd."""
    channels: tuple[int, ...] = (32, 48, 64)
    """Feature channels of each level, finest (half resolution) first; one entry per level."""
    content_channels: tuple[int, ...] = (8, 8, 8)
    """Channels of the spatial content code of each level."""
    noise_channels: tuple[int, ...] = (4, 4, 4)
    """Channels of the noise code of each level."""
    noise_code: Literal["vector", "map"] = "vector"
    """`vector`: one noise vector per level, broadcast over space; `map`: a spatial noise code."""
    unrolled: int = 4
    """Steps of the unrolled solver in the encoder, each of which guesses the clean image, makes its
    noise and sees what is left unexplained; 0: none. Of a decoder with the operator alone."""
    step_channels: tuple[int, ...] = ()
    """Channels of coarser levels, each of half the size of the one before, at which a step of the
    solver looks around; none: it sees full resolution alone. Of a model that unrolls."""
    bounded: bool = False
    """Guesses of the solver are cut to [0, 1], where clean images lie, before their noise is made:
    air that is known to be air leaves so many pixels less to be found."""
    correction: int = 0
    """Iterations, at most, of least squares behind the network that pull cleaned images towards
    what the noise operator says; 0: none. Of a model that unrolls; training is without it."""
    blocks: int = 1
    """Residual blocks per level in each direction."""
    upsampling: Literal["shuffle", "nearest"] = "shuffle"
    """`shuffle`: on the way to a finer level, each of four pixels gets channels of its own;
    `nearest`: all four get the same. Of the HVAE alone."""

    def __post_init__(self) -> None:
        levels = len(self.channels)
        check(levels >= 1, "model.channels needs at least one level, but is empty.")
        for name in ("content_channels", "noise_channels"):
            widths = getattr(self, name)
            check(
                len(widths) == levels,
                f"model.{name} must have one entry per level of model.channels ({levels}), "
                f"but got {len(widths)}.",
            )
        for name in ("channels", "content_channels", "noise_channels", "step_channels"):
            for width in getattr(self, name):
                check(width >= 1, f"model.{name} must be at least 1, but got {width}.")
        check(
            self.stem_kernel % 2 == 1,
            f"model.stem_kernel must be odd, but got {self.stem_kernel}.",
        )
        for name in ("unrolled", "correction"):
            check(
                getattr(self, name) >= 0,
                f"model.{name} must not be negative, but got {getattr(self, name)}.",
            )
        check(
            self.correction == 0 or self.unrolled >= 1,
            f"model.correction needs model.unrolled of at least 1, whose operator it asks, but got "
            f"{self.unrolled}; set model.correction=0 or some model.unrolled.",
        )
        check(
            self.kind != "itnet" or (self.unrolled >= 1 and not self.physics),
            f"model.kind=itnet needs model.unrolled of at least 1 and no model.physics, but got "
            f"{self.unrolled} and {str(self.physics).lower()}.",
        )
        for name in ("stem_channels", "stem_kernel", "blocks"):
            check(
                getattr(self, name) >= 1,
                f"model.{name} must be at least 1, but got {getattr(self, name)}.",
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class LossConfig:
    beta: float = 0.0002
    """Weight of the KL divergence against the reconstruction term."""
    free_bits: float = 0.0
    """Nats per image and code (content and noise of each level) that the KL gives for free."""
    warmup: float = 0.15
    """Fraction of the run over which the weights of KL and content pull rise from 0."""
    sigma: float = 0.05
    """Standard deviation of the Gaussian likelihood (the start value where it is learned)."""
    sigma_learned: bool = True
    """Learn one sigma per pair of noise ids (seen, wanted), so that the images of few views do not
    decide how exact the others get."""
    sigma_ratio: float = 4.0
    """Largest learned sigma allowed, as a multiple of the smallest."""
    sigma_own: float = 2.5
    """An image that is to be clean has a sigma of its own, its root mean square error, at most by
    this factor above or below that of its pair; 1: the same for all images of a pair."""
    bounds: bool = True
    """An image that is to be clean may leave [0, 1] where its target is 0 or 1: results are cut to
    that range anyhow."""
    grain: float = 0.015
    """Half of the noisy images get Gaussian noise on top, of a standard deviation up to this. Real
    images have some; a model that has seen none takes it for something the noise operator did."""
    stored: float = 0.25
    """Share of noisy images that are seen cut to [0, 1] and rounded to 8 bits, as files are."""
    triplet: float = 1.0
    """Weight of the triplet loss on the noise code."""
    triplet_form: Literal["drawn", "symmetric"] = "symmetric"
    """`drawn`: the original loss, noisy anchors only. `symmetric`: every noise id, clean included,
    pulls together and pushes the others away."""
    margin: float = 1.0
    """Distance beyond which the triplet loss stops pushing."""
    content_kl: float = 0.0002
    """Weight of the symmetric KL between the content codes of an image and its noisy version."""
    swap_probability: float = 1.0
    """Share of images trained on the swap itself, noise code and target exchanged: clean for noisy
    ones, noisy (of a random noise id) for clean ones."""
    injection: float = 0.1
    """Weight of the reconstruction term of clean images whose target is noisy; they are one in
    1 + n_ids, and the rest have weight 1. More injects better and cleans worse. A decoder that
    knows the noise needs little; one that learns it 0.3 to 1.5."""

    def __post_init__(self) -> None:
        for name in ("beta", "free_bits", "grain", "triplet", "content_kl", "margin", "injection"):
            value = getattr(self, name)
            check(value >= 0, f"loss.{name} must not be negative, but got {value}.")
        check(self.sigma > 0, f"loss.sigma must be above 0, but got {self.sigma}.")
        for name in ("sigma_ratio", "sigma_own"):
            value = getattr(self, name)
            check(value >= 1, f"loss.{name} must be at least 1, but got {value}.")
        for name in ("stored", "warmup", "swap_probability"):
            value = getattr(self, name)
            check(0 <= value <= 1, f"loss.{name} must be between 0 and 1, but got {value}.")


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig:
    steps: int = 9000
    """Optimizer steps of the whole run."""
    start: str | None = None
    """Model folder, or name of a model that comes with snr_ray, whose weights the run begins with;
    it decides the model section. With model.physics or model.step_channels it may be one
    without."""
    batch_size: int = 8
    """Clean images per step over all workers; each comes with all of its noisy versions. Must be a
    multiple of 2 x workers, so that every image finds a partner on its worker."""
    sizes: tuple[int, ...] = ()
    """With noise.views_per_pixel: the sizes of images, each batch one of them; none: images.size.
    train.batch_size is that of images.size, others hold about as many pixels. An image is seen at
    the sizes up to its own."""
    size_weights: tuple[float, ...] = ()
    """How often batches of each of train.sizes come, relative to the others; none: all alike."""
    versions: int = 3
    """With noise.views_per_pixel: noisy versions of each image in a batch, their view counts drawn
    anew for each batch, one from each of so many parts of the range."""
    told: float = 0.7
    """With noise.views_per_pixel: share of images whose view count the solver is told; that of the
    others it takes from their noise codes."""
    optimizer: Literal["muon", "adam"] = "muon"
    """`muon`: orthogonal steps of the kernels, Adam for the rest. `adam`: Adam for all."""
    lr: float = 6e-3
    """Peak learning rate of a run of at most 1000 steps; that of longer ones falls with the square
    root of their length, but for a U-Net. Linear warm-up, then cosine to 2 %."""
    warmup_steps: int = 100
    """Steps of the learning-rate warm-up."""
    grad_clip: float = 5.0
    """Largest gradient norm."""
    ema: float = 0.998
    """Decay of the moving average of the weights; the average is the model that is kept."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Arithmetic of the network; losses stay in fp32. bf16 pays on GPUs and AMX processors."""
    checkpoint_every_steps: int = 500
    """Validation, checkpoint and curve point every so many steps."""
    val_images: int = 120
    """Validation images scored at each checkpoint."""
    parts: int = 1
    """Parts that a batch is worked through in: workers share them, and one alone takes them one
    after the other, with less memory. Runs of as many parts give the same weights on any number of
    workers; fewer parts than workers count as one for each."""
    num_workers: int = 1
    """Data-parallel training workers."""
    cpus_per_worker: int = 1
    """Processor cores (and torch threads) of each worker."""
    use_gpu: bool = False
    """Give each worker one GPU."""
    compile: Literal["auto", True, False] = "auto"
    """How a step is given to a GPU. `auto`: what it does is captured once for each size of images,
    and replayed. True: the network and its losses are also compiled into one graph, a minute or so
    for each size. False: operation by operation."""

    def __post_init__(self) -> None:
        for name in (
            "steps",
            "batch_size",
            "checkpoint_every_steps",
            "val_images",
            "parts",
            "num_workers",
            "cpus_per_worker",
        ):
            value = getattr(self, name)
            check(value >= 1, f"train.{name} must be at least 1, but got {value}.")
        check(
            self.warmup_steps >= 0,
            f"train.warmup_steps must not be negative, but got {self.warmup_steps}.",
        )
        check(0 < self.lr <= 1, f"train.lr must be above 0 and at most 1, but got {self.lr}.")
        check(self.grad_clip > 0, f"train.grad_clip must be above 0, but got {self.grad_clip}.")
        check(0 <= self.ema < 1, f"train.ema must be in [0, 1), but got {self.ema}.")
        check(self.versions >= 1, f"train.versions must be at least 1, but got {self.versions}.")
        check(0 <= self.told <= 1, f"train.told must be between 0 and 1, but got {self.told}.")
        for size in self.sizes:
            check(8 <= size <= 4096, f"train.sizes must be from 8 to 4096 pixels, but got {size}.")
        check(
            len(set(self.sizes)) == len(self.sizes),
            f"train.sizes must not repeat a size, but got {list(self.sizes)}.",
        )
        check(
            not self.size_weights or len(self.size_weights) == len(self.sizes),
            f"train.size_weights must have one entry per entry of train.sizes ({len(self.sizes)}), "
            f"but got {len(self.size_weights)}.",
        )
        for weight in self.size_weights:
            check(weight > 0, f"train.size_weights must be above 0, but got {weight:g}.")

    @property
    def n_parts(self) -> int:
        """Parts of a batch over all workers."""
        return max(self.parts, self.num_workers)


@dataclass(frozen=True, slots=True, kw_only=True)
class SweepConfig:
    steps: int = 1800
    """Training steps of each trial; overrides train.steps."""
    noise_channels: tuple[int, int] = (1, 8)
    """Search range of model.noise_channels, drawn for each level."""
    content_channels: tuple[int, int] = (4, 12)
    """Search range of model.content_channels, drawn for each level."""
    triplet: tuple[float, float] = (0.1, 10.0)
    """Search range of loss.triplet, on a logarithmic scale."""
    content_kl: tuple[float, float] = (0.00005, 0.5)
    """Search range of loss.content_kl, on a logarithmic scale; unused where the base sets it 0."""

    def __post_init__(self) -> None:
        check(self.steps >= 1, f"sweep.steps must be at least 1, but got {self.steps}.")
        for name in ("noise_channels", "content_channels", "triplet", "content_kl"):
            low, high = getattr(self, name)
            check(
                0 < low <= high,
                f"sweep.{name} must be a range low <= high above 0, but got [{low}, {high}].",
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    seed: int = 0
    """Root of every random choice; each is a hash of it with an image id, an epoch or a step."""
    images: ImagesConfig = field(default_factory=ImagesConfig)
    noise: NoiseConfig = field(default_factory=NoiseConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    sweep: SweepConfig = field(default_factory=SweepConfig)

    def __post_init__(self) -> None:
        check(self.seed >= 0, f"seed must not be negative, but got {self.seed}.")
        check(self.seed < 2**32, f"seed must be at most {2**32 - 1}, but got {self.seed}.")
        self._check_batches()
        self._check_physics()
        self._check_range()
        self._check_sizes()

    def _check_batches(self) -> None:
        train = self.train
        check(
            train.parts <= train.num_workers or train.parts % train.num_workers == 0,
            f"train.parts must be a multiple of train.num_workers = {train.num_workers}, so that "
            f"workers get equally many, but got {train.parts}.",
        )
        unit = 2 * train.n_parts
        what = "parts" if train.parts > train.num_workers else "workers"
        check(
            train.batch_size % unit == 0,
            f"train.batch_size must be a multiple of 2 x {what} = {unit}, "
            f"but got {train.batch_size}; the nearest is "
            f"{max(unit, round(train.batch_size / unit) * unit)}.",
        )

    def _check_physics(self) -> None:
        if not self.model.physics:
            return
        check(
            self.images.size <= 64,
            f"model.physics needs images of at most 64 pixels, but images.size is "
            f"{self.images.size}; its linear estimate grows with the fourth power of the size.",
        )
        check(
            self.images.crop is None,
            "model.physics needs whole images, but images.crop is set; the linear estimate of a "
            "crop needs the rest of the image.",
        )
        check(
            self.train.compile is not True,
            "train.compile=true does not go with model.physics, whose steps ask which rows have "
            "which noise id; leave it out.",
        )

    def _check_range(self) -> None:
        """What goes with a range of view counts, and what needs one."""
        views = self.noise.views_per_pixel
        if views is None:
            check(
                not self.train.sizes,
                "train.sizes needs noise of all sizes, but noise.n_views counts the views of one; "
                "set noise.views_per_pixel, such as [0.1,0.8].",
            )
            return
        check(
            self.model.kind == "hvae" and self.model.decoder == "operator",
            "noise.views_per_pixel needs model.kind=hvae and model.decoder=operator, which make "
            f"any noise, but got {self.model.kind} and {self.model.decoder}.",
        )
        for key, unfit in (
            ("model.physics", self.model.physics),
            ("images.crop", self.images.crop is not None),
            ("loss.triplet_form=drawn", self.loss.triplet_form == "drawn"),
        ):
            check(
                not unfit,
                f"noise.views_per_pixel does not go with {key}, which knows a few view counts of "
                "one size; leave one of them out.",
            )
        low, high = (bound * self.images.size for bound in views)
        for n_views in self.noise.n_views:
            check(
                round(low) <= n_views <= round(high),
                f"noise.n_views must lie within noise.views_per_pixel x images.size = "
                f"{low:g} to {high:g} where there is such a range, but got {n_views}.",
            )

    def _check_sizes(self) -> None:
        for size in (self.images.side, *self.train.sizes):
            finest = size / 2 ** len(self.model.channels)
            check(
                finest >= 1,
                f"model.channels has {len(self.model.channels)} levels, each halving the image, "
                f"but images have only {size} pixels; use fewer levels or larger images.",
            )
        most = VIEWS_PER_PIXEL * self.images.size
        check(
            max(self.noise.n_views) <= most,
            f"noise.n_views must be at most {VIEWS_PER_PIXEL} x images.size = {most}, but got "
            f"{max(self.noise.n_views)}; more views add memory and nothing else.",
        )
