"""The teacher: frozen, indifferent to batches, never of other classes than the data."""

from __future__ import annotations

import io
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from deitkit.config import Preprocessing
from deitkit.distill.teacher import (
    Teacher,
    accuracy_line,
    doubt_about,
    live_teacher,
    load_teacher,
    match_classes,
    refuse_useless,
    teacher_facts,
    teacher_from_callable,
    why_useless,
)
from deitkit.models import zoo
from deitkit.models.cnn import CifarResNet, CNNConfig, build_cnn
from deitkit.models.network import Ensemble, Heads, Network, ensemble, single_logits
from deitkit.models.vit import ViTConfig
from deitkit.models.zoo import ModelCard
from deitkit.terminal import PlainProgress, UserError
from deitkit.training.teaching import say_accuracy
from deitkit.views.mixup import Batch

TEN = tuple("0123456789")
RAW = Preprocessing(image_size=(16, 16), mean=(0.0,) * 3, std=(1.0,) * 3)


def teacher_of(name: str, size: int, *, classes: int = 10, pretrained: bool = False, chunk_size: int = 64) -> Teacher:
    torch.manual_seed(1)
    network = build_cnn(CNNConfig(name=name, classes=classes), image_size=(size, size), pretrained=pretrained)
    for module in network.modules():  # running statistics as if trained, so that activations keep their size
        if isinstance(module, nn.BatchNorm2d) and not pretrained:
            nn.init.uniform_(module.running_var, 0.5, 1.5)
            nn.init.normal_(module.running_mean, std=0.1)
    return Teacher(network, name=name, num_classes=classes, chunk_size=chunk_size)


@pytest.fixture
def small() -> Teacher:
    return teacher_of("cifar-resnet8", 16, chunk_size=8)


# ------------------------------------------------------------------ logits do not depend on batches


@pytest.mark.parametrize(
    ("name", "size", "classes", "pretrained"),
    [
        ("cifar-resnet20", 16, 10, False),
        pytest.param("resnet50", 64, 10, False, marks=pytest.mark.slow),
        ("resnet50", 32, 1000, False),
        ("lite0", 48, 1000, True),
        ("deit_tiny_patch16_224", 32, 1000, False),
    ],
)
def test_logits_have_the_same_bits_in_any_batch_and_place(name: str, size: int, classes: int, pretrained: bool) -> None:
    teacher = teacher_of(name, size, classes=classes, pretrained=pretrained)
    images = torch.rand(130, 3, 24, 24, generator=torch.Generator().manual_seed(0))
    at_once = teacher.forward(images)
    assert at_once.isfinite().all()
    assert at_once.unique(dim=0).shape[0] == 130
    for number in (0, 63, 64, 129):
        assert torch.equal(teacher.forward(images[number : number + 1])[0], at_once[number])
    assert torch.equal(teacher.forward(images[60:67]), at_once[60:67])
    assert torch.equal(teacher.forward(images[1:65]), at_once[1:65])
    order = torch.randperm(64, generator=torch.Generator().manual_seed(0))
    assert torch.equal(teacher.forward(images[:64][order]), at_once[:64][order])
    assert torch.equal(teacher.forward(images[:64].to(memory_format=torch.channels_last)), at_once[:64])


@pytest.mark.parametrize("chunk_size", [1, 5, 7, 11])
def test_odd_chunk_sizes_do_not_let_the_place_change_bits(chunk_size: int) -> None:
    """Products of 5-7 and 9-11 rows compute their last rows differently: chunks are filled up to a multiple of eight."""
    teacher = teacher_of("lite0", 32, classes=1000, pretrained=True, chunk_size=chunk_size)
    image = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    logits = teacher.forward(image.expand(12, -1, -1, -1))
    assert torch.equal(logits, logits[:1].expand(12, -1))


def test_no_images_get_no_logits(small: Teacher) -> None:
    assert small.forward(torch.rand(0, 3, 16, 16)).shape == (0, 10)


