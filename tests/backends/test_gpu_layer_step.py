"""One token through a whole layer in one call: on an emulated GPU, and on a real one."""

from typing import Any

import gpu_host
import pytest
import torch
from gpu_machines import Emulated
from kda_cases import rel_rms
from test_native_layer import ROUNDING, WEIGHTS, Guarded, decode_truth, draw_step
from torch import Tensor

import mate
from mate.backends import native, native_layer
from mate.functional import layer_step
from mate.functional.decode_step import kernel_arguments
from mate.functional.layer_step import Projections, kda_layer_step
from mate.functional.repeated import Remembered

bf16, fp16 = torch.bfloat16, torch.float16
OPTIONS = (1e-5, None, False, True)  # norm_eps, lower_bound, allow_neg_eigval, state_v_first


def draw_layer(
    batch: int, heads: tuple[int, int], hidden: int, rank: int, dtype: torch.dtype
) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
    """x, the projections' weights and everything else, by draw_step's names."""
    t = draw_step(batch, heads, dtype=dtype)
    keys, values = heads[0] * 128, heads[1] * 128
    shapes = {name: (n, hidden) for name, n in (("q", keys), ("k", keys), ("v", values))}
    shapes |= {"f_a": (rank, hidden), "g_a": (rank, hidden), "b": (heads[1], hidden)}
    shapes |= {"f_b": (values, rank), "g_b": (values, rank), "o": (hidden, values)}
    weights = {n: (torch.randn(s) * 1.5 * s[1] ** -0.5).to(dtype) for n, s in shapes.items()}
    return torch.randn(batch, hidden).to(dtype), weights, t


