"""Floor 3: base distributions and the flow, a base distribution behind a bijection."""

from vflow.distributions._distribution import AbstractDistribution as AbstractDistribution
from vflow.distributions._elliptical_student_t import EllipticalStudentT as EllipticalStudentT
from vflow.distributions._flow import Flow as Flow
from vflow.distributions._free_form import FreeForm as FreeForm
from vflow.distributions._mixture import Mixture as Mixture
from vflow.distributions._normal import Normal as Normal
from vflow.distributions._row_correlated import RowCorrelated as RowCorrelated
from vflow.distributions._sampling import sample_and_log_prob as sample_and_log_prob
from vflow.distributions._student_t import StudentT as StudentT

__all__ = [
    "AbstractDistribution",
    "EllipticalStudentT",
    "Flow",
    "FreeForm",
    "Mixture",
    "Normal",
    "RowCorrelated",
    "StudentT",
    "sample_and_log_prob",
]
