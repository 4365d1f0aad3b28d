"""A fixed few hundred of the drawn cases; `make fuzz` draws more."""

import fuzz_kda
import pytest

CASES, BLOCK = 400, 50


@pytest.mark.parametrize("first", range(0, CASES, BLOCK))
def test_drawn_cases(first):
    failed = {}
    for number in range(first, first + BLOCK):
        try:
            fuzz_kda.run(number)
        except Exception as error:  # every failing number is worth naming, whatever went wrong
            failed[number] = f"{type(error).__name__}: {error} in {fuzz_kda.draw(number)[0]}"
    assert not failed