def truth(x: Tensor, w: dict[str, Tensor], t: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Output, windows and states in float64; what projections hand on is rounded."""

    def product(y: Tensor, name: str) -> Tensor:
        return (y.double() @ w[name].double().T).to(x.dtype)

    rows = {"q": "q", "k": "k", "v": "v", "beta": "b"}
    t = t | {name: product(x, weight) for name, weight in rows.items()}
    t["g"], t["output_gate"] = product(product(x, "f_a"), "f_b"), product(product(x, "g_a"), "g_b")
    o, window, state = decode_truth(t, None, False, True)
    return o.to(x.dtype).double() @ w["o"].double().T, window, state


def fields_of(
    x: Tensor, w: dict[str, Tensor], t: dict[str, Tensor], y: Tensor, indices: Tensor | None = None
) -> list[Any]:
    """Of mate_layer_step_args, without a workspace."""
    batch, hidden = x.shape
    rows = [x.new_empty(batch, w[name].shape[0]) for name in ("q", "k", "v", "f_b", "b", "g_b")]
    weights = [t[name] for name in WEIGHTS]
    decode = (*rows, t["conv_state"], t["state"], *weights[:3], t["A_log"], t["dt_bias"])
    decode += (weights[3], indices)
    code = native.DTYPE_CODES[x.dtype]
    return [
        x.data_ptr(), x.stride(0), code, y.data_ptr(), hidden, code,
        *(w[name].data_ptr() for name in Projections._fields), 0, hidden, w["f_a"].shape[0],
        *native_layer.decode_fields(*kernel_arguments(decode, rows[2], *OPTIONS)),
    ]  # fmt: skip


def run_emulated(
    machine: Emulated,
    x: Tensor,
    w: dict[str, Tensor],
    t: dict[str, Tensor],
    indices: Tensor | None = None,
) -> Tensor:
    y = torch.full_like(x, torch.nan)
    fields = fields_of(x, w, t, y, indices)
    size = machine.lib.mate_gpu_layer_step_workspace(native_layer.LAYER_STEP.pack(*fields))
    assert size > 0 and size % 16 == 0
    room = torch.full((size + 1024,), 255, dtype=torch.uint8)
    start = -room.data_ptr() % 16 + 256
    fields[15] = room.data_ptr() + start
    assert machine.lib.mate_gpu_layer_step(native_layer.LAYER_STEP.pack(*fields), None) == 0
    assert (room[:start] == 255).all() and (room[start + size :] == 255).all()
    return y


@pytest.mark.parametrize(
    "batch, heads, hidden, rank, dtype, shift",
    [
        (1, (2, 2), 264, 128, bf16, 0),
        (2, (1, 2), 1032, 128, fp16, 1),  # nothing at multiples of 16 bytes
        (3, (1, 3), 40, 24, bf16, 0),
        (4, (2, 2), 8, 136, fp16, 0),
    ],
)
def test_emulated(
    batch: int,
    heads: tuple[int, int],
    hidden: int,
    rank: int,
    dtype: torch.dtype,
    shift: int,
    emulated: Emulated,
) -> None:
    x, w, t = draw_layer(batch, heads, hidden, rank, dtype)
    expected = truth(x, w, t)
    guard = Guarded()
    t = {name: guard(value) for name, value in t.items()}
    w = {name: gpu_host.guarded(value, shift=shift)[0] for name, value in w.items()}
    x = gpu_host.guarded(x, shift=shift)[0]
    y = run_emulated(emulated, x, w, t)
    guard.check()
    for found, exact in zip((y, t["conv_state"], t["state"]), expected, strict=True):
        assert rel_rms(found, exact) < 2 * ROUNDING[dtype]


def test_emulated_slots_of_a_pool(emulated: Emulated) -> None:
    x, w, t = draw_layer(3, (1, 1), 72, 128, bf16)
    indices = [4, -1, 0]
    pools = {n: torch.randn(5, *t[n].shape[1:]).to(t[n].dtype) for n in ("conv_state", "state")}
    own = {n: torch.stack([p[4], torch.zeros_like(p[0]), p[0]]) for n, p in pools.items()}
    expected = truth(x, w, t | own)
    before = {name: pool.clone() for name, pool in pools.items()}
    y = run_emulated(emulated, x, w, t | pools, torch.tensor(indices))
    assert rel_rms(y, expected[0]) < 2 * ROUNDING[bf16]
    for found, exact in zip(pools.values(), expected[1:], strict=True):
        assert rel_rms(found[[4, 0]], exact[[0, 2]]) < 2 * ROUNDING[bf16]
    for name, pool in pools.items():
        assert torch.equal(pool[1:4], before[name][1:4])


@pytest.mark.parametrize("batch, hidden, rank", [(5, 16, 8), (1, 20, 8), (1, 16, 12)])
def test_what_is_not_served(batch: int, hidden: int, rank: int, emulated: Emulated) -> None:
    """Five rows; rows that are no multiple of 16 bytes."""
    x, w, t = draw_layer(batch, (1, 1), hidden, rank, bf16)
    y = torch.full_like(x, torch.nan)
    packed = native_layer.LAYER_STEP.pack(*fields_of(x, w, t, y))
    assert emulated.lib.mate_gpu_layer_step_workspace(packed) == -1
    assert emulated.lib.mate_gpu_layer_step(packed, None) == 2  # MATE_UNSUPPORTED
    assert y.isnan().all()


@pytest.mark.skipif(
    not torch.cuda.is_available(), reason="PyTorch finds no CUDA device on this machine"
)
@pytest.mark.parametrize("dtype", [fp16, bf16], ids=str)
@pytest.mark.parametrize("batch", [1, 2, 3, 4])
@pytest.mark.parametrize("heads, hidden", [((2, 4), 264), ((3, 3), 1032)])
@torch.no_grad()
def test_on_a_gpu(
    batch: int,
    heads: tuple[int, int],
    hidden: int,
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two steps, the second one by what is remembered of the first; from odd addresses too."""
    choice = mate.backend_for("cuda", dtype, recurrent=True)
    assert choice.name == "native", choice.refusals
    made, of = [], layer_step._LayerStep.of
    monkeypatch.setattr(layer_step._LayerStep, "of", lambda *args: made.append(1) or of(*args))
    monkeypatch.setattr(layer_step, "_repeated", Remembered())

    def there(x: Tensor, shift: int) -> Tensor:
        return torch.cat([x.new_zeros(shift), x.flatten()]).cuda()[shift:].view(x.shape)

    for shift in (0, 1):
        x, w, t = draw_layer(batch, heads, hidden, 128, dtype)
        projections = Projections(*(there(w[name], shift) for name in Projections._fields))
        on_gpu = {name: value.cuda() for name, value in t.items()}
        convs = [on_gpu[name] for name in WEIGHTS[:3]]
        for _ in range(2):
            x = torch.randn(batch, hidden).to(dtype)
            expected, t["conv_state"], t["state"] = truth(x, w, t)
            y = kda_layer_step(
                there(x[:, None], shift), projections, on_gpu["conv_state"], on_gpu["state"],
                convs, on_gpu["A_log"], on_gpu["dt_bias"], on_gpu["norm_weight"], OPTIONS,
            )  # fmt: skip
            assert y is not None and rel_rms(y[:, 0].cpu(), expected) < 2 * ROUNDING[dtype]
        for name in ("conv_state", "state"):
            assert rel_rms(on_gpu[name].cpu(), t[name]) < 2 * ROUNDING[dtype]
    assert len(made) == 1
