"""Calls like an earlier one, which skip the checks: their numbers, and what is asked all the same.

A call that took the short way leaves an entry in the fixture ``short``.
"""

import subprocess
import sys

import fuzz_kda
import pytest
import torch
from kda_cases import D, draw, rel_rms
from test_direct import Passing, Seen, Subclass
from test_kda_states import states_after_each
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import mate
from mate import backends
from mate.backends import gpu, native
from mate.backends.prepared import Prepared
from mate.functional import kda, ops, repeated

pytestmark = pytest.mark.usefixtures("poison")


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setattr(kda, "_repeated", repeated.Remembered())
    run, taken = Prepared.run, []
    monkeypatch.setattr(Prepared, "run", lambda *args: taken.append(args) or run(*args))
    return taken


def in_place(seed=0, **changes):
    """A call that is remembered. ``changes`` may be functions of its arguments."""
    given = draw(B=2, T=2, seed=seed, scale=1.0).kwargs()
    given["initial_state"] = given["final_state"] = torch.cat([given["initial_state"]] * 2)[:2]
    given["output"] = torch.full_like(given["v"], torch.nan)
    return given | {name: x(given) if callable(x) else x for name, x in changes.items()}


@pytest.mark.parametrize("first", range(0, 600, 150))
def test_drawn_cases_twice(first, short, monkeypatch):
    """The second time with other values, while the first ones keep their addresses."""
    monkeypatch.setattr(fuzz_kda, "LENGTHS", (0, 1, 1, 1, 2, 3))
    drawn, calls, remembered = fuzz_kda.draw, [], 0

    def recurrent(number):
        about, arguments, buffers = drawn(number)
        floats = [x for x in arguments.values() if isinstance(x, Tensor) and x.is_floating_point()]
        for x in {id(x): x for x in floats}.values():
            x.copy_(x.flip(-1) if calls else x)
        if number % 5 == 0 and "A_log" in arguments:
            arguments["A_log"] = arguments["A_log"].double()
        calls.append(arguments)
        return about | {"operator": "recurrent_kda", "threads": 1}, arguments, buffers

    monkeypatch.setattr(fuzz_kda, "draw", recurrent)
    for number in range(first, first + 150):
        calls.clear()
        short.clear()
        for _ in range(2):
            fuzz_kda.run(number)
        names, gate = calls[0].keys(), [calls[0].get("A_log"), calls[0].get("dt_bias")]
        expected = "final_state" in names and not names & {"cu_seqlens", "state_indices"}
        expected &= all(x is None or x.is_contiguous() and x.nbytes == 4 * x.numel() for x in gate)
        assert len(short) == expected, f"case {number}"
        remembered += expected
    assert remembered > 20


def test_every_option_counts(short):
    for options in (
        *({}, {"scale": 0.3}, {"lower_bound": -1.0}, {"lower_bound": None}, {"scale": 0.7}),
        *({"allow_neg_eigval": True}, {"state_v_first": False}, {"use_qk_l2norm_in_kernel": False}),
        {"use_beta_sigmoid_in_kernel": False},
    ):
        for output_final_state in (False, True):
            case = draw(T=1, **options)
            found = mate.recurrent_kda(**case.kwargs(), output_final_state=output_final_state)
            pairs = zip(found if output_final_state else [found], case.reference(), strict=False)
            assert all(rel_rms(x, y) < 1e-5 for x, y in pairs) and not short


def test_states_after_each_token(short):
    for seed in range(2):
        case = draw(B=2, T=3, Hv=4, dtype=torch.bfloat16, seed=seed)
        wide = torch.full((2, 3, 5, D, D), torch.nan)
        output = mate.recurrent_kda(**case.kwargs(), token_states=wide[:, :, :4])
        assert rel_rms(output, case.reference()[0]) < 5e-3
        assert rel_rms(wide[:, :, :4], states_after_each(case)) < 4e-3
        assert wide[:, :, 4].isnan().all()
    assert len(short) == 1


@pytest.mark.parametrize("batched", [True, False], ids=["[1, S]", "[S]"])
def test_packed_sequences_where_no_value_is_read(batched, short, monkeypatch):
    """As on a GPU: the kernel gets the same structure both times."""
    sent = []
    for owner, name, stand_in in (
        (kda, "is_direct", lambda *_: True),
        (ops, "_check_apart", lambda *_: None),  # tensors without memory lie all at one address
        (repeated.Extents, "apart", lambda *_: True),
        (backends, "backend_for", lambda *_, **__: backends.Choice("native", {})),
        (backends, "forward", lambda *call: sent.append(native.pack(*call)[0])),
        (gpu, "Queue", lambda *_: lambda packed, workspace: sent.append(packed)),
    ):
        monkeypatch.setattr(owner, name, stand_in)
    given = draw(lens=[3, 4], Hv=4, state=False).tensors
    given |= {"token_states": torch.empty(1, 7, 4, D, D), "output": torch.empty(1, 7, 4, D)}
    if not batched:
        given |= {n: x[0] for n, x in given.items() if x.shape[:2] == (1, 7)}
    given |= {"initial_state": torch.empty(5, 4, D, D), "state_indices": torch.arange(2)}
    given = {name: x.to("meta") for name, x in given.items()}
    for _ in range(2):
        mate.recurrent_kda(**given, final_state=given["initial_state"])
    assert short and sent[0] == sent[1]


