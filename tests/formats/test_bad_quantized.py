"""Invalid EXL2 and GPTQ tensors raise typed errors that name the tensor, and free all memory."""

from __future__ import annotations

import json
import shutil

import pytest
from safetensors.torch import load_file, save_file

import exl_loader
from exl_loader.utils.errors import InvalidCheckpoint, UnsupportedFormat
from support.broken import CTX, edit_config, edit_tensors, rejected
from support.makers import write_quantized_model

EXL2_FILE = "output.safetensors"
LAYER = "model.layers.0.self_attn.q_proj"


pytestmark = pytest.mark.usefixtures("reference_operations")


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    folder = tmp_path_factory.mktemp("originals")
    write_quantized_model(folder / "exl2", "exl2", seed=5)
    write_quantized_model(folder / "gptq", "gptq", seed=5)
    return folder


def test_an_exl2_folder_may_contain_the_index_of_its_source_model(copy_of):
    folder = copy_of("exl2")
    index = {"weight_map": {"lm_head.weight": "model-00007-of-00009.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with exl_loader.load(folder, ctx_size=CTX) as model:
        assert model.prompt_logits([1, 2]).isfinite().all()


def exl2_edit(copy_of, tensor: str, change):
    folder = copy_of("exl2")
    edit_tensors(folder, EXL2_FILE, **{f"{LAYER}.{tensor}".replace(".", "__"): change})
    return folder


@pytest.mark.parametrize("bits", [0, 1, 7, 9, 16, -4])
def test_unknown_bits_are_refused(copy_of, bits):
    def change(groups):
        groups[0] = bits
        return groups

    rejected(exl2_edit(copy_of, "q_groups", change), InvalidCheckpoint, f"{LAYER}.q_groups")


@pytest.mark.parametrize(
    "change",
    [
        lambda groups: groups.flip(0),
        lambda groups: groups * 0 + 4,
        lambda groups: groups + (groups.new_tensor([0, 1]).repeat(len(groups) // 2)),
        lambda groups: groups - (groups.new_tensor([0, 3]).repeat(len(groups) // 2)),
    ],
)
def test_a_group_table_that_does_not_add_up_is_refused(copy_of, change):
    rejected(exl2_edit(copy_of, "q_groups", change), InvalidCheckpoint, f"{LAYER}.q_groups")


@pytest.mark.parametrize(
    "change", [lambda p: p * 0, lambda p: p + 1, lambda p: p - 1, lambda p: p | (1 << 30)]
)
def test_an_invalid_permutation_is_refused(copy_of, change):
    folder = exl2_edit(copy_of, "q_invperm", change)
    rejected(folder, InvalidCheckpoint, f"{LAYER}.q_invperm", "permutation")


def test_nan_scales_are_refused(copy_of):
    folder = exl2_edit(copy_of, "q_scale_max", lambda scales: scales * float("nan"))
    rejected(folder, InvalidCheckpoint, f"{LAYER}.q_scale_max", "finite")


@pytest.mark.parametrize("tensor", ["q_weight", "q_scale", "q_scale_max", "q_groups", "q_invperm"])
def test_missing_and_shortened_exl2_tensors_are_refused(copy_of, tensor):
    folder = exl2_edit(copy_of, tensor, lambda values: values[:-1])
    rejected(folder, InvalidCheckpoint, LAYER)
    shutil.rmtree(folder)
    rejected(exl2_edit(copy_of, tensor, None), InvalidCheckpoint, LAYER)


def test_gptq_group_indices_out_of_range_are_refused(copy_of):
    folder = copy_of("gptq")
    (file,) = (path.name for path in folder.glob("*.safetensors"))
    tensors = load_file(folder / file)
    tensors[f"{LAYER}.g_idx"] = tensors[f"{LAYER}.g_idx"] + 1000
    save_file(tensors, folder / file)
    rejected(folder, InvalidCheckpoint, f"{LAYER}.g_idx")


def test_the_error_names_another_quantisation(copy_of):
    folder = copy_of("gptq")
    edit_config(folder, quantization_config={"quant_method": "awq", "bits": 4})
    rejected(folder, UnsupportedFormat, "awq")
