"""The decoder of a checkpoint, run in its stock class with one layer in memory at a time."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from convert.checkpoint.reader import Checkpoint
from convert.config_keys import running_config
from convert.facts import ModelFacts
from convert.families import Family
from convert.methods.least_squares import Tick, no_tick
from kvpatch.errors import InputModelError

__all__ = ["Block", "Decoder"]

# disk names of the experts of a mixture, which the stock classes hold as stacked tensors
_EXPERT = re.compile(r"(?:mlp|block_sparse_moe)\.experts\.(\d+)\.(\w+)\.weight")
_EXPERT_PARTS = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}


class _HeldError(Exception):
    """Ends a forward pass once it has come as far as it was wanted."""


@dataclass(frozen=True, slots=True)
class Block:
    """One decoder layer with its weights, and what its stock model passes to it."""

    module: nn.Module
    family: Family
    options: Mapping[str, Any]

    @torch.no_grad()
    def run_all(self, hidden: Tensor, tick: Tick = no_tick) -> tuple[Tensor, Tensor, Tensor]:
        """Windows [N, T, E] through the layer, one at a time.

        Args:
            hidden: The windows.
            tick: Called after each of them.

        Returns:
            [N, T, E] each: the layer's output, the input of its attention, and what the output
            projection of its attention gave.
        """
        after, inputs, outputs = (torch.empty_like(hidden) for _ in range(3))
        seen: dict[str, Tensor] = {}
        hooks = [self._watch(seen), self._output.register_forward_hook(_keep(seen, "output"))]
        try:
            for window, states in enumerate(hidden):
                after[window] = self._forward(states)
                inputs[window], outputs[window] = seen["input"], seen["output"]
                tick()
        finally:
            for hook in hooks:
                hook.remove()
        return after, inputs, outputs

    @torch.no_grad()
    def attention_inputs(self, hidden: Tensor, tick: Tick = no_tick) -> Tensor:
        """Inputs of the attention for the layer's inputs [N, T, E]; the rest is not run.

        Args:
            hidden: The windows.
            tick: Called after each of them.
        """
        inputs = torch.empty_like(hidden)
        seen: dict[str, Tensor] = {}
        hook = self._watch(seen, stop=True)
        try:
            for window, states in enumerate(hidden):
                with _ends_early():
                    self._forward(states)
                inputs[window] = seen["input"]
                tick()
        finally:
            hook.remove()
        return inputs

    @torch.no_grad()
    def run_all_with(
        self, hidden: Tensor, attention_outputs: Tensor, tick: Tick = no_tick
    ) -> Tensor:
        """The layer's outputs if its attention gave ``attention_outputs``, all [N, T, E].

        Args:
            hidden: The windows.
            attention_outputs: Of each of them.
            tick: Called after each of them.
        """
        after = torch.empty_like(hidden)
        with self._idle_attention() as output:
            for window, (states, given) in enumerate(zip(hidden, attention_outputs, strict=True)):
                output.forward = lambda *_, given=given: given[None]
                after[window] = self._forward(states)
                tick()
        return after

    @contextmanager
    def _idle_attention(self) -> Iterator[Any]:
        """The output projection, to be given another ``forward``; the others do next to nothing."""
        names = [p.name for p in self.family.projections if {"q", "k", "v"} & set(p.parts)]
        parts: list[Any] = [self.module.get_submodule(name) for name in names]
        for part in parts:
            part.forward = _of_first_token(part.forward)
        try:
            yield self._output
        finally:
            for part in (*parts, self._output):
                del part.forward

    def _forward(self, hidden: Tensor) -> Tensor:
        after = self.module(hidden[None], **self.options)
        first: Tensor = after[0] if isinstance(after, tuple) else after
        return first[0]

    @property
    def _output(self) -> nn.Module:
        (name,) = (p.name for p in self.family.projections if p.parts == ("o",))
        return self.module.get_submodule(name)

    def _watch(self, seen: dict[str, Tensor], *, stop: bool = False) -> Any:
        name = next(p.name for p in self.family.projections if "q" in p.parts)

        def keep(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            seen["input"] = args[0][0]
            if stop:
                raise _HeldError

        return self.module.get_submodule(name).register_forward_pre_hook(keep)


class Decoder:
    """Embeddings and decoder layers of a checkpoint, each read when it is needed.

    Args:
        checkpoint: The open source.
        facts: Its attention.
        context: Tokens of every window.
        device: Where the layers run, in float32.
    """

    def __init__(
        self, checkpoint: Checkpoint, facts: ModelFacts, *, context: int, device: str
    ) -> None:
        from accelerate import init_empty_weights  # noqa: PLC0415
        from transformers import AutoModelForCausalLM  # noqa: PLC0415

        family = facts.family
        self._checkpoint, self._facts, self.device = checkpoint, facts, device
        config = running_config(checkpoint.config)
        # fused attention drops the cap in older releases of transformers
        capped = {} if facts.softcap is None else {"attn_implementation": "eager"}
        with init_empty_weights(include_buffers=False):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, **capped)
        self._base: Any = model.base_model.eval()
        path = family.layer_prefix.removeprefix(family.base).partition(".{layer}")[0]
        self._layers: Any = self._base.get_submodule(path)
        self._options: list[Mapping[str, Any]] = []
        self._context = context
        for module in self._base.modules():
            for name, buffer in module.named_buffers(recurse=False):
                setattr(module, name, buffer.to(device))

    @torch.no_grad()
    def embed(self, windows: Tensor) -> Tensor:
        """Inputs [N, T, E] of the first layer for tokens [N, T]; float32, on the device."""
        with self._embeddings():
            self._options = self._seen_options(windows[:1])
            embedded = torch.stack([self._first_input(window[None]) for window in windows])
        _check("the embeddings give", embedded)
        return embedded

    def turn(self, layer: int) -> Tensor:
        """Rotation [T, P] of each plane at each position, complex, with its scaling."""
        rope = self._facts.ropes[layer]
        if not rope.dim:
            return torch.ones(self._context, 0, dtype=torch.complex64)
        given = self._options[layer].get("position_embeddings")
        if given is None:
            planes = torch.arange(rope.dim // 2, dtype=torch.float64)
            frequency = rope.theta ** (-2 * planes / rope.dim)
            angle = torch.arange(self._context, dtype=torch.float64)[:, None] * frequency
            return torch.polar(torch.ones_like(angle), angle).to(torch.complex64)
        cos, sin = (table.reshape(-1, table.shape[-1]).float() for table in given)
        half = cos.shape[-1] // 2
        if half < rope.dim // 2:  # one entry for each plane
            return torch.complex(cos, sin)
        # each plane stands there twice: side by side, or in the two halves
        neighbours = torch.equal(cos[:, 0::2], cos[:, 1::2])
        cos, sin = (t[:, 0::2] if neighbours else t[:, :half] for t in (cos, sin))
        return torch.complex(cos, sin)

    def observe(
        self, layer: int, hidden: Tensor, tick: Tick = no_tick
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Lead windows [N, T, E] of the original model through a layer; see ``run_all``.

        Raises:
            InputModelError: If the layer gives numbers that nothing can be fitted to.
        """
        with self.block(layer) as block:
            found = block.run_all(hidden, tick)
        _check(f"layer {layer} gives", *found)
        return found

    @contextmanager
    def block(self, layer: int) -> Iterator[Block]:
        """One decoder layer with its weights, for as long as it is needed."""
        module = self._layers[layer]
        prefix = self._facts.family.layer_prefix.format(layer=layer)
        names = [name for name in self._checkpoint.tensors if name.startswith(prefix)]
        self._fill(module, {n.removeprefix(prefix): self._read(n) for n in names})
        try:
            yield Block(module, self._facts.family, self._options[layer])
        finally:
            _empty(module)

    @contextmanager
    def _embeddings(self) -> Iterator[None]:
        """Everything of the base model but its layers, in memory and on the device."""
        layers = {id(module) for module in self._layers.modules()}
        parts = [
            (f"{self._facts.family.base}{name}.", module)
            for name, module in self._base.named_modules()
            if id(module) not in layers and list(module.parameters(recurse=False))
        ]
        for path, module in parts:
            names = [name for name, _ in module.named_parameters(recurse=False)]
            stored = [name for name in names if path + name in self._checkpoint.tensors]
            self._fill(module, {name: self._read(path + name) for name in stored})
        try:
            yield
        finally:
            for _, module in parts:
                _empty(module)

    def _seen_options(self, window: Tensor) -> list[Mapping[str, Any]]:
        """What the stock model passes to each of its layers beside their input."""
        seen: dict[int, Mapping[str, Any]] = {}

        def recorder(index: int) -> Callable[..., Tensor]:
            def forward(hidden: Tensor, *_: Any, **options: Any) -> Tensor:
                seen[index] = options
                if index == len(self._layers) - 1:
                    raise _HeldError
                return hidden

            return forward

        with self._instead_of_layers(recorder), _ends_early():
            self._base(input_ids=window.to(self.device), use_cache=False)
        return [seen[index] for index in range(len(self._layers))]

    def _first_input(self, window: Tensor) -> Tensor:
        seen: list[Tensor] = []

        def recorder(_: int) -> Callable[..., Tensor]:
            def forward(hidden: Tensor, *_: Any, **__: Any) -> Tensor:
                seen.append(hidden[0])
                raise _HeldError

            return forward

        with self._instead_of_layers(recorder), _ends_early():
            self._base(input_ids=window.to(self.device), use_cache=False)
        return seen[0]

    @contextmanager
    def _instead_of_layers(self, recorder: Callable[[int], Any]) -> Iterator[None]:
        for index, module in enumerate(self._layers):
            module.forward = recorder(index)
        try:
            yield
        finally:
            for module in self._layers:
                del module.forward

    def _read(self, name: str) -> Tensor:
        return self._checkpoint.read(name).to(self.device, torch.float32)

    def _fill(self, module: nn.Module, tensors: dict[str, Tensor]) -> None:
        """Put tensors into a module without data."""
        tensors = _stacked_experts(tensors)
        wanted = [name for name, _ in module.named_parameters()]
        module.load_state_dict({name: tensors[name] for name in wanted}, strict=False, assign=True)


