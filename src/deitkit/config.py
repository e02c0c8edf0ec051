"""What every configuration class is made of: frozen, unknown keys are errors; and values with their limits.

How an image becomes a view: the settings, and the presets that they start from.

Every configuration class: frozen, keyword-only, unknown keys are errors; each default stands here once.

`None` in a field that says "from the data" or "from the student" is filled in by `resolve.resolve` before anything runs;
`config.yaml` in a run folder holds the filled-in form, so feeding it back gives the same run.
The text under a field becomes its line of `--help`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, model_validator

Size = tuple[int, int]
"""(height, width) in pixels."""
Seed = Annotated[int, Field(ge=0, le=2**32 - 1)]
Probability = Annotated[float, Field(ge=0, le=1)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
LARGE = 1e15
"""More than any rate, weight or temperature that is meant; two of them multiplied are still a number in float32."""
NonNegative = Annotated[float, Field(ge=0, le=LARGE, allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, le=LARGE, allow_inf_nan=False)]
Alpha = Annotated[float, Field(ge=0, le=1000)]
PositiveInt = Annotated[int, Field(gt=0)]
Pixels = Annotated[int, Field(gt=0, le=4096)]
Width = Annotated[int, Field(gt=0, le=16384)]
Depth = Annotated[int, Field(gt=0, le=1000)]
HeadCount = Annotated[int, Field(gt=0, le=1024)]
MANY = 10**9
"""More steps, epochs or images than anyone trains with; a limit, so that a slip of the finger is named at once."""
MOST_VIEWS = 100_000
Workers = Annotated[int, Field(ge=0, le=1024)]
Count = Annotated[int, Field(gt=0, le=MANY)]
Interpolation = Literal["nearest", "bilinear", "bicubic"]
Distillation = Literal["none", "hard", "soft", "zscore", "dist", "dkd"]
Precision = Literal["auto", "float32", "bfloat16", "float16"]
Stem = Literal["patch", "conv", "residual"]
HeadChoice = Literal["cls", "dist", "fused", "fused_logits"]
HEADS: dict[HeadChoice, str] = {
    "cls": "class head",
    "dist": "distillation head",
    "fused": "both, fused",
    "fused_logits": "both, fused logits",
}
"""What a prediction may be from, and what it is called where people read it."""


class Config(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


ConfigT = TypeVar("ConfigT", bound=Config)


class ViewConfig(Config):
    """How an image becomes a view. All draws depend on (view_seed, view, image) alone."""

    augment: Literal["none", "light", "deit", "deit3"] = "light"
    """preset that the fields below start from"""
    view_seed: Seed = 0
    """seed of what is seen"""
    view_size: tuple[Pixels, Pixels] | None = None
    """height and width of a view; the network's if not given"""
    crop: Literal["none", "pad", "resize", "simple"] | None = None
    """none: whole image; pad: padded and shifted; resize: random area, resized; simple: resized to the view's shorter side,
    padded, random place; from the data if not given"""
    crop_padding: Annotated[int, Field(ge=0, le=4096)] | None = None
    """pad, simple: pixels added on every side, reflected; simple: 4 if not given; pad: an eighth of the image (4 for 32
    pixels)"""
    crop_area: tuple[Probability, Probability] = (0.08, 1.0)
    """resize: least and most share of the image's area"""
    crop_aspect: tuple[Positive, Positive] = (3 / 4, 4 / 3)
    """resize: least and most width/height of the area"""
    interpolation: Interpolation = "bicubic"
    """how crops of photos are resized"""
    flip_prob: Probability | None = None
    """left-right flip; 0.5 if not given, 0 for data whose mirror image means something else"""
    randaugment_operations: Annotated[int, Field(ge=0, le=8)] = 0
    """RandAugment: operations per view"""
    randaugment_magnitude: Annotated[float, Field(ge=0, le=10)] = 9.0
    """RandAugment: strength, 0 to 10"""
    randaugment_magnitude_sd: Annotated[float, Field(ge=0, le=100)] = 0.5
    """RandAugment: standard deviation of the strength"""
    randaugment_prob: Probability = 0.5
    """RandAugment: probability that a drawn operation is applied"""
    three_augment: bool = False
    """3-Augment: every view is made grey, solarised or blurred"""
    colour_jitter: Annotated[float, Field(ge=0, le=1)] = 0.0
    """brightness, contrast and saturation vary by a factor from 1-x to 1+x"""
    random_erasing_prob: Probability = 0.0
    """random erasing: a rectangle is filled with pixel noise"""
    erase_area: tuple[Probability, Probability] = (0.02, 1 / 3)
    """random erasing: least and most share of the image's area"""
    mixup_alpha: Alpha = 0.0
    """mixup: weights from Beta(alpha, alpha); 0 turns it off"""
    cutmix_alpha: Alpha = 0.0
    """CutMix: areas from Beta(alpha, alpha); 0 turns it off"""
    mixup_prob: Probability = 1.0
    """probability that a pair of images is mixed at all"""
    mixup_switch_prob: Probability = 0.5
    """probability that a mixed pair gets CutMix, where mixup is on too"""
    repeated_aug: Annotated[int, Field(ge=1, le=16)] = 1
    """repeated augmentation: an epoch shows this many views each of 1/repeats of the images"""
    views: Annotated[int, Field(gt=0, le=MOST_VIEWS)] | None = None
    """epochs go round so many views; each shows another one if not given"""

    @model_validator(mode="after")
    def _check(self) -> ViewConfig:
        for name in ("crop_area", "crop_aspect", "erase_area"):
            low, high = getattr(self, name)
            if low > high:
                raise ValueError(f"{name}: {low} is above {high}")
        if self.crop_area[0] <= 0:
            raise ValueError("crop_area: the least area must be above 0")
        if self.views is not None and self.views % self.repeated_aug:
            raise ValueError(f"views: {self.views} is not a multiple of repeats {self.repeated_aug}")
        return self


