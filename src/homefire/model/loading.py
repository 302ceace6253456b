"""Loading a causal language model from a directory, in the one set of numbers.

Weights are rounded to the serving dtype (what snapshots hold), so that trainer and sampler run the same
values. On a CPU these are computed with in float32, on an accelerator as they are.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from homefire.model import verdict
from homefire.model.attention import ATTENTION
from homefire.model.device import Numbers, numbers_on
from homefire.model.head import PLAIN, Head, LogitsForm, decoder_of, recognised_form
from homefire.model.layout import RowLayout
from homefire.wire.errors import InvalidArgument, ModelUnavailable

Output = TypeVar("Output")
CPU = torch.device("cpu")
SERVING_DTYPES = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
}


@dataclass(frozen=True)
class LoadedModel:
    """A model in eval mode whose attention goes through `homefire.model.attention`.

    The module is shared and mutable: whoever loaded it owns it, and changes weights in place only.
    """

    module: PreTrainedModel
    config: PreTrainedConfig
    """The text configuration."""
    architecture: str
    """`model_type`, e.g. `qwen3`."""
    vocab_size: int
    max_context_length: int
    """Tokens of one row up to which positions are exact."""
    serving_dtype: torch.dtype
    tied: frozenset[str]
    """State-dict names that alias another one, e.g. `lm_head.weight`; left out of snapshots."""
    logits_form: LogitsForm
    """What the model makes of its head's product."""
    layout: RowLayout = RowLayout.PACKED
    """How its rows are computed without reaching one another."""
    root: nn.Module | None = None
    """Set where parameters are divided among ranks: runs a function while they can be gathered."""

    def run_pass(self, run: Callable[[], Output]) -> Output:
        """`run()`, a forward pass. Whatever reads weights goes through here."""
        return run() if self.root is None else cast(Output, self.root(run))

    @property
    def backbone(self) -> nn.Module:
        """The base model: token ids -> `last_hidden_state`."""
        return decoder_of(self.module)

    @property
    def head(self) -> nn.Linear:
        """The linear layer at the end; `logits_head` is the whole way to logits."""
        return cast(nn.Linear, self.module.get_output_embeddings())

    @property
    def head_weight(self) -> Tensor:
        """[V, hidden]; the embedding itself when tied."""
        return self.head.weight

    @property
    def logits_head(self) -> Head:
        """Hidden states -> logits."""
        return Head(self.head.weight, self.head.bias, self.logits_form)

    @property
    def head_path(self) -> str:
        """The head's module path, e.g. `lm_head`."""
        head = self.head
        return next(path for path, module in self.module.named_modules() if module is head)

    @property
    def device(self) -> torch.device:
        return self.head_weight.device


def load_model(
    directory: Path,
    *,
    serving_dtype: str = "bfloat16",
    device: torch.device = CPU,
    numbers: Numbers | None = None,
) -> LoadedModel:
    """Reads config and safetensors of a Hugging Face directory; no network, no remote code.

    Wherever it will compute, and in whichever `numbers` (None: those of the device), it is judged in
    float32 on the CPU, where a difference that is none can be told; then it moves, and is looked at
    again there.

    Raises ModelUnavailable when files are missing or incomplete, Unsupported (naming the reason) when
    our attention hook or head would not be exact for this model.
    """
    dtype = serving_dtype_of(serving_dtype)
    config = read_config(directory)
    verdict.refuse_by_config(config.get_text_config())
    module = _read_module(directory, config)
    verdict.refuse_by_structure(module)
    _round_to(module, dtype)
    model = described(module, config, dtype)
    judged = verdict.in_exact_layout(replace(model, logits_form=recognised_form(module)))
    if numbers is None:
        numbers = numbers_on(device)
    if device == CPU and numbers is Numbers.FLOAT32:
        return judged
    _move(module, device, dtype if numbers is Numbers.SERVING else torch.float32)
    return verdict.checked_where_it_computes(judged)


def described(module: PreTrainedModel, config: PreTrainedConfig, dtype: torch.dtype) -> LoadedModel:
    """The module with our attention, and what is known of it without running it: the form of its head and
    the layout of its rows are still guesses."""
    _drop_query_temperature(module)
    module.set_attn_implementation(ATTENTION)
    text_config = config.get_text_config()
    return LoadedModel(
        module=module,
        config=text_config,
        architecture=str(text_config.model_type),
        vocab_size=int(text_config.vocab_size),
        max_context_length=verdict.context_limit(text_config).num_tokens,
        serving_dtype=dtype,
        tied=frozenset(_aliases(module)),
        logits_form=PLAIN,
    )


@torch.no_grad()
def _move(module: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    """Parameters alone change their dtype: buffers such as rotary frequencies need float32."""
    for part in module.modules():
        for parameter in part.parameters(recurse=False):
            if parameter.is_floating_point():
                parameter.data = parameter.data.to(dtype)
    cast(nn.Module, module).to(device)  # transformers' own `to` is mistyped


def serving_dtype_of(name: str) -> torch.dtype:
    if name not in SERVING_DTYPES:
        raise InvalidArgument(
            f"serving dtype {name!r} is unknown",
            hint=f"use one of {', '.join(SERVING_DTYPES)}",
            field="serving_dtype",
        )
    return SERVING_DTYPES[name]


def read_config(directory: Path) -> PreTrainedConfig:
    if not (directory / "config.json").is_file():
        raise ModelUnavailable(
            f"{directory} has no config.json", hint="give a Hugging Face model directory"
        )
    try:
        return AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as exc:
        raise ModelUnavailable(f"the configuration in {directory} cannot be read: {exc}") from exc


def _read_module(directory: Path, config: PreTrainedConfig) -> PreTrainedModel:
    transformers_logging.disable_progress_bar()
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            directory,
            config=config,
            dtype=torch.float32,
            attn_implementation="eager",
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError) as exc:
        raise ModelUnavailable(f"the weights in {directory} cannot be loaded: {exc}") from exc
    module, report = loaded
    absent = sorted(report["missing_keys"]) + sorted(str(key) for key in report["mismatched_keys"])
    if absent:
        raise ModelUnavailable(
            f"the weights in {directory} lack {len(absent)} tensors, e.g. {absent[0]}",
            hint="the checkpoint is incomplete, or its config.json belongs to another model",
        )
    return module.eval()


def _drop_query_temperature(module: nn.Module) -> None:
    """Llama 4 scales queries by their place in the row, which in a packed row is not the place in the
    text. Up to the context limit (wire/context_limit.py) the scale is exactly 1."""
    for part in module.modules():
        if vars(part).get("attn_temperature_tuning"):
            vars(part)["attn_temperature_tuning"] = False


@torch.no_grad()
def _round_to(module: nn.Module, dtype: torch.dtype) -> None:
    for parameter in module.parameters():
        parameter.copy_(parameter.to(dtype))


def _aliases(module: nn.Module) -> list[str]:
    """State-dict names whose tensor appeared under an earlier name."""
    seen: set[int] = set()
    aliases: list[str] = []
    for name, tensor in module.state_dict(keep_vars=True).items():
        if id(tensor) in seen:
            aliases.append(name)
        seen.add(id(tensor))
    return aliases
