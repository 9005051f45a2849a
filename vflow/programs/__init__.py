"""Floor 2: the language of objectives, its strategies, and the transformation into estimators."""

from vflow.programs._cond import cond as cond
from vflow.programs._expect import expect as expect
from vflow.programs._expect import value_and_grad as value_and_grad
from vflow.programs._inner import exact_enumeration as exact_enumeration
from vflow.programs._inner import importance as importance
from vflow.programs._inner import smc as smc
from vflow.programs._marginal import marginal as marginal
from vflow.programs._marginal import normalize as normalize
from vflow.programs._numpyro import from_numpyro as from_numpyro
from vflow.programs._program import Program as Program
from vflow.programs._program import program as program
from vflow.programs._sample import cost as cost
from vflow.programs._sample import sample as sample
from vflow.programs._scan import scan as scan
from vflow.programs._vmap import vmap as vmap

__all__ = [
    "Program",
    "cond",
    "cost",
    "exact_enumeration",
    "expect",
    "from_numpyro",
    "importance",
    "marginal",
    "normalize",
    "program",
    "sample",
    "scan",
    "smc",
    "value_and_grad",
    "vmap",
]
