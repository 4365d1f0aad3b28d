"""A patched transformers model against the unpatched one, and against documents alone."""

import copy

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from hf_models import (
    PACKING,
    check_packing_arguments,
    check_packing_errors,
    kimi,
    prompt,
)
from kda_cases import rel_rms
from transformers import DynamicCache, KimiLinearForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.models.kimi_linear.modeling_kimi_linear import KimiLinearDeltaAttention

from mate.hf import patch, unpatch
from mate.layers import KDACache, KimiDeltaAttention
from mate.layers.mixer import DeltaMixer

BOUND = 1e-5


@pytest.fixture(scope="module")
def original():
    return kimi()


@pytest.fixture(scope="module")
def patched(original):
    return patch(copy.deepcopy(original))


def generate(model, ids, **options):
    return model.generate(ids, max_new_tokens=8, do_sample=False, **options)


@pytest.mark.parametrize("cache_type", ["ours", "theirs"])
def test_layer_equals_transformers_layer(original, cache_type):
    """The same weights in KimiDeltaAttention: output, states, decoding, gradients."""
    theirs = copy.deepcopy(original.model.layers[2].self_attn)
    ours = KimiDeltaAttention(64, 2, layer_idx=2)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 70, 64)
    cache = DynamicCache(config=original.config)
    own = KDACache() if cache_type == "ours" else DynamicCache(config=original.config)
    with torch.no_grad():
        assert rel_rms(ours(x, cache=own), theirs(x, cache_params=cache)) < BOUND
        for part in (x[:, :1], x[:, 1:4], x[:, 4:30]):
            assert rel_rms(ours(part, cache=own), theirs(part, cache_params=cache)) < BOUND
    state = own.get_recurrent_state(2)
    state = state.transpose(-1, -2) if cache_type == "ours" else state
    assert rel_rms(state, cache.get_recurrent_state(2)) < BOUND
    assert rel_rms(own.get_conv_state(2), cache.get_conv_state(2)) < BOUND

    up = torch.randn_like(x)
    (ours(x) * up).sum().backward()
    (theirs(x) * up).sum().backward()
    gate = theirs.forget_gate
    for a, b in (
        (ours.A_log, gate.A_log),
        (ours.dt_bias, gate.dt_bias),
        (ours.f_a_proj.weight, gate.f_a_proj.weight),
        (ours.q_proj.weight, theirs.q_proj.weight),
        (ours.g_a_proj.weight, theirs.g_a_proj.weight),
        (ours.b_proj.weight, theirs.b_proj.weight),
        (ours.o_norm.weight, theirs.o_norm.weight),
    ):
        assert rel_rms(a.grad, b.grad.view(a.shape)) < 1e-4
    convs = [conv.weight.grad for conv in ours.short_convs()]
    assert rel_rms(torch.cat(convs), theirs.conv1d.weight.grad) < 1e-4


def test_logits_and_tokens(original, patched):
    ids = prompt(2, 70)
    with torch.no_grad():
        assert rel_rms(patched(ids).logits, original(ids).logits) < BOUND
    assert torch.equal(generate(patched, ids), generate(original, ids))
    assert torch.equal(generate(patched, ids, num_beams=3), generate(original, ids, num_beams=3))
    assert torch.equal(generate(patched, ids, prefill_chunk_size=30), generate(original, ids))


def test_gradients(original):
    ids = prompt(2, 40)
    ours = patch(copy.deepcopy(original))
    theirs = copy.deepcopy(original)
    for model in (ours, theirs):
        model.train()
        model(ids, labels=ids).loss.backward()
    for (name, a), (_, b) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        if b.grad is not None:
            assert rel_rms(a.grad, b.grad) < 1e-4, name


def test_parameters_are_untouched_and_unpatch_restores(original):
    model = copy.deepcopy(original)
    before = {name: value.data_ptr() for name, value in model.state_dict().items()}
    ids = prompt(1, 20)
    with torch.no_grad():
        expected = model(ids).logits
        assert patch(model) is model
        assert isinstance(model.model.layers[0].self_attn, KimiLinearDeltaAttention)
        assert type(model.model.layers[0].self_attn) is not KimiLinearDeltaAttention
        assert {name: value.data_ptr() for name, value in model.state_dict().items()} == before
        patch(model)  # twice is once
        assert len(model.model._forward_pre_hooks) == 1
        copied = copy.deepcopy(model)
        for patched_model in (model, copied):
            assert unpatch(patched_model) is patched_model
            for index in (0, 2):
                layer = patched_model.model.layers[index].self_attn
                assert type(layer) is KimiLinearDeltaAttention
            assert not patched_model.model._forward_pre_hooks
        assert not model.model._forward_pre_hooks_with_kwargs
        assert torch.equal(model(ids).logits, expected)
        assert torch.equal(unpatch(model)(ids).logits, expected)


