import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional

from engine.distillation import DistillationLoss, DistillationTargets, Teacher
from engine.optim import build_criterion, build_optimizer, build_scaler
from engine.step import mix_batches, train_step
from tests.conftest import CONFIGS
from tests.runs import LinearClassifier
from utils.config.loading import load_config

CPU = torch.device("cpu")
LOGITS = torch.tensor([[2.0, -1.0, 0.5], [0.3, 0.1, -0.7]])
TEACHER_LOGITS = torch.tensor([[1.0, 3.0, -2.0], [0.2, -0.4, 0.9]])
TARGETS = torch.tensor([0, 2])
PREPROCESSING = {"mean": [0.5] * 3, "std": [0.25] * 3, "student_mean": [0.4, 0.5, 0.6], "student_std": [0.2, 0.25, 0.5]}


def build_config(*opts):
    return load_config(CONFIGS / "flatten_swin_t.yaml", ["TRAIN.TEACHER", "timm:any", "MODEL.NUM_CLASSES", 3, *opts])


def softmax(values):
    exponentials = [math.exp(value) for value in values]
    return [value / sum(exponentials) for value in exponentials]


def compute_by_hand(kind: str, temperature: float) -> float:
    """Mean over the images of eq. 2 (the divergence) or eq. 3 (the cross entropy with the teacher's class) of DeiT."""
    terms = []
    for student, teacher in zip(LOGITS.tolist(), TEACHER_LOGITS.tolist(), strict=True):
        if kind == "hard":
            terms.append(-math.log(softmax(student)[teacher.index(max(teacher))]))
        else:
            p, q = (softmax([value / temperature for value in values]) for values in (teacher, student))
            terms.append(temperature**2 * sum(a * math.log(a / b) for a, b in zip(p, q, strict=True)))
    return sum(terms) / len(terms)


@pytest.mark.parametrize(("kind", "temperature"), [("hard", 3.0), ("soft", 3.0), ("soft", 1.0)])
def test_the_losses_equal_the_definitions_of_deit_forward_and_backward(kind, temperature):
    opts = ["TRAIN.DISTILLATION.KIND", kind, "TRAIN.DISTILLATION.WEIGHT", 0.3, "MODEL.LABEL_SMOOTHING", 0]
    opts += ["TRAIN.DISTILLATION.TEMPERATURE", temperature] if kind == "soft" else []
    criterion, logits = build_criterion(build_config(*opts), mixed=False), LOGITS.clone().requires_grad_()
    loss, base, distillation = criterion(logits, DistillationTargets(TARGETS, TEACHER_LOGITS))
    assert distillation.item() == pytest.approx(compute_by_hand(kind, temperature), rel=1e-5)
    torch.testing.assert_close(base, functional.cross_entropy(LOGITS, TARGETS))
    torch.testing.assert_close(loss.detach(), 0.7 * base + 0.3 * distillation)
    loss.backward()
    student, teacher = LOGITS.div(temperature).softmax(1), TEACHER_LOGITS.div(temperature).softmax(1)
    expected = temperature * (student - teacher)
    if kind == "hard":
        expected = LOGITS.softmax(1) - functional.one_hot(TEACHER_LOGITS.argmax(1), 3)
    expected = 0.3 * expected + 0.7 * (LOGITS.softmax(1) - functional.one_hot(TARGETS, 3))
    torch.testing.assert_close(logits.grad, expected / 2)


def test_smoothing_and_class_weights_change_only_the_base_loss_of_any_kind():
    opts = ["TRAIN.CLASS_WEIGHTS", "[1.0, 2.0, 4.0]", "MODEL.LABEL_SMOOTHING", 0.2, "TRAIN.DISTILLATION.WEIGHT", 1]
    for loss in ("ce", "bce"):
        cfg = build_config(*opts, "TRAIN.LOSS", loss)
        total, base, distillation = build_criterion(cfg, mixed=False)(LOGITS, DistillationTargets(TARGETS, TEACHER_LOGITS))
        without_teacher = load_config(CONFIGS / "flatten_swin_t.yaml", ["MODEL.NUM_CLASSES", 3, *opts[:4], "TRAIN.LOSS", loss])
        torch.testing.assert_close(base, build_criterion(without_teacher, mixed=False)(LOGITS, TARGETS))
        assert total == distillation == pytest.approx(compute_by_hand("hard", 1), rel=1e-5)


def test_a_teacher_sees_the_images_with_its_own_normalisation_and_size_and_returns_the_class_order_of_the_data():
    class Pixels(nn.Module):
        def forward(self, images):
            assert images.shape[2:] == (6, 8)
            return images.mean(dim=(2, 3))

    pixels = torch.tensor([0.1, 0.5, 0.9]).view(1, 3, 1, 1).expand(2, 3, 12, 16)
    images = (pixels - torch.tensor([0.4, 0.5, 0.6]).view(3, 1, 1)) / torch.tensor([0.2, 0.25, 0.5]).view(3, 1, 1)
    teacher = Teacher(Pixels(), size=(6, 8), **PREPROCESSING, order=[2, 0, 1], amp_dtype=torch.float32, device=CPU)
    expected = torch.tensor([(0.9 - 0.5) / 0.25, (0.1 - 0.5) / 0.25, 0.0])
    torch.testing.assert_close(teacher(images), expected.expand(2, 3))


def test_a_teacher_is_in_evaluation_mode_gets_no_gradient_and_uses_the_precision_of_the_step():
    model = nn.Sequential(nn.Conv2d(3, 3, 8), nn.BatchNorm2d(3), nn.Flatten(), nn.Dropout(0.5), nn.Linear(3 * 25**2, 3)).train()
    same = {key: PREPROCESSING[key.removeprefix("student_")] for key in PREPROCESSING}
    teacher = Teacher(model, size=(32, 32), **same, amp_dtype=torch.bfloat16, device=CPU)
    images = torch.randn(2, 3, 32, 32)
    ((_, targets),) = mix_batches([SimpleNamespace(images=images, targets=TARGETS)], None, teacher, forward_pass=0)
    assert targets.teacher_logits.dtype == torch.float32
    assert not targets.teacher_logits.requires_grad
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(targets.teacher_logits, model.eval()(images).float(), rtol=0, atol=0)
    student = nn.Linear(3, 3)
    DistillationLoss(nn.CrossEntropyLoss(), kind="soft", weight=0.5, temperature=2.0)(
        student(LOGITS), DistillationTargets(TARGETS, targets.teacher_logits)
    )[0].backward()
    assert student.weight.grad is not None
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in model.parameters())


def test_an_update_reports_the_means_of_both_losses_over_its_forward_passes():
    cfg = build_config("TRAIN.OPTIMIZER.NAME", "sgd", "MODEL.LABEL_SMOOTHING", 0)
    torch.manual_seed(0)
    model, images = LinearClassifier(6, 3), torch.randn(4, 6)
    criterion, targets = build_criterion(cfg, mixed=False), TARGETS.repeat(2)
    logits, teacher_logits = model(images).detach(), torch.randn(4, 3)
    expected = criterion(logits, DistillationTargets(targets, teacher_logits))
    batches = [(images[part], DistillationTargets(targets[part], teacher_logits[part])) for part in (slice(0, 2), slice(2, 4))]
    options = {"seeds": range(2), "amp_dtype": torch.float32, "max_grad_norm": math.inf}
    report = train_step(model, criterion, build_optimizer(cfg, model), build_scaler(cfg, CPU), batches, **options)
    torch.testing.assert_close((report.loss, report.base_loss, report.distillation_loss), expected)
