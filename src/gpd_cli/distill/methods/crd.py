"""Contrastive representation distillation (Tian et al., ICLR 2020)."""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from gpd_cli.distill.features import FeatureInfo, Outputs
from gpd_cli.distill.methods.base import Batch, Method, check_temperature, check_weight
from gpd_cli.distill.methods.embeddings import check_embeddings, connect, embeddings, unit_vectors
from gpd_cli.distill.precision import full_precision, in_float32
from gpd_cli.distributed.world import world_size
from gpd_cli.errors import MethodError


def similarities(embedding: Tensor, memory: Tensor, drawn: Tensor) -> Tensor:
    """Compute scalar products of each embedding with the memory's entries that were drawn for it.

    The products with the whole memory are computed first, and those drawn are selected: N products
    for each image take less memory and time than copies of K entries of D numbers.

    Args:
        embedding: embeddings of a batch, ``[B, D]``.
        memory: the memory, ``[N, D]``.
        drawn: positions of the entries drawn for each embedding, ``[B, K]``.

    Returns:
        The scalar products, ``[B, K]``.
    """
    with full_precision(embedding):
        everywhere = embedding @ memory.to(embedding.dtype).T
    rows = torch.arange(len(embedding), device=drawn.device)[:, None]
    # Gathered in one dimension, for which the gradient has deterministic algorithms on all devices.
    return everywhere.flatten().gather(0, (rows * len(memory) + drawn).flatten()).view_as(drawn)


def nce_loss(scores: Tensor, num_images: int) -> Tensor:
    """Noise-contrastive estimation (Tian et al., ICLR 2020, arXiv 1910.10699, equation 18).

    Let p be the exponential of a score, and ``c = K / num_images`` the expected number of draws of
    an entry. The probability that a pair is of one image is then estimated as ``h = p / (p + c)``.
    The loss is ``-log(h)`` for the pair of one image, and ``-log(1 - h)`` for each of the K draws.

    Args:
        scores: logarithms of estimated probabilities, ``[B, 1 + K]``: the first column is for the
            image itself, the others are for the K entries drawn.
        num_images: number of images, N, in the noise distribution ``1 / N``.

    Returns:
        A scalar: the sum over the draws as a mean over the batch.
    """
    odds = scores - math.log((scores.shape[1] - 1) / num_images)
    return -(F.logsigmoid(odds[:, 0]) + F.logsigmoid(-odds[:, 1:]).sum(dim=1)).mean()


def remember(memory: Tensor, indices: Tensor, embedding: Tensor, momentum: float = 0.5) -> None:
    """Move entries of a memory towards new embeddings, in place, and normalize them to length 1.

    If an image occurs more than once, its last embedding is used, on every device. An embedding
    with a NaN or infinite number leaves its entry unchanged.

    Args:
        memory: the memory, ``[N, D]``, which is changed in place.
        indices: positions of the images in the memory, ``[B]``.
        embedding: embeddings of the images, ``[B, D]``.
        momentum: weight of the old entry.
    """
    same = indices[:, None] == indices[None, :]
    last = (same * torch.arange(1, 1 + len(indices), device=indices.device)).argmax(dim=1)
    old = in_float32(memory[indices])
    new = unit_vectors(momentum * old + (1 - momentum) * embedding[last])
    new = torch.where(torch.isfinite(new).all(dim=1, keepdim=True), new, old)
    memory.index_copy_(0, indices, new.to(memory.dtype))


