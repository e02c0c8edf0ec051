"""The settings of a run. Every class is frozen, and an unknown key is an error.

`None` in a field that says "from the data" or "from the student" is filled in before anything runs (`training.setup`);
`config.yaml` in a run folder holds the filled-in form: given as a recipe, it gives the same run.
The text under a field is its line of `--help`: the part before the first semicolon alone on the short page.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import AliasChoices, BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator

from deitkit.lengths import LARGE, MANY, Length, MinLr, Warmup, parse_length
from deitkit.randaugment import RandAugment, RandAugmentText

Size = tuple[int, int]
"""(height, width) in pixels."""
MOST_VIEWS = 100_000
Seed = Annotated[int, Field(ge=0, le=2**32 - 1)]
Probability = Annotated[float, Field(ge=0, le=1)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, le=LARGE, allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, le=LARGE, allow_inf_nan=False)]
Alpha = Annotated[float, Field(ge=0, le=1000)]
PositiveInt = Annotated[int, Field(gt=0)]
Pixels = Annotated[int, Field(gt=0, le=4096)]
Width = Annotated[int, Field(gt=0, le=16384)]
Depth = Annotated[int, Field(gt=0, le=1000)]
HeadCount = Annotated[int, Field(gt=0, le=1024)]
Workers = Annotated[int, Field(ge=0, le=1024)]
Count = Annotated[int, Field(gt=0, le=MANY)]
MAX_PIXELS = 200_000_000
"""Larger images are not read unless `--max-pixels` allows it."""
Interpolation = Literal["nearest", "bilinear", "bicubic"]
Distillation = Literal["none", "hard", "soft", "zscore", "features", "callable"]
Precision = Literal["auto", "float32", "bfloat16", "float16"]
ClassWeights = Literal["none", "balanced"]
Stem = Literal["patch", "conv", "residual"]
Tracker = Literal["trackio", "tensorboard", "wandb", "mlflow"]
AUTO, SCRATCH, MIMETIC, REQUIRED, SHIPPED = "auto", "scratch", "mimetic", "required", "shipped:"
SHAPE = ("stem", "patch_size", "width", "depth", "heads")
"""Settings that change a student's shape."""
HeadChoice = Literal["cls", "dist", "fused", "fused_logits"]
HEADS: dict[HeadChoice, str] = {
    "cls": "class head",
    "dist": "distillation head",
    "fused": "both, fused",
    "fused_logits": "both, fused logits",
}
"""What a prediction is made from, and its name in tables."""


