"""torch.library, torch.compile and torch.export: no graph break, no recompilation by length."""

import pytest
import torch
from kda_cases import draw, rel_rms
from torch._dynamo.testing import CompileCounter

import mate

EXTRA = dict(scale=0.09, cu_seqlens=None, cu_seqlens_cpu=None, lower_bound=-5.0)
FLAGS = (True, True, False, True, False)


def op_inputs(case, requires_grad):
    t = {k: x.clone().requires_grad_(requires_grad and x.is_floating_point())
         for k, x in case.tensors.items()}  # fmt: skip
    return (
        t["q"], t["k"], t["v"], t["g"], t["beta"], 0.09, t.get("initial_state"),
        t.get("cu_seqlens"), None, t["A_log"], t["dt_bias"], -5.0, *FLAGS,
    )  # fmt: skip


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("lens", [None, [3, 0, 14]])
def test_opcheck_functional(requires_grad, lens):
    case = draw(T=17, Hv=4, lens=lens)
    torch.library.opcheck(torch.ops.mate.kda.default, (*op_inputs(case, requires_grad), True))


def test_opcheck_out_and_backward():
    case = draw(T=17, Hv=4)
    inputs = op_inputs(case, False)
    output, state = torch.zeros(1, 17, 4, 128), torch.zeros(1, 4, 128, 128)
    torch.library.opcheck(
        torch.ops.mate.kda_out.default, (*inputs, False, output, state, None, None)
    )
    without = list(inputs)
    without[6] = None
    torch.library.opcheck(
        torch.ops.mate.kda_out.default, (*without, True, output, state, None, None)
    )
    pool, tokens = torch.zeros(3, 4, 128, 128), torch.zeros(1, 17, 4, 128, 128)
    recurrent = (*without[:-1], True)
    torch.library.opcheck(
        torch.ops.mate.kda_out.default,
        (*recurrent, True, output, pool, torch.tensor([2]), tokens),
    )
    torch.library.opcheck(torch.ops.mate.kda_backward.default, (output, state, *inputs))


def test_opcheck_with_a_permuted_state():
    case = draw(B=2, T=17, Hqk=2, Hv=2)
    case.tensors["initial_state"] = case.tensors["initial_state"].transpose(0, 1)
    inputs = op_inputs(case, False)
    output, state = torch.zeros(2, 17, 2, 128), torch.zeros(2, 2, 128, 128)
    torch.library.opcheck(torch.ops.mate.kda.default, (*inputs, True))
    torch.library.opcheck(torch.ops.mate.kda_backward.default, (output, state, *inputs))


def layer(q, k, v, g, beta, A_log, dt_bias, initial_state):
    output, state = mate.chunk_kda(
        2 * q, k, v, g, beta, A_log=A_log, dt_bias=dt_bias, initial_state=initial_state,
        output_final_state=True,
    )  # fmt: skip
    return output + 1, state


def test_compile_fullgraph_20_lengths_one_graph():
    counter = CompileCounter()
    torch._dynamo.reset()
    compiled = torch.compile(layer, backend=counter, fullgraph=True, dynamic=True)
    for T in range(11, 31):
        case = draw(T=T)
        found, expected = compiled(**case.tensors), layer(**case.tensors)
        assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])
    assert counter.frame_count == 1


def test_compile_marks_lengths_dynamic_by_itself():
    """Without dynamic=True the second length makes T symbolic; the other 18 reuse that."""
    counter = CompileCounter()
    torch._dynamo.reset()
    compiled = torch.compile(layer, backend=counter, fullgraph=True)
    for T in range(11, 31):
        compiled(**draw(T=T).tensors)
    assert counter.frame_count == 2


def test_compile_forward_and_backward():
    torch._dynamo.reset()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True, dynamic=True)
    for T in (20, 37):
        case = draw(T=T)
        grads = []
        for function in (compiled, layer):
            inputs = {k: x.clone().requires_grad_() for k, x in case.tensors.items()}
            output, state = function(**inputs)
            (output.square().sum() + state.sum()).backward()
            grads.append([x.grad for x in inputs.values()])
        for found, expected in zip(*grads, strict=True):
            assert rel_rms(found, expected) < 1e-6


def test_compile_in_place_decode():
    """The compiled step updates the caller's state, as the eager one does."""

    def step(q, k, v, g, beta, A_log, dt_bias, state):
        return mate.recurrent_kda(
            q, k, v, g, beta, A_log=A_log, dt_bias=dt_bias, initial_state=state, final_state=state
        )

    torch._dynamo.reset()
    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    case = draw(B=2, T=1)
    states = [case.tensors.pop("initial_state").clone() for _ in range(1)]
    states.append(states[0].clone())
    with torch.no_grad():
        found = compiled(**case.tensors, state=states[0])
        expected = step(**case.tensors, state=states[1])
    assert torch.equal(found, expected) and torch.equal(states[0], states[1])


@pytest.mark.parametrize("operator", [mate.chunk_kda, mate.recurrent_kda])
def test_compile_a_step_on_a_pool(operator):
    def step(pool, indices, **inputs):
        return operator(**inputs, initial_state=pool, final_state=pool, state_indices=indices) + 1

    torch._dynamo.reset()
    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    case = draw(B=3, T=5, state=False)
    for indices in ([2, -1, 0], [1, 3, 2]):
        pools = [torch.ones(4, 2, 128, 128), torch.ones(4, 2, 128, 128)]
        index = torch.tensor(indices)
        found = compiled(pools[0], index, **case.kwargs())
        assert torch.equal(found, step(pools[1], index, **case.kwargs()))
        assert torch.equal(pools[0], pools[1]) and not torch.all(pools[0] == 1)


def test_compile_token_states():
    def step(token_states, **inputs):
        return mate.recurrent_kda(**inputs, token_states=token_states)

    torch._dynamo.reset()
    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    case = draw(B=2, T=3)
    found, expected = torch.zeros(2, 2, 3, 2, 128, 128)
    y = compiled(found, **case.kwargs())
    assert torch.equal(y, step(expected, **case.kwargs()))
    assert torch.equal(found, expected) and torch.count_nonzero(found)


def test_export_with_dynamic_length():
    class Module(torch.nn.Module):
        def forward(self, q, k, v, g, beta, A_log, dt_bias, initial_state):
            return layer(q, k, v, g, beta, A_log, dt_bias, initial_state)

    T = torch.export.Dim("T", min=2, max=4096)
    case = draw(T=20)
    sequence = ("q", "k", "v", "g", "beta")
    shapes = {key: {1: T} if key in sequence else None for key in case.tensors}
    program = torch.export.export(
        Module(), (), kwargs=case.tensors, dynamic_shapes=shapes, strict=False
    )
    assert len(list(program.graph.nodes)) < 30
    for length in (20, 3, 77):
        case = draw(T=length)
        found, expected = program.module()(**case.tensors), layer(**case.tensors)
        assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])
