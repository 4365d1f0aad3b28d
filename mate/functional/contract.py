"""The operator's contract on shapes, dtypes and devices: checked once, before anything is written.

Shapes, values and devices raise ValueError, dtypes TypeError; a message names the argument, what
was expected and what came. The *values* of cu_seqlens are checked by :func:`check_cu_seqlens`
inside the operator, where they are real numbers also under torch.compile.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

HEAD_DIM = 128
FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
INDEX_DTYPES = (torch.int32, torch.int64)


class Checked(NamedTuple):
    """The batched views ([B, T, H, 128]; varlen: B = 1) of a call that honours the contract."""

    q: Tensor
    k: Tensor
    v: Tensor
    g: Tensor
    beta: Tensor
    output: Tensor | None
    scale: float
    num_seqs: int
    token_states: Tensor | None


def _shape(x: Tensor | tuple[int, ...]) -> str:
    return str(list(x.shape if isinstance(x, Tensor) else x))


def _names(dtypes: tuple[torch.dtype, ...]) -> str:
    return " or ".join(dict.fromkeys(str(dtype) for dtype in dtypes))


def check_form(
    name: str,
    x: Tensor,
    shape: tuple[int, ...],
    rule: str,
    dtypes: tuple[torch.dtype, ...],
    device: torch.device,
) -> None:
    """``rule``: the shape in words."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
    if x.dtype not in dtypes:
        raise TypeError(f"{name} must be {_names(dtypes)}, got {x.dtype}")
    if x.shape != shape:
        raise ValueError(f"{name} must have shape {rule} = {_shape(shape)}, got {_shape(x)}")
    if x.device != device:
        raise ValueError(f"{name} must be on {device} like q, got {x.device}")


def _check_tensor(
    name: str,
    x: Tensor,
    shape: tuple[int, ...],
    rule: str,
    dtypes: tuple[torch.dtype, ...],
    device: torch.device,
) -> None:
    if (
        isinstance(x, Tensor)
        and x.dtype in dtypes
        and x.shape == shape
        and x.device == device
        and x.stride()[-1] == 1
    ):
        return  # the common case before the questions that tell what is wrong
    check_form(name, x, shape, rule, dtypes, device)
    if x.stride(-1) != 1 and x.shape[-1] > 1:
        raise ValueError(
            f"{name} must be contiguous in its last dimension, got stride {x.stride(-1)} "
            f"(strides {list(x.stride())}); call .contiguous()"
        )


def _check_writable(name: str, x: Tensor) -> None:
    if 0 not in x.stride():
        return
    for size, stride in zip(x.shape, x.stride(), strict=True):
        if stride == 0 and size > 1:
            raise ValueError(
                f"{name} is written and must not be an expanded tensor, got shape {_shape(x)} "
                f"with strides {list(x.stride())}"
            )


def _check_gate(
    A_log: Tensor | None,
    dt_bias: Tensor | None,
    lower_bound: float | None,
    heads: int,
    device: torch.device,
) -> None:
    if (A_log is None) != (dt_bias is None):
        given, missing = ("A_log", "dt_bias") if dt_bias is None else ("dt_bias", "A_log")
        raise ValueError(f"A_log and dt_bias go together, got {given} without {missing}")
    if lower_bound is not None:
        if not isinstance(lower_bound, (int, float)) or isinstance(lower_bound, bool):
            raise TypeError(
                f"lower_bound must be a float or None, got {type(lower_bound).__name__}"
            )
        if not -math.inf < lower_bound < 0:
            raise ValueError(f"lower_bound must be finite and negative, got {lower_bound}")
    if A_log is None or dt_bias is None:
        return
    dtypes = (*FLOAT_DTYPES, torch.float64)
    _check_tensor("A_log", A_log, (heads,), "[Hv]", dtypes, device)
    shape: tuple[int, ...] = (heads, HEAD_DIM)
    rule = "[Hv * 128] or [Hv, 128]"
    if isinstance(dt_bias, Tensor) and dt_bias.dim() == 1:
        shape, rule = (heads * HEAD_DIM,), "[Hv, 128] or [Hv * 128]"
    _check_tensor("dt_bias", dt_bias, shape, rule, dtypes, device)


