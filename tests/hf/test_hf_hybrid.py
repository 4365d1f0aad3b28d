"""Llama with KDA layers: generation, padding, packing, checkpoints, training."""

import copy
import subprocess
import sys

import pytest
import torch
from hf_models import (
    ATTENTION,
    KDA,
    PACKING,
    VOCABULARY,
    check_packing_arguments,
    check_packing_errors,
    hybrid,
    hybrid_config,
    prompt,
)
from kda_cases import rel_rms
from torch.utils.data import Dataset
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
)

from mate.hf import MateLlamaConfig, MateLlamaForCausalLM, MateLlamaModel
from mate.hf.hybrid import KDASelfAttention

BOUND = 1e-5
STACKS = {
    "mixed": [KDA, KDA, ATTENTION],
    "all_kda": [KDA, KDA],
    "attention_first": [ATTENTION, KDA],
}


@pytest.fixture(scope="module", params=STACKS)
def model(request):
    return hybrid(STACKS[request.param])


@pytest.fixture(scope="module")
def mixed():
    return hybrid(STACKS["mixed"])


def generate(model, ids, **options):
    return model.generate(ids, **({"max_new_tokens": 7, "do_sample": False} | options))


def test_cached_generation_is_uncached_generation(model):
    ids = prompt(2, 9)
    expected = generate(model, ids, use_cache=False)
    assert torch.equal(generate(model, ids), expected)
    assert torch.equal(generate(model, ids, prefill_chunk_size=4), expected)
    options = {"cache_implementation": "static", "disable_compile": True}
    assert torch.equal(generate(model, ids, **options), expected)
    beams = [generate(model, ids, num_beams=3, use_cache=use) for use in (True, False)]
    assert torch.equal(*beams)
    samples = []
    for use in (True, False):
        torch.manual_seed(3)
        options = {"do_sample": True, "num_return_sequences": 2, "use_cache": use}
        samples.append(generate(model, ids, **options))
    assert torch.equal(*samples)


def test_left_padded_generation(model):
    ids = prompt(2, 9)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    got = generate(model, ids * mask, attention_mask=mask)
    assert torch.equal(got[0, 9:], generate(model, ids[:1, 4:])[0, 5:])
    assert torch.equal(got[1], generate(model, ids[1:])[0])


def test_a_cache_of_ones_own(model):
    ids = prompt(2, 12)
    with torch.no_grad():
        cache = DynamicCache(config=model.config)
        parts = [model(part, past_key_values=cache).logits for part in ids.split([7, 1, 4], dim=1)]
        assert rel_rms(torch.cat(parts, 1), model(ids).logits) < BOUND
        assert cache.get_seq_length() == 12
    expected = generate(model, ids)
    cache = DynamicCache(config=model.config)
    assert torch.equal(generate(model, ids, past_key_values=cache), expected)
    # Going on where that left off.
    more = torch.cat([expected, prompt(2, 2, seed=5)], dim=1)
    assert torch.equal(generate(model, more, past_key_values=cache), generate(model, more))
    cache.reset()
    assert cache.get_seq_length() == 0
    assert torch.equal(generate(model, ids, past_key_values=cache), expected)
    with pytest.raises(ValueError, match="past_key_values must be made for the model"):
        model(ids, past_key_values=DynamicCache())


def test_cache_batches_can_be_selected_and_repeated(model):
    ids = prompt(3, 8)
    token = prompt(4, 1, seed=7)
    with torch.no_grad():
        cache = model(ids, use_cache=True).past_key_values
        cache.batch_select_indices(torch.tensor([2, 0]))
        cache.batch_repeat_interleave(2)
        got = model(token, past_key_values=cache).logits[:, -1]
        whole = torch.cat([ids[[2, 2, 0, 0]], token], dim=1)
        assert rel_rms(got, model(whole).logits[:, -1]) < BOUND
        with pytest.raises(ValueError, match="crop cannot take tokens back"):
            cache.crop(-1)


@pytest.mark.parametrize("rows", [["11111100", "11111111"], ["00011100", "11000000"]])
def test_padding(model, rows):
    mask = torch.tensor([[int(c) for c in row] for row in rows])
    ids, token = prompt(2, 8), prompt(2, 1, seed=2)
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    with torch.no_grad():
        out = model(ids, attention_mask=mask, position_ids=positions, use_cache=True)
        step = model(
            token,
            attention_mask=torch.cat([mask, torch.ones_like(token)], dim=1),
            position_ids=mask.sum(1, keepdim=True),
            past_key_values=out.past_key_values,
        )
        for b in range(2):
            keep = mask[b].bool()
            alone = model(torch.cat([ids[b, keep], token[b]])[None]).logits[0]
            got = torch.cat([out.logits[b, keep], step.logits[b]])
            assert rel_rms(got, alone) < BOUND


