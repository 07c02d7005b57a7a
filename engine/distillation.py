"""Knowledge distillation: a frozen teacher predicts the classes of each training image, and the model learns from its logits.

Source: DeiT (https://arxiv.org/abs/2012.12877), eq. 2 and 3, without its distillation token: one head learns from both.

Shapes: B images, C classes.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional


class DistillationTargets(NamedTuple):
    """What a model learns from one batch.

    Attributes:
        targets: (B,) class ids, or (B, C) probabilities after mixup.
        teacher_logits: (B, C), in float32.
    """

    targets: Tensor
    teacher_logits: Tensor


Targets = Tensor | DistillationTargets  # what a criterion compares with the logits


class DistillationLoss(nn.Module):
    """(1 - weight) * base loss + weight * distillation loss, both averaged over the images.

    The distillation loss is the cross entropy with the class that the teacher predicts (``hard``), or T**2 times the
    Kullback-Leibler divergence of the model's probabilities from the teacher's, both with logits divided by T (``soft``).

    Args:
        base: loss of logits and targets. Label smoothing and class weights are part of it, not of the distillation loss.
        kind: hard or soft.
        temperature: T.
    """

    def __init__(self, base: nn.Module, *, kind: str, weight: float, temperature: float):
        super().__init__()
        self.base = base
        self.kind = kind
        self.weight = weight
        self.temperature = temperature

    def forward(self, logits: Tensor, targets: DistillationTargets) -> tuple[Tensor, Tensor, Tensor]:
        """The loss, and for the log: base loss and distillation loss without weights and gradients. All are scalars."""
        base = self.base(logits, targets.targets)
        distillation = self.distill(logits.float(), targets.teacher_logits)
        loss = (1 - self.weight) * base + self.weight * distillation
        return loss, base.detach(), distillation.detach()

    def distill(self, logits: Tensor, teacher_logits: Tensor) -> Tensor:
        """The distillation loss of logits in float32."""
        if self.kind == "hard":
            return functional.cross_entropy(logits, teacher_logits.argmax(dim=1))
        log_probabilities, teacher_log_probabilities = (
            functional.log_softmax(values / self.temperature, dim=1) for values in (logits, teacher_logits)
        )
        divergence = functional.kl_div(log_probabilities, teacher_log_probabilities, reduction="batchmean", log_target=True)
        return divergence * self.temperature**2


class Teacher:
    """A frozen model in evaluation mode, which receives the training images as it was trained on them.

    The images are normalised with the teacher's mean and standard deviation, and resized (bicubic) to its input size.

    Args:
        model: maps images to logits; it is frozen and set to evaluation mode.
        size: height and width of the model's images.
        mean, std: of each channel, for the model's images.
        student_mean, student_std: the same for the images of ``__call__``.
        order: the model's class id of each class of the data; () if they are equal.
        amp_dtype: precision of the forward pass.
        device: device of the model.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        size: tuple[int, int],
        mean: Sequence[float],
        std: Sequence[float],
        student_mean: Sequence[float],
        student_std: Sequence[float],
        order: Sequence[int] = (),
        amp_dtype: torch.dtype,
        device: torch.device,
    ):
        self.model = model.requires_grad_(False).eval()
        self.size = size
        self.amp_dtype = amp_dtype
        self.order = torch.tensor(order, device=device) if order else None
        means, deviations, own_means, own_deviations = (
            torch.tensor(values, dtype=torch.float64).view(3, 1, 1) for values in (student_mean, student_std, mean, std)
        )
        scale, shift = deviations / own_deviations, (means - own_means) / own_deviations
        self.normalises = bool((scale != 1).any() or (shift != 0).any())
        self.scale, self.shift = (values.to(device, torch.float32) for values in (scale, shift))

    @torch.no_grad()  # not inference_mode: autograd saves the logits for the backward pass of the student
    def __call__(self, images: Tensor) -> Tensor:
        """Logits (B, C) in float32, by the class ids of the data. images: (B, 3, H, W), normalised for the student."""
        if self.normalises:
            images = images * self.scale + self.shift
        if images.shape[-2:] != self.size:
            images = functional.interpolate(images, self.size, mode="bicubic", antialias=True)
        with torch.autocast(images.device.type, dtype=self.amp_dtype, enabled=self.amp_dtype != torch.float32):
            logits = self.model(images).float()
        return logits if self.order is None else logits[:, self.order]