def test_views_of_any_size_and_colour_are_prepared_as_the_teacher_wants_them() -> None:
    seen: list[torch.Tensor] = []

    def look(images: torch.Tensor) -> torch.Tensor:
        seen.append(images)
        return images.mean((2, 3))

    preprocessing = Preprocessing(image_size=(6, 4), mean=(0.5, 0.25, 0.0), std=(0.5, 0.25, 2.0))
    teacher = teacher_from_callable(look, name="look", num_classes=3, preprocessing=preprocessing, chunk_size=8)
    logits = teacher.forward(torch.ones(2, 1, 9, 5))
    assert seen[0].shape == (8, 3, 6, 4)
    torch.testing.assert_close(logits, torch.tensor([[1.0, 3.0, 0.5]]).expand(2, 3))
    with pytest.raises(ValueError, match="floating-point"):
        teacher.forward(torch.ones(2, 3, 6, 4, dtype=torch.uint8))


# ------------------------------------------------------------------ frozen


def test_a_teacher_is_no_module_so_a_student_cannot_contain_it(small: Teacher) -> None:
    student = nn.Linear(2, 2)
    student.teacher = small  # type: ignore[assignment]
    student.train()
    assert not isinstance(small, nn.Module)
    assert set(student.state_dict()) == {"weight", "bias"}
    assert len(list(student.parameters())) == 2
    assert not any(module.training for module in (*small._network.modules(), *small._folded.modules()))


def test_teacher_batchnorm_does_not_move_whoever_calls_train(small: Teacher) -> None:
    images = torch.rand(9, 3, 16, 16)
    before, logits = small.state_hash(), small.forward(images)
    computing = {name: tensor.clone() for name, tensor in small._folded.state_dict().items()}
    for network in (small._network, small._folded):
        network.train()
        network.requires_grad_(True)
    again = small.forward(images)
    assert torch.equal(again, logits)
    assert small.state_hash() == before
    assert all(torch.equal(tensor, computing[name]) for name, tensor in small._folded.state_dict().items())
    assert not again.requires_grad
    for network in (small._network, small._folded):
        assert not any(parameter.requires_grad for parameter in network.parameters())


def test_batch_norms_are_folded_for_speed_and_the_logits_are_the_network_s(small: Teacher) -> None:
    """To float32's accuracy; the state hash is that of the weights as they were given."""
    images = torch.rand(5, 3, 16, 16)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in small._folded.modules())
    assert any(isinstance(module, nn.BatchNorm2d) for module in small._network.modules())
    torch.testing.assert_close(small.forward(images), small._network(images).cls_BK.detach(), rtol=1e-4, atol=1e-4)
    vit = teacher_from_callable(
        nn.Sequential(nn.Flatten(), nn.Linear(768, 3)), name="x", num_classes=3, preprocessing=RAW
    )
    assert vit._folded is vit._network


def test_a_module_of_any_kind_is_a_teacher_and_what_cannot_be_counted_is_left_out() -> None:
    class Means(nn.Module):
        """No parameters, and a tensor that does not move with it."""

        def __init__(self) -> None:
            super().__init__()
            self.means = torch.rand(3, 768)

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            assert len(images) == 8
            return images.flatten(1) @ self.means.T

    class Strange(nn.Module):
        """A batch norm without statistics, and a classifier of every position."""

        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, track_running_stats=False)
            self.linear = nn.Linear(4, 3)

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return self.linear(self.norm(self.conv(images)).permute(0, 2, 3, 1)).mean((1, 2))

    for body, counted in ((Means(), False), (Strange(), True)):
        teacher = teacher_from_callable(body, name="any", num_classes=3, preprocessing=RAW, chunk_size=8)
        assert teacher.forward(torch.rand(5, 3, 16, 16)).shape == (5, 3)
        facts, seconds = teacher.costs()
        assert ("params" in facts) == counted
        assert seconds > 0


def test_forward_neither_draws_random_numbers_nor_reseeds() -> None:
    """Also where its network has dropout, and somebody called `train()`."""
    body = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(3 * 16 * 16, 3), nn.Dropout(0.5))
    teacher = teacher_from_callable(body, name="dropout", num_classes=3, preprocessing=RAW, chunk_size=8)
    teacher._network.train()
    before = torch.get_rng_state(), np.random.get_state()[1].tobytes()
    first = teacher.forward(torch.zeros(3, 3, 16, 16))
    teacher.state_hash()
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.random.get_state()[1].tobytes() == before[1]
    assert torch.equal(teacher.forward(torch.zeros(3, 3, 16, 16)), first)


