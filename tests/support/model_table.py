"""The tables of models in docs/models.md and README.md, made from the engine and its tests.

    python tests/support/model_table.py    # writes them anew, after an architecture was added

How a class was proved is looked up: in `hf_models.MODELS`, whose classes are those of transformers
or in `defined_models.DEFINITIONS`, and in the tests of models for one that names the class.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[:0] = [str(parent) for parent in Path(__file__).resolve().parents[1:3]]


from exl_loader.checkpoint.architectures import ARCHITECTURES
from exl_loader.checkpoint.architectures.multimodal import MULTIMODAL
from support import REPO
from support.defined_models import DEFINITIONS
from support.hf_models import MODELS

DOCS, README = REPO / "docs" / "models.md", REPO / "README.md"
BEGIN, END = "<!-- made by tests/support/model_table.py -->\n", "<!-- end -->\n"
CLASSES = (*ARCHITECTURES, *MULTIMODAL)
TEXT_SUFFIXES = ("ForCausalLM", "LMHeadModel")
SUFFIXES = (*TEXT_SUFFIXES, "ForConditionalGeneration")

# Formats are those of linear layers, which every architecture is made of.
FORMATS = "EXL2, GPTQ, unquantised"
# Nobody has said how GPTQ folders name the experts of these classes.
NO_GPTQ = {"DbrxForCausalLM", "GraniteMoeForCausalLM"}

# Class -> well-known models of it, where its name does not say them.
KNOWN = {
    "LlamaForCausalLM": "Llama 1 to 3.3, Yi 1.5, SmolLM2, TinyLlama, DeepSeek LLM, distilled "
    "R1, Falcon 3, and every other model whose config names this class",
    "MistralForCausalLM": "Mistral 7B, Nemo, Small; Codestral, Ministral",
    "MixtralForCausalLM": "Mixtral 8x7B and 8x22B",
    "Qwen2ForCausalLM": "Qwen 1.5, 2 and 2.5, QwQ, distilled R1",
    "Qwen2MoeForCausalLM": "Qwen1.5-MoE, Qwen2-57B-A14B",
    "Qwen3ForCausalLM": "Qwen 3",
    "Qwen3MoeForCausalLM": "Qwen3-30B-A3B, Qwen3-235B-A22B",
    "GemmaForCausalLM": "Gemma 1, CodeGemma",
    "Gemma2ForCausalLM": "Gemma 2",
    "Gemma3ForCausalLM": "Gemma 3 1B and 270M",
    "Gemma3ForConditionalGeneration": "Gemma 3 4B, 12B and 27B",
    "GemmoeForCausalLM": "GemMoE",
    "Phi3ForCausalLM": "Phi-3, Phi-3.5 mini, Phi-4",
    "PhiForCausalLM": "Phi-1, 1.5 and 2",
    "CohereForCausalLM": "Command R and R+, Aya 23",
    "Cohere2ForCausalLM": "Command R7B, Command A",
    "DbrxForCausalLM": "DBRX",
    "GPT2LMHeadModel": "GPT-2",
    "GPTJForCausalLM": "GPT-J 6B, Pygmalion 6B",
    "OPTForCausalLM": "OPT but 350M, Galactica, Erebus",
    "Jais2ForCausalLM": "Jais 2",
    "HeliumForCausalLM": "Helium 1 2B",
    "GPTBigCodeForCausalLM": "StarCoder, SantaCoder, Granite Code 20B and 34B",
    "GPTNeoXForCausalLM": "Pythia, GPT-NeoX-20B, RedPajama-INCITE",
    "GptOssForCausalLM": "gpt-oss",
    "RWForCausalLM": "Falcon 7B and 40B of 2023, before they were of transformers' class",
    "FalconForCausalLM": "Falcon 7B to 180B, Falcon 2; not Falcon-RW, which has ALiBi",
    "Starcoder2ForCausalLM": "StarCoder 2",
    "MiniCPMForCausalLM": "MiniCPM 1B and 2B",
    "InternLM2ForCausalLM": "InternLM 2 and 2.5",
    "IndexForCausalLM": "Index 1.9B",
    "OrionForCausalLM": "Orion 14B",
    "YiForCausalLM": "Yi of 2023",
    "GraniteForCausalLM": "Granite 3, dense",
    "GraniteMoeForCausalLM": "Granite 3, 1B-A400M and 3B-A800M",
    "GlmForCausalLM": "GLM-4 9B",
    "Glm4ForCausalLM": "GLM-4-0414, GLM-Z1",
    "StableLmForCausalLM": "StableLM 3B, 2 1.6B, 2 12B",
    "Olmo2ForCausalLM": "OLMo 2",
    "Olmo3ForCausalLM": "OLMo 3",
    "NemotronForCausalLM": "Minitron",
    "Exaone4ForCausalLM": "EXAONE 4",
    "Ernie4_5ForCausalLM": "ERNIE 4.5 0.3B",
    "SeedOssForCausalLM": "Seed-OSS 36B",
    "SmolLM3ForCausalLM": "SmolLM 3",
    "ArceeForCausalLM": "AFM 4.5B",
    "LlavaForConditionalGeneration": "Pixtral, LLaVA 1.5",
    "Mistral3ForConditionalGeneration": "Mistral Small 3.1 and 3.2",
    "Qwen2VLForConditionalGeneration": "Qwen2-VL",
    "Qwen2_5_VLForConditionalGeneration": "Qwen2.5-VL",
}


def short_name(name: str) -> str:
    """Return a class's name without what it is for."""
    for suffix in SUFFIXES:
        name = name.removesuffix(suffix)
    return name