AUGMENT_PRESETS: dict[str, ViewConfig] = {
    "none": ViewConfig(augment="none", crop="none", flip_prob=0.0),
    # Short runs: the weakest views that still differ. Resized crops keep at least half of the photo.
    "light": ViewConfig(augment="light", crop_area=(0.5, 1.0)),
    # DeiT, table 9 (arXiv 2012.12877), without its repeated augmentation: that does not change what a view looks like, but
    # how many images an epoch shows (--repeated-aug 3). With RandAugment on, the official code never applies its colour jitter.
    "deit": ViewConfig(
        augment="deit",
        randaugment_operations=2,
        random_erasing_prob=0.25,
        mixup_alpha=0.8,
        cutmix_alpha=1.0,
    ),
    # DeiT III (arXiv 2204.07118), section 3; how the image is cropped stays with the data, as in the other presets.
    "deit3": ViewConfig(
        augment="deit3",
        three_augment=True,
        colour_jitter=0.3,
        mixup_alpha=0.8,
        cutmix_alpha=1.0,
    ),
}


class Preprocessing(Config):
    """What a network does to an image in [0, 1] before its first layer, and how test images reach it."""

    image_size: tuple[Pixels, Pixels]
    mean: Annotated[tuple[Finite, ...], Field(min_length=1, max_length=3)]
    std: Annotated[tuple[Positive, ...], Field(min_length=1, max_length=3)]
    interpolation: Interpolation = "bicubic"
    crop_pct: Annotated[float, Field(ge=0.1, le=1)] = 1.0
    """evaluation: the centre crop's share of the resized image's shorter side"""

    @model_validator(mode="after")
    def _check(self) -> Preprocessing:
        if len(self.mean) != len(self.std):
            raise ValueError(f"{len(self.mean)} means and {len(self.std)} standard deviations")
        return self

    @property
    def channels(self) -> int:
        return len(self.mean)


class DataConfig(Config):
    location: str = ""
    """where the images are (DATA on the command line)"""
    train_images: Count | None = None
    """use a stratified subset of this many training images"""
    unlabelled: bool = False
    """learn from images without labels too, what the teacher says of them: those in the folder `unlabelled` beside the class
    folders (or beside train), and those that --train-images leaves out"""
    data_seed: Seed = 0
    """seed of the split and of the subset"""
    val_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """share of the training images held out for validation, where the data has no validation split"""
    max_bad_images: Annotated[int, Field(ge=0, le=MANY)] = 10
    """go on without at most this many unreadable images; more end the run"""

    def split_settings(self) -> dict[str, Any]:
        """The settings that decide which images are trained on."""
        return self.model_dump(include={"train_images", "unlabelled", "data_seed", "val_fraction"})