def _check(what: str, *tensors: Tensor) -> None:
    """Refuse numbers that are not finite, or whose squares, which all fits begin with, are not."""
    if not all(torch.linalg.vector_norm(tensor).isfinite() for tensor in tensors):
        raise InputModelError(
            f"{what} NaN or infinity on the calibration text, or numbers too large for float32",
            hint="Use a sound checkpoint. Without --calibration the weights are converted without "
            "running the model.",
        )


def _empty(module: nn.Module) -> None:
    """Give the weights of a module back."""
    for part in module.modules():
        for name, weight in part.named_parameters(recurse=False):
            setattr(part, name, nn.Parameter(weight.to("meta"), requires_grad=False))


@contextmanager
def _ends_early() -> Iterator[None]:
    try:
        yield
    except _HeldError:
        return
    raise AssertionError("the forward pass went to its end")


def _of_first_token(forward: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """A projection that gives for every token [1, T, E] what the first one gives."""

    def projected(inputs: Tensor) -> Tensor:
        return forward(inputs[:, :1]).repeat(1, inputs.shape[1], 1)  # some clamp in place

    return projected


def _keep(seen: dict[str, Tensor], key: str) -> Callable[..., None]:
    def hook(_: nn.Module, __: Any, output: Tensor) -> None:
        seen[key] = output[0]

    return hook


def _stacked_experts(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of a layer, its experts stacked as transformers holds them since version 5."""
    stacked: dict[str, Tensor] = {}
    experts: dict[str, dict[int, Tensor]] = {}
    for name, tensor in tensors.items():
        match = _EXPERT.fullmatch(name)
        if match is None:
            stacked[name.replace("block_sparse_moe.", "mlp.")] = tensor
        else:
            part = _EXPERT_PARTS.get(match[2], match[2])
            experts.setdefault(part, {})[int(match[1])] = tensor
    if experts:
        gate, up, down = (
            torch.stack([experts[part][i] for i in range(len(experts[part]))])
            for part in ("gate_proj", "up_proj", "down_proj")
        )
        stacked["mlp.experts.gate_up_proj"] = torch.cat([gate, up], 1)
        stacked["mlp.experts.down_proj"] = down
    return stacked
