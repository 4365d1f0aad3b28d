"""KimiDeltaAttention against a float64 restatement, one document at a time."""

import copy
import itertools

import pytest
import torch
from kda_cases import rel_rms
from layer_truth import make_layer, parameters64, truth
from torch._dynamo.testing import CompileCounter

from mate.layers import KDACache, KimiDeltaAttention

HIDDEN = 48
BOUND = 1e-5

VARIANTS = {
    "softplus": {},
    "bounded": {"lower_bound": -5.0},
    "negative": {"allow_neg_eigval": True},
    "grouped": {"num_v_heads": 4},
    "conv2": {"conv_size": 2},
    "conv7": {"conv_size": 7, "lower_bound": -3.0, "num_v_heads": 6},
}

# Lengths and paddings: 1 a token, 0 padding.
MASKS = {
    "left": ["00001111111", "11111111111", "00000000001"],
    "right": ["11111110000", "11111111111", "10000000000"],
    "middle": ["11110001111", "10101010101", "11011111111"],
    "mixed": ["00110101000", "11100000000", "00000000000"],
}


def mask_of(name):
    return torch.tensor([[int(c) for c in row] for row in MASKS[name]])


@pytest.fixture(params=["host", "device"])
def padding_path(request, monkeypatch):
    """How padding is handled where its amount can be read, and where it cannot (GPU, compile)."""
    if request.param == "device":
        monkeypatch.setattr("torch.compiler.is_compiling", lambda: True)


def check_cache(layer, cache, documents):
    """The cache holds exactly what each document alone leaves behind."""
    conv, state = cache.get_conv_state(0), cache.get_recurrent_state(0)
    assert conv.shape[0] == state.shape[0] == len(documents)
    assert state.dtype == torch.float32
    for n, document in enumerate(documents):
        _, window, final = truth(layer, document)
        assert rel_rms(conv[n], window) < BOUND
        assert rel_rms(state[n], final) < BOUND


@pytest.mark.parametrize("variant", VARIANTS)
def test_output_and_state(variant):
    layer = make_layer(**VARIANTS[variant])
    x = torch.randn(2, 37, HIDDEN)
    cache = KDACache()
    y = layer(x, cache=cache)
    for b in range(2):
        assert rel_rms(y[b], truth(layer, x[b])[0]) < BOUND
    check_cache(layer, cache, x)
    with torch.no_grad():
        assert torch.equal(layer(x), y)


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients_of_every_parameter(variant):
    layer = make_layer(**VARIANTS[variant])
    x = torch.randn(2, 21, HIDDEN, requires_grad=True)
    up = torch.randn(2, 21, HIDDEN)
    names = [name for name, _ in layer.named_parameters()]
    grads = torch.autograd.grad((layer(x) * up).sum(), [x, *layer.parameters()])

    p, x64 = parameters64(layer, True), x.detach().double().requires_grad_()
    loss = sum((truth(layer, x64[b], p)[0] * up[b]).sum() for b in range(2))
    expected = torch.autograd.grad(loss, [x64, *p.values()])
    for name, got, want in zip(["x", *names], grads, expected, strict=True):
        assert rel_rms(got, want) < 1e-4, name


