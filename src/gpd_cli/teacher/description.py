"""The description of a checkpoint's networks, from which they are rebuilt.

Checkpoints of `fit` and files of `expand` have it as their ``gpd`` entry.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gpd_cli.branches import ALL_LAYERS
from gpd_cli.data.image_spec import ImageSpec
from gpd_cli.errors import WeightsError
from gpd_cli.models import ModelSpec
from gpd_cli.teacher.build import build_pair, check_plan
from gpd_cli.teacher.networks import Alone
from gpd_cli.teacher.pair import Pair
from gpd_cli.teacher.unshared import Unshared, without_sharing
from gpd_cli.widening.plan import WidthPlan
from gpd_cli.widening.tensors import Storage

FORMAT = 1
"""Number of the form of descriptions that this version writes and reads."""


@dataclass(frozen=True)
class Description:
    """What is needed, besides the weights, to rebuild the networks of a checkpoint.

    This is the ``gpd`` entry of a checkpoint.

    Args:
        spec: the student's architecture.
        plan: the student's width plan; None for a student trained alone.
        branches: names of the extra branches.
        shape: shape of the images that the student was trained or expanded on, ``(C, H, W)``.
        storage: the scale at which shared weights are stored.
        branch_layers: which layers have branches.
        shared: whether student and dynamic teacher share their weights.
        shared_norms: whether they share the weights of norms, too; true where they share none.
        branch_width: number of inner channels of the ``1x1_kxk`` branch, relative to the paper's.
        images: classes and preprocessing of the images; None where they are not known, as in
            `expand`.
    """

    spec: ModelSpec
    plan: WidthPlan | None
    shape: tuple[int, int, int]
    branches: tuple[str, ...] = ()
    storage: Storage = "mixed"
    branch_layers: tuple[str, ...] = ALL_LAYERS
    shared: bool = True
    shared_norms: bool = True
    branch_width: float = 1.0
    images: ImageSpec | None = None

    def to_dict(self) -> dict[str, Any]:
        """The description as plain values (JSON)."""
        return {
            "format": FORMAT,
            "student": self.spec.to_dict(),
            "plan": None if self.plan is None else self.plan.to_dict(),
            "branches": list(self.branches),
            "branch_layers": list(self.branch_layers),
            "branch_width": self.branch_width,
            "storage": self.storage,
            "shared": self.shared,
            "shared_norms": self.shared_norms,
            "shape": list(self.shape),
            "images": None if self.images is None else self.images.to_dict(),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Description:
        """Rebuild a description from the output of `to_dict`."""
        plan = data["plan"]
        return cls(
            ModelSpec.from_dict(data["student"]),
            None if plan is None else WidthPlan.from_dict(plan),
            tuple(data["shape"]),
            tuple(data["branches"]),
            data["storage"],
            tuple(data.get("branch_layers", ALL_LAYERS)),
            shared=data.get("shared", True),
            shared_norms=data.get("shared_norms", True),
            branch_width=data.get("branch_width", 1.0),
            images=ImageSpec.from_dict(data.get("images")),
        )

    def build(self) -> Pair | Alone:
        """Rebuild the networks, with weights still to be loaded."""
        student = self.spec.build()
        if self.plan is None:
            return Alone(student)
        check_plan(student, self.plan)
        pair = build_pair(
            student,
            self.plan,
            branches=self.branches,
            branch_layers=self.branch_layers,
            branch_width=self.branch_width,
            storage=self.storage,
        )
        return without_sharing(pair, self.shared, self.shared_norms)


def describe_run(
    network: Pair | Alone,
    spec: ModelSpec,
    shape: tuple[int, int, int],
    branches: Sequence[str],
    branch_layers: Sequence[str],
    storage: Storage,
    branch_width: float = 1.0,
    images: ImageSpec | None = None,
) -> dict[str, Any]:
    """Make the ``gpd`` entry of a training checkpoint.

    Args:
        network: the network that is trained.
        spec: the student's architecture.
        shape: image shape, ``(C, H, W)``.
        branches: names of the extra branches.
        branch_layers: which layers have branches.
        storage: the scale at which shared weights are stored.
        branch_width: number of inner channels of the ``1x1_kxk`` branch, relative to the paper's.
        images: classes and preprocessing of the data.
    """
    if isinstance(network, Alone):
        return Description(spec, None, shape, images=images).to_dict()
    return Description(
        spec,
        network.plan,
        shape,
        tuple(branches),
        storage,
        tuple(branch_layers),
        shared=not isinstance(network, Unshared) or network.only_norms,
        shared_norms=not (isinstance(network, Unshared) and network.only_norms),
        branch_width=branch_width,
        images=images,
    ).to_dict()


def check_same_network(found: Mapping[str, Any] | None, expected: Mapping[str, Any]) -> None:
    """Check that a checkpoint has the same network as the run that is to load the checkpoint.

    Args:
        found: the checkpoint's ``gpd`` entry.
        expected: the run's ``gpd`` entry.

    Raises:
        WeightsError: when student, branches, storage, shared weights or widened channels differ.
    """
    if found is None:
        raise WeightsError("The checkpoint was not written by gpd fit; give last.ckpt of a run.")

    def short(entry: Mapping[str, Any]) -> str:
        student, plan = entry["student"], entry["plan"]
        how = "alone" if plan is None else f"at ratio {plan['ratio']:g}"
        if not entry["shared"]:
            how += " with weights of its own"
        elif not entry["shared_norms"]:
            how += " with norms of its own"
        return (
            f"{student['name']} with {student['num_classes']} classes {how}, branches "
            f"{entry['branches']}{layers(entry)}, storage {entry['storage']}"
        )

    def layers(entry: Mapping[str, Any]) -> str:
        chosen = entry["branch_layers"]
        text = "" if entry["branch_width"] == 1 else f" at width {entry['branch_width']:g}"
        return text if chosen == list(ALL_LAYERS) else f"{text} on {chosen}"

    # Files of earlier versions lack these entries.
    defaults = {
        "branch_layers": list(ALL_LAYERS),
        "shared": True,
        "shared_norms": True,
        "branch_width": 1.0,
    }
    found = {**defaults, **found}
    keys = ("student", "branches", *defaults, "storage")
    same = _what_widens(found["plan"]) == _what_widens(expected["plan"])
    if not same or any(found[key] != expected[key] for key in keys):
        if short(found) == short(expected) and found["student"] == expected["student"]:
            raise WeightsError(
                f"The checkpoint is of {short(found)}, as is this run, but in the checkpoint other "
                "channels are widened (--model.exclude, --model.width_multiple); resume with the "
                "configuration that the run was started with."
            )
        raise WeightsError(
            f"The checkpoint is of {short(found)}, but this run is of {short(expected)}; resume "
            "with the configuration that the run was started with."
        )


def _what_widens(plan: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    """The parts of a plan, as plain values, that determine what widens.

    They have the form of this version, so that the plans of earlier versions compare equal; the
    reasons for layers that stay narrow are left out.

    Args:
        plan: a plan as plain values, from `WidthPlan.to_dict`, or None.
    """
    if plan is None:
        return None
    tensors = {name: {"share": 1, **entry} for name, entry in plan["tensors"].items()}
    return {"tensors": tensors} | {key: plan[key] for key in ("ratio", "attributes", "maps")}
