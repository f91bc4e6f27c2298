"""A LoRA in a network: whether it fits, putting it in, reading it out, switching it, fusing it."""

import math
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from .adapter import DEFAULT_ADAPTER, LoRA

ADAPTABLE = (nn.Linear, nn.Conv2d, nn.Conv3d)
KEYWORD_CALLED = ("proj_in", "proj_out")  # modules that diffusers' motion modules call with `input=`


# --- checking --------------------------------------------------------------------------------------------------------
def check_fits(denoiser: nn.Module, lora: LoRA) -> None:
    """`ValueError` unless every tensor of the LoRA has its place in the denoiser."""
    network = type(denoiser).__name__
    modules = {name: base_layer(module) for name, module in denoiser.named_modules()}
    unknown = [module for module in lora.modules if module not in modules]
    if unknown:
        check_not_wrapped(denoiser, lora.source)
        raise ValueError(
            f"{lora.source} does not fit {network}: {len(unknown)} of its {len(lora.modules)} modules do not exist"
            f" there, such as {unknown[0]!r}. It was made for another base model."
        )
    problems = []
    for name in lora.modules:
        down, up = (lora.tensors.get(f"{name}.lora_{half}.weight") for half in "AB")
        module = modules[name]
        if down is None or up is None:
            problems.append(f"{name} has only one of lora_A and lora_B")
        elif not isinstance(module, ADAPTABLE):
            problems.append(f"{name} is a {type(module).__name__}, which takes no LoRA")
        elif (up.shape[0], *down.shape[1:]) != (shape := tuple(module.weight.shape)) or up.shape[1] != down.shape[0]:
            problems.append(f"{name} has a weight of shape {shape}, the LoRA {tuple(up.shape)} x {tuple(down.shape)}")
    for name, difference in lora.differences.items():
        parameter = parameter_named(denoiser, name)
        if parameter is None:
            problems.append(f"there is no {name}, to which it adds")
        elif parameter.shape != difference.shape:
            shapes = f"{tuple(parameter.shape)}, what is added to it {tuple(difference.shape)}"
            problems.append(f"{name} has shape {shapes}")
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise ValueError(
            f"{lora.source} does not fit this {network}: {problems[0]}{more}. It was made for another base model, or"
            " the file is incomplete."
        )


def check_not_wrapped(network: nn.Module, source: str) -> None:
    """`ValueError` where `torch.compile` wraps a module of the network, which changes all names."""
    wrapped = next((name for name, _ in network.named_modules() if "_orig_mod" in name), None)
    if wrapped is not None:
        place = wrapped.partition("._orig_mod")[0]
        raise ValueError(
            f"{source} does not fit while {place!r} of this {type(network).__name__} is wrapped by `torch.compile`:"
            " load the LoRA before, or compile the module in place, with its own `compile()`."
        )


def base_layer(module: Any) -> Any:
    """The module that a LoRA adapts, from peft's layer; any other module is returned as it is."""
    return module.get_base_layer() if hasattr(module, "get_base_layer") else module


def parameter_named(network: nn.Module, name: str) -> nn.Parameter | None:
    """A parameter by its name in the base model, whether or not peft's layer stands in for its module."""
    module, _, own = name.rpartition(".")
    try:
        return getattr(base_layer(network.get_submodule(module)), own, None)
    except AttributeError:
        return None


def compute_dtype(module: nn.Module) -> torch.dtype:
    """What a module's weight is computed with: its type, or with diffusers' layerwise casting what it is cast to."""
    layer = base_layer(module)
    registry = getattr(layer, "_diffusers_hook", None)
    casting = registry.get_hook("layerwise_casting") if registry is not None else None
    return layer.weight.dtype if casting is None else casting.compute_dtype


# --- in the denoiser -------------------------------------------------------------------------------------------------
def lora_layers(denoiser: nn.Module) -> dict[str, Any]:
    """peft's layers by the names of the modules they stand in for."""
    from peft.tuners.lora import LoraLayer

    return {name: module for name, module in denoiser.named_modules() if isinstance(module, LoraLayer)}


def add_lora(
    denoiser: nn.Module, names: list[str], rank: int = 64, alpha: float = 64, generator: torch.Generator | None = None
) -> None:
    """Put a fresh trainable LoRA in float32 on the named modules, and freeze everything else."""
    lora = fresh_lora(denoiser, names, rank, alpha, generator)
    denoiser.requires_grad_(False)
    load_lora_into(denoiser, lora, dtype=torch.float32, trainable=True)