@pytest.mark.parametrize("split", [[37], [1] * 8 + [29], [20, 1, 16], [2, 3, 17, 15], [0, 36, 1]])
def test_any_split_of_a_sequence_is_one_sequence(split):
    layer = make_layer(num_v_heads=4)
    x = torch.randn(2, 37, HIDDEN)
    cache = KDACache()
    with torch.no_grad():
        y = torch.cat([layer(part, cache=cache) for part in x.split(split, dim=1)], dim=1)
    for b in range(2):
        assert rel_rms(y[b], truth(layer, x[b])[0]) < BOUND
    check_cache(layer, cache, x)


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("kind", MASKS)
def test_padding(kind, grad, padding_path):
    """Each row gets what its tokens alone get: output, cache, and the decoding that follows."""
    layer = make_layer()
    mask = mask_of(kind)
    keep = mask.bool()
    x = torch.randn(*mask.shape, HIDDEN)
    documents = [x[b, keep[b]] for b in range(len(x))]
    x[~keep] = torch.nan  # padding must not even be read
    cache = KDACache()
    more = torch.randn(len(x), 3, HIDDEN)
    with torch.set_grad_enabled(grad):
        y = layer(x, mask, cache)
        check_cache(layer, cache, documents)
        step = layer(more[:, :1], cache=cache)
        # A mask that also covers the past, as transformers' generate() passes it.
        longer = torch.cat([mask, torch.ones(len(x), 3, dtype=mask.dtype)], dim=1)
        last = layer(more[:, 1:], longer, cache)
    assert (y[~keep] == 0).all()
    for b, document in enumerate(documents):
        whole = torch.cat([document, more[b]])
        expected = truth(layer, whole)[0]
        got = torch.cat([y[b, keep[b]], step[b], last[b]])
        assert rel_rms(got, expected) < BOUND
    check_cache(layer, cache, [torch.cat(pair) for pair in zip(documents, more, strict=True)])


def test_padding_in_later_calls(padding_path):
    """Chunks of a padded batch on one cache, single tokens among them."""
    layer = make_layer()
    mask = mask_of("mixed")
    x = torch.randn(*mask.shape, HIDDEN)
    cache = KDACache()
    with torch.no_grad():
        for part, m in zip(x.split([3, 1, 1, 6], 1), mask.split([3, 1, 1, 6], 1), strict=True):
            y = layer(part, m, cache)
            assert (y[m == 0] == 0).all()
    check_cache(layer, cache, [x[b, mask[b].bool()] for b in range(len(x))])


def test_padding_gradients(padding_path):
    layer = make_layer()
    mask = mask_of("mixed")
    x = torch.randn(*mask.shape, HIDDEN)
    x[mask == 0] = torch.nan
    x.requires_grad_()
    up = torch.randn_like(x)
    grads = torch.autograd.grad((layer(x, mask) * up).sum(), [x, *layer.parameters()])
    p = parameters64(layer, True)
    loss, leaves = 0, []
    for b in range(len(x) - 1):  # the last row is all padding
        leaves.append(x[b, mask[b].bool()].detach().double().requires_grad_())
        loss = loss + (truth(layer, leaves[-1], p)[0] * up[b, mask[b].bool()]).sum()
    expected = torch.autograd.grad(loss, [*leaves, *p.values()])
    assert (grads[0][mask == 0] == 0).all()
    for b, want in enumerate(expected[: len(leaves)]):
        assert rel_rms(grads[0][b, mask[b].bool()], want) < 1e-4
    for got, want in zip(grads[1:], expected[len(leaves) :], strict=True):
        assert rel_rms(got, want) < 1e-4


@pytest.mark.parametrize("lengths", [[20], [3, 0, 1, 30, 2], [0, 5, 0], [1, 1, 1]])
def test_packed_documents(lengths):
    layer = make_layer(num_v_heads=4)
    x = torch.randn(1, sum(lengths), HIDDEN)
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)
    documents = x[0].split(lengths)
    cache = KDACache()
    with torch.no_grad():
        y = layer(x, cache=cache, cu_seqlens=cu_seqlens)
        assert torch.equal(
            layer(x, cu_seqlens=cu_seqlens.int(), cu_seqlens_cpu=cu_seqlens.int()), y
        )
        check_cache(layer, cache, documents)
        more = torch.randn(len(lengths), 2, HIDDEN)
        step = layer(more[:, :1], cache=cache)
        ends = torch.arange(len(lengths) + 1)
        packed = layer(more[:, 1:].reshape(1, -1, HIDDEN), cache=cache, cu_seqlens=ends)
    start = 0
    for n, document in enumerate(documents):
        expected = truth(layer, torch.cat([document, more[n]]))[0]
        got = torch.cat([y[0, start : start + lengths[n]], step[n], packed[0, n : n + 1]])
        assert rel_rms(got, expected) < BOUND
        start += lengths[n]