def test_state_hash_sees_weights_buffers_names_and_types_but_not_layout(small: Teacher) -> None:
    original = small.state_hash()
    small._network.to(memory_format=torch.contiguous_format)
    assert small.state_hash() == original
    body = small._network.body
    assert isinstance(body, CifarResNet)
    for tensor in (body.linear.bias, body.bn1.running_mean, body.bn1.num_batches_tracked):
        with torch.no_grad():
            tensor += 1
            assert small.state_hash() != original
            tensor -= 1
    body.bn1.running_mean.zero_()
    hashed = small.state_hash()
    body.bn1.running_mean = body.bn1.running_mean.double()
    assert small.state_hash() != hashed


def test_a_loss_may_keep_the_logits_for_its_backward_pass(small: Teacher) -> None:
    student = torch.zeros(3, 10, requires_grad=True)
    (student.log_softmax(-1) * small.forward(torch.rand(3, 3, 16, 16)).softmax(-1)).sum().backward()
    assert student.grad is not None
    assert student.grad.abs().sum() > 0


# ------------------------------------------------------------------ classes


def test_resnet50_with_a_new_last_layer_has_ten_classes() -> None:
    teacher = teacher_of("resnet50", 32, classes=10, chunk_size=8)
    assert teacher.forward(torch.rand(3, 1, 28, 28)).shape == (3, 10)


def test_a_teacher_of_other_classes_is_refused_with_both_counts_and_what_to_do() -> None:
    for name in ("lite0", "resnet50", "torchvision:resnet50"):
        with pytest.raises(UserError, match=f"{name} knows 1000 classes, the data have 10: .*deit teacher fit"):
            load_teacher(name, TEN)


def test_a_random_network_is_never_a_teacher() -> None:
    with pytest.raises(UserError, match=r"no pretrained weights with a classifier.*deit teacher fit"):
        load_teacher("cifar-resnet20", TEN)


def test_other_class_names_are_refused_naming_the_first_that_differ() -> None:
    with pytest.raises(UserError, match="does not know the data's class 'owl', the data lack its class 'cat'"):
        match_classes("T", ("ant", "cat", "dog"), 3, ("ant", "owl", "dog"))
    assert match_classes("T", None, 3, ("ant", "owl", "dog")) is None
    assert match_classes("T", ("ant", "owl"), 2, ("ant", "owl")) is None


def test_imagenet_data_in_another_order_are_put_in_order() -> None:
    import timm.data

    names = tuple(timm.data.ImageNetInfo("imagenet-1k").label_names())
    straight, turned = load_teacher("lite0", names, chunk_size=8), load_teacher("lite0", names[::-1], chunk_size=8)
    images = torch.rand(2, 3, 224, 224)
    assert torch.equal(straight.forward(images), turned.forward(images).flip(1))
    with pytest.raises(UserError, match="does not know the data's class 'n99999999'"):
        load_teacher("lite0", ("n99999999", *names[1:]))


def test_published_cifar_weights_are_a_teacher(shared_data: Path) -> None:
    file = shared_data / "cifar10-resnet" / "resnet20.safetensors"
    teacher = load_teacher(f"cifar-resnet20@{file}", TEN)
    assert (teacher.num_classes, teacher.classes, teacher.preprocessing.image_size) == (10, None, (32, 32))
    with pytest.raises(UserError, match="knows 10 classes, the data have 7"):
        load_teacher(f"cifar-resnet20@{file}", TEN[:7])


# ------------------------------------------------------------------ run folders


@pytest.fixture
def run(tmp_path: Path) -> Path:
    network = build_cnn(CNNConfig(name="cifar-resnet8", classes=3), image_size=(12, 12), pretrained=False)
    card = ModelCard(
        name="cifar-resnet8",
        architecture=CNNConfig(name="cifar-resnet8", classes=3),
        classes=("ant", "cat", "dog"),
        preprocessing=network.preprocessing,
    )
    zoo.save_model(tmp_path / "run" / "model", network, card)
    return tmp_path / "run"