class StudentConfig(Config):
    """Which student; `None` means: as the named student has it, or from the data."""

    student: str | None = None
    """a name of `deit models`; as --init has it, or chosen by image size, if not given"""
    image_size: Pixels | None = None
    """pixels of the student's (square) input; from the data if not given"""
    stem: Stem | None = None
    """patch: one linear map a patch; conv: a few convolutions; residual: more of them"""
    patch_size: Pixels | None = None
    """pixels of a (square) patch"""
    width: Width | None = None
    """width of a token"""
    depth: Depth | None = None
    """number of blocks"""
    heads: HeadCount | None = None
    """attention heads"""
    init: str | None = None
    """weights to start from: a run folder, a file (.safetensors, .pth), a timm name, NAME@FILE, or hf:OWNER/NAME"""
    drop_path: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """stochastic depth: probability that the last block drops an image; earlier blocks proportionally less"""
    drop_path_rule: Literal["linear", "constant"] = "linear"
    """linear: as said; constant: every block drops as many images as the last one"""
    crop_pct: Annotated[float, Field(ge=0.1, le=1)] | None = None
    """share of a test image's shorter side that its centre crop keeps; 0.875 for photos that are cropped, else 1"""
    low_res_size: Pixels | None = None
    """pixels of the shorter side at which the student sees its images in the first steps, which then take less time: a multiple
    of the patch below its own size; the teacher sees them whole"""
    low_res_fraction: Annotated[float, Field(gt=0, lt=1)] | None = None
    """share of the steps, from the first, that are of the small size; half if not given"""
    calibrate: bool = True
    """scale the trained heads so that the probabilities fit the validation images"""
    fine_tune: bool = False
    """the student goes on from weights that it is given: refused without them"""


class TeacherConfig(Config):
    teacher: str | None = None
    """timm name, torchvision:NAME, lite0, a run folder, cifar-resnet56@FILE, several of them as A+B, which are averaged, or auto:
    fit one first and keep it"""
    tape: str | None = None
    """in the teacher's place: a tape of its answers; views and split are the tape's where nothing else is given"""
    record: str | None = None
    """write the teacher's answers to this tape as the training goes, so that the next one is free"""
    answers: Literal["hard", "all"] | Annotated[int, Field(gt=0)] | None = None
    """what is recorded: hard (decisions, for hard alone), all (logits, for every loss) or a number (the likeliest classes, for
    hard, soft and dist); as the loss needs it"""
    teacher_chunk_size: Annotated[int, Field(gt=0, le=65536)] | None = None
    """images that the teacher answers at a time, whatever the batch size; by the memory there is if not given"""
    teacher_precision: Precision = "auto"
    """what the teacher computes in; auto: bfloat16 on a GPU, or a CPU with AMX, that has it, else float32"""
    teacher_size: Pixels | None = None
    """pixels of the (square) image that the teacher sees; its own if not given"""

    @property
    def present(self) -> bool:
        """Whether anybody answers."""
        return self.teacher is not None or self.tape is not None

    @property
    def size(self) -> Size | None:
        """(height, width) of the image that the teacher sees; None: its own."""
        return None if self.teacher_size is None else (self.teacher_size, self.teacher_size)

    @model_validator(mode="after")
    def _check(self) -> TeacherConfig:
        if self.tape is not None and self.teacher is not None:
            raise ValueError("tape: stands in the teacher's place: leave out --teacher")
        if self.tape is not None and self.teacher_size is not None:
            raise ValueError("teacher_size: a tape has the answers already: give it to deit tape record instead")
        if self.record is not None and self.teacher is None:
            raise ValueError("record: nobody answers: give --teacher")
        if self.answers is not None and self.record is None:
            raise ValueError("answers: say what --record writes: give --record")
        return self


TEMPERATURES = {"soft": 3.0, "zscore": 2.0, "dist": 1.0, "dkd": 4.0}
"""As published, where no other is asked for."""
TEACHER_WEIGHTS = {"zscore": 5.0}
"""Where no other is asked for; 0.5 for the others, as in DeiT."""