def test_nan_stays_in_its_document():
    layer = make_layer()
    x = torch.randn(1, 30, HIDDEN)
    x[0, 10:20] = torch.nan
    y = layer(x, cu_seqlens=torch.tensor([0, 10, 20, 30]))
    assert y[0, 10:20].isnan().all()
    for start in (0, 20):
        document = slice(start, start + 10)
        assert rel_rms(y[0, document], truth(layer, x[0, document])[0]) < BOUND


def test_back_propagation_through_a_cache():
    layer = make_layer()
    x = torch.randn(2, 24, HIDDEN)
    up = torch.randn_like(x)
    expected = torch.autograd.grad((layer(x) * up).sum(), list(layer.parameters()))
    cache = KDACache()
    y = torch.cat([layer(part, cache=cache) for part in x.split([9, 1, 14], dim=1)], dim=1)
    got = torch.autograd.grad((y * up).sum(), list(layer.parameters()))
    for a, b in zip(got, expected, strict=True):
        assert rel_rms(a, b) < BOUND

    layer(x, cache=cache)
    cache.detach()
    assert not cache.get_recurrent_state(0).requires_grad
    assert not cache.get_conv_state(0).requires_grad


def test_decoding_writes_the_state_in_place():
    layer = make_layer()
    cache = KDACache()
    with torch.no_grad():
        layer(torch.randn(2, 9, HIDDEN), cache=cache)
        address = cache.get_recurrent_state(0).data_ptr()
        for length in (1, 3, 40):
            layer(torch.randn(2, length, HIDDEN), cache=cache)
            assert cache.get_recurrent_state(0).data_ptr() == address


def test_a_state_from_inference_mode_is_not_written_outside_it():
    layer = make_layer()
    x = torch.randn(1, 9, HIDDEN)
    cache = KDACache()
    with torch.inference_mode():
        layer(x[:, :8], cache=cache)
    with torch.no_grad():
        y = layer(x[:, 8:], cache=cache)
    assert rel_rms(y[0], truth(layer, x[0])[0][8:]) < BOUND


def test_cache_operations():
    layer = make_layer()
    x = torch.randn(3, 8, HIDDEN)
    cache = KDACache()
    assert cache.batch_size == -1 and not cache.has_previous_state(0)
    with torch.no_grad():
        layer(x, cache=cache)
        assert cache.batch_size == 3 and cache.has_previous_state(0) and cache.has_previous_state()
        assert not cache.has_previous_state(1)
        cache.reorder_cache(torch.tensor([2, 0, 0]))
        check_cache(layer, cache, x[[2, 0, 0]])
        cache.batch_select_indices(torch.tensor([0, 1]))
        cache.batch_repeat_interleave(2)
        check_cache(layer, cache, x[[2, 2, 0, 0]])
        other = copy.deepcopy(cache)
        layer(torch.randn(4, 1, HIDDEN), cache=cache)
        check_cache(layer, other, x[[2, 2, 0, 0]])
        cache.reset()
        assert cache.batch_size == -1
        layer(x, cache=cache)
        check_cache(layer, cache, x)


