"""States of sequences in a pool of slots, for the paths in PyTorch: nothing is read on the host."""

from torch import Tensor


def gather(pool: Tensor, indices: Tensor) -> Tensor:
    """The states [N, ...] at ``indices`` [N] of a pool [P, ...]; outside [0, P) zeros."""
    if not pool.shape[0]:
        return pool.new_zeros(indices.shape[0], *pool.shape[1:])
    inside, slots = _inside(pool, indices)
    return pool.index_select(0, slots).masked_fill_(~_column(inside, pool), 0)


def scatter_(pool: Tensor, indices: Tensor, states: Tensor) -> None:
    """Writes ``states`` [N, ...] to the slots ``indices`` [N]; those outside [0, P) nowhere.

    How many lie inside is not known on the host: the others write what some sequence inside writes
    once more, and where there is none, what their slot holds already.
    """
    if not pool.shape[0] or not indices.shape[0]:
        return
    inside, slots = _inside(pool, indices)
    states = states.to(pool.dtype)
    one = inside.to(slots.dtype).argmax(0, keepdim=True)  # the first inside, if there is any
    spare = slots.index_select(0, one)
    spare_state = states.index_select(0, one)
    spare_state = spare_state.where(_column(inside.any(), pool), pool.index_select(0, spare))
    states = states.where(_column(inside, pool), spare_state)
    pool.index_copy_(0, slots.where(inside, spare), states)


def _inside(pool: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    """Which indices lie in the pool, and all of them clamped to it."""
    count = pool.shape[0]
    return (indices >= 0) & (indices < count), indices.clamp(0, count - 1).long()


def _column(mask: Tensor, states: Tensor) -> Tensor:
    """[N] -> [N, 1, ...] beside states [N, ...]."""
    return mask.view(-1, *(1,) * (states.dim() - 1))
