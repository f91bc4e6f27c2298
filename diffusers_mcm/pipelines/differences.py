"""What LoRAs for Wan add to parameters beside their pairs of matrices: to biases, norms and tables of modulation.

There is no second path beside such a parameter, as peft's layers are one beside a weight, so the sum of all that acts
is put in its place, and the base model's own is kept in host memory. It is there again, bit for bit, as soon as
nothing acts any more. A parameter of a half type holds the sum rounded to that, as a fused weight does.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from diffusers import DiffusionPipeline
from torch import nn

from ..lora import LoRA, parameter_named
from .offload import is_changeable, is_in_groups


class DifferenceVerbs(DiffusionPipeline):
    """The part of the LoRA verbs that is about whole parameters; `FusingVerbs` is built on it."""

    def _check_differences(self, component: str, lora: LoRA) -> None:
        """`ValueError` where a sum of parameter and difference would be lost."""
        for name in lora.differences:
            kind = self._parameter(f"{component}.{name}").dtype
            if not kind.is_floating_point or kind.itemsize < 2:
                raise ValueError(
                    f"Cannot add to {component}.{name}, which is {kind}: the sum would be rounded away. Load the LoRA"
                    " before `enable_layerwise_casting()`, or a base model that is not quantised."
                )

    def _keep_differences(self, component: str, lora: LoRA, adapter_name: str) -> LoRA:
        """Keep what an adapter adds to parameters of a component, for `_apply_differences`; the LoRA without that."""
        if lora.differences:
            own = {
                f"{component}.{name}": each.detach().to("cpu", copy=True) for name, each in lora.differences.items()
            }
            self._adapters.differences.setdefault(adapter_name, {}).update(own)
        return lora.without_differences()

    def _parameter(self, name: str) -> nn.Parameter:
        component, _, own = name.partition(".")
        parameter = parameter_named(self._networks[component], own)
        if parameter is None:
            raise ValueError(f"A LoRA adds to {name}, which the network does not have any more.")
        return parameter

    def _strengths(self, fusing: Mapping[str, float] | None = None) -> dict[tuple[str, str], float]:
        """How strongly each adapter that adds to parameters acts now, by its name and by component.

        `fusing` are the adapters that are about to be fused, with the scale.
        """
        state = self._adapters
        fused = state.fused if fusing is None else fusing
        acting = dict(fused) if fused else dict.fromkeys(self.get_active_adapters(), self._call_scale)
        strengths = {}
        for name in state.differences.keys() & acting.keys():
            weight = state.weights.get(name, 1.0)
            for component in {parameter.partition(".")[0] for parameter in state.differences[name]}:
                own = weight.get(component, 1.0) if isinstance(weight, Mapping) else weight
                strengths[name, component] = own * acting[name]
        return {place: strength for place, strength in strengths.items() if strength}

    def _apply_differences(self, fusing: Mapping[str, float] | None = None, *, anew: bool = False) -> None:
        """Have each parameter be the base model's and what the adapters that act add to it, as strongly as they act.

        `anew`: even if it seems to be so already, where a weight has been put back meanwhile.
        """
        state = self._adapters
        if not (state.differences or state.unchanged):
            return
        strengths = self._strengths(fusing)
        if strengths == state.strengths and not anew:
            return
        parts = defaultdict(list)
        for (adapter, component), strength in sorted(strengths.items()):
            for name, difference in state.differences[adapter].items():
                if name.startswith(f"{component}."):
                    parts[name].append((strength, difference))
        for name in sorted({*parts, *state.unchanged}):
            parameter = self._parameter(name)
            base = state.unchanged.get(name, parameter.data).to(parameter.device, parameter.dtype)
            if name in parts:
                state.unchanged[name] = base.cpu()
                exact = torch.promote_types(base.dtype, torch.float32)
                summed = sum((scale * each.to(base.device, exact) for scale, each in parts[name]), base.to(exact))
                parameter.data = summed.to(parameter.dtype)
            else:
                parameter.data = base
                del state.unchanged[name]  # last, for whatever breaks this off, the base model's own is kept
        state.strengths = strengths

    def _require_changeable(self, what: str) -> None:
        """`ValueError` where parameters that a LoRA adds to are kept elsewhere, so that a change would be lost."""
        for component in {name.partition(".")[0] for own in self._adapters.differences.values() for name in own}:
            network = self._networks[component]
            if not is_changeable(network) or is_in_groups(network):
                raise ValueError(
                    f"Cannot {what} while the weights of the {component} are offloaded, for a LoRA adds to whole"
                    " parameters of it; do so before enabling the offload."
                )

    def _require_at_hand(self, what: str, components: Iterable[str]) -> None:
        """`ValueError` where a network's weights are kept elsewhere, so that a change of them would be lost."""
        for component in components:
            if not is_changeable(self._networks[component]):
                raise ValueError(
                    f"The {component}'s weights are offloaded; {what} the LoRA before enabling the offload."
                )

    def _differences_of(self, adapter_name: str, component: str) -> dict[str, torch.Tensor]:
        """What an adapter adds to the parameters of a component, as it was loaded."""
        own = self._adapters.differences.get(adapter_name, {}).items()
        return {name.removeprefix(f"{component}."): each for name, each in own if name.startswith(f"{component}.")}

    @contextmanager
    def _without_differences(self) -> Iterator[None]:
        """Put the base model's own parameters back meanwhile."""
        unchanged = self._adapters.unchanged
        summed = {name: self._parameter(name).data for name in unchanged}
        for name, base in unchanged.items():
            self._parameter(name).data = base.to(summed[name].device, summed[name].dtype)
        try:
            yield
        finally:
            for name, each in summed.items():
                self._parameter(name).data = each
