"""The dynamic teacher: expansion of a student, training as a pair, and extraction.

`expand` grows a dynamic teacher out of a student and returns a `Pair`, a module with both networks
on shared weights. `Pair.extract` returns the trained student, and `merged_teacher` the trained
teacher, as plain modules.
"""

from gpd_cli.teacher.build import merged_teacher
from gpd_cli.teacher.certificate import Certificate
from gpd_cli.teacher.certification import certify
from gpd_cli.teacher.expansion import DEFAULT_NOISE, expand
from gpd_cli.teacher.pair import Pair
from gpd_cli.teacher.unshared import Unshared

__all__ = [
    "DEFAULT_NOISE",
    "Certificate",
    "Pair",
    "Unshared",
    "certify",
    "expand",
    "merged_teacher",
]
