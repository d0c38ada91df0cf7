"""Methods of distillation: losses of student and dynamic teacher against a static teacher."""

from gpd_cli.distill.methods.attention import AT
from gpd_cli.distill.methods.base import Batch, Method
from gpd_cli.distill.methods.catkd import CATKD
from gpd_cli.distill.methods.cc import CC
from gpd_cli.distill.methods.crd import CRD
from gpd_cli.distill.methods.dist import DIST
from gpd_cli.distill.methods.dkd import DKD
from gpd_cli.distill.methods.fitnets import FitNets
from gpd_cli.distill.methods.kd import KD
from gpd_cli.distill.methods.mlld import MLLD
from gpd_cli.distill.methods.nkd import NKD
from gpd_cli.distill.methods.pairs import ByPair
from gpd_cli.distill.methods.pkt import PKT
from gpd_cli.distill.methods.reviewkd import ReviewKD
from gpd_cli.distill.methods.rkd import RKD
from gpd_cli.distill.methods.simkd import SimKD
from gpd_cli.distill.methods.srrl import SRRL

METHODS: tuple[type[Method], ...] = (
    AT,
    CATKD,
    CC,
    CRD,
    DIST,
    DKD,
    FitNets,
    KD,
    MLLD,
    NKD,
    PKT,
    ReviewKD,
    RKD,
    SimKD,
    SRRL,
)
"""The methods that come with gpd; on the command line they have the names of their classes."""

__all__ = [
    "AT",
    "CATKD",
    "CC",
    "CRD",
    "DIST",
    "DKD",
    "KD",
    "METHODS",
    "MLLD",
    "NKD",
    "PKT",
    "RKD",
    "SRRL",
    "Batch",
    "ByPair",
    "FitNets",
    "Method",
    "ReviewKD",
    "SimKD",
]
