"""Drawn cases of the operator against the float64 recurrence: everything may vary, all at once.

A case is its number: the same number draws the same case anywhere. Every tensor lies somewhere in
a larger buffer whose other elements are NaN (inputs) or a pattern (outputs), so that a read or a
write outside shows. `make fuzz` draws 100,000; the test suite runs a fixed few hundred.

    python tests/fuzz_kda.py --cases 1000 --first 0
    python tests/fuzz_kda.py --first 4711 --cases 1        # one case again, with its description
"""

import argparse
import random
import sys
from typing import Any

import torch
from kda_cases import BOUNDS, D, rel_rms
from torch import Tensor
from tqdm import tqdm

import mate
from mate.backends import native
from mate.functional import kda_reference

LENGTHS = (0, 1, 1, 1, 2, 3, 7, 8, 12, 13, 14, 15, 16, 17, 18, 31, 32, 33, 34, 47, 48, 49, 65)
# output, final state: the contract's exception for correlated keys in 16 bits
CORRELATED = {0.75: 8e-3, 0.9: 1e-2, 0.99: 2.5e-2}
PATTERN = -12345.0


def isas() -> list[str]:
    """The instruction sets that this processor can run."""
    found = [name for name in ("amx", "avx512", "avx2", "portable") if native.use_isa(name)]
    native.use_isa(None)
    assert found, native.library()
    return found


