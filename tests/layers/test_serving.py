"""Serving: slots of a pool, prompts and decoding steps in one call, one product for projections."""

import copy
import gc
import io
import random
import re
import weakref
from pathlib import Path

import pytest
import torch
from kda_cases import rel_rms
from layer_truth import make_layer, truth
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from mate.backends import pool, pytorch
from mate.backends.call import KdaCall
from mate.functional import short_conv
from mate.layers import KDACache, StatePool, documents, fuse_projections
from mate.layers.mixer import DeltaMixer

HIDDEN = 48
fp32, bf16 = torch.float32, torch.bfloat16
BOUNDS = {fp32: 5e-6, bf16: 2e-2}


def packed(parts: list[Tensor]) -> tuple[Tensor, Tensor]:
    """[1, S, hidden] and cu_seqlens."""
    return torch.cat(parts)[None], torch.tensor([0, *(len(x) for x in parts)]).cumsum(0)


# ---- prompts and decoding steps in one call -----------------------------------------------------


@pytest.mark.parametrize("copy_on_cpu", [False, True])
def test_prompts_and_steps_in_one_call(copy_on_cpu: bool) -> None:
    """Sequences of 1, 700, 0 and 3 more tokens behind a cache, against each alone in float64."""
    layer = make_layer()
    torch.manual_seed(1)
    before, after = [5, 40, 7, 1, 0], [1, 300, 0, 3, 1]
    whole = [torch.randn(a + b, HIDDEN) for a, b in zip(before, after, strict=True)]
    cache = KDACache()
    with torch.no_grad():
        for lengths, start in ((before, [0] * 5), (after, before)):
            x, bounds = packed(
                [w[s : s + n] for w, s, n in zip(whole, start, lengths, strict=True)]
            )
            host = bounds.clone() if copy_on_cpu else None
            y = layer(x, cache=cache, cu_seqlens=bounds, cu_seqlens_cpu=host)
    for n, (w, part) in enumerate(zip(whole, y[0].split(after), strict=True)):
        expected, window, state = truth(layer, w)
        assert rel_rms(part, expected[before[n] :]) < 5e-6 if len(part) else True
        assert rel_rms(cache.get_conv_state(0)[n], window) < 1e-6
        assert rel_rms(cache.get_recurrent_state(0)[n], state) < 5e-6


# ---- a pool of states ---------------------------------------------------------------------------


class TwoLayers(nn.Module):
    def __init__(self, **options) -> None:
        super().__init__()
        self.layers = nn.ModuleList([make_layer(seed=i, **options) for i in range(2)])
        for i, layer in enumerate(self.layers):
            layer.layer_idx = 3 * i

    def forward(self, x: Tensor, **kwargs) -> Tensor:
        for layer in self.layers:
            x = x + layer(x, **kwargs)
        return x


