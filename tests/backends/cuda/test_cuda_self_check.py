"""The check of a card's kernels at their first use, on a card emulated on the CPU."""

from __future__ import annotations

import pytest
import torch

from exl_loader.backends import BACKENDS, get_ops
from exl_loader.backends.cuda import ops as cuda_ops
from exl_loader.backends.cuda import self_check
from exl_loader.commands import check_cards
from exl_loader.memory import buffers as memory
from exl_loader.utils.errors import DeviceError, InsufficientMemory
from support.cuda_emulation.mutation import built_from
from support.emulated_cuda import EmulatedCard
from support.exhaustive import some_of
from support.targets import emulated_launcher

# A source that the check runs, a wrong expression for it, and a word of the error.
MISTAKES = [
    ("rows", ("rows.cu", "const int64_t start = id / lanes * lanes * size + id % lanes",
              "const int64_t start = id * lanes + id % lanes"), "an embedding in main memory"),
    ("norm", ("row_functions.cuh", "/ static_cast<float>(size)", "/ static_cast<float>(size + 1)"),
     "a norm within"),
    ("norm", ("norm.cu", "sum(part, 2), size, eps", "sum(part, 2), size + 1, eps"),
     "a LayerNorm within"),
    ("norm", ("norm.cu", "bias == nullptr ? result : add_rn(result, bias[i])", "result"),
     "a LayerNorm within"),
    ("norm", ("norm.cu", "SumOfWarp{}, out + row * size", "SumOfWarp{}, out"), "a LayerNorm"),
    ("elementwise", ("row_functions.cuh", "relu * relu : relu", "relu : relu"),
     "a gate of relu2"),
    ("elementwise", ("elementwise.cu", "fmaf(y[i], factor, x[i])", "x[i] + y[i]"), "a sum"),
    ("elementwise", ("elementwise.cu", "x[i] = -limit", "x[i] = limit"), "a limit"),
    ("rope", ("row_functions.cuh", "distance = interleaved ? 1 : half", "distance = half"),
     "interleaved RoPE"),
    ("moe", ("moe.cu", "undivided(expert) / total + correction", "undivided(expert) + correction"),
     "the choice of experts"),
    ("moe", ("moe.cu", "call.normalize != 0 ? chosen_total", "call.normalize == 0 ? chosen_total"),
     "the choice of experts"),
    ("rows", ("rows.cu", "expf(-logits[blockIdx.x])", "expf(logits[blockIdx.x])"),
     "a shared expert"),
    ("rope", ("angles.cuh", "if (turns & 2)", "if (turns & 4)"), "RoPE's angles"),
    ("sampling", ("sampling.cu", "bits & 0x80000000u ? bits : ~bits",
                  "bits & 0x80000000u ? ~bits : bits"), "top logits"),
    ("pack", ("pack.cu", "shift + Bits > 32 ?", "shift + Bits > 33 ?"), "packed layer"),
    ("linear_decode", ("linear_decode.cu", "8 * q + lane / 4", "8 * q + lane % 8"),
     "a product of one row"),
    ("linear_prefill", ("linear_prefill.cu", "const int row = 4 * half * kRowTiles + g / 2",
                        "const int row = 4 * half + g / 2"), "a prompt's product"),
    ("cache_write", ("cache_write.cu", "(lane_id() + field * bytes) & 31",
                     "(lane_id() + field * 8) & 31"), "k of a prompt in a q4 cache"),
    ("attention_prefill", ("prefill_tile.cuh", "+ j % 2;\n                if (!is_visible",
                           "+ j / 2;\n                if (!is_visible"), "attention of a prompt"),
    ("attention_decode", ("decode_softmax.cuh", "other_factors[n] = exp2_fast(other -",
                          "other_factors[n] = exp2_fast(1.0f + other -"), "attention of a token"),
    ("attention_decode", ("decode_rows.cuh", "atomic_add(counter, 1) == arrivals - 1;",
                          "atomic_add(counter, 1) == arrivals;"), "attention of a token"),
    ("cache_write", ("cache_write.cu", "31 - leading_zeros(largest & (0u - largest))",
                     "leading_zeros(largest)"), "open page of a q4 cache"),
    ("cache_write", ("cache_write.cu", "if (position == 0) write_open_token(",
                     "if (position == 1) write_open_token("), "beside the open pages of a q4"),
    ("cache_write", ("key_feedback.cuh", "const int row = block * kFeedbackBlock + i;",
                     "const int row = i;"), "feedback of keys in a q4 cache"),
    ("cache_write", ("key_feedback.cuh", "scale.exact() * (-1.0f / Grid<kBits>::kHalf)",
                     "-scale.exact()"), "feedback of keys in a q6 cache"),
    ("attention_prefill", ("cache_tile.cuh", "make_uint4(low.x, low.y, high.x, high.y)",
                           "make_uint4(low.x, low.y, low.z, low.w)"),
     "attention of a prompt over a q6 cache with open pages"),
    ("attention_decode", ("decode_softmax.cuh", "unit_factor(call.layer.v.bits) / unit_factor(",
                          "unit_factor(v_bits) / unit_factor("),
     "attention of a first token over a q6 cache with open pages"),
]