def behind(elements):
    """A final state so far behind the beginning of the initial one."""
    return lambda t: t["initial_state"].as_strided((2, 2, D, D), (2 * D * D, D * D, D, 1), elements)


INDICES = [{"state_indices": torch.tensor(x)} for x in ([1, 0], [1, 1])]
PACKED = draw(lens=[2, 3]).tensors | {"output": torch.full((1, 5, 2, D), torch.nan)}
DOCUMENTS = [
    PACKED | {"cu_seqlens": torch.tensor(x), "final_state": None} for x in ([0, 2, 5], [0, 6, 5])
]
ERRORS = {  # with what changes a call is good, and then bad
    "output must not overlap v": ({}, {"output": lambda t: t["v"]}),
    "must not overlap initial": ({"final_state": behind(4 * D * D)}, {"final_state": behind(64)}),
    "final_state must not overlap": ({}, {"final_state": behind(64)}),
    "autograd cannot follow": ({}, {"g": lambda t: t["g"].requires_grad_()}),
    "where gradients are needed": ({}, {"output": lambda t: t["output"].requires_grad_()}),
    "cu_seqlens must not decrease": DOCUMENTS,
    "got 1 twice": INDICES,
    "scale must be a float or None, got bool": ({"scale": 1.0}, {"scale": True}),
    "k must be a torch.Tensor": ({}, {"k": [1.0]}),
}


@pytest.mark.parametrize("message", ERRORS)
def test_errors_after_good_calls(message, short):
    good, bad = ERRORS[message]
    for _ in range(2):
        mate.recurrent_kda(**in_place(**good))
    assert len(short) == (not good.keys() & {"cu_seqlens", "state_indices"})
    short.clear()
    given = in_place(**bad)
    before = {n: x.detach().clone() for n, x in given.items() if isinstance(x, Tensor)}
    with pytest.raises((ValueError, TypeError), match=message):
        mate.recurrent_kda(**given)
    for name, x in before.items():
        assert torch.equal(given[name].nan_to_num(7.5), x.nan_to_num(7.5)), f"{name} was written"
    assert not short


def test_backends_and_threads_of_the_moment(short, monkeypatch):
    sent, run = [], native.run
    monkeypatch.setattr(native, "run", lambda name, x: sent.append(x) or run(name, x))
    expected = mate.recurrent_kda(**in_place())
    torch.set_num_threads(1)
    assert torch.equal(mate.recurrent_kda(**in_place()), expected) and len(short) == 1
    assert [native.KDA.unpack(x)[-1] for x in sent] == [2, 1]
    monkeypatch.setenv("MATE_DISABLE", "native")
    assert rel_rms(mate.recurrent_kda(**in_place()), expected) < 1e-5 and len(sent) == 2
    monkeypatch.delenv("MATE_DISABLE")
    assert torch.equal(mate.recurrent_kda(**in_place()), expected) and len(short) == 2


def test_autograd_is_told_and_asked(short):
    for _ in range(2):
        given = in_place(token_states=torch.empty(2, 2, 2, D, D))
        written = [given[name] for name in ("output", "final_state", "token_states")]
        versions = [x._version for x in written]
        loss = (given["final_state"] * torch.randn(D, requires_grad=True)).sum()
        mate.recurrent_kda(**given)
        assert [x._version for x in written] == [v + 1 for v in versions]
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()
    tensors = draw(T=3).tensors
    for _ in range(2):
        expected = mate.recurrent_kda(**tensors)
    tensors["v"].requires_grad_()
    output = mate.recurrent_kda(**tensors)
    output.sum().backward()
    assert len(short) == 2 and torch.equal(output, expected) and tensors["v"].grad.any()


def test_whoever_looks_on_sees_the_operator(short):
    for _ in range(2):
        expected = mate.recurrent_kda(**in_place())
    with Seen() as seen:
        assert torch.equal(mate.recurrent_kda(**in_place()), expected)
    with torch.profiler.profile() as profile:
        mate.recurrent_kda(**in_place())
    assert "mate::kda_out" in seen.names and "mate::kda_out" in {x.name for x in profile.events()}
    with Passing():
        mate.recurrent_kda(**in_place())
    mate.recurrent_kda(**in_place(q=lambda t: t["q"].as_subclass(Subclass)))
    with FakeTensorMode() as mode:
        fake = {name: mode.from_tensor(x) for name, x in draw(B=2, T=2).tensors.items()}
        mate.recurrent_kda(**fake, scale=1.0, final_state=fake["initial_state"])
    compiled = torch.compile(mate.recurrent_kda, backend="eager", fullgraph=True)
    assert torch.equal(compiled(**in_place()), expected) and len(short) == 1