class LossConfig(Config):
    label_loss: Literal["ce", "bce"] = "ce"
    """to the labels: ce (cross-entropy) or bce (each class for itself, right for every label in the image)"""
    bce_reduction: Literal["sum", "mean"] = "sum"
    """bce: summed over classes (nats per image), or the official code's mean over them"""
    distillation: Distillation | None = None
    """none, hard (decisions), soft (KL), zscore (KL of standardised logits), dist (correlation) or dkd (decoupled KL); if not
    given and there is a teacher: zscore, or hard for two classes and for a tape without all logits"""
    temperature: Positive | None = None
    """not for hard: both distributions are softened by this; as published if not given (soft 3, zscore 2, dist 1, dkd 4)"""
    dkd_beta: NonNegative = 8.0
    """dkd: weight of the other classes beside the right one, whose weight is 1"""
    label_weight: NonNegative = 0.5
    """weight of the cross-entropy to the labels (1 without distillation)"""
    teacher_weight: NonNegative | None = None
    """weight of the loss to the teacher; 5 for zscore and 0.5 for the others if not given"""
    distil_head: Literal["dist", "cls"] = "dist"
    """which head learns from the teacher: dist (token) or cls (no token)"""
    distil_target: Literal["teacher", "labels"] = "teacher"
    """what that head learns; labels: the paper's control with a second class token"""
    reduction: Literal["mean", "deit"] = "mean"
    """soft: mean over images, or the official code's division by images times classes"""
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """of the labels; the teacher's decisions are never smoothed"""

    @model_validator(mode="after")
    def _check(self) -> LossConfig:
        if self.distil_target == "labels" and self.distil_head == "cls":
            raise ValueError("distil_target: labels are for a second class token: leave out --distil-head cls")
        if self.label_loss == "bce" and self.label_smoothing > 0:
            raise ValueError(
                f"label_smoothing: {self.label_smoothing:g} would mark every class as right for bce: "
                f"give --label-smoothing 0"
            )
        if self.label_loss == "ce" and self.bce_reduction == "mean":
            raise ValueError("bce_reduction: mean is of bce: give --label-loss bce, or --bce-reduction sum")
        return self

    @property
    def softening(self) -> float:
        """The temperature, of this loss's own where none is given; 1 where nothing is softened."""
        return TEMPERATURES.get(self.distillation or "", 1.0) if self.temperature is None else self.temperature

    @property
    def pull(self) -> float:
        """The weight of the loss to the teacher (or of a second class token's), this loss's own where none is given."""
        return TEACHER_WEIGHTS.get(self.distillation or "", 0.5) if self.teacher_weight is None else self.teacher_weight

    @property
    def two_terms(self) -> bool:
        """Whether there is a second term beside the one to the labels: to a teacher, or to labels again."""
        return self.distillation not in (None, "none") or self.distil_target == "labels"

    @property
    def needs_logits(self) -> bool:
        """Whether a teacher's decisions alone cannot teach this."""
        return self.distillation not in (None, "none", "hard")

    def shortage(self, answers: Literal["hard", "all"] | int) -> str | None:
        """What such answers lack to teach this loss, if they lack something. Of the likeliest classes alone the others come
        back as a guess: good enough for probabilities, not for zscore and dkd, which weigh the unlikely classes' logits."""
        if answers == "hard" and self.needs_logits:
            return f"decisions alone, --distillation {self.distillation} needs logits"
        if answers != "all" and self.distillation in ("zscore", "dkd"):
            return f"the {answers} likeliest classes alone, --distillation {self.distillation} needs all logits"
        return None


class OptimConfig(Config):
    optimizer: Literal["adamw", "muon", "lamb"] = "adamw"
    """adamw; muon: the blocks' matrices and the stem's 3x3 kernels by Muon, at steps as large as AdamW's, and the rest by AdamW;
    lamb: LAMB"""
    base_lr: Positive = 5e-4
    """peak learning rate for a batch of 256 images; it scales with the batch size"""
    lr_end_share: Probability = 0.02
    """learning rate at the end, as a share of the peak"""
    lr_end: NonNegative | None = None
    """instead of the share: learning rate at the end, whatever the batch size"""
    lr_start: NonNegative | None = None
    """learning rate of the first step, whatever the batch size; the warm-up rises from 0 if not given"""
    warmup_share: Annotated[float, Field(ge=0, lt=1)] = 0.05
    """share of the steps in which the learning rate rises"""
    warmup_epochs: Annotated[float, Field(ge=0, le=MANY)] | None = None
    """instead of the share: epochs in which the learning rate rises"""
    weight_decay: NonNegative = 0.05
    """not applied to biases and norms, nor to a transformer's tokens and positions"""
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.999)
    """decay of the running means of gradients and of their squares"""
    layer_decay: Annotated[float, Field(gt=0, le=1)] = 1.0
    """fine-tuning: learning rate of a block as a share of the next one's; heads and distillation token have the full
    rate"""
    trainable: Annotated[str, Field(pattern=r"^(all|attention|last-\d{1,4})$")] = "all"
    """fine-tuning: all, attention (of every block), or last-N (blocks); heads and distillation token always learn"""
    max_grad_norm: Positive | None = None
    """gradients are scaled down to this norm, of all weights together; nothing else clips them"""
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = 0.999
    """moving average of the weights, per step; the average is what is evaluated and kept; 0 turns it off"""