class Engine:
    """Continuous batching: sequences join, take their prompt in pieces, decode, and leave."""

    def __init__(self, model: nn.Module, states: StatePool, sequences: list[Tensor]) -> None:
        self.model, self.states = model, states
        self.waiting = list(enumerate(sequences))
        self.running: dict[int, dict] = {}
        self.results: dict[int, list[Tensor]] = {}

    def step(self, draw: random.Random) -> None:
        while self.waiting and self.states.available and draw.random() < 0.7:
            n, x = self.waiting.pop()
            self.running[n] = {"x": x, "seen": 0, "slot": self.states.allocate()}
            self.results[n] = []
        chosen = [n for n in self.running if draw.random() < 0.8]
        draw.shuffle(chosen)
        if draw.random() < 0.5:
            self.decode(chosen)
        else:
            self.mixed(chosen, draw)
        for n in [n for n, s in self.running.items() if s["seen"] == len(s["x"])]:
            self.states.free(self.running.pop(n)["slot"])

    def decode(self, chosen: list[int]) -> None:
        """One token a row, in a batch of a fixed size of 6."""
        chosen = chosen[:6]
        rows = [self.take(n, 1) for n in chosen]
        x = torch.cat([*rows, *(torch.randn(1, HIDDEN) for _ in range(6 - len(rows)))])[:, None]
        slots = [self.running[n]["slot"] for n in chosen] + [-1] * (6 - len(rows))
        y = self.model(x.to(rows[0].dtype if rows else x.dtype), cache=self.states.batch(slots))
        for n, row in zip(chosen, y, strict=False):
            self.results[n].append(row)

    def mixed(self, chosen: list[int], draw: random.Random) -> None:
        lengths = [draw.choice([1, 1, 2, 17, 40]) for _ in chosen]
        parts = [self.take(n, length) for n, length in zip(chosen, lengths, strict=True)]
        if not parts:
            return
        x, bounds = packed(parts)
        slots = torch.tensor([self.running[n]["slot"] for n in chosen], dtype=torch.int32)
        y = self.model(x, cache=self.states.batch(slots), cu_seqlens=bounds)[0]
        for n, part in zip(chosen, y.split([len(p) for p in parts]), strict=True):
            self.results[n].append(part)

    def take(self, n: int, length: int) -> Tensor:
        sequence = self.running[n]
        start = sequence["seen"]
        sequence["seen"] = min(start + length, len(sequence["x"]))
        return sequence["x"][start : sequence["seen"]]


