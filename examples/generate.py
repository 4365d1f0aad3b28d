"""Kimi Delta Attention in a Hugging Face model, without mate and with it.

Builds a small Kimi Linear model with random weights (or loads the one that --model names), lets
it read a prompt and continue it greedily from the cached state, and does the same again after
`mate.hf.patch(model)`. The tokens must be the same; the exit code is 1 where they are not.

    python examples/generate.py
    python examples/generate.py --prompt-tokens 4096 --new-tokens 128
    python examples/generate.py --model path/to/checkpoint --dtype bfloat16
"""

import argparse
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from threads import idle_cores
from torch import Tensor
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers import logging as transformers_logging
from transformers.cache_utils import DynamicCache
from transformers.models.kimi_linear import KimiLinearConfig, KimiLinearForCausalLM

import mate
import mate.hf

WARM_UP = 64  # tokens of prompt, so that neither side pays for its first call in the timing


def random_model() -> PreTrainedModel:
    """Kimi Linear in small, on bytes: three KDA layers, then one of full attention, and about as
    many heads for its width."""
    torch.manual_seed(0)
    config = KimiLinearConfig(
        vocab_size=256,
        hidden_size=512,
        intermediate_size=1024,
        num_hidden_layers=4,
        layer_types=["linear_attention"] * 3 + ["full_attention"],
        mlp_layer_types=["dense"] * 4,
        linear_num_heads=8,
        linear_head_dim=128,
        num_attention_heads=8,
        num_key_value_heads=8,
        kv_lora_rank=128,
        qk_nope_head_dim=64,
        qk_rope_head_dim=32,
        v_head_dim=64,
        initializer_range=0.05,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
    )
    return KimiLinearForCausalLM(config)


@dataclass
class Run:
    tokens: Tensor  # [new_tokens]
    logits: Tensor  # [new_tokens, vocabulary]: what each token was chosen from
    prefill_seconds: float
    step_seconds: float  # median of the decode steps


@torch.inference_mode()
def generate(model: PreTrainedModel, prompt: Tensor, new_tokens: int, progress: tqdm) -> Run:
    """Read the prompt [1, T] in one call, then decode greedily, one token a call."""
    cache = DynamicCache(config=model.config)
    tokens, logits, seconds = [prompt], [], []
    for _ in range(new_tokens):
        start = time.perf_counter()
        output = model(tokens[-1], past_key_values=cache, use_cache=True, logits_to_keep=1)
        logits.append(output.logits[0, -1].float())
        progress.update(tokens[-1].shape[1])
        tokens.append(logits[-1].argmax().view(1, 1))
        seconds.append(time.perf_counter() - start)
    prefill, *steps = seconds
    return Run(torch.cat(tokens[1:], 1)[0], torch.stack(logits), prefill, statistics.median(steps))


def report(before: Run, after: Run, prompt_tokens: int) -> bool:
    """Print both runs side by side; true where they chose the same tokens."""
    decoded = len(before.tokens) - 1  # the prefill gives the first

    def line(name: str, prefill: float, decode: float, form: str) -> None:
        print(f"{name:<16}{format(prefill, form):>18}{format(decode, form):>18}")

    print(f"{'':<16}{'prefill':>18}{'decode':>18}")
    print(f"{'':<16}{f'{prompt_tokens:,} tokens':>18}{f'{decoded:,} tokens':>18}")
    for name, run in (("transformers", before), ("with mate", after)):
        line(name, prompt_tokens / run.prefill_seconds, 1 / run.step_seconds, ",.0f")
    speed_ups = (
        before.prefill_seconds / after.prefill_seconds,
        before.step_seconds / after.step_seconds,
    )
    line("speed-up", *speed_ups, ".1f")
    print("tokens per second of the whole model: one prefill, the median decode step")
    print("(the rest is matrix products and attention: benchmarks/cpu.py times KDA alone)\n")

    same = before.tokens == after.tokens
    # Once a token differs, the texts do, and later logits answer different questions.
    compared = len(same) if same.all() else int(same.int().argmin()) + 1
    difference = (before.logits[:compared] - after.logits[:compared]).abs().max().item()
    best = before.logits[:compared].topk(2).values
    lead = (best[:, 0] - best[:, 1]).min().item()
    if same.all():
        kinds = len(before.tokens.unique())
        print(f"tokens: the same, all {len(same)} ({kinds} different ones)")
    else:
        print(f"tokens: DIFFERENT from number {compared} on")
    print(f"largest difference of a logit: {difference:.1e}")
    print(f"smallest lead of a chosen token over the next best: {lead:.1e}")
    return bool(same.all())


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model", help="folder of a saved kimi_linear model (default: a random one)"
    )
    parser.add_argument(
        "--prompt-tokens", type=int, default=2048, help="length of the prompt (default: 2048)"
    )
    parser.add_argument(
        "--new-tokens", type=int, default=64, help="tokens to decode, at least 2 (default: 64)"
    )
    parser.add_argument(
        "--dtype",
        choices=["float32", "bfloat16"],
        default="float32",
        help="dtype of the model; bfloat16 rounds so coarsely that two right answers may choose "
        "different tokens where the best two are close (default: float32)",
    )
    parser.add_argument("--threads", type=int, help="CPU threads (default: one an idle core)")
    args = parser.parse_args()
    if args.prompt_tokens < 1 or args.new_tokens < 2:
        parser.error("--prompt-tokens must be at least 1 and --new-tokens at least 2")
    torch.set_num_threads(args.threads or idle_cores())
    transformers_logging.set_verbosity_error()  # it warns that its own KDA is slow: shown below
    transformers_logging.disable_progress_bar()

    dtype = getattr(torch, args.dtype)
    if args.model:
        model = AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype)
    else:
        model = random_model().to(dtype)
    model.eval()
    text = Path(argparse.__file__).read_text(encoding="utf-8")
    tokenizer = None
    if args.model and (Path(args.model) / "tokenizer_config.json").exists():
        tokenizer = AutoTokenizer.from_pretrained(args.model)
    ids = tokenizer(text)["input_ids"] if tokenizer else list(text.encode())
    if args.prompt_tokens > len(ids):
        parser.error(f"--prompt-tokens must be at most {len(ids)}, the length of the text at hand")
    prompt = torch.tensor([ids[: args.prompt_tokens]])

    choice = mate.backend_for("cpu", dtype)
    print(f"{type(model).__name__}, {model.num_parameters() / 1e6:.1f} M parameters, {args.dtype}")
    print(f"threads: {torch.get_num_threads()}; mate's {choice.name} backend serves\n")

    steps = 2 * (len(prompt[0]) + args.new_tokens - 1)
    runs = []
    with tqdm(total=steps, unit="token", leave=False, disable=None) as progress:
        for name, prepare in (("transformers", mate.hf.unpatch), ("with mate", mate.hf.patch)):
            progress.set_description(name)
            prepare(model)
            with tqdm(disable=True) as silent:
                generate(model, prompt[:, :WARM_UP], 2, silent)
            runs.append(generate(model, prompt, args.new_tokens, progress))
    same = report(*runs, len(prompt[0]))
    if tokenizer:
        print(f"\n{tokenizer.decode(runs[1].tokens)}")
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