class Config(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    @field_validator("*", mode="before")
    @classmethod
    def _no_switch_as_number(cls, value: Any, info: ValidationInfo) -> Any:
        """`seed: yes` is not seed 1, which pydantic would make of it."""
        if isinstance(value, bool) and cls.model_fields[str(info.field_name)].annotation is not bool:
            raise ValueError("yes and no are for switches: give a number or a name")
        return value


ConfigT = TypeVar("ConfigT", bound=Config)

# ---------------------------------------------------------------------------------------------------- images


class ViewConfig(Config):
    """How an image becomes a view. All draws depend on (view_seed, view, image) alone."""

    augment: Literal["none", "light", "deit", "deit3"] = "light"
    """augmentation preset: none, light, deit or deit3"""
    view_seed: Seed = 0
    """seed of the views"""
    view_size: tuple[Pixels, Pixels] | None = None
    """height and width at which the student's views are rendered, no part of what is drawn; the student's input if not given"""
    crop: Literal["none", "pad", "resize", "simple"] | None = None
    """none, pad (and shift), resize (a random area) or simple (resize, pad, random place); from the data if not given"""
    crop_padding: Annotated[float, Field(ge=0, lt=1)] | None = None
    """pad, simple: share of the view's shorter side added on every side, reflected; 1/56 for simple, 1/8 for pad if not given"""
    crop_area: tuple[Probability, Probability] = (0.08, 1.0)
    """resize: smallest and largest share of the image's area"""
    flip_prob: Probability | None = None
    """horizontal flips; 0.5 if not given, but 0 for data whose mirror image means something else"""
    randaugment: RandAugmentText = None
    """RandAugment as timm writes it, such as rand-m9-n2-mstd0.5-p0.5; magnitude (0 to 10), operations per view, standard deviation of the
    magnitude, probability of each operation; none (the default) turns it off"""
    three_augment: bool = False
    """3-Augment: every view is made grey, solarised or blurred"""
    colour_jitter: Annotated[float, Field(ge=0, le=1)] = 0.0
    """brightness, contrast and saturation vary by a factor from 1-x to 1+x"""
    random_erasing_prob: Probability = 0.0
    """random erasing: a rectangle is filled with pixel noise"""
    mixup_alpha: Alpha = 0.0
    """mixup: lambda from Beta(alpha, alpha); 0 turns it off"""
    cutmix_alpha: Alpha = 0.0
    """CutMix: area from Beta(alpha, alpha); 0 turns it off"""
    mixup_prob: Probability = 1.0
    """probability that a pair of images is mixed at all"""
    mixup_switch_prob: Probability = 0.5
    """probability of CutMix instead of mixup, where both are on"""
    repeated_aug: Annotated[int, Field(ge=1, le=16)] = 1
    """repeated augmentation: an epoch shows N views each of 1/N of the images"""
    views: Annotated[int, Field(gt=0, le=MOST_VIEWS)] | None = None
    """epochs repeat so many views; every epoch shows a new one if not given"""

    @model_validator(mode="after")
    def _check(self) -> ViewConfig:
        low, high = self.crop_area
        if low > high:
            raise ValueError(f"crop_area: {low} is above {high}")
        if low <= 0:
            raise ValueError("crop_area: the least area must be above 0")
        if self.views is not None and self.views % self.repeated_aug:
            raise ValueError(f"views: {self.views} is not a multiple of repeated_aug {self.repeated_aug}")
        return self

    def at(self, size: Size) -> ViewConfig:
        """The same views, rendered at another (height, width): no draw depends on it."""
        return self if self.view_size == size else self.model_copy(update={"view_size": size})


AUGMENT_PRESETS: dict[str, ViewConfig] = {
    "none": ViewConfig(augment="none", crop="none", flip_prob=0.0),
    # Short runs: the weakest views that still differ. Resized crops keep at least half of the photo.
    "light": ViewConfig(augment="light", crop_area=(0.5, 1.0)),
    # DeiT, table 9 (arXiv 2012.12877), without its repeated augmentation: that does not change what a view looks like, but
    # how many images an epoch shows (--repeated-aug 3). With RandAugment on, the official code never applies its colour jitter.
    "deit": ViewConfig(
        augment="deit", randaugment=str(RandAugment()), random_erasing_prob=0.25, mixup_alpha=0.8, cutmix_alpha=1.0
    ),
    # DeiT III (arXiv 2204.07118), section 3; how the image is cropped stays with the data, as in the other presets.
    "deit3": ViewConfig(augment="deit3", three_augment=True, colour_jitter=0.3, mixup_alpha=0.8, cutmix_alpha=1.0),
}


class Preprocessing(Config):
    """What a network does to an image in [0, 1] before its first layer, and how test images reach it."""

    image_size: tuple[Pixels, Pixels]
    mean: Annotated[tuple[Finite, ...], Field(min_length=1, max_length=3)]
    std: Annotated[tuple[Positive, ...], Field(min_length=1, max_length=3)]
    interpolation: Interpolation = "bicubic"
    crop_pct: Annotated[float, Field(ge=0.1, le=1, validation_alias=AliasChoices("crop_pct", "crop_fraction"))] = 1.0
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
    train_folder: str | None = None
    """folder of the training images, where none is called train; others with the same class folders need names such as val and test"""
    train_images: Count | None = None
    """train on a stratified subset of so many images"""
    unlabelled: bool = False
    """also train on images without labels; the teacher alone labels those in the folder `unlabelled` beside the class folders (or
    beside train), and those that --train-images leaves out"""
    oversample: bool = False
    """repeat the training images of smaller classes, with views of their own, until no class is smaller than the largest"""
    data_seed: Seed = 0
    """seed of the split and of the subset"""
    val_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """share of the training images held out for validation; used where the data has no validation split"""
    max_bad_images: Annotated[int, Field(ge=0, le=MANY)] = 10
    """leave out at most so many unreadable images; more are an error"""
    max_pixels: Annotated[int, Field(gt=0, le=2**40)] = MAX_PIXELS
    """images of more pixels are taken for unreadable: one of 200 million takes 600 MB of memory while it is read"""

    def split_settings(self) -> dict[str, Any]:
        """The settings that decide which images are trained on."""
        named = set() if self.train_folder is None else {"train_folder"}  # tapes of earlier versions know nothing of it
        return self.model_dump(
            include={"train_images", "unlabelled", "oversample", "data_seed", "val_fraction", *named}
        )


class StudentConfig(Config):
    """The student. `None` stands for what the named student has, or for what the data decide."""

    student: str | None = None
    """a name from `deit models`; chosen by image size, or by --init, if not given"""
    image_size: Pixels | None = None
    """pixels of the student's (square) input; from the data if not given"""
    stem: Stem | None = None
    """patch: one linear map per patch; conv: a few convolutions; residual: more of them"""
    patch_size: Pixels | None = None
    """pixels of a (square) patch"""
    width: Width | None = None
    """width of a token"""
    depth: Depth | None = None
    """number of blocks"""
    heads: HeadCount | None = None
    """attention heads"""
    init: str | None = None
    """initial weights: auto, scratch, mimetic, a run, a file or a name; auto stands for the student's own (shipped or published, else
    fresh), scratch for fresh ones (the default, but the recipes for photos have auto), mimetic for fresh ones whose attention looks
    like a trained one; a run folder, a file (.safetensors, .pth), a timm name,
    NAME@FILE, or hf:OWNER/NAME; required, in a recipe: to be given"""
    drop_path: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """stochastic depth: probability that the last block is dropped; earlier blocks proportionally less (DeiT III: as much)"""
    crop_pct: Annotated[float, Field(ge=0.1, le=1)] | None = None
    """evaluation: share of the shorter side that the centre crop keeps; 0.875 for photos that are cropped, else 1"""
    low_res_size: Pixels | None = None
    """progressive resizing: pixels of the student's input in the first half of the steps; a multiple of the patch"""
    calibrate: bool = True
    """scale the trained heads so that their probabilities fit the validation images"""

    @field_validator("init")
    @classmethod
    def _scratch_is_none(cls, value: str | None) -> str | None:
        return None if value == SCRATCH else value

    @property
    def is_fresh(self) -> bool:
        """Whether it begins with random weights."""
        return self.init in (None, MIMETIC)


class TeacherConfig(Config):
    teacher: str | None = None
    """a timm name, torchvision:NAME, lite0, a run or tape (compare: no tape), cifar-resnet56@FILE, A+B (averaged), none or
    auto (fitted first, the default of deit train)"""
    tape: str | None = None
    """a tape (cached teacher outputs) in the teacher's place; its views and split are used"""
    record: str | None = None
    """record the teacher's outputs in this tape folder first, and train from it"""
    teacher_precision: Precision = "auto"
    """teacher precision: auto, float32, bfloat16 or float16; auto = bfloat16 where the hardware supports it, else float32"""
    teacher_size: Pixels | None = None
    """pixels of the teacher's (square) input; its own if not given"""

    @property
    def present(self) -> bool:
        """Whether there are teacher outputs to learn from."""
        return self.teacher is not None or self.tape is not None

    @property
    def size(self) -> Size | None:
        """(height, width) of the teacher's input; None: its own."""
        return None if self.teacher_size is None else (self.teacher_size, self.teacher_size)

    @model_validator(mode="after")
    def _check(self) -> TeacherConfig:
        if self.tape is not None and self.teacher is not None:
            raise ValueError("tape: a tape replaces the teacher: give one of them")
        if self.tape is not None and self.teacher_size is not None:
            raise ValueError("teacher_size: a tape holds the outputs already: give it to deit tape record instead")
        if self.record is not None and self.teacher is None:
            raise ValueError("record: there is no teacher to record: give --teacher")
        return self


TEMPERATURES = {"soft": 3.0, "zscore": 2.0}  # as published (arXiv 2012.12877, arXiv 2403.01427)
FEATURE_WEIGHT = 2.0
TEACHER_WEIGHTS = {"zscore": 5.0}  # 0.5 for the other losses: equation 3's; DeiT's soft loss has 0.1


class LossConfig(Config):
    """loss = label_weight * label_loss(class head) + teacher_weight * distillation(distillation head)."""

    label_loss: Literal["ce", "bce"] = "ce"
    """ce: cross-entropy to the labels; bce: binary cross-entropy of every class, summed"""
    distillation: Distillation | None = None
    """none, hard (labels), soft (KL), zscore (KL of standardised logits) or features (those alone); if not given zscore, or hard where
    that cannot be"""
    temperature: Positive | None = None
    """distillation temperature (soft 3, zscore 2 if not given)"""
    label_weight: NonNegative | None = None
    """weight of the label loss; 0.5 beside a distillation loss, else 1, if not given"""
    teacher_weight: NonNegative | None = None
    """weight of the distillation loss (zscore 5, others 0.5 if not given)"""
    feature_weight: NonNegative | None = None
    """weight of 1 - cosine to the teacher's features; if not given 2 where it has some, but 0 beside a --distillation that is"""
    distil: Literal["token", "cls", "both", "labels"] | None = None
    """head that learns from the teacher: token (the paper), cls (no token) or both (where the label weight is 0, if not given);
    labels: the token learns labels (a control)"""
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """smoothing of the labels; the teacher's hard labels are never smoothed"""
    class_weights: ClassWeights = "none"
    """none, or balanced: the label loss of an image counts as much as its class is rarer than the mean class"""

    @model_validator(mode="before")
    @classmethod
    def _fill_defaults(cls, values: Any) -> Any:
        """Fill in what the distillation loss implies, once it is known."""
        name = values.get("distillation") if isinstance(values, dict) else ()
        if not isinstance(name, str | None) or (name is None and values.get("distil") != "labels"):
            return values
        second_term = name != "none" or values.get("distil") == "labels"
        # with features alone the second token learns the labels, as the first does
        own = values.get("label_weight") if name == "features" else None
        implied = {
            "temperature": TEMPERATURES.get(name or ""),
            "label_weight": 0.5 if second_term else 1.0,
            "teacher_weight": (TEACHER_WEIGHTS.get(name or "", 0.5) if own is None else own) if second_term else None,
            "feature_weight": FEATURE_WEIGHT if name == "features" else 0.0,
            # a class head that no label teaches would stay random, and spoil the fused prediction
            "distil": "both" if second_term and name != "features" and values.get("label_weight") == 0 else "token",
        }
        return {**values, **{key: value for key, value in implied.items() if values.get(key) is None}}

    @model_validator(mode="after")
    def _check(self) -> LossConfig:
        if self.label_loss == "bce" and self.label_smoothing > 0:
            smoothed = f"with bce {self.label_smoothing:g} would mark every class as right"
            raise ValueError(f"label_smoothing: {smoothed}: give --label-smoothing 0")
        if self.label_loss == "bce" and self.class_weights != "none":
            raise ValueError("class_weights: are for cross-entropy: give --oversample, or label_loss ce")
        if self.distillation == "features" and self.feature_weight == 0:
            raise ValueError("feature_weight: 0 leaves nothing to learn from a teacher: give --distillation none")
        if self.distil == "both" and self.distillation == "features":
            raise ValueError("distil: both: features are learned from the distillation token alone: leave out --distil")
        if self.feature_weight and (self.distillation == "none" or self.distil == "labels"):
            raise ValueError("feature_weight: nothing is learned from a teacher: give --distillation features")
        return self

    @property
    def has_distill_term(self) -> bool:
        """Whether there is a second term beside the label loss: to a teacher, or to the labels again."""
        return self.distillation not in (None, "none") or self.distil == "labels"

    @property
    def learns_from_teacher(self) -> bool:
        return self.distillation != "none" and self.distil != "labels"

    @property
    def trains_heads(self) -> bool:
        """Whether any head learns anything; not so where a teacher's features alone are learned."""
        return bool(self.label_weight or self.teacher_weight) or self.distillation != "features"

    @property
    def second_token_learns_labels(self) -> bool:
        """Whether the distillation head learns the labels, because no teacher's logits are learned."""
        return self.distil == "labels" or self.distillation == "features"

    @property
    def needs_logits(self) -> bool:
        """Whether this loss needs the teacher's logits, not only its hard labels."""
        return self.distillation not in (None, "none", "hard", "features")


class OptimConfig(Config):
    optimizer: Literal["adamw", "muon", "lamb"] = "adamw"
    """adamw, muon or lamb; muon trains matrices and 3x3 kernels, AdamW the rest"""
    base_lr: Positive = 5e-4
    """peak learning rate for a batch of 256 images; scaled with the batch size"""
    min_lr: MinLr = "2%"
    """learning rate at the end: a percentage of the peak (2%), or a rate whatever the batch size (1e-5)"""
    warmup_lr: NonNegative | None = None
    """learning rate of the first step, whatever the batch size; the warm-up starts near 0 if not given"""
    warmup: Warmup = "5%"
    """steps in which the learning rate rises: 5%, 3ep or 100st"""
    weight_decay: NonNegative = 0.05
    """not applied to biases, norms, tokens and positions"""
    layer_decay: Annotated[float, Field(gt=0, le=1)] = 1.0
    """fine-tuning: learning rate of a block relative to the next one's"""
    trainable: Annotated[str, Field(pattern=r"^(all|attention|last-\d{1,4})$")] = "all"
    """fine-tuning: all, attention (of every block) or last-N (blocks); heads and distillation token always train"""
    max_grad_norm: Positive | None = None
    """clip gradients to this norm, of all weights together; no clipping if not given"""
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = 0.999
    """exponential moving average (EMA) of the weights; the EMA is evaluated and kept; 0 turns it off"""

    def lowest_lr(self, peak: float) -> float:
        """Learning rate at the end of a schedule with this peak."""
        return peak * (float(self.min_lr[:-1]) / 100) if isinstance(self.min_lr, str) else self.min_lr


class LoopConfig(Config):
    length: Length = "30ep"
    """how long to train: 30ep (or --epochs 30), 500st (--steps 500) or 20min (--budget-minutes 20)"""
    batch_size: Annotated[int, Field(gt=0, le=10**6)] = 128
    """images per step, over all processes; auto: what the recipe has, halved until a step fits into memory"""
    shrink_batch: bool = False
    """what --batch-size auto sets"""
    seed: Seed = 0
    """seed of initial weights, order and stochastic depth"""
    workers: Workers = 2
    """data-loading workers; their number does not affect the result"""
    processes: Annotated[int, Field(gt=0, le=1024)] = 1
    """processes on this machine, one per GPU"""
    precision: Precision = "auto"
    """auto, float32, bfloat16 or float16; auto = bfloat16 where the hardware supports it, else float32"""
    compile: bool = False
    """compile the network (torch.compile)"""
    deterministic: bool = False
    """same bits on GPUs; slower"""
    keep: Literal["last", "best"] | None = None
    """weights that become the model: last, or those with the best validation accuracy; best if not given beside --patience"""
    patience: Count | None = None
    """early stopping: end after so many evaluations without a better validation accuracy; never if not given"""
    track: Tracker | None = None
    """also send the metrics to trackio, tensorboard, wandb or mlflow"""

    def amount(self, unit: Literal["ep", "st", "min"]) -> float | None:
        """The length in this unit; None where it is given in another one."""
        amount, own = parse_length(self.length)
        return amount if own == unit else None

    @property
    def keeps_best(self) -> bool:
        return self.keep == "best" or (self.keep is None and self.patience is not None)

    @property
    def steps(self) -> int | None:
        """Optimizer steps, where the length is given in them."""
        amount = self.amount("st")
        return None if amount is None else int(amount)


class JobConfig(Config):
    """What every training has."""

    data: DataConfig = DataConfig()
    view: ViewConfig = AUGMENT_PRESETS["light"]
    optim: OptimConfig = OptimConfig()
    loop: LoopConfig = LoopConfig()

    def changed(self, **sections: Mapping[str, Any]) -> Self:
        """These settings with others in some sections, which nobody checks: `config.changed(view={"views": 3})`."""
        return self.model_copy(
            update={name: getattr(self, name).model_copy(update=dict(changes)) for name, changes in sections.items()}
        )

    @property
    def peak_lr(self) -> float:
        """Learning rate after the warm-up."""
        return self.optim.base_lr * self.loop.batch_size / 256

    @model_validator(mode="after")
    def _check_schedule(self) -> JobConfig:
        for name in ("warmup_lr", "min_lr"):
            rate = getattr(self.optim, name)
            if isinstance(rate, float) and rate > self.peak_lr * (1 + 1e-9):
                raise ValueError(
                    f"{name}: {rate:g} is above the peak, {self.peak_lr:g} for batches of {self.loop.batch_size}: "
                    f"give a lower one, or a larger --batch-size or --lr"
                )
        for unit in ("ep", "st"):
            length, own = parse_length(self.loop.length)
            warmup, of = parse_length(self.optim.warmup, ("ep", "st", "%"))
            if own == of == unit and warmup >= length:
                all_of_it = f"{self.optim.warmup} is all of the training, {self.loop.length}"
                raise ValueError(f"warmup: {all_of_it}: give less, such as 5%")
        return self


JobT = TypeVar("JobT", bound=JobConfig)


class StudentOptimConfig(OptimConfig):
    """What suits a small student with new weights."""

    optimizer: Literal["adamw", "muon", "lamb"] = "muon"
    """muon, adamw or lamb; muon trains matrices and 3x3 kernels, AdamW the rest; adamw if not given beside --init"""
    base_lr: Positive = 2.4e-2
    """peak learning rate for a batch of 256 images; scaled with the batch size; 0.0005 if not given beside --init, adamw or lamb"""
    weight_decay: NonNegative = 0.5
    """not applied to biases, norms, tokens and positions; 0.05 if not given beside --init, adamw or lamb"""


class RunConfig(JobConfig):
    """One run of `deit train`."""

    student: StudentConfig = StudentConfig()
    teacher: TeacherConfig = TeacherConfig()
    loss: LossConfig = LossConfig()
    optim: StudentOptimConfig = StudentOptimConfig()
    loop: LoopConfig = LoopConfig(batch_size=64)

    @model_validator(mode="after")
    def _check(self) -> RunConfig:
        loss, has_teacher = self.loss, self.teacher.present
        distilled = loss.distillation not in (None, "none")
        if self.student.init == REQUIRED:
            raise ValueError("init: this recipe goes on from pretrained weights: give --init")
        if loss.distil == "labels" and (distilled or has_teacher):
            raise ValueError("distil: labels needs no teacher and no --distillation: leave them out")
        if distilled and not has_teacher:
            advice = "give --teacher, or --distillation none"
            raise ValueError(f"distillation: {loss.distillation!r} needs a teacher: {advice}")
        if loss.distillation == "none" and has_teacher:
            raise ValueError("distillation: 'none' uses no teacher: leave out one of the two")
        if self.teacher.teacher_size is not None and not has_teacher:
            raise ValueError("teacher_size: there is no teacher: give --teacher")
        if loss.distil in ("cls", "both") and not has_teacher:
            raise ValueError(f"distil: {loss.distil} needs a teacher: give --teacher")
        nothing = loss.teacher_weight == 0 and not loss.feature_weight
        if loss.label_weight == 0 and (nothing or not (has_teacher or loss.has_distill_term)):
            advice = "give a --label-weight or a --teacher-weight above 0"
            raise ValueError(f"label_weight: nothing is learned with weight 0: {advice}")
        if self.optim.trainable != "all" and self.student.is_fresh:
            raise ValueError(f"trainable: {self.optim.trainable} would keep random weights: give --init")
        return self


class FitOptimConfig(OptimConfig):
    optimizer: Literal["adamw", "muon"] = "adamw"
    """adamw, or muon (the default for --from-scratch)"""
    base_lr: Positive = 2e-3
    """peak learning rate for a batch of 256 images; scaled with the batch size; if not given 0.0001 pretrained, 0.024 new with muon"""


class FitLoopConfig(LoopConfig):
    length: Length = "10ep"
    """how long to train: 10ep (or --epochs 10), 500st (--steps 500) or 20min (--budget-minutes 20)"""
    batch_size: Annotated[int, Field(gt=0, le=10**6)] = 128
    """images per step, over all processes; if not given 32 pretrained, 64 new with muon"""


class FitConfig(JobConfig):
    """One run of `deit teacher fit`: the same loop with a convolutional network."""

    model: str = "cifar-resnet20"
    """cifar-resnetN, a timm name, torchvision:NAME, or lite0 (if not given for photos)"""
    from_scratch: bool = False
    """random initial weights instead of pretrained ones"""
    image_size: Pixels | None = None
    """pixels of the network's (square) input; the network's own, or from the data"""
    fine_tune_minutes: Annotated[float, Field(ge=0, le=1e6)] = 3.0
    """pretrained: fine-tune the probed network if that takes at most so many minutes; 0: leave it at the probe"""
    optim: FitOptimConfig = FitOptimConfig()
    loop: FitLoopConfig = FitLoopConfig()
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """smoothing of the labels"""
    class_weights: ClassWeights = "none"
    """none, or balanced: the loss of an image counts as much as its class is rarer than the mean class"""

    @model_validator(mode="after")
    def _check(self) -> FitConfig:
        if self.data.unlabelled:
            raise ValueError("unlabelled: a convolutional network is fitted to labels: leave it out")
        if self.data.oversample:
            raise ValueError("oversample: is for students: give --class-weights balanced")
        if self.optim.optimizer == "muon" and not self.from_scratch:
            raise ValueError("optimizer: muon is for training from scratch: give --from-scratch")
        for name in ("layer_decay", "trainable"):
            if getattr(self.optim, name) != OptimConfig.model_fields[name].default:
                raise ValueError(f"{name}: is for a transformer's blocks: leave it out")
        return self
