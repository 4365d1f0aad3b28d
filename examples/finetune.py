"""Train a small hybrid of Kimi Delta Attention and attention with transformers' Trainer.

A Llama whose attention is KDA except in the middle layer learns Python one byte at a time, from
the standard library of the Python that runs it. Whole modules are held out. Afterwards the model
is saved, loaded again, and asked to complete a function that it has never seen.

    python examples/finetune.py
    python examples/finetune.py --max-steps 2000 --window 512 --hidden-size 384

Writes out/finetune/: loss.png and the saved model.
"""

import argparse
import math
import random
import sys
import sysconfig
from pathlib import Path
from typing import Any

import matplotlib
import torch
from threads import idle_cores
from torch import Tensor, nn
from torch.utils.data import Dataset
from tqdm import tqdm
from transformers import (
    AutoModelForCausalLM,
    PreTrainedModel,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)
from transformers import logging as transformers_logging

from mate.hf import MateLlamaConfig, MateLlamaForCausalLM

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402  (after the backend is chosen)

ROOT = Path(__file__).parents[1]
SKIPPED_FOLDERS = {"test", "tests", "idle_test", "site-packages", "__pycache__"}
INDENT = b" " * 8
BITS = 1 / math.log(2)  # a loss in nats a byte, in bits a byte


# ---------------------------------------------------------------- data


def read_modules() -> dict[str, bytes]:
    """The standard library's sources by name, without its tests."""
    library = Path(sysconfig.get_paths()["stdlib"])
    modules = {}
    for path in sorted(library.rglob("*.py")):
        name = path.relative_to(library)
        source = path.read_bytes()
        try:
            source.decode("utf-8")
        except UnicodeDecodeError:
            continue
        if source and not SKIPPED_FOLDERS & set(name.parts):
            modules[name.as_posix()] = source
    return modules


def split(modules: dict[str, bytes], seed: int) -> tuple[dict[str, bytes], dict[str, bytes]]:
    """Nineteen modules in twenty for training, the rest held out."""
    names = list(modules)
    random.Random(seed).shuffle(names)
    count = len(names) // 20
    held_out, training = names[:count], names[count:]
    return {n: modules[n] for n in training}, {n: modules[n] for n in held_out}


