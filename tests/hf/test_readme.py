"""README.md: its Python runs as it stands, and nothing in it waits to be filled in."""

import re
from pathlib import Path

import pytest
from hf_models import kimi

README = (Path(__file__).parents[2] / "README.md").read_text()
SNIPPETS = re.findall(r"^```python\n(.*?)^```", README, re.M | re.S)


@pytest.mark.parametrize("number", range(len(SNIPPETS)))
def test_snippets_run(number, tmp_path):
    code = SNIPPETS[number]
    if "path/to/a/kimi_linear/model" in code:
        kimi().save_pretrained(tmp_path)
        code = code.replace("path/to/a/kimi_linear/model", str(tmp_path))
    exec(compile(code, f"README.md, snippet {number}", "exec"), {})


def test_there_are_snippets():
    assert len(SNIPPETS) == 4 and "```py" not in re.sub(r"^```python$", "", README, flags=re.M)


def test_no_placeholder_is_left():
    assert "@@" not in README
