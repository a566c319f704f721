"""A decoder with random weights, and the ways to run it: all of them around the same frozen weights."""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lora_kernels import use_backend
from lora_kernels.cli.bench.providers import FLOOR, NAMED_ONLY, Missing
from lora_kernels.cli.bench.shapes import PROJECTIONS, ModelShape
from lora_kernels.dispatch import PREFERENCE, BackendName

DTYPE = torch.bfloat16
# QLoRA's for 7B and 13B. Several times as much, and steps of random weights amplify every rounding beyond comparison.
LEARNING_RATE = 2e-4


@dataclass(frozen=True)
class ModelProvider:
    """How a model is trained.

    `backend`: ours, or None for PEFT's own code. `float32`: adapters in float32 under autocast, as Trainer has it.
    `exact`: all of the model in float32, in a copy of its own. Without `lora` nothing is trained and the backward still
    runs through every layer: the floor.
    """

    lora: bool = True
    backend: BackendName | None = None
    float32: bool = False
    compiled: bool = False
    exact: bool = False


REFERENCE, REFERENCE_FLOAT32, EXACT = "peft", "peft-float32", "peft-exact"
MODEL_PROVIDERS: dict[str, ModelProvider] = {
    FLOOR: ModelProvider(lora=False),
    REFERENCE: ModelProvider(),
    REFERENCE_FLOAT32: ModelProvider(float32=True),
    "peft-compile": ModelProvider(compiled=True),
    EXACT: ModelProvider(exact=True),
    **{name: ModelProvider(backend=name) for name in (*reversed(PREFERENCE), "auto")},
    "triton-float32": ModelProvider(backend="triton", float32=True),
    "frozen-compile": ModelProvider(lora=False, compiled=True),
    "triton-compile": ModelProvider(backend="triton", compiled=True),
}
# Who takes part only where it is named.
_COMPILED = "left out, because a whole model takes minutes to compile: name it after --providers to have it"
LEFT_OUT = NAMED_ONLY | {
    **{name: _COMPILED for name, provider in MODEL_PROVIDERS.items() if provider.compiled},
    EXACT: "left out, because it is what rounding does to the others, not a way to train: name it after --providers",
}


def stock_of(name: str) -> str | None:
    """Stock PEFT with the same dtypes, whose losses a provider's are compared with unless EXACT takes part."""
    provider = MODEL_PROVIDERS.get(name)
    if provider is None or not provider.lora or provider.exact:
        return None
    return REFERENCE_FLOAT32 if provider.float32 else REFERENCE


def build(
    shape: ModelShape, layers: int, seq: int, quantize: str | None, device: torch.device, count: Iterable[int]
) -> nn.Module:
    """A Llama of a shape, frozen. `count` runs over its layers: only one of them is ever held in 16 bits if quantized.

    The embedding and the head stay in 16 bits, as in QLoRA.
    """
    from transformers import AutoModelForCausalLM, LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    config = LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=0,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        max_position_embeddings=max(seq, 8192),
        tie_word_embeddings=False,
        use_cache=False,
    )
    torch.manual_seed(0)
    with torch.device(device), _default_dtype(DTYPE):
        model: Any = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", dtype=DTYPE)
    for index in count:
        with torch.device(device), _default_dtype(DTYPE):
            layer = LlamaDecoderLayer(model.config, index)
        if quantize:
            # bitsandbytes makes its code tables in the default dtype, once for all that follows in the process.
            _quantize(layer)
        model.model.layers.append(layer)
    model.config.num_hidden_layers = layers
    # What PEFT asks a model for, to choose its layers for bitsandbytes'.
    model.is_loaded_in_4bit = quantize is not None
    frozen: nn.Module = model.requires_grad_(False)
    return frozen


def _quantize(layer: nn.Module) -> None:
    from bitsandbytes.nn import Linear4bit, Params4bit

    for name, linear in [(n, m) for n, m in layer.named_modules() if isinstance(m, nn.Linear)]:
        small = Linear4bit(
            linear.in_features, linear.out_features, bias=False, compute_dtype=DTYPE, quant_type="nf4", device="meta"
        )
        weight = Params4bit(linear.weight.detach(), requires_grad=False, quant_type="nf4", module=small)
        # Moving it is what quantizes it.
        small.weight = weight.to(linear.weight.device)
        parent, _, child = name.rpartition(".")
        setattr(layer.get_submodule(parent), child, small)


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


