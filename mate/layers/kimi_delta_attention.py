"""Kimi Delta Attention as a layer."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mate.functional.contract import HEAD_DIM
from mate.functional.gated_norm import gated_rms_norm
from mate.functional.short_conv import short_conv
from mate.layers.cache import LinearCache
from mate.layers.checkpoints import FP32_PARAMETERS, to_published
from mate.layers.mixer import DecodeWeights, DeltaMixer, is_plain

INIT_STD = 0.02


class ShortConvolution(nn.Module):
    """:func:`mate.functional.short_conv.short_conv` with its weight [C, 1, W]."""

    def __init__(
        self,
        channels: int,
        width: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, 1, width, device=device, dtype=dtype))

    def forward(
        self,
        x: Tensor,
        initial_state: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        output_final_state: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        return short_conv(x, self.weight.squeeze(1), initial_state, cu_seqlens, output_final_state)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, width={self.weight.shape[2]}"


class GatedRMSNorm(nn.Module):
    """:func:`mate.functional.gated_norm.gated_rms_norm` with its weight [V]."""

    def __init__(
        self,
        dim: int,
        eps: float,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim, device=device, dtype=dtype))

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        return gated_rms_norm(x, gate, self.weight, self.eps)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}"


class KimiDeltaAttention(DeltaMixer, nn.Module):
    """Kimi Delta Attention: a linear-attention layer with constant memory per sequence.

    Projections, short convolutions, the recurrence of :func:`mate.chunk_kda`, a gated norm and
    an output projection, as in Kimi Linear (arXiv 2510.26692). Parameters carry the published
    checkpoint's names; ``load_state_dict`` also takes transformers' and flash-linear-attention's
    names and shapes (:mod:`mate.layers.checkpoints`). No biases.

    ``A_log`` and ``dt_bias`` stay fp32 whatever 16-bit dtype the module is moved to, since the
    decays of thousands of tokens multiply, and carry ``_no_weight_decay = True`` for optimizers
    that look. A new layer has A_log = log U(1, 16) (0 with ``lower_bound``) and
    softplus(dt_bias) = exp U(log 1e-3, log 1e-1): Mamba-2's (arXiv 2405.21060), which
    flash-linear-attention and transformers take for Kimi Linear; matrices are normal(0, 0.02).

    ``torch.compile(fullgraph=True)`` and ``torch.export`` keep B, T and the number of documents
    symbolic. An exported program has no cache.

    Args:
        hidden_size: Width of the model.
        num_heads: Heads of q and k.
        head_dim: Key and value size of a head; 128.
        num_v_heads: Value heads, a multiple of ``num_heads``, which share q and k in groups.
            Default: ``num_heads``.
        conv_size: Taps W of the short convolutions; above 8 they run in plain PyTorch.
        lower_bound: None: the softplus gate of the released Kimi Linear checkpoints. A negative
            float: the bounded gate, with that smallest log-decay per token (GLM and K3: -5, which
            is the default of :func:`mate.chunk_kda`, but not here).
        allow_neg_eigval: Writing strength 2 * sigmoid instead of sigmoid.
        norm_eps: Epsilon of the output norm.
        layer_idx: This layer's place in a cache; needed to use one. Layers that share a cache need
            different ones: with the same they would overwrite each other's states unnoticed.
        device: Device of the parameters.
        dtype: Dtype of the parameters except A_log and dt_bias.

    Raises:
        ValueError: A size is not positive, head_dim is not 128, the heads do not divide, or
            lower_bound is not negative.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        head_dim: int = HEAD_DIM,
        num_v_heads: int | None = None,
        conv_size: int = 4,
        lower_bound: float | None = None,
        allow_neg_eigval: bool = False,
        norm_eps: float = 1e-5,
        layer_idx: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        num_v_heads = num_heads if num_v_heads is None else num_v_heads
        for name, size in (
            ("hidden_size", hidden_size),
            ("num_heads", num_heads),
            ("conv_size", conv_size),
        ):
            if size < 1:
                raise ValueError(f"{name} must be at least 1, got {size}")
        if head_dim != HEAD_DIM:
            raise ValueError(f"head_dim must be {HEAD_DIM}, which the kernels need; got {head_dim}")
        if num_v_heads < 1 or num_v_heads % num_heads:
            raise ValueError(
                "num_v_heads must be a positive multiple of num_heads, "
                f"got num_v_heads={num_v_heads}, num_heads={num_heads}"
            )
        if lower_bound is not None and not (math.isfinite(lower_bound) and lower_bound < 0):
            raise ValueError(f"lower_bound must be None or finite and < 0, got {lower_bound}")
        self.hidden_size = hidden_size
        self.num_heads = num_heads
        self.num_v_heads = num_v_heads
        self.head_dim = head_dim
        self.conv_size = conv_size
        self.lower_bound = lower_bound
        self.allow_neg_eigval = allow_neg_eigval
        self.layer_idx = layer_idx

        def linear(inputs: int, outputs: int) -> nn.Linear:
            return nn.Linear(inputs, outputs, bias=False, device=device, dtype=dtype)

        def conv(channels: int) -> ShortConvolution:
            return ShortConvolution(channels, conv_size, device, dtype)

        key_dim, value_dim = num_heads * head_dim, num_v_heads * head_dim
        self.q_proj = linear(hidden_size, key_dim)
        self.k_proj = linear(hidden_size, key_dim)
        self.v_proj = linear(hidden_size, value_dim)
        self.q_conv1d = conv(key_dim)
        self.k_conv1d = conv(key_dim)
        self.v_conv1d = conv(value_dim)
        self.f_a_proj = linear(hidden_size, head_dim)
        self.f_b_proj = linear(head_dim, value_dim)
        self.b_proj = linear(hidden_size, num_v_heads)
        fp32 = {"device": device, "dtype": torch.float32}
        self.A_log = nn.Parameter(torch.empty(num_v_heads, **fp32))  # type: ignore[arg-type]
        self.dt_bias = nn.Parameter(torch.empty(value_dim, **fp32))  # type: ignore[arg-type]
        self.g_a_proj = linear(hidden_size, head_dim)
        self.g_b_proj = linear(head_dim, value_dim)
        self.o_norm = GatedRMSNorm(head_dim, norm_eps, device, dtype)
        self.o_proj = linear(value_dim, hidden_size)
        self.register_load_state_dict_pre_hook(_rename_foreign_keys)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Kimi Linear's initialisation: normal(0, 0.02), decays spread over time scales."""
        for module in self.children():
            if isinstance(module, (nn.Linear, ShortConvolution)):
                nn.init.normal_(module.weight, std=INIT_STD)
            elif isinstance(module, GatedRMSNorm):
                nn.init.ones_(module.weight)
        self.A_log.copy_(self.initial_A_log())
        self.dt_bias.copy_(self.initial_dt_bias())

    def initial_A_log(self) -> Tensor:
        """[Hv]: log U(1, 16) as in Mamba-2, or zeros with a lower bound, which sets the scale."""
        if self.lower_bound is not None:
            return torch.zeros_like(self.A_log)
        return torch.empty_like(self.A_log).uniform_(1, 16).log()

    def initial_dt_bias(self) -> Tensor:
        """[Hv * K]: softplus of it is exp(U(log 1e-3, log 1e-1)), as in Mamba-2."""
        dt = torch.empty_like(self.dt_bias).uniform_(math.log(1e-3), math.log(1e-1)).exp()
        return dt + torch.log(-torch.expm1(-dt))  # softplus^-1(dt), stable for small dt

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        cache: LinearCache | None = None,
        cu_seqlens: Tensor | None = None,
        cu_seqlens_cpu: Tensor | None = None,
    ) -> Tensor:
        """Mix tokens, each document on its own.

        Args:
            hidden_states: [B, T, hidden], or [1, S, hidden] packed with ``cu_seqlens``.
            attention_mask: 2-D padding mask [B, >= T], 1 for a token and 0 for padding anywhere
                in the row, not an additive mask; the last T columns count. Every row gets exactly
                what its tokens alone would get, in the cache too; padded positions yield zeros.
            cache: :class:`mate.layers.KDACache` or a transformers ``Cache``; read, then updated.
                Several calls on one cache continue the same documents. Or some slots of a pool:
                :meth:`mate.layers.StatePool.batch`. Needs ``layer_idx``.
            cu_seqlens: [N + 1] integers: document n is hidden_states[0, cu[n]:cu[n + 1]]. The
                cache then holds N documents.
            cu_seqlens_cpu: The same on the CPU, to spare a GPU's host from asking.

        Returns:
            [B, T, hidden].

        Raises:
            ValueError: shapes do not fit, the cache holds another number of documents, mask and
                cu_seqlens are both given, or the mask has negative values.
            TypeError: hidden_states is not fp16, bf16 or fp32, or an argument not of its type.
        """
        return self.mix(hidden_states, attention_mask, cache, cu_seqlens, cu_seqlens_cpu)

    def short_convs(self) -> Sequence[Callable[..., tuple[Tensor, Tensor | None]]]:
        return self.q_conv1d, self.k_conv1d, self.v_conv1d

    def decode_weights(self) -> DecodeWeights | None:
        modules: Any = self._modules  # nn.Module's attribute look-up takes longer
        norm, convs = modules["o_norm"], []
        for name in ("q_conv1d", "k_conv1d", "v_conv1d"):
            conv = modules[name]
            if not is_plain(conv, ShortConvolution):
                return None
            convs.append(conv._parameters.get("weight"))
        weight = norm._parameters.get("weight")
        if not is_plain(norm, GatedRMSNorm) or any(x is None for x in (weight, *convs)):
            return None
        return DecodeWeights(convs, weight, norm.eps)

    def low_rank_gates(self) -> tuple[tuple[Any, Any], tuple[Any, Any]]:
        modules: Any = self._modules  # nn.Module's attribute look-up takes longer
        return (
            (modules["f_a_proj"], modules["f_b_proj"]),
            (modules["g_a_proj"], modules["g_b_proj"]),
        )

    def decay_parameters(self) -> tuple[Tensor, Tensor]:
        return self.A_log, self.dt_bias

    def state_shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """One document's convolution window [C, W] and recurrent state [Hv, V, K]."""
        channels = (2 * self.num_heads + self.num_v_heads) * self.head_dim
        recurrent = (self.num_v_heads, self.head_dim, self.head_dim)
        return (channels, self.conv_size), recurrent

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        super().register_parameter(name, param)
        if name in FP32_PARAMETERS and param is not None:
            param._no_weight_decay = True  # type: ignore[attr-defined]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """What .to, .half and .bfloat16 come down to: A_log and dt_bias move, and never round."""
        parameters = [getattr(self, name) for name in FP32_PARAMETERS]
        kept = {id(t) for p in parameters for t in (p, p.grad) if t is not None}

        def moved(tensor: Tensor) -> Tensor:
            result = fn(tensor)
            if id(tensor) in kept and result.dtype.itemsize < 4:
                return tensor.to(result.device, torch.float32)
            return result

        super()._apply(moved, recurse)
        for name in FP32_PARAMETERS:
            getattr(self, name)._no_weight_decay = True
        return self

    def extra_repr(self) -> str:
        gate = "softplus" if self.lower_bound is None else f"lower_bound={self.lower_bound}"
        heads = f"num_heads={self.num_heads}, num_v_heads={self.num_v_heads}"
        return f"{self.hidden_size}, {heads}, gate={gate}, layer_idx={self.layer_idx}"


def _rename_foreign_keys(module: nn.Module, state_dict: Any, prefix: str, *_: Any) -> None:
    assert isinstance(module, KimiDeltaAttention)
    convs = (module.q_conv1d, module.k_conv1d, module.v_conv1d)
    to_published(state_dict, prefix, [conv.weight.shape[0] for conv in convs])
