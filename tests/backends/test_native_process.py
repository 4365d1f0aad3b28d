"""The native library inside a process: several callers, fork, and a million tokens."""

import os
import threading

import pytest
import torch
from kda_cases import D, draw, rel_rms

import mate


def test_concurrent_calls():
    """Calls from several Python threads, each in its own parallel region, do not mix."""
    cases = [draw(T=40 + 7 * n, Hqk=1, Hv=4, seed=n) for n in range(4)]
    expected = [mate.chunk_kda(**case.kwargs(), output_final_state=True) for case in cases]
    failures = []

    def work(n: int) -> None:
        for _ in range(20):
            found = mate.chunk_kda(**cases[n].kwargs(), output_final_state=True)
            if not all(map(torch.equal, found, expected[n])):
                failures.append(n)

    workers = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not failures


def test_fork_after_use():
    """A data loader's workers fork after the model ran: the child must not hang or crash."""
    case = draw(T=300, Hv=4)
    expected = mate.chunk_kda(**case.kwargs())
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        torch.set_num_threads(1)  # as torch's data loader does in its workers
        same = torch.equal(mate.chunk_kda(**case.kwargs()), expected)
        os.write(writer, b"1" if same else b"0")
        os._exit(0)
    os.close(writer)
    assert os.read(reader, 1) == b"1"
    assert os.waitpid(child, 0)[1] == 0


def test_a_million_tokens():
    """A state carried over 65,536 tiles, in one call and in 256: the same to fp32's rounding."""
    pieces, length = 256, 4096
    case = draw(T=length, Hqk=1, Hv=1, dtype=torch.bfloat16, regime="remembering", state=False)
    t, gate = case.tensors, {name: case.tensors[name] for name in ("A_log", "dt_bias")}
    piece = {name: t[name] for name in ("q", "k", "v", "g", "beta")}
    whole = {n: torch.cat([x] * pieces, dim=1) for n, x in piece.items()}
    output, state = mate.chunk_kda(**whole, **gate, output_final_state=True)
    carried = torch.zeros(1, 1, D, D)
    for n in range(pieces):
        part = mate.chunk_kda(**piece, **gate, initial_state=carried, final_state=carried)
        if n in (0, pieces - 1):
            assert rel_rms(output[:, n * length : (n + 1) * length], part) < 1e-3
    assert rel_rms(state, carried) < 1e-5


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_thread_count_is_torchs(threads):
    """However many threads share the work, the numbers are the same to the last bit."""
    case = draw(T=200, Hqk=1, Hv=3, regime="remembering")
    torch.set_num_threads(1)
    expected = mate.chunk_kda(**case.kwargs(), output_final_state=True)
    torch.set_num_threads(threads)
    found = mate.chunk_kda(**case.kwargs(), output_final_state=True)
    assert all(map(torch.equal, found, expected))