def test_cache_update_appends_like_transformers():
    cache = KDACache()
    x = torch.randn(2, 5, 9)
    cache.update_conv_state(x[..., :2], 0, conv_kernel_size=4)
    padded = torch.cat([torch.zeros(2, 5, 2), x[..., :2]], dim=-1)
    assert torch.equal(cache.get_conv_state(0), padded)
    cache.update_conv_state(x[..., 2:5], 0)
    assert torch.equal(cache.get_conv_state(0), x[..., 1:5])
    cache.update_conv_state(x[..., 5:], 0)
    assert torch.equal(cache.get_conv_state(0), x[..., 5:])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit(dtype):
    """Against the truth on the same rounded weights; A_log and dt_bias were never rounded."""
    layer = make_layer()
    before = layer.A_log.clone(), layer.dt_bias.clone()
    layer = layer.to(dtype)
    x = torch.randn(2, 33, HIDDEN).to(dtype)
    cache = KDACache()
    with torch.no_grad():
        y = torch.cat([layer(part, cache=cache) for part in x.split([32, 1], dim=1)], dim=1)
    assert y.dtype == dtype and cache.get_conv_state(0).dtype == dtype
    assert cache.get_recurrent_state(0).dtype == torch.float32
    bound = 3 * torch.finfo(dtype).eps
    for b in range(2):
        assert rel_rms(y[b], truth(layer, x[b])[0]) < bound
    assert torch.equal(layer.A_log, before[0]) and torch.equal(layer.dt_bias, before[1])


def test_autocast():
    layer = make_layer()
    x = torch.randn(2, 33, HIDDEN)
    cache = KDACache()
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x, cache=cache)
        y.float().sum().backward()
        with torch.no_grad():
            layer(x[:, :1], cache=cache)
    assert y.dtype == torch.bfloat16 and layer.q_proj.weight.dtype == torch.float32
    assert rel_rms(y[0], truth(layer, x[0])[0]) < 2e-2
    assert all(p.grad.isfinite().all() and p.grad.abs().sum() > 0 for p in layer.parameters())


CASTS = {
    "to": lambda m: m.to(torch.bfloat16),
    "half": lambda m: m.half(),
    "bfloat16": lambda m: m.bfloat16(),
    "nested": lambda m: torch.nn.Sequential(m).to(torch.bfloat16)[0],
    "there_and_back": lambda m: m.half().float(),
    "device": lambda m: m.to("cpu", torch.float16),
}


@pytest.mark.parametrize("cast", CASTS)
def test_decay_parameters_stay_exact(cast):
    layer = make_layer()
    A_log, dt_bias = layer.A_log.detach().clone(), layer.dt_bias.detach().clone()
    layer(torch.randn(1, 4, HIDDEN)).sum().backward()
    grad = layer.A_log.grad.clone()
    moved = CASTS[cast](layer)
    assert torch.equal(moved.A_log, A_log) and torch.equal(moved.dt_bias, dt_bias)
    assert moved.A_log.dtype == moved.dt_bias.dtype == moved.A_log.grad.dtype == torch.float32
    assert torch.equal(moved.A_log.grad, grad)
    assert moved.A_log._no_weight_decay and moved.dt_bias._no_weight_decay
    if cast != "there_and_back":
        assert moved.q_proj.weight.dtype != torch.float32


def test_decay_parameters_under_other_constructions():
    assert make_layer().double().A_log.dtype == torch.float64
    layer = KimiDeltaAttention(HIDDEN, 1, device="meta", dtype=torch.bfloat16)
    assert layer.A_log.dtype == torch.float32 and layer.o_proj.weight.dtype == torch.bfloat16
    layer = layer.to_empty(device="cpu").bfloat16()
    assert layer.A_log.dtype == torch.float32 and layer.A_log._no_weight_decay
    default = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.bfloat16)
        assert KimiDeltaAttention(HIDDEN, 1).dt_bias.dtype == torch.float32
    finally:
        torch.set_default_dtype(default)


def test_initialisation():
    torch.manual_seed(0)
    layer = KimiDeltaAttention(256, 4)
    for module in (layer.q_proj, layer.o_proj, layer.q_conv1d, layer.f_b_proj):
        assert module.weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert (layer.o_norm.weight == 1).all()
    rate = layer.A_log.exp()
    assert (rate >= 1).all() and (rate <= 16).all() and rate.std() > 1
    step = torch.nn.functional.softplus(layer.dt_bias)
    assert step.min() > 0.99e-3 and step.max() < 1.01e-1
    assert step.log().mean().item() == pytest.approx(-4.6, abs=0.2)  # log-uniform
    assert (KimiDeltaAttention(256, 4, lower_bound=-5.0).A_log == 0).all()