def sorted_classes() -> list[str]:
    """Return the classes in the order of the tables."""
    return sorted(CLASSES, key=lambda name: (short_name(name).lower(), name))


def formats_of(name: str) -> str:
    """Return the formats of a class, as the table says them."""
    return FORMATS.replace("GPTQ, ", "") if name in NO_GPTQ else FORMATS


def proof_of(name: str) -> str:
    """Return how a class was proved, as the table says it.

    Raises:
        LookupError: no test compares a model of this class with anything independent.
    """
    models = [model for model, (architecture, _) in MODELS.items()
              if name in (architecture, *(architecture + suffix for suffix in TEXT_SUFFIXES))]
    if models:
        way = "definition" if short_name(name) in DEFINITIONS else "transformers"
        return f"{way}: {', '.join(models)}"
    files = sorted(path for path in (REPO / "tests" / "model").glob("test_*.py")
                   if name in path.read_text(encoding="utf-8"))
    if not files:
        raise LookupError(f"no test of tests/model compares {name} with an independent definition")
    return "definition: " + ", ".join(f"`{path.name}`" for path in files)


def docs_table() -> str:
    """Return the table of docs/models.md."""
    rows = ["| class | models | formats | compared with |", "|---|---|---|---|"]
    for name in sorted_classes():
        rows.append(f"| `{name}` | {KNOWN.get(name, short_name(name))} | {formats_of(name)} | "
                    f"{proof_of(name)} |")
    return "\n".join(rows) + "\n"


def readme_table() -> str:
    """Return the table of README.md: a row for each way of proving and its formats."""
    groups: dict[tuple[str, str], list[str]] = {}
    for name in sorted_classes():
        group = proof_of(name).partition(":")[0], formats_of(name)
        groups.setdefault(group, []).append(short_name(name))
    ways = {
        "transformers": "logits equal to transformers', random models",
        "definition": "transformers lacks it: logits equal to a definition in the tests",
    }
    rows = ["| architecture | formats | how it was proved |", "|---|---|---|"]
    rows += [f"| {', '.join(dict.fromkeys(names))} | {formats} | {ways[way]} |"
             for (way, formats), names in groups.items()]
    return "\n".join(rows) + "\n"


def replaced(text: str, table: str) -> str:
    """Return a page with a table between its two marks."""
    marked = re.compile(f"({re.escape(BEGIN)}).*?({re.escape(END)})", re.DOTALL)
    assert len(marked.findall(text)) == 1, "a page has each mark once"
    return marked.sub(lambda found: found[1] + table + found[2], text)


TABLES = {DOCS: docs_table, README: readme_table}


if __name__ == "__main__":
    for path, make in TABLES.items():
        path.write_text(replaced(path.read_text(encoding="utf-8"), make()), encoding="utf-8")
