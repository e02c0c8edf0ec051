"""A teacher of your own, a Python function, and a distillation loss of your own.

The function gets images as a tensor of shape (B, C, H, W) and returns logits of shape (B, K). It is never trained; whatever
made it is none of deitkit's business.
"""

# %% A teacher: here the mean image of each class. It has seen all digits, those of the test split too; yours should not
import torch
from sklearn.datasets import load_digits
from torch.nn import functional as F

import deitkit as dk

digits = load_digits()
pixels, labels = torch.tensor(digits.images / 16, dtype=torch.float32), torch.tensor(digits.target)
means = torch.stack([pixels[labels == k].mean(0).flatten() for k in range(10)])


def nearest_mean(images):
    """Logits: minus the squared distance to each class' mean image."""
    small = F.interpolate(images.mean(1, keepdim=True), (8, 8)).flatten(1)
    return -torch.cdist(small, means).square()


# %% Its preprocessing says what it wants to see
from deitkit.models.network import Preprocessing

wanted = Preprocessing(image_size=(8, 8), mean=(0.0,), std=(1.0,))
teacher = dk.teacher_from_callable(nearest_mean, name="nearest mean", num_classes=10, preprocessing=wanted)

# %% A student learns from it by KL of standardised logits, the default
settings = {"student": "deit_pico", "steps": 60, "augment": "none"}
run = dk.train("digits", teacher=teacher, out="runs/own-teacher", **settings)
print(run)
print(f"the teacher {run.summary['teacher']['top1']:.1%}")


# %% A loss of your own: one number per image
def squared_error(student_logits, teacher_logits, batch):
    return (student_logits.log_softmax(-1) - teacher_logits.log_softmax(-1)).square().mean(-1)


run = dk.train(
    "digits", teacher=teacher, distillation=squared_error, teacher_weight=0.1, out="runs/own-loss", **settings
)
print(run)