def test_a_fitted_run_is_a_teacher_and_its_classes_follow_the_datas_order(run: Path) -> None:
    straight, turned = load_teacher(str(run), ("ant", "cat", "dog")), load_teacher(str(run), ("dog", "ant", "cat"))
    images = torch.rand(5, 3, 12, 12)
    assert torch.equal(turned.forward(images), straight.forward(images)[:, [2, 0, 1]])
    assert turned.classes == ("dog", "ant", "cat")
    assert turned.state_hash() == straight.state_hash()
    assert turned.describe() != straight.describe()
    with pytest.raises(UserError, match="does not know the data's class 'owl'"):
        load_teacher(str(run), ("ant", "cat", "owl"))


def test_a_student_run_gives_its_fused_prediction(tmp_path: Path) -> None:
    config = ViTConfig(image_size=(8, 8), patch_size=(4, 4), width=8, depth=1, heads=2, classes=4)
    card = ModelCard(
        name="student",
        architecture=config,
        classes=TEN[:4],
        preprocessing=Preprocessing(image_size=(8, 8), mean=(0.5,) * 3, std=(0.5,) * 3),
    )
    network = zoo.build(card).eval()
    with torch.no_grad():
        for parameter in network.parameters():  # two heads that differ
            parameter += torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel()))
    zoo.save_model(tmp_path / "model", network, card)
    images = torch.rand(3, 3, 8, 8)
    heads = network(images)
    assert heads.dist_BK is not None
    expected = (heads.cls_BK.softmax(-1) + heads.dist_BK.softmax(-1)) / 2
    logits = load_teacher(str(tmp_path), TEN[:4], chunk_size=8).forward(images)
    torch.testing.assert_close(logits.exp(), expected)


# ------------------------------------------------------------------ the size of what it sees


def resized_by_hand(images: torch.Tensor, size: int, preprocessing: Preprocessing) -> torch.Tensor:
    """Images as a network wants them, at another size."""
    resized = F.interpolate(images, (size, size), mode=preprocessing.interpolation, antialias=True).clamp(0, 1)
    mean, std = (torch.tensor(values)[:, None, None] for values in (preprocessing.mean, preprocessing.std))
    return (resized - mean) / std


@pytest.mark.parametrize("size", [7, 20])
def test_a_run_sees_images_of_the_size_that_it_is_given(run: Path, size: int) -> None:
    """Its weights are the same, its logits are those of images resized by hand, and `describe` differs."""
    own = load_teacher(str(run), ("ant", "cat", "dog"))
    other = load_teacher(str(run), ("ant", "cat", "dog"), image_size=(size, size))
    images = torch.rand(5, 3, 12, 12, generator=torch.Generator().manual_seed(0))
    seen: list[tuple[int, ...]] = []
    other._folded.body.register_forward_pre_hook(lambda _, inputs: seen.append(tuple(inputs[0].shape[1:])))
    logits = other.forward(images)
    assert seen == [(3, size, size)]
    network, _ = zoo.load_model(run / "model")
    with torch.no_grad():
        expected = network.body(resized_by_hand(images, size, network.preprocessing))
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(logits, own.forward(images), atol=1e-3)
    assert other.state_hash() == own.state_hash()
    differing = {key for key, value in other.describe().items() if value != own.describe()[key]}
    assert differing == {"preprocessing"}
    assert load_teacher(str(run), ("ant", "cat", "dog"), image_size=(12, 12)).describe() == own.describe()