class CRD(Method):
    """Contrastive representation distillation.

    The embeddings of both networks are mapped to unit vectors by trained linear layers. The vectors
    of each network are contrasted with a memory of the other network's vectors. A memory has one
    entry for each training image, and is kept on the device and in checkpoints: two memories of
    N x 128 numbers take 51 MB for CIFAR-100 and 1.3 GB for ImageNet-1k, and twice that with a
    dynamic teacher. All processes keep the same memory. Vectors with NaN or infinite numbers are
    not stored. Negatives are drawn uniformly from all images; the authors' CIFAR-100 runs leave out
    the image's own class.

    Every image needs its position in the training split, so mixed images are refused. Labels are
    not used, so label smoothing changes nothing.

    Args:
        num_images: number of training images, N.
        feat_dim: width of the unit vectors.
        nce_k: number of negatives for each image, K; at most N - 1 are drawn.
        nce_t: temperature that similarities are divided by.
        momentum: weight of the memory's old entries in updates, from 0 up to but not including 1.
        weight: weight of the loss (0.8 in the authors' runs).
    """

    needs = frozenset({"embedding", "indices"})
    one_label = True
    same_everywhere = frozenset({"student_memory", "teacher_memory"})
    stays_finite = frozenset({"student_memory", "teacher_memory", "log_norms", "normed"})

    student_memory: Tensor
    teacher_memory: Tensor
    log_norms: Tensor
    normed: Tensor

    def __init__(
        self,
        num_images: int | None = None,
        feat_dim: int = 128,
        nce_k: int = 16384,
        nce_t: float = 0.07,
        momentum: float = 0.5,
        weight: float = 0.8,
    ) -> None:
        super().__init__()
        check_temperature(nce_t)
        check_weight(weight)
        if num_images is None or num_images < 2:
            raise MethodError(
                "CRD needs the number of training images, 2 or more, as in "
                "--model.method.num_images 50000."
            )
        if feat_dim < 1 or nce_k < 1:
            raise MethodError(
                f"CRD's feat_dim and nce_k must be 1 or more, not {feat_dim} and {nce_k}."
            )
        if not 0 <= momentum < 1:
            raise MethodError(f"The momentum of CRD must be in [0, 1), not {momentum}.")
        self.num_images, self.feat_dim = num_images, feat_dim
        self.nce_k = min(nce_k, num_images - 1)
        self.nce_t, self.momentum, self.weight = nce_t, momentum, weight
        bound = math.sqrt(3 / feat_dim)  # the entries then have a mean squared length of 1
        generator = torch.Generator().manual_seed(0)  # the same in all processes
        for name in ("student_memory", "teacher_memory"):
            memory = torch.empty(num_images, feat_dim)
            self.register_buffer(name, memory.uniform_(-bound, bound, generator=generator))
        self.register_buffer("log_norms", torch.zeros(2))
        self.register_buffer("normed", torch.tensor(False))
        self._is_normed = False  # `normed`, once it is true, without reading the tensor

    def build(self, network: FeatureInfo, teacher: FeatureInfo) -> None:
        """Make the linear layers.

        Raises:
            MethodError: when a network has no embedding.
        """
        check_embeddings(self, network, teacher)
        self.student_layer = nn.Linear(network.embedding, self.feat_dim)
        self.teacher_layer = nn.Linear(teacher.embedding, self.feat_dim)

    def forward(self, network: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        """The sum of two `nce_loss`: each network's vectors against the other network's memory.

        In train mode the memories are updated afterwards.

        Raises:
            MethodError: when the data does not say which image is which.
        """
        indices = batch.indices
        if indices is None:
            raise MethodError(
                "CRD needs the index of every training image; train on data that gives the indices."
            )
        ours, theirs = embeddings(network, teacher)
        student = unit_vectors(connect(self.student_layer, ours))
        reference = unit_vectors(connect(self.teacher_layer, theirs))
        drawn = torch.randint(self.num_images, (len(indices), self.nce_k), device=indices.device)
        drawn = torch.cat([indices[:, None], drawn], dim=1)
        # The memories are copied, since they change below, before the gradient is computed.
        scores = (
            similarities(student, self.teacher_memory.clone(), drawn) / self.nce_t,
            similarities(reference, self.student_memory.clone(), drawn) / self.nce_t,
        )
        self._find_norms(scores)
        losses = [
            nce_loss(score - norm, self.num_images)
            for score, norm in zip(scores, in_float32(self.log_norms), strict=True)
        ]
        if self.training:
            self._remember(indices, student.detach(), reference.detach())
        return self.weight * (losses[0] + losses[1])

    @torch.no_grad()
    def _find_norms(self, scores: tuple[Tensor, Tensor]) -> None:
        """Estimate, once, the norms that let the exponentials of scores sum to 1 over all images.

        If this batch leads to a NaN or infinite norm, the next batch is used instead.

        Args:
            scores: the scores of both directions, each ``[B, 1 + K]``.
        """
        if not self._is_normed and not bool(self.normed):
            means = torch.stack([score.exp().mean() for score in scores])
            if world_size() > 1:
                dist.all_reduce(means)
                means /= world_size()
            norms = (means * self.num_images).log()
            if not torch.isfinite(norms).all():
                return
            self.log_norms.copy_(norms)
            self.normed.fill_(True)
        self._is_normed = True

    @torch.no_grad()
    def _remember(self, indices: Tensor, student: Tensor, teacher: Tensor) -> None:
        indices, student, teacher = (_from_all(value) for value in (indices, student, teacher))
        remember(self.student_memory, indices, student, self.momentum)
        remember(self.teacher_memory, indices, teacher, self.momentum)


def _from_all(values: Tensor) -> Tensor:
    """Gather the values of all processes, in the same order in each; all have the same shape."""
    if world_size() == 1:
        return values
    parts = [torch.empty_like(values) for _ in range(world_size())]
    dist.all_gather(parts, values.contiguous())
    return torch.cat(parts)