class Windows(Dataset):
    """Modules one after another, cut into windows of ``length`` bytes; a byte is a token."""

    def __init__(self, modules: dict[str, bytes], length: int, at_most: int | None = None) -> None:
        text = torch.frombuffer(bytearray(b"\n".join(modules.values())), dtype=torch.uint8)
        self.windows = text[: len(text) // length * length].view(-1, length)
        if at_most is not None and at_most < len(self.windows):
            every = torch.linspace(0, len(self.windows) - 1, at_most).long()
            self.windows = self.windows[every]

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        window = self.windows[index].long()
        return {"input_ids": window, "labels": window}


# ---------------------------------------------------------------- training


def build_model(hidden_size: int) -> PreTrainedModel:
    """KDA, attention, KDA. Every other field is LlamaConfig's."""
    config = MateLlamaConfig(
        vocab_size=256,
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=3,
        layer_types=["linear_attention", "full_attention", "linear_attention"],
        linear_num_heads=hidden_size // 128,
        num_attention_heads=hidden_size // 64,
        num_key_value_heads=hidden_size // 64,
        bos_token_id=None,
        eos_token_id=None,
    )
    return MateLlamaForCausalLM(config)


def build_optimizer(model: nn.Module, lr: float, weight_decay: float) -> torch.optim.Optimizer:
    """AdamW that decays matrices only. Decay would pull A_log and dt_bias, which set how long a
    KDA layer remembers, towards an arbitrary memory: the layer marks them `_no_weight_decay`."""
    decayed, kept = [], []
    for parameter in model.parameters():
        exempt = parameter.dim() < 2 or getattr(parameter, "_no_weight_decay", False)
        (kept if exempt else decayed).append(parameter)
    groups = [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": kept, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95))


class Bar(TrainerCallback):
    """A progress bar with the latest losses in bits a byte; silent where there is no terminal."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar = tqdm(total=state.max_steps, desc="training", leave=False, disable=None)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar.update()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        for name in ("loss", "eval_loss"):
            if name in (logs or {}) and state.global_step:
                self.bar.set_postfix_str(f"{name} {logs[name] * BITS:.2f} bits a byte")

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar.close()


def plot(history: list[dict[str, float]], path: Path) -> None:
    figure, axes = plt.subplots(figsize=(6.4, 4.0), layout="constrained")
    for key, label, style in (
        ("loss", "training", {"color": "#9db7d5"}),
        ("eval_loss", "held-out modules", {"color": "#b3541e", "marker": "o"}),
    ):
        points = [(entry["step"], entry[key] * BITS) for entry in history if key in entry]
        axes.plot(*zip(*points, strict=True), label=label, **style)
    axes.set_xlabel("step")
    axes.set_ylabel("bits a byte")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


# ---------------------------------------------------------------- what it has learned


def pick_function(held_out: dict[str, bytes]) -> tuple[str, bytes]:
    """A held-out module's name, and lines of it up to where the body of a method begins."""
    for name, source in sorted(held_out.items()):
        head = source.find(b"\n    def ", len(source) // 2)
        end = source.find(b":\n", head)
        if head > 512 and b"\n" not in source[head + 1 : end]:
            first = source.index(b"\n", head - 512) + 1
            return name, source[first : end + 2] + INDENT
    raise SystemExit("no held-out module has a method in its middle: choose another --seed")


def complete(model: PreTrainedModel, prompt: bytes, new_tokens: int) -> str:
    """generate() reads the prompt once and carries the layers' states from byte to byte."""
    tokens = torch.tensor([list(prompt)])
    written = model.generate(
        tokens,
        attention_mask=torch.ones_like(tokens),
        max_new_tokens=new_tokens,
        do_sample=True,
        temperature=0.8,
        top_k=50,
        use_cache=True,
        pad_token_id=0,
    )
    return bytes(written[0, tokens.shape[1] :].tolist()).decode("utf-8", errors="replace")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )

    def option(name: str, default: Any, help: str) -> None:
        parser.add_argument(
            name, type=type(default), default=default, help=f"{help} (default: {default})"
        )

    option("--max-steps", 150, "optimizer steps")
    option("--batch-size", 16, "windows a step")
    option("--window", 128, "bytes a window")
    option("--hidden-size", 256, "width of the model, a multiple of 128")
    option("--lr", 3e-3, "peak learning rate")
    option("--weight-decay", 0.1, "weight decay of the matrices")
    option("--eval-windows", 96, "held-out windows of twice the length to measure on")
    option("--new-tokens", 160, "bytes to complete")
    option("--seed", 0, "of the split, the initial weights, the batches and the completion")
    parser.add_argument("--threads", type=int, help="CPU threads (default: one an idle core)")
    parser.add_argument(
        "--out", type=Path, default=ROOT / "out" / "finetune", help="folder (default: out/finetune)"
    )
    args = parser.parse_args()
    if args.hidden_size < 128 or args.hidden_size % 128:
        parser.error("--hidden-size must be a multiple of 128")
    torch.set_num_threads(args.threads or idle_cores())
    transformers_logging.disable_progress_bar()
    set_seed(args.seed)

    training, held_out = split(read_modules(), args.seed)
    train_windows = Windows(training, args.window)
    eval_windows = Windows(held_out, 2 * args.window, args.eval_windows)
    model = build_model(args.hidden_size)
    print(
        f"training on {len(training)} modules of the standard library "
        f"({len(train_windows) * args.window / 1e6:.1f} MB), {len(held_out)} held out\n"
        f"{' '.join(model.config.layer_types)}: {model.num_parameters() / 1e6:.1f} M parameters"
    )

    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(args.out),
            max_steps=args.max_steps,
            per_device_train_batch_size=args.batch_size,
            per_device_eval_batch_size=args.batch_size,
            lr_scheduler_type="cosine_with_min_lr",
            lr_scheduler_kwargs={"min_lr_rate": 0.05},
            warmup_steps=max(1, args.max_steps // 10),
            eval_strategy="steps",
            eval_steps=max(1, args.max_steps // 6),
            logging_steps=max(1, args.max_steps // 60),
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            dataloader_pin_memory=False,
            seed=args.seed,
        ),
        train_dataset=train_windows,
        eval_dataset=eval_windows,
        optimizers=(build_optimizer(model, args.lr, args.weight_decay), None),
        callbacks=[Bar()],
    )
    trainer.remove_callback(PrinterCallback)
    before = trainer.evaluate()["eval_loss"] * BITS
    trainer.train()
    after = trainer.evaluate()["eval_loss"] * BITS
    print(f"held-out bits a byte: {before:.2f} before, {after:.2f} after {args.max_steps} steps")
    plot(trainer.state.log_history, args.out / "loss.png")

    model.save_pretrained(args.out / "model")
    reloaded = AutoModelForCausalLM.from_pretrained(args.out / "model").eval()
    model.eval()
    name, prompt = pick_function(held_out)
    with torch.inference_mode():
        tokens = torch.tensor([list(prompt)])
        difference = (model(tokens).logits - reloaded(tokens).logits).abs().max().item()
    print(f"saved and loaded again: the largest difference of a logit is {difference:.1e}")

    set_seed(args.seed)
    print(f"\nLines of {name}, held out, as the model is shown them:\n")
    print(prompt.decode("utf-8", errors="replace").rstrip())
    print("\nand how the model goes on:\n")
    print(INDENT.decode() + complete(reloaded, prompt, args.new_tokens))
    return 0 if after < before and difference < 1e-4 else 1


if __name__ == "__main__":
    sys.exit(main())
