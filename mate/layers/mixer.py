"""The forward pass of a KDA layer, whoever owns the parameters.

:class:`DeltaMixer` is mixed into mate's own layer and into the layers of other libraries that
mate serves: it reads q_proj, k_proj, v_proj, b_proj, o_norm and o_proj by name, and the rest
through four small methods.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from mate.backends import native_layer
from mate.functional import chunk_kda, recurrent_kda
from mate.functional.contract import FLOAT_DTYPES, check_cu_seqlens_form
from mate.functional.decode_step import kda_decode_step
from mate.layers.cache import LinearCache
from mate.layers.documents import pack, trailing_mask

MAX_RECURRENT_TOKENS = 16


class DecodeWeights(NamedTuple):
    """What a fused decode step reads of the small modules instead of calling them."""

    convs: Sequence[Tensor]  # of q, k and v, [C, W]
    norm: Tensor
    norm_eps: float


def is_plain(module: nn.Module, cls: type) -> bool:
    """Whether calling the module is nothing but ``cls``'s forward: no hook, no wrapper."""
    hooked = module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module)
    return type(module) is cls and not hooked and not _has_any_global_hook()


class DeltaMixer:
    """x -> q, k, v -> short convolutions -> KDA -> gated norm -> output, per document."""

    q_proj: Any
    k_proj: Any
    v_proj: Any
    b_proj: Any
    o_norm: Any
    o_proj: Any
    hidden_size: int
    head_dim: int
    layer_idx: Any
    lower_bound: float | None = None
    allow_neg_eigval: bool = False

    def short_convs(self) -> Sequence[Callable[..., tuple[Tensor, Tensor | None]]]:
        """The convolutions of q, k and v, called like :func:`mate.functional.short_conv`."""
        raise NotImplementedError

    def decay_input(self, x: Tensor) -> Tensor:
        """[B, T, hidden] -> the gate's input [B, T, Hv * K]."""
        raise NotImplementedError

    def decay_parameters(self) -> tuple[Tensor, Tensor]:
        """A_log [Hv] and dt_bias [Hv * K] in fp32."""
        raise NotImplementedError

    def output_gate(self, x: Tensor) -> Tensor:
        """[B, T, hidden] -> the output gate's logit [B, T, Hv * V]."""
        raise NotImplementedError

    def decode_weights(self) -> DecodeWeights | None:
        """For the fused decode step; None: the modules must be called one by one."""
        return None

    def mix(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        cache: LinearCache | None = None,
        cu_seqlens: Tensor | None = None,
        cu_seqlens_cpu: Tensor | None = None,
    ) -> Tensor:
        """The whole layer; the arguments are :meth:`KimiDeltaAttention.forward`'s."""
        x = hidden_states
        self._check_input(x)
        if cache is not None:
            self._check_cache(cache)
        if cu_seqlens is not None:
            check_cu_seqlens_form(cu_seqlens, "cu_seqlens", x.device)
            if attention_mask is not None:
                raise ValueError(
                    "attention_mask and cu_seqlens exclude each other: a packed batch has no "
                    "padding; got both"
                )
            if x.shape[0] != 1:
                raise ValueError(
                    f"cu_seqlens needs packed hidden_states [1, S, hidden], got {tuple(x.shape)}"
                )
            return self._mix_documents(x, cache, cu_seqlens, cu_seqlens_cpu)
        if attention_mask is None:
            return self._mix_documents(x, cache)

        keep = trailing_mask(attention_mask, *x.shape[:2]).to(x.device)
        # Dropping the padding needs its amount on the host: free on a CPU, a stall elsewhere.
        keep_shape = x.device.type != "cpu" or torch.compiler.is_compiling()
        if keep_shape:  # a document of zeros stays zeros: the layer has no biases
            x = x.masked_fill(~keep[..., None], 0)
        elif bool(keep.all()):
            return self._mix_documents(x, cache)
        rows, bounds = pack(keep, keep_shape)
        packed = x.flatten(0, 1).index_select(0, rows)[None]
        y = self._mix_documents(packed, cache, bounds, unowned=int(keep_shape))[0]
        padded = y.new_zeros(keep.numel(), y.shape[-1]).index_copy(0, rows, y)
        return padded.unflatten(0, keep.shape)

    def _mix_documents(
        self,
        x: Tensor,
        cache: LinearCache | None,
        cu_seqlens: Tensor | None = None,
        cu_seqlens_cpu: Tensor | None = None,
        unowned: int = 0,
    ) -> Tensor:
        """x [B, T, hidden] dense, or [1, S, hidden] packed, to the same shape.

        The last ``unowned`` documents hold padding: the cache knows nothing of them.
        """
        documents = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
        conv_state, state = self._read(cache, documents - unowned)
        if unowned and conv_state is not None and state is not None:
            conv_state = _append_zeros(conv_state, unowned)
            state = _append_zeros(state, unowned)

        # A single token cut from a longer sequence keeps its strides, for which nn.Linear would
        # copy its whole weight before every product.
        x = x.reshape(-1).view(x.shape)
        streams = [self.q_proj(x), self.k_proj(x), self.v_proj(x)]
        gate_input, beta, gate = self.decay_input(x), self.b_proj(x), self.output_gate(x)
        one_token = cu_seqlens is None and not unowned and x.shape[1] == 1
        if one_token and cache is not None and conv_state is not None and state is not None:
            rows = (*streams, gate_input, beta, gate)
            decoded = self._decode(rows, conv_state, state, getattr(cache, "state_v_first", False))
            if decoded is not None:
                self._write_decoded(cache, conv_state, state)
                return self.o_proj(decoded)
        streams, conv_state = self._convolve(streams, conv_state, cu_seqlens, cache is not None)
        q, k, v = (stream.unflatten(-1, (-1, self.head_dim)) for stream in streams)
        A_log, dt_bias = self.decay_parameters()
        options: dict[str, Any] = {
            "cu_seqlens": cu_seqlens,
            "cu_seqlens_cpu": cu_seqlens_cpu,
            "A_log": A_log,
            "dt_bias": dt_bias,
            "lower_bound": self.lower_bound,
            "allow_neg_eigval": self.allow_neg_eigval,
            "state_v_first": getattr(cache, "state_v_first", False),
            "initial_state": state,
            "output_final_state": cache is not None,
        }
        if state is not None and not torch.is_grad_enabled():
            options["final_state"] = state  # in place: the cache's own memory, or a copy of it
        few = state is not None and x.shape[0] * x.shape[1] <= MAX_RECURRENT_TOKENS * documents
        kda = recurrent_kda if few else chunk_kda
        g = gate_input.unflatten(-1, (-1, self.head_dim))
        result = kda(q, k, v, g, beta, **options)

        if cache is not None:
            o, state = result
            self._write(cache, conv_state, state, documents - unowned)
        else:
            o = result
        gate = gate.unflatten(-1, (-1, self.head_dim))
        return self.o_proj(self.o_norm(o, gate).flatten(-2))

    def _decode(
        self, rows: tuple[Tensor, ...], conv_state: Tensor, state: Tensor, state_v_first: bool
    ) -> Tensor | None:
        """One token a document in one call; None where that call does not serve.

        rows: q, k, v, gate input, beta, output gate. Both states are updated in place.
        """
        x = rows[0]
        if torch.is_grad_enabled() or x.dtype not in FLOAT_DTYPES:
            return None
        if not x.is_cpu and not native_layer.has_kernels(x.device.type):
            return None
        weights = self.decode_weights()
        if weights is None or not (conv_state.is_contiguous() and state.is_contiguous()):
            return None
        if any(y.is_cpu != x.is_cpu for y in (*weights.convs, weights.norm)):
            return None
        if conv_state.dtype != x.dtype or conv_state.shape[2] != weights.convs[0].shape[1]:
            return None
        if any(y.dtype not in (x.dtype, torch.float32) for y in (state, *rows[3:])):
            return None
        q, k, v, g, beta, gate = rows
        q_weight, k_weight, v_weight = weights.convs
        A_log, dt_bias = self.decay_parameters()
        return kda_decode_step(
            q,
            k,
            v,
            g,
            beta,
            gate,
            conv_state,
            state,
            q_weight,
            k_weight,
            v_weight,
            A_log,
            dt_bias,
            weights.norm,
            norm_eps=weights.norm_eps,
            lower_bound=self.lower_bound,
            allow_neg_eigval=self.allow_neg_eigval,
            state_v_first=state_v_first,
        )

    def _convolve(
        self,
        streams: list[Tensor],
        state: Tensor | None,
        cu_seqlens: Tensor | None,
        output_final_state: bool,
    ) -> tuple[list[Tensor], Tensor | None]:
        """q, k and v through their convolutions; their windows share one [N, Cq + Ck + Cv, W]."""
        widths = [stream.shape[-1] for stream in streams]
        windows = [None] * 3 if state is None else state.split(widths, dim=1)
        done = [
            conv(stream, initial_state=window, cu_seqlens=cu_seqlens, output_final_state=True)
            if output_final_state
            else conv(stream, initial_state=window, cu_seqlens=cu_seqlens)
            for conv, stream, window in zip(self.short_convs(), streams, windows, strict=True)
        ]
        finals = [final for _, final in done if final is not None]
        return [y for y, _ in done], torch.cat(finals, dim=1) if finals else None

    def _check_input(self, x: Tensor) -> None:
        if not isinstance(x, Tensor):
            raise TypeError(f"hidden_states must be a torch.Tensor, got {type(x).__name__}")
        if x.dim() != 3 or x.shape[2] != self.hidden_size:
            raise ValueError(
                f"hidden_states must be [B, T, hidden={self.hidden_size}], "
                f"got shape {tuple(x.shape)}"
            )
        if x.dtype not in FLOAT_DTYPES:
            raise TypeError(f"hidden_states must be fp16, bf16 or fp32, got {x.dtype}")

    def _check_cache(self, cache: LinearCache) -> None:
        if not hasattr(cache, "get_recurrent_state"):
            raise TypeError(
                "cache must be a mate.layers.KDACache or a transformers Cache, "
                f"got {type(cache).__name__}"
            )
        if self.layer_idx is None:
            raise ValueError(
                "cache was given to a layer with layer_idx=None: give every layer of a model its "
                "own layer_idx, by which the cache tells their states apart"
            )
        recording = getattr(cache, "is_recording_past", None)
        if recording is not None and recording(self.layer_idx):
            raise ValueError(
                "cache records its past to be rolled back (assisted or prompt-lookup decoding), "
                "which a recurrent state cannot be: expected a cache that does not, got "
                f"{type(cache).__name__} after activate_past_recording()"
            )

    def _read(
        self, cache: LinearCache | None, documents: int
    ) -> tuple[Tensor | None, Tensor | None]:
        if cache is None or self.layer_idx is None:
            return None, None
        conv_state = cache.get_conv_state(self.layer_idx)
        state = cache.get_recurrent_state(self.layer_idx)
        if state is None or conv_state is None:
            return None, None
        if state.shape[0] != documents:
            raise ValueError(
                f"cache holds {state.shape[0]} documents for layer {self.layer_idx}, "
                f"this call brings {documents}"
            )
        if torch.is_grad_enabled() or _is_frozen(state):
            # A cache that writes in place would overwrite what the backward pass needs.
            state, conv_state = state.clone(), conv_state.clone()
        return conv_state, state

    def _write(
        self, cache: LinearCache, conv_state: Tensor | None, state: Tensor, documents: int
    ) -> None:
        assert self.layer_idx is not None and conv_state is not None
        width = conv_state.shape[-1]
        cache.update_conv_state(conv_state[:documents], self.layer_idx, conv_kernel_size=width)
        cache.update_recurrent_state(state[:documents], self.layer_idx)

    def _write_decoded(self, cache: LinearCache, conv_state: Tensor, state: Tensor) -> None:
        """The states were updated in place: news only to a cache that does not hold these."""
        assert self.layer_idx is not None
        held = cache.get_conv_state(self.layer_idx), cache.get_recurrent_state(self.layer_idx)
        if held[0] is not conv_state or held[1] is not state:
            self._write(cache, conv_state, state, state.shape[0])


def _is_frozen(state: Tensor) -> bool:
    """Whether the state comes from inference mode, and this call does not."""
    if torch.compiler.is_compiling():
        return False
    return state.is_inference() and not torch.is_inference_mode_enabled()


def _append_zeros(state: Tensor, count: int) -> Tensor:
    return torch.cat([state, state.new_zeros(count, *state.shape[1:])])
