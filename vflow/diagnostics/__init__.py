"""Floor 6: can a fit, a bijection, or the platform be trusted?"""

from vflow.diagnostics._bijection import BijectionErrors as BijectionErrors
from vflow.diagnostics._bijection import check_bijection as check_bijection
from vflow.diagnostics._platform import PlatformCheck as PlatformCheck
from vflow.diagnostics._platform import PlatformReport as PlatformReport
from vflow.diagnostics._platform import check_platform as check_platform
from vflow.diagnostics._psis import SmoothedWeights as SmoothedWeights
from vflow.diagnostics._psis import khat as khat
from vflow.diagnostics._psis import khat_threshold as khat_threshold
from vflow.diagnostics._psis import psis as psis
from vflow.diagnostics._tails import TailReport as TailReport
from vflow.diagnostics._tails import tails as tails
from vflow.diagnostics._unbiased import UnbiasedReport as UnbiasedReport
from vflow.diagnostics._unbiased import check_unbiased as check_unbiased
from vflow.diagnostics._weights import ess_fraction as ess_fraction
from vflow.diagnostics._weights import log_evidence as log_evidence
from vflow.diagnostics._weights_report import LabelMass as LabelMass
from vflow.diagnostics._weights_report import WeightsReport as WeightsReport
from vflow.diagnostics._weights_report import weights_report as weights_report

__all__ = [
    "BijectionErrors",
    "LabelMass",
    "PlatformCheck",
    "PlatformReport",
    "SmoothedWeights",
    "TailReport",
    "UnbiasedReport",
    "WeightsReport",
    "check_bijection",
    "check_platform",
    "check_unbiased",
    "ess_fraction",
    "khat",
    "khat_threshold",
    "log_evidence",
    "psis",
    "tails",
    "weights_report",
]
