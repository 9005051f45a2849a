"""Floor 5: objectives as programs; each is maximised."""

from vflow.objectives._craft import craft as craft
from vflow.objectives._data_emphasised import data_emphasised_elbo as data_emphasised_elbo
from vflow.objectives._dependent import dependent_likelihood as dependent_likelihood
from vflow.objectives._elbo import elbo as elbo
from vflow.objectives._fab import fab as fab
from vflow.objectives._fab_replay import fab_replay as fab_replay
from vflow.objectives._fisher import fisher as fisher
from vflow.objectives._fisher import score_matching as score_matching
from vflow.objectives._forward_kl import forward_kl as forward_kl
from vflow.objectives._free_form import free_form as free_form
from vflow.objectives._importance_weighted import importance_weighted as importance_weighted
from vflow.objectives._iwelbo import iwelbo as iwelbo
from vflow.objectives._log_variance import log_variance as log_variance
from vflow.objectives._renyi import chi_square as chi_square
from vflow.objectives._renyi import renyi as renyi
from vflow.objectives._symmetric_kl import symmetric_kl as symmetric_kl
from vflow.objectives._vod import vod as vod
from vflow.objectives._wake import wake_p as wake_p
from vflow.objectives._wake import wake_q as wake_q

__all__ = [
    "chi_square",
    "craft",
    "data_emphasised_elbo",
    "dependent_likelihood",
    "elbo",
    "fab",
    "fab_replay",
    "fisher",
    "forward_kl",
    "free_form",
    "importance_weighted",
    "iwelbo",
    "log_variance",
    "renyi",
    "score_matching",
    "symmetric_kl",
    "vod",
    "wake_p",
    "wake_q",
]
