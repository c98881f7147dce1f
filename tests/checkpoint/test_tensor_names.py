"""Names of tensors, by `Architecture.renames`: those of the model's own folders and exllamav2's."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file

from exl_loader.backends.reference.ops import ReferenceOps
from exl_loader.checkpoint import Checkpoint
from exl_loader.utils.errors import InvalidCheckpoint
from support.hf_models import expected_logits, make_model, relative_error
from support.makers import warnings_of_weights
from support.model_builder import build_model, run_chunks

IDS = [3, 17, 200, 5, 5, 101, 44, 9]
FILE = "model.safetensors"


def change(folder, edit):
    """Edit a folder's dict of tensors."""
    tensors = load_file(folder / FILE)
    edit(tensors)
    save_file(tensors, folder / FILE)


def without_prefix(tensors):
    for name in list(tensors):
        tensors[name.removeprefix("transformer.")] = tensors.pop(name)


def like_exllamav2(tensors):
    """Rename to what exllamav2 writes, with the fused tensors as they are."""
    without_prefix(tensors)
    for name in list(tensors):
        new = name
        for old, replacement in (("wte.", "model.embed_tokens."), ("wpe.", "model.wpe."),
                                 ("ln_f.", "model.norm."), ("h.", "model.layers.")):
            if name.startswith(old):
                new = replacement + name[len(old):]
        new = new.replace("attn.c_proj", "self_attn.o_proj").replace(".attn.", ".self_attn.")
        tensors[new] = tensors.pop(name)


@pytest.mark.parametrize("rename", [without_prefix, like_exllamav2])
@pytest.mark.parametrize("name", ["gpt2", "bigcode"])
def test_every_way_to_name_the_same_tensors(name, rename, tmp_path):
    hf = make_model(name, 4, tmp_path)
    change(tmp_path, rename)
    model, cache = build_model(tmp_path, ReferenceOps())
    assert relative_error(run_chunks(model, cache, IDS, 3), expected_logits(hf, IDS)) <= 2e-5


def test_masks_of_old_folders_are_no_unknown_tensors(tmp_path, caplog):
    make_model("gpt2", 4, tmp_path)

    def add(tensors):
        tensors["transformer.h.0.attn.bias"] = torch.ones(1, 1, 512, 512, dtype=torch.bool)
        tensors["transformer.h.0.attn.masked_bias"] = torch.tensor(-1e4)
        tensors["transformer.h.0.attn.other.weight"] = torch.zeros(4, 4)

    change(tmp_path, add)
    build_model(tmp_path, ReferenceOps())
    (warning,) = warnings_of_weights(caplog)
    assert warning.endswith("no use for them: transformer.h.0.attn.other.weight")


def test_the_same_tensor_under_two_names_is_refused(tmp_path):
    make_model("gpt2", 4, tmp_path)
    change(tmp_path, lambda tensors: tensors.update(
        {"model.layers.1.ln_1.weight": tensors["transformer.h.1.ln_1.weight"].clone()}
    ))
    message = r"transformer\.h\.1\.ln_1\.weight: .* as model\.layers\.1\.ln_1\.weight"
    with pytest.raises(InvalidCheckpoint, match=message):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize("name", [
    "transformer.wte.weight", "transformer.wpe.weight", "transformer.ln_f.bias",
    "transformer.h.2.mlp.c_fc.weight", "transformer.h.0.attn.c_attn.bias",
])
def test_errors_name_the_tensors_of_the_file(name, tmp_path):
    make_model("gpt2", 4, tmp_path)
    change(tmp_path, lambda tensors: tensors[name].view(-1)[3:4].fill_(torch.inf))
    with pytest.raises(InvalidCheckpoint, match=f"^{name.replace('.', '[.]')}: values"):
        build_model(tmp_path, ReferenceOps())
    change(tmp_path, lambda tensors: tensors.update({name: torch.zeros(3, 5)}))
    with pytest.raises(InvalidCheckpoint, match=f"^{name.replace('.', '[.]')}: "):
        build_model(tmp_path, ReferenceOps())