def fresh_lora(
    denoiser: nn.Module, names: list[str], rank: int = 64, alpha: float = 64, generator: torch.Generator | None = None
) -> LoRA:
    """A LoRA for the named modules that does nothing yet: A random (Kaiming), B zero."""
    modules = dict(denoiser.named_modules())
    missing = [name for name in names if name not in modules]
    if missing or not names:
        raise ValueError(f"Cannot put a LoRA on modules that do not exist: {missing[:3] or 'none were named'}.")
    tensors = {}
    for name in names:
        shape = base_layer(modules[name]).weight.shape
        down = torch.empty(rank, *shape[1:])
        nn.init.kaiming_uniform_(down, a=math.sqrt(5), generator=generator)
        tensors[f"{name}.lora_A.weight"] = down
        tensors[f"{name}.lora_B.weight"] = torch.zeros(shape[0], rank, *[1] * (len(shape) - 2))
    return LoRA(tensors, alpha=alpha)


def train_only(denoiser: nn.Module, modules: Collection[str], adapter_name: str = DEFAULT_ADAPTER) -> None:
    """Of a LoRA in the denoiser, train what is on these modules; the rest acts as before, and stays as it is."""
    for name, layer in lora_layers(denoiser).items():
        if adapter_name in layer.lora_A:
            for half in (layer.lora_A, layer.lora_B):
                half[adapter_name].requires_grad_(name in modules)


def load_lora_into(
    denoiser: nn.Module,
    lora: LoRA,
    adapter_name: str = DEFAULT_ADAPTER,
    *,
    dtype: torch.dtype | None = None,
    trainable: bool = False,
) -> None:
    """Put a LoRA in the denoiser, wholly or not at all; `dtype` is by default what each adapted weight computes in."""
    if not isinstance(adapter_name, str):
        raise TypeError(f"`adapter_name` must be a string, got {adapter_name!r}.")
    if not adapter_name or set(adapter_name) & set("./\\"):
        raise ValueError(f"An adapter's name must not be empty or contain a dot or slash, got {adapter_name!r}.")
    if adapter_name in getattr(denoiser, "peft_config", {}):
        raise ValueError(f"An adapter named {adapter_name!r} is loaded already; give another name, or unload it.")
    check_fits(denoiser, lora)
    lora.check_no_differences("here only its pairs of matrices can be put in")
    active = {layer: list(layer.active_adapters) for layer in lora_layers(denoiser).values()}
    try:
        _inject(denoiser, lora, adapter_name)
        _fill(denoiser, lora, adapter_name, dtype, trainable)
    except BaseException:  # no memory left, Ctrl-C
        take_out(denoiser, [adapter_name])
        for layer, names in active.items():
            activate(layer, names)
        raise


def _inject(denoiser: nn.Module, lora: LoRA, adapter_name: str) -> None:
    """Put peft's layers in, without values."""
    from peft import inject_adapter_in_model

    # peft freezes what it adapts. Left as it was: torch's choice of a matmul, hence the last bit, depends on it.
    trainable_before = {parameter: parameter.requires_grad for parameter in denoiser.parameters()}
    # On the meta device: nothing is drawn from the global generator, and nothing is allocated twice.
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Already found a `peft_config`")  # several adapters are what we want
            inject_adapter_in_model(
                lora.peft_config(), denoiser, adapter_name, low_cpu_mem_usage=True, state_dict=lora.tensors
            )
    finally:
        for parameter, requires_grad in trainable_before.items():
            parameter.requires_grad_(requires_grad)


def _fill(denoiser: nn.Module, lora: LoRA, adapter_name: str, dtype: torch.dtype | None, trainable: bool) -> None:
    """Give peft's layers the values of a LoRA."""
    for name, layer in lora_layers(denoiser).items():
        if adapter_name not in layer.lora_A:
            continue
        if name.endswith(KEYWORD_CALLED) and _positional not in layer._forward_pre_hooks.values():
            layer.register_forward_pre_hook(_positional, with_kwargs=True)
        weight = layer.get_base_layer().weight
        for half, part in (("A", layer.lora_A[adapter_name]), ("B", layer.lora_B[adapter_name])):
            # A copy: the caller's tensor must not change when this one is trained.
            tensor = lora.tensors[f"{name}.lora_{half}.weight"].to(
                weight.device, dtype or compute_dtype(layer), copy=True
            )
            part.weight = nn.Parameter(tensor.contiguous(), requires_grad=trainable)