class Card:
    """A launcher that counts launches and remembers whether it was closed.

    Args:
        wrong: a launcher of some kernels, which it has these from.
        fault: called with the name of every kernel that is launched.
    """

    def __init__(self, wrong=None, fault=None):
        self._launcher, self._wrong, self._fault = emulated_launcher(), wrong, fault
        self.launches, self.is_closed = 0, False

    def __getattr__(self, name):
        return getattr(self._launcher, name)

    def prepare(self, name, *args):
        from_wrong = self._wrong is not None and _has(self._wrong, name)
        launch = (self._wrong if from_wrong else self._launcher).prepare(name, *args)

        def run():
            self.launches += 1
            if self._fault is not None:
                self._fault(name)
            launch()

        return run

    def close(self):
        self.is_closed = True


def _has(launcher, name):
    return launcher._library.exl_emulated_signature(name.encode()) is not None


@pytest.fixture
def opened(monkeypatch):
    """Let `get_ops("cuda:0")` open the card that is put into the list last."""
    cards = []
    monkeypatch.setitem(BACKENDS, "cuda", EmulatedCard())
    monkeypatch.setattr(cuda_ops, "open_launcher", lambda index, stream, progress: cards[-1])
    monkeypatch.setattr(cuda_ops, "_checked", set())
    return cards


def test_kernels_are_checked_once_a_process(opened):
    before = memory.live_bytes()
    opened.append(Card())
    ops = get_ops("cuda:0")
    assert ops.name == "cuda" and opened[0].launches > 8 and not opened[0].is_closed
    assert memory.live_bytes() == before and ops.upload_buffer is None
    opened.append(Card())
    get_ops("cuda:0")
    assert opened[1].launches == 0
    get_ops("cuda:1")
    assert opened[1].launches == opened[0].launches


@pytest.mark.slow
@pytest.mark.parametrize("mistake", some_of(MISTAKES, 5), ids=lambda mistake: mistake[2])
def test_a_mistake_is_refused_and_nothing_is_held(opened, tmp_path, mistake):
    (source, change, named), before = mistake, memory.live_bytes()
    opened.append(Card(wrong=built_from(tmp_path, [source], change)))
    for _ in range(2):  # it is checked again, since it has not passed
        with pytest.raises(DeviceError) as caught:
            get_ops("cuda:0")
        assert named in caught.value.expected and "cuda:0" in caught.value.thing
        assert "device='cpu'" in caught.value.remedy and caught.value.actual
        assert opened[0].is_closed and memory.live_bytes() == before


def test_a_kernel_that_fails_is_refused(opened):
    def fault(name):
        if "decode" in name:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    before = memory.live_bytes()
    opened.append(Card(fault=fault))
    with pytest.raises(DeviceError, match="illegal memory access"):
        get_ops("cuda:0")
    assert opened[0].is_closed and memory.live_bytes() == before


