"""The examples run as they stand, at sizes for a test, and what they claim is asserted."""

import re
import struct
import subprocess
import sys
from pathlib import Path

import torch
from transformers.models.kimi_linear import KimiLinearConfig, KimiLinearForCausalLM

ROOT = Path(__file__).parents[2]


def run(example: str, *options: object, code: int = 0) -> str:
    """The example's standard output; it must leave standard error empty and exit with ``code``."""
    done = subprocess.run(
        [sys.executable, ROOT / "examples" / example, "--threads", "1", *map(str, options)],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == code, done.stdout + done.stderr
    assert code or not done.stderr
    return done.stdout


def numbers(pattern: str, text: str) -> list[float]:
    match = re.search(pattern, text)
    assert match, f"{pattern!r} is not in:\n{text}"
    return [float(group.replace(",", "")) for group in match.groups()]


def check_same_tokens(text: str, new_tokens: int) -> None:
    tokens, kinds = numbers(r"tokens: the same, all (\d+) \((\d+) different", text)
    assert tokens == new_tokens
    assert kinds > new_tokens / 4, "the model repeats itself: equal tokens would say little"
    (difference,) = numbers(r"largest difference of a logit: (\S+)", text)
    (lead,) = numbers(r"smallest lead of a chosen token over the next best: (\S+)", text)
    assert 0 < difference < 1e-3  # exactly 0 would mean that the same code ran twice
    assert lead > 4 * difference
    for name in ("transformers", "with mate", "speed-up"):
        assert min(numbers(name + r" +([\d,.]+) +([\d,.]+)\n", text)) > 0


def test_generate_gives_the_same_tokens() -> None:
    check_same_tokens(run("generate.py", "--prompt-tokens", 100, "--new-tokens", 12), 12)


def test_generate_with_a_saved_model(tmp_path: Path) -> None:
    torch.manual_seed(1)
    sizes = {"hidden_size": 64, "intermediate_size": 64, "initializer_range": 0.2}
    attention = {"num_attention_heads": 2, "num_key_value_heads": 2, "kv_lora_rank": 32}
    config = KimiLinearConfig(
        vocab_size=256,
        num_hidden_layers=2,
        linear_num_heads=2,
        layer_types=["linear_attention", "full_attention"],
        mlp_layer_types=["dense"] * 2,
        **dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id")),
        **sizes,
        **attention,
    )
    KimiLinearForCausalLM(config).save_pretrained(tmp_path)
    text = run("generate.py", "--model", tmp_path, "--prompt-tokens", 70, "--new-tokens", 6)
    check_same_tokens(text, 6)


def test_generate_refuses_a_prompt_longer_than_its_text() -> None:
    assert run("generate.py", "--prompt-tokens", 10**9, code=2) == ""


def test_finetune_learns_saves_and_completes(tmp_path: Path) -> None:
    options = {"max-steps": 10, "batch-size": 4, "window": 128, "hidden-size": 128}
    options |= {"eval-windows": 8, "new-tokens": 20, "out": tmp_path}
    text = run("finetune.py", *(x for k, v in options.items() for x in (f"--{k}", v)))

    before, after = numbers(r"held-out bits a byte: (\S+) before, (\S+) after 10 steps", text)
    assert 7.5 < before < 9, "an untrained model knows nothing about a byte: 8 bits"
    assert after < before - 1.5
    assert numbers(r"loaded again: the largest difference of a logit is (\S+)", text)[0] < 1e-4
    completion = text.partition("how the model goes on:\n\n        ")[2].removesuffix("\n")
    assert 5 <= len(completion) <= 20, "20 bytes are 20 characters, or 5 of 4 bytes each"

    png = (tmp_path / "loss.png").read_bytes()
    assert png[:8] == b"\x89PNG\r\n\x1a\n" and png.endswith(b"IEND\xaeB`\x82")
    width, height = struct.unpack(">II", png[16:24])
    assert width >= 600 and height >= 400 and len(png) > 10_000
    assert (tmp_path / "model" / "config.json").exists()
