"""What the numbers of a client are held against: plain `transformers`, and the files of the store."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM

from homefire.checkpoints.tiny import ensure_tiny

Tensors = dict[str, np.ndarray]


def checkpoint_directory(home: Path, path: str) -> Path:
    """Of `tinker://<run>/weights/<name>` or `tinker://<run>/sampler_weights/<name>`."""
    run, kind, name = path.removeprefix("tinker://").split("/")
    family = {"weights": "state", "sampler_weights": "sampler"}[kind]
    (directory,) = (home / "store").glob(f"*/*/{run}/{family}/{name}")
    return directory


def checkpoint_tensors(home: Path, path: str) -> Tensors:
    """Everything in it; of a state the optimizer's tensors too."""
    tensors: Tensors = {}
    for file in sorted(checkpoint_directory(home, path).glob("*.safetensors")):
        tensors |= {f"{file.stem}/{name}": value for name, value in load_file(file).items()}
    return tensors


def same_bits(first: Tensors, second: Tensors) -> bool:
    return first.keys() == second.keys() and all(
        value.dtype == second[name].dtype and value.tobytes() == second[name].tobytes()
        for name, value in first.items()
    )


def difference(after: Tensors, before: Tensors) -> np.ndarray:
    """All of `after - before`, as one float64 vector."""
    assert after.keys() == before.keys()
    return np.concatenate(
        [(after[name].astype(np.float64) - before[name]).ravel() for name in sorted(after)]
    )


class PlainModel:
    """An unmodified `transformers` model in float32, with a LoRA snapshot merged into it."""

    def __init__(self, directory: Path, *, adapter: Path | None = None) -> None:
        self._module = AutoModelForCausalLM.from_pretrained(
            directory, dtype=torch.float32, attn_implementation="eager"
        ).eval()
        if adapter is not None:
            self._merge(adapter)

    def _merge(self, adapter: Path) -> None:
        """W + alpha / r * B A; an adapted head is untied first, since the embedding is not."""
        config = json.loads((adapter / "adapter_config.json").read_text())
        tensors = load_file(adapter / "adapter_model.safetensors")
        for target in config["target_modules"]:
            a, b = (
                torch.from_numpy(tensors[f"base_model.model.{target}.lora_{half}.weight"])
                for half in "AB"
            )
            linear = self._module.get_submodule(target)
            weight = linear.weight.detach() + config["lora_alpha"] / config["r"] * b @ a
            linear.weight = torch.nn.Parameter(weight, requires_grad=False)

    @torch.inference_mode()
    def logprobs(self, tokens: list[int]) -> torch.Tensor:
        """[T, V]: after each token, those of the next."""
        return self._module(input_ids=torch.tensor([tokens])).logits[0].log_softmax(-1)

    def of_targets(self, tokens: list[int]) -> list[float]:
        """The logprob of each token but the first."""
        targets = torch.tensor(tokens[1:])[:, None]
        return self.logprobs(tokens)[:-1].gather(-1, targets)[:, 0].tolist()

    @torch.inference_mode()
    def greedy(self, prompt: list[int], count: int) -> list[int]:
        ids = torch.tensor([prompt])
        ended = self._module.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            min_new_tokens=count,
            max_new_tokens=count,
        )
        return ended[0, len(prompt) :].tolist()


def base_model(home: Path) -> PlainModel:
    return PlainModel(ensure_tiny(home / "models/tiny"))


def adapted_model(home: Path, path: str) -> PlainModel:
    return PlainModel(ensure_tiny(home / "models/tiny"), adapter=checkpoint_directory(home, path))