def test_values_that_are_not_what_memory_holds(short):
    """A tensor with the negative bit, which one head's beta may be; a flag that is a tensor."""
    tensors, z = draw(Hqk=1, Hv=1, T=2).tensors, torch.randn(1, 2, dtype=torch.complex64)
    flag, results = torch.tensor(True), []
    for beta in (z.imag, z.conj().imag, -z.imag):
        tensors["beta"] = beta.unsqueeze(-1)
        results.append(mate.recurrent_kda(**tensors))
    assert torch.equal(results[1], results[2]) and not torch.equal(results[0], results[1])
    for _ in range(2):
        results.append(mate.recurrent_kda(**tensors, use_qk_l2norm_in_kernel=flag))
        flag.fill_(False)
    assert torch.equal(results[3], results[2]) and not torch.equal(results[4], results[2])
    unhashable = type("Flag", (int,), {"__hash__": None})(1)
    assert torch.equal(
        mate.recurrent_kda(**tensors, use_qk_l2norm_in_kernel=unhashable), results[2]
    )


def test_the_same_tensor_twice(short):
    """In one call of two of one form, and then the other way round."""
    for one in (True, False, True, False):
        case = draw(T=2, Hqk=2, Hv=2, scale=1.0)
        if one:
            case.tensors["k"] = case.tensors["q"]
        assert rel_rms(mate.recurrent_kda(**case.kwargs()), case.reference()[0]) < 1e-5
    assert len(short) == 2 and len(kda._repeated) == 2


def test_gradients_that_were_not_asked_for_before(short):
    """Of one form: parameters decode under no_grad, and are trained afterwards."""
    tensors = draw(T=2).tensors
    tensors["A_log"].requires_grad_()
    with torch.no_grad():
        for _ in range(2):
            expected = mate.recurrent_kda(**tensors)
    output = mate.recurrent_kda(**tensors)
    output.sum().backward()
    assert torch.equal(output, expected) and tensors["A_log"].grad.all() and len(short) == 1


def test_modes_that_change_what_pytorch_does(short):
    tensors = draw(T=2).tensors
    expected = mate.recurrent_kda(**tensors)
    for mode in (torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu"), torch.no_grad):
        with mode():
            for _ in range(2):
                assert torch.equal(mate.recurrent_kda(**tensors), expected)
    assert len(short) == 6


def test_a_nested_tensor_is_an_error():
    """In a process of its own, which must live."""
    script = """
import torch, mate
t = {name: torch.randn(1, 2, 2, 128) for name in "qkvg"} | {"beta": torch.randn(1, 2, 2)}
mate.recurrent_kda(**t)
for name in t:
    try:
        mate.recurrent_kda(**t | {name: torch.nested.nested_tensor([t[name][0]])})
    except (RuntimeError, ValueError, TypeError):
        print(name)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.split() == ["q", "k", "v", "g", "beta"], done.stderr


def test_one_shape_in_many_forms(short):
    """The last ones are kept, and found again whatever their order."""
    wide = [draw(T=1).tensors for _ in range(repeated.MOST_ALIKE + 3)]
    for i, t in enumerate(wide):
        v = torch.randn(1, 1, 2 + i, D)  # so that the batch's stride differs
        t["v"] = v[:, :, :2]
        mate.recurrent_kda(**t)
    assert len(kda._repeated) == repeated.MOST_ALIKE and not short
    for t in (wide[-1], wide[3], wide[-1], wide[5]):
        mate.recurrent_kda(**t)
    assert len(short) == 4
    mate.recurrent_kda(**wide[0])
    assert len(short) == 4 and len(kda._repeated) == repeated.MOST_ALIKE


def test_so_many_and_no_more(monkeypatch):
    monkeypatch.setattr(repeated, "MOST", 3)
    for T in (1, 2, 3, 4, 1, 4):
        case = draw(T=T)
        assert rel_rms(mate.recurrent_kda(**case.kwargs()), case.reference()[0]) < 1e-5
        assert 0 < len(kda._repeated) <= 3


def test_another_call_in_the_midst_of_one(short, monkeypatch):
    """As another thread's may be."""
    expected = [mate.recurrent_kda(**in_place(seed)) for seed in range(2)]
    waiting, found, threads = [in_place(1)], [], torch.get_num_threads

    def interrupted():
        if waiting:
            found.append(mate.recurrent_kda(**waiting.pop()))
        return threads()

    monkeypatch.setattr(torch, "get_num_threads", interrupted)
    found.insert(0, mate.recurrent_kda(**in_place(0)))
    assert len(short) == 3 and all(map(torch.equal, found, expected))