class Trained:
    """A provider's model around the frozen weights of `base`, which it shares, and its optimizer."""

    def __init__(
        self, provider: ModelProvider, base: nn.Module, rank: int, checkpointing: bool, dropout: float = 0.0
    ) -> None:
        self.provider = provider
        self.device = next(base.parameters()).device
        self.model: nn.Module = _in_float32(base) if provider.exact else copy.deepcopy(base, _shared(base))
        if provider.lora:
            self.model = _with_adapters(self.model, rank, provider, dropout)
        decoder: Any = self.model.get_base_model() if provider.lora else self.model  # type: ignore[operator]
        # So that every layer has a gradient to hand down, with adapters in it or not.
        decoder.enable_input_require_grads()
        if checkpointing:
            decoder.gradient_checkpointing_enable(gradient_checkpointing_kwargs=self._checkpointing())
        self.model.train()
        self.adapters = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        _fill(self.adapters)
        fused = self.device.type == "cuda"
        adapters = self.adapters.values()
        self.optimizer = torch.optim.AdamW(adapters, lr=LEARNING_RATE, fused=fused) if adapters else None
        if provider.compiled:
            self.model.compile()

    def loss(self, tokens: Tensor) -> Tensor:
        """The loss of a batch, its gradients added to the adapters'."""
        autocast = torch.autocast(self.device.type, DTYPE) if self.provider.float32 else nullcontext()
        with autocast, self._backend():
            loss: Tensor = self.model(input_ids=tokens, labels=tokens, use_cache=False).loss
        torch.autograd.backward(loss)
        return loss.detach()

    def step(self, tokens: Tensor) -> Tensor:
        """A training step."""
        loss = self.loss(tokens)
        if self.optimizer is not None:
            self.optimizer.step()
        self.drop_gradients()
        return loss

    @torch.no_grad()
    def logits(self, tokens: Tensor) -> Tensor:
        """Those of the token that comes next, of each sequence."""
        with self._backend():
            found: Tensor = self.model(input_ids=tokens, use_cache=False, logits_to_keep=1).logits
        return found

    def generate(self, prompts: Tensor, count: int) -> Tensor:
        """The prompts and so many tokens more, one after the other, the likeliest each."""
        with self._backend():
            found: Tensor = self.model.generate(  # type: ignore[operator]
                input_ids=prompts,
                attention_mask=torch.ones_like(prompts),
                max_new_tokens=count,
                min_new_tokens=count,
                do_sample=False,
                use_cache=True,
                pad_token_id=0,
            )
        return found

    @contextmanager
    def without_dropout(self) -> Iterator[None]:
        """Nothing is dropped inside of it."""
        layers = [module for module in self.model.modules() if isinstance(module, nn.Dropout)]
        before = [layer.p for layer in layers]
        for layer in layers:
            layer.p = 0.0
        try:
            yield
        finally:
            for layer, p in zip(layers, before, strict=True):
                layer.p = p

    def drop_gradients(self) -> None:
        """Gives their memory back."""
        for adapter in self.adapters.values():
            adapter.grad = None

    def _backend(self) -> AbstractContextManager[None]:
        return use_backend(self.provider.backend) if self.provider.backend else nullcontext()

    def _checkpointing(self) -> dict[str, Any]:
        options: dict[str, Any] = {"use_reentrant": False}
        if self.provider.backend and not self.provider.compiled:
            # The recomputation runs on a thread of autograd's, where no use_backend holds but its own.
            options["context_fn"] = lambda: (self._backend(), self._backend())
        return options


def _shared(base: nn.Module) -> dict[int, Any]:
    """What a copy of the model is not to copy: tensors, and the scales of bitsandbytes, which are neither."""
    scales = [getattr(module, "quant_state", None) for module in base.modules()]
    return {id(part): part for part in (*base.parameters(), *base.buffers(), *scales) if part is not None}


def _in_float32(base: nn.Module) -> nn.Module:
    if getattr(base, "is_loaded_in_4bit", False):
        raise Missing("the weights are quantized, and it would train others: leave --quantize out")
    return copy.deepcopy(base).to(torch.float32)


def _with_adapters(model: nn.Module, rank: int, provider: ModelProvider, dropout: float) -> nn.Module:
    if importlib.util.find_spec("peft") is None:
        raise Missing("peft is not installed")
    from peft import LoraConfig, get_peft_model

    names = list(PROJECTIONS)
    config = LoraConfig(
        r=rank, lora_alpha=2 * rank, lora_dropout=dropout, target_modules=names, task_type="CAUSAL_LM"
    )
    adapted: nn.Module = get_peft_model(model, config, autocast_adapter_dtype=provider.float32)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            # Over a quantized base PEFT leaves them in float32 whatever it is told.
            parameter.data = parameter.data.to(torch.float32 if provider.float32 or provider.exact else DTYPE)
    if provider.backend:
        from lora_kernels import apply_lora_kernels

        report = apply_lora_kernels(adapted)
        if report.not_fused:
            reason = next(layer.reason for layer in report if layer.reason)
            raise Missing(f"{report.not_fused} of {len(report)} layers are not fused: {reason}")
    return adapted


def _fill(adapters: dict[str, nn.Parameter]) -> None:
    """The same adapters for every provider; B is not zero, as after some steps of training."""
    for index, (_, adapter) in enumerate(sorted(adapters.items())):
        generator = torch.Generator(adapter.device).manual_seed(index)
        values = torch.randn(adapter.shape, generator=generator, device=adapter.device)
        # A is [r, K] and B [N, r]: either way what comes out of the branch is a tenth of what comes out of the layer.
        adapter.data.copy_(values * (0.3 * adapter.shape[1] ** -0.5))