def test_compiles_without_a_graph_break():
    layer = make_layer()
    x = torch.randn(2, 20, HIDDEN)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert rel_rms(compiled(x), layer(x)) < 1e-6
        ours, theirs = KDACache(), KDACache()
        layer(x, cache=ours)
        compiled(x, cache=theirs)
        for t in range(3):
            token = x[:, t : t + 1]
            assert rel_rms(compiled(token, cache=theirs), layer(token, cache=ours)) < 1e-6
        assert rel_rms(theirs.get_recurrent_state(0), ours.get_recurrent_state(0)) < 1e-6
        assert rel_rms(theirs.get_conv_state(0), ours.get_conv_state(0)) < 1e-6
        mask = torch.ones(2, 20)
        mask[0, :7], mask[1, 9:12] = 0, 0
        assert rel_rms(compiled(x, mask), layer(x, mask)) < 1e-6
    parameters = list(layer.parameters())
    got = torch.autograd.grad(compiled(x).square().sum(), parameters)
    expected = torch.autograd.grad(layer(x).square().sum(), parameters)
    for a, b in zip(got, expected, strict=True):
        assert rel_rms(a, b) < 1e-5


class Called(torch.nn.Module):
    """A layer called with one optional argument, for torch.export."""

    def __init__(self, layer, name):
        super().__init__()
        self.layer, self.name = layer, name

    def forward(self, x, given):
        return self.layer(x, **{self.name: given})


