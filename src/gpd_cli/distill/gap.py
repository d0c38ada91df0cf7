"""The gap loss as a pure function of logits.

The gap loss is what the student learns from the dynamic teacher. Losses are means over the batch.
"""

from __future__ import annotations

from torch import Tensor

from gpd_cli.distill.precision import cross_entropy, in_float32


def soft_cross_entropy(logits: Tensor, targets: Tensor, smoothing: float = 0.0) -> Tensor:
    """Cross-entropy with a target distribution.

    ``(1 - smoothing) * H(targets, softmax(logits)) + smoothing * H(uniform, softmax(logits))``

    Args:
        logits: a network's logits, ``[B, C]``.
        targets: the target probabilities, ``[B, C]``.
        smoothing: weight of the uniform distribution, between 0 and 1.

    Returns:
        A scalar, in float32 or better.

    Example:
        >>> import torch
        >>> certain = torch.tensor([[1.0, 0.0]])
        >>> soft_cross_entropy(torch.zeros(1, 2), certain)  # log 2
        tensor(0.6931)
    """
    return cross_entropy(logits, targets, smoothing)


def gap_loss(
    student: Tensor, dynamic_teacher: Tensor, smoothing: float = 0.1, temperature: float = 1.0
) -> Tensor:
    """The student's loss against the dynamic teacher: SCE of Guo et al. (2025), section 3.2.

    This is the smoothed cross-entropy of the student with the dynamic teacher's softmax. No
    gradient reaches the dynamic teacher. Logits are divided by the temperature, and the loss is
    multiplied by the square of the temperature, so that gradients keep their size (Hinton et al.,
    2015).

    Args:
        student: the student's logits, ``[B, C]``.
        dynamic_teacher: the dynamic teacher's logits, ``[B, C]``.
        smoothing: weight of the uniform distribution (0.1 in the authors' runs).
        temperature: temperature of both softmaxes (1 in the authors' runs).

    Returns:
        A scalar, in float32 or better.

    Example:
        >>> import torch
        >>> logits = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
        >>> gap_loss(logits, logits) < gap_loss(-logits, logits)
        tensor(True)
    """
    # Converted before the softmax, since half-precision probabilities would not sum to 1.
    student, dynamic_teacher = in_float32(student), in_float32(dynamic_teacher.detach())
    targets = (dynamic_teacher / temperature).softmax(dim=1)
    return temperature**2 * soft_cross_entropy(student / temperature, targets, smoothing)