@pytest.mark.parametrize("size", [96, 256])
def test_a_published_network_sees_images_of_the_size_that_it_is_given(size: int) -> None:
    thousand = tuple(map(str, range(1000)))
    own, other = load_teacher("lite0", thousand), load_teacher("lite0", thousand, image_size=(size, size))
    images = torch.rand(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    network = build_cnn(CNNConfig(name="lite0", classes=1000), image_size=None, pretrained=True).eval()
    with torch.no_grad():
        expected = network.body(resized_by_hand(images, size, network.preprocessing))
    torch.testing.assert_close(other.forward(images), expected, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(own.forward(images), expected, atol=1e-2)
    assert (own.preprocessing.image_size, other.preprocessing.image_size) == ((224, 224), (size, size))


def test_weights_in_a_file_see_images_of_the_size_that_they_are_given(run: Path) -> None:
    file = f"cifar-resnet8@{run / 'model' / 'model.safetensors'}"
    other = load_teacher(file, ("a", "b", "c"), image_size=(20, 20))
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    network = build_cnn(CNNConfig(name=file, classes=3), image_size=None, pretrained=True).eval()
    with torch.no_grad():
        expected = network.body(resized_by_hand(images, 20, network.preprocessing))
    torch.testing.assert_close(other.forward(images), expected, atol=1e-5, rtol=1e-5)


def saved_transformer(folder: Path, image_size: tuple[int, int]) -> Path:
    config = ViTConfig(image_size=image_size, patch_size=(4, 4), width=8, depth=1, heads=2, classes=3)
    card = ModelCard(
        name="student",
        architecture=config,
        classes=("ant", "cat", "dog"),
        preprocessing=Preprocessing(image_size=image_size, mean=(0.5,) * 3, std=(0.5,) * 3),
    )
    zoo.save_model(folder / "model", zoo.build(card), card)
    return folder


@pytest.mark.parametrize(("own", "hint"), [((8, 8), "give --teacher-size 8"), ((8, 16), "leave out --teacher-size")])
def test_a_transformer_run_is_refused_at_another_size_than_its_positions_are_of(
    tmp_path: Path, own: tuple[int, int], hint: str
) -> None:
    folder = str(saved_transformer(tmp_path, own))
    assert load_teacher(folder, ("ant", "cat", "dog"), image_size=own).preprocessing.image_size == own
    with pytest.raises(UserError, match=rf"positions for images of 8x{own[1]} pixels, not 16x16: {hint}"):
        load_teacher(folder, ("ant", "cat", "dog"), image_size=(16, 16))


def test_a_run_that_cannot_take_a_size_is_refused_before_it_is_asked(tmp_path: Path) -> None:
    """A fitted network of timm whose positions are of one size, too."""
    architecture = CNNConfig(name="deit_tiny_patch16_224", classes=3)
    network = build_cnn(architecture, image_size=(32, 32), pretrained=False)
    card = ModelCard(
        name="fitted", architecture=architecture, classes=("ant", "cat", "dog"), preprocessing=network.preprocessing
    )
    zoo.save_model(tmp_path / "model", network, card)
    with pytest.raises(UserError, match=r"teacher .* cannot take images of 48x48 pixels: .*48"):
        load_teacher(str(tmp_path), ("ant", "cat", "dog"), image_size=(48, 48))


@pytest.mark.parametrize("name", [".", "runs/nowhere", "./resnet50"])
def test_a_path_without_a_run_is_refused(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"neither a network's name nor a run folder: .*model\.json is missing"):
        load_teacher(name, TEN)


# ------------------------------------------------------------------ callables


def test_a_callable_is_known_by_its_logits() -> None:
    def teacher(scale: float) -> Teacher:
        function = lambda images: scale * images.mean((2, 3))  # noqa: E731
        return teacher_from_callable(function, name="mean", num_classes=3, preprocessing=RAW)

    assert teacher(1).state_hash() == teacher(1).state_hash()
    assert teacher(1).state_hash() != teacher(2).state_hash()


def test_averaged_teachers_are_known_by_the_hash_that_tapes_of_version_0_1_have() -> None:
    """Of what is not weights: these bodies have none."""
    networks = [
        Network(nn.Identity(), Preprocessing(image_size=(size, size), mean=(0.3,), std=(0.5,))) for size in (8, 12)
    ]
    body = ensemble(networks, [None, (2, 0, 1)]).body
    assert isinstance(body, Ensemble)
    assert body.config_hash() == "f5a59eee6b096972a07ea92b959b3f20621645275c46037649fe85f7a6a73c08"


def test_a_module_given_as_callable_is_copied_and_frozen() -> None:
    module = CifarResNet(8, 3)
    teacher = teacher_from_callable(module, name="mine", num_classes=3, preprocessing=RAW, chunk_size=8)
    before = teacher.state_hash()
    module(torch.rand(4, 3, 16, 16)).sum().backward()  # goes on training, and moves its own statistics
    assert module.training
    assert teacher.state_hash() == before
    assert teacher.forward(torch.rand(2, 3, 16, 16)).shape == (2, 3)


def test_logits_of_the_wrong_shape_are_refused() -> None:
    teacher = teacher_from_callable(lambda images: images, name="echo", num_classes=3, preprocessing=RAW)
    with pytest.raises(UserError, match=r"teacher echo: returned a tensor of shape \(64, 3, 16, 16\)"):
        teacher.forward(torch.rand(1, 3, 16, 16))


# ------------------------------------------------------------------ what it is worth


def test_ties_go_to_the_lowest_class() -> None:
    logits = torch.tensor([[1.0, 2.0, 2.0], [0.0, 0.0, 0.0]])
    teacher = teacher_from_callable(
        lambda _: logits.repeat(4, 1), name="ties", num_classes=3, preprocessing=RAW, chunk_size=8
    )
    batch = Batch(torch.rand(2, 3, 16, 16), *[torch.zeros(2, dtype=torch.long)] * 6)
    assert live_teacher(teacher, logits=False)(batch).labels_B.tolist() == [1, 0]


def test_two_heads_become_the_logarithm_of_their_mean_softmax_without_overflow() -> None:
    heads = Heads(torch.tensor([[1000.0, 0.0]]), torch.tensor([[0.0, 0.0]]))
    torch.testing.assert_close(single_logits(heads), torch.tensor([[math.log(0.75), math.log(0.25)]]))


def probabilities_by_pixel(images: torch.Tensor) -> torch.Tensor:
    """The first eight pixels of the first row and channel are the logits."""
    return images[:, 0, 0, :8]


def facts_of(logits: torch.Tensor, labels: torch.Tensor) -> dict[str, object]:
    teacher = teacher_from_callable(probabilities_by_pixel, name="T", num_classes=logits.shape[1], preprocessing=RAW)
    return teacher_facts(teacher, logits, labels)


def test_the_facts_count_what_is_right() -> None:
    logits = (torch.arange(8) / 8).expand(3, 8)  # class 7 first, then 6, 5, ...
    facts = facts_of(logits, torch.tensor([7, 3, 2]))
    assert (facts["n"], facts["top1"], facts["top5"]) == (3, 1 / 3, 2 / 3)
    assert facts["confidence"] == pytest.approx(logits[0].softmax(0).max().item())
    with pytest.raises(UserError, match="no image to check it on"):
        facts_of(logits[:0], torch.empty(0, dtype=torch.int64))


def test_what_cannot_teach_is_refused() -> None:
    labels = torch.arange(1000) % 10
    good = F.one_hot((labels + (torch.arange(1000) % 3 == 0)) % 10, 10).float()
    refuse_useless(facts_of(good, labels))
    assert doubt_about(facts_of(good, labels)) is None
    chance = F.one_hot(torch.arange(1000) // 10 % 10, 10).float()
    complaint = r"teacher T is no better than .* class, 10.0 % accuracy on 1,000 images \(chance 10.0 %, largest class 10.0 %\): give"
    with pytest.raises(UserError, match=complaint):
        refuse_useless(facts_of(chance, labels))
    broken = good.clone()
    broken[17, 3] = torch.nan
    with pytest.raises(UserError, match="1 of 1,000 images have infinite or NaN logits"):
        refuse_useless(facts_of(broken, labels))
    unbalanced = (torch.arange(1000) % 4 == 0).long()
    constant = torch.tensor([1.0, 0.0]).expand(1000, 2)
    with pytest.raises(UserError, match=r"predicts the same class for every image, 75.0 % accuracy on 1,000 images"):
        refuse_useless(facts_of(constant, unbalanced))


def test_a_teacher_is_measured_against_the_largest_class_not_against_chance() -> None:
    """75 of 100 images are of one class: 70 % are far above chance, and less than a constant gets; 76 % are more."""
    labels = (torch.arange(100) % 4 == 0).long()
    for wrong, refused in ((30, True), (25, True), (24, False)):
        facts = facts_of(F.one_hot((labels + (torch.arange(100) < wrong)) % 2, 2).float(), labels)
        assert (facts["top1"], facts["largest_class"]) == (1 - wrong / 100, 0.75)
        if refused:
            with pytest.raises(UserError, match="no better than predicting the largest class"):
                refuse_useless(facts)
        else:
            refuse_useless(facts)


def test_a_perfect_teacher_of_images_of_one_class_is_not_refused() -> None:
    labels = torch.ones(50, dtype=torch.long)
    refuse_useless(facts_of(F.one_hot(labels, 3).float(), labels))


@pytest.mark.parametrize(("right", "n"), [(0, 3), (1, 2), (4, 6), (6, 6), (9, 19)])
def test_a_few_images_are_doubted_not_refused(right: int, n: int) -> None:
    facts = {"name": "T", "n": n, "classes": 2, "top1": right / n, "largest_class": 0.6, "predicted_classes": 1}
    refuse_useless(facts)
    doubt = doubt_about(facts)
    assert doubt is not None
    assert (
        f"teacher T: too few images to be sure that it can teach, {100 * right / n:.1f} % accuracy on {n} images"
        in doubt
    )
    assert doubt_about({**facts, "cross_validated": True}) is None
    with pytest.raises(UserError, match=f"1 of {n} images have infinite or NaN logits"):
        refuse_useless({**facts, "non_finite": 1})


@pytest.mark.parametrize(("right", "refused"), [(12, True), (13, False)])
def test_twenty_images_are_enough(right: int, refused: bool) -> None:
    facts = {"name": "T", "n": 20, "classes": 2, "top1": right / 20, "largest_class": 0.6, "predicted_classes": 2}
    assert doubt_about(facts) is None
    assert (why_useless(facts) is not None) == refused


def test_accuracy_is_one_line_with_what_it_is_to_be_compared_with() -> None:
    facts = {"n": 341, "top1": 0.41056, "largest_class": 0.2101, "dtype": "float32"}
    assert accuracy_line("X", facts) == "teacher X: 41.1 % validation accuracy (341 images; largest class 21.0 %)"
    half = {**facts, "n": 5000, "dtype": "bfloat16"}
    assert (
        accuracy_line("X", half)
        == "teacher X: 41.1 % validation accuracy in bfloat16 (5,000 images; largest class 21.0 %)"
    )
    assert (
        accuracy_line("X", {"n": 1, "top1": 1.0}) == "teacher X: 100.0 % validation accuracy (1 image)"
    )  # of an old tape


@pytest.mark.parametrize("name", ["", "auto"])
def test_a_name_that_stands_for_no_network_is_refused(name: str) -> None:
    with pytest.raises(UserError, match="give a network's name"):
        load_teacher(name, ("a", "b"))


def test_a_file_of_weights_must_be_named() -> None:
    with pytest.raises(UserError, match="cifar-resnet56@: the file of weights is missing"):
        load_teacher("cifar-resnet56@", ("a", "b"))


def test_a_teacher_can_be_saved_with_a_checkpoint_by_nobody(small: Teacher) -> None:
    student = Network(CifarResNet(8, 10), small.preprocessing)
    student.helper = small  # type: ignore[assignment]
    stream = io.BytesIO()
    torch.save(student.state_dict(), stream)
    assert not any("helper" in key for key in student.state_dict())


@pytest.mark.parametrize(("top1", "said"), [(0.9949, False), (0.995, True)])
def test_a_published_teacher_that_knows_the_validation_images_is_doubted_a_fitted_one_is_not(
    cnn: Path, top1: float, said: bool
) -> None:
    for name, doubted in [
        ("resnet18", said),
        (f"{cnn}+resnet18@x.pth", said),
        (str(cnn), False),
        (f"{cnn} (taped)", False),
        ("gone/c++/run", said),
    ]:
        heard = io.StringIO()
        say_accuracy(name, {"top1": top1, "n": 1000}, "float32", PlainProgress(messages=heard))
        assert ("if it was trained on these images" in heard.getvalue()) == doubted, name