@pytest.mark.parametrize("argument", ["attention_mask", "cu_seqlens"])
def test_exports_with_dynamic_lengths(argument):
    """Any T from 1 on, and any number of documents; padding too."""
    layer = make_layer()

    def inputs(length):
        x = torch.randn(2, length, HIDDEN)
        if argument == "cu_seqlens":
            return x[:1], torch.tensor([0, length // 2, length, length])
        mask = torch.ones(2, length, dtype=torch.int64)
        mask[1, : length // 2] = 0
        return x, mask

    length = torch.export.Dim("length", min=1, max=4096)
    of_given = {0: torch.export.Dim.DYNAMIC} if argument == "cu_seqlens" else {1: length}
    program = torch.export.export(
        Called(layer, argument), inputs(20), dynamic_shapes=({1: length}, of_given)
    )
    for T in (1, 2, 77):
        x, given = inputs(T)
        got = program.module()(x, given)
        assert rel_rms(got, layer(x, **{argument: given})) < 1e-6


def test_compiles_padding_once_for_all_lengths():
    torch._dynamo.reset()
    layer, counter = make_layer(), CompileCounter()
    compiled = torch.compile(layer, fullgraph=True, backend=counter, dynamic=True)
    for T in range(11, 16):
        mask = torch.ones(2, T)
        mask[0, :7] = 0
        compiled(torch.randn(2, T, HIDDEN), mask)
    assert counter.frame_count == 1


def test_second_derivatives_are_refused():
    layer = make_layer()
    x = torch.randn(1, 6, HIDDEN, requires_grad=True)
    (grad,) = torch.autograd.grad(layer(x).sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivatives"):
        grad.square().sum().backward()


def test_empty_inputs():
    layer = make_layer()
    layer.fuse_projections()
    for gradients in (True, False):  # without them the products are fused
        with torch.set_grad_enabled(gradients):
            assert layer(torch.randn(2, 0, HIDDEN)).shape == (2, 0, HIDDEN)
            assert layer(torch.randn(0, 4, HIDDEN)).shape == (0, 4, HIDDEN)
            assert (layer(torch.randn(2, 3, HIDDEN), torch.zeros(2, 3)) == 0).all()


def test_layers_share_a_cache_by_index():
    first, second = make_layer(), make_layer(seed=1)
    second.layer_idx = 1
    x = torch.randn(1, 12, HIDDEN)
    cache = KDACache()
    with torch.no_grad():
        parts = [second(first(part, cache=cache), cache=cache) for part in x.split([10, 2], 1)]
    expected = truth(second, truth(first, x[0])[0])[0]
    assert rel_rms(torch.cat(parts, 1)[0], expected) < BOUND


def test_constructor_errors():
    for match, options in (
        ("num_heads must be at least 1, got 0", {"num_heads": 0}),
        ("hidden_size must be at least 1, got 0", {"hidden_size": 0}),
        ("head_dim must be 128.*got 64", {"head_dim": 64}),
        ("num_v_heads must be.*num_v_heads=3", {"num_v_heads": 3}),
        ("conv_size must be.*got 0", {"conv_size": 0}),
        ("lower_bound must be.*got 1.0", {"lower_bound": 1.0}),
        ("lower_bound must be.*got -inf", {"lower_bound": -torch.inf}),
    ):
        with pytest.raises(ValueError, match=match):
            KimiDeltaAttention(**{"hidden_size": HIDDEN, "num_heads": 2} | options)


def test_call_errors():
    layer = make_layer()
    x, cache = torch.randn(2, 6, HIDDEN), KDACache()
    cu_seqlens, mask = torch.tensor([0, 6]), torch.ones(2, 6)
    with torch.no_grad():
        layer(x, cache=cache)
    for match, call in (
        ("hidden_states must be", lambda: layer(x[0])),
        (r"hidden_states must be .*hidden=48\], got .*40\)", lambda: layer(x[..., :40])),
        ("attention_mask must be", lambda: layer(x, mask[:, :5])),
        ("attention_mask must be", lambda: layer(x, mask[:, None, None])),
        ("exclude each other", lambda: layer(x[:1], mask[:1], cu_seqlens=cu_seqlens)),
        ("packed hidden_states", lambda: layer(x, cu_seqlens=cu_seqlens)),
        ("cache holds 2 documents.*this call brings 1", lambda: layer(x[:1], None, cache)),
        ("layer_idx=None", lambda: KimiDeltaAttention(HIDDEN, 1)(x, None, KDACache())),
        ("cu_seqlens must end", lambda: layer(x[:1], cu_seqlens=torch.tensor([0, 5]))),
        ("cu_seqlens must have shape", lambda: layer(x[:1], cu_seqlens=torch.tensor(6))),
        ("attention_mask .*negative", lambda: layer(x, -1e9 * mask)),
        ("attention_mask .*negative", lambda: layer(x, -torch.inf * mask)),
    ):
        with pytest.raises(ValueError, match=match):
            call()


def test_call_type_errors():
    layer, double = make_layer(), make_layer().double()
    x = torch.randn(1, 6, HIDDEN)
    for match, call in (
        ("hidden_states must be a torch.Tensor, got list", lambda: layer([1.0])),
        ("hidden_states must be fp16.*got torch.int64", lambda: layer(x.long())),
        ("hidden_states must be fp16.*got torch.float64", lambda: double(x.double())),
        ("attention_mask must be a torch.Tensor, got KDACache", lambda: layer(x, KDACache())),
        ("cache must be a mate.layers.KDACache.*got dict", lambda: layer(x, cache={})),
        ("cu_seqlens must be a torch.Tensor, got list", lambda: layer(x, cu_seqlens=[0, 6])),
        ("cu_seqlens must be torch.int32.*float32", lambda: layer(x, cu_seqlens=torch.zeros(2))),
    ):
        with pytest.raises(TypeError, match=match):
            call()


def test_masks_of_any_number_type():
    layer = make_layer()
    x = torch.randn(3, 11, HIDDEN)
    mask = mask_of("left")
    dtypes = (torch.bool, torch.int32, torch.int64, torch.float32)
    outputs = [layer(x, mask.to(dtype)) for dtype in dtypes]
    assert all(torch.equal(a, b) for a, b in itertools.pairwise(outputs))