@pytest.mark.parametrize("native", [True, False], ids=["native", "pytorch"])
@pytest.mark.parametrize("dtype, state", [(fp32, fp32), (bf16, fp32), (bf16, bf16)], ids=str)
def test_continuous_batching(
    dtype: torch.dtype, state: torch.dtype, native: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sequences that join and leave, in slots used again, against each alone."""
    if not native:
        monkeypatch.setenv("MATE_DISABLE", "native")
    model = TwoLayers(num_v_heads=4).to(dtype)
    torch.manual_seed(2)
    draw = random.Random(0)
    sequences = [torch.randn(draw.choice([1, 5, 30, 60]), HIDDEN).to(dtype) for _ in range(9)]
    states = StatePool.for_model(model, slots=4, state_dtype=state)
    engine = Engine(model, states, sequences)
    with torch.no_grad():
        while engine.waiting or engine.running:
            engine.step(draw)
        assert states.available == 4
        for n, x in enumerate(sequences):
            alone = model(x[None], cache=KDACache())[0]
            assert rel_rms(torch.cat(engine.results[n]), alone) < BOUNDS[dtype]


def test_a_pool_is_what_a_cache_is() -> None:
    """Bit for bit in a decoding step, and other slots stay as they were."""
    layer = make_layer()
    torch.manual_seed(3)
    x, cache = torch.randn(3, 9, HIDDEN), KDACache()
    states = StatePool.for_model(layer, slots=5)
    for tensor in (t for pair in states._states.values() for t in pair):
        tensor.fill_(torch.nan)
    slots = [states.allocate() for _ in range(3)]
    batch = states.batch(torch.tensor(slots, dtype=torch.int32))
    with torch.no_grad():
        assert rel_rms(layer(x[:, :8], cache=batch), layer(x[:, :8], cache=cache)) < 1e-6
        batch.get_recurrent_state(0)[slots] = cache.get_recurrent_state(0)
        assert torch.equal(layer(x[:, 8:], cache=batch), layer(x[:, 8:], cache=cache))
    assert torch.equal(batch.get_conv_state(0)[slots], cache.get_conv_state(0))
    assert torch.equal(batch.get_recurrent_state(0)[slots], cache.get_recurrent_state(0))
    others = [i for i in range(5) if i not in slots]
    assert batch.get_recurrent_state(0)[others].isnan().all()
    assert batch.get_conv_state(0)[others].isnan().all()


@pytest.mark.parametrize("keep_shape", [False, True], ids=["cpu", "as on a gpu"])
def test_padded_prompts_into_a_pool(keep_shape: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = make_layer()
    x, mask = torch.randn(2, 6, HIDDEN), torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
    states = StatePool.for_model(layer, slots=3)
    if keep_shape:
        monkeypatch.setattr("torch.compiler.is_compiling", lambda: True)
    with torch.no_grad():
        y = layer(x, mask, cache=states.batch([2, 0]))
        expected = layer(x, mask, cache=(cache := KDACache()))
    assert rel_rms(y, expected) < 1e-6
    batch = states.batch([2, 0])
    assert rel_rms(batch.get_recurrent_state(0)[[2, 0]], cache.get_recurrent_state(0)) < 1e-6
    assert torch.count_nonzero(batch.get_recurrent_state(0)[1]) == 0


def test_hooks_leave_a_pool_to_the_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = make_layer()
    x, results = torch.randn(2, 5, HIDDEN), []
    for fused in (True, False):
        states = StatePool.for_model(layer, slots=4)
        if not fused:
            monkeypatch.setattr(DeltaMixer, "_decode", lambda *_: None)
        batch = states.batch([3, 1])
        with torch.no_grad():
            y = torch.cat([layer(x[:, i : i + 1], cache=batch) for i in range(5)], dim=1)
        results.append((y, batch.get_conv_state(0), batch.get_recurrent_state(0)))
    for a, b in zip(*results, strict=True):
        assert rel_rms(a, b) < 2e-6


def test_an_engines_own_tensors() -> None:
    layer = make_layer()
    (channels, width), recurrent = layer.state_shapes()
    conv, state = torch.zeros(3, channels, width), torch.zeros(3, *recurrent)
    x = torch.randn(1, 4, HIDDEN)
    with torch.no_grad():
        layer(x, cache=StatePool({0: (conv, state)}).batch([1]))
        layer(x, cache=(cache := KDACache()))
    assert rel_rms(state[1:2], cache.get_recurrent_state(0)) < 1e-6
    assert torch.equal(conv[1:2], cache.get_conv_state(0))


def test_slots_are_given_and_taken_back() -> None:
    states = StatePool.for_model(make_layer(), slots=2)
    a, b = states.allocate(), states.allocate()
    assert {a, b} == {0, 1} and states.available == 0
    with pytest.raises(RuntimeError, match="all 2 slots are taken"):
        states.allocate()
    states.free(a)
    for slot in (a, 2, -1):
        with pytest.raises(ValueError, match=f"slot must be one that is taken, got {slot}"):
            states.free(slot)
    assert states.allocate() == a


def test_errors_of_a_pool() -> None:
    layer, x = make_layer(), torch.randn(2, 1, HIDDEN)
    states = StatePool.for_model(layer, slots=4)
    for match, call in (
        ("cache holds 1 documents.*this call brings 2", lambda: layer(x, cache=states.batch([1]))),
        ("state_indices .*slot of its own, got 1 twice",
         lambda: layer(x, cache=states.batch([1, 1]))),
        ("cache has no states for layer_idx=7, only for .0.",
         lambda: states.batch([0]).get_conv_state(7)),
        ("states must hold .*got .* slots in 0 layers", lambda: StatePool({})),
        ("states must hold .*got .2, 3. slots",
         lambda: StatePool({0: (torch.zeros(2), torch.zeros(3))})),
        ("layer_idx of its own, got 0", lambda: StatePool.for_model(
            nn.ModuleList([layer, copy.deepcopy(layer)]), 2)),
        ("model must .*KimiDeltaAttention, got Linear with none",
         lambda: StatePool.for_model(nn.Linear(1, 1), 2)),
    ):  # fmt: skip
        with torch.no_grad(), pytest.raises(ValueError, match=match):
            call()
    with pytest.raises(ValueError, match="cache is a pool.*no_grad"):
        layer(x, cache=states.batch([1, 2]))


@pytest.mark.parametrize(
    "slots, error, message",
    [
        (3, TypeError, "sequence of integers .*got 3"),
        ([[1, 2]], TypeError, r"sequence of integers .*got \[1, 2\]"),
        ([0, 1.7], TypeError, "sequence of integers .*got 1.7"),
        ([True], TypeError, "sequence of integers .*got True"),
        (torch.tensor([1.0]), TypeError, "torch.int32 or torch.int64, got torch.float32"),
        (torch.tensor([True]), TypeError, "torch.int32 or torch.int64, got torch.bool"),
        (torch.tensor(3), ValueError, r"\[N\], got shape \(\)"),
        (torch.tensor([[1, 2]]), ValueError, r"\[N\], got shape \(1, 2\)"),
        (torch.tensor([1], device="meta"), ValueError, "on cpu like the states, got meta"),
    ],
    ids=str,
)
def test_slots_of_a_batch_are_integers(slots, error, message: str) -> None:
    states = StatePool.for_model(make_layer(), slots=4)
    with pytest.raises(error, match="slots must be .*" + message):
        states.batch(slots)
    assert states.batch([]).state_indices.dtype == torch.int64


def test_what_cannot_be_freed() -> None:
    states = StatePool.for_model(make_layer(), slots=2)
    slot = states.allocate()
    for wrong in (torch.tensor(slot), float(slot), False, None):
        with pytest.raises(TypeError, match="slot must be an integer, got"):
            states.free(wrong)
    with pytest.raises(ValueError, match="slot must be one that is taken, got 2 in a pool of 2"):
        states.free(2)
    states.free(slot)
    with pytest.raises(ValueError, match=f"slot must be .*taken, got {slot}, which is free"):
        states.free(slot)
    assert states.available == 2


WRONG_STATES = {
    "another W": (0, lambda x: x.new_zeros(3, 768, 5), ValueError, r"\[3, 768, 4\].*\(3, 768, 5\)"),
    "another C": (0, lambda x: x[:, 1:], ValueError, r"\[3, 768, 4\].*\(3, 767, 4\)"),
    "expanded": (
        0,
        lambda x: x[:1].expand(3, -1, -1),
        ValueError,
        r"expanded.*strides \(0, 4, 1\)",
    ),
    "windows elsewhere": (0, lambda x: x.to("meta"), ValueError, "on cpu .*got meta"),
    "windows in bf16": (0, Tensor.bfloat16, TypeError, "be torch.float32, got torch.bfloat16"),
    "another Hv": (1, lambda x: x[:, :1], ValueError, r"\[3, 2, 128, 128\].*\(3, 1, 128, 128\)"),
    "one state": (1, lambda x: x[:1].expand(3, -1, -1, -1), ValueError, "not be an expanded"),
    "states elsewhere": (1, lambda x: x.to("meta"), ValueError, "on cpu .*got meta"),
    "states in fp64": (1, Tensor.double, TypeError, "be torch.float32, got torch.float64"),
}


@pytest.mark.parametrize("tokens", [1, 4])
@pytest.mark.parametrize("name", WRONG_STATES)
def test_an_engines_wrong_tensors(name: str, tokens: int) -> None:
    """Refused before anything is written."""
    layer = make_layer()
    which, spoil, error, message = WRONG_STATES[name]
    pair = [torch.zeros(3, *shape) for shape in layer.state_shapes()]
    good, pair[which] = pair[1 - which], spoil(pair[which])
    of = ("conv_states", "recurrent_states")[which] + " of layer_idx=0 must .*"
    batch = StatePool({0: (pair[0], pair[1])}).batch([1])
    with torch.no_grad(), pytest.raises(error, match=of + message):
        layer(torch.randn(1, tokens, HIDDEN), cache=batch)
    assert not good.any() and (pair[which].is_meta or not pair[which].any())


def test_a_pool_and_autocast() -> None:
    """Windows in the parameters' dtype serve projections that autocast rounds."""
    layer, x = make_layer(), torch.randn(2, 5, HIDDEN)
    batch = StatePool.for_model(layer, slots=3).batch([2, 0])
    with torch.no_grad(), torch.autocast("cpu", dtype=bf16):
        parts = [layer(part, cache=batch) for part in (x[:, :4], x[:, 4:])]
        assert rel_rms(torch.cat(parts, dim=1), layer(x)) < BOUNDS[bf16]


def test_a_pool_made_in_inference_mode() -> None:
    layer, x = make_layer(), torch.randn(1, 4, HIDDEN)
    with torch.inference_mode():
        states = StatePool.for_model(layer, slots=2)
        layer(x, cache=states.batch([states.allocate()]))
    with torch.no_grad():
        batch = states.batch([states.allocate()])
        y = torch.cat([layer(part, cache=batch) for part in (x[:, :3], x[:, 3:])], dim=1)
        assert rel_rms(y, layer(x)) < 2e-6


@pytest.mark.parametrize("which, name", [(0, "conv_states"), (1, "recurrent_states")])
def test_frozen_tensors_of_an_engine(which: int, name: str) -> None:
    """They serve in inference mode; outside of it nothing is written."""
    layer, x = make_layer(), torch.randn(1, 1, HIDDEN)
    pair = [torch.zeros(3, *shape) for shape in layer.state_shapes()]
    with torch.inference_mode():
        pair[which] = pair[which].clone()
    states = StatePool({0: (pair[0], pair[1])})
    message = f"{name} of layer_idx=0 must be a normal tensor"
    for tokens in (x, x.expand(1, 4, -1)):
        with torch.no_grad(), pytest.raises(ValueError, match=message):
            layer(tokens, cache=states.batch([1]))
    assert not pair[0].any() and not pair[1].any()
    with torch.no_grad(), pytest.raises(RuntimeError, match="inference tensor"):
        states.allocate()
    assert states.available == 3
    with torch.inference_mode():
        layer(x, cache=states.batch([states.allocate()]))
    assert states.available == 2 and pair[0].any() and pair[1].any()


# ---- nothing waits for a GPU --------------------------------------------------------------------


class NoHostReads(TorchDispatchMode):
    """Fails where the host would wait for a GPU, had the tensors of ``device`` been there."""

    forbidden = ("_local_scalar_dense", "nonzero", "is_nonzero", "item", "masked_select")

    def __init__(self, device: str) -> None:
        super().__init__()
        self.device = device

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        there = [x for x in args if isinstance(x, Tensor) and x.device.type == self.device]
        name = func.overloadpacket.__name__
        if there:
            assert name not in self.forbidden and "unique" not in name, f"{name} waits"
        if there and name in ("_to_copy", "copy_"):
            devices = {x.device for x in args if isinstance(x, Tensor)}
            devices.add((kwargs or {}).get("device") or there[0].device)
            assert len(devices) == 1, "a copy between devices waits"
        if there and name in ("index", "index_put_"):
            masks = [i for i in args[1] if i is not None and i.dtype in (torch.bool, torch.uint8)]
            assert not masks, "a mask as index waits"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("fused", [False, True])
def test_the_layer_reads_nothing_from_a_device(fused: bool) -> None:
    """On the meta device, whose tensors have no values: prompt, step, packed, padded, in slots."""
    layer = make_layer().to("meta")
    if fused:
        layer.fuse_projections()
    states = StatePool.for_model(layer, slots=6)
    on_host = torch.tensor([0, 1, 1, 8])
    bounds, mask = on_host.to("meta"), torch.ones(2, 4, dtype=torch.int64, device="meta")
    x, row = (torch.randn(*shape, HIDDEN, device="meta") for shape in ((2, 4), (1, 8)))
    two, three = (states.batch(torch.tensor(s).to("meta")) for s in ([3, 1], [5, 0, -1]))
    for dense, varlen in ((KDACache(), KDACache()), (two, three)):
        with torch.no_grad(), NoHostReads("meta"):
            for _ in range(2):  # into an empty cache, and on
                for length in (4, 1):
                    assert layer(x[:, :length], cache=dense).shape == (2, length, HIDDEN)
                layer(x, mask, cache=dense)
                layer(row, cache=varlen, cu_seqlens=bounds)
                layer(row, cache=varlen, cu_seqlens=bounds, cu_seqlens_cpu=on_host)


def test_the_parts_in_pytorch_read_nothing_from_a_device() -> None:
    """What the meta device leaves out: the implementations behind the operators."""
    torch.manual_seed(0)
    q, k, v, g = torch.randn(4, 3, 5, 2, 128)
    states, slots = torch.randn(6, 2, 128, 128), torch.tensor([4, -1, 0])
    before = states.clone()
    call = KdaCall(
        q, k, v, g, torch.randn(3, 5, 2), 0.1, states, None, None, None, None, None,
        True, True, False, True, True, slots, torch.empty(3, 5, 2, 128, 128),
    )  # fmt: skip
    x, bounds = torch.randn(1, 9, 6), torch.tensor([0, 4, 4, 9])
    with NoHostReads("cpu"):
        pytorch.forward(call, torch.empty_like(v), states)
        windows = pool.gather(torch.randn(6, 6, 4), slots)
        short_conv.in_pytorch(x, torch.randn(6, 4), windows, bounds, True)
        keep = documents.trailing_mask(torch.ones(3, 5, dtype=torch.int64), 3, 5)
        documents.pack(keep, keep_shape=True)
    assert torch.equal(states[[1, 2, 3, 5]], before[[1, 2, 3, 5]])
    assert not torch.equal(states[4], before[4]) and not torch.equal(states[0], before[0])
    with pytest.raises(AssertionError, match="_local_scalar_dense waits"), NoHostReads("cpu"):
        bool(torch.ones(1))  # the mode sees what it is to see


# ---- one product for the projections ------------------------------------------------------------


def decode_and_prefill(layer: nn.Module, x: Tensor) -> Tensor:
    cache = KDACache()
    with torch.no_grad():
        return torch.cat([layer(x[:, :-1], cache=cache), layer(x[:, -1:], cache=cache)], dim=1)


def count_products(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The columns of each matrix product's result from now on."""
    columns = []

    def counted(product):
        def run(*args):
            columns.append((y := product(*args)).shape[-1])
            return y

        return run

    for owner, name in ((F, "linear"), (torch, "mm"), (torch, "bmm")):
        monkeypatch.setattr(owner, name, counted(getattr(owner, name)))
    return columns


@pytest.mark.parametrize("dtype", [fp32, bf16], ids=str)
def test_fused_projections_change_nothing_else(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = make_layer(num_v_heads=4).to(dtype)
    torch.manual_seed(4)
    x = torch.randn(2, 6, HIDDEN).to(dtype)
    expected, parameters = decode_and_prefill(layer, x), dict(layer.named_parameters())
    state = {name: value.clone() for name, value in layer.state_dict().items()}
    products = count_products(monkeypatch)
    decode_and_prefill(layer, x)
    assert len(products) == 18
    assert layer.fuse_projections() and layer.fuse_projections()
    products.clear()
    assert rel_rms(decode_and_prefill(layer, x), expected) < {fp32: 2e-6, bf16: 1e-2}[dtype]
    assert len(products) == 6 and products.count(2 * 256 + 512 + 2 * 128 + 4) == 2
    assert all(p is parameters[name] for name, p in layer.named_parameters())
    found = layer.state_dict()
    assert list(found) == list(state) and all(torch.equal(found[n], state[n]) for n in state)
    assert all(p.requires_grad and p.is_leaf for p in layer.parameters())
    memory = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes()
              for p in layer.parameters()}  # fmt: skip
    assert sum(memory.values()) == sum(p.nbytes for p in layer.parameters())


def test_training_with_fused_projections() -> None:
    layers = [make_layer(), make_layer()]
    layers[1].fuse_projections()
    x = torch.randn(2, 5, HIDDEN)
    for layer in layers:
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
        for _ in range(2):
            layer(x).square().mean().backward()
            optimizer.step()
    for a, b in zip(layers[0].parameters(), layers[1].parameters(), strict=True):
        assert torch.equal(a, b) and torch.equal(a.grad, b.grad)
    outputs = [decode_and_prefill(layer, x) for layer in layers]
    assert rel_rms(outputs[1], outputs[0]) < 2e-6
    assert layers[1]._fused is not None


CHANGES = {
    "another parameter": lambda x: setattr(x, "k_proj", nn.Linear(HIDDEN, 256, bias=False)),
    "another weight": lambda x: setattr(x.b_proj, "weight", nn.Parameter(torch.randn(2, HIDDEN))),
    "another memory": lambda x: setattr(x.f_a_proj.weight, "data", torch.randn(128, HIDDEN)),
    "a bias": lambda x: setattr(x.k_proj, "bias", nn.Parameter(torch.randn(256))),
    "assigned": lambda x: x.load_state_dict(make_layer(seed=9).state_dict(), assign=True),
}
KEPT = {
    "loaded": lambda x: x.load_state_dict(make_layer(seed=9).state_dict()),
    "in place": lambda x: x.v_proj.weight.data.mul_(2),
    "no gradients": lambda x: x.requires_grad_(False),
    "there and back": lambda x: x.double().float(),
    "shared": nn.Module.share_memory,
}


@pytest.mark.parametrize("name", CHANGES | KEPT)
def test_fusion_follows_the_parameters(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What changes the parameters is always seen, and another tensor in one's place ends it."""
    layer, plain = make_layer(), make_layer()
    layer.fuse_projections()
    x = torch.randn(1, 4, HIDDEN)
    decode_and_prefill(layer, x)
    for each in (layer, plain):
        torch.manual_seed(5)
        (CHANGES | KEPT)[name](each)
    expected = decode_and_prefill(plain, x)
    assert rel_rms(decode_and_prefill(layer, x), expected) < 2e-6
    assert (layer._fused is not None) == (name in KEPT)
    possible = name != "a bias"
    assert layer.fuse_projections() == possible
    products = count_products(monkeypatch)
    assert rel_rms(decode_and_prefill(layer, x), expected) < 2e-6
    assert len(products) == (6 if possible else 18)


class LowRank(nn.Module):
    """What an adapter makes of a Linear."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base, self.down = base, nn.Linear(HIDDEN, base.out_features)

    @property
    def weight(self) -> Tensor:
        return self.base.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.down(x)


def test_adapters_and_hooks_are_called() -> None:
    layer, x, seen = make_layer(), torch.randn(1, 4, HIDDEN), []
    layer.fuse_projections()
    handle = layer.q_proj.register_forward_hook(lambda *_: seen.append(1))
    decode_and_prefill(layer, x)
    assert len(seen) == 2 and layer._fused is not None
    assert not layer.fuse_projections() and fuse_projections(layer) == 0
    handle.remove()
    assert layer.fuse_projections()
    decode_and_prefill(layer, x)
    assert len(seen) == 2
    before = decode_and_prefill(layer, x)
    layer.q_proj = LowRank(layer.q_proj)
    assert rel_rms(decode_and_prefill(layer, x), before) > 0.01
    assert not layer.fuse_projections()


def test_layers_that_cannot_be_fused() -> None:
    layer = make_layer()
    layer.b_proj = nn.Linear(HIDDEN, 2)
    assert not layer.fuse_projections()
    layer = make_layer()
    layer.b_proj.to(bf16)
    assert not layer.fuse_projections()
    layer = make_layer()
    layer.k_proj.weight = layer.q_proj.weight
    assert not layer.fuse_projections()


def test_autocast_and_compile_call_the_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = make_layer(), torch.randn(1, 4, HIDDEN)
    layer.fuse_projections()
    products = count_products(monkeypatch)
    with torch.no_grad(), torch.autocast("cpu", dtype=bf16):
        layer(x)
    assert len(products) == 9
    monkeypatch.undo()
    torch._dynamo.reset()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        assert rel_rms(compiled(x), layer(x)) < 2e-6


def test_copies_and_files_are_whole(tmp_path) -> None:
    layer, x = make_layer(), torch.randn(1, 4, HIDDEN)
    layer.fuse_projections()
    expected = decode_and_prefill(layer, x)
    twin = copy.deepcopy(layer)
    assert twin._fused is None and torch.equal(twin.q_proj.weight, layer.q_proj.weight)
    with torch.no_grad():
        twin.q_proj.weight.zero_()
    assert torch.equal(decode_and_prefill(layer, x), expected)
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    assert file.tell() < 1.1 * sum(p.nbytes for p in layer.parameters()) + 10_000
    file.seek(0)
    other = make_layer(seed=8)
    other.load_state_dict(torch.load(file))
    assert rel_rms(decode_and_prefill(other, x), expected) < 2e-6
    safetensors = pytest.importorskip("safetensors.torch")
    safetensors.save_file(layer.state_dict(), tmp_path / "layer.safetensors")
    other = make_layer(seed=8)
    other.load_state_dict(safetensors.load_file(tmp_path / "layer.safetensors"))
    assert rel_rms(decode_and_prefill(other, x), expected) < 2e-6
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    other = torch.load(file, weights_only=False)
    assert other._fused is None and rel_rms(decode_and_prefill(other, x), expected) < 2e-6


def test_moving_frees_the_matrix() -> None:
    layer = make_layer()
    layer.fuse_projections()
    matrix = weakref.ref(layer._fused.inputs.matrix)
    layer.to(bf16)
    gc.collect()
    assert matrix() is None and layer._fused.inputs.matrix.dtype == bf16


def test_what_moves_nothing_leaves_the_addresses() -> None:
    """Captured CUDA graphs and other processes know them."""
    layer = make_layer()
    layer.fuse_projections()
    for move in (lambda x: x.to("cpu"), nn.Module.float, nn.Module.share_memory, nn.Module.cpu):
        before, shared = [p.data_ptr() for p in layer.parameters()], layer.q_proj.weight.is_shared()
        move(layer)
        if move is nn.Module.share_memory:
            assert not shared
        else:
            assert [p.data_ptr() for p in layer.parameters()] == before
        assert layer._fused is not None
    assert all(p.is_shared() for p in layer.parameters())
    assert layer._fused.inputs.matrix.is_shared()


def test_memory_of_somebody_elses_choice_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = make_layer()
    layer.fuse_projections()
    layer._apply(lambda x: x.double().share_memory_())
    assert layer._fused is None and layer.q_proj.weight.is_shared()
    layer = make_layer()
    layer.fuse_projections()
    layer._apply(torch.clone)  # as pin_memory does
    assert layer._fused is None
    layer = make_layer()
    layer.fuse_projections()
    monkeypatch.setattr(Tensor, "is_pinned", lambda x: x.dtype == bf16)
    layer.to(bf16)
    assert layer._fused is None


def test_fusing_in_inference_mode() -> None:
    layer, x = make_layer(), torch.randn(1, 4, HIDDEN)
    with torch.inference_mode():
        assert layer.fuse_projections()
        expected = decode_and_prefill(layer, x)
    layer(x).sum().backward()
    assert layer.q_proj.weight.grad is not None
    assert rel_rms(decode_and_prefill(layer, x), expected) < 2e-6


def test_fusing_a_model() -> None:
    assert fuse_projections(TwoLayers()) == 2
    assert fuse_projections(nn.Linear(1, 1)) == 0


@pytest.mark.parametrize("page", ["serving.md", "operator.md"])
def test_the_documentation_runs(page: str) -> None:
    text = (Path(__file__).parents[2] / "docs" / page).read_text()
    snippets = re.findall(r"^```python\n(.*?)^```", text, re.M | re.S)
    assert snippets
    for code in snippets:
        exec(compile(code, page, "exec"), {})
