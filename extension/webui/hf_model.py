"""The model for `ExLlamav2_HF`: transformers generates, with the web UI's whole set of samplers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from transformers import GenerationConfig, GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from exl_loader import InvalidConfig

from . import loading
from .contract import say
from .request import shortened, without_padding

if TYPE_CHECKING:
    from exl_loader import LoadedModel


def text_config(model_dir: str) -> PretrainedConfig:
    """Read a folder's config.json with transformers.

    A model with several parts has the text model's keys in `text_config`. They become the
    config's own, and the objects of the parts are left out, because transformers takes them for
    configurations, and in a config of no particular class they are plain dicts.

    Raises:
        InvalidConfig: transformers cannot read it, although the engine could.
    """
    try:
        values, _ = PretrainedConfig.get_config_dict(model_dir)
        values |= values.get("text_config") or {}
        parts = [key for key, value in values.items()
                 if key.endswith("_config") and isinstance(value, dict)]
        return PretrainedConfig.from_dict({k: v for k, v in values.items() if k not in parts})
    except Exception as error:
        raise InvalidConfig(
            f"config.json of {model_dir}", expected="content that transformers can read",
            actual=f"{type(error).__name__}: {error}",
            remedy="Download it again, or choose the loader ExLlamav2, which needs no transformers",
        ) from error


class Exllamav3HF(PreTrainedModel, GenerationMixin):
    """A loaded model with transformers' interface.

    The web UI recognises models by the name of their class when it unloads them. This class has
    the name and the methods of one of its own, so it calls `unload`. transformers keeps no
    cache: every call passes the whole text, and the engine's cache finds it by its ids.

    Args:
        loaded: what `exl_loader.load` returned.
    """

    # `PreTrainedModel` has these as class attributes.
    main_input_name = "input_ids"
    _is_stateful = True

    def __init__(self, loaded: LoadedModel) -> None:
        config = text_config(loaded.reservation.model_dir)
        # Some classes have another name for it; the web UI's perplexity needs this one.
        config.max_position_embeddings = loaded.config.max_position_embeddings
        super().__init__(config)
        self.loaded = loaded
        self.generation_config = GenerationConfig()
        self._rope_len: int | None = None
        self._error: Exception | None = None
        self._notices: list[str] = []
        self.ended_by_length = False

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    def _validate_model_class(self) -> None:
        pass

    def _validate_model_kwargs(self, model_kwargs: dict[str, Any]) -> None:
        pass

    def _prepare_cache_for_generation(self, *args: Any, **kwargs: Any) -> bool:
        return False

    def prepare_inputs_for_generation(  # type: ignore[override]
        self, input_ids: torch.Tensor, **kwargs: Any
    ) -> dict[str, Any]:
        """Pass on the whole text at every step."""
        return {"input_ids": input_ids}

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Generate with transformers, with RoPE for the length that the text may reach.

        `max_new_tokens` is cut to what the context has room for; `take_notices` reports it.
        """
        inputs = kwargs.get("inputs", args[0] if args else None)
        asked = kwargs.get("max_new_tokens")
        self.ended_by_length = False
        try:
            if inputs is None or not asked:
                return super().generate(*args, **kwargs)  # type: ignore[misc]
            prompt_len = int(inputs.shape[-1])
            new = self._room(prompt_len, int(asked), kwargs.get("negative_prompt_ids"))
            self._rope_len = prompt_len + new
            found = super().generate(*args, **kwargs | {"max_new_tokens": new})  # type: ignore[misc]
            is_full = found.shape[-1] >= prompt_len + new
            self.ended_by_length = is_full
            if new < int(asked) and is_full:
                self._notices.append(self.loaded.context_notice(new))
            return found
        except Exception as error:
            self._error = error
            raise
        finally:
            self._rope_len = None

    def _room(self, prompt_len: int, asked: int, negative_ids: Any) -> int:
        """Return how many tokens may follow the prompt and the negative prompt."""
        longest = prompt_len if negative_ids is None else max(prompt_len, negative_ids.shape[-1])
        left = max(1, self.loaded.ctx_size - longest)
        if asked > left:
            say(shortened(asked, left, longest))
        return min(asked, left)

    def __call__(
        self,
        input_ids: torch.Tensor,
        labels: torch.Tensor | None = None,
        past_key_values: list[int] | None = None,
        use_cache: bool = True,
        **_: Any,
    ) -> CausalLMOutputWithPast:
        """Compute logits after the last token, or after each token if there are labels.

        Args:
            input_ids: int64 [1, n]; with `past_key_values` only the ids that follow those.
            labels: int64 [1, n], -100 for tokens without a loss.
            past_key_values: the ids so far, as an earlier call returned them (guidance).
            use_cache: return the ids so far.

        Returns:
            `logits` float32 [1, 1 or n, vocab_size], `loss`, `past_key_values`.

        Raises:
            ExlLoaderError: see `LoadedModel.next_logits` and `prompt_logits`.
        """
        try:
            return self._evaluate(input_ids, labels, past_key_values, use_cache)
        except Exception as error:
            self._error = error
            raise

    def take_error(self) -> Exception | None:
        """Return the error that ended a generation, once.

        The web UI generates in a thread of its own and does not pass its error to the page.
        """
        error, self._error = self._error, None
        return error

    def take_notices(self) -> list[str]:
        """Return the notices of the last generation, once."""
        notices, self._notices = self._notices, []
        return notices

    def _evaluate(
        self, input_ids: torch.Tensor, labels: torch.Tensor | None,
        past_key_values: list[int] | None, use_cache: bool,
    ) -> CausalLMOutputWithPast:
        ids = [*(past_key_values or []), *input_ids[0].tolist()]
        loss = None
        if labels is None:
            logits = self.loaded.next_logits(ids, self._rope_len).reshape(1, 1, -1)
            logits = without_padding(logits, self.loaded)
        else:
            logits = self.get_prompt_logits(ids)
            loss = torch.nn.functional.cross_entropy(
                logits[0, :-1], labels[0, 1:].to(logits.device), ignore_index=-100
            )
        past: Any = ids if use_cache else None
        return CausalLMOutputWithPast(logits=logits, loss=loss, past_key_values=past)

    def get_prompt_logits(self, input_ids: Any) -> torch.Tensor:
        """Compute the logits after each of some ids, float32 [1, n, vocab_size]."""
        ids = torch.as_tensor(input_ids).reshape(-1).tolist()
        return without_padding(self.loaded.prompt_logits(ids), self.loaded).unsqueeze(0)

    def unload(self) -> None:
        """Free the memory."""
        self.loaded.unload()
        loading.forget(self.loaded)
