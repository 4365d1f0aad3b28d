"""mate's kernels in models that transformers brings: a class swap, layer by layer.

A family is one entry of :data:`FAMILIES` and one subclass of :class:`TransformersMixer`.
"""

import importlib
from types import MethodType
from typing import Any, NamedTuple, TypeVar

import transformers
from torch import Tensor, nn

from mate.functional.contract import HEAD_DIM
from mate.hf.packing import add_document_bounds, cu_seqlens_from_kwargs
from mate.layers.mixer import DeltaMixer

Model = TypeVar("Model", bound=nn.Module)
DECODER_ARGUMENTS = (
    "input_ids",
    "attention_mask",
    "position_ids",
    "past_key_values",
    "inputs_embeds",
    "use_cache",
)


class TransformersMixer(DeltaMixer):
    """transformers' side of a KDA layer: its forward signature, on mate's forward pass.

    A subclass inherits from the transformers layer as well, and adds nothing to an instance.
    """

    required: tuple[str, ...] = ()
    activation: str

    def forward(
        self,
        hidden_states: Tensor,
        cache_params: Any = None,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        cu_seqlens = cu_seqlens_from_kwargs(kwargs)
        if cu_seqlens is None:
            return self.mix(hidden_states, attention_mask, cache_params)
        packed = hidden_states.reshape(1, -1, hidden_states.shape[-1])
        return self.mix(packed, attention_mask, cache_params, cu_seqlens).view_as(hidden_states)


class Family(NamedTuple):
    """Where transformers keeps a KDA layer, and which class of ours serves it."""

    modeling: str  # transformers' module
    layer: str  # its KDA layer
    model: str  # the decoder around it, which knows position_ids
    mixer: str  # our module, which defines "Mate" + layer


FAMILIES = (
    Family(
        modeling="transformers.models.kimi_linear.modeling_kimi_linear",
        layer="KimiLinearDeltaAttention",
        model="KimiLinearModel",
        mixer="mate.hf.kimi_linear",
    ),
)


def patch(model: Model) -> Model:
    """Serve the KDA layers of a loaded transformers model with mate's kernels, in place.

    What changes: speed and memory; right padding is kept out of the states; packed documents
    (``cu_seqlens``, ``cu_seq_lens_q``, ``seq_idx``, or ``position_ids`` that start over) are kept
    apart by KDA and attention layers, in calls without mask and cache; A_log and dt_bias are used
    in fp32. What does not: parameters and their names,
    ``state_dict``, saving, PEFT, caches (a patched model goes on with an unpatched one's cache).
    Patching twice is patching once. :func:`unpatch` undoes it.

    Args:
        model: Any module that contains KDA layers of a supported family (``kimi_linear``).

    Returns:
        The same model.

    Raises:
        TypeError: model is no module.
        ValueError: no KDA layer found, or one that the kernels cannot serve; nothing is changed.
        RuntimeError: the installed transformers' layer is not what mate knows.
    """
    _check_module(model)
    swaps = []
    patched = False
    for name, module in model.named_modules():
        patched = patched or isinstance(module, TransformersMixer)
        family = _family(module, "layer")
        if family is not None:
            swaps.append((module, _replacement(family, name, module)))
    if not swaps and not patched:
        served = ", ".join(family.layer for family in FAMILIES)
        raise ValueError(
            f"model must contain a KDA layer of transformers ({served}), "
            f"got {type(model).__name__} with none"
        )
    for module, replacement in swaps:
        _become(module, replacement)
    for module in model.modules():
        if _family(module, "model") and _find_documents not in module._forward_pre_hooks.values():
            module.register_forward_pre_hook(_find_documents, with_kwargs=True)
    return model


def unpatch(model: Model) -> Model:
    """Undo :func:`patch`, in place; a model that is not patched stays as it is.

    Returns:
        The same model.
    """
    _check_module(model)
    for module in model.modules():
        if isinstance(module, TransformersMixer):
            _become(module, type(module).__bases__[-1])
        for key, hook in list(module._forward_pre_hooks.items()):
            if hook is _find_documents:
                del module._forward_pre_hooks[key]
                module._forward_pre_hooks_with_kwargs.pop(key, None)
    return model


def _become(module: Any, cls: Any) -> None:
    module.__class__ = cls
    for name in ("forward", "_old_forward"):  # accelerate's hooks keep the bound method here
        if isinstance(vars(module).get(name), MethodType):
            setattr(module, name, MethodType(cls.forward, module))


def _check_module(model: Any) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")


def _family(module: nn.Module, role: str) -> Family | None:
    """The family whose ``role`` ("layer" or "model") this module plays."""
    cls = type(module)
    for family in FAMILIES:
        if cls.__module__ == family.modeling and cls.__name__ == getattr(family, role):
            return family
    return None


def _replacement(family: Family, name: str, module: nn.Module) -> type:
    replacement: type[TransformersMixer] = getattr(
        importlib.import_module(family.mixer), f"Mate{family.layer}"
    )
    missing = [path for path in replacement.required if not _has(module, path)]
    if missing:
        raise RuntimeError(
            f"transformers {transformers.__version__}: {family.layer} has no "
            f"{', '.join(missing)}, which mate.hf.patch reads; it is known to work with 5.23"
        )
    own = vars(module).get("_old_forward", vars(module).get("forward"))
    if own is not None and not isinstance(own, MethodType):
        raise ValueError(
            f"{name}.forward must be {family.layer}'s own, got a function set on the module by "
            "somebody else, which would be called in place of mate's"
        )
    head_dim, activation = module.head_dim, module.activation
    if head_dim != HEAD_DIM:
        raise ValueError(
            f"head_dim must be {HEAD_DIM} for mate's kernels, got {head_dim} in {name}"
        )
    if activation not in ("silu", "swish"):
        raise ValueError(f"the convolutions' activation must be silu, got {activation!r} in {name}")
    return replacement


def _has(module: Any, path: str) -> bool:
    for part in path.split("."):
        if not hasattr(module, part):
            return False
        module = getattr(module, part)
    return True


def _find_documents(
    module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Forward pre-hook of the decoder: KDA and attention layers get the same document bounds."""
    kwargs = dict(zip(DECODER_ARGUMENTS, args, strict=False)) | kwargs
    tokens = kwargs.get("inputs_embeds")
    if tokens is None:
        tokens = kwargs.get("input_ids")
    if tokens is None:
        return None
    batch, length = tokens.shape[:2]
    return (), add_document_bounds(kwargs, (batch, length), kwargs.get("attention_mask"))