class LoopConfig(Config):
    epochs: Count = 30
    """passes over the training images"""
    budget_minutes: Annotated[float, Field(gt=0, le=10**6)] | None = None
    """instead of epochs: minutes of training, turned into steps before the first one"""
    steps: Count | None = None
    """instead of epochs: optimiser steps"""
    batch_size: Annotated[int, Field(gt=0, le=10**6)] = 128
    """images per step, over all processes"""
    seed: Seed = 0
    """seed of the initial weights, the order and a student's stochastic depth"""
    workers: Workers = 2
    """processes that read and crop photos; they never change the result"""
    processes: Annotated[int, Field(gt=0, le=1024)] = 1
    """training processes on this machine, one per GPU"""
    precision: Precision = "auto"
    """auto: bfloat16 on a GPU, or a CPU with AMX, that has it, else float32"""
    compile: bool = False
    """torch.compile the network"""
    deterministic: bool = False
    """same bits on GPUs, slower"""

    @model_validator(mode="after")
    def _check(self) -> LoopConfig:
        if self.steps is not None and self.budget_minutes is not None:
            raise ValueError("budget_minutes: excludes steps: give one of them")
        return self


class JobConfig(Config):
    """What every training has, whatever network it trains."""

    data: DataConfig = DataConfig()
    view: ViewConfig = AUGMENT_PRESETS["light"]
    optim: OptimConfig = OptimConfig()
    loop: LoopConfig = LoopConfig()

    @property
    def peak_lr(self) -> float:
        """Learning rate after the warm-up."""
        return self.optim.base_lr * self.loop.batch_size / 256

    @model_validator(mode="after")
    def _check_schedule(self) -> JobConfig:
        for name in ("lr_start", "lr_end"):
            rate = getattr(self.optim, name)
            if rate is not None and rate > self.peak_lr * (1 + 1e-9):
                raise ValueError(
                    f"{name}: {rate:g} is above the peak, {self.peak_lr:g} for batches of {self.loop.batch_size}: "
                    f"give a lower one, or a larger batch or --lr"
                )
        by_epochs = self.loop.steps is None and self.loop.budget_minutes is None
        warmup = self.optim.warmup_epochs
        if by_epochs and warmup is not None and warmup >= self.loop.epochs:
            raise ValueError(
                f"warmup_epochs: {warmup:g} leave nothing of {self.loop.epochs} epochs: "
                f"give fewer, or --warmup-share instead"
            )
        return self


JobT = TypeVar("JobT", bound=JobConfig)


class StudentOptimConfig(OptimConfig):
    """What suits a small student whose weights are fresh."""

    optimizer: Literal["adamw", "muon", "lamb"] = "muon"
    """muon: the blocks' matrices and the stem's 3x3 kernels by Muon, at steps as large as AdamW's, and the rest by AdamW;
    adamw, the default with --init; lamb: LAMB"""
    base_lr: Positive = 2.4e-2
    """peak learning rate for a batch of 256 images; it scales with the batch size; 0.0005 if not given beside --init, adamw or
    lamb"""
    weight_decay: NonNegative = 0.5
    """not applied to biases and norms, nor to a transformer's tokens and positions; 0.05 if not given beside --init, adamw or
    lamb"""


FINE_TUNING = {name: getattr(OptimConfig(), name) for name in ("optimizer", "base_lr", "weight_decay")}
"""A student's defaults instead of `StudentOptimConfig`'s where it starts from weights, or is given AdamW or LAMB."""


