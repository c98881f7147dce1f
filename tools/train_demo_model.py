"""Train the demo model: a small Llama on CPython's standard library sources as installed.

    python tools/train_demo_model.py --out DIR

The number of steps, the seed and the data order are fixed, and one thread computes, so that no
order of threads changes a sum: a second run on the same interpreter, PyTorch, compiler and
processor makes the same bytes. The model is so small that a second thread would save nothing. An
interrupted run continues from `DIR/checkpoint.pt`.
"""

from __future__ import annotations

import argparse
import math
import os
import platform
import time
from pathlib import Path

import sentencepiece as spm
import torch
import torch.nn.functional as F
from transformers import LlamaForCausalLM

from demo_corpus import collect
from demo_export import demo_config, export
from demo_tokenizer import BOS_ID, encode_documents, train_tokenizer

TOKENS_PER_STEP = 4096
PEAK_LR, FINAL_LR_SHARE, WARMUP_STEPS = 2.0e-3, 0.02, 100
# Short windows first, because attention over them is cheaper; the last share of the schedule
# teaches the positions up to the model's full length.
SHORT_LEN, FULL_LEN, FULL_LEN_FROM = 512, 1024, 0.85
CHECKPOINT_EVERY, REPORT_EVERY = 250, 25


def learning_rate(step: int, progress: float) -> float:
    """Warm up linearly, then follow a cosine of the progress (0 to 1)."""
    cosine = 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
    decayed = PEAK_LR * (FINAL_LR_SHARE + (1 - FINAL_LR_SHARE) * cosine)
    return decayed * min(1.0, (step + 1) / WARMUP_STEPS)


