"""A double of TabbyAPI's modules: no more than what the backend asks of them."""

from __future__ import annotations

import asyncio
import sys
from dataclasses import dataclass, field
from types import ModuleType, SimpleNamespace
from typing import Any


class ContextLengthExceededError(ValueError):
    pass


class Card(SimpleNamespace):
    """A record of any fields, as TabbyAPI's cards and log probabilities are."""


class HFModel:
    """What TabbyAPI has read of a folder.

    Args:
        method: `quant_method` of config.json.
    """

    def __init__(self, method: str | None = "exl2", eos: tuple[int, ...] = ()) -> None:
        self._method = method
        self._eos = eos

    def quant_method(self) -> str | None:
        return self._method

    def eos_tokens(self) -> list[int]:
        return list(self._eos)

    def add_bos_token(self) -> bool:
        return True


@dataclass
class Params:
    """A request that asks for nothing but what is set."""

    add_bos_token: bool | None = None
    top_logprobs: int = 0
    more: dict[str, Any] = field(default_factory=dict)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return self.__dict__.get("more", {}).get(name)

    def model_dump(self, exclude: set[str]) -> dict[str, Any]:
        return dict(self.more)


def params(**fields: Any) -> Params:
    known = {name: fields.pop(name) for name in ("add_bos_token", "top_logprobs") if name in fields}
    return Params(**known, more=fields)


class DisconnectHandler:
    """Knows whether the client is still there: it is until `leave` is called."""

    def __init__(self) -> None:
        self.disconnected = False
        self.cleanup_tasks: dict[int, Any] = {}

    def leave(self) -> None:
        self.disconnected = True

    async def poll(self) -> None:
        if self.disconnected:
            for function, args in self.cleanup_tasks.values():
                await function(*args)
            self.cleanup_tasks = {}
            raise asyncio.CancelledError

    async def add_cleanup_task(self, key: int, function: Any, args: Any) -> None:
        assert key not in self.cleanup_tasks
        self.cleanup_tasks[key] = (function, args)

    async def finish(self, key: int) -> None:
        del self.cleanup_tasks[key]


def enter_tabby(monkeypatch) -> SimpleNamespace:
    """Put the modules where the backend looks for them.

    Returns:
        `lines` of the log as (level, text), and `unhealthy`, the errors of the health report.
    """
    found = SimpleNamespace(lines=[], unhealthy=[])

    async def add_unhealthy_event(error: Exception) -> None:
        found.unhealthy.append(error)

    async def find_prompt_template(name: str | None, folder: Any) -> Any:
        return Card(name=name, raw_template="{{ messages }}") if name else None

    def level(name: str):
        return lambda line, *more: found.lines.append((name, line))

    logger = Card(info=level("info"), warning=level("warning"), error=level("error"))
    modules = {
        "common.logger": {"xlogger": logger},
        "common.errors": {"ContextLengthExceededError": ContextLengthExceededError},
        "common.gen_logging": {
            "log_prompt": lambda prompt, request_id: None,
            "log_generation_params": lambda **values: None,
            "log_metrics": lambda *values: found.lines.append(("metrics", values)),
        },
        "common.health": {"HealthManager": Card(add_unhealthy_event=add_unhealthy_event)},
        "common.templating": {"find_prompt_template": find_prompt_template},
        "endpoints.core.types.model": {"ModelCard": Card, "ModelCardParameters": Card},
        "endpoints.OAI.types.chat_completion": {
            "ChatCompletionLogprob": Card, "ChatCompletionLogprobLeaf": Card},
        "endpoints.OAI.utils.tools": {"is_supported_format": lambda name: name == "mistral"},
    }
    for name, content in modules.items():
        module = ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
    return found