def test_saving_leaves_no_trace(patched, original, tmp_path):
    patched.save_pretrained(tmp_path)
    assert "ate" not in (tmp_path / "config.json").read_text().split('"architectures"')[1][:60]
    reloaded = KimiLinearForCausalLM.from_pretrained(tmp_path)
    ids = prompt(1, 20)
    with torch.no_grad():
        assert torch.equal(reloaded.eval()(ids).logits, original(ids).logits)


@pytest.mark.parametrize("first", ["original", "patched"])
def test_caches_are_exchangeable(original, patched, first):
    first, second = (original, patched) if first == "original" else (patched, original)
    ids = prompt(2, 32)
    with torch.no_grad():
        cache = first(ids[:, :20], use_cache=True).past_key_values
        parts = [
            model(ids[:, start:end], past_key_values=cache).logits
            for model, start, end in ((second, 20, 21), (first, 21, 22), (second, 22, 32))
        ]
        assert rel_rms(torch.cat(parts, 1), original(ids).logits[:, 20:]) < BOUND


@pytest.mark.parametrize("rows", [["1111111100", "1111111111"], ["0001111000", "1100000000"]])
def test_padded_prefill_then_decoding(original, patched, rows):
    """Right padding too, where transformers' own states decay."""
    mask = torch.tensor([[int(c) for c in row] for row in rows])
    ids, more = prompt(2, 10), prompt(2, 2, seed=2)
    with torch.no_grad():
        out = patched(ids * mask, attention_mask=mask, use_cache=True)
        for t in range(2):
            mask = torch.cat([mask, torch.ones(2, 1, dtype=mask.dtype)], dim=1)
            token = more[:, t : t + 1]
            out = patched(token, attention_mask=mask, past_key_values=out.past_key_values)
        for b in range(2):
            alone = torch.cat([ids[b, mask[b, :10].bool()], more[b]])[None]
            assert rel_rms(out.logits[b, -1], original(alone).logits[0, -1]) < BOUND


@pytest.mark.parametrize("rows", [1, 2])
def test_packed_position_ids(original, patched, rows):
    lengths = [9, 1, 14]
    ids = prompt(rows, sum(lengths))
    position_ids = torch.cat([torch.arange(n) for n in lengths])[None]
    with torch.no_grad():
        expected = torch.cat([original(part).logits for part in ids.split(lengths, 1)], dim=1)
        got = patched(ids, position_ids=position_ids)
        assert rel_rms(got.logits, expected) < BOUND and got.past_key_values is None
        embedded = patched.get_input_embeddings()(ids)
        got = patched(inputs_embeds=embedded, position_ids=position_ids.expand(rows, -1))
        assert rel_rms(got.logits, expected) < BOUND
        with pytest.raises(ValueError, match="use_cache must be False"):
            patched(ids, position_ids=position_ids, use_cache=True)
        offset = torch.arange(5, 5 + sum(lengths))[None]
        assert rel_rms(patched(ids, position_ids=offset).logits, original(ids).logits) < BOUND


@pytest.mark.parametrize("kind", PACKING)
def test_packing_arguments_of_the_model(original, patched, kind):
    check_packing_arguments(patched, original, kind)


def test_packing_errors(patched):
    check_packing_errors(patched)
    ids, positions = prompt(1, 24), torch.arange(24)[None]
    with pytest.raises(ValueError, match="position_ids must start over"):
        patched.model(ids, None, positions, cu_seqlens=torch.tensor([0, 9, 24]))


@pytest.mark.parametrize("name", ["cu_seqlens", "cu_seq_lens_q", "seq_idx"])
def test_packing_arguments_reach_the_layer(original, patched, name):
    lengths = [9, 1, 14]
    x = torch.randn(1, sum(lengths), 64)
    value = torch.tensor([0, 9, 10, 24], dtype=torch.int32)
    if name == "seq_idx":
        value = torch.repeat_interleave(torch.arange(3), torch.tensor(lengths))[None]
    with torch.no_grad():
        got = patched.model.layers[0].self_attn(x, **{name: value})
        layer = original.model.layers[0].self_attn
        expected = torch.cat([layer(part) for part in x.split(lengths, 1)], dim=1)
    assert rel_rms(got, expected) < BOUND