def test_a_result_that_is_no_number_is_refused(opened, monkeypatch):
    monkeypatch.setattr(self_check.ReferenceOps, "rms_norm", lambda self, *args: None)
    monkeypatch.setattr(torch, "empty_like", lambda x: torch.full(x.shape, torch.nan))
    opened.append(Card())
    with pytest.raises(DeviceError, match="nan"):
        get_ops("cuda:0")


def test_a_card_without_memory_is_an_error(opened, monkeypatch):
    def full(self, name, nbytes):
        raise MemoryError("the driver refused")

    monkeypatch.setattr(EmulatedCard, "empty", full)
    opened.append(Card())
    with pytest.raises(InsufficientMemory):
        get_ops("cuda:0")
    assert opened[0].is_closed


def test_the_check_takes_less_than_a_page_of_the_driver(opened):
    taken = sum(spec.nbytes for spec in self_check.check_specs("cuda:0"))
    assert taken < EmulatedCard.granularity_bytes


def test_a_load_that_is_refused_has_taken_nothing(opened, tmp_path, monkeypatch):
    import exl_loader
    from support.makers import write_quantized_model

    write_quantized_model(tmp_path / "m", "exl2", config={"num_hidden_layers": 1})
    monkeypatch.setattr(self_check, "_NORM_BOUND", -1.0)
    opened.append(Card())
    before = memory.live_bytes()
    with pytest.raises(DeviceError, match="cuda:0: .*a norm.*build --force"):
        exl_loader.load(tmp_path / "m", ctx_size=256, device="cuda:0")
    assert opened[0].is_closed and memory.live_bytes() == before


def test_a_load_that_is_checked_allocates_what_was_planned(opened, tmp_path, monkeypatch):
    import exl_loader
    from support.emulated_cuda import CapturingLauncher, EmulatedAccess
    from support.makers import write_quantized_model

    write_quantized_model(tmp_path / "m", "exl2", config={"num_hidden_layers": 1})
    card = CapturingLauncher(Card())
    monkeypatch.setattr(cuda_ops, "CardAccess", lambda name, launcher: EmulatedAccess(card))
    opened.append(card)
    total = exl_loader.plan(tmp_path / "m", ctx_size=256, device="cuda:0").total_bytes
    with exl_loader.load(tmp_path / "m", ctx_size=256, device="cuda:0") as model:
        assert cuda_ops._checked == {0}
        assert model.allocated_bytes() == total == memory.live_bytes()


# ---- Reports of doctor --------------------------------------------------------------------------


@pytest.fixture
def compiled(monkeypatch):
    """A card whose kernels are compiled."""
    from exl_loader.backends.build import store
    from exl_loader.backends.cuda import compilers, driver

    class Driver:
        def capability(self, index):
            return 9, 0

    monkeypatch.setattr(driver, "Driver", Driver)
    monkeypatch.setattr(compilers, "cuda_spec", lambda capability, driver: capability)
    monkeypatch.setattr(store, "find_entry", lambda found: found)


def test_a_report_of_a_card_that_passes(opened, compiled):
    opened.append(Card())
    report = check_cards.check(0)
    assert report["card"] == "cuda:0" and report["milliseconds"] > 0 and "thing" not in report


def test_a_report_of_a_card_that_does_not(opened, compiled, monkeypatch):
    monkeypatch.setattr(self_check, "_PRODUCT_BOUND", 0.0)
    opened.append(Card())
    report = check_cards.check(0)
    assert "product of one row" in report["actual"] and "driver" in report["remedy"]
    assert "milliseconds" not in report


def test_a_card_whose_kernels_are_not_compiled_is_left_alone(opened, compiled, monkeypatch):
    monkeypatch.setattr("exl_loader.backends.build.store.find_entry", lambda found: None)
    assert check_cards.check(0) is None


def test_the_program_prints_nothing_without_a_card(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    check_cards.main()
    assert capsys.readouterr().out == ""
