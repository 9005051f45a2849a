"""From a file back to a posterior."""

import os
from typing import Any

from vflow.fit._guide import make_guide
from vflow.fit._posterior import Posterior
from vflow.fit._record import read_record
from vflow.fit._save import read_file
from vflow.targets import decentre
from vflow.targets import target as as_target
from vflow.targets._rows import subsampled, whole


def load(
    path: str | os.PathLike,
    program: Any,
    *,
    flow: Any = None,
    guide: Any = None,
    params: Any = None,
) -> Posterior:
    """The posterior that `Posterior.save` wrote.

    The file holds no code: it names vflow's own classes and nothing else. It holds no model and no
    data either, these are given; the log density at one point is compared with the file's, so
    that a fit of other data is not mistaken for this one.

    Args:
        path: the file.
        program: the program, or the target, that was fitted.
        flow: a flow of the same structure, needed only if it is not made of vflow's own parts; its
            values do not matter.
        guide: the guide that was fitted, if it was one.
        params: its parameters, of the same structure; their values do not matter.

    Returns:
        The posterior; for one key it gives the draws of the one that was saved.

    Raises:
        FileNotFoundError: there is no file.
        ValueError: the file is foreign, damaged, of a newer version, or a fit of another model.
    """
    target = as_target(whole(program) if subsampled(program) else program)
    if guide is not None:
        flow = make_guide(guide, params, target)
    decentred = read_file(path, "posterior")[0]["settings"].get("decentred", [])
    target = decentre(target, tuple(decentred))
    flow, verdict, history, settings = read_record(path, target, flow)
    return Posterior(flow, target, verdict, history, settings)