def test_back_propagation_through_a_transformers_cache(original, patched):
    """transformers' cache writes in place; what autograd saved must survive it."""
    layer = patched.model.layers[0].self_attn
    x = torch.randn(2, 20, 64)
    up = torch.randn_like(x)
    parameters = list(layer.parameters())
    expected = torch.autograd.grad((layer(x) * up).sum(), parameters)
    cache = DynamicCache(config=original.config)
    parts = [layer(part, cache_params=cache) for part in x.split([9, 1, 10], dim=1)]
    got = torch.autograd.grad((torch.cat(parts, 1) * up).sum(), parameters)
    for a, b in zip(got, expected, strict=True):
        assert rel_rms(a, b) < BOUND


def test_bf16_model_computes_its_gate_in_fp32(original, tmp_path):
    original.save_pretrained(tmp_path)
    model = patch(KimiLinearForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16))
    layer = model.model.layers[0].self_attn
    A_log, dt_bias = layer.decay_parameters()
    assert layer.forget_gate.A_log.dtype == torch.bfloat16  # transformers rounds it on loading
    assert A_log.dtype == dt_bias.dtype == torch.float32
    same = KimiLinearForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16).float()
    x = torch.randn(2, 40, 64).bfloat16()
    with torch.no_grad():
        assert rel_rms(layer(x), same.model.layers[0].self_attn(x.float())) < 2e-2


def test_static_cache(original, patched):
    ids = prompt(2, 12)
    options = {"cache_implementation": "static", "disable_compile": True}
    assert torch.equal(generate(patched, ids, **options), generate(original, ids))


def test_compiles_without_a_graph_break(original, patched):
    ids = prompt(2, 12)
    compiled = torch.compile(patched.model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        cache = DynamicCache(config=patched.config)
        compiled(ids[:, :10], past_key_values=cache)
        for t in (10, 11):
            last = compiled(ids[:, t : t + 1], past_key_values=cache).last_hidden_state
        assert rel_rms(last, original.model(ids).last_hidden_state[:, -1:]) < BOUND


def test_errors(original):
    llama = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=9, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
            num_attention_heads=2,
        )
    )  # fmt: skip
    with pytest.raises(ValueError, match="KimiLinearDeltaAttention.*got LlamaForCausalLM"):
        patch(llama)
    for function in (patch, unpatch):
        with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got str"):
            function("path/to/a/model")
    small = kimi(head_dim=64)
    with pytest.raises(ValueError, match=r"head_dim must be 128.*got 64 in model\.layers\.0"):
        patch(small)
    broken = copy.deepcopy(original)
    del broken.model.layers[2].self_attn.forget_gate.dt_bias
    with pytest.raises(RuntimeError, match=r"transformers 5.*has no forget_gate\.dt_bias"):
        patch(broken)
    assert type(broken.model.layers[0].self_attn) is KimiLinearDeltaAttention  # all or nothing
    other = copy.deepcopy(original)
    other.model.layers[0].self_attn.activation = "gelu"
    with pytest.raises(ValueError, match="activation must be silu, got 'gelu'"):
        patch(other)


def test_rollback_is_refused(patched):
    cache = DynamicCache(config=patched.config)
    cache.activate_past_recording()
    with pytest.raises(ValueError, match="rolled back"):
        patched(prompt(1, 5), past_key_values=cache)
    with pytest.raises(ValueError, match="stateful"):
        generate(patched, prompt(1, 5), prompt_lookup_num_tokens=2)


def test_layers_that_accelerate_wraps(original, monkeypatch):
    """Offloading keeps a bound forward on the module: the swapped class must reach it."""
    model, ids = copy.deepcopy(original), prompt(2, 9)
    expected = model(ids).logits
    for index in (0, 2):
        add_hook_to_module(model.model.layers[index].self_attn, ModelHook())
    calls = []
    mix = DeltaMixer.mix
    monkeypatch.setattr(DeltaMixer, "mix", lambda *a, **k: calls.append(1) or mix(*a, **k))
    patch(model)
    assert rel_rms(model(ids).logits, expected) < BOUND and len(calls) == 2
    unpatch(model)
    assert torch.equal(model(ids).logits, expected) and len(calls) == 2
    for index in (0, 2):
        remove_hook_from_module(model.model.layers[index].self_attn)
    patch(model)
    assert rel_rms(model(ids).logits, expected) < BOUND and len(calls) == 4


def test_a_layer_whose_forward_was_replaced_is_refused(original):
    model = copy.deepcopy(original)
    model.model.layers[2].self_attn.forward = lambda *args, **kwargs: None
    with pytest.raises(ValueError, match=r"layers\.2\.self_attn\.forward must be"):
        patch(model)
    assert not any(isinstance(module, DeltaMixer) for module in model.modules())