def batch(stream: torch.Tensor, step: int, seq_len: int, seed: int) -> torch.Tensor:
    """Draw [TOKENS_PER_STEP / seq_len, seq_len + 1] ids; the same ones for the same step."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
    rows = TOKENS_PER_STEP // seq_len
    starts = torch.randint(0, stream.numel() - seq_len - 1, (rows,), generator=generator)
    return torch.stack([stream[s : s + seq_len + 1] for s in starts.tolist()])


def optimizer_for(model: LlamaForCausalLM) -> torch.optim.AdamW:
    """AdamW with decay on matrices only."""
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=PEAK_LR, betas=(0.9, 0.95), eps=1e-9, fused=True)


def loss_of(model: LlamaForCausalLM, ids: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy in nats of ids [rows, len + 1], with bfloat16 matrix products."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(ids[:, :-1], use_cache=False).logits
    return F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten())


@torch.inference_mode()
def held_out_loss(model: LlamaForCausalLM, stream: torch.Tensor, most: int | None) -> float:
    """Mean loss in nats per token over windows of FULL_LEN, in float32.

    Args:
        stream: held-out ids [n].
        most: number of windows at most; all of them if None.
    """
    total, count = 0.0, 0
    windows = range(0, stream.numel() - 1, FULL_LEN)
    for start in list(windows)[:most]:
        ids = stream[start : start + FULL_LEN + 1]
        logits = model(ids[None, :-1], use_cache=False).logits[0]
        total += F.cross_entropy(logits.float(), ids[1:], reduction="sum").item()
        count += ids.numel() - 1
    return total / count


@torch.inference_mode()
def sample(model: LlamaForCausalLM, tokenizer: bytes, prompt: str, count: int = 120) -> str:
    """Continue a prompt at temperature 0.7 without a cache."""
    processor = spm.SentencePieceProcessor(model_proto=tokenizer)
    generator = torch.Generator().manual_seed(1)
    ids = [BOS_ID, *processor.encode(prompt)]
    for _ in range(count):
        logits = model(torch.tensor([ids]), use_cache=False).logits[0, -1]
        ids.append(torch.multinomial((logits / 0.7).softmax(-1), 1, generator=generator).item())
    return processor.decode(ids)


class Training:
    """The state of a run: model, optimizer, step, and seconds spent before this process."""

    def __init__(self, args: argparse.Namespace):
        self.args = args
        torch.manual_seed(args.seed)
        corpus = collect()
        self.tokenizer = train_tokenizer((f.text for f in corpus.train), args.vocab_size)
        self.train_ids = self._stream(corpus.train)
        self.held_out_ids = self._stream(corpus.held_out)
        self.model = LlamaForCausalLM(demo_config(args.vocab_size))
        self.optimizer = optimizer_for(self.model)
        self.loss_of = loss_of if args.no_compile else torch.compile(loss_of, dynamic=False)
        self.step, self.earlier_s, self.started = 0, 0.0, time.monotonic()
        self.checkpoint = args.out / "checkpoint.pt"
        if self.checkpoint.exists():
            self._resume()
        print(f"{self.train_ids.numel()} training tokens from {len(corpus.train)} files, ", end="")
        print(f"{self.held_out_ids.numel()} held-out tokens from {len(corpus.held_out)} files, ")
        print(f"{sum(p.numel() for p in self.model.parameters())} parameters", flush=True)

    def _stream(self, files) -> torch.Tensor:
        return torch.tensor(encode_documents(self.tokenizer, (f.text for f in files)))

    def _resume(self) -> None:
        state = torch.load(self.checkpoint, weights_only=True)
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.earlier_s = state["step"], state["elapsed_s"]
        print(f"continuing at step {self.step}")

    @property
    def elapsed_s(self) -> float:
        return self.earlier_s + time.monotonic() - self.started

    @property
    def progress(self) -> float:
        return self.step / self.args.steps

    def train_step(self, progress: float) -> float:
        """Take one optimizer step at a point of the schedule; return its loss in nats."""
        seq_len = SHORT_LEN if progress < FULL_LEN_FROM else FULL_LEN
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.step, progress)
        loss = self.loss_of(self.model, batch(self.train_ids, self.step, seq_len, self.args.seed))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        return loss.item()

    def save(self, most_windows: int | None = 16) -> None:
        """Write the checkpoint and the model folder as they stand."""
        loss = held_out_loss(self.model, self.held_out_ids, most_windows)
        print(f"step {self.step}: held-out perplexity {math.exp(loss):.3f}", flush=True)
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "elapsed_s": self.elapsed_s,
        }
        partial = self.checkpoint.with_suffix(".partial")
        torch.save(state, partial)
        os.replace(partial, self.checkpoint)
        report = {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "seed": self.args.seed,
            "steps": self.step,
            "tokens": self.step * TOKENS_PER_STEP,
            "training_corpus_tokens": self.train_ids.numel(),
            "held_out_tokens": self.held_out_ids.numel(),
            "held_out_loss_nats": loss,
            "held_out_windows": most_windows,
            "minutes": round(self.elapsed_s / 60, 1),
        }
        export(self.model, self.tokenizer, report, self.args.out)

    def run(self) -> None:
        """Train to the end of the schedule, then save and print a sample."""
        recent: list[float] = []
        while (progress := self.progress) < 1.0:
            recent.append(self.train_step(progress))
            if self.step % REPORT_EVERY == 0:
                mean = sum(recent) / len(recent)
                recent.clear()
                print(
                    f"step {self.step} ({progress:.1%}) loss {mean:.3f} "
                    f"lr {learning_rate(self.step, progress):.2e} {self.elapsed_s:.0f} s",
                    flush=True,
                )
            if self.step % CHECKPOINT_EVERY == 0:
                self.save()
        self.save(most_windows=None)
        print(sample(self.model, self.tokenizer, "class Queue:\n    def __init__(self"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="Hugging Face folder to write")
    parser.add_argument("--steps", type=int, default=2500)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--vocab-size", type=int, default=2048)
    parser.add_argument("--no-compile", action="store_true", help="do without torch.compile")
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.out.mkdir(parents=True, exist_ok=True)
    Training(args).run()


if __name__ == "__main__":
    main()