def _check_indices(
    state_indices: Tensor,
    num_seqs: int,
    initial_state: Tensor | None,
    final_state: Tensor | None,
    device: torch.device,
) -> int:
    """The number of slots of the pool that the indices point into."""
    check_form("state_indices", state_indices, (num_seqs,), "[num_seqs]", INDEX_DTYPES, device)
    if initial_state is None or final_state is not initial_state:
        got = "another tensor" if final_state is not None else "final_state=None"
        got = "initial_state=None" if initial_state is None else got
        raise ValueError(
            "state_indices needs a pool of states that is updated in place: expected one tensor "
            f"[slots, Hv, 128, 128] as both initial_state and final_state, got {got}"
        )
    if not isinstance(initial_state, Tensor) or not initial_state.dim():
        return 0  # which the check of initial_state refuses
    return initial_state.shape[0]


def _check_token_states(token_states: Tensor, v: Tensor) -> None:
    dtypes = (v.dtype, torch.float32)
    shape, rule = (*v.shape, HEAD_DIM), "[*v.shape, 128]"
    _check_tensor("token_states", token_states, shape, rule, dtypes, v.device)
    _check_writable("token_states", token_states)
    if token_states.stride(-2) != HEAD_DIM and token_states.numel():
        raise ValueError(
            "token_states must be contiguous in its last two dimensions, got strides "
            f"{list(token_states.stride())}"
        )


def check_indices_differ(state_indices: Tensor, slots: int) -> None:
    """No slot belongs to two sequences, which would overwrite each other. Reads the host."""
    used = [i for i in state_indices.tolist() if 0 <= i < slots]
    if len(set(used)) < len(used):
        twice = next(i for n, i in enumerate(used) if i in used[:n])
        raise ValueError(
            f"state_indices must give every sequence a slot of its own, got {twice} twice"
        )


def no_second_derivative(*_: Any) -> Any:
    """The gradient of the operators' backward passes."""
    raise NotImplementedError(
        "second derivatives of mate's operators are not implemented: expected first-order "
        "gradients only, got a backward pass through a backward pass (create_graph=True)"
    )


def check_cu_seqlens_form(cu_seqlens: Tensor, name: str, device: torch.device) -> None:
    """Everything about document bounds but their values."""
    if not isinstance(cu_seqlens, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(cu_seqlens).__name__}")
    if cu_seqlens.dtype not in INDEX_DTYPES:
        raise TypeError(f"{name} must be torch.int32 or torch.int64, got {cu_seqlens.dtype}")
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 1:
        raise ValueError(f"{name} must have shape [num_seqs + 1], got {_shape(cu_seqlens)}")
    if cu_seqlens.device != device:
        raise ValueError(f"{name} must be on {device}, got {cu_seqlens.device}")


def check_cu_seqlens(cu_seqlens: Tensor, tokens: int, name: str = "cu_seqlens") -> None:
    """Values that start at 0, never decrease and end at the number of tokens. Reads the host."""
    bounds = cu_seqlens.tolist()
    if bounds[0] != 0:
        raise ValueError(f"{name} must start at 0, got {bounds[0]}")
    for n, (start, end) in enumerate(zip(bounds, bounds[1:], strict=False)):
        if end < start:
            raise ValueError(
                f"{name} must not decrease, got {start} followed by {end} at index {n + 1}"
            )
    if bounds[-1] != tokens:
        raise ValueError(f"{name} must end at {tokens}, the number of tokens, got {bounds[-1]}")


