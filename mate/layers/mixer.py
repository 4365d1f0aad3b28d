"""The forward pass of a KDA layer, whoever owns the parameters.

:class:`DeltaMixer` is mixed into mate's own layer and into the layers of other libraries that
mate serves: it reads q_proj, k_proj, v_proj, b_proj, o_norm and o_proj by name, and the rest
through four small methods.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mate.backends import native_layer, pool
from mate.functional import chunk_kda, recurrent_kda
from mate.functional.contract import FLOAT_DTYPES, check_cu_seqlens_form
from mate.functional.decode_step import first_decode_step, repeat_decode_step
from mate.functional.layer_step import Projections, kda_layer_step
from mate.layers.cache import LinearCache, check_pool_tensor
from mate.layers.documents import pack, trailing_mask
from mate.layers.projections import FusedProjections, is_plain, weights_of

__all__ = ["DecodeWeights", "DeltaMixer", "is_plain"]

MAX_RECURRENT_TOKENS = 16


class DecodeWeights(NamedTuple):
    """What a fused decode step reads of the small modules instead of calling them."""

    convs: Sequence[Tensor]  # of q, k and v, [C, W] or [C, 1, W]
    norm: Tensor
    norm_eps: float


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
    _fused: FusedProjections | None = None

    def short_convs(self) -> Sequence[Callable[..., tuple[Tensor, Tensor | None]]]:
        """The convolutions of q, k and v, called like :func:`mate.functional.short_conv`."""
        raise NotImplementedError

    def low_rank_gates(self) -> tuple[tuple[Any, Any], tuple[Any, Any]]:
        """(down, up) projections of the decay's gate input and of the output gate's logit."""
        raise NotImplementedError

    def decay_parameters(self) -> tuple[Tensor, Tensor]:
        """A_log [Hv] and dt_bias [Hv * K] in fp32."""
        raise NotImplementedError

    def decode_weights(self) -> DecodeWeights | None:
        """For the fused decode step; None: the modules must be called one by one."""
        return None

    def fuse_projections(self) -> bool:
        """Make all projections but the last two matrix products at inference.

        Those of q, k, v, beta and both gates' first halves, which read the hidden state, become
        slices of one matrix in memory, both gates' second halves of another, and a call without
        gradients multiplies with these: two products instead of eight. Parameters,
        state dict and training stay as they are, and there is no second copy, but for a moment
        inside this call. It is for a layer that is where it will serve: loaded, on its device, in
        its dtype. No forward pass does it by itself, because swapping the memory under parameters
        would surprise whoever else holds on to it: an optimizer's flat buffers, sharding, a
        captured CUDA graph.

        A later ``.to`` keeps it, and leaves the memory alone where it changes neither dtype nor
        device; what puts other tensors in the parameters' place undoes it without harm
        (``load_state_dict(assign=True)``, a deep copy, an adapter, quantisation). Under autocast
        and ``torch.compile`` the projections are called one by one as before.

        Returns:
            Whether they are fused, and used so: not where one is no plain ``nn.Linear`` without a
            bias, has a hook, or differs in dtype or device.
        """
        linears = self._projections()
        possible = FusedProjections.possible(linears)
        if self._fused is not None and not self._fused.holds(linears):
            self._fused = None
        if self._fused is None and possible:
            self._fused = FusedProjections(linears)
        return possible  # a hook suspends what is fused: it may go again

    def _projections(self) -> list[Any]:
        """All but the last, in :class:`FusedProjections`' order."""
        (f_down, f_up), (g_down, g_up) = self.low_rank_gates()
        modules: Any = self._modules  # type: ignore[attr-defined]  # faster than nn.Module's own
        q, k, v, b = (
            modules["q_proj"], modules["k_proj"], modules["v_proj"], modules["b_proj"],
        )  # fmt: skip
        return [q, k, v, f_down, g_down, b, f_up, g_up]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """What .to comes down to: gives each parameter memory of its own, or leaves it alone.

        Where the weights stay, so must their addresses, which CUDA graphs and other processes know.
        """
        fused, self._fused = self._fused, None
        result = super()._apply(fn, recurse)  # type: ignore[misc]
        if fused is not None:
            linears = self._projections()
            if fused.holds(linears):
                self._fused = fused
            elif fused.moved(linears):
                del fused  # its matrix makes room for the new one
                self.fuse_projections()
        return result

    def _project(self, x: Tensor) -> tuple[Tensor, ...]:
        """q, k and v before their convolutions, the gate's input, beta, the output gate."""
        q, k, v, f_down, g_down, b, f_up, g_up = linears = self._projections()
        fused = self._fused
        if fused is not None and not _needs_modules():
            if fused.serves(linears):
                return fused.product(x)
            if not fused.holds(linears):
                self._fused = None
        # A single token cut from a longer sequence keeps its strides, for which nn.Linear would
        # copy its whole weight before every product.
        x = x.reshape(-1).view(x.shape)
        return q(x), k(x), v(x), f_up(f_down(x)), b(x), g_up(g_down(x))

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
        conv_state, state = self._read(cache, documents - unowned, x)
        slots = getattr(cache, "state_indices", None)
        if slots is not None:
            slots = F.pad(slots, (0, unowned), value=-1) if unowned else slots
        elif unowned and conv_state is not None and state is not None:
            conv_state = _append_zeros(conv_state, unowned)
            state = _append_zeros(state, unowned)

        v_first = getattr(cache, "state_v_first", False)
        one_token = cu_seqlens is None and not unowned and x.shape[1] == 1
        held = None  # what a decoding step updates
        if one_token and not torch.is_grad_enabled():
            held = None if conv_state is None or state is None else (conv_state, state)
        if cache is not None and held is not None:
            y = self._step(x, *held, v_first, slots)
            if y is not None:
                self._write_decoded(cache, *held)
                return y
        q, k, v, gate_input, beta, gate = self._project(x)
        if cache is not None and held is not None:
            rows = (q, k, v, gate_input, beta, gate)
            decoded = self._decode(rows, *held, v_first, slots)
            if decoded is not None:
                self._write_decoded(cache, *held)
                return self.o_proj(decoded)
        keeps = cache is not None
        streams, windows = self._convolve([q, k, v], conv_state, slots, cu_seqlens, keeps)
        q, k, v = (stream.unflatten(-1, (-1, self.head_dim)) for stream in streams)
        A_log, dt_bias = self.decay_parameters()
        options: dict[str, Any] = {
            "cu_seqlens": cu_seqlens,
            "cu_seqlens_cpu": cu_seqlens_cpu,
            "A_log": A_log,
            "dt_bias": dt_bias,
            "lower_bound": self.lower_bound,
            "allow_neg_eigval": self.allow_neg_eigval,
            "state_v_first": v_first,
            "initial_state": state,
            "output_final_state": keeps,
        }
        if state is not None and not torch.is_grad_enabled():
            options["final_state"] = state  # in place: the cache's own memory, or a copy of it
            options["state_indices"] = slots
        few = state is not None and _longest(x, cu_seqlens, cu_seqlens_cpu) <= MAX_RECURRENT_TOKENS
        kda = recurrent_kda if few else chunk_kda
        g = gate_input.unflatten(-1, (-1, self.head_dim))
        result = kda(q, k, v, g, beta, **options)

        if cache is not None:
            o, state = result
            if slots is None:
                self._write(cache, windows, state, documents - unowned)
            elif conv_state is not None and windows is not None:
                pool.scatter_(conv_state, slots, windows)
        else:
            o = result
        gate = gate.unflatten(-1, (-1, self.head_dim))
        return self.o_proj(self.o_norm(o, gate).flatten(-2))

    def _step(
        self,
        x: Tensor,
        conv_state: Tensor,
        state: Tensor,
        state_v_first: bool,
        slots: Tensor | None,
    ) -> Tensor | None:
        """One token of a few documents through the whole layer; None where that does not serve.

        From two documents on, fused projections leave the GPU less to do, if the host more.
        """
        if x.is_cpu or _needs_modules():
            return None
        most = 1 if self._fused is not None else native_layer.MAX_LAYER_STEP_BATCH
        if x.shape[0] > most:
            return None
        projections = weights_of([*self._projections(), self.o_proj])
        if projections is None:
            return None
        weights = self.decode_weights()
        if weights is None:
            return None
        return kda_layer_step(
            x,
            Projections(*projections),
            conv_state,
            state,
            weights.convs,
            *self.decay_parameters(),
            weights.norm,
            (weights.norm_eps, self.lower_bound, self.allow_neg_eigval, state_v_first),
            None if slots is None else slots.contiguous(),
        )

    def _decode(
        self,
        rows: tuple[Tensor, ...],
        conv_state: Tensor,
        state: Tensor,
        state_v_first: bool,
        slots: Tensor | None,
    ) -> Tensor | None:
        """One token a document in one call; None where that call does not serve.

        rows: q, k, v, gate input, beta, output gate. Both states are updated in place; with
        ``slots`` they are pools.
        """
        weights = self.decode_weights()
        if weights is None:
            return None
        slots = None if slots is None else slots.contiguous()
        tensors: tuple[Any, ...] = (
            *rows, conv_state, state, *weights.convs, *self.decay_parameters(), weights.norm, slots,
        )  # fmt: skip
        options = weights.norm_eps, self.lower_bound, self.allow_neg_eigval, state_v_first
        decoded = repeat_decode_step(tensors, options)
        if decoded is not None:
            return decoded
        x = rows[0]
        if x.dtype not in FLOAT_DTYPES:
            return None
        if not x.is_cpu and not native_layer.has_kernels(x.device):
            return None
        if not (conv_state.is_contiguous() and state.is_contiguous()):
            return None
        if any(y.is_cpu != x.is_cpu for y in (*weights.convs, weights.norm)):
            return None
        if conv_state.dtype != x.dtype or conv_state.shape[2] != weights.convs[0].shape[-1]:
            return None
        allowed = (x.dtype, torch.float32)
        if any(y.dtype not in allowed for y in (state, *rows[3:])):
            return None
        return first_decode_step(tensors, options)

    def _convolve(
        self,
        streams: list[Tensor],
        state: Tensor | None,
        slots: Tensor | None,
        cu_seqlens: Tensor | None,
        output_final_state: bool,
    ) -> tuple[list[Tensor], Tensor | None]:
        """q, k and v through their convolutions; their windows share one [N, Cq + Ck + Cv, W].

        With ``slots`` the state is a pool, which is read and not yet written.
        """
        if slots is not None and state is not None:
            state = pool.gather(state, slots)
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
        self, cache: LinearCache | None, documents: int, x: Tensor
    ) -> tuple[Tensor | None, Tensor | None]:
        if cache is None or self.layer_idx is None:
            return None, None
        conv_state = cache.get_conv_state(self.layer_idx)
        state = cache.get_recurrent_state(self.layer_idx)
        if state is None or conv_state is None:
            return None, None
        slots = getattr(cache, "state_indices", None)
        held = state.shape[0] if slots is None else slots.shape[0]
        if held != documents:
            raise ValueError(
                f"cache holds {held} documents for layer {self.layer_idx}, "
                f"this call brings {documents}"
            )
        if slots is not None:
            if torch.is_grad_enabled():
                raise ValueError(
                    "cache is a pool of states that is updated in place, which autograd cannot "
                    "follow: expected a call under torch.no_grad(), got gradients enabled"
                )
            self._check_pool(conv_state, state, slots, x)
            return conv_state, state
        if torch.is_grad_enabled() or _is_frozen(state):
            # A cache that writes in place would overwrite what the backward pass needs.
            state, conv_state = state.clone(), conv_state.clone()
        return conv_state, state

    def _check_pool(self, conv_state: Tensor, state: Tensor, slots: Tensor, x: Tensor) -> None:
        """An engine's own tensors: what is wrong with them must show before one is written."""
        of_layer: Any = getattr(self, "state_shapes", None)
        shapes = (conv_state.shape[1:], state.shape[1:]) if of_layer is None else of_layer()
        # Autocast, which cannot be asked for while compiling, decides the projections' dtype.
        casts = torch.compiler.is_compiling() or torch._C._is_any_autocast_enabled()
        own = FLOAT_DTYPES if casts else (x.dtype,)
        for name, states, shape, dtypes in (
            ("conv_states", conv_state, shapes[0], own),
            ("recurrent_states", state, shapes[1], (*own, torch.float32)),
        ):
            name = f"{name} of layer_idx={self.layer_idx}"
            check_pool_tensor(name, states, (*conv_state.shape[:1], *shape), dtypes, x.device)
            if _is_frozen(states):
                raise ValueError(
                    f"{name} must be a normal tensor to be updated outside of inference mode, "
                    "got one made in it: make it under torch.inference_mode(False)"
                )
        if slots.device != x.device:
            raise ValueError(f"state_indices must be on {x.device}, got {slots.device}")

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


def _longest(x: Tensor, cu_seqlens: Tensor | None, cu_seqlens_cpu: Tensor | None) -> int:
    """The most tokens that a document can have, by what the host knows."""
    if cu_seqlens is not None and cu_seqlens_cpu is None and cu_seqlens.is_cpu:
        cu_seqlens_cpu = cu_seqlens
    if cu_seqlens_cpu is None or cu_seqlens_cpu.shape[0] < 2 or torch.compiler.is_compiling():
        return x.shape[1]
    return int((cu_seqlens_cpu[1:] - cu_seqlens_cpu[:-1]).max())


def _needs_modules() -> bool:
    """Whether a projection must be its module's own call: for gradients, casts, the compiler."""
    if torch.compiler.is_compiling() or torch.is_grad_enabled():
        return True
    return torch._C._is_any_autocast_enabled()


def _is_frozen(state: Tensor) -> bool:
    """Whether the state comes from inference mode, and this call does not."""
    if torch.compiler.is_compiling():
        return False
    return state.is_inference() and not torch.is_inference_mode_enabled()


def _append_zeros(state: Tensor, count: int) -> Tensor:
    return torch.cat([state, state.new_zeros(count, *state.shape[1:])])