def test_packed_position_ids(model):
    lengths = [6, 1, 11]
    ids = prompt(2, sum(lengths))
    position_ids = torch.cat([torch.arange(n) for n in lengths])[None].expand(2, -1)
    with torch.no_grad():
        expected = torch.cat([model(part).logits for part in ids.split(lengths, 1)], dim=1)
        assert rel_rms(model(ids, position_ids=position_ids).logits, expected) < BOUND


@pytest.mark.parametrize("kind", PACKING)
def test_packing_arguments(model, kind):
    check_packing_arguments(model, model, kind)


def test_packed_gradients_stay_in_their_document(mixed):
    ids = prompt(1, 24)
    embedded = mixed.get_input_embeddings()(ids).detach().requires_grad_()
    bounds = torch.tensor([0, 9, 24])
    mixed(inputs_embeds=embedded, cu_seqlens=bounds).logits[:, 9:].square().sum().backward()
    assert (embedded.grad[:, :9] == 0).all() and (embedded.grad[:, 9:] != 0).any()


def test_packing_errors(mixed):
    check_packing_errors(mixed)


def test_assisted_generation_is_refused(model):
    ids = prompt(1, 6)
    with pytest.raises(ValueError, match="stateful"):
        generate(model, ids, prompt_lookup_num_tokens=2)
    with pytest.raises(ValueError, match="stateful"):
        generate(model, ids, assistant_model=copy.deepcopy(model))


def test_save_and_load(model, tmp_path):
    model.save_pretrained(tmp_path)
    ids = prompt(2, 9)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert type(loaded) is MateLlamaForCausalLM
    assert type(AutoConfig.from_pretrained(tmp_path)) is MateLlamaConfig
    assert loaded.config.layer_types == model.config.layer_types
    expected = model.state_dict()
    assert loaded.state_dict().keys() == expected.keys()
    for name, value in loaded.state_dict().items():
        assert torch.equal(value, expected[name]), name
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model(ids).logits)
        base = AutoModel.from_pretrained(tmp_path).eval()
        assert type(base) is MateLlamaModel
        assert torch.equal(base(ids).last_hidden_state, model.model(ids).last_hidden_state)


def test_bf16_loading_keeps_the_decays_exact(mixed, tmp_path):
    mixed.save_pretrained(tmp_path)
    for load in (
        lambda: MateLlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16),
        lambda: MateLlamaForCausalLM.from_pretrained(tmp_path).to(torch.bfloat16),
    ):
        layer = load().model.layers[1].self_attn
        for name in ("A_log", "dt_bias"):
            parameter = getattr(layer, name)
            assert parameter.dtype == torch.float32 and parameter._no_weight_decay
            assert torch.equal(parameter, getattr(mixed.model.layers[1].self_attn, name))
        assert layer.q_proj.weight.dtype == layer.o_norm.weight.dtype == torch.bfloat16
    ids = prompt(2, 9)
    with torch.no_grad():
        assert rel_rms(load().eval()(ids).logits, mixed(ids).logits) < 0.05
        low = MateLlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
        assert generate(low, ids).shape == (2, 16)


def test_initialisation(tmp_path):
    options = {"initializer_range": 0.02, "linear_num_heads": 4}
    made = hybrid(STACKS["mixed"], **options)
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY, hidden_size=64, intermediate_size=96, num_hidden_layers=3,
            num_attention_heads=4, num_key_value_heads=2,
        )
    ).save_pretrained(tmp_path)  # fmt: skip
    config = hybrid_config(STACKS["mixed"], **options)
    grown = MateLlamaForCausalLM.from_pretrained(
        tmp_path, config=config, ignore_mismatched_sizes=True
    )
    for model in (made, grown):
        for layer in model.model.layers[:2]:
            kda = layer.self_attn
            assert type(kda) is KDASelfAttention
            rate = kda.A_log.exp()
            assert (rate >= 1).all() and (rate <= 16).all() and rate.std() > 0.5
            step = torch.nn.functional.softplus(kda.dt_bias)
            assert step.min() > 0.99e-3 and step.max() < 1.01e-1 and step.std() > 0.01
            assert kda.q_conv1d.weight.std().item() == pytest.approx(0.02, rel=0.15)
            assert kda.f_b_proj.weight.std().item() == pytest.approx(0.02, rel=0.15)
            assert (kda.o_norm.weight == 1).all()
    bounded = hybrid([KDA], linear_lower_bound=-5.0).model.layers[0].self_attn
    assert (bounded.A_log == 0).all() and bounded.lower_bound == -5.0