class RunConfig(JobConfig):
    """One run of `deit train`."""

    student: StudentConfig = StudentConfig()
    teacher: TeacherConfig = TeacherConfig()
    loss: LossConfig = LossConfig()
    optim: StudentOptimConfig = StudentOptimConfig()
    loop: LoopConfig = LoopConfig(batch_size=64)

    @model_validator(mode="after")
    def _check(self) -> RunConfig:
        if self.student.fine_tune and self.student.init is None:
            raise ValueError("fine_tune: there are no weights to go on from: give --init")
        named = self.loss.distillation not in (None, "none")
        if named and self.loss.distil_target == "teacher" and not self.teacher.present:
            raise ValueError(
                f"distillation {self.loss.distillation!r} needs a teacher: give --teacher or --tape, or --distillation none"
            )
        if self.teacher.teacher_size is not None and not self.teacher.present:
            raise ValueError("teacher_size: there is no teacher to see images of that size: give --teacher")
        if self.loss.distillation == "none" and self.teacher.present:
            raise ValueError("distillation 'none' has no use for a teacher: leave out one of the two")
        if self.teacher.present and self.loss.distil_target == "labels":
            raise ValueError("distil_target: labels are learned from no teacher: leave out one of the two")
        if not self.teacher.present and self.loss.distil_head == "cls":
            raise ValueError("distil_head: cls is taught nothing without a teacher: give --teacher")
        two_losses = self.teacher.present or self.loss.distil_target == "labels"
        if two_losses and self.loss.label_weight == self.loss.teacher_weight == 0:
            raise ValueError(
                "label_weight: with both weights 0 nothing is learned: give --label-weight or --teacher-weight"
            )
        if self.loss.reduction == "deit" and self.loss.distillation != "soft":
            raise ValueError("reduction: deit is of the soft loss: give --distillation soft")
        if self.optim.trainable != "all" and self.student.init is None:
            raise ValueError(
                f"tune: {self.optim.trainable} leaves weights as they are that nobody has trained: give --init"
            )
        shortage = None if self.teacher.answers is None else self.loss.shortage(self.teacher.answers)
        if shortage is not None:
            raise ValueError(f"answers: {shortage}: give --answers all")
        return self


class FitOptimConfig(OptimConfig):
    optimizer: Literal["adamw", "muon"] = "adamw"
    """adamw; muon, the default with --from-scratch and for it alone: kernels by Muon, at steps as large as AdamW's, and the rest
    by AdamW"""
    base_lr: Positive = 2e-3
    """peak learning rate for a batch of 256 images; it scales with the batch size; 0.024 if not given beside --from-scratch and
    muon"""


class FitLoopConfig(LoopConfig):
    epochs: Count = 10
    """passes over the training images"""
    batch_size: Annotated[int, Field(gt=0, le=10**6)] = 128
    """images per step, over all processes; 64 if not given beside --from-scratch and muon"""


FROM_SCRATCH: dict[str, dict[str, Any]] = {
    "optim": {"optimizer": "muon", "base_lr": 2.4e-2},
    "loop": {"batch_size": 64},
}
"""A convolutional network's defaults instead of `FitConfig`'s where its weights are fresh, and AdamW is not asked for."""


class FitConfig(JobConfig):
    """One run of `deit teacher fit`: the same loop, with a convolutional network in the student's place."""

    model: str = "cifar-resnet20"
    """cifar-resnetN, a timm name, torchvision:NAME, or lite0"""
    from_scratch: bool = False
    """random initial weights instead of pretrained ones"""
    image_size: Pixels | None = None
    """pixels of the network's (square) input; the network's own, or from the data"""
    head_share: Annotated[float, Field(ge=0, lt=1)] = 0.2
    """pretrained: share of the steps in which only the new last layer learns"""
    optim: FitOptimConfig = FitOptimConfig()
    loop: FitLoopConfig = FitLoopConfig()
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """of the labels"""

    @model_validator(mode="after")
    def _check(self) -> FitConfig:
        if self.data.unlabelled:
            raise ValueError("unlabelled: a convolutional network is fitted to labels alone: leave it out")
        if self.optim.optimizer == "muon" and not self.from_scratch:
            raise ValueError("optimizer: muon fits a convolutional network from scratch alone: give --from-scratch")
        for name in ("layer_decay", "trainable"):
            if getattr(self.optim, name) != OptimConfig.model_fields[name].default:
                raise ValueError(f"{name}: is for a transformer's blocks: a convolutional network has --head-share")
        return self
