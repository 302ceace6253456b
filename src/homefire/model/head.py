"""From hidden states to logits, by what the model itself does around its lm_head.

Models scale logits (Granite, Cohere), soft-cap them (Gemma 2) or add a bias (Phi), under configuration
names that nobody shares. So no table of names is kept: the CausalLM's own forward runs with a stub in
place of its base model, and shows what it makes of given products. Where that is a scale or a soft cap it
is written out and fused with the loss; anything else goes through the CausalLM's own forward.

Axes: n tokens, H hidden, V vocabulary, r adapter rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

LowRank = tuple[Tensor, Tensor]
"""x [n, r] and b [V, r]: an adapter on the head adds x @ b.T to the product."""

_FITS = 1e-5
"""Largest error of a recognised form, relative to the largest logit. Float32 alone gives 1e-7."""


class LogitsForm(Protocol):
    """What becomes of the lm_head's product."""

    def logits(self, hidden: Tensor, product: Callable[[Tensor], Tensor]) -> Tensor:
        """hidden [n, H] -> logits [n, V], with `product` in place of the lm_head."""
        ...


@dataclass(frozen=True)
class ScaledLogits:
    """logits = scale * product, then softcap * tanh(logits / softcap) where there is a soft cap."""

    scale: float = 1.0
    softcap: float | None = None

    def logits(self, hidden: Tensor, product: Callable[[Tensor], Tensor]) -> Tensor:
        return self.of(product(hidden))

    def of(self, product: Tensor) -> Tensor:
        logits = product if self.scale == 1.0 else product * self.scale
        if self.softcap is None:
            return logits
        return torch.tanh(logits / self.softcap) * self.softcap

    def slope(self, logits: Tensor) -> Tensor | float:
        """d logits / d product."""
        if self.softcap is None:
            return self.scale
        return (1 - (logits / self.softcap).square()) * self.scale


PLAIN = ScaledLogits()


def decoder_of(module: PreTrainedModel) -> nn.Module:
    """The base model: token ids -> `last_hidden_state`."""
    found = cast(nn.Module, module.get_decoder())
    if found is not module:
        return found
    # Llama 4's text model: transformers looks for `language_model`, which only its wrapper has
    embeddings = module.get_input_embeddings()
    inner = [child for child in module.children() if embeddings in child.modules()]
    return inner[0] if inner else module


@dataclass(frozen=True)
class OwnForward:
    """The CausalLM's own forward behind its base model: right for any model, and one pass slower."""

    module: PreTrainedModel

    def logits(self, hidden: Tensor, product: Callable[[Tensor], Tensor]) -> Tensor:
        decoder = decoder_of(self.module)
        head = cast(nn.Module, self.module.get_output_embeddings())
        tokens = torch.zeros((1, len(hidden)), dtype=torch.int64, device=hidden.device)
        with ExitStack() as stack:
            stack.enter_context(standing_in(decoder, lambda *_, **__: _Hidden(hidden[None])))
            stack.enter_context(standing_in(head, product))
            return self.module(input_ids=tokens, use_cache=False).logits[0]


def float32_product(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """hidden [n, H] @ weight [V, H].T + bias, float32 [n, V] whatever they are. No gradient.

    Sums of 16-bit numbers are float32 in the first place; rounding logits back to 16 bits would cost
    0.03 nats of a logit of 10.
    """
    if hidden.dtype == torch.float32:
        return F.linear(hidden, weight, bias)
    if hidden.device.type == "cuda":
        product = torch.mm(hidden, weight.t(), out_dtype=torch.float32)
    else:
        product = hidden.float() @ weight.float().t()
    return product if bias is None else product.add_(bias)


@dataclass(frozen=True)
class Head:
    """A model's way from hidden states to logits; its tensors are the live ones."""

    weight: Tensor
    """[V, H]"""
    bias: Tensor | None = None
    """[V]"""
    form: LogitsForm = PLAIN

    def logits(self, hidden: Tensor, low_rank: LowRank | None = None) -> Tensor:
        """hidden [n, H] -> float32 [n, V]."""

        def product(hidden: Tensor) -> Tensor:
            form = F.linear if torch.is_grad_enabled() else float32_product
            linear = form(hidden, self.weight, self.bias)
            if low_rank is None:
                return linear
            x, b = low_rank
            return linear + (x @ b.t()).view_as(linear)

        return self.form.logits(hidden, product).float()


@torch.no_grad()
def recognised_form(module: PreTrainedModel) -> LogitsForm:
    """The form of a model whose lm_head is an `nn.Linear`, found by feeding it chosen products."""
    linear = cast(nn.Linear, module.get_output_embeddings())
    own = OwnForward(module)
    generator = torch.Generator().manual_seed(0)
    like = linear.weight
    hidden = torch.randn(4, like.shape[1], generator=generator).to(like)
    products = torch.randn(4, like.shape[0], generator=generator).to(like)
    fitting = (
        form
        for form in _candidates(own, hidden, products)
        if all(_fits(form.of(z), _through(own, hidden, z)) for z in (products, products * 1e3))
    )
    form = next(fitting, own)
    whole = Head(linear.weight, linear.bias, form).logits(hidden)
    return form if _fits(whole, own.logits(hidden, linear.forward).float()) else own


def _candidates(own: OwnForward, hidden: Tensor, products: Tensor) -> Iterator[ScaledLogits]:
    logits, z = _through(own, hidden, products).double(), products.double()
    yield _tidy(float((logits * z).sum() / z.square().sum()), None)
    softcap = float(_through(own, hidden, products * 1e6).abs().max())
    straightened = softcap * torch.atanh(logits / softcap)
    finite = straightened.isfinite()
    ratio = (straightened * z)[finite].sum() / z[finite].square().sum()
    yield _tidy(float(ratio), softcap)


def _tidy(scale: float, softcap: float | None) -> ScaledLogits:
    """A scale of 1 within rounding is none."""
    return ScaledLogits(1.0 if abs(scale - 1) < 1e-6 else scale, softcap)


def _through(own: OwnForward, hidden: Tensor, products: Tensor) -> Tensor:
    """What the model makes of these products [n, V]; not a number where it changes hidden states
    before its lm_head, so that no form fits."""

    def product(given: Tensor) -> Tensor:
        unchanged = given.shape[1:] == hidden.shape and torch.equal(given[0], hidden)
        return products[None].clone() if unchanged else products[None] * float("nan")

    return own.logits(hidden, product).float()


def _fits(form: Tensor, truth: Tensor) -> bool:
    """Not a number fits nothing."""
    return bool((form - truth).abs().max() <= _FITS * truth.abs().max())


class _Hidden:
    """What a base model returns, with nothing but hidden states: any other field is None."""

    def __init__(self, hidden: Tensor) -> None:
        self.last_hidden_state = hidden

    def __getattr__(self, name: str) -> None:
        return None

    def __getitem__(self, index: int | slice) -> Tensor | tuple[Tensor, ...]:
        return (self.last_hidden_state,)[index]


@contextmanager
def standing_in(module: nn.Module, forward: Callable[..., object]) -> Iterator[None]:
    """`module(...)` calls `forward` until the block ends."""
    attributes = vars(module)
    before = attributes.get("forward")
    attributes["forward"] = forward
    try:
        yield
    finally:
        if before is None:
            del attributes["forward"]
        else:
            attributes["forward"] = before
