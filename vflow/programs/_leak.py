"""What to say of a random choice inside a raw JAX transformation."""

import sys

# The Python function that runs a transformation -> its name and what to do instead.
_REMEDIES = {
    "vmap_f": ("jax.vmap", "use vf.vmap"),
    "scan": ("jax.lax.scan", "use vf.scan"),
    "map": ("jax.lax.map", "use vf.scan or vf.vmap"),
    "fori_loop": ("jax.lax.fori_loop", "use vf.scan"),
    "while_loop": ("jax.lax.while_loop", "use vf.scan with a fixed number of steps"),
    "cond": ("jax.lax.cond", "use vf.cond"),
    "switch": ("jax.lax.switch", "use nested vf.cond"),
    "cache_miss": ("jax.jit", "apply jax.jit to vf.expect(objective)"),
    "grad_f": ("jax.grad", "apply jax.grad to vf.expect(objective)"),
    "value_and_grad_f": ("jax.value_and_grad", "apply it to vf.expect(objective)"),
    "jvp": ("jax.jvp", "apply jax.jvp to vf.expect(objective)"),
    "vjp": ("jax.vjp", "apply jax.vjp to vf.expect(objective)"),
    "jacfun": ("jax.jacfwd or jax.jacrev", "apply it to vf.expect(objective)"),
    "linearize": ("jax.linearize", "apply it to vf.expect(objective)"),
    "fun_remat": ("jax.checkpoint", "take the choice out of it"),
}
_ANY = (
    "jax.vmap, jax.lax.scan, jax.lax.cond, jax.jit, jax.grad or jax.checkpoint",
    "use vf.vmap, vf.scan or vf.cond inside an objective, and apply jit and grad to "
    "vf.expect(objective)",
)


def leak_message(name: str) -> str:
    """The error for site `name`, with the transformation that was called around it."""
    what, remedy = _REMEDIES.get(_innermost_call(), _ANY)
    return (
        f"site {name!r} was reached inside a raw {what}, where its gradient would be silently "
        f"wrong: {remedy}."
    )


def _innermost_call() -> str:
    """The function of JAX that was called by code outside JAX, closest to the site; "" if none.

    It is found on the Python stack: the outermost frame of the innermost run of JAX's frames.
    """
    frame, found = sys._getframe(), ""
    while frame is not None:
        module = frame.f_globals.get("__name__", "")
        if module.partition(".")[0] == "jax":
            if frame.f_code.co_name != "reraise_with_filtered_traceback":
                found = frame.f_code.co_name
        elif found:
            return found
        frame = frame.f_back
    return found