def check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    scale: float | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    A_log: Tensor | None,
    dt_bias: Tensor | None,
    lower_bound: float | None,
    beta_sigmoid: bool,
    allow_neg_eigval: bool,
    output: Tensor | None,
    final_state: Tensor | None,
    cu_seqlens_cpu: Tensor | None,
    state_indices: Tensor | None,
    token_states: Tensor | None,
) -> Checked:
    """Everything that can be told without reading a value from a device."""
    for name, x in (("q", q), ("v", v)):
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
    dtype, device, q_shape, v_shape = q.dtype, q.device, q.shape, v.shape
    if dtype not in FLOAT_DTYPES:
        raise TypeError(f"q must be {_names(FLOAT_DTYPES)}, got {dtype}")
    varlen, rank = cu_seqlens is not None, len(q_shape)
    rule = "[S, Hqk, 128] or [1, S, Hqk, 128] with cu_seqlens" if varlen else "[B, T, Hqk, 128]"
    rank_fits = rank == 4 or (varlen and rank == 3)
    if not rank_fits or (varlen and rank == 4 and q_shape[0] != 1):
        packed = "; for packed sequences pass cu_seqlens" if rank == 3 and not varlen else ""
        raise ValueError(f"q must have shape {rule}, got {_shape(q)}{packed}")
    if q_shape[-1] != HEAD_DIM:
        raise ValueError(f"q must have head dimension 128, got {q_shape[-1]} in {_shape(q)}")
    if len(v_shape) != rank or v_shape[:-2] != q_shape[:-2] or v_shape[-1] != HEAD_DIM:
        raise ValueError(
            f"v must have shape {rule.replace('Hqk', 'Hv')} with q's leading dimensions "
            f"{_shape(q_shape[:-2])}, got {_shape(v)}"
        )
    heads_qk, heads = q_shape[-2], v_shape[-2]
    if heads_qk == 0 or heads == 0 or heads % heads_qk:
        raise ValueError(f"Hv must be a positive multiple of Hqk, got Hv={heads}, Hqk={heads_qk}")
    own, own_or_fp32 = (dtype,), (dtype, torch.float32)
    _check_tensor("q", q, q_shape, rule, own, device)
    _check_tensor("k", k, q_shape, "q.shape", own, device)
    _check_tensor("v", v, v_shape, "v.shape", own, device)
    _check_tensor("g", g, v_shape, "v.shape", own_or_fp32, device)
    _check_tensor("beta", beta, v_shape[:-1], "v.shape[:-1]", own_or_fp32, device)
    _check_gate(A_log, dt_bias, lower_bound, heads, device)
    if scale is not None and (not isinstance(scale, (int, float)) or isinstance(scale, bool)):
        raise TypeError(f"scale must be a float or None, got {type(scale).__name__}")
    if allow_neg_eigval and not beta_sigmoid:
        raise ValueError(
            "allow_neg_eigval doubles the sigmoid of beta and needs use_beta_sigmoid_in_kernel="
            "True; with a pre-computed beta, pass 2 * beta instead"
        )
    num_seqs = q_shape[0]
    if cu_seqlens is not None:
        check_cu_seqlens_form(cu_seqlens, "cu_seqlens", device)
        num_seqs = cu_seqlens.shape[0] - 1
    if cu_seqlens_cpu is not None:
        if cu_seqlens is None:
            raise ValueError("cu_seqlens_cpu mirrors cu_seqlens, got cu_seqlens=None")
        check_cu_seqlens_form(cu_seqlens_cpu, "cu_seqlens_cpu", torch.device("cpu"))
        if cu_seqlens_cpu.shape != cu_seqlens.shape:
            raise ValueError(
                f"cu_seqlens_cpu must have cu_seqlens' shape {_shape(cu_seqlens)}, "
                f"got {_shape(cu_seqlens_cpu)}"
            )
    state_shape, state_rule = (num_seqs, heads, HEAD_DIM, HEAD_DIM), "[num_seqs, Hv, 128, 128]"
    if state_indices is not None:
        slots = _check_indices(state_indices, num_seqs, initial_state, final_state, device)
        state_shape, state_rule = (slots, *state_shape[1:]), "[slots, Hv, 128, 128]"
    if initial_state is not None:
        _check_tensor("initial_state", initial_state, state_shape, state_rule, own_or_fp32, device)
    if final_state is not None:
        if initial_state is not final_state:
            allowed = own_or_fp32 if initial_state is None else (initial_state.dtype,)
            _check_tensor("final_state", final_state, state_shape, state_rule, allowed, device)
        _check_writable("final_state", final_state)
    if output is not None:
        _check_tensor("output", output, v_shape, "v.shape", own, device)
        _check_writable("output", output)
    if token_states is not None:
        _check_token_states(token_states, v)
    overwrites = output is not None or final_state is not None or token_states is not None
    if overwrites and torch.is_grad_enabled():
        inputs = (q, k, v, g, beta, initial_state, A_log, dt_bias)
        written = (output, final_state, token_states)
        if any(x is not None and x.requires_grad for x in (*inputs, *written)):
            raise ValueError(
                "output, final_state and token_states are overwritten, which autograd cannot "
                "follow: leave them out where gradients are needed, or call under torch.no_grad()"
            )
    if rank == 3:
        q, k, v, g, beta = (x.unsqueeze(0) for x in (q, k, v, g, beta))
        output = None if output is None else output.unsqueeze(0)
        token_states = None if token_states is None else token_states.unsqueeze(0)
    return Checked(
        q, k, v, g, beta, output, HEAD_DIM**-0.5 if scale is None else float(scale), num_seqs,
        token_states,
    )  # fmt: skip