class Buffers:
    """Places tensors inside larger buffers and remembers what must stay as it is."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.outputs: list[tuple[Tensor, Tensor]] = []

    def _view(self, shape: tuple[int, ...], dtype: torch.dtype, fill: float) -> tuple:
        """A buffer and a view of it of ``shape`` with a random offset and random gaps."""
        gaps = [self.rng.choice((0, 0, 1, 2)) for _ in shape[:-1]] + [0]
        sizes = [size + gap for size, gap in zip(shape, gaps, strict=True)]
        if len(shape) > 1 and self.rng.random() < 0.5:
            sizes[-1] += self.rng.choice((1, 3, 8))  # rows that are not aligned to vectors
        strides = [1]
        for size in reversed(sizes[1:]):
            strides.insert(0, strides[0] * max(1, size))
        offset = self.rng.choice((0, 1, 5, 64))
        count = offset + strides[0] * max(1, sizes[0]) + 64
        buffer = torch.full((count,), fill, dtype=dtype)
        return buffer, buffer.as_strided(shape, strides, offset)

    def input(self, x: Tensor) -> Tensor:
        buffer, view = self._view(tuple(x.shape), x.dtype, torch.nan)
        view.copy_(x)
        return view

    def output(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        buffer, view = self._view(shape, dtype, PATTERN)
        view.fill_(torch.nan)
        self.outputs.append((buffer, view))
        return view

    def check_guards(self) -> None:
        for buffer, view in self.outputs:
            inside = torch.zeros_like(buffer, dtype=torch.bool)
            inside.as_strided(view.shape, view.stride(), view.storage_offset()).fill_(True)
            expected = torch.tensor(PATTERN, dtype=buffer.dtype)
            assert (buffer[~inside] == expected).all(), "wrote outside of an output"


def draw(number: int) -> tuple[dict[str, Any], dict[str, Any], Buffers]:
    """(description, arguments of the operator, buffers) of case ``number``."""
    rng = random.Random(number)
    generator = torch.Generator().manual_seed(number)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator)

    pick = rng.choice
    dtype = pick((torch.float32, torch.bfloat16, torch.bfloat16, torch.float16))
    Hqk, group = pick((1, 1, 1, 2)), pick((1, 1, 2, 3))
    Hv = Hqk * group
    varlen = rng.random() < 0.5
    lens = [pick(LENGTHS) for _ in range(rng.randint(0, 3))] if varlen else None
    B, T = (1, sum(lens)) if lens is not None else (pick((0, 1, 1, 2)), pick(LENGTHS))
    N = B if lens is None else len(lens)
    gate = pick(("bounded", "softplus", "log"))
    regime = pick(("forgetting", "remembering", "strong", "erasing", "mixed"))
    cosine = pick((0.0, 0.0, 0.0, 0.75, 0.9, 0.99))

    k = cosine**0.5 * normal(1, 1, Hqk, D) + (1 - cosine) ** 0.5 * normal(B, T, Hqk, D)
    a = -uniform(B, T, Hv, D) * (0.2 + 2 * uniform(Hv, 1))
    scale_of_a = {"remembering": 1e-3, "strong": 20.0, "mixed": 1.0}.get(regime, 1.0)
    a = a * scale_of_a
    if regime == "mixed":
        a = a * torch.where(uniform(D) < 0.5, 20.0, 1e-3)
    options: dict[str, Any] = {}
    tensors = {"q": normal(B, T, Hqk, D), "k": k, "v": normal(B, T, Hv, D)}
    if gate == "log":
        if regime == "erasing":
            a = a.masked_fill(uniform(B, T, Hv, D) < 0.1, -torch.inf)
        tensors["g"] = a
    else:
        level = {"remembering": -6.0, "strong": 8.0}.get(regime, 0.0)
        tensors["g"] = normal(B, T, Hv, D) + level
        if regime == "mixed":
            tensors["g"] = tensors["g"] + torch.where(uniform(D) < 0.5, -6.0, 6.0)
        if regime == "erasing":
            tensors["g"] = tensors["g"].masked_fill(uniform(B, T, Hv, 1) < 0.2, -torch.inf)
        options["lower_bound"] = pick((-5.0, -5.0, -0.3, -80.0)) if gate == "bounded" else None
    beta = normal(B, T, Hv) + (4.0 if cosine else 0.0)
    if rng.random() < 0.2:
        options["use_beta_sigmoid_in_kernel"] = False
        beta = beta.sigmoid()
    elif rng.random() < 0.2 and not cosine:
        options["allow_neg_eigval"] = True
    tensors["beta"] = beta
    if rng.random() < 0.2:
        options["use_qk_l2norm_in_kernel"] = False
        tensors["k"] = torch.nn.functional.normalize(tensors["k"], dim=-1)
    if rng.random() < 0.3:
        options["scale"] = pick((1.0, 0.01))
    if rng.random() < 0.3:
        options["state_v_first"] = False

    wide = {name for name in ("g", "beta") if rng.random() < 0.3}
    tensors = {n: x.float() if n in wide else x.to(dtype) for n, x in tensors.items()}
    state_dtype = pick((torch.float32, torch.float32, dtype))
    if rng.random() < 0.8:
        tensors["initial_state"] = (normal(N, Hv, D, D) * torch.linspace(0.1, 2, D)).to(state_dtype)
    if gate != "log":
        tensors["A_log"] = normal(Hv) * 0.5
        tensors["dt_bias"] = normal(Hv, D)
    buffers = Buffers(rng)
    tensors = {name: buffers.input(x) for name, x in tensors.items()}
    if lens is not None:
        bounds = torch.tensor([0, *lens], dtype=pick((torch.int32, torch.int64)))
        tensors["cu_seqlens"] = bounds.cumsum(0).to(bounds.dtype)
        if rng.random() < 0.5:
            for name in ("q", "k", "v", "g", "beta"):
                tensors[name] = tensors[name].squeeze(0)

    outputs: dict[str, Tensor] = {}
    if rng.random() < 0.7:
        outputs["output"] = buffers.output(tuple(tensors["v"].shape), dtype)
    way = rng.random()
    if way < 0.3 and "initial_state" in tensors:
        outputs["final_state"] = tensors["initial_state"]  # in place
    elif way < 0.7:
        kind = tensors["initial_state"].dtype if "initial_state" in tensors else state_dtype
        outputs["final_state"] = buffers.output((N, Hv, D, D), kind)
    if way < 0.15 and "initial_state" in tensors:
        pool, tensors["state_indices"] = into_pool(tensors["initial_state"], rng)
        tensors["initial_state"] = outputs["final_state"] = buffers.input(pool)
    about = {
        "operator": pick(("chunk_kda", "recurrent_kda")),
        "isa": pick(isas()),
        "threads": pick((1, 2)),
        **dict(dtype=dtype, B=B, T=T, Hqk=Hqk, Hv=Hv, lens=lens, gate=gate, regime=regime),
        **dict(cosine=cosine, **options, wide=sorted(wide), given=sorted(outputs)),
        "slots": tensors["state_indices"].tolist() if "state_indices" in tensors else None,
        "state": tensors["initial_state"].dtype if "initial_state" in tensors else None,
    }
    return about, {**tensors, **options, **outputs}, buffers


def into_pool(states: Tensor, rng: random.Random) -> tuple[Tensor, Tensor]:
    """A pool of states, NaN where no sequence has its own, and the slots; some lie outside."""
    count = len(states)
    size = count + rng.randint(0, 2)
    slots = rng.sample(range(size), count)
    slots = [rng.choice((-1, size, -(2**31))) if rng.random() < 0.3 else i for i in slots]
    pool = states.new_full((size, *states.shape[1:]), torch.nan)
    for state, slot in zip(states, slots, strict=True):
        if 0 <= slot < size:
            pool[slot] = state
    return pool, torch.tensor(slots, dtype=rng.choice((torch.int32, torch.int64)))


def own_states(pool: Tensor, slots: Tensor) -> Tensor:
    """Each sequence's state, zeros for those outside the pool."""
    inside = [0 <= i < len(pool) for i in slots.tolist()]
    own = pool.new_zeros(len(slots), *pool.shape[1:])
    own[inside] = pool[slots.long()[inside]]
    return own