def take_out(denoiser: nn.Module, names: Sequence[str], active: Sequence[str] = ()) -> None:
    """Take adapters out, whole or in part; those in `active`, and no others, act afterwards.

    Where no adapter is left, the module that peft's layer stood in for is back.
    """
    for path, layer in lora_layers(denoiser).items():
        activate(layer, active)
        for name in names:
            layer.delete_adapter(name)
        if not layer.lora_A:
            denoiser.set_submodule(path, layer.get_base_layer())
    configs = getattr(denoiser, "peft_config", {})
    for name in names:
        configs.pop(name, None)
    if not configs:
        vars(denoiser).pop("peft_config", None)


def _positional(layer: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """`layer(input=x)` as `layer(x)`: peft's layers call their argument `x`, those they stand in for `input`."""
    kwargs = dict(kwargs)
    return ((kwargs.pop("input"), *args) if "input" in kwargs else args), kwargs


def lora_state_dict(denoiser: nn.Module, adapter_name: str = DEFAULT_ADAPTER) -> dict[str, torch.Tensor]:
    """`module.lora_A.weight -> tensor`, and B: the denoiser's own tensors, detached."""
    tensors = {
        f"{name}.lora_{half}.weight": part[adapter_name].weight.detach()
        for name, layer in lora_layers(denoiser).items()
        for half, part in (("A", layer.lora_A), ("B", layer.lora_B))
        if adapter_name in part
    }
    if not tensors:
        known = ", ".join(sorted(getattr(denoiser, "peft_config", {}))) or "none"
        raise ValueError(f"There is no adapter named {adapter_name!r} in the denoiser. Loaded: {known}.")
    return tensors


def extract_lora(denoiser: nn.Module, adapter_name: str = DEFAULT_ADAPTER) -> LoRA:
    """A LoRA that is in the denoiser, as it would be read from disk; shares its tensors."""
    tensors = lora_state_dict(denoiser, adapter_name)
    config: Any = denoiser.peft_config[adapter_name]
    return LoRA(tensors, config.lora_alpha, dict(config.alpha_pattern), config.use_rslora)


def set_lora_state_dict(denoiser: nn.Module, tensors: Mapping[str, torch.Tensor]) -> None:
    """Overwrite a LoRA that is in the denoiser, in place; the keys and shapes must be exactly its own."""
    current = lora_state_dict(denoiser)
    different = sorted(current.keys() ^ tensors.keys())
    different += [key for key in current.keys() & tensors.keys() if current[key].shape != tensors[key].shape]
    if different:
        raise ValueError(f"{len(different)} LoRA tensors differ in name or shape, such as {different[0]!r}.")
    with torch.no_grad():
        for key, tensor in tensors.items():
            current[key].copy_(tensor)


# --- switched, and fused ---------------------------------------------------------------------------------------------
@contextmanager
def lora_disabled(denoiser: nn.Module) -> Iterator[nn.Module]:
    """Switch LoRAs off while the context is open: the model is the base, bit for bit."""
    layers = list(lora_layers(denoiser).values())
    if any(layer.merged for layer in layers):
        raise ValueError("The LoRA is fused into the base weights; `unfuse_lora()` before switching it off.")
    # Not `enable_adapters(False)`: that one also changes `requires_grad`, in the middle of a training step.
    before = [layer._disable_adapters for layer in layers]
    try:
        for layer in layers:
            layer._disable_adapters = True
        yield denoiser
    finally:
        for layer, value in zip(layers, before):
            layer._disable_adapters = value


def activate(layer: Any, names: Sequence[str]) -> None:
    """These adapters, and no others, act on peft's layer; what is trainable stays so."""
    trainable = [parameter.requires_grad for parameter in layer.parameters()]
    layer.set_adapter(list(names))
    for parameter, requires_grad in zip(layer.parameters(), trainable):
        parameter.requires_grad_(requires_grad)


def fused(denoiser: nn.Module) -> Callable[..., Any]:
    """The denoiser with W + s B A as one weight in each layer, instead of a second path beside W.

    Called like the denoiser, with its result up to rounding, at less cost where the network is small; gradients reach
    A and B. The sums are made here, once for all calls and for at most one backward pass. They take the memory of the
    weights they stand for.
    """
    sums: dict[str, torch.Tensor] = {}
    for name, layer in lora_layers(denoiser).items():
        down, up = (part[DEFAULT_ADAPTER].weight.flatten(1) for part in (layer.lora_A, layer.lora_B))
        weight = layer.get_base_layer().weight
        product = (up @ down).view_as(weight)
        sums[f"{name}.base_layer.weight"] = torch.add(weight, product, alpha=layer.scaling[DEFAULT_ADAPTER])

    def call(*args, **kwargs):
        with lora_disabled(denoiser):
            return torch.func.functional_call(denoiser, sums, args, kwargs)

    return call