def test_tied_weights(tmp_path):
    model = hybrid(STACKS["mixed"], tie_word_embeddings=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    with torch.no_grad():
        assert torch.equal(loaded(prompt(1, 5)).logits, model(prompt(1, 5)).logits)


@pytest.mark.parametrize("padded", [False, True])
def test_gradient_checkpointing(padded):
    model = hybrid(STACKS["mixed"]).train()
    ids = prompt(2, 9)
    mask = torch.ones_like(ids)
    if padded:
        mask[0, 5:] = 0
    call = {"labels": ids, "attention_mask": mask, "use_cache": False}
    parameters = list(model.parameters())
    expected = torch.autograd.grad(model(ids, **call).loss, parameters)
    model.gradient_checkpointing_enable()
    got = torch.autograd.grad(model(ids, **call).loss, parameters)
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b)


class Counting(Dataset):
    def __len__(self):
        return 16

    def __getitem__(self, index):
        ids = (torch.arange(12) + index) % 20 + 2
        return {"input_ids": ids, "labels": ids}


def test_trainer(tmp_path):
    model = hybrid(STACKS["mixed"])
    before = copy.deepcopy(model.state_dict())
    arguments = TrainingArguments(
        output_dir=tmp_path,
        max_steps=6,
        per_device_train_batch_size=8,
        learning_rate=3e-3,
        gradient_checkpointing=True,
        bf16=True,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        logging_steps=1,
        disable_tqdm=True,
    )
    trainer = Trainer(model, arguments, train_dataset=Counting())
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.8 * losses[0]
    for name, value in model.state_dict().items():
        assert not torch.equal(value, before[name]), name
        assert value.dtype == torch.float32
    trainer.save_model(tmp_path / "saved")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    for name, value in loaded.state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), name


def test_compiles_without_a_graph_break():
    model = hybrid(STACKS["all_kda"])
    ids = prompt(2, 12)
    compiled = torch.compile(model.model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        cache = DynamicCache(config=model.config)
        compiled(ids[:, :10], past_key_values=cache)
        for t in (10, 11):
            last = compiled(ids[:, t : t + 1], past_key_values=cache).last_hidden_state
        assert rel_rms(last, model.model(ids).last_hidden_state[:, -1:]) < BOUND


def test_config(tmp_path):
    config = MateLlamaConfig(hidden_size=512, num_hidden_layers=5, num_attention_heads=8)
    assert config.layer_types == [KDA, KDA, KDA, ATTENTION, KDA]
    assert config.linear_num_heads == config.linear_num_v_heads == 4
    assert not any("self_attn" in name for name in config.base_model_tp_plan)
    config = hybrid_config([KDA], linear_num_v_heads=2, linear_conv_kernel_dim=3,
                           linear_lower_bound=-4.0, linear_allow_neg_eigval=True)  # fmt: skip
    config.save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    layer = AutoModelForCausalLM.from_config(config).model.layers[0].self_attn
    assert (layer.num_heads, layer.num_v_heads, layer.conv_size) == (1, 2, 3)
    assert (layer.lower_bound, layer.allow_neg_eigval) == (-4.0, True)
    with pytest.raises(ValueError, match="layer_types must hold"):
        hybrid_config([KDA, "sliding_attention"])
    with pytest.raises(ValueError, match="one of input_ids and inputs_embeds"):
        hybrid([KDA]).model()


def test_outputs_on_request(mixed):
    out = mixed(prompt(1, 5), output_hidden_states=True)
    assert len(out.hidden_states) == 4
    embedded = mixed.get_input_embeddings()(prompt(1, 5))
    assert torch.equal(mixed(inputs_embeds=embedded).logits, out.logits)
    as_tuple = mixed(prompt(1, 5), return_dict=False, use_cache=False)
    assert torch.equal(as_tuple[0], out.logits)


def test_import_without_transformers_names_the_remedy():
    code = "import sys; sys.modules['transformers'] = None; import mate.hf"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "ImportError: mate.hf needs transformers: pip install '.[hf]'" in done.stderr
