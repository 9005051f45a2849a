"""How the gradient of a random choice is estimated: one file per strategy."""

from vflow.programs._strategy import Strategy as Strategy
from vflow.programs.strategies._disarm import disarm as disarm
from vflow.programs.strategies._enum import enum as enum
from vflow.programs.strategies._implicit import implicit as implicit
from vflow.programs.strategies._measure_valued import measure_valued as measure_valued
from vflow.programs.strategies._path import path as path
from vflow.programs.strategies._rao_blackwell import rao_blackwell as rao_blackwell
from vflow.programs.strategies._recommend import Recommendation as Recommendation
from vflow.programs.strategies._recommend import recommend as recommend
from vflow.programs.strategies._reinforce import reinforce as reinforce
from vflow.programs.strategies._reparam import reparam as reparam

__all__ = [
    "Recommendation",
    "Strategy",
    "disarm",
    "enum",
    "implicit",
    "measure_valued",
    "path",
    "rao_blackwell",
    "recommend",
    "reinforce",
    "reparam",
]