def run(number: int) -> tuple[float, float]:
    """Errors of (output, final state) as shares of their bounds; raises what went wrong."""
    about, arguments, buffers = draw(number)
    torch.set_num_threads(1)
    inputs = {k: v for k, v in arguments.items() if k not in ("output", "final_state")}
    reference, slots = dict(inputs), inputs.get("state_indices")
    if slots is not None:
        pool = inputs["initial_state"]
        reference["initial_state"], before = (
            own_states(pool, reference.pop("state_indices")),
            pool.clone(),
        )
    expected = kda_reference(**reference)  # before the call, which may write its state in place
    kept = {
        k: v.clone()
        for k, v in inputs.items()
        if isinstance(v, Tensor) and v is not arguments.get("final_state")
    }
    native.use_isa(about["isa"])
    torch.set_num_threads(about["threads"])
    try:
        operator = getattr(mate, about["operator"])
        output, state = operator(**arguments, output_final_state=True)
    finally:
        native.use_isa(None)
    buffers.check_guards()
    for name, x in kept.items():
        assert torch.equal(x, inputs[name]), f"{name} was modified"
    if slots is not None:
        inside = [0 <= i < len(pool) for i in slots.tolist()]
        used = slots.long()[inside]
        expected, state = (expected[0], expected[1][inside]), pool[used].clone()
        before[used] = pool[used]
        assert torch.equal(before.nan_to_num(7.5), pool.nan_to_num(7.5)), "another slot was written"
    bounds = list(BOUNDS[about["dtype"]][:2])
    if about["dtype"] != torch.float32 and about["cosine"]:
        bounds = [CORRELATED[about["cosine"]]] * 2
    if state.dtype != torch.float32:
        bounds[1] = max(bounds[1], BOUNDS[state.dtype][1])
    shares = []
    for what, actual, truth, bound in zip(
        ("output", "final state"), (output, state), expected, bounds, strict=True
    ):
        error = rel_rms(actual, truth)
        assert error <= bound, f"{what}: relative RMS error {error:.2e} > {bound:.0e}"
        shares.append(error / bound)
    return shares[0], shares[1]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", type=int, default=1000, help="how many (default: 1000)")
    parser.add_argument("--first", type=int, default=0, help="number of the first (default: 0)")
    options = parser.parse_args()
    if options.cases == 1:
        print(draw(options.first)[0])
    failed, worst = [], (0.0, 0.0)
    for number in tqdm(range(options.first, options.first + options.cases), disable=None):
        try:
            shares = run(number)
        except Exception as error:
            failed.append(number)
            tqdm.write(f"case {number}: {type(error).__name__}: {error}\n  {draw(number)[0]}")
        else:
            worst = (max(worst[0], shares[0]), max(worst[1], shares[1]))
    print(f"{options.cases - len(failed)} passed, {len(failed)} failed")
    print(f"worst error as a share of its bound: output {worst[0]:.2f}, state {worst[1]:.2f}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
