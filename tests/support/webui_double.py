"""A double of text-generation-webui: the parts that the plugin touches, in our own words.

Tables and caches, a dispatch dict that is local to `load_model`, functions imported by value, and
the order in which server.py does things.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest

from extension.webui import loading, registration

SHARED = '''
import argparse, copy, os, sys
from types import SimpleNamespace
from modules.loaders import loaders_and_params
parser = argparse.ArgumentParser(conflict_handler="resolve")
parser.add_argument("--model")
parser.add_argument("--loader")
parser.add_argument("--model-dir", default="user_data/models")
parser.add_argument("--lora-dir", default="user_data/loras")
parser.add_argument("--ctx-size", type=int, default=0)
parser.add_argument("--cache-type", default="fp16")
parser.add_argument("--gpu-split")
parser.add_argument("--idle-timeout", type=int, default=0)
parser.add_argument("--portable", action="store_true")
parser.add_argument("--multi-user", action="store_true")
args = parser.parse_args()
original_args = copy.deepcopy(args)
args_defaults = parser.parse_args([])
provided_arguments = [a.lstrip("-").replace("-", "_") for a in sys.argv[1:] if a[:2] == "--"]
model = tokenizer = generation_lock = None
model_name = "None"
lora_names = []
stop_everything = False
settings = {"truncation_length": 8192}
gradio = {}
persistent_interface_state = {}
def fix_loader_name(name):
    if not name:
        return name
    if name.lower() == "transformers":
        return "Transformers"
def load_user_config():
    import json
    path = os.path.join(args.model_dir, "config-user.json")
    return json.load(open(path)) if os.path.exists(path) else {}
args.loader = fix_loader_name(args.loader)
user_config = load_user_config()
'''

LOADERS = '''
import functools
loaders_and_params = {
    "llama.cpp": ["ctx_size", "cache_type"],
    "Transformers": ["gpu_split"],
    "ExLlamav3_HF": ["ctx_size", "cache_type"],
}
loaders_samplers = {
    "Transformers": {"temperature", "top_p", "guidance_scale", "penalty_alpha"},
    "ExLlamav3_HF": {"temperature", "top_p", "guidance_scale", "grammar_string"},
    "llama.cpp": {"temperature", "mirostat_mode", "auto_max_new_tokens", "seed"},
}
@functools.cache
def list_all_samplers():
    return sorted({s for names in loaders_samplers.values() for s in names})
@functools.cache
def get_all_params():
    return sorted({p for names in loaders_and_params.values() for p in names})
@functools.cache
def list_model_elements():
    return ["loader", "ctx_size", "cache_type", "gpu_split"]
'''

MODELS_SETTINGS = '''
import json
from modules import loaders, shared
from modules.utils import resolve_model_path
def get_model_metadata(model):
    settings = {"ctx_size": 8192, "truncation_length": 8192, "truncation_length_info": 8192}
    settings["loader"] = infer_loader(model, settings)
    path = resolve_model_path(model) / "config.json"
    config = json.load(open(path)) if path.exists() else {}
    for name in ("max_position_embeddings", "model_max_length", "max_seq_len"):
        length = config.get(name, config.get("text_config", {}).get(name))
        if settings["loader"] != "llama.cpp" and length is not None:
            settings.update(truncation_length=length, truncation_length_info=length,
                            ctx_size=min(length, 8192))
            break
    for pattern, saved in shared.user_config.items():
        if pattern.rstrip("$") == model:
            settings.update(saved)
    return settings
def infer_loader(model_name, model_settings, hf_quant_method=None):
    path = resolve_model_path(model_name)
    if not path.exists():
        return None
    if shared.args.portable or list(path.glob("*.gguf")):
        return "llama.cpp"
    return "Transformers"
def apply_model_settings_to_state(model, state):
    found = get_model_metadata(model)
    state.update({name: value for name, value in found.items() if name in state})
    return state
def update_model_parameters(state, initial=False):
    for element in loaders.list_model_elements():
        if element in state and not (initial and element in shared.provided_arguments):
            setattr(shared.args, element, state[element])
'''

MODELS = '''
import modules.shared as shared
from modules.models_settings import get_model_metadata
def load_model_if_idle_unloaded():
    if shared.args.idle_timeout > 0 and shared.model is None and shared.model_name != "None":
        shared.model, shared.tokenizer = load_model(shared.model_name)
def load_model(model_name, loader=None):
    shared.model_name = model_name
    load_func_map = {
        "llama.cpp": llama_loader,
        "Transformers": transformers_loader,
    }
    metadata = get_model_metadata(model_name)
    if loader is None:
        loader = shared.args.loader if shared.args.loader is not None else metadata["loader"]
    shared.args.loader = loader
    if shared.args.ctx_size == 0:
        shared.args.ctx_size = 8192
    output = load_func_map[loader](model_name)
    model, tokenizer = output if type(output) is tuple else (output, "a tokenizer")
    if loader.lower().startswith("exllama"):
        shared.settings["truncation_length"] = shared.args.ctx_size
    return model, tokenizer
def llama_loader(model_name):
    return "llama", "llama"
def transformers_loader(model_name):
    return "random weights"
def unload_model(keep_model_name=False):
    if shared.model is None:
        return
    if shared.model.__class__.__name__ in ["Exllamav3Model", "Exllamav3HF"]:
        shared.model.unload()
    shared.model = shared.tokenizer = None
    shared.lora_names = []
    if not keep_model_name:
        shared.model_name = "None"
'''

TEXT_GENERATION = '''
from modules import models, shared
def generate_reply(question, state):
    models.load_model_if_idle_unloaded()
    if shared.model.__class__.__name__ == "Exllamav3Model":
        yield from generate_reply_custom(question, question, state)
    else:
        yield from generate_reply_HF(question, state)
def encode(prompt, add_bos_token=True, truncation_length=None):
    models.load_model_if_idle_unloaded()
    ids = shared.tokenizer.encode(prompt)
    return ids if truncation_length is None else ids[:, -truncation_length:]
def get_max_prompt_length(state):
    return state["truncation_length"] - state["max_new_tokens"]
def decode(ids):
    models.load_model_if_idle_unloaded()
    return shared.tokenizer.decode(ids)
def generate_reply_HF(question, state):
    try:
        yield shared.model(question)
    except Exception as error:
        print("failed to generate", error)
def generate_reply_custom(question, original_question, state, stopping_strings=None, is_chat=False):
    try:
        if state.get("stream"):
            yield from shared.model.generate_with_streaming(question, state)
        else:
            yield shared.model.generate(question, state)
    except Exception as error:
        print("failed to generate", error)
'''

PROMPTS = '''
from modules.text_generation import generate_reply
'''

UTILS = '''
from pathlib import Path
from modules import shared
def resolve_model_path(name):
    return Path(name) if Path(name).exists() else Path(shared.args.model_dir) / name
'''

CHAT = '''
from modules import shared
def update_token_display_from_state(state):
    return f"{shared.model.last_prompt_token_count} of {state['truncation_length']}"
'''

LORA = '''
from pathlib import Path
import modules.shared as shared
def add_lora_to_model(lora_names):
    add_lora_transformers(lora_names)
def get_lora_path(lora_name):
    return Path(f"{shared.args.lora_dir}/{lora_name}")
def add_lora_transformers(lora_names):
    shared.lora_names = lora_names
'''

COMPLETIONS = '''
from modules import shared
from modules.text_generation import encode, generate_reply
from .errors import InvalidRequestError
def completions_common(body, stream):
    if "prompt" not in body:
        raise InvalidRequestError("Missing required input", param="prompt")
    state = {"stream": stream, "max_new_tokens": 8, "stop_event": None,
             "truncation_length": shared.settings["truncation_length"]} | body
    encode(body["prompt"])
    text = ""
    for so_far in generate_reply(body["prompt"], state):
        if stream and so_far != text:
            yield {"choices": [{"text": so_far[len(text):], "finish_reason": None}]}
        text = so_far
    # The web UI counts tokens to guess why an answer ended.
    yield {"choices": [{"text": "" if stream else text, "finish_reason": "stop"}]}
def completions(body):
    return list(completions_common(body, False))[-1]
def stream_completions(body):
    yield from completions_common(body, True)
chat_completions, stream_chat_completions = completions, stream_completions
def wants_processors():
    return shared.args.loader not in ("llama.cpp", "ExLlamav3")
def stream():
    def chunk():
        return shared.args.loader in ("llama.cpp", "ExLlamav3")
    return chunk()
'''

API_ERRORS = '''
class OpenAIError(Exception):
    def __init__(self, message=None, code=500, internal_message=""):
        self.message, self.code = message, code
class InvalidRequestError(OpenAIError):
    def __init__(self, message, param, code=400, internal_message=""):
        super().__init__(message, code)
        self.param = param
'''

API_MODELS = '''
from modules import loaders, shared
from modules.models import load_model, unload_model
from modules.models_settings import get_model_metadata, update_model_parameters
def get_current_model_info():
    return {"model_name": shared.model_name, "loader": shared.args.loader}
def _load_model(data):
    unload_model()
    settings = get_model_metadata(data["model_name"])
    for name in loaders.list_model_elements():
        if hasattr(shared.original_args, name):
            setattr(shared.args, name, getattr(shared.original_args, name))
    update_model_parameters(settings)
    for name, value in (data.get("args") or {}).items():
        if name in loaders.list_model_elements() and hasattr(shared.args, name):
            setattr(shared.args, name, value)
    shared.model, shared.tokenizer = load_model(data["model_name"])
'''

API_SCRIPT = '''
import json
from fastapi import FastAPI, HTTPException
from fastapi.responses import JSONResponse, StreamingResponse
import modules.api.completions as OAIcompletions
import modules.api.models as OAImodels
from modules.text_generation import encode
from .errors import OpenAIError
app = FastAPI()
@app.exception_handler(OpenAIError)
async def openai_error_handler(request, exc):
    kind = "server_error" if exc.code >= 500 else "invalid_request_error"
    return JSONResponse(status_code=exc.code, content={"error": {
        "message": exc.message, "type": kind, "param": getattr(exc, "param", None),
        "code": None}})
@app.post("/load")
def handle_load_model(body: dict):
    try:
        OAImodels._load_model(body)
        return "OK"
    except Exception:
        raise HTTPException(status_code=500, detail="Failed to load the model.")
@app.get("/info")
def info():
    return OAImodels.get_current_model_info()
@app.post("/encode")
def handle_encode(body: dict):
    return {"tokens": encode(body["text"])[0].tolist()}
@app.post("/completions")
def openai_completions(body: dict):
    return OAIcompletions.completions(body)
@app.post("/stream")
def openai_stream(body: dict):
    def lines():
        for chunk in OAIcompletions.stream_completions(body):
            yield json.dumps(chunk) + "\\n"
    return StreamingResponse(lines())
'''

MENU = '''
import modules.shared as shared
from modules.LoRA import add_lora_to_model
from modules.models import load_model, unload_model
def create_ui():
    pass
def create_event_handlers():
    pass
def load_model_wrapper(selected_model, loader, autoload=False):
    yield "the web UI's own"
def load_lora_wrapper(selected_loras):
    yield "the web UI's own"
    add_lora_to_model(selected_loras)
    yield "applied"
'''

SERVER = '''
import sys
from modules import shared
from modules.prompts import generate_reply
from modules.LoRA import add_lora_to_model
from modules.models import load_model
from modules.models_settings import get_model_metadata, update_model_parameters
if __name__ == "__main__":
    if shared.args.model:
        update_model_parameters(get_model_metadata(shared.args.model), initial=True)
        try:
            shared.model, shared.tokenizer = load_model(shared.args.model)
        except BaseException as error:
            print("failed", type(error).__name__, error)
    print("loader", shared.args.loader, "ctx", shared.args.ctx_size,
          "4bit", getattr(shared.args, "cache_4bit", None), "model", type(shared.model).__name__)
    print("up")
'''

FILES = {
    "modules/shared.py": SHARED,
    "modules/loaders.py": LOADERS,
    "modules/models_settings.py": MODELS_SETTINGS,
    "modules/models.py": MODELS,
    "modules/text_generation.py": TEXT_GENERATION,
    "modules/prompts.py": PROMPTS,
    "modules/utils.py": UTILS,
    "modules/chat.py": CHAT,
    "modules/LoRA.py": LORA,
    "modules/api/errors.py": API_ERRORS,
    "modules/api/completions.py": COMPLETIONS,
    "modules/api/models.py": API_MODELS,
    "modules/api/script.py": API_SCRIPT,
    "modules/ui_model_menu.py": MENU,
    "server.py": SERVER,
}


def write_webui(root: Path, **changes: tuple[str, str]) -> Path:
    """Write the double.

    Args:
        root: its folder, which need not exist.
        changes: name of a file in `modules/` -> a text in it and its replacement.
    """
    for name, text in FILES.items():
        old, new = changes.get(name.removeprefix("modules/").removesuffix(".py"), ("", ""))
        assert old in text, (name, old)
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text.replace(old, new) if old else text)
    (root / "user_data" / "models").mkdir(parents=True, exist_ok=True)
    return root


def enter_webui(monkeypatch: pytest.MonkeyPatch, root: Path, *arguments: str) -> None:
    """Make a web UI's modules importable, as in a process that `server.py` started there."""
    monkeypatch.chdir(root)
    monkeypatch.syspath_prepend(str(root))
    monkeypatch.setattr(sys, "argv", ["server.py", *arguments])


def forget_webui() -> None:
    """Unload our model, take the plugin out, and forget the double's modules."""
    if loading.current() is not None:
        loading.current().unload()
        loading.forget(loading.current())
    registration.unregister()
    for name in [n for n in sys.modules if n == "modules" or n.startswith("modules.")]:
        del sys.modules[name]
    importlib.invalidate_caches()
