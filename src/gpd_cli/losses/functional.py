"""Losses as pure functions of logits; every one is a mean over the batch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def soft_cross_entropy(logits: Tensor, targets: Tensor, smoothing: float = 0.0) -> Tensor:
    """Cross-entropy with a target distribution.

    ``(1 - smoothing) * H(targets, softmax(logits)) + smoothing * H(uniform, softmax(logits))``

    Args:
        logits: ``[B, C]``.
        targets: probabilities, ``[B, C]``.
        smoothing: weight of the uniform distribution, between 0 and 1.

    Returns:
        A scalar.
    """
    return F.cross_entropy(logits, targets, label_smoothing=smoothing)


def gap_loss(student: Tensor, dynamic_teacher: Tensor, smoothing: float = 0.1) -> Tensor:
    """What the student learns from the dynamic teacher: SCE of Guo et al. (2025), section 3.2.

    Smoothed cross-entropy with the dynamic teacher's softmax at temperature 1. No gradient reaches
    the dynamic teacher.

    Args:
        student: logits, ``[B, C]``.
        dynamic_teacher: logits, ``[B, C]``.
        smoothing: weight of the uniform distribution (0.1 in the authors' runs).

    Returns:
        A scalar.
    """
    return soft_cross_entropy(student, dynamic_teacher.detach().softmax(dim=1), smoothing)


def kd_loss(student: Tensor, teacher: Tensor, temperature: float = 4.0) -> Tensor:
    """Knowledge distillation (Hinton et al., 2015, arXiv 1503.02531).

    ``T^2 * KL(softmax(teacher / T) || softmax(student / T))``

    Args:
        student: logits, ``[B, C]``.
        teacher: logits, ``[B, C]``.
        temperature: T, more than 0.

    Returns:
        A scalar.
    """
    divergence = F.kl_div(
        F.log_softmax(student / temperature, dim=1),
        F.log_softmax(teacher / temperature, dim=1),
        reduction="batchmean",
        log_target=True,
    )
    return divergence * temperature**2


def dkd_loss(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor,
    alpha: float = 1.0,
    beta: float = 8.0,
    temperature: float = 4.0,
) -> Tensor:
    """Decoupled knowledge distillation (Zhao et al., CVPR 2022, arXiv 2203.08679, equation 7).

    ``T^2 * (alpha * TCKD + beta * NCKD)``: the divergence of the binary distributions target class
    against all others, and the divergence of the distributions among the other classes.

    Args:
        student: logits, ``[B, C]``.
        teacher: logits, ``[B, C]``.
        labels: class numbers, ``[B]``; or soft labels, ``[B, C]``, whose largest entry is taken for
            the target class (as the authors of GPD do under mixup).
        alpha: weight of the target-class term.
        beta: weight of the non-target term.
        temperature: T, more than 0.

    Returns:
        A scalar.
    """
    target = labels if labels.ndim == 1 else labels.argmax(dim=1)
    is_target = F.one_hot(target, student.shape[1]).bool()
    log_student = F.log_softmax(student / temperature, dim=1)
    log_teacher = F.log_softmax(teacher / temperature, dim=1)
    binary = F.kl_div(
        _target_and_rest(log_student, is_target),
        _target_and_rest(log_teacher, is_target),
        reduction="batchmean",
        log_target=True,
    )
    others = F.kl_div(
        _among_rest(log_student, is_target),
        _among_rest(log_teacher, is_target),
        reduction="batchmean",
        log_target=True,
    )
    return (alpha * binary + beta * others) * temperature**2


def _target_and_rest(log_probabilities: Tensor, is_target: Tensor) -> Tensor:
    """Log-probabilities of the target class and of all others together, ``[B, 2]``."""
    target = log_probabilities[is_target]
    rest = log_probabilities.masked_fill(is_target, -torch.inf).logsumexp(dim=1)
    return torch.stack([target, rest], dim=1)


def _among_rest(log_probabilities: Tensor, is_target: Tensor) -> Tensor:
    """Log-probabilities of the other classes given that it is none but them, ``[B, C - 1]``."""
    rows, classes = log_probabilities.shape
    rest = log_probabilities[~is_target].reshape(rows, classes - 1)
    return F.log_softmax(rest, dim=1)
